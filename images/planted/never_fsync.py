"""Planted bug: an updater that writes through the page cache and never syncs a slot.

The read-back is served from the same cache and so finds nothing wrong. What it said to be
installed exists in memory, then in the drive's volatile cache, and is gone after a power cut.
"""

from __future__ import annotations

import os

from updater.cli import main
from updater.device import blockdev
from updater.device.blockdev import DirectDevice
from updater.device.slot_writer import SlotWriter


def _open_buffered(path: str) -> tuple[int, bool]:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _sync_nothing(self: SlotWriter) -> None:
    return


def _keep_cache(self: DirectDevice, offset: int, length: int) -> None:
    return


blockdev._open_direct = _open_buffered
DirectDevice._drop_cache = _keep_cache  # type: ignore[method-assign]
SlotWriter.sync = _sync_nothing  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
