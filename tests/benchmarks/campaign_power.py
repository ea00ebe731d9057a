"""How many runs a campaign needs until it draws what could show a planted bug; runs none.

    python tests/benchmarks/campaign_power.py [--rig rigs/qemu-arm64.yaml] [--campaigns 30]

For each of four bugs (images/planted) it is written down here which fault, where, could show it,
independently of how compositions are drawn. Campaigns are then drawn and steered as `brownout
campaign` does, every fault being taken to strike where it is expected to, unless another fault of
its run ends the step first. What is printed is the mean number of runs to the first composition in
which such a fault strikes and nothing undoes it. It is a bound from below: that a fault could show
a bug doesn't mean that it does (a hole in an image may be where nobody looks).

Each line has the share of such compositions among those drawn, too, that is without steering.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from framework.campaign.composition import Composition, Placed
from framework.campaign.space import Cell, candidates, choose, ends, expected, stages_of
from framework.faults import (
    After,
    AfterSwitch,
    AtState,
    BitFlip,
    BootEnvWrite,
    BrownOut,
    ConsoleSays,
    Downloaded,
    Fault,
    OnRecord,
    PowerCut,
    SlotWrite,
    StorageError,
    Trigger,
)
from framework.targets.rig import rig_features

MOST_RUNS: Final = 600
A_CAMPAIGN: Final = 300
"""How many compositions of a seed the shares are of."""
STATES: Final = {
    "install": ("Idle", "Download", "ArtifactInstall", "ArtifactReboot"),
    "prove": ("Idle", "start", "ArtifactVerifyReboot", "ArtifactCommit", "Cleanup"),
    "leave": (
        *("Idle", "start", "ArtifactVerifyReboot", "ArtifactRollback", "ArtifactRollbackReboot"),
        *("ArtifactVerifyRollbackReboot", "ArtifactFailure", "Cleanup"),
    ),
    "fall back": ("Idle", "start", "ArtifactRollback", "Cleanup"),
    "roll back": ("Idle", "ArtifactRollback", "ArtifactFailure", "Cleanup"),
}
SWITCHED: Final = 2.6
PLANTED: Final = ("v1", "v2", "unhealthy")

Span = tuple[float, float]


def span(trigger: Trigger | None, stage: str) -> Span:
    """When a trigger fires within its step: the states' numbers, and shares of them."""
    states = STATES[stage]

    def within(name: str, first: float = 0.0, last: float = 1.0) -> Span:
        number = states.index(name) if name in states else len(states)
        return number + first, number + last

    match trigger:
        case AtState(name=name, percent=None, operations=None):
            return within(name, 0, 0)
        case AtState(name=name):
            return within(name, 0.1, 0.95)
        case SlotWrite(percent=percent) | Downloaded(percent=percent):
            return within("Download", 0.9 * percent / 100, 0.9 * percent / 100)
        case OnRecord(name=name):
            number = within(name)[0]
            return number - 0.05, number - 0.05
        case BootEnvWrite(after=str() as name):
            return within(name, 0.5, 0.5)
        case AfterSwitch():
            return within("ArtifactInstall", 0.6, 1.5)
        case ConsoleSays(text=text):
            found = {"installed": ("ArtifactReboot", 0.5), "committed": ("Cleanup", 0.5)}
            for word, (name, share) in found.items():
                if word in text:
                    return within(name, share, share)
            if "REBOOT" in text:
                return within("ArtifactRollbackReboot", 0.4, 0.4)
            if "slot=a" in text and stage == "leave":
                return within("ArtifactRollbackReboot", 0.8, 0.8)
            return within("start", 0.5, 0.5)
        case After(first=first, then=then):
            begun = span(first.trigger, stage)
            later = begun if then is None else span(then, stage)
            return max(begun[0], later[0]), max(begun[1], later[1])
        case None:
            return 0.0, 0.0
        case _:
            return (1.0, 1.9)


def before(composition: Composition, placed: Placed, until: float) -> bool:
    """Whether another fault ends the step of `placed` before the place `until` in it."""
    stage = stages_of(composition)[placed.step]
    others = [
        p
        for p in composition.faults
        # What waits for a power cut ends nothing that the cut has not ended.
        if p is not placed
        and p.step == placed.step
        and not isinstance(_first_of(p.fault), PowerCut)
    ]
    return any(ends(p.fault) and span(p.fault.trigger, str(stage))[0] <= until for p in others)


def _first_of(fault: Fault) -> Fault | None:
    return fault.trigger.first if isinstance(fault.trigger, After) else None


def _prevented(composition: Composition, placed: Placed) -> bool:
    """Whether a fault can't strike because of the others."""
    stage = str(stages_of(composition)[placed.step])
    first = _first_of(placed.fault)
    if isinstance(first, PowerCut):
        waited = next(p for p in composition.faults if p.fault == first)
        return _prevented(composition, waited)
    if first is not None and ends(first):
        return True
    return before(composition, placed, span(placed.fault.trigger, stage)[1])


def _refused_write(composition: Composition, placed: Placed) -> bool:
    """The medium refuses a write to the slot, and nothing ends the installation."""
    fault = placed.fault
    writes = isinstance(fault, StorageError) and fault.on == ("write",)
    return writes and fault.area == "passive slot" and _is_installed(composition, placed)  # type: ignore[attr-defined]


def _flipped_bit(composition: Composition, placed: Placed) -> bool:
    return isinstance(placed.fault, BitFlip) and _is_installed(composition, placed)


