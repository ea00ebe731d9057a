"""Two promises of the server, each checked from the outside, and each check shown to fire.

*Acknowledged means durable*: the disk goes away in the middle of a commit, and whatever was
answered with success must be there afterwards. *The threshold stops a rollout*: once more devices
failed than are allowed, nobody else is offered the update, however the phases stand. The planted
bugs are what a hurried change would do.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from updater_server_world import TestDevice, World, make_artifact, world

from updater.server import rollout
from updater.server.database import Database
from updater.server.rollout import Decision, Phase, Tally

Plant = Callable[[pytest.MonkeyPatch], None]
# How long an answer may take that needs no disk.
PROMPT_S = 0.7


def honest(patch: pytest.MonkeyPatch) -> None:
    """Change nothing."""


def acknowledges_before_commit(patch: pytest.MonkeyPatch) -> None:
    """Planted: the answer goes out when the change was made, and the commit follows."""

    async def write(database: Database, job: Callable[[Session], Any]) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def change() -> None:
            with (
                contextlib.suppress(OperationalError),
                Session(database.engine, expire_on_commit=False) as session,
                session.begin(),
            ):
                result = job(session)
                session.flush()
                loop.call_soon_threadsafe(answer.set_result, result)

        threading.Thread(target=change).start()
        return await answer

    patch.setattr(Database, "write", write)


def bears_a_failed_commit(patch: pytest.MonkeyPatch) -> None:
    """Planted: a change that could not be written is borne, as if it were of no weight."""
    true_write = Database.write

    async def write(database: Database, job: Callable[[Session], Any]) -> Any:
        with contextlib.suppress(OperationalError):
            return await true_write(database, job)

    patch.setattr(Database, "write", write)


def lost_by_cuts_in_the_commit(folder: Path, database_url: str, plant: Plant) -> dict[str, str]:
    """Make changes whose commits never end; return what is wrong afterwards, by change."""
    wrong = {}
    with world(folder, database_url) as there:
        device = there.accepted()
        assert there.upload(make_artifact(folder)).status_code == 201
        deployment = there.deploy("v2")
        assert device.next().status_code == 200
        cut, armed = threading.Event(), threading.Event()

        @event.listens_for(there.core.database.engine, "commit")
        def at_commit(_: Any) -> None:
            if armed.is_set():
                cut.wait(60)
                raise OperationalError("COMMIT", None, OSError("the disk is gone"))

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
            plant(patch)
            for name, change in CHANGES.items():
                before = picture(there, device)
                cut.clear()
                armed.set()
                asked = pool.submit(change, there, device, deployment)
                status = None
                with contextlib.suppress(NotYetError):
                    status = asked.result(PROMPT_S)
                cut.set()
                status = status or asked.result(60)
                armed.clear()
                done = picture(there, device) != before
                if status < 300 and not done:
                    wrong[name] = f"acknowledged with {status}, but gone"
                elif status >= 300 and done:
                    wrong[name] = f"refused with {status}, but done"
    return wrong


def picture(there: World, device: TestDevice) -> Any:
    """What the database has of a device, its deployments and the groups."""
    return (
        there.admin.get(f"/devices/{device.id}").json()["history"],
        there.admin.get(f"/devices/{device.id}").json()["inventory"],
        there.admin.get("/deployments").json(),
        there.admin.get("/groups").json(),
    )


CHANGES: dict[str, Callable[[World, TestDevice, str], int]] = {
    "a device's report": lambda _, device, deployment: device.report(deployment, "installing"),
    "an inventory": lambda _, device, __: device.send_inventory(more="yes").status_code,
    "an operator's abort": lambda there, _, deployment: (
        there.admin.post(f"/deployments/{deployment}/abort").status_code
    ),
    "a new group": lambda there, _, __: (
        there.admin.post("/groups", json={"name": "berlin"}).status_code
    ),
}


def test_what_was_acknowledged_survives_a_cut_in_its_commit(
    tmp_path: Path, own_database_url: str
) -> None:
    assert lost_by_cuts_in_the_commit(tmp_path, own_database_url, honest) == {}


@pytest.mark.parametrize("plant", [acknowledges_before_commit, bears_a_failed_commit])
def test_a_planted_early_acknowledgement_is_caught(
    tmp_path: Path, own_database_url: str, plant: Plant
) -> None:
    wrong = lost_by_cuts_in_the_commit(tmp_path, own_database_url, plant)
    assert wrong["a device's report"] == "acknowledged with 204, but gone"


def decide_as_if(
    patch: pytest.MonkeyPatch, alter: Callable[[Sequence[Tally], int, float], tuple[Any, float]]
) -> None:
    true_decide = rollout.decide

    def decide(
        phases: Sequence[Phase], tallies: Sequence[Tally], newest: int, *more: float
    ) -> Decision:
        opened_at, allowed, now = more
        seen, allowed = alter(tallies, newest, allowed)
        return true_decide(phases, seen, newest, opened_at, allowed, now)

    patch.setattr(rollout, "decide", decide)


def ignores_the_threshold(patch: pytest.MonkeyPatch) -> None:
    """Planted: any share of failures is borne."""
    decide_as_if(patch, lambda tallies, _, __: (tallies, 100.0))


def forgets_earlier_phases(patch: pytest.MonkeyPatch) -> None:
    """Planted: only the newest phase's failures count, so a late one in a canary is nothing."""

    def alter(tallies: Sequence[Tally], newest: int, allowed: float) -> tuple[Any, float]:
        kept = [
            tally if phase >= newest else Tally(tally.total, tally.succeeded, 0, tally.unsettled)
            for phase, tally in enumerate(tallies)
        ]
        return kept, allowed

    decide_as_if(patch, alter)


