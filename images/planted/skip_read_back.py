"""Planted bug: an updater that trusts the drive and never reads back what it wrote."""

from __future__ import annotations

from updater.cli import main
from updater.device.slot_writer import SlotWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.slot_writer import Payload


def _trust(self: SlotWriter, payload: Payload) -> None:
    return


SlotWriter.read_back = _trust  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
