"""Models of media that lose more, or otherwise, than a cache: SD cards, eMMC, discards.

Sources, each only as far as it goes:

* SD: Linux sends a card without a cache no flush, so an fsync returns when the card says that it
  is no longer busy (drivers/mmc/core and block; seen in our recordings: no flush at all). That
  cards then still move data inside is reported by M. Bradley, "SD cards die when power is
  removed", linux-mmc, September 2010 (1.6 s after the last write). How much a card may lose is not
  specified anywhere: `window` is an assumption, and a parameter.
* eMMC: JESD84-B51 6.6.10 (a reliable write leaves the old or the new data at a sector boundary;
  Linux uses one for REQ_FUA) and its erase groups; that an interrupted ordinary write can lose
  what shares the erase unit is reported from the field and has a mechanism (garbage collection that
  copies, without power-loss protection), no promise of a standard: `erase_unit` is a parameter.
* Discard: ATA's and NVMe's "deterministic read after trim" are optional; without them a discarded
  block may read as before, as zeros or as anything (NVMe Base Specification, Dataset Management,
  DLFEAT; ACS-4, DATA SET MANAGEMENT). Write-zeroes has no such freedom: it is a write of zeros.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Final

import numpy as np

from framework.disk.errors import DiskError
from framework.disk.journal import SECTOR, Kind
from framework.disk.models.base import (
    CacheModel,
    garbage_bytes,
    generator,
    numbers,
    probability,
    rewritten_durably,
)
from framework.disk.state import (
    Column,
    Decision,
    Garbage,
    Partial,
    PowerCycle,
    application_order,
)

GARBAGE_PATTERN: Final = 4096
"""Bytes of garbage that are repeated over a discarded range."""


@dataclasses.dataclass(frozen=True)
class SdCard(CacheModel):
    """An SD card that still has the newest operations in hand when power fails (`sd`).

    Of each device's operations the newest `window` are at stake, unless a flush or FUA made them
    durable (Linux sends a card neither): each survives with probability `keep`. Everything older
    is on the medium. QEMU's card splits every write into operations of 512 bytes, as the bus does.
    """

    name: ClassVar[str] = "sd"
    window: int = 8
    keep: float = 0.5

    def __post_init__(self) -> None:
        probability("SdCard", "keep", self.keep)
        if self.window < 1:
            raise DiskError(f"SdCard: window={self.window} is not positive")

    def at_stake(self, cycle: PowerCycle) -> list[int]:
        """Rows of the operations at stake, in the order of application."""
        rows = cycle.open_rows()
        devices = cycle.operations.device[rows]
        at_stake = np.zeros(len(rows), dtype=bool)
        for device in range(len(cycle.devices)):
            at_stake[np.flatnonzero(devices == device)[-self.window :]] = True
        found: list[int] = rows[at_stake].tolist()
        return found

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Keep a subset of the newest."""
        rows = self.at_stake(cycle)
        rng = generator(seed)
        lost = [row for row in rows if rng.random() >= self.keep]
        return Decision(dropped=numbers(cycle, lost), open_operations=len(rows))


