"""How many bootloader decisions and cold boots an hour, on two workers, and what one costs.

    python tests/benchmarks/judges.py [RECORDING]

Records an update first if no recording is given. Prints the rates and their ratio to the goals
(10,000 decisions and 2,000 cold boots an hour); it fails for nothing, as the machine's other work
decides a good part of it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from framework.disk import PrefixCache, WriteThrough
from framework.explore.examine import Bounds, Examiner
from framework.explore.judges.context import Context
from framework.explore.recording import Recording
from framework.explorer import ears_of, machine_of
from framework.scenario.capture import record_updates

RIG = Path("rigs/qemu-arm64.yaml")
GOALS = {"uboot": 10_000, "coldboot": 2_000}
DECISIONS = 60
COLD_BOOTS = 16


def measure(path: Path) -> None:
    """Explore in order, then boot."""
    with Recording(path) as recording:
        context = Context.of(recording.reader, recording.facts)
        examiner = Examiner(context, machine_of(recording.facts, RIG), ears_of(recording.facts))
        models = [WriteThrough(), PrefixCache()]
        exploration = examiner.explore(models, exhaustive_up_to=8, samples=0)
        bounds = Bounds(decisions=DECISIONS, cold_boots=COLD_BOOTS)
        found = examiner.examine(exploration, ["static", "uboot", "coldboot"], bounds)
    for count in found.counts:
        goal = GOALS.get(count.judge)
        if goal is None:
            continue
        rate = 3600 * count.looked_at / count.seconds
        kind = count.judge == "coldboot"
        each = statistics.median(b.seconds for b in found.boots if (b.seen is not None) == kind)
        print(
            f"{count.judge}: {count.looked_at} in {count.seconds:.1f} s: {rate:,.0f} an hour, "
            f"{rate / goal:.2f} of the goal; median {each:.2f} s each; "
            f"{count.disagreements} disagreements with the oracle"
        )


def main() -> None:
    """Record if need be, then measure."""
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(record_updates(RIG, "v1", ["v2"], Path(folder) / "x.recording", print))


if __name__ == "__main__":
    main()
