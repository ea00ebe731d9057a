"""Planted bug: an updater that goes back to the old system as it went to the new one: on trial.

The old system settles the boot environment as soon as it runs, so nobody notices. But when the
power goes between the bootloader's count and that moment, the bootloader takes the old system for
one that failed its trial, and starts the sick one as if it had been committed.
"""

from __future__ import annotations

from updater.cli import main
from updater.device import bootenv
from updater.device.client import Client
from updater.device.signals import deferred
from updater.device.states import Event

_honest_roll_back = Client.roll_back


def _roll_back_on_trial(self: Client) -> Event:
    update = self._current()
    running = self.ports.machine.running_slot(self.config.slots).name
    if not update.is_image or running != update.target:
        return _honest_roll_back(self)
    with deferred():
        bootenv.start_trial(self.ports.bootenv, self._slot(update.source))
    return Event.DONE


Client.roll_back = _roll_back_on_trial  # type: ignore[method-assign]

if __name__ == "__main__":
    raise SystemExit(main())