def _is_installed(composition: Composition, placed: Placed) -> bool:
    """Whether the step installs an image with the bug, gets to its switch, and the image runs."""
    step = composition.steps[placed.step]
    first = _first_of(placed.fault)
    late = isinstance(first, Fault) and span(first.trigger, "install")[0] > 1.8
    return (
        step.image.partition("+")[0] in PLANTED
        and composition.steps[placed.step + 1].action != "rollback"
        and not late  # a share of the image that is counted from then on never comes
        and not before(composition, placed, SWITCHED)
        and (first is None or not ends(first))
    )


def _cut_after_the_switch(composition: Composition, placed: Placed) -> bool:
    """Power goes between the switch and the operator's sync."""
    if stages_of(composition)[placed.step] != "install" or not isinstance(placed.fault, PowerCut):
        return False
    trigger = placed.fault.trigger
    if isinstance(trigger, After):
        if ends(trigger.first):
            return False
        trigger = trigger.then
    late = isinstance(trigger, AfterSwitch) or (
        isinstance(trigger, AtState) and trigger.name == "ArtifactReboot"
    )
    said = isinstance(trigger, ConsoleSays) and "installed" in trigger.text
    return (late or said) and not _prevented(composition, placed)


def _cut_in_the_start_after_a_rollback(composition: Composition, placed: Placed) -> bool:
    """Power goes between the bootloader and the old system's client, once rolled back."""
    if stages_of(composition)[placed.step] != "leave" or not isinstance(placed.fault, PowerCut):
        return False
    if next(s.image for s in composition.steps[placed.step :: -1] if s.image)[:9] != "unhealthy":
        return False  # the other sick images have an honest client
    installs = [p for p in composition.faults if p.step == placed.step - 1]
    if any(ends(p.fault) and span(p.fault.trigger, "install")[1] >= 2.5 for p in installs):
        return False  # its trial is over before the step begins
    first = _first_of(placed.fault)
    own = placed.fault.trigger
    if isinstance(first, PowerCut):
        assert isinstance(own, After)
        started = isinstance(own.then, ConsoleSays) and "INIT" in own.then.text
        waited = next(p for p in composition.faults if p.fault == first)
        return started and _leaves(first.trigger) and not _prevented(composition, waited)
    there = isinstance(own, ConsoleSays) and own.text == "BROWNOUT INIT slot=a"
    brown = isinstance(placed.fault, BrownOut) and placed.fault.cuts >= 3 and _leaves(own)
    return (there or brown) and not _prevented(composition, placed)


def _leaves(trigger: Trigger | None) -> bool:
    """Whether the old system is what starts after a cut at this trigger."""
    name = "ArtifactRollbackReboot"
    return (
        (isinstance(trigger, OnRecord) and trigger.name == name)
        or (isinstance(trigger, AtState) and trigger.name == name and not trigger.within)
        or (isinstance(trigger, ConsoleSays) and "REBOOT" in trigger.text)
    )


BUGS: Final[dict[str, Callable[[Composition, Placed], bool]]] = {
    "sync-again": _refused_write,
    "page-cache-read-back": _flipped_bit,
    "lazy-store": _cut_after_the_switch,
    "rollback-on-trial": _cut_in_the_start_after_a_rollback,
}


def shows(composition: Composition, bug: str) -> bool:
    """Whether a composition has a fault that could show a bug, and none that prevents it."""
    return any(BUGS[bug](composition, placed) for placed in composition.faults)


def struck_by(composition: Composition) -> list[Cell]:
    """Where its faults strike."""
    return [
        cell
        for placed, cell in zip(composition.faults, expected(composition), strict=True)
        if cell.state and not _prevented(composition, placed)
    ]


def campaign(features: frozenset[str], seed: int) -> dict[str, int]:
    """The number of the first run that could show each bug."""
    struck: Counter[Cell] = Counter()
    first: dict[str, int] = {}
    for index in range(MOST_RUNS):
        offered = candidates(features, seed, index)
        chosen = offered[choose(offered, struck)]
        struck.update(struck_by(chosen))
        for bug in BUGS:
            if bug not in first and shows(chosen, bug):
                first[bug] = index + 1
        if len(first) == len(BUGS):
            break
    return {bug: first.get(bug, MOST_RUNS) for bug in BUGS}


def main() -> None:
    """Draw campaigns, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rig", type=Path, default=Path("rigs/qemu-arm64.yaml"))
    parser.add_argument("--campaigns", type=int, default=30)
    given = parser.parse_args()
    features = rig_features(given.rig)
    steered = [campaign(features, seed) for seed in range(given.campaigns)]
    drawn = [
        candidates(features, seed, index)[0]
        for seed in range(given.campaigns)
        for index in range(A_CAMPAIGN)
    ]
    print(f"{'runs to the first that could show it':38} mean  median  90 %   share of those drawn")
    for bug in BUGS:
        runs = sorted(one[bug] for one in steered)
        late = runs[(9 * len(runs)) // 10]
        mean, middle = statistics.mean(runs), statistics.median(runs)
        could = 100 * sum(shows(one, bug) for one in drawn) / len(drawn)
        print(f"  {bug:36} {mean:5.0f} {middle:7.0f} {late:5}   {could:18.1f} %")
    armed = sum(len(one.faults) for one in drawn)
    vain = sum(_prevented(one, placed) for one in drawn for placed in one.faults)
    print(f"of the faults drawn, {100 * vain / armed:.0f} % are prevented by another one")


if __name__ == "__main__":
    main()
