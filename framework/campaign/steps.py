"""What a run did, as steps that another run of the same scenario can be compared with.

A step says what was seen, without what differs from run to run although nothing else does: times,
operation numbers, boot ids, the words of a cause. Pure functions over the verdict's events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attrs import frozen

from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    ContractChecked,
    DataChecked,
    DiskSeen,
    Event,
    InstallEnded,
    InstallStarted,
    PowerCut,
    RetryEnded,
    ServerTold,
    StatusRead,
)


@frozen
class Divergence:
    """Where two runs part: the step's number from 1, and what each did there ("" for an end).

    `what` the steps are: events, or a disk's operations.
    """

    number: int
    was: str
    now: str
    what: str = "event"

    def __str__(self) -> str:
        """The divergence as a sentence."""
        was, now = (step or "the run ended" for step in (self.was, self.now))
        return f"diverged at {self.what} {self.number}: it was [{was}], it is [{now}]"


def steps_of(events: Iterable[Event]) -> tuple[str, ...]:
    """One line for each event."""
    return tuple(_step(event) for event in events)


def compare(was: Sequence[str], now: Sequence[str], what: str = "event") -> Divergence | None:
    """The first step in which two runs differ; None if they don't."""
    for number in range(max(len(was), len(now))):
        old = was[number] if number < len(was) else ""
        new = now[number] if number < len(now) else ""
        if old != new:
            return Divergence(number + 1, old, new, what)
    return None


def _step(event: Event) -> str:
    match event:
        case DiskSeen(moment=moment, slots=slots, environment=environment):
            held = ", ".join(f"{name}: {state}" for name, state in sorted(slots.items()))
            trial = " on trial" if environment.upgrade_available else ""
            return f"disk {moment}: {held}; boots {environment.boot_slot}{trial}"
        case PowerCut(model=model):
            return f"power cut ({model})"
        case BootSeen(ready=True, version=version, slot=slot):
            return f"started {version} in slot {slot}"
        case BootSeen():
            return "did not start"
        case InstallStarted(artifact=artifact):
            return f"installing {artifact}"
        case InstallEnded(artifact=artifact, exit_code=code, timed_out=timed_out):
            how = "not in time" if timed_out else "cut short" if code is None else f"with {code}"
            return f"installation of {artifact} ended {how}"
        case CommitReached(artifact=artifact):
            return f"commit of {artifact} reached"
        case Committed(artifact=artifact, slot=slot):
            return f"committed {artifact} in slot {slot}"
        case DataChecked(clean=clean, intact=intact):
            return f"data {'clean' if clean else 'damaged'}, {'intact' if intact else 'lost'}"
        case StatusRead(artifact=artifact, outcome=outcome):
            return f"status: {artifact} {outcome}".strip()
        case RetryEnded(artifact=artifact, committed=committed):
            return f"{artifact} {'' if committed else 'not '}committed in the end"
        case ContractChecked(what=what, kept=kept):
            return f"promise {'kept' if kept else 'broken'}: {what}"
        case ServerTold(artifact=artifact, status=status):
            return f"server told of {artifact}: {status}"
