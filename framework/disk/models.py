"""Cache models: what a power cut leaves of the operations that no flush covered.

Each model is a small frozen class whose `decide` is a pure function of the power cycle and a
seed; the decision it returns is complete, is recorded in the journal and replays bit for bit.
Only `random.Random.random` and `getrandbits` are used, whose sequences Python keeps stable for a
seed. Sources: the vocabulary of DESIGN.md §3; for the faults, Zheng et al., "Understanding the
Robustness of SSDs under Power Fault", FAST 2013 (bit corruption, shorn writes, unserialisable
writes), Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (reordering of
unflushed writes), the Linux kernel's Documentation/block/writeback_cache_control.rst (what a
flush and FUA promise) and JESD84-B51 6.6.10 (an eMMC's reliable write). Not modelled: loss of data
that was at rest (whole erase units wiped), and loss after a flush other than by `LyingFlush`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import random
from typing import Any, ClassVar, Final, Literal

from framework.disk.errors import DiskError
from framework.disk.journal import SECTOR
from framework.disk.state import Decision, Garbage, Partial, PowerCycle, Unreadable

Tear = Literal["mix", "garbage", "unreadable"]
_TEARS: Final[tuple[Tear, ...]] = ("mix", "garbage", "unreadable")


class CacheModel(abc.ABC):
    """What a device's volatile cache does when power fails."""

    name: ClassVar[str]

    @abc.abstractmethod
    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Decide what survives; the same arguments give the same decision."""

    def parameters(self) -> dict[str, Any]:
        """The model's parameters as plain values, for the journal and for people."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters().items())
        return f"{self.name}({inner})" if inner else self.name


def _numbers(cycle: PowerCycle, rows: list[int]) -> tuple[int, ...]:
    first = cycle.operations.first
    return tuple(sorted(first + row for row in rows))


@dataclasses.dataclass(frozen=True)
class WriteThrough(CacheModel):
    """No volatile cache: every completed operation is on the medium (`kept`)."""

    name: ClassVar[str] = "kept"

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep all that was completed; what was in flight is lost."""
        rows = cycle.open_rows()
        lost = rows[cycle.operations.completed[rows] < 0]
        return Decision(dropped=_numbers(cycle, lost.tolist()), open_operations=len(rows))


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
        keep = int(_generator(seed).random() * (len(rows) + 1))
        if self.keep is not None:
            keep = min(self.keep, len(rows))
        return Decision(dropped=_numbers(cycle, rows[keep:]), open_operations=len(rows))


@dataclasses.dataclass(frozen=True)
class VolatileCache(CacheModel):
    """A cache that drains in any order: any subset of the open operations survives (`subset`).

    Survivors still take effect in the order of completion. `keep` is each one's probability.
    """

    name: ClassVar[str] = "subset"
    keep: float = 0.5

    def __post_init__(self) -> None:
        _probability("VolatileCache", "keep", self.keep)

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a subset."""
        return _subset(cycle, cycle.open_rows().tolist(), seed, self.keep)


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
        _probability("ReorderedCache", "keep", self.keep)

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep the newest."""
        rows = cycle.open_rows().tolist()
        kept = math.ceil(len(rows) * self.keep)
        return Decision(
            dropped=_numbers(cycle, rows[: len(rows) - kept]), open_operations=len(rows)
        )


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
        _probability("LyingFlush", "keep", self.keep)
        if self.flushes is not None and self.flushes < 0:
            raise DiskError(f"LyingFlush: flushes={self.flushes} is negative")

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a subset of what no honest flush covered."""
        rows = cycle.open_rows(lies=self.flushes).tolist()
        return _subset(cycle, rows, seed, self.keep)


