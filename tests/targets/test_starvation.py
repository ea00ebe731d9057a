"""A host that does not let the machine run is told from a device that is slow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from targets_rigs import until

from framework.targets.errors import InfrastructureError
from framework.targets.rig import load_rig
from framework.targets.starvation import RunDelays, StarvationWatch, run_delays
from framework.targets.strategy import Fate

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"
SPIN = "import os; os.nice(-20)\nwhile True: pass"


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


@contextmanager
def crowded(pid: int) -> Iterator[None]:
    """On one processor with something far more important."""
    processor = min(os.sched_getaffinity(0))
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        os.sched_setaffinity(spinner.pid, {processor})
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {processor})
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
        yield
    finally:
        spinner.kill()
        spinner.wait()


@pytest.mark.emulated
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be more important than others")
def test_a_boot_that_a_busy_host_kept_from_running_is_no_verdict() -> None:
    """The same budget that is a verdict on a quiet host."""
    environment = load_rig(RIG)
    strategy = environment.get_target().get_strategy()  # type: ignore[union-attr]
    try:
        strategy.transition("off")
        since = strategy._switch_on()
        assert strategy.await_boot(since, 1.0).fate is not Fate.READY
        strategy.transition("off")
        since = strategy._switch_on()
        with crowded(strategy.power.pid):
            began = time.monotonic()
            until(lambda: strategy.power.starved_s(began) > 1.0, 10.0, "starved")
            with pytest.raises(InfrastructureError, match="host is too busy"):
                strategy.await_boot(since, 1.0)
    finally:
        environment.cleanup()
        strategy.power.close()
