"""Planted bug: an updater that rewrites both copies of the boot environment before it syncs.

It mirrors block by block, so each copy is right in the end and the sync comes last; but a cut on
the way finds two copies half written and none that is whole.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib

from updater.cli import main
from updater.device.bootenv_uboot import UBootEnvironment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER = struct.Struct("<IB")
_FLAGS_AT = 4
_BLOCK = 4096


def _copies(config: str) -> list[tuple[str, int, int]]:
    """Device, offset and size of each copy, as fw_env.config has them."""
    with open(config, encoding="ascii") as file:  # noqa: PTH123 - boot path
        lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
    return [(fields[0], int(fields[1], 0), int(fields[2], 0)) for fields in lines]


def _write_both(self: UBootEnvironment, values: Mapping[str, str]) -> None:
    kept = {**self.read(), **values}
    text = b"".join(f"{key}={value}\0".encode() for key, value in kept.items()) + b"\0"
    copies = []
    for device, offset, size in _copies(self._config):
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        buffer = mmap.mmap(-1, size)  # page-aligned, as direct input/output needs
        os.preadv(handle, [buffer], offset)
        flags = buffer[_FLAGS_AT]
        # Padding that changes with every write makes every sector of the copy differ.
        body = text + bytes([flags ^ 0x5A]) * (size - _HEADER.size - len(text))
        buffer[:] = _HEADER.pack(zlib.crc32(body), (flags + 1) % 256) + body
        copies.append((handle, buffer, offset))
    for at in range(0, len(copies[0][1]), _BLOCK):
        for handle, buffer, offset in copies:
            os.pwritev(handle, [memoryview(buffer)[at : at + _BLOCK]], offset + at)
    for handle, _, _ in copies:
        os.fsync(handle)
        os.close(handle)


UBootEnvironment.write = _write_both  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
