"""Faults of people: they interrupt, and they do a thing twice."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators

from framework.faults.base import Fault

Order = Literal["install", "commit", "rollback", "status", "resume"]
ORDERS = ("install", "commit", "rollback", "status", "resume")


@frozen
class Interrupt(Fault):
    """Somebody presses Ctrl-C on the console.

    Attributes:
        times: how often in a row.
    """

    family: ClassVar[str] = "operator"

    times: int = field(default=1, validator=[validators.ge(1), validators.le(20)])

    def what(self) -> str:
        """What goes wrong."""
        return "Ctrl-C" if self.times == 1 else f"Ctrl-C {self.times} times"


@frozen
class SecondCommand(Fault):
    """Somebody runs another command of the updater while the first one works.

    Attributes:
        command: `install` (the same update), `commit`, `rollback`, `status` or `resume`.
    """

    family: ClassVar[str] = "operator"
    needs: ClassVar[frozenset[str]] = frozenset({"network"})

    command: Order = field(default="install", validator=validators.in_(ORDERS))

    def what(self) -> str:
        """What goes wrong."""
        return f"a second hand runs {self.command}"


def ctrl_c(times: int = 1) -> Interrupt:
    """Ctrl-C on the console."""
    return Interrupt(times)


def second_command(command: Order = "install") -> SecondCommand:
    """Another command while the first one works."""
    return SecondCommand(command)
