"""Planted bug: an updater that says "committed" before the boot environment says so."""

from __future__ import annotations

from updater.cli import main
from updater.device.client import Client
from updater.device.console import say
from updater.device.states import Event

_honest_commit = Client.commit_environment


def _say_then_commit(self: Client) -> Event:
    update = self._current()
    say(f"committed {update.artifact_name} (slot {update.target})")
    return _honest_commit(self)


Client.commit_environment = _say_then_commit  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
