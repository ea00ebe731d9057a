"""Planted bug: an updater that tells its server of success as soon as the new slot is written."""

from __future__ import annotations

from updater.cli import main
from updater.device.api import DeviceApi

_honest_report = DeviceApi.report


def _boast(self: DeviceApi, deployment: str, status: str, substate: str = "") -> None:
    """Send "success" in the place of "rebooting"."""
    _honest_report(self, deployment, "success" if status == "rebooting" else status, substate)


DeviceApi.report = _boast  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
