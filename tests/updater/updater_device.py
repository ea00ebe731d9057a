"""The shipped command line with files as slots: run as a program by the process tests.

`updater_device.py DIRECTORY KILL_AT VERB …`: everything is the device's own code except that a
slot is a regular file, the running slot and the boot are read from files (there is no second
kernel to start), and the process kills itself with SIGKILL in front of effect KILL_AT.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from updater import cli
from updater.device.blockdev import DirectDevice
from updater.device.client import Client
from updater.device.config import Config, Slot
from updater.device.files import free_bytes
from updater.device.overlapped import Overlapped
from updater.device.slot_writer import CHUNK_BYTES


class FileMachine:
    """Slots that are files; which one runs is what `running` says."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def running_slot(self, slots: tuple[Slot, Slot]) -> Slot:
        name = (self._directory / "running").read_text()
        return next(slot for slot in slots if slot.name == name)

    def user_of(self, slot: Slot) -> str | None:
        return None

    def open_slot(self, slot: Slot) -> DirectDevice:
        return DirectDevice(slot.device)

    def overlapped(self, device: DirectDevice) -> Overlapped:
        return Overlapped(device, CHUNK_BYTES)

    def boot_id(self) -> str:
        return (self._directory / "boot").read_text()

    def free_bytes(self, path: str) -> int:
        return free_bytes(path)

    def sync_all(self) -> None:
        os.sync()


class Killer:
    """Counts effects over all ports; in front of the chosen one the process dies."""

    def __init__(self, kill_at: int) -> None:
        self._kill_at = kill_at
        self._count = 0

    def around(self, owner: Any, name: str) -> None:
        honest: Callable[..., Any] = getattr(owner, name)

        def effect(*arguments: Any) -> Any:
            self._step()
            return honest(*arguments)

        setattr(owner, name, effect)

    def _step(self) -> None:
        self._count += 1
        if self._count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> int:
    directory = Path(arguments[0])
    killer = Killer(int(arguments[1]))

    def compose(config: Config) -> Client:
        client = cli.open_client(config)
        machine = FileMachine(directory)
        honest_open = machine.open_slot

        def open_slot(slot: Slot) -> Overlapped:
            device = honest_open(slot)
            for name in ("write", "sync"):
                killer.around(device, name)
            return machine.overlapped(device)

        machine.open_slot = open_slot  # type: ignore[method-assign,assignment]
        for owner, name in (
            (client.ports.store, "save"),
            (client.ports.store, "finish"),
            (client.ports.bootenv, "write"),
            (client.ports.health, "run"),
        ):
            killer.around(owner, name)
        return Client(config, client.ports._replace(machine=machine))

    return cli.main(["--config", str(directory / "updater.toml"), *arguments[2:]], compose)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
