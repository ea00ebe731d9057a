"""Faults of the running system and of its clock.

Processes are killed, memory is taken and the kernel is made to panic by a shell on the device,
which gets its order over the network when the trigger fires: some tens of milliseconds later, so
these are not exact to the operation.
"""

from __future__ import annotations

import datetime
from typing import ClassVar, Literal

from attrs import field, frozen, validators

from framework.faults.base import Fault

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
Signal = Literal["KILL", "TERM", "INT", "STOP"]


class GuestFamily(Fault):
    """Base of the faults that the device does to itself, on order."""

    family: ClassVar[str] = "guest"
    needs: ClassVar[frozenset[str]] = frozenset({"linux", "network"})


@frozen
class ProcessKilled(GuestFamily):
    """The updater's process gets a signal.

    Attributes:
        signal: KILL, TERM or INT.
    """

    signal: Signal = field(default="KILL", validator=validators.in_(("KILL", "TERM", "INT")))

    def what(self) -> str:
        """What goes wrong."""
        return f"updater gets SIG{self.signal}"


@frozen
class KernelPanic(GuestFamily):
    """The kernel panics (sysrq c); it restarts by itself some seconds later."""

    restarts: ClassVar[bool] = True

    def what(self) -> str:
        """What goes wrong."""
        return "kernel panic"


@frozen
class Hang(GuestFamily):
    """The system hangs: nothing gets the processor any more, the watchdog is not fed."""

    needs: ClassVar[frozenset[str]] = frozenset({"linux", "network", "watchdog"})
    restarts: ClassVar[bool] = True

    def what(self) -> str:
        """What goes wrong."""
        return "system hangs"


@frozen
class MemoryPressure(GuestFamily):
    """Something takes all memory but for some MiB, and can't be killed for it.

    Attributes:
        leave_mib: what is left.
    """

    leave_mib: int = field(default=16, validator=validators.ge(1))

    def what(self) -> str:
        """What goes wrong."""
        return f"memory gone but for {self.leave_mib} MiB"


def _utc(value: datetime.datetime | str) -> datetime.datetime:
    moment = datetime.datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)


@frozen
class Clock(Fault):
    """The device's clock says this, from now on; after a restart it is its hardware clock's again.

    Attributes:
        at: the time; naive means UTC.
    """

    family: ClassVar[str] = "clock"
    needs: ClassVar[frozenset[str]] = frozenset({"linux"})

    at: datetime.datetime = field(converter=_utc)

    def what(self) -> str:
        """What goes wrong."""
        return f"clock set to {self.at:%Y-%m-%d %H:%M:%S}"


@frozen
class ClockBattery(Fault):
    """The hardware clock's battery is dead: the clock starts at this time whenever power comes.

    Attributes:
        at: the time; naive means UTC.
    """

    family: ClassVar[str] = "clock"
    needs: ClassVar[frozenset[str]] = frozenset({"rtc"})

    at: datetime.datetime = field(default=EPOCH, converter=_utc)

    def what(self) -> str:
        """What goes wrong."""
        return f"clock battery dead (starts at {self.at:%Y-%m-%d})"


def process_killed(signal: Signal = "KILL") -> ProcessKilled:
    """The updater gets a signal."""
    return ProcessKilled(signal)


def kernel_panic() -> KernelPanic:
    """The kernel panics."""
    return KernelPanic()


def hang() -> Hang:
    """The system hangs, until the watchdog resets it."""
    return Hang()


def memory_pressure(leave_mib: int = 16) -> MemoryPressure:
    """Nearly all memory is gone."""
    return MemoryPressure(leave_mib)


def clock(at: datetime.datetime | str) -> Clock:
    """The clock jumps."""
    return Clock(at)


def clock_battery(at: datetime.datetime | str = EPOCH) -> ClockBattery:
    """The clock starts anew at this time whenever power comes."""
    return ClockBattery(at)