@dataclasses.dataclass(frozen=True)
class TornSector(CacheModel):
    """A write was cut in its middle (`torn`).

    The open operations survive in order up to one, chosen by the seed (or the newest, with
    `newest`), which is torn: of its atomic units of `granularity` bytes a prefix, a suffix or a
    scattered subset is new, the others are old. Then, as `kinds` allow and the seed chooses, one
    unit of it is left a mix of old and new only, filled with garbage, or unreadable until it is
    rewritten. A unit is the device's own aligned one: garbage in a 4096-byte unit also destroys
    neighbouring sectors that the write did not touch, as a drive does that emulates 512-byte
    sectors. With nothing open, nothing is torn.
    """

    name: ClassVar[str] = "torn"
    granularity: int = SECTOR
    kinds: tuple[Tear, ...] = _TEARS
    garbage: bool = True
    """Short for leaving "garbage" out of `kinds` when False."""
    newest: bool = False

    def __post_init__(self) -> None:
        if self.granularity < SECTOR or self.granularity % SECTOR:
            raise DiskError(
                f"TornSector: granularity {self.granularity} is not a multiple of {SECTOR}"
            )
        unknown = set(self.kinds) - set(_TEARS)
        if unknown or not self.kinds:
            raise DiskError(f"TornSector: kinds must be some of {', '.join(_TEARS)}")

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Tear one operation, drop the later ones."""
        rows = cycle.open_rows().tolist()
        if not rows:
            return Decision()
        rng = _generator(seed)
        chosen = len(rows) - 1 if self.newest else int(rng.random() * len(rows))
        kinds = tuple(k for k in self.kinds if self.garbage or k != "garbage") or ("mix",)
        tear = kinds[int(rng.random() * len(kinds))]
        row = rows[chosen]
        operations = cycle.operations
        device = int(operations.device[row])
        offset, length = int(operations.offset[row]), int(operations.length[row])
        units = _units(offset, length, self.granularity)
        new, boundary = _choose_units(len(units), rng)
        number = operations.first + row
        sectors = tuple(
            ((a - offset) // SECTOR, (b - a) // SECTOR)
            for (a, b), take in zip(units, new, strict=True)
            if take
        )
        whole = units[boundary][0] - units[boundary][0] % self.granularity
        size = min(self.granularity, cycle.sizes[device] - whole)
        if _rewritten_durably(cycle, rows, row, (whole, size)):
            tear = "mix"  # a later durable write of that unit can't have left it destroyed
        return Decision(
            dropped=_numbers(cycle, rows[chosen + 1 :]),
            open_operations=len(rows),
            partial=(Partial(number, sectors),),
            garbage=(Garbage(device, whole, rng.getrandbits(8 * size).to_bytes(size, "little")),)
            if tear == "garbage"
            else (),
            unreadable=(Unreadable(device, whole, size),) if tear == "unreadable" else (),
        )


MODELS: Final[dict[str, type[CacheModel]]] = {
    m.name: m
    for m in (WriteThrough, PrefixCache, VolatileCache, ReorderedCache, TornSector, LyingFlush)
}
"""The models by the names that DESIGN.md and the journal use."""


def model_from(name: str, parameters: dict[str, Any] | None = None) -> CacheModel:
    """Make a model from its name and parameters, as the journal or a command line has them.

    Raises DiskError for an unknown name or parameter.
    """
    if name not in MODELS:
        raise DiskError(f"no cache model {name!r}; there are {', '.join(MODELS)}")
    given = dict(parameters or {})
    if "kinds" in given:
        given["kinds"] = tuple(given["kinds"])
    try:
        return MODELS[name](**given)
    except TypeError as error:
        raise DiskError(f"cache model {name}: {error}") from error


def _probability(model: str, field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise DiskError(f"{model}: {field}={value} is not a probability (0 to 1)")


def _generator(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - has to be reproducible, nothing secret here


def _subset(cycle: PowerCycle, rows: list[int], seed: int, keep: float) -> Decision:
    rng = _generator(seed)
    lost = [row for row in rows if rng.random() >= keep]
    return Decision(dropped=_numbers(cycle, lost), open_operations=len(rows))


def _rewritten_durably(
    cycle: PowerCycle, open_rows: list[int], row: int, unit: tuple[int, int]
) -> bool:
    """Whether a durable operation that took effect after `row` touches the range."""
    operations = cycle.operations
    if operations.completed[row] < 0:
        return False  # it was in flight: nothing took effect after it
    offset, length = unit
    touching = (
        cycle.changing()
        & (operations.device == operations.device[row])
        & (operations.offset < offset + length)
        & (operations.offset + operations.length > offset)
        & (operations.completed > operations.completed[row])
    )
    touching[open_rows] = False
    return bool(touching.any())


def _units(offset: int, length: int, granularity: int) -> list[tuple[int, int]]:
    """The parts of a range that lie in different aligned units, as (start, end) in bytes."""
    units = []
    at = offset
    while at < offset + length:
        end = min(at - at % granularity + granularity, offset + length)
        units.append((at, end))
        at = end
    return units


def _choose_units(count: int, rng: random.Random) -> tuple[list[bool], int]:
    """Which units are new, and the unit at the tear: the one that may be worse than old or new."""
    shape = int(rng.random() * 3)
    at = int(rng.random() * (count + 1))
    if shape == 0:
        return [i < at for i in range(count)], min(at, count - 1)
    if shape == 1:
        return [i >= at for i in range(count)], max(at - 1, 0)
    return [rng.random() < 0.5 for _ in range(count)], min(at, count - 1)
