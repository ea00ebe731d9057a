"""U-Boot's environment in raw sectors: both formats, which copy counts, and its variables.

A copy is a CRC-32 (little endian, over all that follows the header) and, in the redundant format
only, a flags byte; then `name=value` strings, each ended by NUL, and an empty one at the end.
Of two valid copies the newer counts: flags is a counter there, with 0 following 255. The rules
are those of U-Boot's env/common.c and of libubootenv (which writes it on the device), by
behaviour: their documentation, and fw_setenv's and mkenvimage's output in our tests. Flash with
obsolete-marks as flags (NOR) is not covered.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

from framework.disk.errors import LayoutError, UnreadableSectorError
from framework.disk.lazy import LazyDisk

_CRC: Final = struct.Struct("<I")


@dataclasses.dataclass(frozen=True, slots=True)
class EnvironmentCopy:
    """One copy as found: `problem` says why it is not valid, None if it is."""

    valid: bool
    flags: int | None
    variables: Mapping[str, str]
    problem: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class UbootEnvironment:
    """All copies, and the one that a bootloader takes."""

    copies: tuple[EnvironmentCopy, ...]
    current: int | None
    """Index of the copy that counts, None if none is valid."""

    @property
    def valid_copies(self) -> int:
        """How many copies are valid."""
        return sum(c.valid for c in self.copies)

    @property
    def variables(self) -> Mapping[str, str]:
        """The variables of the copy that counts; empty without one."""
        return {} if self.current is None else self.copies[self.current].variables


def parse_copy(data: bytes | None, *, redundant: bool = True) -> EnvironmentCopy:
    """Parse one copy (all its bytes; None if it can't be read). Never raises for its content."""
    if data is None:
        return EnvironmentCopy(False, None, {}, "unreadable sectors")
    header = 5 if redundant else 4
    if len(data) <= header:
        return EnvironmentCopy(False, None, {}, f"{len(data)} bytes are too few")
    (crc,) = _CRC.unpack_from(data)
    flags = data[4] if redundant else None
    if zlib.crc32(memoryview(data)[header:]) != crc:
        blank = "blank" if data.count(data[:1]) == len(data) else "CRC is wrong"
        return EnvironmentCopy(False, flags, {}, blank)
    return EnvironmentCopy(True, flags, _variables(data[header:]))


def parse_environment(
    copies: Sequence[bytes | None], *, redundant: bool | None = None
) -> UbootEnvironment:
    """Parse the copies of an environment and choose as U-Boot does.

    `redundant` is the format with a flags byte: by default, if there is more than one copy.
    """
    with_flags = len(copies) > 1 if redundant is None else redundant
    parsed = tuple(parse_copy(data, redundant=with_flags) for data in copies)
    current: int | None = None
    for index, copy in enumerate(parsed):
        if copy.valid and (current is None or _newer(copy.flags, parsed[current].flags)):
            current = index
    return UbootEnvironment(parsed, current)


def read_environment(
    disk: LazyDisk, copies: Sequence[tuple[int, int]], *, redundant: bool | None = None
) -> UbootEnvironment:
    """Read and parse the copies at (offset, size), in bytes.

    Raises LayoutError if a copy is beyond the disk's end.
    """
    contents: list[bytes | None] = []
    for offset, size in copies:
        if offset < 0 or offset + size > disk.size_bytes:
            raise LayoutError(disk.name, offset, f"an environment of {size} is beyond the end")
        try:
            contents.append(disk.read(offset, size))
        except UnreadableSectorError:
            contents.append(None)
    return parse_environment(contents, redundant=redundant)


def build_copy(variables: Mapping[str, str], size: int, *, flags: int | None = None) -> bytes:
    """Make a copy of `size` bytes; with `flags`, of the redundant format.

    Raises ValueError if the variables don't fit or can't be expressed.
    """
    for name, value in variables.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"environment variable {name!r} can't be expressed")
    text = b"".join(f"{name}={value}\0".encode() for name, value in variables.items()) + b"\0"
    header = 4 if flags is None else 5
    if len(text) > size - header:
        raise ValueError(f"{len(text)} bytes of variables in an environment of {size}")
    body = text.ljust(size - header, b"\0")
    mark = b"" if flags is None else bytes([flags])
    return _CRC.pack(zlib.crc32(body)) + mark + body


def _newer(flags: int | None, than: int | None) -> bool:
    """Whether a copy with `flags` is newer; the first one counts if they are equal."""
    if flags is None or than is None:
        return False
    if (flags, than) in ((0, 255), (255, 0)):
        return flags == 0
    return flags > than


def _variables(body: bytes) -> dict[str, str]:
    text = body.split(b"\0\0", 1)[0]
    variables = {}
    for entry in text.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if equals and name:
            variables[name.decode(errors="surrogateescape")] = value.decode(
                errors="surrogateescape"
            )
    return variables
