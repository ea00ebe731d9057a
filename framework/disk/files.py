"""Files of small ext2/3/4 and FAT file systems, read straight from a disk's sectors.

Read as a bootloader does: a journal is not replayed, so this shows what GRUB or U-Boot finds
after a cut; what Linux finds after mounting is `ext4check`'s business. Sources: the kernel's
Documentation/filesystems/ext4 (superblock, group descriptors, inodes, extents, directories) and
Microsoft's FAT specification 1.03. Not read: inline data, encryption, symbolic links, exFAT.
Every loop is bounded, so a damaged file system gives LayoutError, never a hang.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from framework.disk.errors import DiskError, LayoutError

EXT_MAGIC: Final = 0xEF53
_EXTENTS_FLAG: Final = 0x80000
_INLINE_FLAG: Final = 0x10000000
_MAX_FILE: Final = 256 << 20
_MAX_DIRECTORY: Final = 8 << 20
_MAX_DEPTH: Final = 5
_MAX_ENTRIES: Final = 100_000
_INCOMPAT_UNREADABLE: Final = 0x10000 | 0x1 | 0x10  # encryption, compression, meta_bg


class Source(Protocol):
    """Something with bytes: a LazyDisk, or an exported file."""

    @property
    def name(self) -> str:
        """For messages."""

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes; raises DiskError."""


