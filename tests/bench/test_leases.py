"""Leases: who holds a place, whether they live, and how places of the dead come back.

Against labgrid's own coordinator; its exporter is not needed for places without resources.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from attrs import evolve
from bench_desk import BIN, ROOT, free_port, wait_for_port
from labgrid.remote.common import ReservationState

from framework.farm.tenure import Tenure, free_dead
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.lease import CLOCKS_S, Lease, death_of, my_lease
from framework.targets.places import Places, me, parse_tags

HOLDER = """
import sys, time
from framework.farm.tenure import Tenure
from framework.targets.places import Places
tenure = Tenure(Places(sys.argv[1]), sys.argv[2], "gw0", float(sys.argv[3]))
assert tenure.obtain({"board": "plain"}, 30)
print(tenure.place, flush=True)
time.sleep(600)
"""


class Coordinator:
    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        now = time.time()
        (folder / "places.yaml").write_text(
            yaml.safe_dump(
                {
                    name: {
                        "aliases": [],
                        "comment": "",
                        "tags": {"board": "plain", "health": "ok"},
                        "matches": [],
                        "created": now,
                        "changed": now,
                    }
                    for name in names
                }
            )
        )
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "--"),
                *(BIN / "labgrid-coordinator", "-l", self.address),
            ],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(int(self.address.rpartition(":")[2]))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path_factory.mktemp("coordinator"), ("plain1", "plain2"))
    yield made
    made.kill()


@pytest.fixture
def places(coordinator: Coordinator) -> Iterator[Places]:
    with Places(coordinator.address) as made:
        yield made
        for place in made.all():
            if place.acquired:
                made.free(place.name)
            made.set_tags(place.name, {tag: "" for tag in place.tags if tag.startswith("lease_")})
            made.heal(place.name)
            if place.reservation:
                made.cancel(place.reservation)


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []
    yield made
    for each in made:
        each.kill()
        each.wait()


def holder(
    places: Places, holders: list[subprocess.Popen[str]], lease_s: float = 120
) -> tuple[subprocess.Popen[str], str]:
    """Another process that holds a place, and which."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, places.coordinator, "a_run", str(lease_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    holders.append(process)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_place_is_leased_before_it_is_locked_and_free_after(places: Places) -> None:
    tenure = Tenure(places, "a_run", "gw0")
    assert tenure.obtain({"board": "plain", "name": "plain1"}, 30)
    found = places.find("plain1")
    assert found.acquired == me()
    lease = Lease.of(found.tags)
    assert lease is not None
    assert (lease.pid, lease.run, lease.worker) == (os.getpid(), "a_run", "gw0")
    assert 100 < lease.until - time.time() <= 120
    tenure.give_back()
    found = places.find("plain1")
    assert (found.acquired, found.reservation) == ("", "")
    assert set(found.tags) == {"board", "health"}
    tenure.give_back()


def test_a_living_runs_place_is_never_freed_even_when_it_is_overdue(
    places: Places, holders: list[subprocess.Popen[str]]
) -> None:
    process, name = holder(places, holders)
    os.kill(process.pid, signal.SIGSTOP)  # its heartbeat stops, too
    lease = Lease.of(places.find(name).tags)
    assert lease is not None
    places.set_tags(name, evolve(lease, until=1).tags)
    assert free_dead(places) == []
    assert places.find(name).acquired == me()
    os.kill(process.pid, signal.SIGCONT)


