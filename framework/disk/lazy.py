"""A disk served lazily from its base image and the journal: nothing is materialised.

Where each sector's content lies is one number in a map: 0 for the base image at the same
offset, p + 1 for offset p of the journal file, ZERO and UNREADABLE for what has no bytes. The
map of an untouched disk costs no memory (the kernel's zero pages), a copy of a 512 MiB disk's
map 8 MiB, so a crash state costs a copy and a few assignments.
"""

from __future__ import annotations

import dataclasses
import errno
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
_EXPORT: Final = 64 << 10  # small, so that few zeros are written between what there is
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

    def unreadable(self, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
        """The (offset, length) ranges within a range (default: all) that can't be read."""
        end = self.size_bytes if length is None else offset + length
        first = offset // SECTOR
        part = self.map[first : -(-end // SECTOR)]
        if not bool((part == UNREADABLE).any()):
            return []
        return [
            ((first + at) * SECTOR, count * SECTOR)
            for at, count, value in runs(part)
            if value == UNREADABLE
        ]

    def _next_data(self, offset: int) -> int:
        """Where the base has data next: up to there it is a hole, known to be zeros unread."""
        try:
            return os.lseek(self._base_fd, offset, os.SEEK_DATA)
        except OSError as error:  # ENXIO: none any more; otherwise its file system can't tell
            end = os.fstat(self._base_fd).st_size
            return end if error.errno == errno.ENXIO and offset < end else offset

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
        readable = self
        if zero_unreadable and bool((self.map == UNREADABLE).any()):
            patched = np.where(self.map == UNREADABLE, ZERO, self.map)
            readable = LazyDisk(self.name, patched, self.base_path, self.journal_path, self.extra)
        try:
            with path.open("wb") as out:
                out.truncate(size)
                data = -1
                part = readable.map[offset // SECTOR : -(-(offset + size) // SECTOR)]
                edges = (np.flatnonzero(part) * SECTOR - offset % SECTOR)[:, None]
                touched = set((np.add(edges, (0, SECTOR - 1)) // _EXPORT).ravel().tolist())
                for at in range(0, size, _EXPORT):
                    start, length = offset + at, min(_EXPORT, size - at)
                    if at // _EXPORT not in touched:
                        data = data if data >= start else readable._next_data(start)
                        if data >= start + length:
                            continue
                    chunk = readable.read(start, length)
                    if chunk != _ZEROES[:length]:
                        out.seek(at)
                        out.write(chunk)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DiskError(f"can't export to {path}: {error.strerror}") from error
        except DiskError:
            path.unlink(missing_ok=True)
            raise
        finally:
            if readable is not self:
                readable.close()

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
