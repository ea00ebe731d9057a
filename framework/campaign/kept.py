"""Bundles of simulated lifetimes: written for a violation, and lived through again.

The bundle is the same as a scenario's (`framework.campaign.bundle`), with the schedule in the
scenario's place: it says everything that a lifetime depends on, so there is no journal, and what
each cut left on the drive is kept as a hash. A replay must agree in every event and every bit.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Final

from framework.campaign.bundle import Bundle, BundleError, CutFacts, write_bundle
from framework.campaign.lifetimes import Lifetime, Schedule, live
from framework.campaign.replay import Replayed
from framework.campaign.steps import compare, steps_of
from framework.targets.simulated.laboratory import Laboratory
from framework.verdict import PowerCut

PREFIX: Final = "simulate "
"""What the scenario of such a bundle begins with; the schedule follows."""
RIG: Final = "simulated.yaml"


def is_simulated(bundle: Bundle) -> bool:
    """Whether it is a lifetime's bundle."""
    return bundle.scenario.startswith(PREFIX)


def schedule_of(bundle: Bundle) -> Schedule:
    """The schedule in a lifetime's bundle. Raises BundleError if it is damaged."""
    try:
        return Schedule.from_json(bundle.scenario.removeprefix(PREFIX))
    except ValueError as error:
        raise BundleError(f"bundle of {bundle.scenario[:60]}: {error}") from error


def bundle_of(lifetime: Lifetime, seed: int = 0) -> Bundle:
    """The bundle of a lifetime that was lived with `hash_drives`."""
    cuts = [event for event in lifetime.events if isinstance(event, PowerCut)]
    return Bundle(
        scenario=PREFIX + lifetime.schedule.to_json(),
        title=str(lifetime.schedule),
        rig=RIG,
        rig_text="",
        run_seed=seed,
        faults=tuple(map(str, sorted(lifetime.schedule.faults))),
        steps=steps_of(lifetime.events),
        verdict=str(lifetime.verdict),
        findings=tuple((f.invariant, f.held, f.evidence) for f in lifetime.verdict.findings),
        cuts=tuple(
            CutFacts(index, cut.operation, cut.model, cut.seed, {"drive": digest})
            for index, (cut, digest) in enumerate(zip(cuts, lifetime.drives, strict=True))
        ),
        versions={
            "brownout": metadata.version("brownout"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
    )


def keep(path: Path, lifetime: Lifetime, seed: int = 0) -> None:
    """Write the bundle of a lifetime that was lived with `hash_drives`. Raises BundleError."""
    console = "".join(f"{line}\n" for line in lifetime.lines)
    write_bundle(path, bundle_of(lifetime, seed), console=console)


def live_again(laboratory: Laboratory, bundle: Bundle) -> Replayed:
    """Live through a bundle's schedule, and compare every event and every drive."""
    again = bundle_of(live(laboratory, schedule_of(bundle), hash_drives=True))
    drives = tuple(
        f"the drive after cut {was.index} (operation {was.operation})"
        for was, now in zip(bundle.cuts, again.cuts, strict=False)
        if was.disks != now.disks
    )
    course = (*bundle.steps, f"verdict {bundle.verdict}")
    now = (*again.steps, f"verdict {again.verdict}")
    return Replayed(drives, compare(course, now), again.verdict)
