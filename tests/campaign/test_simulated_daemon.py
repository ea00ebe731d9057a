"""The daemon in simulated lifetimes: deployments, lost requests, pauses, and planted bugs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from framework.campaign.lifetimes import MANAGED, Fault, Life, Lifetime, Schedule, live, trace
from framework.campaign.search import MODULES
from framework.targets.simulated.laboratory import Laboratory
from framework.targets.simulated.managed import Server, daemon_module
from updater.device.client import LeaveToDaemon
from updater.device.store import SqliteStore

DEPLOYED = Schedule(actions=("deploy",), managed="plain")
PAUSED = dataclasses.replace(DEPLOYED, managed="pauses", scripts="ok")
CONTACT = dataclasses.replace(DEPLOYED, managed="contact")
BROKEN = dataclasses.replace(DEPLOYED, faults=tuple(Fault(100 + n, "break") for n in range(20)))


@pytest.fixture
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


def told(laboratory: Laboratory, schedule: Schedule) -> tuple[Lifetime, Server]:
    life = Life(laboratory, schedule)
    return life.run(), life.server


def passes(lifetime: Lifetime) -> bool:
    assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
    return True


def test_the_server_is_told_each_state_and_how_it_ended(laboratory: Laboratory) -> None:
    lifetime, server = told(laboratory, DEPLOYED)
    assert passes(lifetime)
    (job,) = server.jobs
    # It is init that commits it.
    assert job.told == ["downloading", "installing", "rebooting", "success"]


def test_a_paused_update_waits_and_its_restart_has_scripts(laboratory: Laboratory) -> None:
    lifetime, server = told(laboratory, PAUSED)
    assert passes(lifetime)
    (job,) = server.jobs
    assert job.told == [
        *("downloading", "pause_before_installing", "installing"),
        *("pause_before_rebooting", "rebooting", "pause_before_committing", "installing"),
        "success",
    ]
    assert "updater: state script ArtifactReboot_Enter_00" in lifetime.lines
    assert "updater: v2 is proved and committed by the daemon" in lifetime.lines


@pytest.mark.parametrize("managed", MANAGED[1:])
@pytest.mark.parametrize("behaviour", ["panics", "unhealthy"])
def test_a_failure_is_told_with_its_cause_and_log(
    laboratory: Laboratory, managed: str, behaviour: str
) -> None:
    lifetime, server = told(
        laboratory, dataclasses.replace(DEPLOYED, managed=managed, behaviour=behaviour)
    )
    assert passes(lifetime)
    (job,) = server.jobs
    assert (job.status, bool(job.cause), job.logs) == ("failure", True, 1)


@pytest.mark.parametrize("module", MODULES)
def test_a_package_is_deployed(laboratory: Laboratory, module: str) -> None:
    actions = ("deploy", "deploy")
    lifetime, server = told(laboratory, dataclasses.replace(PAUSED, module=module, actions=actions))
    assert passes(lifetime)
    ends = [job.status for job in server.jobs]
    well = module.endswith("fails=") or "fails=ArtifactRollback" in module
    assert ends == (["success", "already-installed"] if well else ["failure", "failure"])


def test_a_download_that_breaks_is_tried_twenty_times(laboratory: Laboratory) -> None:
    lifetime, server = told(laboratory, BROKEN)
    assert passes(lifetime)
    assert server.jobs[0].status == "failure"
    once_less = dataclasses.replace(BROKEN, faults=BROKEN.faults[1:])
    lifetime, server = told(laboratory, once_less)
    assert passes(lifetime)
    assert server.jobs[0].told[-1] == "success"


@pytest.mark.parametrize("kind", ["unsent", "unanswered"])
@pytest.mark.parametrize("base", [PAUSED, CONTACT])
def test_every_lost_request_is_survived(laboratory: Laboratory, base: Schedule, kind: str) -> None:
    struck = 0
    for at in range(1, 20, 2):
        faults = tuple(Fault(at + n, kind) for n in range(2))
        lifetime = live(laboratory, dataclasses.replace(base, faults=faults))
        assert passes(lifetime)
        struck += len(lifetime.struck)
    assert struck > 8


@pytest.mark.parametrize("kind", ["cut", "error"])
@pytest.mark.parametrize("base", [PAUSED, dataclasses.replace(PAUSED, behaviour="unhealthy")])
def test_a_fault_anywhere_in_a_deployment_is_survived(
    laboratory: Laboratory, base: Schedule, kind: str
) -> None:
    for at in range(1, live(laboratory, base).exposed + 1, 13):
        fault = Fault(at, kind, "torn" if kind == "cut" else "kept", at)
        assert passes(live(laboratory, dataclasses.replace(base, faults=(fault,))))


@pytest.mark.parametrize("then", ["cycle", "resume", "commit", "rollback"])
def test_a_daemon_that_is_killed_anywhere_is_survived(laboratory: Laboratory, then: str) -> None:
    """It is started again, or somebody runs a command before that."""
    base = dataclasses.replace(PAUSED, actions=("deploy", then, "cycle"))
    said = set()
    for at in [s.number for s in trace(laboratory, PAUSED) if s.state != "Idle"][::9]:
        lifetime = live(laboratory, dataclasses.replace(base, faults=(Fault(at, "kill"),)))
        assert passes(lifetime)
        said |= {line.partition(": ")[2] for line in lifetime.lines}
    held = {
        "resume": "v2 is held before its installation, by the daemon",
        "commit": "error: nothing to commit: v2 is held before its installation",
    }
    assert held.get(then, "state ArtifactReboot") in said


def test_a_log_that_was_removed_may_still_be_open(laboratory: Laboratory) -> None:
    schedule = dataclasses.replace(
        PAUSED,
        faults=(Fault(257, "error", "kept", 672042),),
        actions=("deploy", "rollback", "deploy", "cycle"),
        scripts="",
    )
    assert passes(live(laboratory, schedule))


# Planted bugs.


def _tells_success(module: Any, patch: pytest.MonkeyPatch) -> None:
    report = module.DeviceApi.report

    def lie(self: Any, deployment: str, status: str, substate: str = "") -> None:
        report(self, deployment, "success" if status == "failure" else status, "")

    patch.setattr(module.DeviceApi, "report", lie)


def _says_twice(module: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SqliteStore, "mark_reported", lambda self, outcome: None)


BUGS: dict[str, tuple[Schedule, int, Callable[[Any, pytest.MonkeyPatch], None]]] = {
    "failure-told-as-success": (
        dataclasses.replace(DEPLOYED, behaviour="unhealthy"),
        7,
        _tells_success,
    ),
    "never-marks-what-it-told": (DEPLOYED, 7, _says_twice),
    "never-delivers": (
        DEPLOYED,
        7,
        lambda module, patch: patch.setattr(module.Daemon, "deliver", lambda self: None),
    ),
    "ignores-pauses": (
        PAUSED,
        7,
        lambda module, patch: patch.setattr(
            module.ServerObserver, "_gate", lambda self, update, state, hold: None
        ),
    ),
    "commits-without-contact": (
        CONTACT,
        7,
        lambda module, patch: patch.setattr(
            module.ServerObserver, "proving", lambda self, update: None
        ),
    ),
    "commits-at-boot": (
        CONTACT,
        7,
        lambda module, patch: patch.setattr(LeaveToDaemon, "proves", lambda self, update: True),
    ),
    "no-log": (
        dataclasses.replace(DEPLOYED, behaviour="unhealthy"),
        7,
        lambda module, patch: patch.setattr(
            module.DeviceApi, "send_log", lambda self, deployment, messages: None
        ),
    ),
    "gives-downloads-up-at-once": (
        BROKEN,
        7,
        lambda module, patch: patch.setattr(
            "updater.device.client.Client._is_tried_again", lambda self, update: False
        ),
    ),
    "tries-downloads-for-ever": (
        BROKEN,
        7,
        lambda module, patch: patch.setattr("updater.device.client.MAX_ATTEMPTS", 1000),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_of_the_daemon_is_found(
    laboratory: Laboratory, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, invariant, plant = BUGS[bug]
    plant(daemon_module(), monkeypatch)
    assert invariant in live(laboratory, schedule).verdict.violated
