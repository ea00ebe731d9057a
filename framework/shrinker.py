"""`brownout shrink`: a failing bundle's composition made smaller, on the rig.

What is simpler is `framework.campaign.shrink`'s; here candidates are performed and shown. The
composition is performed once as it is, before anything else: what doesn't violate any more can't be
made smaller. The smallest is performed once more in the end, so that it is no stroke of luck.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import define
from rich.console import Console

from framework.campaign.bundle import Bundle, read_bundle
from framework.campaign.composition import Composition
from framework.campaign.crew import Crew
from framework.campaign.errors import CampaignError
from framework.campaign.perform import Performed
from framework.campaign.plan import INFRASTRUCTURE, Rig
from framework.campaign.shrink import Shrunk, shrink, size
from framework.campaigner import LOG, perform_once, rigs_of

TRIES: Final = 2
"""How often the composition may fail to violate before it is given up."""


def composition_of(path: Path) -> tuple[Bundle, Composition]:
    """A bundle and its composition.

    Raises:
        BundleError: the bundle can't be read.
        CampaignError: it has no composition.
    """
    bundle = read_bundle(path)
    if bundle.composition is None:
        raise CampaignError(
            f"bundle {path}: has no composition: it is of {bundle.scenario}, and only the bundles "
            "of a campaign can be made smaller"
        )
    return bundle, Composition.from_values(bundle.composition)


def violated_in(path: Path, bundle: Bundle, wanted: int | None) -> int:
    """The invariant that a smaller composition must violate, too.

    Raises:
        CampaignError: there is none, or not the wanted one.
    """
    violated = [number for number, held, _ in bundle.findings if held is False]
    if not violated or (wanted is not None and wanted not in violated):
        what = "no invariant" if wanted is None else f"not invariant {wanted}"
        raise CampaignError(f"bundle {path}: {bundle.verdict} violates {what}")
    return violated[0] if wanted is None else wanted


@define
class _Bench:
    """Performs candidates and keeps what came of the last one that violated."""

    crew: Crew
    path: Path
    rig: Rig
    output: Path
    invariant: int
    console: Console
    name: str
    runs: int = 0
    last: Performed | None = None

    def violates(self, composition: Composition) -> bool:
        """Whether a run of it violates the invariant; what a rig failed is done again."""
        for _ in range(TRIES):
            self.runs += 1
            outcome = perform_once(
                self.crew,
                self.path,
                self.rig,
                composition,
                f"{self.name} shrunk {self.runs}",
                f"brownout shrink --rig {self.path}",
                self.output,
                always=False,
            )
            self.console.print(
                f"   {outcome.verdict} in {outcome.seconds:.0f} s", highlight=False, markup=False
            )
            if outcome.verdict != INFRASTRUCTURE:
                break
        if self.invariant in outcome.violated:
            self.last = outcome
            return True
        return False


def run_shrink(
    path: Path,
    rig_path: Path | None,
    output: Path,
    console: Console,
    *,
    most_runs: int,
    invariant: int | None = None,
) -> bool:
    """Shrink a bundle; False if it does not violate any more.

    Raises:
        BundleError, CampaignError: the bundle or the rig can't be used.
    """
    bundle, composition = composition_of(path)
    number = violated_in(path, bundle, invariant)
    where = rig_path or Path("rigs") / bundle.rig
    (rig,) = rigs_of((where,), composition.base.partition("+")[2], console)
    missing = sorted(composition.features() - rig.features)
    if missing:
        raise CampaignError(
            f"bundle {path}: needs the feature {', '.join(missing)}, which {where} does not have"
        )

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    began = time.monotonic()
    say(f"{bundle.scenario}: {bundle.verdict}\n{composition}")
    with Crew(1, output / LOG) as crew:
        bench = _Bench(crew, where, rig, output, number, console, path.stem)
        if not any(bench.violates(composition) for _ in range(TRIES)):
            say(f"no violation of invariant {number} in {TRIES} runs any more: flaky, or mended")
            return False
        found = shrink(composition, bench.violates, say, most_runs)
        sure = bench.violates(found.composition)
    _tell(composition, found, bench, began, say, sure=sure)
    return True


def _tell(
    before: Composition,
    found: Shrunk,
    bench: _Bench,
    began: float,
    say: Callable[[str], None],
    *,
    sure: bool,
) -> None:
    after = found.composition
    say(
        f"from {len(before.faults)} faults and {len(before.steps)} steps to {len(after.faults)} and"
        f" {len(after.steps)}, in {bench.runs} runs and {time.monotonic() - began:.0f} s"
        + ("" if found.complete else "; the runs were used up, there may be something smaller")
    )
    say(f"size {_text(size(before))} -> {_text(size(after))}")
    say(f"smallest: {after}")
    if not sure:
        say("WARNING: it did not violate when it was performed once more: flaky")
    if bench.last is not None:
        say(f"evidence: {bench.last.evidence}")
        say(f"bundle: {bench.last.bundle}")
        say(f"replay: brownout replay {bench.last.bundle}")


def _text(numbers: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{number:g}" for number in numbers) + ")"
