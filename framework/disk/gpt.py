"""GUID partition tables, read and checked.

Source: UEFI Specification 2.10, chapter 5.3 (header and entries, CRC-32 of both; a backup at the
disk's end). The primary is taken if it is valid, else the backup, as bootloaders and Linux do.
"""

from __future__ import annotations

import dataclasses
import struct
import uuid
import zlib
from typing import Final

from framework.disk.errors import DiskError, LayoutError, UnreadableSectorError
from framework.disk.journal import SECTOR
from framework.disk.lazy import LazyDisk

_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_SIGNATURE: Final = b"EFI PART"
_MAX_ENTRIES: Final = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Partition:
    """A partition: number from 1, name, range in bytes."""

    number: int
    name: str
    offset: int
    length: int
    type_uuid: uuid.UUID
    uuid: uuid.UUID


@dataclasses.dataclass(frozen=True, slots=True)
class PartitionTable:
    """The table that counts; `problems` are those of the copies, empty on a healthy disk."""

    disk_uuid: uuid.UUID
    partitions: tuple[Partition, ...]
    from_backup: bool
    problems: tuple[str, ...]

    def partition(self, key: str | int) -> Partition:
        """The partition of a name or number; raises KeyError."""
        for partition in self.partitions:
            if key in (partition.name, partition.number):
                return partition
        raise KeyError(f"no partition {key!r}; there are {[p.name for p in self.partitions]}")


def read_gpt(disk: LazyDisk) -> PartitionTable:
    """Read a disk's table.

    Raises LayoutError if neither copy is valid.
    """
    problems: list[str] = []
    last = disk.size_bytes // SECTOR - 1
    for name, where in (("primary", 1), ("backup", last)):
        try:
            table = _read_copy(disk, where)
        except (LayoutError, UnreadableSectorError, struct.error) as error:
            problems.append(f"{name}: {error}")
            continue
        if name == "primary":
            try:
                backup = _read_copy(disk, last)
                if backup.partitions != table.partitions:
                    problems.append("backup: differs from the primary")
            except DiskError as error:
                problems.append(f"backup: {error}")
        return dataclasses.replace(table, from_backup=name == "backup", problems=tuple(problems))
    raise LayoutError(disk.name, SECTOR, f"no valid GPT ({'; '.join(problems)})")


def _read_copy(disk: LazyDisk, sector: int) -> PartitionTable:
    where = sector * SECTOR

    def wrong(reason: str) -> LayoutError:
        return LayoutError(disk.name, where, reason)

    if sector < 1 or where + SECTOR > disk.size_bytes:
        raise wrong("the disk is too small for a GPT")
    data = disk.read(where, SECTOR)
    (
        signature,
        _,
        size,
        crc,
        _,
        this,
        _,
        _,
        _,
        disk_uuid,
        entries,
        count,
        entry_size,
        entry_crc,
    ) = _HEADER.unpack_from(data)
    if signature != _SIGNATURE:
        raise wrong("no GPT signature")
    if not _HEADER.size <= size <= SECTOR:
        raise wrong(f"GPT header size {size}")
    if zlib.crc32(data[:16] + bytes(4) + data[20:size]) != crc:
        raise wrong("GPT header CRC is wrong")
    if this != sector:
        raise wrong(f"the GPT header says that it is at sector {this}")
    if not 0 < count <= _MAX_ENTRIES or entry_size < _ENTRY.size or entry_size % 8:
        raise wrong(f"{count} GPT entries of {entry_size} bytes")
    if entries * SECTOR + count * entry_size > disk.size_bytes:
        raise wrong(f"the GPT entries at sector {entries} are beyond the end")
    table = disk.read(entries * SECTOR, count * entry_size)
    if zlib.crc32(table) != entry_crc:
        raise wrong("the CRC of the GPT entries is wrong")
    partitions = []
    for index in range(count):
        kind, own, first, last, _, name = _ENTRY.unpack_from(table, index * entry_size)
        if kind == bytes(16):
            continue
        if last < first or (last + 1) * SECTOR > disk.size_bytes:
            raise wrong(f"partition {index + 1} lies at sectors {first} to {last}")
        partitions.append(
            Partition(
                index + 1,
                name.decode("utf-16-le", errors="replace").split("\0", 1)[0],
                first * SECTOR,
                (last + 1 - first) * SECTOR,
                uuid.UUID(bytes_le=kind),
                uuid.UUID(bytes_le=own),
            )
        )
    return PartitionTable(uuid.UUID(bytes_le=disk_uuid), tuple(partitions), False, ())
