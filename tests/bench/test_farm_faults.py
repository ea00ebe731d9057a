"""What a farm run makes of a rig that fails, and of its own end.

Every run ends with INFRASTRUCTURE or a pass, never with a failure of the product, and every place
is free at the end. That a failure of the product is seen as one: test_farm_run.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from bench_desk import FAILING, FarmDesk

from framework.targets.rundir import start_time

Farm = Callable[..., FarmDesk]
STRUCK = "test_something_happens_meanwhile"


def night(*values: object) -> Any:
    """A case that takes longer than its fellows that show as much."""
    return pytest.param(*values, marks=pytest.mark.night)


def adapter_vanishes(farm: FarmDesk, at: dict[str, Any]) -> None:
    farm.boards[at["place"]].serial.pull_out()


def head_hangs(farm: FarmDesk, at: dict[str, Any]) -> None:
    farm.boards[at["place"]].hangs.set()


def relay_sticks(farm: FarmDesk, at: dict[str, Any]) -> None:
    farm.boards[at["place"]].weld(True)


def exporter_is_killed(farm: FarmDesk, at: dict[str, Any]) -> None:
    del at
    farm.kill("labgrid-exporter")
    time.sleep(0.5)
    farm.start_exporter()


def coordinator_restarts(farm: FarmDesk, at: dict[str, Any]) -> None:
    del at
    farm.restart_coordinator()


def worker_is_killed(farm: FarmDesk, at: dict[str, Any]) -> None:
    del farm
    os.kill(at["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("strike", "said"),
    [
        night(adapter_vanishes, "INFRASTRUCTURE"),
        night(head_hangs, "power head did not answer within 5 s"),
        (relay_sticks, "the console still answers after the power was cut"),
        night(exporter_is_killed, "INFRASTRUCTURE"),
        night(coordinator_restarts, "INFRASTRUCTURE"),
        (worker_is_killed, "its worker was killed"),
    ],
)
def test_a_rig_that_fails_is_no_failure_of_the_product(
    farm_desk: Farm, strike: Callable[[FarmDesk, dict[str, Any]], None], said: str
) -> None:
    farm = farm_desk("", "")
    run = farm.start("--boards", "2", "--skip-check", "-k", "meanwhile or [0] or [1]")
    try:
        at = farm.mark()
        strike(farm, at)
        told, _ = run.communicate(timeout=400)
    finally:
        end(run)
    verdicts = farm.verdicts()
    assert run.returncode == 0, told
    assert set(verdicts.values()) == {"PASS"}, told
    assert len(verdicts) == 3
    assert said in told
    assert "FAILED" not in told
    assert f"farm: {at['place']}: tests/bench/little_scenarios.py::{STRUCK}: INFRASTRUCTURE" in told
    assert not farm.held()


def coordinator_forgets(farm: FarmDesk) -> None:
    farm.restart_coordinator()


def coordinator_is_away(farm: FarmDesk) -> None:
    farm.kill("labgrid-coordinator")


@pytest.mark.parametrize(
    ("strike", "said"),
    [
        # labgrid says so with `pytest.exit`, which is to end pytest as a whole.
        (coordinator_forgets, "INFRASTRUCTURE: Error: reservation token "),
        night(coordinator_is_away, "INFRASTRUCTURE: Error: Could not connect to coordinator"),
    ],
)
def test_a_place_that_is_gone_before_its_first_use_is_no_failure_of_the_product(
    farm_desk: Farm, strike: Callable[[FarmDesk], None], said: str
) -> None:
    farm = farm_desk("")
    run = farm.start("--skip-check", "-k", "late", scenarios=FAILING)
    try:
        at = farm.mark()
        strike(farm)
        (farm.folder / "go").touch()
        if strike is coordinator_is_away:
            await_end(at["pid"])
            farm.start_coordinator()
            farm.kill("labgrid-exporter")
            farm.start_exporter()
        told, _ = run.communicate(timeout=400)
    finally:
        end(run)
    assert run.returncode == 0, told
    assert farm.verdicts() == {"test_the_place_is_used_late": "PASS"}, told
    assert said in told
    assert "FAILED" not in told
    assert not farm.held()


@pytest.mark.night
def test_a_coordinator_that_stays_away_is_no_failure_and_its_place_is_freed_later(
    farm_desk: Farm,
) -> None:
    farm = farm_desk("")
    run = farm.start("--skip-check", "-k", "late", "--wait", "5", scenarios=FAILING)
    try:
        farm.mark()
        kept = farm.folder / "coordinator" / "places.yaml"
        deadline = time.monotonic() + 60
        while "lease_" not in kept.read_text():  # the coordinator writes it every 15 s
            assert time.monotonic() < deadline
            time.sleep(0.1)
        farm.kill("labgrid-coordinator")
        (farm.folder / "go").touch()
        told, _ = run.communicate(timeout=400)
    finally:
        end(run)
    assert run.returncode == 4, told
    assert farm.verdicts() == {"test_the_place_is_used_late": "INFRASTRUCTURE"}
    assert "places may still be held" in told
    farm.start_coordinator()
    assert {place.name for place in farm.held()} == {"little1"}
    assert "little1: held by " in farm.farm("free").stdout
    assert not farm.held()


def test_a_rig_that_fails_after_the_product_did_ends_the_worker_and_not_the_run(
    farm_desk: Farm,
) -> None:
    farm = farm_desk("")
    ended = farm.run("--skip-check", "-k", "product or something", scenarios=FAILING)
    assert ended.returncode == 1, ended.stdout
    assert farm.verdicts() == {
        "test_the_product_fails_and_then_the_rig": "FAILED",
        "test_something_else": "PASS",
    }
    assert "INTERNALERROR" not in ended.stdout
    assert "INFRASTRUCTURE: the rig failed in the teardown" in ended.stdout
    assert not farm.held()


def test_what_goes_wrong_after_the_rig_failed_is_not_the_products(farm_desk: Farm) -> None:
    farm = farm_desk("")
    ended = farm.run("--skip-check", "-k", "all_else", scenarios=FAILING)
    assert ended.returncode == 0, ended.stdout
    assert farm.verdicts() == {"test_the_rig_fails_and_then_all_else": "PASS"}
    assert "INFRASTRUCTURE: the rig failed" in ended.stdout
    assert "1 tried again" in ended.stdout
    assert not farm.held()


@pytest.mark.night
def test_where_no_board_is_left_the_queue_ends_and_says_so(farm_desk: Farm) -> None:
    farm = farm_desk("")
    run = farm.start("--retries", "9", "--skip-check", "-k", "meanwhile or [0]")
    try:
        farm.boards[farm.mark()["place"]].hangs.set()
        told, _ = run.communicate(timeout=400)
    finally:
        end(run)
    assert run.returncode == 4, told
    assert set(farm.verdicts().values()) <= {"INFRASTRUCTURE", "PASS"}
    assert farm.verdicts()[STRUCK] == "INFRASTRUCTURE"
    assert "quarantined: 3 scenarios in a row ended INFRASTRUCTURE: " in told
    assert farm.places.find("little1").quarantined
    assert not farm.held()


@pytest.mark.parametrize("number", [night(signal.SIGINT), signal.SIGTERM])
def test_a_run_that_is_ended_hands_back(farm_desk: Farm, number: signal.Signals) -> None:
    farm = farm_desk("", "")
    run = farm.start("--boards", "2", "--skip-check")
    try:
        farm.mark()
        assert len(farm.held()) == 2
        run.send_signal(number)
        told, _ = run.communicate(timeout=120)
    finally:
        end(run)
    assert run.returncode == 130, told
    assert not farm.held()
    assert not any(process.reservation for process in farm.places.all())


@pytest.mark.night
def test_ctrl_c_in_a_terminal_hands_back(farm_desk: Farm) -> None:
    """A terminal interrupts the workers, too."""
    farm = farm_desk("")
    run = farm.start("--skip-check", "-k", "meanwhile")
    try:
        farm.mark()
        os.killpg(run.pid, signal.SIGINT)
        told, _ = run.communicate(timeout=120)
    finally:
        end(run)
    assert run.returncode == 130, told
    assert not farm.held()


def test_what_a_killed_run_held_is_freed_and_its_workers_are_gone(farm_desk: Farm) -> None:
    farm = farm_desk("", "")
    run = farm.start("--boards", "2", "--skip-check", "-k", "meanwhile or comes_up")
    at = farm.mark()
    assert farm.farm("free").stdout.endswith("no place of a dead run\n")
    held = {place.name for place in farm.held()}
    assert len(held) == 2
    run.kill()
    run.wait()
    await_end(at["pid"])
    assert {place.name for place in farm.held()} == held
    told = farm.farm("free").stdout.splitlines()
    assert {line.partition(":")[0] for line in told} == held
    assert all("its process has ended; freed" in line for line in told)
    assert not farm.held()
    end(run)


@pytest.mark.night
def test_the_next_run_frees_what_a_killed_one_held(farm_desk: Farm) -> None:
    farm = farm_desk("")
    run = farm.start("--skip-check", "-k", "meanwhile")
    farm.mark()
    run.kill()
    run.wait()
    end(run)
    ended = farm.run("--skip-check", "-k", "comes_up and 0")
    assert ended.returncode == 0, ended.stdout
    assert "farm: little1: held by " in ended.stdout
    assert not farm.held()


def await_end(pid: int) -> None:
    deadline = time.monotonic() + 120
    while start_time(pid) is not None:
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.02)


def end(run: subprocess.Popen[str]) -> None:
    """Nothing of a run is left, however the test ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    if run.stdout is not None:
        run.stdout.close()
