"""Planted bug: an updater that reads its image back from the page cache, and takes that for a sync.

What it compares is what it just wrote, in memory; the medium may hold nothing of it when the slots
are switched.
"""

from __future__ import annotations

import os

from updater.cli import main
from updater.device import blockdev
from updater.device.blockdev import DirectDevice
from updater.device.slot_writer import SlotWriter


def _open_buffered(path: str) -> tuple[int, bool]:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _read_cached(self: DirectDevice, offset: int, into: memoryview) -> None:
    os.preadv(self._handle, [into], offset)


def _sync_nothing(self: SlotWriter) -> None:
    return


blockdev._open_direct = _open_buffered
DirectDevice.read_medium = _read_cached  # type: ignore[method-assign]
SlotWriter.sync = _sync_nothing  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
