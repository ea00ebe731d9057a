"""What all faults have in common: a trigger, the features they need, and a sentence."""

from __future__ import annotations

from typing import ClassVar, Self

from attrs import evolve, field, frozen

from framework.faults.errors import FaultError
from framework.faults.triggers import After, AtState, DiskTrigger, Trigger


@frozen
class Fault:
    """Something that goes wrong; with a trigger it can be armed on a device.

    Attributes:
        trigger: when; None: not said yet.
    """

    family: ClassVar[str] = ""
    """What a QA engineer looks for: power, network, storage, clock, guest or operator."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """The labgrid features that a rig must have for it."""

    trigger: Trigger | None = field(default=None, kw_only=True)

    def when(self, trigger: Trigger) -> Self:
        """The same fault, at this trigger.

        Raises:
            FaultError: this fault can't have such a trigger.
        """
        self.check_trigger(trigger)
        return evolve(self, trigger=trigger)

    def check_trigger(self, trigger: Trigger) -> None:
        """Raise FaultError if this fault can't have this trigger."""

    def what(self) -> str:
        """What goes wrong, in words, without the trigger."""
        raise NotImplementedError

    def details(self) -> str:
        """What stands behind the trigger in the sentence."""
        return ""

    def features(self) -> frozenset[str]:
        """The labgrid features that fault and trigger need."""
        return self.needs | features_of(self.trigger)

    def lacks(self, features: frozenset[str]) -> frozenset[str]:
        """What a rig with these features lacks for it."""
        return self.features() - features

    def __str__(self) -> str:
        """The fault as a sentence."""
        when = "" if self.trigger is None else f" {self.trigger}"
        return f"{self.what()}{when}{self.details()}"


def features_of(trigger: Trigger | None) -> frozenset[str]:
    """The labgrid features that a trigger needs."""
    if trigger is None:
        return frozenset()
    needs = trigger.needs
    if isinstance(trigger, After):
        needs |= trigger.first.features() | features_of(trigger.then)
    if isinstance(trigger, AtState) and trigger.within:
        needs |= DiskTrigger.needs
    return needs


def require_place(fault: Fault, trigger: Trigger, *kinds: type[Trigger], why: str) -> None:
    """Raise FaultError unless the trigger is (or ends in) one of `kinds`."""
    last = trigger
    while isinstance(last, After) and last.then is not None:
        last = last.then
    if not isinstance(last, kinds):
        raise FaultError(f"{fault.what()}: {why}, not {trigger}")
