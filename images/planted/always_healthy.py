"""Planted bug: a health check that passes whatever the system is like."""

from __future__ import annotations

from updater.cli import main
from updater.device.health import HealthRunner


def _pass(self: HealthRunner) -> None:
    return


HealthRunner.run = _pass  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
