"""A worker of a campaign: a process that holds rigs open and performs one composition at a time.

It reads jobs from standard input and writes what happens to standard output, a JSON object a line:

    {"rig": PATH, "composition": {…}, "title": …, "repeat": …, "bundles": …, "images": […]}
    {"say": TEXT} … {"done": {outcome}}    or    {"unusable": TEXT}: the rig can't be used at all

A rig is opened at its first job and stays open, off between two runs; each run has a fresh disk.
The worker ends with its input, and at an interrupt. Whatever else is printed goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from attrs import asdict

from framework.campaign.bundle import BundleError
from framework.campaign.composition import Composition
from framework.campaign.errors import CompositionError
from framework.campaign.perform import Performed, Place, perform
from framework.disk import DiskError
from framework.scenario.bench import Bench, BenchError, open_bench_on
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.rig import rig_features
from images import ImageError


class Worker:
    """Holds rigs open, and performs jobs on them."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._places: dict[tuple[Path, tuple[str, ...]], Place] = {}

    def close(self) -> None:
        """Switch everything off."""
        for place in self._places.values():
            place.bench.close()
        self._places.clear()

    def work(self, jobs: IO[str]) -> None:
        """Do jobs until there are no more."""
        for line in jobs:
            self._tell(**self._outcome(json.loads(line)))

    def _outcome(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"done": asdict(self._perform(job))}
        except (BundleError, CompositionError, BenchError, RigError, ImageError) as error:
            return {"unusable": str(error)}
        except (InfrastructureError, DiskError, OSError) as error:
            # Before or after the run itself: the rig's bench, not the device.
            return {"done": asdict(Performed("INFRASTRUCTURE", evidence=str(error)))}

    def _perform(self, job: dict[str, Any]) -> Performed:
        place = self._place(Path(job["rig"]), tuple(job["images"]))
        return perform(
            place,
            Composition.from_values(job["composition"]),
            title=job["title"],
            repeat=job["repeat"],
            bundles=Path(job["bundles"]) if job["bundles"] else None,
            say=lambda text: self._tell(say=text),
            always=bool(job.get("always")),
        )

    def _place(self, rig: Path, images: tuple[str, ...]) -> Place:
        key = (rig, images)
        if key not in self._places:
            self._tell(say="opening the rig")
            for other in [other for other in self._places if other[0] == rig]:
                self._places.pop(other).bench.close()
            bench: Bench = open_bench_on(rig, images)
            self._places[key] = Place(bench, rig, rig_features(rig))
        return self._places[key]

    def _tell(self, **message: object) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


@contextlib.contextmanager
def protected_output() -> Iterator[IO[str]]:
    """Standard output for messages alone: whatever prints goes to standard error instead."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


def main() -> None:
    """Entry point of the process."""
    # Who starts a campaign in the background has interrupts ignored, and so would this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with protected_output() as out, contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        worker = Worker(out)
        try:
            worker.work(sys.stdin)
        finally:
            worker.close()


if __name__ == "__main__":
    main()
