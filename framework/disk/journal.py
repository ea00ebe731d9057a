"""The journal: one append-only file that holds everything that happened to a machine's disks.

The format is ours; FORMAT.md beside this file is its specification (version 2). In short: a
4096-byte aligned file header with the devices and the identity of their base images, then
records of a 72-byte checksummed header and an optional checksummed payload. The order of the
records in the file *is* the total order of events over all devices, so there is nothing to
sort: the arrival of an operation is one record (a write's payload follows it, stored once), its
completion another, and marks, freezes and power cuts stand where they happened.

A killed harness leaves a prefix, possibly with a torn last record. `scan` stops there and says
at which offset and why; what precedes is the truth at an earlier moment, because nothing that a
later event depends on can be missing. The journal is not fsynced unless asked: it has to outlive
this process, not the host.

This module knows bytes and records, not what they mean for a disk: see `state` for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import xxhash

from framework.disk.errors import JournalError, RecorderError

SECTOR: Final = 512
"""Bytes in a sector, the unit in which a disk's content is tracked."""

VERSION: Final = 2
_READABLE: Final = (1, 2)
FILE_MAGIC: Final = b"BRWNJRNL"
RECORD_MAGIC: Final = 0x63655242  # "BRec", little endian
NO_DEVICE: Final = 0xFF
_FILE_HEADER: Final = struct.Struct("<8sIIQ")
_FILE_HEADER_ALIGN: Final = 4096
_RECORD: Final = struct.Struct("<IBBHQQQQQIIQ")
_CHECKSUM: Final = struct.Struct("<Q")
RECORD_SIZE: Final = _RECORD.size + _CHECKSUM.size
MAX_PAYLOAD: Final = 1 << 31
_IOV_MAX: Final = 512
_PIECE: Final = bytes(1 << 20)


class Kind(enum.IntEnum):
    """What a record is. The first four are the numbered, mutating operations' arrivals."""

    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZEROES = 4
    COMPLETE = 16
    """The operation `operation` was completed; `error` is the NBD error that the guest got."""
    MARK = 32
    """Something from another source: payload is source, NUL, text."""
    FREEZE = 33
    """A trigger fired: the operation described was refused, nothing is answered from here."""
    CUT = 48
    """Power was cut; the payload is the decision that made the rebuilt state."""
    ROT = 49
    """The medium changed by itself: the payload is the new content."""
    CLOSE = 64
    """The recorder was closed in good order."""


class Flag(enum.IntFlag):
    """Flags of an arrival or a completion."""

    NONE = 0
    FUA = 1
    """The write has to be durable when it completes."""
    LYING = 2
    """An injected fault: this flush was acknowledged and made nothing durable."""
    CORRUPTED = 4
    """An injected fault flipped bits: the payload is what was stored, not what was sent."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One record as found in the file; `position` is the file offset of its payload."""

    kind: int
    device: int
    flags: int
    sequence: int
    time_ns: int
    operation: int
    offset: int
    length: int
    error: int
    payload_length: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which base image a device was recorded on."""

    path: Path
    size_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceHeader:
    """A device as the journal's header names it; its index is its number in the records."""

    name: str
    size_bytes: int
    base: BaseIdentity


@dataclasses.dataclass(frozen=True, slots=True)
class JournalHeader:
    """The journal's header: devices, and both clocks at its creation."""

    devices: tuple[DeviceHeader, ...]
    created_utc: str
    created_monotonic_ns: int

    def to_bytes(self) -> bytes:
        """Serialise, padded to a multiple of 4096 bytes."""
        text = json.dumps(
            {
                "sector_size": SECTOR,
                "created_utc": self.created_utc,
                "created_monotonic_ns": self.created_monotonic_ns,
                "devices": [
                    {
                        "name": d.name,
                        "size": d.size_bytes,
                        "base": {
                            "path": str(d.base.path),
                            "size": d.base.size_bytes,
                            "sha256": d.base.sha256,
                        },
                    }
                    for d in self.devices
                ],
            },
            sort_keys=True,
        ).encode()
        head = _FILE_HEADER.pack(FILE_MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text))
        whole = head + text
        return whole + bytes(-len(whole) % _FILE_HEADER_ALIGN)


