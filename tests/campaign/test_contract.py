"""What the client promises line by line: the shipped one keeps it, and each rule can be broken."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from framework.campaign.contract import Contract, Facts
from framework.campaign.lifetimes import Fault, Lifetime, Schedule, live, trace
from framework.targets.simulated.device import Recorded
from framework.targets.simulated.laboratory import Laboratory
from framework.targets.simulated.managed import Job
from framework.verdict import ContractChecked
from updater.device.client import Client
from updater.device.errors import UpdaterError
from updater.device.model import Decision, Part, State
from updater.device.states import Event


def _contract(told: list[ContractChecked], **given: Any) -> Contract:
    """A contract with a device on which slot a runs and is started next, but for what is given."""
    facts = {
        "scripted": True,
        "slots": True,
        "struck": False,
        "damaged": False,
        "refused": False,
        "next": ("a", False),
        "done": True,
        "forgotten": False,
        "module": None,
        **given,
    }
    return Contract(
        told.append,
        Facts(
            running=lambda: "a",
            next=lambda: facts["next"],
            struck=lambda: facts["struck"],
            damaged=lambda: facts["damaged"],
            refused=lambda: facts["refused"],
            done=lambda script: facts["done"],
            forgotten=lambda: facts["forgotten"],
            module=lambda: facts["module"],
        ),
        scripted=facts["scripted"],
        slots=facts["slots"],
        initial="v1",
    )


def _listen(lines: list[str], **given: Any) -> list[str]:
    """What is broken in one command; "!" in a line begins another, with the code that ended it."""
    told: list[ContractChecked] = []
    contract = _contract(told, **given)
    contract.begin("resume")
    for line in lines:
        verb, _, code = line.partition("!")
        if code == "cut":
            contract.interrupted()
            contract.begin(verb)
        elif code:
            contract.end(int(code))
            contract.begin(verb)
        elif line.startswith("call "):
            contract.called(line[5:])
        else:
            contract.heard(line)
    return [event.what for event in told]


UP = ["state Download", "state ArtifactInstall", "state ArtifactReboot"]
LEAVE = "state script ArtifactInstall_Leave_00"
WAITS = "v2 waits in slot a; reboot to start it"
STAYED = "v2 was not installed, v1 (slot a) stays: why"
CUT = {"struck": True}
DAMAGED = {**CUT, "damaged": True}
PUT = ["state Download", "state ArtifactInstall", "call ArtifactInstall"]
PACKAGE = {
    "slots": False,
    "scripted": False,
    "module": {"reboot": "Automatic", "reverts": "Yes", "fails": "", "healthy": "Yes"},
}
RAN = [
    "state ArtifactRollback",
    "state script ArtifactRollback_Enter_00",
    "state ArtifactFailure",
    "state script ArtifactFailure_Enter_00",
]
BACK = ["state script ArtifactRollback_Enter_00", "state script ArtifactFailure_Enter_00"]


@pytest.mark.parametrize(
    ("lines", "changed", "what"),
    [
        (["state Download", "state ArtifactCommit"], {}, "ArtifactCommit follows Download"),
        (["state ArtifactRollback", "state Cleanup"], {}, "Cleanup follows ArtifactRollback"),
        (["committed v2 (slot b)"], {}, "and slot a runs"),
        (["rolled back to v1 (slot b): why"], {"scripted": False}, "and slot a runs"),
        ([STAYED], {}, "nothing interrupted it"),
        ([*UP, "rolled back to v1 (slot a): why"], {}, "ArtifactFailure_Enter_00 was not run"),
        ([*UP, *BACK, "committed v2 (slot a)"], {}, "committed, and .* was run"),
        ([*UP, BACK[0], BACK[0]], {}, "was run twice"),
        (["state Cleanup", "state Idle"], {"next": ("a", True)}, "slot a is not settled"),
        ([*UP[:2], "state script ArtifactReboot_Enter_00"], {}, "by hand|in ArtifactInstall"),
        (["state Download", BACK[0]], {}, "was run in Download"),
        # Behind an interruption.
        ([*UP[:1], "resume at boot!cut", "state ArtifactVerifyReboot"], CUT, "Download was inter"),
        ([*UP[:2], "resume at boot!cut", "state ArtifactCommit"], CUT, "ArtifactInstall was inter"),
        ([*UP, "resume at boot!cut", "state Cleanup"], CUT, "ArtifactReboot was interrupted"),
        (
            [*UP, "resume!cut", "state ArtifactVerifyReboot", "install!cut", "state Download"],
            CUT,
            "the last one was in ArtifactVerifyReboot",
        ),
        (
            [*UP[:2], LEAVE, "resume at boot!cut", "state ArtifactVerifyReboot"],
            {**CUT, "done": False},
            "ArtifactInstall_Leave_00 was interrupted",
        ),
        ([*UP, "resume!cut", "state ArtifactRollback", STAYED], CUT, "was in ArtifactReboot"),
        (
            ["state Download", "resume!cut", "state Cleanup", "rolled back to v1 (slot a): why"],
            CUT,
            "never begun",
        ),
        # A restart, and whether it is due.
        (["state Cleanup", "state Idle", "x!0"], {**CUT, "next": ("b", False)}, "no restart"),
        (["state Cleanup", "state Idle", "x!4"], CUT, "leads back to slot a"),
        (
            ["resume at boot!0", "v2 waits in slot b; reboot to start it"],
            {"next": ("b", True)},
            "just been restarted",
        ),
        (["resume at boot!0", "x!1"], {**DAMAGED, "next": ("a", True)}, "stays so"),
        (["resume at boot!0", "x!0"], {**DAMAGED, "forgotten": True}, "and it says nothing"),
        (["v2 waits; reboot to start it"], {}, "of an image"),
        ([*UP, "resume!cut", "state ArtifactRollback", "resume!cut", WAITS], CUT, "was in Artifac"),
        ([*UP[:2], LEAVE, "resume!cut", WAITS], {**CUT, "done": False}, "Leave_00 was interrupted"),
        (["installed v2 into slot b; reboot to start it"], {}, "slot a is started next"),
        (["rolling back to v1, reboot needed: why"], {}, "of an image"),
        (["reboot needed to return to slot b: why"], {}, "slot a is started next"),
        (["installed v2 into slot a; reboot to start it"], PACKAGE, "of a package"),
        (["error: no; slot a is still armed: the"], {}, "slot a is started next"),
        (
            ["slot a runs although the boot environment names slot a; it"],
            {"next": ("a", True)},
            "trial: True",
        ),
        (
            ["the boot environment names slot a but slot a runs; settling it on slot a"],
            {},
            "slot a is started next",
        ),
        # What is said of an interruption or an error.
        (["v2 was not so: interrupted in ArtifactInstall_"], CUT, "which is no state"),
        (
            [*UP[:1], "resume!cut", "state Cleanup", "x: interrupted in ArtifactCommit"],
            CUT,
            "it was interrupted in Download",
        ),
        (["error: one; then: one"], {}, "one thing twice"),
        ([*UP, "error: v2 entered 29 states without an end, the"], {}, "it was in 3"),
        (["commit!0", "state Cleanup", "committed v2 (slot a)", "x!2"], CUT, "nothing to do"),
        (["rollback!0", "state Cleanup", "committed v2 (slot a)", "x!0"], CUT, "was committed"),
        (["resume!2", "x!2"], {}, "nothing to do"),
        # Packages.
        ([*PUT, "state ArtifactCommit"], PACKAGE, "ArtifactCommit follows ArtifactInstall, and"),
        (
            [
                *PUT,
                "state ArtifactRollback",
                "call ArtifactRollback",
                "state ArtifactFailure",
                "x!0",
            ],
            PACKAGE,
            "not called for ArtifactFailure",
        ),
        (["state Download", "state ArtifactInstall", "x!0"], PACKAGE, "not called for ArtifactIns"),
        (["state Download", "call ArtifactInstall"], PACKAGE, "for ArtifactInstall in Download"),
    ],
)
def test_a_broken_promise_is_told(lines: list[str], changed: dict[str, Any], what: str) -> None:
    told = _listen(lines, **changed)
    assert any(re.search(what, one) for one in told), told


@pytest.mark.parametrize(
    ("lines", "changed"),
    [
        ([*UP, *RAN, "rolled back to v1 (slot a): why"], {}),
        (["committed v2 (slot b)"], {"slots": False}),
        ([STAYED], CUT),
        (UP, {}),
        ([*UP, "resume at boot!cut", "state ArtifactVerifyReboot"], CUT),
        ([*UP[:2], "resume at boot!cut", "state ArtifactRollback", STAYED], CUT),
        ([*UP[:2], LEAVE, "resume at boot!cut", "state ArtifactRollback"], {**CUT, "done": False}),
        (["state Download", "resume!cut", "state Cleanup", "x: interrupted in Download"], CUT),
        ([*UP, "resume!cut", "state ArtifactCommit"], {**CUT, "damaged": True}),
        (["state Cleanup", "state Idle", "x!4"], {**CUT, "next": ("b", False)}),
        (["slot a runs although the boot environment names slot b; it"], {"next": ("b", True)}),
        (
            ["the boot environment names no slot but slot a runs; settling it"],
            {"next": ("", False)},
        ),
        (["error: one; then: two"], {}),
        (["resume at boot!0", "x!1"], {**DAMAGED, "refused": True, "next": ("a", True)}),
        ([*PUT, "state ArtifactReboot", "x!0"], PACKAGE),
        (["rolling back to v1, reboot needed: why"], PACKAGE),
    ],
)
def test_a_kept_promise_is_not(lines: list[str], changed: dict[str, Any]) -> None:
    assert _listen(lines, **changed) == []


def test_how_a_command_ends_is_what_it_said() -> None:
    told: list[ContractChecked] = []
    contract = _contract(told, scripted=False, next=("b", True), damaged=True)
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


IDLE = Recorded(False, "", None)
FAILED = ("v2", "failed", "why")
LAST = "last update: v2 failed at 2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("lines", "recorded", "what"),
    [
        (["state: Idle", "running: v1 (slot a)"], IDLE, ""),
        (["state: Idle", "running: v1 (slot a)"], IDLE._replace(updating=True), "update is record"),
        (["state: Idle", "running: v1 (slot b)"], IDLE, "slot a runs"),
        (["running: v1 (slot a)", "state: Idle"], IDLE, "does not begin"),
        (["state: x", "running: v1 (slot a)", "cause: why"], Recorded(True, "why", None), ""),
        (["state: x", "running: v1 (slot a)"], Recorded(True, "why", None), "says the cause"),
        (
            ["state: Idle", "running: v1 (slot a)", f"{LAST}: why"],
            IDLE._replace(outcome=FAILED),
            "",
        ),
        (["state: Idle", "running: v1 (slot a)", LAST], IDLE._replace(outcome=FAILED), "is recor"),
    ],
)
def test_a_status_is_compared_with_the_store_and_the_slot(
    lines: list[str], recorded: Recorded, what: str
) -> None:
    told: list[ContractChecked] = []
    _contract(told).status(lines, recorded)
    assert [what in event.what for event in told] == ([True] if what else [])


def test_what_is_said_of_names_and_causes_is_compared_with_what_was_told() -> None:
    told: list[ContractChecked] = []
    contract = _contract(told, slots=False)
    contract.cause("health check 50-sick exited", "50-sick")
    contract.inconsistent("v1")
    contract.status(["state: x", "running: v1 (slot a)"], Recorded(True, "", None))
    contract.heard("committed v2 (slot a)")
    contract.status(["state: x", "running: v2 (slot a)"], Recorded(True, "", None))
    contract.heard("v2_INCONSISTENT is recorded: errors had to be ignored")
    contract.inconsistent("v2_INCONSISTENT")
    assert told == []
    contract.cause("it failed", "50-sick")
    contract.inconsistent("v2")
    contract.heard("committed v2 (slot a)")
    contract.inconsistent("v2_INCONSISTENT")
    contract.status(["state: x", "running: v3 (slot a)"], Recorded(True, "", None))
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


FAILS_IN_REBOOT = Schedule(module="reboot=Yes reverts=Yes fails=ArtifactReboot")


class IgnoresAFailingReboot(Client):
    def await_reboot(self) -> Event:
        with contextlib.suppress(UpdaterError):
            return super().await_reboot()
        return Event.DONE


class ProvesWhatItWasLeaving(Client):
    """Takes a restart in a rollback for one in ArtifactReboot."""

    def _decide(self) -> Decision:
        if self._current().state is State.ROLLBACK:
            return Decision.PROVE
        return super()._decide()


def _cut_everywhere(laboratory: Laboratory, base: Schedule) -> Iterator[Lifetime]:
    for step in trace(laboratory, base):
        yield live(laboratory, dataclasses.replace(base, faults=(Fault(step.number),)))


def test_a_cut_within_a_failing_reboot_may_count_as_the_restart(laboratory: Laboratory) -> None:
    """The module may have restarted the device itself; that the call failed was nowhere yet."""
    committed: set[str] = set()
    for lifetime in _cut_everywhere(laboratory, FAILS_IN_REBOOT):
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
        if any(line.startswith("updater: committed v2") for line in lifetime.lines):
            committed |= {strike.state for strike in lifetime.struck}
    assert committed == {"ArtifactInstall", "ArtifactReboot"}


@pytest.mark.parametrize("client", [IgnoresAFailingReboot, ProvesWhatItWasLeaving])
def test_a_client_that_commits_in_spite_of_a_failing_reboot_is_found(client: type[Client]) -> None:
    with contextlib.closing(Laboratory(client=client)) as broken:
        assert any(4 in one.verdict.violated for one in _cut_everywhere(broken, FAILS_IN_REBOOT))


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


# What the server was told of a deployment.


def test_a_deployment_committed_without_the_script_before_its_restart_is_told() -> None:
    told: list[ContractChecked] = []
    contract = _contract(told)
    contract.deploy()
    contract.begin("resume")
    for line in (*UP, "state ArtifactVerifyReboot", "state ArtifactCommit", "state Cleanup"):
        contract.heard(line)
    contract.heard("committed v2 (slot a)")
    assert any("ArtifactReboot_Enter_00 was not run" in event.what for event in told), told


@pytest.mark.parametrize(
    ("statuses", "struck", "what"),
    [
        (["installing", "success", "failure"], True, "two ends"),
        (["success"], False, "went well, and recorded v2_INCONSISTENT"),
    ],
)
def test_a_server_that_is_told_what_did_not_happen_is_noticed(
    statuses: list[str], struck: bool, what: str
) -> None:
    told: list[ContractChecked] = []
    contract = _contract(told, struck=struck)
    contract.deploy()
    contract.begin("resume")
    contract.heard("error: why; v2_INCONSISTENT is recorded")
    job = Job(1, "v2", {})
    job.told, job.causes, job.logs = statuses, [""] * len(statuses), 1
    contract.told(job)
    assert any(what in event.what for event in told), told
