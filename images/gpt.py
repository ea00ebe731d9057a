"""A writer of GUID partition tables with fixed GUIDs.

After the UEFI specification, chapter 5: protective MBR, primary table behind it, backup table at
the disk's end, CRC32 over header and entries. 512-byte sectors, 128 entries.
"""

from __future__ import annotations

import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

SECTOR = 512
_ENTRIES = 128
_ENTRY_SIZE = 128
_TABLE_SECTORS = _ENTRIES * _ENTRY_SIZE // SECTOR

LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
BIOS_BOOT = uuid.UUID("21686148-6449-6e6f-744e-656564454649")


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes:
        name: its GPT label.
        number: its slot in the table, from 1.
        offset: first byte.
        size: bytes.
        kind: type GUID.
    """

    name: str
    number: int
    offset: int
    size: int
    kind: uuid.UUID = LINUX_DATA


def write_gpt(
    descriptor: int,
    size: int,
    partitions: Sequence[Partition],
    disk_guid: uuid.UUID,
    boot_code: bytes = b"",
) -> None:
    """Write both partition tables and the protective MBR of a disk.

    Args:
        descriptor: the disk image, open for writing.
        size: bytes of the whole disk, a multiple of 512.
        partitions: what to list; each GUID derives from the disk's and the partition's name.
        disk_guid: the disk's GUID.
        boot_code: at most 440 bytes for the MBR's code area.
    """
    last = size // SECTOR - 1
    entries = bytearray(_ENTRIES * _ENTRY_SIZE)
    for partition in partitions:
        first_sector = partition.offset // SECTOR
        end_sector = (partition.offset + partition.size) // SECTOR - 1
        if first_sector < 2 + _TABLE_SECTORS or end_sector > last - 1 - _TABLE_SECTORS:
            raise ValueError(f"partition {partition.name} overlaps a partition table")
        guid = uuid.uuid5(disk_guid, partition.name)
        struct.pack_into(
            "<16s16sQQQ72s",
            entries,
            (partition.number - 1) * _ENTRY_SIZE,
            partition.kind.bytes_le,
            guid.bytes_le,
            first_sector,
            end_sector,
            0,
            partition.name.encode("utf-16-le"),
        )

    def header(own: int, other: int, table: int) -> bytes:
        fields = struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x00010000,
            92,
            0,
            0,
            own,
            other,
            2 + _TABLE_SECTORS,
            last - 1 - _TABLE_SECTORS,
            disk_guid.bytes_le,
            table,
            _ENTRIES,
            _ENTRY_SIZE,
            zlib.crc32(entries),
        )
        crc = struct.pack("<I", zlib.crc32(fields))
        return (fields[:16] + crc + fields[20:]).ljust(SECTOR, b"\0")

    if len(boot_code) > 440:
        raise ValueError("boot code does not fit into the MBR's 440 bytes")
    protective = struct.pack(
        "<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF)
    )
    mbr = boot_code.ljust(440, b"\0") + bytes(6) + protective + bytes(48) + b"\x55\xaa"
    os.pwrite(descriptor, mbr, 0)
    os.pwrite(descriptor, header(1, last, 2), SECTOR)
    os.pwrite(descriptor, entries, 2 * SECTOR)
    os.pwrite(descriptor, entries, (last - _TABLE_SECTORS) * SECTOR)
    os.pwrite(descriptor, header(last, 1, last - _TABLE_SECTORS), last * SECTOR)
