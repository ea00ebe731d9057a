"""The data partition: a small journaled file system on the simulated drive, with a page cache.

It keeps the promises that ext4 with data=ordered makes to a program, and no more: what was written
to a file stays in memory until it is synced (or written back early, if a seed wants that); a
directory entry that was made, renamed or removed is durable when that file or its directory is
synced; fsync writes the data, flushes the drive, commits the metadata and flushes again. After a
cut the newest whole commit counts, as after ext4's journal recovery (Pillai et al., OSDI 2014,
persistence properties of ext4-ordered).

On the drive: two commit blocks that take turns (magic, generation, CRC-32, then the files as JSON),
and behind them the files' pages, each in a fixed place that no two files share. Overwriting a page
is in place, as for ext4's allocated blocks: that is what makes the journal of SQLite necessary.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from typing import Final

from framework.targets.simulated.drive import Disk, DriveError, PowerLost

PAGE: Final = 4096
_HEAD: Final = struct.Struct("<8sQII")
_MAGIC: Final = b"SIMDATA1"
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


class FileSystemError(OSError):
    """An operation on the file system failed (EIO, ENOSPC)."""


class _File:
    """A file in memory: its size, its pages on the drive, and which of them are not there yet.

    `dirty` pages differ from the drive's; `unwritten` ones were never written since they belong to
    this file, so that no commit may refer to them.
    """

    __slots__ = ("cache", "dirty", "pages", "size", "unwritten")

    def __init__(self, size: int, pages: list[int]) -> None:
        self.size = size
        self.pages = pages
        self.cache: dict[int, bytearray] = {}
        self.dirty: set[int] = set()
        self.unwritten: set[int] = set()


def format_region(content: bytearray, offset: int, length: int) -> None:
    """Make an empty file system in `length` bytes at `offset`."""
    content[offset : offset + length] = bytes(length)
    content[offset : offset + PAGE] = _commit_block(1, {})


def _commit_block(generation: int, files: dict[str, tuple[int, list[int]]]) -> bytes:
    body = _ENCODER.encode(files).encode()
    if len(body) > PAGE - _HEAD.size:
        raise FileSystemError(28, "no space left for another file")
    check = zlib.crc32(body, generation & 0xFFFFFFFF)
    return (_HEAD.pack(_MAGIC, generation, len(body), check) + body).ljust(PAGE, b"\0")


def _parse_block(block: bytes) -> tuple[int, dict[str, tuple[int, list[int]]]] | None:
    magic, generation, length, check = _HEAD.unpack_from(block)
    if magic != _MAGIC or length > PAGE - _HEAD.size:
        return None
    body = block[_HEAD.size : _HEAD.size + length]
    if zlib.crc32(body, generation & 0xFFFFFFFF) != check:
        return None
    return generation, json.loads(body)


class FileSystem:
    """The file system in `length` bytes at `offset` of `drive`; mounted at once.

    `early` is asked after every write to a page whether it is written back at once, unasked, as
    the kernel does when it likes. Raises FileSystemError when no commit can be read.
    """

    def __init__(
        self, drive: Disk, offset: int, length: int, early: Callable[[], bool] | None = None
    ) -> None:
        self._drive = drive
        self._offset = offset
        self._page_count = length // PAGE
        self._early = early
        self.full = False
        found = []
        for index in range(2):
            try:
                block = _parse_block(drive.read(offset + index * PAGE, PAGE))
            except DriveError:
                block = None
            if block is not None:
                found.append((*block, index))
        if not found:
            raise FileSystemError(5, "no commit block can be read: the data partition is lost")
        self._generation, files, self._where = max(found, key=lambda block: block[0])
        self._files = {n: _File(size, list(pages)) for n, (size, pages) in files.items()}
        self._free = self._unused()
        # Pages of removed files may not be used again before their removal is durable.
        self._freed: list[int] = []
        self._changed = False

    @property
    def off(self) -> bool:
        """Whether the power is gone."""
        return self._drive.off

    def names(self) -> list[str]:
        """All files, durable or not."""
        if self._drive.off:
            raise PowerLost
        return list(self._files)

    def exists(self, name: str) -> bool:
        """Say whether there is such a file, durable or not."""
        if self._drive.off:
            raise PowerLost
        return name in self._files

    def create(self, name: str) -> None:
        """Make an empty file; durable with its first sync."""
        if self._drive.off:
            raise PowerLost
        if name not in self._files:
            self._files[name] = _File(0, [])
            self._changed = True

    def remove(self, name: str) -> None:
        """Remove a file; durable with the next sync of anything."""
        if self._drive.off:
            raise PowerLost
        file = self._files.pop(name)
        self._freed += file.pages
        self._changed = True

    def rename(self, name: str, to: str) -> None:
        """Rename, replacing what `to` was; durable with the next sync of anything."""
        if self._drive.off:
            raise PowerLost
        if to in self._files:
            self.remove(to)
        self._files[to] = self._files.pop(name)
        self._changed = True

    def size(self, name: str) -> int:
        """Return a file's size in bytes."""
        if self._drive.off:
            raise PowerLost
        return self._files[name].size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Return up to `length` bytes; FileSystemError where the drive can't be read."""
        if self._drive.off:
            raise PowerLost
        file = self._files[name]
        end = min(offset + length, file.size)
        page, at = divmod(offset, PAGE)
        if at + length <= PAGE and offset < end:
            cached = file.cache.get(page) or self._page(file, page)
            return bytes(cached[at : at + end - offset])
        pieces = []
        while offset < end:
            page, at = divmod(offset, PAGE)
            count = min(PAGE - at, end - offset)
            pieces.append(self._page(file, page)[at : at + count])
            offset += count
        return b"".join(pieces)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write into the page cache; FileSystemError when the partition is full."""
        if self._drive.off:
            raise PowerLost
        file = self._files[name]
        length = len(data)
        end = offset + length
        if end > file.size:
            self._grow(file, end)
        done = 0
        while done < length:
            page, at = divmod(offset + done, PAGE)
            count = min(PAGE - at, length - done)
            if count == PAGE:
                file.cache[page] = bytearray(data[done : done + PAGE])
            else:
                # The rest of the page is read first, and may not be readable.
                cached = file.cache.get(page) or self._page(file, page)
                cached[at : at + count] = data[done : done + count]
            file.dirty.add(page)
            done += count
        if self._early is not None and self._early():
            self._write_back(file)

    def _grow(self, file: _File, end: int) -> None:
        while len(file.pages) * PAGE < end:
            if self.full or not self._free:
                raise FileSystemError(28, "no space left on the data partition")
            page = self._free.pop()
            file.cache[len(file.pages)] = bytearray(PAGE)
            file.dirty.add(len(file.pages))
            file.unwritten.add(len(file.pages))
            file.pages.append(page)
            self._changed = True
        file.size = end
        self._changed = True

    def truncate(self, name: str, size: int) -> None:
        """Shorten a file; durable with its next sync."""
        if self._drive.off:
            raise PowerLost
        file = self._files[name]
        if size >= file.size:
            return
        keep = -(-size // PAGE)
        self._freed += file.pages[keep:]
        for page in [p for p in file.cache if p >= keep]:
            del file.cache[page]
            file.dirty.discard(page)
            file.unwritten.discard(page)
        del file.pages[keep:]
        file.size = size
        if size % PAGE:
            self._page(file, size // PAGE)[size % PAGE :] = bytes(PAGE - size % PAGE)
            file.dirty.add(size // PAGE)
        self._changed = True

    def sync(self, name: str) -> None:
        """Make a file durable, and with it every change of the directory (fsync).

        FileSystemError when the drive fails: what is durable then is not known.
        """
        if self._drive.off:
            raise PowerLost
        self._write_back(self._files[name])
        self.sync_directory(flush=True)

    def sync_directory(self, *, flush: bool = False) -> None:
        """Make the directory durable: what was made, renamed, removed, and the sizes."""
        if self._drive.off:
            raise PowerLost
        try:
            if flush or self._changed:
                self._drive.flush()
            if self._changed:
                self._commit()
        except DriveError as error:
            raise FileSystemError(5, f"sync failed: {error.strerror}") from error

    def unmount(self) -> None:
        """Make everything durable, as an orderly restart does."""
        for file in self._files.values():
            self._write_back(file)
        self.sync_directory(flush=True)

    def _commit(self) -> None:
        # Sizes wait for the pages to be written, as with ext4's delayed allocation.
        files: dict[str, tuple[int, list[int]]] = {}
        for name, file in self._files.items():
            if file.unwritten:
                size = min(file.size, min(file.unwritten) * PAGE)
                files[name] = (size, file.pages[: -(-size // PAGE)])
            else:
                files[name] = (file.size, file.pages[: -(-file.size // PAGE)])
        where = 1 - self._where
        self._drive.write(self._offset + where * PAGE, _commit_block(self._generation + 1, files))
        self._drive.flush()
        self._where = where
        self._generation += 1
        self._changed = any(file.unwritten for file in self._files.values())
        self._free += self._freed
        self._freed.clear()

    def _write_back(self, file: _File) -> None:
        try:
            for page in sorted(file.dirty):
                self._drive.write(self._place(file.pages[page]), bytes(file.cache[page]))
                file.dirty.discard(page)
                file.unwritten.discard(page)
        except DriveError as error:
            raise FileSystemError(5, f"write failed: {error.strerror}") from error

    def _page(self, file: _File, page: int) -> bytearray:
        cached = file.cache.get(page)
        if cached is None:
            try:
                cached = bytearray(self._drive.read(self._place(file.pages[page]), PAGE))
            except DriveError as error:
                raise FileSystemError(5, f"read failed: {error.strerror}") from error
            file.cache[page] = cached
        return cached

    def _place(self, page: int) -> int:
        return self._offset + page * PAGE

    def _unused(self) -> list[int]:
        used = {page for file in self._files.values() for page in file.pages}
        return [page for page in range(self._page_count - 1, 1, -1) if page not in used]
