"""Planted bug: an updater that rewrites both copies of the boot environment before it syncs.

Each copy is right, and the sync comes at the end; but a cut between the two finds two copies half
written and none that is whole.
"""

from __future__ import annotations

import os
import struct
import zlib

from updater.cli import main
from updater.device.bootenv_uboot import UBootEnvironment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADER = struct.Struct("<IB")


def _copies(config: str) -> list[tuple[str, int, int]]:
    """Device, offset and size of each copy, as fw_env.config has them."""
    with open(config, encoding="ascii") as file:  # noqa: PTH123 - boot path
        lines = [line.split() for line in file if line.strip() and not line.startswith("#")]
    return [(fields[0], int(fields[1], 0), int(fields[2], 0)) for fields in lines]


def _write_both(self: UBootEnvironment, values: Mapping[str, str]) -> None:
    kept = {**self.read(), **values}
    text = b"".join(f"{key}={value}\0".encode() for key, value in kept.items()) + b"\0"
    handles = []
    for device, offset, size in _copies(self._config):
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        handles.append(handle)
        _, flags = _HEADER.unpack(os.pread(handle, _HEADER.size, offset))
        body = text.ljust(size - _HEADER.size, b"\0")
        # Padding that changes with every write makes every sector of the copy differ.
        body = body[: len(text)] + bytes([flags ^ 0x5A]) * (len(body) - len(text))
        head = _HEADER.pack(zlib.crc32(body), (flags + 1) % 256)
        os.pwrite(handle, head + body, offset)
    for handle in handles:
        os.fsync(handle)
        os.close(handle)


UBootEnvironment.write = _write_both  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
