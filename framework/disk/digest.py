"""SHA-256 of regions of a disk, and comparison with an image, without reading holes twice.

Only SHA-256 of all bytes is a proof; what is skipped here is reading of zeros, never hashing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Final

from framework.disk.errors import DiskError
from framework.disk.journal import SECTOR
from framework.disk.lazy import ZERO, LazyDisk, runs

_CHUNK: Final = 4 << 20
_ZEROES: Final = bytes(_CHUNK)


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """How a region compares with an image."""

    identical: bool
    compared_bytes: int
    differing_sectors: int
    first_difference: int | None
    """Offset within the image, None if there is none."""


def region_sha256(disk: LazyDisk, offset: int, length: int) -> str:
    """The SHA-256 of a region, as hexadecimal text. Sectors of zeros are not read.

    Raises UnreadableSectorError for a sector torn unreadable, DiskError beyond the end.
    """
    if offset % SECTOR or length % SECTOR:
        return disk.sha256(offset, length)
    if offset < 0 or offset + length > disk.size_bytes:
        raise DiskError(f"device {disk.name}: {length} bytes at {offset} are beyond its end")
    digest = hashlib.sha256()
    at = offset
    end = offset + length
    while at < end:
        size = min(_CHUNK, end - at)
        part = disk.map[at // SECTOR : (at + size) // SECTOR]
        if bool((part == ZERO).all()):
            digest.update(_ZEROES[:size])
        else:
            digest.update(disk.read(at, size))
        at += size
    return digest.hexdigest()


def compare_with_image(disk: LazyDisk, offset: int, image: Path) -> Comparison:
    """Compare a region with an image file, sector by sector (its size says how much).

    Sectors that can't be read differ. Raises DiskError if the image can't be read or is larger
    than the rest of the disk.
    """
    differing = 0
    first: int | None = None
    done = 0
    try:
        with image.open("rb") as file:
            while expected := file.read(_CHUNK):
                differences = _differences(disk, offset + done, expected)
                if differences and first is None:
                    first = done + differences[0] * SECTOR
                differing += len(differences)
                done += len(expected)
    except OSError as error:
        raise DiskError(f"image {image}: {error.strerror}") from error
    return Comparison(first is None, done, differing, first)


def _differences(disk: LazyDisk, offset: int, expected: bytes) -> list[int]:
    """Indices of the sectors that differ."""
    if not disk.unreadable(offset, len(expected)) and disk.read(offset, len(expected)) == expected:
        return []
    found = []
    for index in range(-(-len(expected) // SECTOR)):
        piece = expected[index * SECTOR : (index + 1) * SECTOR]
        where = offset + index * SECTOR
        if disk.unreadable(where, len(piece)) or disk.read(where, len(piece)) != piece:
            found.append(index)
    return found


def written_bytes(disk: LazyDisk, offset: int, length: int) -> int:
    """How many bytes of a region no longer come from the base image."""
    part = disk.map[offset // SECTOR : -(-(offset + length) // SECTOR)]
    return sum(count for _, count, value in runs(part) if value != 0) * SECTOR
