"""Scenarios and health checks by the whole way: pytest, gRPC, ser2net, pty, power head, QEMU.

The planted bug is caught here as on the emulated rigs, and a board that fails its check is
quarantined for every user of the coordinator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench_desk import RunningBench

from framework.targets.places import Places

pytestmark = [pytest.mark.emulated, pytest.mark.night]

HERE = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
UPDATE = "scenarios/test_update.py::test_update_is_installed_checked_and_committed"
SWITCH = "scenarios/test_power_switch.py::test_switched_off_before_the_new_system_is_committed"
PLANTED = "tests/planted/test_planted_bugs.py::test_committing_before_the_health_check_is_caught"


@contextmanager
def locked(bench: RunningBench, place: str) -> Iterator[dict[str, str]]:
    """The environment of somebody who has locked a place."""
    places = Places(bench.coordinator)
    token = places.reserve({"name": place, "health": "ok"}, 60)
    places.lock(token)
    yield {**os.environ, "LG_COORDINATOR": bench.coordinator, "LG_TOKEN": token}
    places.free(place)
    assert not places.find(place).acquired


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("head", "tests"),
    [
        ("rest", (UPDATE, SWITCH)),
        ("shelly_gen1", (SWITCH,)),
        ("shelly_gen2", (UPDATE,)),
        ("apc", (SWITCH,)),
        ("tasmota", (SWITCH,)),
        ("modbus", (SWITCH, PLANTED)),
    ],
)
def test_scenarios_pass_and_the_planted_bug_is_caught(
    bench_up: Callable[..., RunningBench], head: str, tests: tuple[str, ...]
) -> None:
    bench = bench_up("--boards", "1", "--head", head)
    with locked(bench, "bench1") as environment:
        rig = bench.places[0]["rig"]
        ended = run(environment, "pytest", "-q", "-p", "no:cacheprovider", *tests, "--lg-env", rig)
        assert ended.returncode == 0, ended.stdout[-3000:]
        assert f"{len(tests)} passed" in ended.stdout


def test_a_fit_board_passes_its_check_and_a_sick_one_is_quarantined(
    bench_up: Callable[..., RunningBench],
) -> None:
    bench = bench_up("--boards", "1", "--head", "rest")
    places = Places(bench.coordinator)
    check = ("brownout", "rig", "check", "rigs/bench.yaml", "--live", "--quarantine")
    with locked(bench, "bench1") as environment:
        ended = run(environment, *check, "--cycles", "1")
        assert ended.returncode == 0, ended.stdout
        assert "NO" not in ended.stdout
        assert ended.stdout.count("yes  ") == 9
        ended = run(
            environment, "brownout", "bench", "fault", "weld", "1", "--control", bench.control
        )
        assert ended.returncode == 0, ended.stderr
        ended = run(environment, *check, "--cycles", "1")
        assert ended.returncode == 1, ended.stdout
        assert "NO   Power goes off from a running system: the console" in ended.stdout
    place = places.find("bench1")
    assert place.quarantined
    assert place.comment.startswith("quarantine: Power goes off from a running system")
    released = run(
        {**os.environ, "LG_COORDINATOR": bench.coordinator}, "brownout", "rig", "release", "bench1"
    )
    assert released.returncode == 0
    assert not places.find("bench1").quarantined
