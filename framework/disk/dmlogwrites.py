"""Logs of the kernel's dm-log-writes target, read into a journal and written from one.

So a real board can be recorded: its kernel logs what reaches a block device, the log is fetched and
imported over an image of the device made before, and everything that reads journals works on it.
On the board (kernel with CONFIG_DM_LOG_WRITES, `dmsetup`, a spare partition or NBD device as LOG):

1. image the medium: `dd if=/dev/mmcblk0 of=before.img bs=1M` (through the network, or of a twin);
2. map it: `dmsetup create rec --table "0 $(blockdev --getsz DEV) log-writes DEV LOG"`, and let the
   update write to /dev/mapper/rec (an initramfs does this before the root is mounted);
3. mark what matters: `dmsetup message rec 0 mark updater-ArtifactCommit`;
4. update; then `dmsetup remove rec`, fetch LOG, and call `import_log`.

The format, from the kernel's drivers/md/dm-log-writes.c and its documentation
(admin-guide/device-mapper/log-writes): a sector with the superblock (magic, version 1, number of
entries, sector size; little endian), then for each entry a sector that begins with sector, number
of sectors, flags and data length (u64 each), followed by the data; a mark's text stands in the
entry's own sector; a discard has no data. The kernel logs writes in the order of completion, once a
flush that was issued after their completion has completed, then the flush; FUA writes and marks at
once. So a flush in the log covers all that stands before it, and an import can take every entry for
completed when the next arrives. What the log can't say: when things happened, what was in flight
when power went, and the order between a FUA write and the unflushed ones that completed before it
(they come later in the log: the pessimistic reading).
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from framework.disk.errors import DiskError
from framework.disk.journal import (
    SECTOR,
    BaseIdentity,
    DeviceHeader,
    Flag,
    JournalHeader,
    JournalWriter,
    Kind,
    mark_payload,
)
from framework.disk.reader import JournalReader
from framework.disk.recorder import file_sha256
from framework.disk.state import Decision

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
FLUSH: Final = 1
FUA: Final = 2
DISCARD: Final = 4
MARK: Final = 8
METADATA: Final = 16
_KNOWN_FLAGS: Final = FLUSH | FUA | DISCARD | MARK | METADATA
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_MAX_DATA: Final = 1 << 30
_PIECE: Final = 8 << 20
_END: Final = "dm-log-writes-end"
SOURCE: Final = "dm-log-writes"
"""The source of marks that a log had."""


class LogWritesError(DiskError):
    """A dm-log-writes log can't be read or written; `offset` is where in it, in bytes."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"dm-log-writes log {path}: offset {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log.

    Attributes:
        flags: FLUSH, FUA, DISCARD, MARK, METADATA.
        offset, length: range on the device, bytes.
        position: where its data stands in the log, -1 without data.
        text: a mark's text.
    """

    flags: int
    offset: int
    length: int
    position: int
    text: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Imported:
    """What an import took in; `problem` says why it ended early, None if it didn't."""

    entries: int
    operations: int
    marks: int
    problem: str | None = None


# ---------------------------------------------------------------- reading


def read_log(path: Path) -> Iterator[Entry]:
    """The entries of a log, in order, checked one by one.

    Raises LogWritesError at the first thing that is wrong: no superblock, a torn entry, nonsense.
    """
    try:
        with path.open("rb") as file:
            yield from _entries(path, file)
    except OSError as error:
        raise LogWritesError(path, 0, error.strerror or str(error)) from error