class FileSystem(Protocol):
    """What both readers can do. Paths are absolute, with slashes."""

    kind: str

    def read_file(self, path: str, *, limit: int = _MAX_FILE) -> bytes:
        """A regular file's content; raises LayoutError if it is missing or damaged."""

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises LayoutError."""


def open_file_system(source: Source, offset: int, length: int) -> FileSystem:
    """Recognise the file system of a partition.

    Raises LayoutError if it is neither ext nor FAT, or damaged at its head.
    """
    if length >= 4096:
        try:
            magic = source.read(offset + 1024 + 56, 2)
            boot = source.read(offset, 512)
        except DiskError as error:
            raise LayoutError(source.name, offset, f"no file system: {error}") from error
        if struct.unpack("<H", magic)[0] == EXT_MAGIC:
            return ExtReader(source, offset, length)
        if boot[510:512] == b"\x55\xaa" and struct.unpack_from("<H", boot, 11)[0] in (
            512,
            1024,
            2048,
            4096,
        ):
            return FatReader(source, offset, length)
    raise LayoutError(source.name, offset, "neither an ext nor a FAT file system")


LostFile = tuple[tuple[int, ...], bytes]
"""Of a file that can't be read: the blocks that can't, from 0, and its content with zeros there.
Who reads only others notices nothing."""


class ExtReader:
    """An ext2, ext3 or ext4 file system."""

    kind = "ext"

    def __init__(
        self,
        source: Source,
        offset: int,
        length: int,
        unreadable: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`unreadable`: (offset, length) from the partition's start that no file can be read of."""
        self._source = source
        self._offset = offset
        self._length = length
        super_block = source.read(offset + 1024, 1024)
        (self._inodes,) = struct.unpack_from("<I", super_block, 0)
        self._first_block, log_size = struct.unpack_from("<II", super_block, 20)
        (self._inodes_per_group,) = struct.unpack_from("<I", super_block, 40)
        (magic,) = struct.unpack_from("<H", super_block, 56)
        if magic != EXT_MAGIC:
            raise self._wrong("no ext superblock")
        (revision,) = struct.unpack_from("<I", super_block, 76)
        (self._inode_size,) = struct.unpack_from("<H", super_block, 88) if revision else (128,)
        (incompatible,) = struct.unpack_from("<I", super_block, 96)
        (descriptor,) = struct.unpack_from("<H", super_block, 254)
        if log_size > 6 or not self._inodes_per_group or not 128 <= self._inode_size <= 4096:
            raise self._wrong("the ext superblock is damaged")
        if incompatible & _INCOMPAT_UNREADABLE:
            raise self._wrong(f"ext features {incompatible:#x} are not read here")
        self._block_size = 1024 << log_size
        self._descriptor_size = descriptor if incompatible & 0x80 and descriptor >= 64 else 32
        self.lost: dict[str, LostFile] = {}
        """The files that could not be read, by path."""
        self._unreadable = {
            block
            for at, size in unreadable
            for block in range(at // self._block_size, -(-(at + size) // self._block_size))
        }

    def read_file(self, path: str, *, limit: int = _MAX_FILE) -> bytes:
        """A regular file's content; raises LayoutError if it is missing or damaged."""
        inode = self._lookup(path)
        (mode,) = struct.unpack_from("<H", inode)
        if mode & 0xF000 != 0x8000:
            raise self._wrong(f"{path} is not a regular file")
        return self._file(inode, limit, path)

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises LayoutError."""
        inode = self._lookup(path)
        return sorted(name for name, _ in self._entries(inode, path) if name not in (".", ".."))

    def everything(self) -> dict[str, bytes | None]:
        """All files by path, directories with a slash at the end and no content.

        None for what can't be read, or is neither; what `lost` has of a file then is the rest of
        it. Raises LayoutError if there is no root directory, or more than can be read.
        """
        found: dict[str, bytes | None] = {}
        seen: set[int] = set()
        waiting = [("/", 2)]
        room = _MAX_FILE
        while waiting:
            folder, number = waiting.pop()
            for name, inner in self._entries(self._inode(number), folder):
                if name in (".", ".."):
                    continue
                if len(found) >= _MAX_ENTRIES:
                    raise self._wrong(f"more than {_MAX_ENTRIES} files")
                path = folder + name
                try:
                    inode = self._inode(inner)
                    kind = struct.unpack_from("<H", inode)[0] & 0xF000
                    if kind == 0x4000:
                        next(iter(self._entries(inode, path)), None)  # readable at all
                        found[path + "/"] = b""
                        if inner not in seen:
                            waiting.append((path + "/", inner))
                        seen.add(inner)
                        continue
                    content = self._file(inode, room, path) if kind == 0x8000 else None
                except DiskError:
                    content = None
                found[path] = content
                room -= len(content or b"")
        return found

    def place_of(self, path: str, at: int) -> int:
        """Where byte `at` of a file is stored, from the partition's start.

        Raises LayoutError if it is missing, damaged, shorter, or has a hole there.
        """
        inode = self._lookup(path)
        block, within = divmod(at, self._block_size)
        stored = self._blocks(inode, block + 1, path).get(block)
        if at >= self._size(inode) or not stored:
            raise self._wrong(f"{path}: byte {at} is not stored")
        return int(stored * self._block_size + within)

    def file_size(self, path: str) -> int:
        """How many bytes a file has; raises LayoutError if it is missing or damaged."""
        return self._size(self._lookup(path))

    def _wrong(self, reason: str) -> LayoutError:
        return LayoutError(self._source.name, self._offset, reason)

    def _block(self, number: int) -> bytes:
        return self._stored(number, 1)

    def _stored(self, number: int, count: int) -> bytes:
        """Blocks that lie behind one another."""
        if (number + count) * self._block_size > self._length:
            raise self._wrong(f"block {number + count - 1} is beyond the file system's end")
        at, length = number * self._block_size, count * self._block_size
        return self._source.read(self._offset + at, length)

    def _lookup(self, path: str) -> bytes:
        inode = self._inode(2)
        for part in (p for p in path.split("/") if p):
            number = next((n for name, n in self._entries(inode, path) if name == part), None)
            if number is None:
                raise self._wrong(f"{path}: no such file")
            inode = self._inode(number)
        return inode

    def _inode(self, number: int) -> bytes:
        if not 1 <= number <= self._inodes:
            raise self._wrong(f"inode {number} of {self._inodes}")
        group, index = divmod(number - 1, self._inodes_per_group)
        at = group * self._descriptor_size
        block = self._block(self._first_block + 1 + at // self._block_size)
        within = at % self._block_size
        (table,) = struct.unpack_from("<I", block, within + 8)
        if self._descriptor_size >= 64:
            table |= struct.unpack_from("<I", block, within + 40)[0] << 32
        where = table * self._block_size + index * self._inode_size
        if where + self._inode_size > self._length:
            raise self._wrong(f"inode {number} is beyond the file system's end")
        return self._source.read(self._offset + where, self._inode_size)

    def _entries(self, inode: bytes, path: str) -> Iterator[tuple[str, int]]:
        if struct.unpack_from("<H", inode)[0] & 0xF000 != 0x4000:
            raise self._wrong(f"{path}: not a directory on the way")
        data = self._content(inode, _MAX_DIRECTORY, path)
        at = 0
        while at + 8 <= len(data):
            number, size, name_size = struct.unpack_from("<IHB", data, at)
            if size < 8 or at + size > len(data):
                raise self._wrong(f"{path}: a directory on the way is damaged")
            if number:
                yield data[at + 8 : at + 8 + name_size].decode(errors="surrogateescape"), number
            at += size

    def _file(self, inode: bytes, limit: int, path: str) -> bytes:
        """A regular file's content. A file system check mends what is around it, not what is in."""
        if self._unreadable:
            count = -(-self._size(inode) // self._block_size)
            blocks = self._blocks(inode, count, path)
            if lost := sorted(n for n, block in blocks.items() if block in self._unreadable):
                self.lost[path] = tuple(lost), self._content(inode, limit, path)
                raise self._wrong(f"{path}: block {lost[0]} can't be read")
        return self._content(inode, limit, path)

    def _content(self, inode: bytes, limit: int, path: str) -> bytes:
        size = self._size(inode)
        if size > limit:
            raise self._wrong(f"{path}: {size} bytes are more than {limit}")
        count = -(-size // self._block_size)
        blocks = self._blocks(inode, count, path)
        pieces = []
        at = 0
        while at < count:
            first = blocks.get(at, 0)
            run = 1  # blocks that are stored behind one another
            while at + run < count and blocks.get(at + run, 0) == (first + run if first else 0):
                run += 1
            pieces.append(self._stored(first, run) if first else bytes(run * self._block_size))
            at += run
        return b"".join(pieces)[:size]

    def _size(self, inode: bytes) -> int:
        low, high = (struct.unpack_from("<I", inode, at)[0] for at in (4, 108))
        return int(low | high << 32)

    def _blocks(self, inode: bytes, count: int, path: str) -> dict[int, int]:
        """Where the first `count` blocks of a file are stored; holes are missing."""
        (flags,) = struct.unpack_from("<I", inode, 32)
        if flags & _INLINE_FLAG:
            raise self._wrong(f"{path}: inline data is not read here")
        if flags & _EXTENTS_FLAG:
            return self._extents(inode[40:100], count)
        return self._indirect(inode[40:100], count)

    def _extents(self, root: bytes, count: int) -> dict[int, int]:
        found: dict[int, int] = {}

        def walk(node: bytes, depth_limit: int) -> None:
            magic, entries, _, depth = struct.unpack_from("<HHHH", node)
            if magic != 0xF30A or depth_limit < 0 or 12 * (entries + 1) > len(node):
                raise self._wrong("an extent tree is damaged")
            for index in range(entries):
                at = 12 * (index + 1)
                if depth:
                    low, high = struct.unpack_from("<IH", node, at + 4)
                    walk(self._block(low | high << 32), depth_limit - 1)
                    continue
                first, length, high, low = struct.unpack_from("<IHHI", node, at)
                if length > 0x8000:
                    continue  # allocated, not written: reads as zeros
                for i in range(min(length, max(0, count - first))):
                    found[first + i] = (low | high << 32) + i

        walk(root, _MAX_DEPTH)
        return found

    def _indirect(self, root: bytes, count: int) -> dict[int, int]:
        pointers = struct.unpack("<15I", root)
        found = {i: p for i, p in enumerate(pointers[:12]) if p}
        per_block = self._block_size // 4
        first = 12

        def walk(block: int, level: int, base: int) -> None:
            if not block or base >= count:
                return
            entries = struct.unpack(f"<{per_block}I", self._block(block))
            for i, entry in enumerate(entries):
                if level == 0 and entry:
                    found[base + i] = entry
                elif level:
                    walk(entry, level - 1, base + i * per_block**level)

        for level in range(3):
            walk(pointers[12 + level], level, first)
            first += per_block ** (level + 1)
        return found


class FatReader:
    """A FAT12, FAT16 or FAT32 file system, with long names. Names match without case."""

    kind = "fat"

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source = source
        self._offset = offset
        self._length = length
        boot = source.read(offset, 512)
        sector, per_cluster, reserved, fats, root_entries, small = struct.unpack_from(
            "<HBHBHH", boot, 11
        )
        fat16, large, fat32 = (
            struct.unpack_from("<H", boot, 22)[0],
            struct.unpack_from("<I", boot, 32)[0],
            struct.unpack_from("<I", boot, 36)[0],
        )
        fat_sectors = fat16 or fat32
        if not sector or not per_cluster or not fats or not reserved or not fat_sectors:
            raise self._wrong("the FAT boot sector is damaged")
        self._cluster_size = sector * per_cluster
        root_at = (reserved + fats * fat_sectors) * sector
        self._data = root_at + -(-root_entries * 32 // sector) * sector
        self._clusters = ((small or large) * sector - self._data) // self._cluster_size
        if self._clusters <= 0 or (small or large) * sector > length or fat_sectors > 1 << 16:
            raise self._wrong("the FAT boot sector does not fit the partition")
        self._bits = 12 if self._clusters < 4085 else 16 if self._clusters < 65525 else 32
        self._table = self._read(reserved * sector, fat_sectors * sector)
        if self._bits == 32:
            self._root = self._chain(struct.unpack_from("<I", boot, 44)[0], _MAX_DIRECTORY)
        else:
            self._root = self._read(root_at, root_entries * 32)

    def read_file(self, path: str, *, limit: int = _MAX_FILE) -> bytes:
        """A regular file's content; raises LayoutError if it is missing or damaged."""
        directory, cluster, size = self._lookup(path)
        if directory:
            raise self._wrong(f"{path} is not a regular file")
        if size > limit:
            raise self._wrong(f"{path}: {size} bytes are more than {limit}")
        data = self._chain(cluster, size) if size else b""
        if len(data) < size:
            raise self._wrong(f"{path}: its cluster chain is too short")
        return data[:size]

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises LayoutError."""
        directory, cluster, _ = self._lookup(path)
        if not directory:
            raise self._wrong(f"{path} is not a directory")
        data = self._chain(cluster, _MAX_DIRECTORY) if cluster else self._root
        return sorted(name for name, *_ in self._entries(data) if name not in (".", ".."))

    def _wrong(self, reason: str) -> LayoutError:
        return LayoutError(self._source.name, self._offset, reason)

    def _read(self, at: int, size: int) -> bytes:
        if at + size > self._length:
            raise self._wrong(f"offset {at} is beyond the file system's end")
        return self._source.read(self._offset + at, size)

    def _next(self, cluster: int) -> int | None:
        table = self._table
        try:
            if self._bits == 12:
                (pair,) = struct.unpack_from("<H", table, cluster + cluster // 2)
                value = pair >> 4 if cluster & 1 else pair & 0xFFF
                end = 0xFF8
            elif self._bits == 16:
                (value,) = struct.unpack_from("<H", table, 2 * cluster)
                end = 0xFFF8
            else:
                value = struct.unpack_from("<I", table, 4 * cluster)[0] & 0x0FFFFFFF
                end = 0x0FFFFFF8
        except struct.error as error:
            raise self._wrong(f"cluster {cluster} is not in the FAT") from error
        return None if value >= end else value

    def _chain(self, cluster: int, limit: int) -> bytes:
        pieces = []
        total = 0
        following: int | None = cluster
        while following is not None and total < limit:
            if not 2 <= following < self._clusters + 2:
                raise self._wrong(f"a cluster chain leads to {following}")
            at = self._data + (following - 2) * self._cluster_size
            pieces.append(self._read(at, self._cluster_size))
            total += self._cluster_size
            following = self._next(following)
        return b"".join(pieces)

    def _lookup(self, path: str) -> tuple[bool, int, int]:
        found = (True, 0, 0)
        for part in (p for p in path.split("/") if p):
            directory, cluster, _ = found
            if not directory:
                raise self._wrong(f"{path}: not a directory on the way")
            data = self._chain(cluster, _MAX_DIRECTORY) if cluster else self._root
            for name, is_directory, first, size in self._entries(data):
                if name.lower() == part.lower():
                    found = (is_directory, first, size)
                    break
            else:
                raise self._wrong(f"{path}: no such file")
        return found

    def _entries(self, data: bytes) -> Iterator[tuple[str, bool, int, int]]:
        long_name = ""
        for at in range(0, len(data) - 31, 32):
            entry = data[at : at + 32]
            if entry[0] == 0:
                return
            attributes = entry[11]
            if entry[0] == 0xE5:
                long_name = ""
                continue
            if attributes & 0x3F == 0x0F:
                piece = (entry[1:11] + entry[14:26] + entry[28:32]).decode(
                    "utf-16-le", errors="replace"
                )
                if entry[0] & 0x40:
                    long_name = ""
                long_name = piece.split("\0")[0] + long_name
                continue
            if attributes & 0x08:
                long_name = ""
                continue  # the volume's label
            short = entry[:8].decode("cp437").rstrip()
            extension = entry[8:11].decode("cp437").rstrip()
            short = short.lower() if entry[12] & 0x08 else short  # Windows NT's flags
            extension = extension.lower() if entry[12] & 0x10 else extension
            name = long_name or (f"{short}.{extension}" if extension else short)
            long_name = ""
            high, low, size = (
                struct.unpack_from("<H", entry, 20)[0],
                struct.unpack_from("<H", entry, 26)[0],
                struct.unpack_from("<I", entry, 28)[0],
            )
            cluster = low | (high << 16 if self._bits == 32 else 0)
            yield name, bool(attributes & 0x10), cluster, size
