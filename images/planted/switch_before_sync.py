"""Planted bug: an updater that switches slots first and syncs the image afterwards.

Between the two, the boot environment names a slot whose image is still in the page cache. A cut
late in the sync leaves a system that starts, looks healthy, and is not the image. How much the
kernel has written by itself until then is a matter of the device's speed, memory and settings:
here it is told to write nothing, as on a device with memory to spare, so that the bug shows always.
"""

from __future__ import annotations

import os
from pathlib import Path

from updater.cli import main
from updater.device import blockdev
from updater.device.client import Client
from updater.device.slot_writer import SlotWriter
from updater.device.states import Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.slot_writer import Payload

WRITE_BACK_LATE = {
    "dirty_ratio": 90,
    "dirty_background_ratio": 80,
    "dirty_expire_centisecs": 60_000,
    "dirty_writeback_centisecs": 0,
}

_honest_activate = Client.activate
_honest_sync = SlotWriter.sync
_unsynced: list[tuple[SlotWriter, Payload]] = []


def _open_buffered(path: str) -> tuple[int, bool]:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _sync_nothing(self: SlotWriter) -> None:
    return


def _only_write(self: Client, payload: Payload) -> None:
    for name, value in WRITE_BACK_LATE.items():
        Path("/proc/sys/vm", name).write_text(str(value))
    target = self._slot(self._current().target)
    writer = SlotWriter(self.ports.machine.open_slot(target), target)
    writer.write(payload)
    _unsynced.append((writer, payload))


def _switch_then_sync(self: Client) -> Event:
    switched = _honest_activate(self)
    for writer, payload in _unsynced:
        _honest_sync(writer)
        writer.read_back(payload)
    return switched


blockdev._open_direct = _open_buffered
SlotWriter.sync = _sync_nothing  # type: ignore[method-assign]
Client.fill_slot = _only_write  # type: ignore[method-assign]
Client.activate = _switch_then_sync  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
