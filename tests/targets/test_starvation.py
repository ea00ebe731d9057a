"""A host that does not let the machine run is told from a device that is slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from framework.targets.starvation import RunDelays, StarvationWatch, run_delays


class Told:
    """What a kernel would say of two processes, set by a test."""

    def __init__(self) -> None:
        self.machine: int | None = 10
        self.delays: dict[int, RunDelays] = {10: {}, os.getpid(): {(os.getpid(), 1): 500.0}}

    def read(self, pid: int) -> RunDelays:
        return dict(self.delays.get(pid, {}))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def watch(told: Told) -> Iterator[StarvationWatch]:
    watch = StarvationWatch(lambda: told.machine, told.read)
    yield watch
    watch.stop()


def test_a_machines_wait_counts_from_its_start_and_ours_only_from_now(
    told: Told, watch: StarvationWatch
) -> None:
    began = time.monotonic()
    assert watch.since(began) == 0.0
    told.delays[10] = {(10, 10): 2.0, (10, 11): 0.5}
    assert watch.since(began) == pytest.approx(2.0)
    told.delays[os.getpid()] = {(os.getpid(), 1): 500.25, (os.getpid(), 2): 7.0}
    told.delays[10] = {(10, 10): 3.0, (10, 11): 0.5}
    assert watch.since(began) == pytest.approx(3.0)  # they waited at the same time


def test_the_sum_outlives_a_restart_of_the_machine(told: Told, watch: StarvationWatch) -> None:
    began = time.monotonic()
    told.delays[10] = {(10, 10): 2.0}
    assert watch.since(began) == pytest.approx(2.0)
    told.machine = None
    assert watch.since(began) == pytest.approx(2.0)
    told.machine, told.delays[20] = 20, {(20, 20): 1.5}
    assert watch.since(began) == pytest.approx(3.5)
    assert watch.since(time.monotonic()) == 0.0


def test_a_process_that_is_gone_waits_for_nothing() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    assert run_delays(ended.pid) == {}
    assert run_delays(os.getpid())
