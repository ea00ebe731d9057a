"""Models of a write that power cut in its middle.

Sources: Zheng et al., "Understanding the Robustness of SSDs under Power Fault", FAST 2013 (bit
corruption and shorn writes); Tseng, Grupp and Swanson, "Understanding the Impact of Power Loss on
Flash Memory", DAC 2011 (an interrupted program operation leaves a page that is neither old nor
new, and may not be readable).
"""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar, Final, Literal

from framework.disk.errors import DiskError
from framework.disk.journal import SECTOR
from framework.disk.models.base import CacheModel, generator, numbers, rewritten_durably, units_of
from framework.disk.state import Decision, Garbage, Partial, PowerCycle, Unreadable

Tear = Literal["mix", "garbage", "unreadable"]
_TEARS: Final[tuple[Tear, ...]] = ("mix", "garbage", "unreadable")


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
        rng = generator(seed)
        chosen = len(rows) - 1 if self.newest else int(rng.random() * len(rows))
        kinds = tuple(k for k in self.kinds if self.garbage or k != "garbage") or ("mix",)
        tear = kinds[int(rng.random() * len(kinds))]
        row = rows[chosen]
        operations = cycle.operations
        device = int(operations.device[row])
        offset, length = int(operations.offset[row]), int(operations.length[row])
        units = units_of(offset, length, self.granularity)
        new, boundary = _choose_units(len(units), rng)
        number = operations.first + row
        sectors = tuple(
            ((a - offset) // SECTOR, (b - a) // SECTOR)
            for (a, b), take in zip(units, new, strict=True)
            if take
        )
        whole = units[boundary][0] - units[boundary][0] % self.granularity
        size = min(self.granularity, cycle.sizes[device] - whole)
        if rewritten_durably(cycle, rows, row, (whole, size)):
            tear = "mix"  # a later durable write of that unit can't have left it destroyed
        return Decision(
            dropped=numbers(cycle, rows[chosen + 1 :]),
            open_operations=len(rows),
            partial=(Partial(number, sectors),),
            garbage=(Garbage(device, whole, rng.getrandbits(8 * size).to_bytes(size, "little")),)
            if tear == "garbage"
            else (),
            unreadable=(Unreadable(device, whole, size),) if tear == "unreadable" else (),
        )


@dataclasses.dataclass(frozen=True)
class TornPage(TornSector):
    """A write was cut in the middle of a NAND page (`torn-page`).

    As `TornSector`, in units of a flash page: a page is programmed as one, so whatever else lies
    in it is lost with it. 16 KiB is usual for 3D NAND; the device does not tell.
    """

    name: ClassVar[str] = "torn-page"
    granularity: int = 16384


def _choose_units(count: int, rng: random.Random) -> tuple[list[bool], int]:
    """Which units are new, and the unit at the tear: the one that may be worse than old or new."""
    shape = int(rng.random() * 3)
    at = int(rng.random() * (count + 1))
    if shape == 0:
        return [i < at for i in range(count)], min(at, count - 1)
    if shape == 1:
        return [i >= at for i in range(count)], max(at - 1, 0)
    return [rng.random() < 0.5 for _ in range(count)], min(at, count - 1)