@dataclasses.dataclass(frozen=True)
class Emmc(CacheModel):
    """An eMMC that was programming when power failed (`emmc`).

    The open operations survive in order up to one, which was being programmed. With FUA it is a
    reliable write: its sectors are new up to a boundary, old after it. Otherwise the same, or (as
    the seed chooses) the aligned erase unit at the boundary is wiped as well, data at rest in it
    included: it reads as `erased` bytes (EXT_CSD ERASED_MEM_CONT: 0x00 or 0xFF). `reliable` takes
    every write for a reliable one.
    """

    name: ClassVar[str] = "emmc"
    erase_unit: int = 512 << 10
    erased: int = 0
    reliable: bool = False

    def __post_init__(self) -> None:
        if self.erase_unit < SECTOR or self.erase_unit % SECTOR:
            raise DiskError(f"Emmc: erase_unit {self.erase_unit} is not a multiple of {SECTOR}")
        if self.erased not in (0, 255):
            raise DiskError(f"Emmc: erased={self.erased} is neither 0 nor 255")

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Tear one operation, drop the later ones, perhaps wipe a unit."""
        rows = cycle.open_rows().tolist()
        if not rows:
            return Decision()
        rng = generator(seed)
        chosen = int(rng.random() * len(rows))
        row = rows[chosen]
        operations = cycle.operations
        device, number = int(operations.device[row]), operations.first + row
        offset, length = int(operations.offset[row]), int(operations.length[row])
        kept = int(rng.random() * (length // SECTOR + 1))
        wiped: tuple[Garbage, ...] = ()
        if rng.random() < 0.5 and not self.reliable and not operations.fua[row]:
            at = offset + min(kept, length // SECTOR - 1) * SECTOR
            unit = self.unit(at, cycle.sizes[device])
            if not rewritten_durably(cycle, rows, row, unit):
                wiped = (self.wipe(device, *unit),)
        return Decision(
            dropped=numbers(cycle, rows[chosen + 1 :]),
            open_operations=len(rows),
            partial=(Partial(number, ((0, kept),) if kept else ()),),
            garbage=wiped,
        )

    def unit(self, at: int, size_bytes: int) -> tuple[int, int]:
        """Offset and length of the erase unit that holds a byte of a device of that size."""
        start = at - at % self.erase_unit
        return start, min(self.erase_unit, size_bytes - start)

    def wipe(self, device: int, offset: int, length: int) -> Garbage:
        """An erased range."""
        return Garbage(device, offset, bytes([self.erased]) * SECTOR, length // SECTOR)


@dataclasses.dataclass(frozen=True)
class LooseDiscard(CacheModel):
    """A device whose discarded blocks read as it likes (`discard`).

    All that was completed is on the medium (as under `kept`), but what a discard covered and
    nothing has written since reads, for each discard as the seed chooses: as before it, as zeros,
    or as garbage. Durability doesn't matter: it is so for ever, until it is rewritten.
    """

    name: ClassVar[str] = "discard"

    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Choose for each discard."""
        operations = cycle.operations
        rng = generator(seed)
        rows = np.flatnonzero(
            (operations.kind == Kind.DISCARD)
            & (operations.error == 0)
            & (operations.completed >= 0)
        ).tolist()
        choices = [(row, int(rng.random() * 3)) for row in rows]
        old = [row for row, choice in choices if choice == 0]
        junk = [row for row, choice in choices if choice == 2]
        return self.outcome(cycle, old, junk, seed)

    def outcome(self, cycle: PowerCycle, old: list[int], junk: list[int], seed: int) -> Decision:
        """The decision in which the discards of rows `old` did nothing and `junk` left garbage."""
        operations = cycle.operations
        in_flight = np.flatnonzero(cycle.changing() & (operations.completed < 0)).tolist()
        garbage = []
        for row in junk:
            for offset, length in exposed(cycle, row, set(old) | set(in_flight)):
                garbage += junk_pieces(seed, int(operations.device[row]), offset, length)
        return Decision(
            dropped=numbers(cycle, sorted({*old, *in_flight})),
            open_operations=int((operations.kind == Kind.DISCARD).sum()),
            garbage=tuple(garbage),
        )


def junk_pieces(seed: int, device: int, offset: int, length: int) -> list[Garbage]:
    """Garbage over a range: a pattern whose phase depends on the place alone, not on the range.

    So two ranges that overlap hold the same garbage where they do.
    """
    pattern = garbage_bytes(seed, device, 0, GARBAGE_PATTERN)
    pieces = []
    end = offset + length
    while offset < end:
        phase = offset % GARBAGE_PATTERN
        whole = (end - offset) // GARBAGE_PATTERN
        if phase == 0 and whole:
            pieces.append(Garbage(device, offset, pattern, whole))
            offset += whole * GARBAGE_PATTERN
        else:
            size = min(GARBAGE_PATTERN - phase, end - offset)
            pieces.append(Garbage(device, offset, pattern[phase : phase + size]))
            offset += size
    return pieces


def exposed(cycle: PowerCycle, row: int, lost: set[int]) -> list[tuple[int, int]]:
    """The parts (offset, length) of a row's range that no surviving later operation covers."""
    operations = cycle.operations
    order: Column = application_order(operations)
    later = order[int(np.flatnonzero(order == row)[0]) + 1 :]
    device = operations.device[row]
    start, end = int(operations.offset[row]), int(operations.offset[row] + operations.length[row])
    parts = [(start, end)]
    touching = later[
        cycle.changing()[later]
        & (operations.device[later] == device)
        & (operations.offset[later] < end)
        & (operations.offset[later] + operations.length[later] > start)
    ]
    for other in touching.tolist():
        if other in lost:
            continue
        a = int(operations.offset[other])
        b = a + int(operations.length[other])
        parts = [
            piece
            for first, last in parts
            for piece in ((first, min(last, a)), (max(first, b), last))
            if piece[0] < piece[1]
        ]
    return [(first, last - first) for first, last in parts]