def test_a_killed_runs_place_is_freed_and_it_is_said_whose_it_was(
    places: Places, holders: list[subprocess.Popen[str]]
) -> None:
    process, name = holder(places, holders)
    process.kill()
    process.wait()
    assert places.find(name).acquired == me()
    environment = {**os.environ, "LG_COORDINATOR": places.coordinator}
    farm_free = [BIN / "brownout", "farm", "free"]
    told = subprocess.run(
        [*farm_free, "--dry-run"], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith(f"{name}: held by {me()}, run a_run, worker gw0")
    assert places.find(name).acquired == me()
    told = subprocess.run(farm_free, env=environment, capture_output=True, text=True, check=True)
    assert "its process has ended; freed" in told.stdout
    found = places.find(name)
    assert (found.acquired, found.reservation) == ("", "")
    assert not any(tag.startswith("lease_") for tag in found.tags)
    told = subprocess.run(farm_free, env=environment, capture_output=True, text=True, check=True)
    assert "no place of a dead run" in told.stdout


def test_what_a_person_locked_is_left_alone(places: Places) -> None:
    places.acquire("plain1")
    dead = evolve(my_lease("old", "gw0"), owner="elsewhere/someone", pid=1 << 30)
    places.set_tags("plain1", dead.tags)
    assert [freed.place for freed in free_dead(places)] == ["plain1"]
    found = places.find("plain1")
    assert found.acquired == me()
    assert not any(tag.startswith("lease_") for tag in found.tags)


def test_the_heartbeat_renews_the_lease(places: Places) -> None:
    tenure = Tenure(places, "a_run", "gw0", lease_s=3.0)
    assert tenure.obtain({"name": "plain1"}, 30)
    first = Lease.of(places.find("plain1").tags)
    assert first is not None
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        again = Lease.of(places.find("plain1").tags)
        assert first.same_holder(again)
        assert again is not None
        if again.until > first.until:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it was not renewed")
    tenure.give_back()


def test_a_place_that_somebody_else_took_is_lost(places: Places) -> None:
    tenure = Tenure(places, "a_run", "gw0")
    assert tenure.obtain({"name": "plain1"}, 30)
    other = evolve(my_lease("other", "gw7"), pid=1, start=_start_of(1))
    places.set_tags("plain1", other.tags)
    tenure.renew()
    assert tenure.lost.startswith(f"plain1 was taken by {me()}, run other, worker gw7")
    tenure.give_back()
    assert Lease.of(places.find("plain1").tags) == other


def test_a_quarantined_place_is_passed_by(places: Places) -> None:
    places.quarantine("plain1", "it is\nsick")
    assert places.find("plain1").comment == "quarantine: it is sick"
    tenure = Tenure(places, "a_run", "gw0")
    assert tenure.obtain({"board": "plain"}, 30)
    assert tenure.place == "plain2"
    tenure.give_back()
    assert not Tenure(places, "a_run", "gw1").obtain({"name": "plain1"}, 1.0)
    assert not Tenure(places, "a_run", "gw1").obtain({"name": "plain1"}, 60.0, lambda: True)


def test_a_coordinator_that_restarts_forgets_the_lock_and_it_is_taken_again(
    tmp_path: Path,
) -> None:
    coordinator = Coordinator(tmp_path, ("plain1",))
    with Places(coordinator.address) as places:
        tenure = Tenure(places, "a_run", "gw0")
        assert tenure.obtain({"board": "plain"}, 30)
        coordinator.kill()
        with pytest.raises(InfrastructureError, match="does not answer"):
            tenure.renew()
        coordinator.start()
        assert places.find("plain1").acquired == ""
        tenure.renew()
        assert places.find("plain1").acquired == me()
        assert tenure.lost == ""
        # Another run finds the place with a living run's lease, before that has locked it again.
        places.free("plain1")
        other = Tenure(places, "other", "gw0")
        other._lease = evolve(other._lease, pid=1, start=_start_of(1))
        assert not other.obtain({"board": "plain"}, 1.5)
        tenure.renew()
        assert places.find("plain1").acquired == me()
        tenure.give_back()
    coordinator.kill()


def test_a_coordinator_that_is_away_is_waited_for(tmp_path: Path) -> None:
    coordinator = Coordinator(tmp_path, ("plain1",))
    coordinator.kill()
    with Places(coordinator.address) as places:
        with pytest.raises(InfrastructureError, match="does not answer"):
            places.all()
        tenure = Tenure(places, "a_run", "gw0")
        coordinator.start()
        assert tenure.obtain({"board": "plain"}, 60)
        tenure.give_back()
    coordinator.kill()


def test_reservations_wait_their_turn_and_are_given_back(places: Places) -> None:
    token = places.reserve({"name": "plain1"}, 10)
    assert places.lock(token) == "plain1"
    waiting = places.request({"name": "plain1"})
    assert waiting.state is ReservationState.waiting
    with pytest.raises(InfrastructureError, match="no place with"):
        places.reserve({"name": "plain1"}, 0.6)
    with pytest.raises(InfrastructureError, match="already acquired"):
        places.acquire("plain1")
    places.free("plain1", "somebody/else")
    assert places.find("plain1").acquired == me()
    places.free("plain1")
    places.free("plain1")
    places.cancel(token)
    places.next_in_line()
    assert places.poll(waiting.token).place == "plain1"
    places.cancel(waiting.token)
    places.cancel(waiting.token)
    with pytest.raises(RigError, match="has no place 'plain9'"):
        places.find("plain9")


def _start_of(pid: int) -> int:
    from framework.targets.rundir import start_time

    started = start_time(pid)
    assert started is not None
    return started


LEASE = Lease("host/me", "here", 7, 70, 1000, "run", "gw0")


@pytest.mark.parametrize(
    ("here", "started", "now", "dead"),
    [
        ("here", 70, 900, ""),
        ("here", 70, 10_000, ""),  # it lives: overdue or not
        ("here", 71, 900, "its process has ended"),  # the process id was used again
        ("here", None, 900, "its process has ended"),
        ("elsewhere", None, 900, ""),
        ("elsewhere", None, 1000 + CLOCKS_S, ""),
        ("elsewhere", 70, 1000 + CLOCKS_S + 5, f"expired {CLOCKS_S + 5} s ago"),
    ],
)
def test_who_is_dead(here: str, started: int | None, now: float, dead: str) -> None:
    assert death_of(LEASE, here=here, now=now, started=lambda pid: started) == dead


def test_a_lease_survives_its_tags_and_nonsense_is_none() -> None:
    assert Lease.of({**LEASE.tags, "board": "x"}) == LEASE
    assert Lease.of({"board": "x"}) is None
    assert Lease.of({**LEASE.tags, "lease_pid": "x"}) is None
    assert LEASE.same_holder(LEASE.renewed(now=5.0))
    assert not LEASE.same_holder(evolve(LEASE, start=71))
    assert not LEASE.same_holder(None)


def test_tags_are_read_strictly() -> None:
    assert parse_tags(["board=rpi4,rack=2", "lab=west"]) == {
        "board": "rpi4",
        "rack": "2",
        "lab": "west",
    }
    for wrong in ("board", "board=", "Board=rpi4", "=x"):
        with pytest.raises(RigError, match="is not like board=rpi4"):
            parse_tags([wrong])
