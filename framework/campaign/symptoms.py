"""What a failure looks like from outside: symptoms that a field device and a run can share.

Symptoms are a few short texts by name, `NAMES` says which. A run has them by its events, a crash
state of a recording by what its next start makes of it, a device in the field by its support
bundle. Any of them may be missing: what nobody knows is not compared. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from attrs import frozen

from framework.verdict import BootEnvironment, BootSeen, DiskSeen, Event, SlotState, StatusRead

WEIGHTS: Final[Mapping[str, int]] = {
    "runs": 4,
    "running slot": 3,
    "boot slot": 3,
    "on trial": 2,
    "valid copies": 2,
    "slot a": 4,
    "slot b": 4,
    "outcome": 3,
    "state": 3,
}
"""The symptoms, and how much each says: `runs` is the artifact, `state` the updater's state in
which the last update ended or is stuck, `outcome` how it ended."""
_STATE_IN_CAUSE: Final = re.compile(r"\b((?:Artifact|Download|Cleanup|Sync)\w*)\b")

Symptoms = Mapping[str, str]


@frozen
class Match:
    """How well two sets of symptoms agree.

    Attributes:
        score: 0 to 1: the weights of those that agree, of all that both know and of the failure's.
        same, different: names of the symptoms that agree and that don't.
    """

    score: float
    same: tuple[str, ...]
    different: tuple[str, ...]


def match(failure: Symptoms, candidate: Symptoms) -> Match:
    """Compare a failure's symptoms with a candidate's.

    A symptom that the candidate doesn't know counts against it, by half: an unknown slot is no
    agreement, and no contradiction.
    """
    same, different = [], []
    total = score = 0.0
    for name, value in failure.items():
        weight = WEIGHTS[name]
        total += weight
        if name not in candidate:
            score += weight / 2
        elif candidate[name] == value:
            score += weight
            same.append(name)
        else:
            different.append(name)
    return Match(score / total if total else 0.0, tuple(same), tuple(different))


def symptoms_of_run(events: Iterable[Event]) -> dict[str, str]:
    """The symptoms that a run ended with."""
    found: dict[str, str] = {}
    for event in events:
        if isinstance(event, BootSeen):
            found["runs"] = (event.version or "?") if event.ready else "nothing"
            found["running slot"] = (event.slot or "?") if event.ready else "none"
        elif isinstance(event, DiskSeen):
            found |= symptoms_of_disk(event.environment, event.slots)
        elif isinstance(event, StatusRead):
            found.pop("state", None)
            found["outcome"] = event.outcome or "none"
            if state := state_in(event.cause):
                found["state"] = state
    return found


def symptoms_of_disk(
    environment: BootEnvironment, slots: Mapping[str, SlotState]
) -> dict[str, str]:
    """What the boot environment and the slots show."""
    found = {f"slot {name}": content_of(state) for name, state in slots.items()}
    found["valid copies"] = str(environment.valid_copies)
    if environment.valid_copies and environment.boot_slot is not None:
        found["boot slot"] = environment.boot_slot
        found["on trial"] = "yes" if environment.upgrade_available else "no"
    return found


def content_of(state: SlotState) -> str:
    """A slot's content: an image's name, or that it is none."""
    return state.image or state.content.value


def state_in(cause: str) -> str:
    """The updater's state that a cause names ("interrupted in Download"); "" for none."""
    found = _STATE_IN_CAUSE.search(cause)
    return found[1] if found else ""
