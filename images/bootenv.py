"""U-Boot environments: the redundant one that the disk starts with, and the seed in the flash.

The flash seed (environment without a flags byte, read by Debian's prebuilt U-Boot from the second
pflash bank) is generated from a commented source file. Format facts from U-Boot's env/common.c and
tools/mkenvimage.c, by behaviour: little-endian CRC32 over the data, in the redundant format one
flags byte between them, then NUL-terminated `name=value` strings and one more NUL.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping

from images.errors import RecipeError

COPY_DISTANCE = 4 << 20
"""Bytes between the copies of the boot variables, and before the first: each begins such a unit.

An interrupted write can cost a whole erase unit of the medium, so no unit may hold two copies, or a
copy and something else that is needed. A card of up to 32 GB has allocation units of at most 4 MiB
(SD Physical Layer Specification, AU_SIZE); an eMMC's erase groups are a multiple of 512 KiB
(JEDEC JESD84, HC_ERASE_GRP_SIZE), up to 4 MiB on usual parts."""

_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")


def encode_environment(variables: Mapping[str, str], size: int, flags: int | None = None) -> bytes:
    """An environment image of `size` bytes.

    Args:
        variables: names and values, kept in their order.
        size: bytes of the whole copy, header included.
        flags: the redundant format's serial number (0 to 255); None for the simple format.

    Raises:
        RecipeError: the variables don't fit.
    """
    header = 4 if flags is None else 5
    data = b"".join(f"{name}={value}".encode() + b"\0" for name, value in variables.items())
    data += b"\0"
    if len(data) > size - header:
        raise RecipeError(f"the U-Boot environment takes {len(data)} bytes, {size - header} fit")
    data = data.ljust(size - header, b"\0")
    crc = struct.pack("<I", zlib.crc32(data))
    return crc + (b"" if flags is None else bytes([flags])) + data


def encode_grubenv(variables: Mapping[str, str]) -> bytes:
    """A GRUB environment block (GRUB manual, "Environment block"): 1024 bytes, padded with `#`.

    Raises:
        RecipeError: the variables don't fit.
    """
    text = "# GRUB Environment Block\n" + "".join(f"{n}={v}\n" for n, v in variables.items())
    if len(text) > 1024:
        raise RecipeError(f"the GRUB environment takes {len(text)} bytes, 1024 fit")
    return text.encode().ljust(1024, b"#")


def parse_script(text: str, values: Mapping[str, str]) -> dict[str, str]:
    """Read a commented environment source.

    A line `name = value` sets a plain variable; `name {` to `}` sets a script, whose lines are
    joined with spaces (so the source writes its own semicolons). `#` at a line's start is a
    comment. `@NAME@` is replaced from `values`.

    Raises:
        RecipeError: a line is not understood, a name is set twice, or a value is missing.
    """

    def substitute(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise RecipeError(f"the boot script wants @{match[1]}@, which the recipe doesn't set")
        return values[match[1]]

    variables: dict[str, str] = {}
    block: list[str] | None = None
    name = ""
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"@([A-Z_0-9]+)@", substitute, raw.strip())
        if not line or line.startswith("#"):
            continue
        if block is not None:
            if line == "}":
                variables[name] = " ".join(block)
                block = None
            else:
                block.append(line)
            continue
        head, separator, value = line.partition("=")
        opening = not separator and line.endswith("{")
        name = (line[:-1] if opening else head).strip()
        if not _NAME.match(name) or not (separator or opening):
            raise RecipeError(f"boot script line {number} is not understood: {line!r}")
        if name in variables:
            raise RecipeError(f"boot script line {number}: {name} is set twice")
        if opening:
            block = []
        else:
            variables[name] = value.strip()
    if block is not None:
        raise RecipeError(f"boot script: the block {name} isn't closed")
    return variables
