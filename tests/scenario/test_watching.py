"""What a trigger listens for on the console, and which triggers begin with a state."""

import pytest

from framework.faults import (
    Trigger,
    boot_env_write,
    console,
    operation,
    slot_write,
    state,
)
from framework.faults.triggers import AtState, ConsoleSays
from framework.scenario.watching import Ear, later_on_disk
from framework.targets.uut import BrownoutUpdater

LINES = [
    "updater: state Download",
    "10 % of something",
    "updater: state ArtifactInstall",
    "updater: state ArtifactReboot",
    "updater: installed v2 into slot b; reboot to start it",
    "updater: state Download",
    "updater: error: https://x: gave up",
    "updater: state Cleanup",
    "updater: state Idle",
]


@pytest.mark.parametrize(
    ("trigger", "heard"),
    [
        (state("Download"), [0, 5]),
        (state("Download").leave(), [2, 6]),
        (state("ArtifactReboot").leave(), [4]),
        (state("Cleanup").leave(), [8]),
        (state("ArtifactCommit").leave(), []),
        (console("% of"), [1]),
        (console("updater: installed"), [4]),
    ],
    ids=str,
)
def test_a_trigger_hears_its_lines_and_no_other(
    trigger: AtState | ConsoleSays, heard: list[int]
) -> None:
    ear = Ear(BrownoutUpdater.signs, trigger)
    assert [i for i, line in enumerate(LINES) if ear.hears(line)] == heard


def test_a_state_in_which_the_updater_stays_is_entered_once() -> None:
    ear = Ear(BrownoutUpdater.signs, state("ArtifactRollback"))
    lines = ["updater: state ArtifactRollback", "chatter", "updater: state ArtifactRollback"]
    assert [ear.hears(line) for line in lines] == [True, False, True]


@pytest.mark.parametrize(
    ("trigger", "parts"),
    [
        (boot_env_write(2, after="ArtifactCommit"), (state("ArtifactCommit"), boot_env_write(2))),
        (state("Download").at(percent=30), (state("Download"), slot_write(percent=30))),
        (state("Cleanup").at(operations=4), (state("Cleanup"), operation(4))),
        (state("Cleanup").leave(), None),
        (boot_env_write(2), None),
        (slot_write(percent=3), None),
    ],
    ids=str,
)
def test_a_place_inside_a_state_is_the_state_and_then_the_disk(
    trigger: Trigger, parts: tuple[Trigger, Trigger] | None
) -> None:
    assert later_on_disk(trigger) == parts
