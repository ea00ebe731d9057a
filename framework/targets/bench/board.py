"""One board of the virtual bench: a QEMU machine behind a relay, a serial port, a recovery line.

The relay is a contact, not a command: off takes the power at that moment, and the disk keeps what
the cache model lets survive (a seed each cut); on starts the machine, and a machine that switched
itself off stays off until the contact opens and closes again. The recovery line stands for what
writes a board's medium from outside (an SD mux, a mass-storage gadget): while the power is off it
puts the golden image back.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import field, frozen, validators
from labgrid.driver.exception import ExecutionError

from framework.console import ConsoleError, ConsoleLost
from framework.disk import MODELS
from framework.targets.bench.serial_port import Line, VirtualSerialPort
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.qemu import RecordedQEMUDriver
from framework.targets.rig import load_rig

__all__ = ["BenchBoard", "BenchOptions"]

_POLL_S = 0.2
_HANG_S = 3600.0
_STARVED_S = 30.0
#: labgrid's steps are one global stack without a lock (its issue 1851).
_steps = threading.Lock()


@frozen
class BenchOptions:
    """What the boards of a bench are.

    Attributes:
        rig: the rig file of the machine behind each board.
        cache: the cache model of its disk, by name.
        line: the quality of its serial line.
        seed: of what each cut leaves.
    """

    rig: Path = Path("rigs/qemu-arm64.yaml")
    cache: str = field(default="subset", validator=validators.in_(MODELS))
    line: Line = field(factory=Line)
    seed: int = 1


class BenchBoard:
    """A board; see the module text. `number` counts from 1."""

    def __init__(self, number: int, options: BenchOptions, prefix: str) -> None:
        self.number = number
        self.name = f"{prefix}-{number}"
        self.options = options
        self.cycles = 0
        self.stuck = False
        self.hangs = threading.Event()
        self._closed = threading.Event()
        self._on = False
        self._on_since = time.monotonic()
        self._lock = threading.RLock()
        target = load_rig(options.rig).get_target("main")
        if target is None:
            raise RigError(f"{options.rig}: has no target 'main'")
        with _steps:
            self._machine: RecordedQEMUDriver = target.get_driver(RecordedQEMUDriver, activate=True)
        self.serial = VirtualSerialPort(
            Path(f"/dev/shm/brownout-{os.getpid()}-{number}"),  # noqa: S108 - see serial_port
            options.line,
            self._typed,
        )
        self._bridge = threading.Thread(target=self._carry, name=f"{self.name} tx", daemon=True)
        self._bridge.start()

    # -- the relay ----------------------------------------------------------------------------

    def relay(self) -> bool:
        """What the power head says of its contact.

        InfrastructureError if the emulation behind it broke down, or hardly ran on a busy host:
        then the bench is ill and not the board, and every head says so by failing.
        """
        self._wait_if_hung()
        if self._on and self._machine.failure is not None:
            raise InfrastructureError(self._machine.failure)
        if self._on:
            since = max(self._on_since, time.monotonic() - 2 * _STARVED_S)
            starved = self._machine.starved_s(since)
            if starved > _STARVED_S:
                raise InfrastructureError(
                    f"the host is too busy: it kept {self.name} from running for {starved:.0f} s "
                    f"of the last {2 * _STARVED_S:.0f} s"
                )
        return self._on

    def switch(self, on: bool) -> None:
        """Open or close the contact."""
        self._wait_if_hung()
        with self._lock:
            if on == self._on:
                return
            self._on = on
            if self.stuck and not on:
                return  # the contact is welded: the head believes what it did
            if on:
                self._on_since = time.monotonic()
                self.serial.power_rises()
                with _steps:
                    self._machine.on()
            else:
                self._cut()

    def _cut(self) -> None:
        self.cycles += 1
        if not self._machine.get():
            return  # it had switched itself off
        seed = zlib.crc32(f"{self.options.seed}:{self.number}:{self.cycles}".encode())
        with _steps:
            self._machine.cut(self.options.cache, seed)

    def recover(self) -> None:
        """Put the golden image back. ExecutionError while the power is on."""
        with self._lock:
            if self._machine.get():
                raise ExecutionError("the medium belongs to the board while its power is on")
            self._machine.fresh()

    # -- what can be wrong with a desk ----------------------------------------------------------

    def weld(self, stuck: bool) -> None:
        """The relay's contact sticks: off does nothing any more (or works again)."""
        with self._lock:
            self.stuck = stuck
            if not stuck and not self._on:
                self._cut()

    def _wait_if_hung(self) -> None:
        """A power head that hangs takes the request and never answers."""
        deadline = time.monotonic() + _HANG_S
        while self.hangs.is_set() and not self._closed.wait(_POLL_S):
            if time.monotonic() > deadline:
                raise InfrastructureError("the power head hung")

    def facts(self) -> dict[str, Any]:
        """What the bench knows of this board, for tests and for people."""
        return {
            "name": self.name,
            "relay": self._on,
            "machine": self._machine.get(),
            "cycles": self.cycles,
            "boots": self._machine.boots,
            "serial": str(self.serial.path),
            "plugged_in": self.serial.plugged_in,
            "unread_bytes": self.serial.unread_bytes,
            "failure": self._machine.failure,
        }

    # -- the serial line ------------------------------------------------------------------------

    def _typed(self, data: bytes) -> None:
        with contextlib.suppress(ConsoleError):  # a board without power takes no input
            self._machine.pump.write(data)

    def _carry(self) -> None:
        """Carry the board's words to its port, for ever."""
        for data in self._words():
            self.serial.send(data)

    def _words(self) -> Iterator[bytes]:
        cursor = 0
        while not self._closed.is_set():
            try:
                data, cursor = self._machine.pump.read(cursor, _POLL_S)
            except ConsoleLost:
                self._closed.wait(_POLL_S / 4)
                continue
            if data:
                yield data

    def close(self) -> None:
        """Everything off and gone. Idempotent."""
        self._closed.set()
        self._machine.close()
        self._bridge.join(5 * _POLL_S)
        self.serial.close()
