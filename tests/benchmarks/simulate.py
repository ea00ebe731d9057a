"""How many simulated lifetimes a second on one core, what they spend it on, and against a real run.

    python tests/benchmarks/simulate.py [--without-emulated]

A lifetime here is the small update: start, install, restart, prove, commit, and the same update
once more at the end; its seconds are of CPU time, which another program beside it changes little.
The baseline is the same update on the emulated rig, as `scenarios/` runs it, in the same run of
this program, in seconds of a clock. Prints rates and ratios; it fails for nothing.
"""

from __future__ import annotations

import cProfile
import pstats
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from framework.campaign.lifetimes import Schedule, live
from framework.campaign.search import batch
from framework.targets.simulated.laboratory import Laboratory

ROUNDS = 9
LIFETIMES = 60
SCENARIO = "scenarios/test_update.py"
GOAL = 500


def rate(work: Callable[[], int]) -> float:
    """The median rate, by CPU time, of `work`, which returns how many it did."""
    rates = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        count = work()
        rates.append(count / (time.process_time() - begun))
    return statistics.median(rates)


def shares(laboratory: Laboratory) -> None:
    """Where the time goes, by cProfile's own time, in a few large parts."""
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(LIFETIMES):
        live(laboratory, Schedule())
    profile.disable()
    parts: dict[str, float] = {}
    stats = pstats.Stats(profile)
    for (file, _, name), (_, _, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]
        parts[_part(file, name)] = parts.get(_part(file, name), 0.0) + own
    total = sum(parts.values())
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part}: {seconds / total:.0%}")


def _part(file: str, name: str) -> str:
    if "apsw" in name:
        return "SQLite itself"
    if "simulated" in file:
        return "the simulated device"
    if "/updater/" in file:
        return "the client"
    if "/framework/" in file:
        return "schedule, witnesses and judge"
    return "Python and its libraries"


def emulated() -> float:
    """Seconds of one update on the emulated rig: the longest call that pytest reports."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--durations=3", "--durations-min=1", "--lg-env", "rigs/qemu-arm64.yaml", SCENARIO),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [float(s) for s in re.findall(r"^([\d.]+)s call", done.stdout, re.MULTILINE)]
    return min(calls)


def main() -> None:
    """Measure, print."""
    laboratory = Laboratory()
    try:
        live(laboratory, Schedule())

        def small() -> int:
            for _ in range(LIFETIMES):
                live(laboratory, Schedule())
            return LIFETIMES

        one = rate(small)
        print(f"small update: {one:.0f} lifetimes/s on one core, {one / GOAL:.2f} of {GOAL}")
        mixed = rate(lambda: batch(laboratory, 1, 0, LIFETIMES).lifetimes)
        print(f"random faults: {mixed:.0f} lifetimes/s")
        shares(laboratory)
    finally:
        laboratory.close()
    if "--without-emulated" not in sys.argv:
        seconds = emulated()
        print(f"emulated rig: {seconds:.1f} s an update, {seconds * one:,.0f} times as long")


if __name__ == "__main__":
    main()
