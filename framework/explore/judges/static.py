"""The static oracle: what the boot contract says of a class, without booting anything.

The same pure readers judge here as after a live scenario (`framework.verdict`): the run is what
had been promised in that phase, then one look at the disk. Each distinct boot environment is
parsed once. What it can't know: whether a slot that is no known image but has a file system's
magic can be loaded; it takes it for loadable (`Expectation.certain` is then False).
"""

from __future__ import annotations

from attrs import frozen

from framework.explore.judges.context import Context
from framework.explore.layout import Role
from framework.explore.states import CrashClass, RegionFact
from framework.verdict import (
    BootEnvironment,
    Decision,
    DiskSeen,
    Event,
    Finding,
    Outcome,
    Run,
    SlotContent,
    SlotState,
    Verdict,
    judge,
    next_boot,
)
from framework.verdict.oracle import other


@frozen
class Expectation:
    """What the next power-on should do with a class.

    Attributes:
        decision: the bootloader's.
        certain: whether it follows from the contract; False where it hangs on a slot's content
            that only the bootloader can try.
        slot: the slot that runs in the end: the decision's, or the other one if a system on trial
            is known to be sick. None where nothing boots.
        version: the artifact that runs in the end; None if unknown.
    """

    decision: Decision
    certain: bool
    slot: str | None
    version: str | None


class StaticOracle:
    """Judges classes; remembers each distinct boot environment."""

    name = "static"

    def __init__(self, context: Context) -> None:
        self.context = context
        self._environments: dict[tuple[str, ...], BootEnvironment] = {}

    def environment(self, crash_class: CrashClass) -> BootEnvironment:
        """The boot environment of a class, as its bootloader reads it."""
        key = tuple(f.content for f in crash_class.facts if f.role is Role.ENVIRONMENT)
        if key not in self._environments:
            with crash_class.representative.disks(self.context.journal) as disks:
                self._environments[key] = self.context.layout.boot(disks)
        return self._environments[key]

    def slots(self, crash_class: CrashClass) -> dict[str, SlotState]:
        """What stands in the slots, by slot name."""
        return {
            slot: _state(crash_class.fact(region)) for slot, region in self.context.slots.items()
        }

    def seen(self, crash_class: CrashClass, moment: str = "after the cut") -> DiskSeen:
        """The class as a look at the disk."""
        return DiskSeen(moment, self.slots(crash_class), self.environment(crash_class))

    def expect(self, crash_class: CrashClass) -> Expectation:
        """What the next power-on should do."""
        slots = self.slots(crash_class)
        decision = next_boot(self.environment(crash_class), slots)
        certain = all(state.content is not SlotContent.MIXED for state in slots.values())
        slot = decision.slot
        version = None if slot is None else slots[slot].image
        if slot is not None and version is not None and decision.on_trial:
            image = self.context.images.get(version)
            if image is not None and not image.healthy:
                slot = other(slot)
                version = slots[slot].image
        return Expectation(decision, certain, slot, version)

    def on_trial(self, crash_class: CrashClass) -> str | None:
        """The artifact that the next power-on tries, if it is a trial."""
        slots = self.slots(crash_class)
        decision = next_boot(self.environment(crash_class), slots)
        if decision.slot is None or not decision.on_trial:
            return None
        return slots[decision.slot].image

    def judge(self, crash_class: CrashClass, phase: int, *further: Event) -> Verdict:
        """The verdict on a class in a phase; `further` is what a dearer judge saw."""
        context = self.context
        events = (*context.timeline.events(phase), self.seen(crash_class), *further)
        verdict = judge(Run(dict(context.images), context.initial, events))
        if self.expect(crash_class).decision.slot is None:
            return _nothing_boots(verdict)
        return verdict


def _state(fact: RegionFact) -> SlotState:
    if fact.image is not None:
        return SlotState(SlotContent.IMAGE, fact.image)
    return SlotState(SlotContent.MIXED if fact.loadable else SlotContent.UNLOADABLE)


def _nothing_boots(verdict: Verdict) -> Verdict:
    """Invariant 1 is broken by a disk from which nothing can be started, also without a boot."""
    return with_finding(verdict, 1, "no slot can be loaded")


def with_finding(verdict: Verdict, invariant: int, evidence: str) -> Verdict:
    """The verdict with one more invariant broken."""
    findings = tuple(
        Finding(invariant, False, evidence) if f.invariant == invariant else f
        for f in verdict.findings
    )
    outcome = verdict.outcome if verdict.outcome is not Outcome.PASS else Outcome.VIOLATION
    return Verdict(outcome, findings)