def counts_those_not_let_go(patch: pytest.MonkeyPatch) -> None:
    """Planted: the share is taken of the whole fleet, so a failed canary never weighs."""

    def alter(tallies: Sequence[Tally], newest: int, allowed: float) -> tuple[Any, float]:
        whole = sum((tally.total for tally in tallies), 0)
        first = Tally(whole, tallies[0].succeeded, tallies[0].failed, tallies[0].unsettled)
        return [first, *tallies[1:]], allowed

    decide_as_if(patch, alter)


def offered_past_the_threshold(there: World) -> list[str]:
    """Roll out to 12 devices in phases of 2, 4 and the rest, 25 % failures allowed.

    One of the canaries is well, so the second phase opens; then the other canary fails late, and
    one of the second phase: 2 of 6. Returns who is offered the update after that.
    """
    devices = [there.accepted(f"d{number}") for number in range(12)]
    assert there.upload(make_artifact(there.folder)).status_code == 201
    phases = [{"count": 2, "success_percent": 50}, {"count": 4, "success_percent": 50}, {}]
    deployment = there.deploy("v2", phases=phases, max_failure_percent=25)

    def offered() -> list[TestDevice]:
        return [d for d in devices if d.artifact == "v1" and d.next().status_code == 200]

    canaries = offered()
    assert len(canaries) == 2
    canaries[0].update(deployment)
    second = [device for device in offered() if device not in canaries]
    assert len(second) == 4
    for failing in (canaries[1], second[0]):
        assert failing.report(deployment, "downloading") == 204
        assert failing.report(deployment, "failure", "planned") == 204
    for well in second[1:]:
        # 409 where the rollout was stopped, as it should be.
        well.report(deployment, "downloading")
        well.report(deployment, "success")
    asyncio.run(there.tick())
    begun = [*canaries, *second]
    return [str(d.identity["mac"]) for d in offered() if d not in begun]


def test_past_the_threshold_nobody_else_is_offered_the_update(world: World) -> None:
    assert offered_past_the_threshold(world) == []
    (deployment,) = world.admin.get("/deployments").json()
    assert deployment["status"] == "stopped"
    assert "2 of 6 devices failed" in deployment["reason"]


@pytest.mark.parametrize(
    "plant", [ignores_the_threshold, forgets_earlier_phases, counts_those_not_let_go]
)
def test_a_planted_bug_in_the_threshold_is_caught(
    world: World, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    plant(monkeypatch)
    assert len(offered_past_the_threshold(world)) == 6
