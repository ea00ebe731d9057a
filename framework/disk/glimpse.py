"""A look at one part of each device in very many crash states: a boot environment, say.

`JournalReader.disks_of` makes the maps of whole devices and goes through all operations of a power
cycle, which takes milliseconds. Here a part is given beforehand; the operations that touch it are
looked up once, and a state costs as much as there are of these.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping

import numpy as np

from framework.disk.journal import SECTOR, Kind
from framework.disk.lazy import EXTRA, UNREADABLE, ZERO, PartialDisk, SectorMap
from framework.disk.reader import JournalReader
from framework.disk.state import Decision, Partial, application_order


@dataclasses.dataclass(frozen=True, slots=True)
class _Effect:
    """An operation or rot that touches the part: when it takes effect, and how."""

    number: int
    """The operation; of rot, the one that it follows."""
    rot: bool
    kind: int
    offset: int
    length: int
    position: int


class Glimpses:
    """One part of each device, in any crash state of a journal.

    `parts`: of each device that is looked at, (offset, length) in whole sectors of 512 bytes.
    """

    def __init__(self, journal: JournalReader, parts: Mapping[str, tuple[int, int]]) -> None:
        self._journal = journal
        self._parts = dict(parts)
        self._effects: dict[tuple[int, str], list[_Effect]] = {}

    def disks(self, decision: Decision, operation: int) -> dict[str, PartialDisk]:
        """The devices after a power failure that followed `operation`; close them."""
        cycle = self._journal.cycle_of(operation)
        extra = self._journal.made_up(b"".join(g.content for g in decision.garbage))
        found = {}
        for name, (begin, _) in self._parts.items():
            device = self._journal.devices.index(name)
            found[name] = PartialDisk(
                name,
                self._map(name, device, cycle, decision, operation),
                self._journal.base_paths[name],
                self._journal.path,
                extra,
                begin,
                self._journal.header.devices[device].size_bytes,
            )
        return found

    def _map(
        self, name: str, device: int, cycle: int, decision: Decision, operation: int
    ) -> SectorMap:
        begin, length = self._parts[name]
        start = self._journal.power_on(cycle)[device]
        sectors = start[begin // SECTOR : (begin + length) // SECTOR].copy()
        part = _Part(sectors, begin)
        lost = set(decision.dropped)
        torn: dict[int, Partial] = {p.operation: p for p in decision.partial}
        for effect in self._of(cycle, name, device):
            if effect.number > operation:
                continue
            if effect.rot:
                part.place(effect.offset, effect.length, effect.position)
            elif effect.number in torn:
                for first, count in torn[effect.number].sectors:
                    skip = first * SECTOR
                    part.apply(
                        effect.kind, effect.offset + skip, count * SECTOR, effect.position + skip
                    )
            elif effect.number not in lost:
                part.apply(effect.kind, effect.offset, effect.length, effect.position)
        position = EXTRA
        for garbage in decision.garbage:
            size = len(garbage.content)
            if garbage.device == device:
                part.place(garbage.offset, size, position, garbage.repeat)
            position += size
        for hole in decision.unreadable:
            if hole.device == device:
                part.fill(hole.offset, hole.length, UNREADABLE)
        return sectors

    def _of(self, cycle: int, name: str, device: int) -> list[_Effect]:
        """What touches the part in a power cycle, in the order in which it takes effect."""
        key = (cycle, name)
        if key in self._effects:
            return self._effects[key]
        journal = self._journal
        first = journal.cuts[cycle - 1].operation + 1 if cycle else 1
        last = journal.cuts[cycle].operation if cycle < len(journal.cuts) else None
        operations = journal.operations.part(first, last or len(journal.operations))
        begin, length = self._parts[name]
        order = application_order(operations)
        mine = (
            (operations.device == device)
            & (operations.kind != Kind.FLUSH)
            & (operations.error == 0)
            & (operations.offset < begin + length)
            & (operations.offset + operations.length > begin)
        )
        order = order[mine[order]]
        done = operations.completed[order]
        effects = [
            _Effect(number, False, kind, offset, size, position)
            for number, kind, offset, size, position in zip(
                (order + operations.first).tolist(),
                operations.kind[order].tolist(),
                operations.offset[order].tolist(),
                operations.length[order].tolist(),
                operations.position[order].tolist(),
                strict=True,
            )
        ]
        sequences = np.where(done < 0, np.iinfo(np.int64).max, done).tolist()
        for rot in sorted(journal.rots, key=lambda r: r.sequence):
            if rot.cycle == cycle and rot.device == device:
                at = bisect_left(sequences, rot.sequence)
                effect = _Effect(rot.after_operation, True, 0, rot.offset, rot.length, rot.position)
                effects.insert(at, effect)
                sequences.insert(at, rot.sequence)
        self._effects[key] = effects
        return effects


class _Part:
    """A part of a map; what is placed is cut to it."""

    def __init__(self, sectors: SectorMap, begin: int) -> None:
        self._sectors = sectors
        self._begin = begin

    def apply(self, kind: int, offset: int, length: int, position: int) -> None:
        """An operation."""
        if kind == Kind.WRITE:
            self.place(offset, length, position)
        else:
            self.fill(offset, length, ZERO)

    def place(self, offset: int, length: int, position: int, repeat: int = 1) -> None:
        """The `length` bytes at `position`, `repeat` times in a row."""
        first, skip, count = self._cut(offset, length * repeat)
        if count <= 0:
            return
        at = position + 1 + skip * SECTOR
        values = np.arange(at, at + count * SECTOR, SECTOR)
        if repeat != 1:
            values = position + 1 + (values - position - 1) % length
        self._sectors[first : first + count] = values

    def fill(self, offset: int, length: int, value: int) -> None:
        """One value."""
        first, _, count = self._cut(offset, length)
        if count > 0:
            self._sectors[first : first + count] = value

    def _cut(self, offset: int, length: int) -> tuple[int, int, int]:
        """First sector within the part, how many of the range's lie before it, how many are in."""
        first = (offset - self._begin) // SECTOR
        skip = max(0, -first)
        count = min(length // SECTOR - skip, len(self._sectors) - max(first, 0))
        return max(first, 0), skip, count
