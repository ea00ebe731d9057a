"""A disk served lazily from its base image and the journal: nothing is materialised.

Where each sector's content lies is one number in a map: 0 for the base image at the same
offset, p + 1 for offset p of the journal file, ZERO and UNREADABLE for what has no bytes. The
map of an untouched disk costs no memory (the kernel's zero pages), a copy of a 512 MiB disk's
map 8 MiB, so a crash state costs a copy and a few assignments.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from framework.disk.errors import BaseImageError, DiskError, JournalError, UnreadableSectorError
from framework.disk.journal import SECTOR

SectorMap = npt.NDArray[np.int64]
"""For every sector of a device: where its content is (see the module's text)."""

BASE: Final = 0
ZERO: Final = -1
UNREADABLE: Final = -2

EXTRA: Final = 1 << 60
"""Positions from here on are not in the journal, but in the bytes given to the `LazyDisk`."""

_BENEATH: Final = EXTRA + (1 << 59)
"""Positions from here on belong to the state that a journal began with: see `StartState`."""

_BENEATH_EXTRA: Final = 1 << 58
"""Of those: from here on they are that state's own extra content."""

_CHUNK: Final = 1 << 20
_BLOCK: Final = 4096  # small, so that few zeros are written between what there is
_ZEROES: Final = bytes(_CHUNK)


class Extra(Protocol):
    """Content that is in no file of its own: bytes, or what reads like them."""

    def __getitem__(self, part: slice, /) -> bytes:
        """The bytes from `part.start` to `part.stop`."""


class _Layers:
    """Extra content over that of the state that the journal began with."""

    def __init__(self, own: Extra, beneath: StartState) -> None:
        self._own = own
        self._beneath = beneath

    def __getitem__(self, part: slice, /) -> bytes:
        at = part.start - (_BENEATH - EXTRA)
        if at < 0:
            return self._own[part]
        return self._beneath.read(at, part.stop - part.start)


@dataclasses.dataclass(frozen=True)
class StartState:
    """Disks that begin with a state of another journal, not with their base images.

    So a machine runs on a crash state, and is recorded, with nothing materialised. Make one with
    `of`; the other journal's file must stay.
    """

    maps: Mapping[str, SectorMap]
    _journal_fd: int
    _extra: Extra
    _held: tuple[LazyDisk, ...]

    @classmethod
    def of(cls, disks: Mapping[str, LazyDisk]) -> StartState:
        """The state that `disks` (all of one machine) show; they stay open as long as it does."""
        maps = {}
        for name, disk in disks.items():
            old = disk.map
            new = old.copy()
            new[(old > BASE) & (old < EXTRA)] += _BENEATH
            new[old > EXTRA] += _BENEATH + _BENEATH_EXTRA - EXTRA
            maps[name] = new
        first = next(iter(disks.values()))
        return cls(maps, first.journal_fd, first.extra, tuple(disks.values()))

    def over(self, own: Extra = b"") -> Extra:
        """Extra content for maps that began with this state: `own` over what is beneath."""
        return _Layers(own, self)

    def read(self, position: int, length: int) -> bytes:
        """Content of this state's own journal or extra."""
        if position >= _BENEATH_EXTRA:
            at = position - _BENEATH_EXTRA
            return self._extra[at : at + length]
        return read_exact(self._journal_fd, length, position, "the journal beneath")


def new_map(size_bytes: int, base_size_bytes: int) -> SectorMap:
    """The map of an untouched device; what lies beyond the base image reads as zeros."""
    sectors = np.zeros(size_bytes // SECTOR, dtype=np.int64)
    if size_bytes > base_size_bytes:
        sectors[base_size_bytes // SECTOR :] = ZERO
    return sectors


def place(sectors: SectorMap, offset: int, length: int, position: int) -> None:
    """Say that `length` bytes at `offset` lie at `position` of the journal."""
    first = offset // SECTOR
    sectors[first : (offset + length) // SECTOR] = np.arange(
        position + 1, position + 1 + length, SECTOR
    )


def place_repeated(
    sectors: SectorMap, offset: int, position: int, length: int, repeat: int
) -> None:
    """Say that the `length` bytes at `position` stand at `offset` `repeat` times in a row."""
    first = offset // SECTOR
    part = sectors[first : first + repeat * length // SECTOR]
    part[:] = np.resize(np.arange(position + 1, position + 1 + length, SECTOR), len(part))


def place_kind(sectors: SectorMap, offset: int, length: int, kind: int) -> None:
    """Make a range ZERO, UNREADABLE or BASE."""
    sectors[offset // SECTOR : (offset + length) // SECTOR] = kind


def runs(part: SectorMap) -> Iterator[tuple[int, int, int]]:
    """Split a slice of a map into (first, count, value) whose bytes are contiguous on one file."""
    size = len(part)
    if size <= 16:  # a request of a file system block: cheaper without numpy's overhead
        values = part.tolist()
        first = 0
        while first < size:
            value = values[first]
            last = first + 1
            step = SECTOR if value > 0 else 0
            while last < size and values[last] == value + step * (last - first):
                last += 1
            yield first, last - first, value
            first = last
        return
    step_to_next = np.diff(part)
    joined = np.where(part[:-1] > 0, step_to_next == SECTOR, step_to_next == 0)
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1, [size]))
    for first, after in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield first, after - first, int(part[first])


def read_exact(fd: int, length: int, offset: int, name: str) -> bytes:
    """Read exactly `length` bytes; a file that became shorter is an error, not zeros."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise DiskError(f"{name} ends at {offset + len(data)}: it was truncated while in use")
        data += more
    return data


def write_exact(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`; raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def read_range(
    sectors: SectorMap,
    files: tuple[int, int],
    offset: int,
    length: int,
    device: str,
    *,
    extra: Extra = b"",
) -> bytes:
    """Read a sector-aligned range through the map; `files`: descriptors of base and journal.

    Raises UnreadableSectorError if a sector of it can't be read.
    """
    part = sectors[offset // SECTOR : (offset + length) // SECTOR]
    return read_part(part, files, offset, device, extra=extra)


def read_part(
    part: SectorMap, files: tuple[int, int], offset: int, device: str, *, extra: Extra = b""
) -> bytes:
    """As `read_range`, given the part of the map that is asked for; it begins at `offset`."""
    base_fd, journal_fd = files
    length = len(part) * SECTOR
    if not part.any():
        return read_exact(base_fd, length, offset, f"the base image of {device}")
    pieces: list[bytes] = []
    for first, count, value in runs(part):
        size = count * SECTOR
        if value > EXTRA:
            pieces.append(extra[value - EXTRA - 1 : value - EXTRA - 1 + size])
        elif value > 0:
            pieces.append(read_exact(journal_fd, size, value - 1, "the journal"))
        elif value == BASE:
            where = offset + first * SECTOR
            pieces.append(read_exact(base_fd, size, where, f"the base image of {device}"))
        elif value == ZERO:
            pieces.append(bytes(size))
        else:
            raise UnreadableSectorError(device, offset + first * SECTOR, size)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@functools.lru_cache(maxsize=16)
def _not_zeros(
    path: Path, version: tuple[int, ...], begin: int, end: int
) -> tuple[tuple[int, int], ...]:
    """Where a file holds more than zeros, to the block, in pieces of at most `_CHUNK` bytes.

    Remembered, because a partition is exported in thousands of states; `version` is the file's.
    """
    found: list[tuple[int, int]] = []
    with path.open("rb", buffering=0) as file:
        while begin < end:
            try:
                begin = max(begin, os.lseek(file.fileno(), begin, os.SEEK_DATA))
                hole = min(end, os.lseek(file.fileno(), begin, os.SEEK_HOLE))
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    break
                hole = end  # its file system can't tell
            for at in range(begin, hole, _CHUNK):
                chunk = read_exact(file.fileno(), min(_CHUNK, hole - at), at, str(path))
                for skip in range(0, len(chunk), _BLOCK):
                    block = chunk[skip : skip + _BLOCK]
                    if block == _ZEROES[: len(block)]:
                        continue
                    start, stop = at + skip, at + skip + len(block)
                    if found and found[-1][1] == start and stop - found[-1][0] <= _CHUNK:
                        found[-1] = (found[-1][0], stop)
                    else:
                        found.append((start, stop))
            begin = max(hole, begin + 1)
    return tuple(found)


class LazyDisk:
    """One state of one device, read-only: a frozen map over the base image and the journal.

    It stays valid while the recorder goes on (the journal only grows) and after it was closed,
    as long as both files exist. A context manager; closing is also done when it is collected.
    """

    def __init__(
        self, name: str, sectors: SectorMap, base: Path, journal: Path, extra: Extra = b""
    ) -> None:
        """Open the files. `extra`: content that a decision made up and no journal holds.

        Raises BaseImageError or JournalError if a file can't be opened.
        """
        self.extra = extra
        self.name = name
        self.map = sectors
        """Where each sector lies; don't change it."""
        self.base_path = base
        self.journal_path = journal
        self._fds: list[int] = []
        try:
            self._base_fd = os.open(base, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise BaseImageError(
                f"device {name}: base image {base}: {error.strerror}", base
            ) from error
        self._fds.append(self._base_fd)
        try:
            self.journal_fd = os.open(journal, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise JournalError(journal, 0, error.strerror or "can't be opened") from error
        self._fds.append(self.journal_fd)

    @property
    def size_bytes(self) -> int:
        """The device's size in bytes."""
        return len(self.map) * SECTOR

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes at any alignment.

        Raises DiskError beyond the end, UnreadableSectorError for a sector torn unreadable.
        """
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise DiskError(
                f"device {self.name}: {length} bytes at {offset} are beyond its end "
                f"({self.size_bytes})"
            )
        if not self._fds:
            raise DiskError(f"device {self.name}: this view was closed")
        first = offset - offset % SECTOR
        end = offset + length + -(offset + length) % SECTOR
        if first == end:
            return b""
        data = read_range(
            self.map,
            (self._base_fd, self.journal_fd),
            first,
            end - first,
            self.name,
            extra=self.extra,
        )
        if first == offset and end == offset + length:
            return data
        return data[offset - first : offset - first + length]

    def chunks(self, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield a range in pieces of at most 1 MiB."""
        end = self.size_bytes if length is None else offset + length
        while offset < end:
            size = min(_CHUNK, end - offset)
            yield self.read(offset, size)
            offset += size

    def sha256(self, offset: int = 0, length: int | None = None) -> str:
        """The SHA-256 of a range (default: all), as hexadecimal text."""
        digest = hashlib.sha256()
        for chunk in self.chunks(offset, length):
            digest.update(chunk)
        return digest.hexdigest()

    def _part(self, offset: int, end: int) -> SectorMap:
        """The part of the map that covers a range of bytes."""
        return self.map[offset // SECTOR : -(-end // SECTOR)]

    def unreadable(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """The (offset, length) ranges within a range (default: all) that can't be read."""
        end = self.size_bytes if length is None else offset + length
        first = offset // SECTOR
        part = self._part(offset, end)
        if not bool((part == UNREADABLE).any()):
            return []
        return [
            ((first + at) * SECTOR, count * SECTOR)
            for at, count, value in runs(part)
            if value == UNREADABLE
        ]

    def export(
        self,
        path: Path,
        offset: int = 0,
        length: int | None = None,
        *,
        zero_unreadable: bool = False,
    ) -> None:
        """Write a range (default: all) to a new sparse file.

        Sectors that can't be read raise UnreadableSectorError, or become zeros if asked to. The
        file is removed if it can't be written completely.
        """
        size = (self.size_bytes if length is None else offset + length) - offset
        begin, end = offset - offset % SECTOR, offset + size + -(offset + size) % SECTOR
        part = self._part(begin, end)
        try:
            with path.open("wb", buffering=0) as out:
                out.truncate(size)
                for at, data in self._pieces(part, begin, zero_unreadable=zero_unreadable):
                    skip, left = max(0, offset - at), offset + size - at
                    write_exact(out.fileno(), data[skip:left], at + skip - offset)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DiskError(f"can't export to {path}: {error.strerror}") from error
        except DiskError:
            path.unlink(missing_ok=True)
            raise

    def _pieces(
        self, part: SectorMap, begin: int, *, zero_unreadable: bool
    ) -> Iterator[tuple[int, bytes]]:
        """What makes a part, which begins at byte `begin`, of nothing but zeros: (offset, bytes).

        In this order, and some of it overlapping: first all that the base has, then the rest.
        """
        extents = self._base_extents(begin, begin + len(part) * SECTOR)
        for start, end in extents:
            yield start, read_exact(self._base_fd, end - start, start, f"the base of {self.name}")
        places = np.flatnonzero(part)
        values = part[places]
        step = np.where(values > 0, SECTOR, 0)
        joined = (np.diff(places) == 1) & (np.diff(values) == step[:-1])
        heads = np.flatnonzero(np.concatenate(([True], ~joined))) if len(places) else places
        counts = np.diff(np.append(heads, len(places)))
        for first, count, value in zip(
            places[heads].tolist(), counts.tolist(), values[heads].tolist(), strict=True
        ):
            at, end = begin + first * SECTOR, begin + (first + count) * SECTOR
            if value == UNREADABLE and not zero_unreadable:
                raise UnreadableSectorError(self.name, at, end - at)
            if value > 0:
                for start in range(at, end, _CHUNK):
                    yield start, self._stored(value + start - at, min(_CHUNK, end - start))
                continue
            for start, stop in extents:  # zeros over what the base has there
                if start < end and at < stop:
                    yield max(start, at), bytes(min(stop, end) - max(start, at))

    def _stored(self, value: int, length: int) -> bytes:
        """What a value of the map above BASE stands for, and what follows it."""
        if value > EXTRA:
            return self.extra[value - EXTRA - 1 : value - EXTRA - 1 + length]
        return read_exact(self.journal_fd, length, value - 1, "the journal")

    def _base_extents(self, begin: int, end: int) -> tuple[tuple[int, int], ...]:
        """Where the base image holds more than zeros."""
        status = os.fstat(self._base_fd)
        version = (status.st_dev, status.st_ino, status.st_mtime_ns)
        return _not_zeros(self.base_path, version, begin, min(end, status.st_size))

    def close(self) -> None:
        """Close the files; reading raises afterwards."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> LazyDisk:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class PartialDisk(LazyDisk):
    """A `LazyDisk` that shows one part of a device only, to look at it in many states.

    `sectors` is the map of that part, which begins at byte `begin`. Reading elsewhere is a
    DiskError, as if the device had no more.
    """

    def __init__(  # noqa: PLR0917 - a LazyDisk's, and two more
        self,
        name: str,
        sectors: SectorMap,
        base: Path,
        journal: Path,
        extra: Extra,
        begin: int,
        size_bytes: int,
    ) -> None:
        super().__init__(name, sectors, base, journal, extra)
        self._begin = begin
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        """The device's size in bytes."""
        return self._size_bytes

    def _part(self, offset: int, end: int) -> SectorMap:
        if offset < self._begin or end > self._begin + len(self.map) * SECTOR:
            raise DiskError(
                f"device {self.name}: bytes {offset} to {end} are not in this partial view"
            )
        return super()._part(offset - self._begin, end - self._begin)

    def read(self, offset: int, length: int) -> bytes:
        """As `LazyDisk.read`, within the part."""
        first = offset - offset % SECTOR - self._begin
        end = offset + length + -(offset + length) % SECTOR - self._begin
        if first < 0 or length < 0 or end > len(self.map) * SECTOR or not self._fds:
            raise DiskError(
                f"device {self.name}: {length} bytes at {offset} are not in this partial view"
            )
        if first == end:
            return b""
        data = read_part(
            self.map[first // SECTOR : end // SECTOR],
            (self._base_fd, self.journal_fd),
            first + self._begin,
            self.name,
            extra=self.extra,
        )
        skip = offset - self._begin - first
        return data if len(data) == length else data[skip : skip + length]
