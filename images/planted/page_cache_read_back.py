"""Planted bug: an updater that reads its image back from the page cache.

It writes through the cache and syncs, but what it compares is its own memory: a medium that kept
something else is not noticed.
"""

from __future__ import annotations

import os

from updater.cli import main
from updater.device import blockdev
from updater.device.blockdev import DirectDevice


def _open_buffered(path: str) -> tuple[int, bool]:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _read_cached(self: DirectDevice, offset: int, into: memoryview) -> None:
    os.preadv(self._handle, [into], offset)


blockdev._open_direct = _open_buffered
DirectDevice.read_medium = _read_cached  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
