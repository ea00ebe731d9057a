"""Planted bug: an updater that commits the new system first and checks its health afterwards."""

from __future__ import annotations

from updater.cli import main
from updater.device.client import Client
from updater.device.states import Event

_honest_clean_up = Client.clean_up


def _check_nothing(self: Client) -> Event:
    return Event.DONE


def _clean_up_then_check(self: Client) -> Event:
    done = _honest_clean_up(self)
    self.ports.health.run()
    return done


Client.verify = _check_nothing  # type: ignore[method-assign]
Client.clean_up = _clean_up_then_check  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