def _entries(path: Path, file: BinaryIO) -> Iterator[Entry]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(_SUPER.size)
    if len(head) < _SUPER.size:
        raise LogWritesError(path, 0, f"{len(head)} bytes are too few for a superblock")
    magic, version, count, sector = _SUPER.unpack(head)
    if magic != MAGIC:
        raise LogWritesError(path, 0, "no superblock; was the mapping removed before the copy?")
    if version != VERSION:
        raise LogWritesError(path, 8, f"version {version}, this reader knows {VERSION}")
    if not SECTOR <= sector <= 65536 or sector & (sector - 1):
        raise LogWritesError(path, 24, f"sector size {sector}")
    at = sector
    for number in range(1, count + 1):
        file.seek(at)
        data = file.read(sector)
        which = f"entry {number} of {count}"
        if len(data) < sector:
            raise LogWritesError(path, at, f"{which} is torn: the log ends there")
        first, sectors, flags, data_length = _ENTRY.unpack_from(data)
        if flags & ~_KNOWN_FLAGS:
            raise LogWritesError(path, at, f"{which} has unknown flags {flags:#x}")
        body = at + sector
        if flags & MARK:
            if data_length > sector - _ENTRY.size:
                raise LogWritesError(path, at, f"{which}: a mark of {data_length} bytes")
            text = data[_ENTRY.size : _ENTRY.size + data_length].decode(errors="replace")
            yield Entry(flags, 0, 0, -1, text.rstrip("\0"))
            at = body + sectors * sector if sectors * sector < _MAX_DATA else body
            continue
        if sectors > (1 << 54) or first > (1 << 54):
            raise LogWritesError(path, at, f"{which}: {sectors} sectors at sector {first}")
        length = sectors * sector
        if flags & DISCARD or not length:
            yield Entry(flags, first * sector, length, -1)
            at = body
            continue
        if length > _MAX_DATA or body + length > size:
            raise LogWritesError(
                path, at, f"{which}: {length} bytes of data, the log has {max(0, size - body)}"
            )
        yield Entry(flags, first * sector, length, body)
        at = body + length


def import_log(
    log: Path,
    base: Path,
    journal: Path,
    *,
    device: str = "vda",
    size_bytes: int | None = None,
    strict: bool = True,
) -> Imported:
    """Make a journal of a log and of the image that its device had before.

    Args:
        log: the log, a copy of the log device.
        base: the device's image from before the first entry.
        journal: where to write the journal; must not exist.
        device: the device's name in it.
        size_bytes: the device's size, if the image is shorter (zeros follow).
        strict: a log that is wrong somewhere leaves no journal. Else what stands before that
            is imported, and `Imported.problem` says what is wrong.

    Raises:
        LogWritesError: the log is not one, or (strict) wrong somewhere.
        RecorderError: the journal can't be written. DiskError: the base can't be read.
    """
    try:
        base_size = base.stat().st_size
    except OSError as error:
        raise DiskError(f"base image {base}: {error.strerror}") from error
    size = size_bytes or base_size - base_size % SECTOR
    header = JournalHeader(
        (DeviceHeader(device, size, BaseIdentity(base, base_size, file_sha256(base))),),
        "1970-01-01T00:00:00.000+00:00",
        0,
    )
    entries = read_log(log)
    first = next(entries, None)  # a file that is no log leaves nothing behind
    writer = JournalWriter(journal, header)
    done = _Import(writer, log, size)
    problem = None
    try:
        try:
            if first is not None:
                done.take(first)
            for entry in entries:
                done.take(entry)
        except LogWritesError as error:
            if strict:
                raise
            problem = str(error)
        writer.append(Kind.CLOSE)
        writer.flush()
    except BaseException:
        writer.close()
        journal.unlink(missing_ok=True)
        raise
    writer.close()
    return Imported(done.entries, done.operations, done.marks, problem)


