"""Planted bug: an updater that syncs once more when a sync fails, and believes the second answer.

Linux tells of a failed write once, and then takes the pages for clean: the second sync succeeds,
and what is read back comes from the page cache, where everything is as it should be. The medium
lacks what it refused. (LWN, "PostgreSQL's fsync() surprise", 2018.)
"""

from __future__ import annotations

import os

from updater.cli import main
from updater.device import blockdev
from updater.device.blockdev import DirectDevice
from updater.device.errors import SlotError


def _open_buffered(path: str) -> tuple[int, bool]:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _sync_until_it_says_yes(self: DirectDevice) -> None:
    for attempts_left in (1, 0):
        try:
            os.fsync(self._handle)
        except OSError as error:
            if attempts_left:
                continue
            raise SlotError(f"{self._path}: sync failed: {error.strerror}") from error
        return


def _read_cached(self: DirectDevice, offset: int, into: memoryview) -> None:
    os.preadv(self._handle, [into], offset)


blockdev._open_direct = _open_buffered
DirectDevice.sync = _sync_until_it_says_yes  # type: ignore[method-assign]
DirectDevice.read_medium = _read_cached  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
