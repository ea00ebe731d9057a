"""Reading a journal back: its operations as arrays, its marks and cuts, any state of its disks."""

from __future__ import annotations

import dataclasses
import mmap
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from framework.disk.errors import BaseImageError, JournalError
from framework.disk.journal import (
    Flag,
    JournalHeader,
    Kind,
    Record,
    ScanEnd,
    parse_header,
    parse_mark,
    scan,
)
from framework.disk.lazy import (
    EXTRA,
    Extra,
    LazyDisk,
    SectorMap,
    StartState,
    new_map,
)
from framework.disk.models import CacheModel, WriteThrough
from framework.disk.recorder import file_sha256
from framework.disk.state import (
    CutRecord,
    Decision,
    OperationLog,
    Operations,
    PowerCycle,
    Rot,
    parse_cut,
    rebuild,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """An event of another source; `after_operation` operations had arrived before it."""

    sequence: int
    time_ns: int
    source: str
    text: str
    after_operation: int
    cycle: int


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A freeze: `operation` was refused. `kind` is None if it was frozen without one."""

    sequence: int
    time_ns: int
    operation: int
    kind: Kind | None
    device: str | None
    offset: int
    length: int
    trigger: str
    cycle: int


class JournalReader:
    """A journal, read completely. Damage ends the reading cleanly: see `torn_at`.

    `bases` gives base images by device, if they are not where the journal says; `verify_bases`
    compares their SHA-256, too (their size always). A context manager.
    """

    def __init__(
        self,
        path: Path,
        bases: Mapping[str, Path] | None = None,
        *,
        verify_bases: bool = False,
        begin: StartState | None = None,
    ) -> None:
        """Read the journal; `begin`: the state with which it began, if not the base images.

        Raises JournalError if it isn't one, BaseImageError if a base is missing or another.
        """
        self.path = Path(path)
        self.header: JournalHeader
        self.torn_at: int | None = None
        """The offset at which reading stopped because the rest is torn or damaged."""
        self.torn_reason: str | None = None
        self.unread_bytes = 0
        self.closed_cleanly = False
        self.marks: list[Mark] = []
        self.cuts: list[CutRecord] = []
        self.freezes: list[Frozen] = []
        self.rots: list[Rot] = []
        self._log = OperationLog()
        try:
            self._load()
        except OSError as error:
            raise JournalError(self.path, 0, error.strerror or str(error)) from error
        self.operations: Operations = self._log.table(1, len(self._log))
        """All mutating operations as columns."""
        self.devices = tuple(d.name for d in self.header.devices)
        self.base_paths = self._check_bases(bases or {}, verify_bases)
        self._begin = begin
        self._power_on: list[list[SectorMap]] = [
            [
                new_map(d.size_bytes, d.base.size_bytes) if begin is None else begin.maps[d.name]
                for d in self.header.devices
            ]
        ]

    # ---------------------------------------------------------------- states

    def cycle_of(self, operation: int) -> int:
        """The power cycle in which `operation` was the last one carried out."""
        return bisect_left([c.operation for c in self.cuts], operation)

    def states_at(
        self, operation: int, model: CacheModel | None = None, seed: int = 0
    ) -> dict[str, LazyDisk]:
        """All disks after a power failure that followed `operation` (0: before the first).

        Raises IndexError for an operation that the journal doesn't hold.
        """
        maps, extra = self.maps_at(operation, model, seed)
        return {
            name: self._disk(name, sectors, extra)
            for name, sectors in zip(self.devices, maps, strict=True)
        }

    def state_at(
        self,
        operation: int,
        model: CacheModel | None = None,
        seed: int = 0,
        device: str | None = None,
    ) -> LazyDisk:
        """One disk (the first, unless named) after a power failure that followed `operation`."""
        index = self._index(device)
        name = self.devices[index]
        maps, extra = self.maps_at(operation, model, seed)
        return self._disk(name, maps[index], extra)

    def maps_at(
        self, operation: int, model: CacheModel | None = None, seed: int = 0
    ) -> tuple[list[SectorMap], bytes]:
        """As `states_at`, but the sector maps, and the content that the model made up.

        Raises IndexError for an operation that the journal doesn't hold.
        """
        if not 0 <= operation <= len(self.operations):
            raise IndexError(f"operation {operation} of a journal of {len(self.operations)}")
        cycle, power_cycle = self.power_cycle_at(operation)
        decision = (model or WriteThrough()).decide(power_cycle, seed)
        extra = b"".join(g.content for g in decision.garbage)
        return self.apply(cycle, power_cycle, decision), extra

    def power_cycle_at(self, operation: int) -> tuple[int, PowerCycle]:
        """The power cycle's index and its operations up to `operation`: what a model decides on."""
        cycle = self.cycle_of(operation)
        first = self.cuts[cycle - 1].operation + 1 if cycle else 1
        sizes = tuple(d.size_bytes for d in self.header.devices)
        return cycle, PowerCycle(self.operations.part(first, operation), self.devices, sizes)

    def apply(self, cycle: int, power_cycle: PowerCycle, decision: Decision) -> list[SectorMap]:
        """The maps that a decision makes of a power cycle's operations; its garbage is EXTRA."""
        last = power_cycle.operations.first + len(power_cycle.operations) - 1
        rots = [r for r in self.rots if r.cycle == cycle and r.after_operation <= last]
        return rebuild(self.power_on(cycle), power_cycle.operations, rots, decision, EXTRA)

    def power_on(self, cycle: int) -> list[SectorMap]:
        """The maps with which a power cycle began (0: the bases); don't change them."""
        while len(self._power_on) <= cycle:
            index = len(self._power_on) - 1
            cut = self.cuts[index]
            _, power_cycle = self._cycle(index)
            rots = [r for r in self.rots if r.cycle == index]
            self._power_on.append(
                rebuild(
                    self._power_on[index],
                    power_cycle.operations,
                    rots,
                    cut.decision,
                    cut.garbage_position,
                )
            )
        return self._power_on[cycle]

    def after_cut(self, index: int, device: str | None = None) -> LazyDisk:
        """The disk that was served after cut `index`, bit for bit."""
        at = self._index(device)
        name = self.devices[at]
        sectors = self.power_on(index + 1)[at].copy()
        return self._disk(name, sectors)

    def final(self, device: str | None = None) -> LazyDisk:
        """The disk as it was when the journal ends; what was in flight then is not on it."""
        at = self._index(device)
        name = self.devices[at]
        cycle, power_cycle = self._cycle(len(self.cuts))
        rots = [r for r in self.rots if r.cycle == cycle]
        decision = WriteThrough().decide(power_cycle, 0)
        maps = rebuild(self.power_on(cycle), power_cycle.operations, rots, decision, EXTRA)
        return self._disk(name, maps[at])

    # ---------------------------------------------------------------- loading

    def _load(self) -> None:
        with self.path.open("rb") as file:
            if self.path.stat().st_size == 0:
                raise JournalError(self.path, 0, "empty file: the recorder died at its start")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.header, start = parse_header(self.path, data)
                end = ScanEnd()
                for record in scan(data, start, end):
                    try:
                        self._take(record, data)
                    except (ValueError, IndexError) as error:
                        end.offset, end.reason = record.position, f"malformed record: {error}"
                        end.unread_bytes = len(data) - record.position
                        break
                if end.reason is not None:
                    self.torn_at, self.torn_reason = end.offset, end.reason
                    self.unread_bytes = end.unread_bytes

    def _take(self, record: Record, data: mmap.mmap) -> None:
        cycle = len(self.cuts)
        kind = Kind(record.kind)
        if kind <= Kind.ZEROES:
            position = record.position if kind is Kind.WRITE else -1
            number = self._log.arrive(
                (kind, record.device, record.offset, record.length, record.flags, position),
                sequence=record.sequence,
                time_ns=record.time_ns,
                cycle=cycle,
            )
            if number != record.operation or record.device >= len(self.header.devices):
                raise ValueError(f"operation {record.operation} where {number} is due")
            return
        if kind is Kind.COMPLETE:
            if not 1 <= record.operation <= len(self._log):
                raise ValueError(f"completion of operation {record.operation}, which never arrived")
            self._log.complete(
                record.operation, record.sequence, record.time_ns, record.error, record.flags
            )
            return
        payload = data[record.position : record.position + record.payload_length]
        if kind is Kind.MARK:
            source, text = parse_mark(payload)
            self.marks.append(
                Mark(record.sequence, record.time_ns, source, text, len(self._log), cycle)
            )
        elif kind is Kind.FREEZE:
            named = record.device < len(self.header.devices)
            self.freezes.append(
                Frozen(
                    record.sequence,
                    record.time_ns,
                    record.operation,
                    Kind(record.error) if record.error else None,
                    self.header.devices[record.device].name if named else None,
                    record.offset,
                    record.length,
                    payload.decode(errors="replace"),
                    cycle,
                )
            )
        elif kind is Kind.ROT:
            self.rots.append(
                Rot(
                    record.sequence,
                    record.time_ns,
                    record.operation,
                    record.device,
                    record.offset,
                    record.length,
                    record.position,
                    cycle,
                )
            )
        elif kind is Kind.CUT:
            fields, decision, garbage_at = parse_cut(payload)
            self.cuts.append(
                CutRecord(
                    cycle,
                    record.operation,
                    str(fields["model"]),
                    dict(fields["parameters"]),
                    int(fields["seed"]),
                    decision,
                    record.sequence,
                    record.time_ns,
                    record.position + garbage_at,
                )
            )
        elif kind is Kind.CLOSE:
            self.closed_cleanly = True

    def _check_bases(self, given: Mapping[str, Path], verify: bool) -> dict[str, Path]:
        paths = {}
        for device in self.header.devices:
            path = Path(given.get(device.name, device.base.path))
            where = f"device {device.name}: base image {path}"
            try:
                size = path.stat().st_size
            except OSError as error:
                raise BaseImageError(f"{where}: {error.strerror}; pass bases=", path) from error
            if size != device.base.size_bytes:
                raise BaseImageError(
                    f"{where}: {size} bytes, recorded with {device.base.size_bytes}", path
                )
            if verify and file_sha256(path) != device.base.sha256:
                raise BaseImageError(f"{where}: not the content that was recorded (SHA-256)", path)
            paths[device.name] = path
        return paths

    def _cycle(self, index: int) -> tuple[int, PowerCycle]:
        first = self.cuts[index - 1].operation + 1 if index else 1
        last = self.cuts[index].operation if index < len(self.cuts) else len(self.operations)
        sizes = tuple(d.size_bytes for d in self.header.devices)
        return index, PowerCycle(self.operations.part(first, last), self.devices, sizes)

    def initial(self) -> dict[str, LazyDisk]:
        """All disks as they were when the journal began."""
        maps = zip(self.devices, self.power_on(0), strict=True)
        return {name: self._disk(name, sectors.copy()) for name, sectors in maps}

    def disks_of(self, decision: Decision, operation: int) -> dict[str, LazyDisk]:
        """All disks after a power failure that followed `operation` and did what `decision` says.

        Raises IndexError for an operation that the journal doesn't hold.
        """
        cycle, power_cycle = self.power_cycle_at(operation)
        maps = self.apply(cycle, power_cycle, decision)
        extra = b"".join(g.content for g in decision.garbage)
        return {
            name: self._disk(name, sectors, extra)
            for name, sectors in zip(self.devices, maps, strict=True)
        }

    def made_up(self, own: bytes = b"") -> Extra:
        """What positions from EXTRA on mean in the maps: a decision's garbage, and what is beneath.

        `beneath`: the state with which the journal began, if that was not the base images.
        """
        return own if self._begin is None else self._begin.over(own)

    def disk(self, name: str, sectors: SectorMap) -> LazyDisk:
        """A device in the state that a map of this journal's says; close it."""
        return self._disk(name, sectors)

    def _disk(self, name: str, sectors: SectorMap, own: bytes = b"") -> LazyDisk:
        return LazyDisk(name, sectors, self.base_paths[name], self.path, self.made_up(own))

    def _index(self, device: str | None) -> int:
        if device is None:
            return 0
        if device not in self.devices:
            raise JournalError(
                self.path, 0, f"no device {device!r}; there are {', '.join(self.devices)}"
            )
        return self.devices.index(device)

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


__all__ = ["Flag", "Frozen", "JournalReader", "Mark"]