class _Import:
    """Turns entries into records."""

    def __init__(self, writer: JournalWriter, log: Path, size: int) -> None:
        self.writer = writer
        self.log = log
        self.size = size
        self.entries = self.operations = self.marks = 0
        self._time = 0

    def take(self, entry: Entry) -> None:
        """One entry: an operation that completes at once, or two, or a mark."""
        if entry.offset + entry.length > self.size:
            raise LogWritesError(
                self.log,
                max(entry.position, 0),
                f"{entry.length} bytes at {entry.offset} are beyond the device's end ({self.size})",
            )
        self.entries += 1
        if entry.flags & MARK:
            self.marks += 1
            payload = mark_payload(SOURCE, entry.text)
            self.writer.append(Kind.MARK, payload=payload, time_ns=self._now())
            self.writer.flush()
            return
        if entry.flags & FLUSH:
            self._operation(Kind.FLUSH, 0, 0, b"", 0)
        flags = Flag.FUA if entry.flags & FUA else 0
        if entry.flags & DISCARD:
            self._operation(Kind.DISCARD, entry.offset, entry.length, b"", flags)
        elif entry.length:
            with self.log.open("rb") as file:
                file.seek(entry.position)
                data = file.read(entry.length)
            self._operation(Kind.WRITE, entry.offset, entry.length, data, flags)

    def _operation(self, kind: Kind, offset: int, length: int, data: bytes, flags: int) -> None:
        self.operations += 1
        self.writer.append(
            kind,
            device=0,
            flags=flags,
            operation=self.operations,
            offset=offset,
            length=length,
            payload=data,
            time_ns=self._now(),
        )
        self.writer.append(Kind.COMPLETE, operation=self.operations, time_ns=self._now())
        self.writer.flush()

    def _now(self) -> int:
        """A log has no times: a nanosecond a record keeps the order."""
        self._time += 1
        return self._time


# ---------------------------------------------------------------- writing


def export_log(
    reader: JournalReader,
    device: str,
    path: Path,
    *,
    cycle: int = 0,
    until: int | None = None,
    decision: Decision | None = None,
) -> int:
    """Write one power cycle of a device as the kernel would have logged it; the entries' number.

    Replayed over the device's content at that cycle's power-on (`JournalReader.power_on`; of cycle
    0 the base image) it gives the device's content at the end.

    Args:
        reader: the recording.
        device: which device.
        path: the log; it is overwritten, and removed if it can't be written completely.
        cycle: which power cycle.
        until: only what happened up to this operation.
        decision: write the crash state that it makes at `until` instead: what survived, in the
            order of application, without flushes, then the garbage. Unreadable ranges can't be
            expressed: they are left out.

    Raises:
        DiskError: no such device or cycle. LogWritesError: the log can't be written.
    """
    if device not in reader.devices or not 0 <= cycle <= len(reader.cuts):
        raise DiskError(f"no device {device!r} in power cycle {cycle} of {reader.path}")
    number = reader.devices.index(device)
    try:
        with path.open("wb") as out, reader.path.open("rb") as journal:
            log = _Log(out, journal)
            last = len(reader.operations) if until is None else until
            if decision is None:
                _write_history(log, reader, number, cycle, last)
            else:
                rows = _rows(reader, number, cycle, last)
                _write_state(log, reader, number, rows, decision)
            log.mark(_END)
            log.finish()
            return log.count
    except OSError as error:
        path.unlink(missing_ok=True)
        raise LogWritesError(path, 0, error.strerror or str(error)) from error