def parse_header(path: Path, data: bytes | mmap.mmap) -> tuple[JournalHeader, int]:
    """Return the header and the offset of the first record.

    Raises JournalError when this is not a journal, or one of a version not known here.
    """
    if len(data) < _FILE_HEADER.size or bytes(data[:8]) != FILE_MAGIC:
        raise JournalError(path, 0, "not a disk journal (no magic); was the recorder started?")
    _, version, length, checksum = _FILE_HEADER.unpack_from(data)
    if version not in _READABLE:
        raise JournalError(
            path,
            8,
            f"format version {version}, this reader knows {' and '.join(map(str, _READABLE))}",
        )
    text = bytes(data[_FILE_HEADER.size : _FILE_HEADER.size + length])
    if len(text) != length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise JournalError(path, _FILE_HEADER.size, "the header is damaged (checksum)")
    try:
        fields = json.loads(text)
        devices = tuple(
            DeviceHeader(
                name=str(d["name"]),
                size_bytes=int(d["size"]),
                base=BaseIdentity(
                    Path(d["base"]["path"]), int(d["base"]["size"]), str(d["base"]["sha256"])
                ),
            )
            for d in fields["devices"]
        )
        header = JournalHeader(
            devices, str(fields["created_utc"]), int(fields["created_monotonic_ns"])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise JournalError(path, _FILE_HEADER.size, f"the header is malformed: {error}") from error
    end = _FILE_HEADER.size + length
    return header, end + -end % _FILE_HEADER_ALIGN


@dataclasses.dataclass(slots=True)
class ScanEnd:
    """Where and why a scan stopped: `reason` is None at a clean end of file."""

    offset: int = 0
    reason: str | None = None
    unread_bytes: int = 0


def scan(
    data: mmap.mmap | bytes, start: int, end: ScanEnd, *, verify_payload: bool = True
) -> Iterator[Record]:
    """Yield the records from `start`; fill `end` when done. Never raises for damage: it stops."""
    view = memoryview(data)
    try:
        size = len(view)
        offset = start
        sequence = 0
        while offset < size:
            end.offset = offset
            end.unread_bytes = size - offset
            if size - offset < RECORD_SIZE:
                if _is_zero(view[offset:]):
                    end.unread_bytes = 0
                    return
                end.reason = f"torn record header ({size - offset} of {RECORD_SIZE} bytes)"
                return
            fields = _RECORD.unpack_from(view, offset)
            body = offset + _RECORD.size
            if fields[0] == 0 and _is_zero(view[offset:]):
                end.unread_bytes = 0  # space prepared by a recorder that was killed
                return
            if fields[0] != RECORD_MAGIC:
                end.reason = "no record magic"
                return
            (checksum,) = _CHECKSUM.unpack_from(view, body)
            if xxhash.xxh3_64_intdigest(view[offset:body]) != checksum:
                end.reason = "record header checksum is wrong"
                return
            (
                _,
                kind,
                device,
                flags,
                seq,
                time_ns,
                operation,
                where,
                length,
                payload,
                error,
                digest,
            ) = fields
            if seq != sequence:
                end.reason = f"record sequence {seq} where {sequence} is due"
                return
            position = offset + RECORD_SIZE
            if payload > size - position:
                end.reason = f"torn payload ({size - position} of {payload} bytes)"
                return
            if (
                verify_payload
                and payload
                and xxhash.xxh3_64_intdigest(view[position : position + payload]) != digest
            ):
                end.reason = "payload checksum is wrong"
                return
            yield Record(
                kind,
                device,
                flags,
                seq,
                time_ns,
                operation,
                where,
                length,
                error,
                payload,
                position,
            )
            sequence += 1
            offset = position + payload
        end.offset = offset
        end.unread_bytes = 0
    finally:
        view.release()


def _is_zero(view: memoryview) -> bool:
    return all(
        view[i : i + len(_PIECE)] == _PIECE[: len(view) - i]
        for i in range(0, len(view), len(_PIECE))
    )


class JournalWriter:
    """Appends records. Not thread-safe: the recorder's one lock guards it.

    `append` only queues (the caller's payload buffer must stay untouched until `flush`), so that
    a batch of arrivals and the completions of the batch before cost one system call.
    """

    def __init__(self, path: Path, header: JournalHeader, *, durable: bool = False) -> None:
        self.path = path
        self.failure: RecorderError | None = None
        self._durable = durable
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError as error:
            raise RecorderError(
                f"journal {path} exists already; record into a fresh directory", path
            ) from error
        except OSError as error:
            raise RecorderError(f"journal {path}: can't create: {error.strerror}", path) from error
        self._pending: list[bytes | memoryview] = []
        self._sequence = 0
        self._flushed = 0
        self._end = 0
        self._prepared = 0
        try:
            whole = header.to_bytes()
            self._pending.append(whole)
            self._end = len(whole)
            self.flush()
        except RecorderError:
            os.close(self._fd)
            path.unlink(missing_ok=True)
            raise

    @property
    def sequence(self) -> int:
        """The sequence number that the next record gets."""
        return self._sequence

    @property
    def fd(self) -> int:
        """The file descriptor, for reading back what was flushed."""
        return self._fd

    def prepare(self, ahead_bytes: int) -> bool:
        """Fill a bit more of the space ahead of the records with zeros; whether more is to be done.

        Writing into pages that the page cache holds already takes a fifth of the time of writing
        into new ones, so a burst of the guest costs little (tests/benchmarks/recorder.py shows
        it). At most one piece of 1 MiB a call. Failing is no error: the space is only for speed.
        """
        start = max(self._prepared, self._end)
        if self.failure is not None or self._fd < 0 or start >= self._end + ahead_bytes:
            return False
        try:
            self._prepared = start + os.pwrite(self._fd, _PIECE, start)
        except OSError:
            return False
        return True

    def append(
        self,
        kind: int,
        *,
        device: int = NO_DEVICE,
        flags: int = 0,
        operation: int = 0,
        offset: int = 0,
        length: int = 0,
        error: int = 0,
        payload: bytes | memoryview = b"",
        time_ns: int = 0,
    ) -> tuple[int, int]:
        """Queue a record; return its sequence number and its payload's file offset."""
        if self.failure is not None:
            raise self.failure
        size = len(payload)
        digest = xxhash.xxh3_64_intdigest(payload) if size else 0
        sequence = self._sequence
        head = _RECORD.pack(
            RECORD_MAGIC,
            kind,
            device,
            flags,
            sequence,
            time_ns or time.monotonic_ns(),
            operation,
            offset,
            length,
            size,
            error,
            digest,
        )
        self._pending.append(head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head)))
        if size:
            self._pending.append(payload)
        self._sequence = sequence + 1
        position = self._end + RECORD_SIZE
        self._end = position + size
        return sequence, position

    @property
    def dirty(self) -> bool:
        """Whether records are queued and not yet in the file."""
        return bool(self._pending)

    def flush(self) -> None:
        """Write what is queued. On failure the torn tail is cut off and every later call raises.

        Raises RecorderError naming the file.
        """
        if self.failure is not None:
            raise self.failure
        pending = self._pending
        if not pending:
            return
        self._pending = []
        begin = self._flushed
        try:
            for first in range(0, len(pending), _IOV_MAX):
                self._write(pending[first : first + _IOV_MAX])
        except OSError as error:
            if begin:  # else it is the file's header, and there is nothing to save
                self._flushed = begin
                self._salvage(pending)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._flushed)
            self.failure = RecorderError(
                f"journal {self.path}: can't write at offset {self._flushed}: {error.strerror}; "
                "free some space and record again",
                self.path,
            )
            raise self.failure from error

    def _salvage(self, pending: list[bytes | memoryview]) -> None:
        """Write the records that still fit: completions of what was answered already, mostly."""
        at = 0
        with contextlib.suppress(OSError):
            while at < len(pending):
                count = 2 if _RECORD.unpack_from(pending[at])[9] else 1
                self._write(pending[at : at + count])
                at += count

    def _write(self, buffers: list[bytes | memoryview]) -> None:
        total = sum(len(b) for b in buffers)
        written = os.pwritev(self._fd, buffers, self._flushed)
        while written < total:  # a short write: go on with what is left, or learn the errno
            rest: list[bytes | memoryview] = []
            skip = written
            for buffer in buffers:
                if skip < len(buffer):
                    rest.append(memoryview(buffer)[skip:])
                skip = max(0, skip - len(buffer))
            written += os.pwritev(self._fd, rest, self._flushed + written)
        self._flushed += total

    def sync(self) -> None:
        """Make what was flushed survive a crash of the host, if the journal is a durable one."""
        if self._durable:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Flush and close; what can't be written any more is dropped, with `failure` set."""
        if self._fd < 0:
            return
        try:
            self.flush()
            os.ftruncate(self._fd, self._flushed)  # drop what was prepared and not used
        except (RecorderError, OSError):
            pass
        finally:
            os.close(self._fd)
            self._fd = -1


def mark_payload(source: str, text: str) -> bytes:
    """The payload of a MARK record."""
    return source.replace("\0", "").encode(errors="replace") + b"\0" + text.encode(errors="replace")


def parse_mark(payload: bytes) -> tuple[str, str]:
    """The source and the text of a MARK record's payload."""
    source, _, text = payload.partition(b"\0")
    return source.decode(errors="replace"), text.decode(errors="replace")


def as_json(value: Any) -> bytes:
    """Canonical JSON: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
