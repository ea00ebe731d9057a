"""What had been promised by when: the events of a recorded run, on the clock of its operations.

A recording carries the run's events (an installation began, it was acknowledged, a commit was
acknowledged, a system was ready, a file was synced) as marks of the source `event`, each after as
many operations as had *arrived* when it was heard. A mark comes a moment after the fact, so an
obligation is never dated too early: what follows of it is that a cut at operation n owes all that
was said after n operations or fewer. Pure functions over values; nothing here knows an updater.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Final

from attrs import asdict, frozen

from framework.disk import Mark
from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    Event,
    InstallEnded,
    InstallStarted,
)

SOURCE: Final = "event"


@frozen
class FileSynced:
    """A file on the data partition was written and synced: any cut from here on keeps it."""

    path: str
    sha256: str


@frozen
class Restarted:
    """The device was told to restart: from here on its bootloader counts an attempt.

    What an acknowledged installation owes (that the next start is the new system) ends with it.
    """


Promise = Event | FileSynced | Restarted


_KINDS: Final[dict[str, Any]] = {
    kind.__name__: kind
    for kind in (
        BootSeen,
        CommitReached,
        Committed,
        FileSynced,
        InstallEnded,
        InstallStarted,
        Restarted,
    )
}


@frozen
class Step:
    """One event: its place in the journal's order, and how many operations had arrived before."""

    sequence: int
    after_operation: int
    event: Promise


@frozen
class Timeline:
    """The run's events in order.

    A *phase* is the stretch between two of them: phase p owes the first p events. All cuts of
    one phase owe the same, so a crash state's verdict depends on its content and its phase only.
    """

    steps: tuple[Step, ...]

    @cached_property
    def _sequences(self) -> tuple[int, ...]:
        return tuple(step.sequence for step in self.steps)

    def phase_at(self, sequence: int) -> int:
        """The phase of a power failure right after record `sequence` of the journal."""
        return bisect_right(self._sequences, sequence)

    def phases_within(self, first_sequence: int, last_sequence: int) -> range:
        """The phases of failures after records first <= s < last."""
        first = self.phase_at(first_sequence)
        return range(first, max(first, self.phase_at(last_sequence - 1)) + 1)

    def events(self, phase: int) -> tuple[Event, ...]:
        """What had happened, for the invariants.

        What an installation's end promised is owed until the restart. What obliges is dated when
        it was heard, which is late, so nothing is owed too early. Reaching the commit permits
        something, so it is dated early: at the start of the boot in which it was heard.
        """
        found: list[Event] = []
        for at, step in enumerate(self.steps[:phase]):
            if isinstance(step.event, Restarted):
                found = [event for event in found if not isinstance(event, InstallEnded)]
                found.extend(self._commits_of_boot(at + 1))
            elif not isinstance(step.event, FileSynced):
                found.append(step.event)
        return tuple(found)

    def _commits_of_boot(self, first: int) -> list[CommitReached]:
        """The commits reached from step `first` on, up to the next restart or installation."""
        commits = []
        for step in self.steps[first:]:
            if isinstance(step.event, Restarted | InstallStarted):
                break
            if isinstance(step.event, CommitReached):
                commits.append(step.event)
        return commits

    def synced(self, phase: int) -> tuple[FileSynced, ...]:
        """The files that must be intact."""
        return tuple(
            step.event for step in self.steps[:phase] if isinstance(step.event, FileSynced)
        )

    def describe(self, phase: int) -> str:
        """The newest promise of a phase, for people."""
        if phase == 0:
            return "before anything was promised"
        return f"after {_words(self.steps[phase - 1].event)}"


def _words(event: Promise) -> str:
    match event:
        case FileSynced(path=path):
            return f"{path} was synced"
        case Restarted():
            return "the device was told to restart"
        case InstallStarted(artifact=name):
            return f"the installation of {name} began"
        case InstallEnded(artifact=name, exit_code=code):
            return f"the installation of {name} ended with {code}"
        case CommitReached(artifact=name):
            return f"{name} reached its commit"
        case Committed(artifact=name):
            return f"the commit of {name} was acknowledged"
        case BootSeen(version=version, slot=slot):
            return f"{version} was ready in slot {slot}"
        case _:
            return type(event).__name__


def to_mark(event: Promise) -> str:
    """The text of the mark for an event."""
    return json.dumps({"event": type(event).__name__, **asdict(event)}, sort_keys=True)


def from_mark(text: str) -> Promise:
    """The event of a mark; raises ValueError if it is none that is known here."""
    try:
        fields = dict(json.loads(text))
        made: Promise = _KINDS[fields.pop("event")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {text[:80]!r}") from error
    return made


def read_timeline(marks: Iterable[Mark]) -> Timeline:
    """The timeline of a journal's marks; raises ValueError for an event that is not known."""
    steps: Sequence[Step] = [
        Step(mark.sequence, mark.after_operation, from_mark(mark.text))
        for mark in marks
        if mark.source == SOURCE
    ]
    return Timeline(tuple(steps))