class _Log:
    """A log being written, in sectors of 512 bytes."""

    def __init__(self, out: BinaryIO, journal: BinaryIO) -> None:
        self.out = out
        self.journal = journal
        self.count = 0
        out.write(bytes(SECTOR))

    def entry(self, flags: int, offset: int, length: int, position: int = -1) -> None:
        """An operation; its data from the journal, zeros without a position."""
        head = _ENTRY.pack(offset // SECTOR, length // SECTOR, flags, 0)
        self.out.write(head.ljust(SECTOR, b"\0"))
        self.count += 1
        if flags & DISCARD or not length:
            return
        if position < 0:
            self.content(bytes(SECTOR), length // SECTOR)
            return
        self.journal.seek(position)
        while length:
            data = self.journal.read(min(length, _PIECE))
            if not data:
                raise OSError("the journal was truncated while in use")
            self.out.write(data)
            length -= len(data)

    def content(self, data: bytes, repeat: int) -> None:
        """Data of its own, `repeat` times."""
        at_once = max(1, _PIECE // max(1, len(data)))
        while repeat:
            now = min(repeat, at_once)
            self.out.write(data * now)
            repeat -= now

    def mark(self, text: str) -> None:
        """A mark; too long a text is cut."""
        data = text.encode(errors="replace")[: SECTOR - _ENTRY.size - 1]
        self.out.write((_ENTRY.pack(0, 0, MARK, len(data)) + data).ljust(SECTOR, b"\0"))
        self.count += 1

    def finish(self) -> None:
        """The superblock, last: a log that has one is whole."""
        self.out.seek(0)
        self.out.write(_SUPER.pack(MAGIC, VERSION, self.count, SECTOR))


def _rows(reader: JournalReader, device: int, cycle: int, until: int) -> list[int]:
    """A device's operations of a power cycle that did not fail, up to one of them."""
    operations = reader.operations
    wanted = (
        (operations.cycle == cycle)
        & (operations.device == device)
        & (operations.error == 0)
        & (operations.number <= until)
    )
    found: list[int] = np.flatnonzero(wanted).tolist()
    return found


def _write_history(log: _Log, reader: JournalReader, device: int, cycle: int, until: int) -> None:
    """What the kernel does: see the module's text."""
    operations = reader.operations
    events: list[tuple[int, str, int]] = []
    for row in _rows(reader, device, cycle, until):
        events.append((int(operations.arrived[row]), "arrived", row))
        if operations.completed[row] >= 0:
            events.append((int(operations.completed[row]), "completed", row))
    for number, mark in enumerate(reader.marks):
        if mark.cycle == cycle and mark.after_operation <= until:
            events.append((mark.sequence, "mark", number))
    unflushed: list[int] = []
    waiting: dict[int, list[int]] = {}
    for _, what, row in sorted(events):
        if what == "mark":
            log.mark(f"{reader.marks[row].source}: {reader.marks[row].text}")
        elif operations.kind[row] == Kind.FLUSH:
            if operations.flags[row] & Flag.LYING:
                continue
            if what == "arrived":
                waiting[row], unflushed = unflushed, []
            else:
                for earlier in waiting.pop(row):
                    _write_operation(log, reader, earlier)
                log.entry(FLUSH, 0, 0)
        elif what == "completed":
            if operations.flags[row] & Flag.FUA:
                _write_operation(log, reader, row)
            else:
                unflushed.append(row)
    for row in [r for rows in waiting.values() for r in rows] + unflushed:
        _write_operation(log, reader, row)


def _write_operation(log: _Log, reader: JournalReader, row: int) -> None:
    operations = reader.operations
    kind, position = int(operations.kind[row]), int(operations.position[row])
    flags = FUA if operations.flags[row] & Flag.FUA else 0
    if kind == Kind.DISCARD:
        flags |= DISCARD
    log.entry(flags, int(operations.offset[row]), int(operations.length[row]), position)


def _write_state(
    log: _Log, reader: JournalReader, device: int, rows: list[int], decision: Decision
) -> None:
    operations = reader.operations
    rows = [row for row in rows if operations.kind[row] != Kind.FLUSH]
    rows.sort(key=lambda r: (operations.completed[r] < 0, int(operations.completed[r]), r))
    lost = set(decision.dropped)
    torn = {p.operation: p.sectors for p in decision.partial}
    for row in rows:
        if row + 1 in lost:
            continue
        if row + 1 not in torn:
            _write_operation(log, reader, row)
            continue
        offset, position = int(operations.offset[row]), int(operations.position[row])
        discard = DISCARD if operations.kind[row] == Kind.DISCARD else 0
        for first, count in torn[row + 1]:
            where = position + first * SECTOR if position >= 0 else -1
            log.entry(discard, offset + first * SECTOR, count * SECTOR, where)
    for garbage in decision.garbage:
        if garbage.device == device:
            head = _ENTRY.pack(garbage.offset // SECTOR, garbage.length // SECTOR, 0, 0)
            log.out.write(head.ljust(SECTOR, b"\0"))
            log.count += 1
            log.content(garbage.content, garbage.repeat)
