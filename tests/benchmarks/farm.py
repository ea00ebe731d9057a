"""What labgrid's coordinator costs a farm run: getting a place and handing it back, 50 at once.

    python tests/benchmarks/farm.py [--places 200] [--workers 50] [--rounds 3] [--hold 30]

Real labgrid daemons: a coordinator and an exporter with one resource a place, which acquires it as
for a board. Each worker does what a farm run's worker does (`framework.farm.tenure`): reserve,
lease, lock; hold the place as a scenario would; unlock, clear the lease, cancel. What is timed is
all but the holding, a run's scheduling overhead. First all ask at once, then each when it comes
back. Processes of a few workers each, so that this program's own lock is not what is measured.
Those times are the machine's, too; the coordinator's processor time a run hardly depends on it, and
says how many workers it bears: with more runs a second than it can serve they queue, whatever the
farm's size. So a place is held for as long as a short scenario takes on a board.

The baseline is the same on a farm of four places with four workers, in the same run. With it the
decision which scenario comes next (`framework.farm.queue`), for as many places.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from framework.farm.history import percentile
from framework.farm.queue import Queue
from framework.farm.tenure import Tenure
from framework.targets.places import Places

BIN = Path(sys.executable).parent
A_PROCESS = 10
PATIENCE_S = 120.0
SMALL = 4


@contextlib.contextmanager
def farm(places: int) -> Iterator[tuple[str, int]]:
    """A coordinator with so many places, and their exporter; its address and its process."""
    with tempfile.TemporaryDirectory(prefix="brownout-farm-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        home = Path(folder)
        names = [f"sim{number}" for number in range(places)]
        now = time.time()
        (home / "places.yaml").write_text(yaml.safe_dump({n: place(n, now) for n in names}))
        resource = {"NetworkPowerPort": {"model": "rest", "host": "http://127.0.0.1:9", "index": 0}}
        (home / "exporter.yaml").write_text(yaml.safe_dump(dict.fromkeys(names, resource)))
        with (
            daemon(home, "labgrid-coordinator", "-l", address) as coordinator,
            daemon(
                *(home, "labgrid-exporter", "-c", address, "--name", "rack"),
                *("--hostname", "127.0.0.1", "exporter.yaml"),
            ) as exporter,
        ):
            log = home / "labgrid-exporter.log"
            while log.read_text().count("add resource ") < places:
                if exporter.poll() is not None:
                    raise SystemExit(f"the exporter ended: {log.read_text()[-1000:]}")
                time.sleep(0.1)
            with Places(address) as told:
                assert len(told.all()) == places
            yield address, coordinator.pid


def processor_s(pid: int) -> float:
    """The processor time that a process has taken (proc(5), stat, utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def place(name: str, now: float) -> dict[str, Any]:
    """A place as the coordinator keeps it."""
    match = {"exporter": "rack", "group": name, "cls": "*", "name": None}
    tags = {"board": "sim", "health": "ok"}
    told = {"aliases": [], "comment": "", "tags": tags, "matches": [match]}
    return {**told, "created": now, "changed": now}


@contextlib.contextmanager
def daemon(home: Path, program: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of labgrid's programs, ended at the end."""
    with (home / f"{program}.log").open("wb") as log:
        process = subprocess.Popen(
            [*("setpriv", "--pdeathsig", "KILL", "--"), BIN / program, *options],
            cwd=home,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if "-l" in options:
        host, _, port = options[-1].rpartition(":")
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    break
            time.sleep(0.05)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def some_workers(  # noqa: PLR0917 - submitted by position
    address: str, first: int, count: int, rounds: int, hold_s: float, at: float
) -> list[tuple[int, float]]:
    """Workers in one process: of each round, its number and its overhead in seconds."""
    found: list[tuple[int, float]] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        with Places(address) as places:
            places.all()  # connected, as a worker is that has collected
            time.sleep(max(0.0, at - time.time()))
            for number_of_round in range(rounds):
                began = time.monotonic()
                tenure = Tenure(places, "benchmark", f"gw{number}")
                if not tenure.obtain({"board": "sim"}, PATIENCE_S):
                    raise SystemExit("a worker got no place")
                got_s = time.monotonic() - began
                time.sleep(hold_s * chance.uniform(0.5, 1.5))
                began = time.monotonic()
                tenure.give_back()
                found.append((number_of_round, got_s + time.monotonic() - began))

    threads = [threading.Thread(target=work, args=(first + n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(found) != count * rounds:
        raise SystemExit("a worker failed")
    return found


def measure(
    places: int, workers: int, rounds: int, hold_s: float
) -> tuple[list[float], list[float], float]:
    """Overheads of those who ask at once, and of those who ask as they come back.

    And the coordinator's processor time for each.
    """
    with farm(places) as (address, coordinator):
        before_s = processor_s(coordinator)
        counts = [min(A_PROCESS, workers - n) for n in range(0, workers, A_PROCESS)]
        with ProcessPoolExecutor(len(counts), mp_context=get_context("spawn")) as pool:
            # Imported and connected before it begins.
            at = time.time() + 5.0 + 3.0 * len(counts)
            jobs = [
                pool.submit(some_workers, address, A_PROCESS * n, count, rounds, hold_s, at)
                for n, count in enumerate(counts)
            ]
            found = [each for job in jobs for each in job.result()]
        taken_s = (processor_s(coordinator) - before_s) / len(found)
        with Places(address) as told:
            left = [p.name for p in told.all() if p.acquired or p.reservation or len(p.tags) > 2]
    if left:
        raise SystemExit(f"not handed back: {left}")
    at_once = [s for number, s in found if not number]
    return at_once, [s for number, s in found if number], taken_s


def decisions(places: int, scenarios: int) -> list[float]:
    """Seconds of each decision what a place runs next."""
    names = [f"sim{number}" for number in range(places)]
    queue = Queue(list(range(scenarios)))
    taken: list[float] = []
    for turn in range(scenarios):
        name = names[turn % places]
        others = [other for other in names if other != name]
        began = time.perf_counter()
        queue.take(name, others)
        taken.append(time.perf_counter() - began)
    return taken


def told(values: list[float], scale: float = 1000.0) -> str:
    """Median and 95th percentile."""
    return f"{scale * statistics.median(values):8.1f} {scale * percentile(values, 0.95):8.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hold", type=float, default=30.0, help="seconds that a scenario takes")
    asked = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f}; {os.cpu_count()} processors")
    small = measure(SMALL, SMALL, asked.rounds, asked.hold)
    large = measure(asked.places, asked.workers, asked.rounds, asked.hold)
    print(f"scheduling overhead a run, ms{'':22}  median      p95")
    print(f"  {SMALL} places, {SMALL} workers, all at once{'':16} {told(small[0])}")
    print(f"  {SMALL} places, {SMALL} workers, as they come back{'':10} {told(small[1])}")
    of = f"{asked.places} places, {asked.workers} workers"
    print(f"  {of}, all at once{'':12} {told(large[0])}")
    print(f"  {of}, as they come back{'':6} {told(large[1])}")
    ratio = statistics.median(large[1]) / statistics.median(small[1])
    print(f"ratio of the medians, as they come back: {ratio:.2f}")
    print(
        f"the coordinator's processor time a run, ms: {1000 * small[2]:.0f} and "
        f"{1000 * large[2]:.0f}, ratio {large[2] / small[2]:.2f}"
    )
    print(
        f"so it serves {1 / large[2]:.0f} runs a second: "
        f"{(asked.hold + statistics.median(large[1])) / large[2]:.0f} workers at this hold"
    )
    chosen = decisions(asked.workers, 5000)
    print(f"what comes next, of 5,000 for {asked.workers} places, us:{'':6} {told(chosen, 1e6)}")


if __name__ == "__main__":
    main()
