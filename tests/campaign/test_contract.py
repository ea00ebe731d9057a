"""What the client promises line by line: the shipped one keeps it, and each rule can be broken."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from framework.campaign.contract import Contract
from framework.campaign.lifetimes import Fault, Schedule, live, trace
from framework.targets.simulated.laboratory import Laboratory
from framework.verdict import ContractChecked
from updater.device.client import Client
from updater.device.model import Part
from updater.device.states import Event


def _listen(lines: list[str], **changed: Any) -> list[str]:
    told: list[ContractChecked] = []
    facts = {"scripted": True, "slots": True, "struck": False, "settled": True, **changed}
    contract = Contract(
        told.append,
        lambda: "a",
        lambda: facts["settled"],
        lambda: facts["struck"],
        scripted=facts["scripted"],
        slots=facts["slots"],
    )
    contract.begin("resume")
    for line in lines:
        contract.heard(line)
    return [event.what for event in told]


def _contract(told: list[ContractChecked]) -> Contract:
    return Contract(
        told.append, lambda: "a", lambda: True, lambda: False, scripted=False, slots=True
    )


UP = ["state Download", "state ArtifactInstall", "state ArtifactReboot"]
BACK = ["state script ArtifactRollback_Enter_00", "state script ArtifactFailure_Enter_00"]


@pytest.mark.parametrize(
    ("lines", "changed", "what"),
    [
        (["state Download", "state ArtifactCommit"], {}, "ArtifactCommit follows Download"),
        (["state ArtifactRollback", "state Cleanup"], {}, "Cleanup follows ArtifactRollback"),
        (["committed v2 (slot b)"], {}, "and slot a runs"),
        (["rolled back to v1 (slot b): why"], {"scripted": False}, "and slot a runs"),
        (["v2 was not installed, v1 (slot a) stays: why"], {}, "nothing interrupted it"),
        ([*UP, "rolled back to v1 (slot a): why"], {}, "ArtifactFailure_Enter_00 was not run"),
        ([*UP, *BACK, "committed v2 (slot a)"], {}, "committed, and .* was run"),
        ([*UP, BACK[0], BACK[0]], {}, "was run twice"),
        (["state Cleanup", "state Idle"], {"settled": False}, "slot a is not settled"),
    ],
)
def test_a_broken_promise_is_told(lines: list[str], changed: dict[str, Any], what: str) -> None:
    [told] = _listen(lines, **changed)
    assert re.search(what, told), told


@pytest.mark.parametrize(
    ("lines", "changed"),
    [
        ([*UP, *BACK, "rolled back to v1 (slot a): why"], {}),
        (["committed v2 (slot b)"], {"slots": False}),
        (["v2 was not installed, v1 (slot a) stays: why"], {"struck": True}),
        (UP, {}),
    ],
)
def test_a_kept_promise_is_not(lines: list[str], changed: dict[str, Any]) -> None:
    assert _listen(lines, **changed) == []


def test_how_a_command_ends_is_what_it_said() -> None:
    told: list[ContractChecked] = []
    contract = _contract(told)
    for verb, lines, code in (
        ("commit", ["committed v2 (slot a)"], 0),
        ("rollback", ["state ArtifactRollback"], 0),
        ("commit", [], 2),
        ("install", ["installed v2 into slot b; reboot to start it"], 0),
    ):
        contract.begin(verb)
        for line in lines:
            contract.heard(line)
        contract.end(code)
    assert told == []
    for verb, lines, code in (
        ("commit", ["rolled back to v1 (slot a): why"], 0),
        ("rollback", ["committed v2 (slot a)"], 0),
        ("install", [], 0),
        ("commit", ["state ArtifactCommit"], 2),
    ):
        contract.begin(verb)
        for line in lines:
            contract.heard(line)
        contract.end(code)
        assert told, verb
        told.clear()


def test_a_status_is_compared_with_the_store_and_the_slot() -> None:
    told: list[ContractChecked] = []
    contract = _contract(told)
    contract.status(["state: Idle", "running: v1 (slot a)"], updating=False)
    contract.cause("health check 50-sick exited", "50-sick")
    assert told == []
    contract.status(["state: Idle", "running: v1 (slot a)"], updating=True)
    contract.status(["state: Idle", "running: v1 (slot b)"], updating=False)
    contract.status(["running: v1 (slot a)", "state: Idle"], updating=False)
    contract.cause("it failed", "50-sick")
    assert len(told) == 4


# In whole lifetimes.


class RecordsItFromTheWrongSlot(Client):
    """Goes on to the failure's end instead of restarting."""

    def reboot_back(self) -> Event:
        super().reboot_back()
        return Event.FAILED


class RunsNoFailureScripts(Client):
    def _run_scripts(self, state: str, part: Part) -> None:
        if state != "ArtifactFailure":
            super()._run_scripts(state, part)


class ForgetsWhatFailed(Client):
    def _note_cause(self, cause: str) -> None:
        super()._note_cause("something failed")


@pytest.fixture
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("client", "schedule", "what"),
    [
        (RecordsItFromTheWrongSlot, Schedule(behaviour="unhealthy"), "slot b is not settled"),
        (
            RunsNoFailureScripts,
            Schedule(behaviour="unhealthy", scripts="ok"),
            "ArtifactFailure_Enter_00 was not run",
        ),
        (ForgetsWhatFailed, Schedule(behaviour="unhealthy"), "the cause is '50-sick'"),
    ],
)
def test_a_client_that_breaks_a_promise_is_found(
    client: type[Client], schedule: Schedule, what: str
) -> None:
    with contextlib.closing(Laboratory()) as shipped:
        assert str(live(shipped, schedule).verdict) == "PASS"
    with contextlib.closing(Laboratory(client=client)) as broken:
        verdict = live(broken, schedule).verdict
    assert 7 in verdict.violated
    assert what in verdict.findings[6].evidence


def test_a_module_that_never_verifies_its_rollback_is_given_up(laboratory: Laboratory) -> None:
    """Within one command, which would never end without the limit of states."""
    endless = "reboot=Yes reverts=Yes fails=ArtifactVerifyRollbackReboot"
    lifetime = live(laboratory, Schedule(module=endless, behaviour="unhealthy"))
    assert str(lifetime.verdict) == "PASS"
    assert any("states without an end" in line for line in lifetime.lines)


def test_a_rollback_that_comes_after_the_commit_is_refused(laboratory: Laboratory) -> None:
    """The commit's record could not be written; the rollback that came next said that all is well.

    It finishes the commit, and has to say so.
    """
    base = Schedule(actions=("stage", "restart", "rollback"), scripts="ok")
    places = [o.number for o in trace(laboratory, base) if (o.state, o.area) == ("Cleanup", "data")]
    refused = 0
    for place in places:
        lifetime = live(laboratory, dataclasses.replace(base, faults=(Fault(place, "error"),)))
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
        refused += any("nothing to roll back: the update was" in line for line in lifetime.lines)
    assert refused
