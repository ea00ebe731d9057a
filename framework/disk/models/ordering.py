"""Models of a volatile cache that loses whole operations: in order, in any order, or by lying.

Sources: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (reordering of
unflushed writes); the Linux kernel's Documentation/block/writeback_cache_control.rst (what a flush
and FUA promise); Zheng et al., "Understanding the Robustness of SSDs under Power Fault", FAST 2013
(drives that lose what they had acknowledged as flushed).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from framework.disk.errors import DiskError
from framework.disk.models.base import CacheModel, generator, numbers, probability, subset
from framework.disk.state import Decision, PowerCycle


@dataclasses.dataclass(frozen=True)
class WriteThrough(CacheModel):
    """No volatile cache: every completed operation is on the medium (`kept`)."""

    name: ClassVar[str] = "kept"

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep all that was completed; what was in flight is lost."""
        rows = cycle.open_rows()
        lost = rows[cycle.operations.completed[rows] < 0]
        return Decision(dropped=numbers(cycle, lost.tolist()), open_operations=len(rows))


@dataclasses.dataclass(frozen=True)
class PrefixCache(CacheModel):
    """A cache that drains in order: a prefix of the open operations survives (`prefix`).

    `keep` fixes the prefix's length; without it the seed chooses one of all lengths alike. The
    order is one over all devices, as if one controller held the cache.
    """

    name: ClassVar[str] = "prefix"
    keep: int | None = None

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a prefix."""
        rows = cycle.open_rows().tolist()
        keep = int(generator(seed).random() * (len(rows) + 1))
        if self.keep is not None:
            keep = min(self.keep, len(rows))
        return Decision(dropped=numbers(cycle, rows[keep:]), open_operations=len(rows))


@dataclasses.dataclass(frozen=True)
class VolatileCache(CacheModel):
    """A cache that drains in any order: any subset of the open operations survives (`subset`).

    Survivors still take effect in the order of completion. `keep` is each one's probability.
    """

    name: ClassVar[str] = "subset"
    keep: float = 0.5

    def __post_init__(self) -> None:
        probability("VolatileCache", "keep", self.keep)

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a subset."""
        return subset(cycle, cycle.open_rows().tolist(), seed, self.keep)


@dataclasses.dataclass(frozen=True)
class ReorderedCache(CacheModel):
    """A cache that drained newest first (`reordered`).

    A corner of `subset`, the one that an ordering bug can't hide from: of the open operations the
    newest reached the medium, a share of `keep` rounded up, and none of the older ones. The seed
    is not used.
    """

    name: ClassVar[str] = "reordered"
    keep: float = 0.5

    def __post_init__(self) -> None:
        probability("ReorderedCache", "keep", self.keep)

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep the newest."""
        rows = cycle.open_rows().tolist()
        kept = math.ceil(len(rows) * self.keep)
        return Decision(dropped=numbers(cycle, rows[: len(rows) - kept]), open_operations=len(rows))


@dataclasses.dataclass(frozen=True)
class LyingFlush(CacheModel):
    """A device that acknowledges flushes without doing them (`lying`).

    The newest `flushes` flushes of each device were lies (None: all since power-on, and FUA too);
    of what is then open, each operation survives with probability `keep`.
    """

    name: ClassVar[str] = "lying"
    flushes: int | None = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        probability("LyingFlush", "keep", self.keep)
        if self.flushes is not None and self.flushes < 0:
            raise DiskError(f"LyingFlush: flushes={self.flushes} is negative")

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a subset of what no honest flush covered."""
        rows = cycle.open_rows(lies=self.flushes).tolist()
        return subset(cycle, rows, seed, self.keep)
