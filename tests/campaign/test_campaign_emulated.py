"""One real campaign and one real shrinking, on the emulated rig: minutes, so for the night."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from framework.campaign.bundle import read_bundle
from framework.campaign.composition import Composition, Placed, Step
from framework.campaign.crew import Crew
from framework.campaign.ledger import Ledger
from framework.campaign.plan import Wish, violating
from framework.campaign.replay import replay
from framework.campaigner import LEDGER, LOG, Place, perform_once, rigs_of, run_campaign
from framework.faults import clock, connection, downloaded, slot_write
from framework.shrinker import run_shrink

pytestmark = [pytest.mark.emulated, pytest.mark.night]
RIG = Path("rigs/qemu-arm64.yaml")


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_short_campaign_on_the_rig_judges_all_its_runs(tmp_path: Path) -> None:
    rigs = rigs_of((RIG,), "", silent())
    wish = Wish(3, rigs, 2, None, again=0)
    assert run_campaign(wish, Place((RIG,), tmp_path, 1), silent()) == 0
    with Ledger(tmp_path / LEDGER) as ledger:
        (campaign,) = ledger.campaigns()
        runs = ledger.runs(campaign)
        assert campaign.ended is not None
        assert not violating(runs)
        assert [run.outcome.verdict for run in runs if run.outcome] == ["PASS", "PASS"]
        assert ledger.struck(campaign), "no fault struck"


def test_a_violation_is_bundled_shrunk_and_replayed(tmp_path: Path) -> None:
    """An updater that commits before its health check, and two faults that have no part in it."""
    plant = "commit-before-health"
    sick = f"unhealthy+{plant}"
    large = Composition(
        f"v1+{plant}",
        (Step("install", sick), Step("restart")),
        (
            Placed(0, clock("2037-06-01").when(slot_write(percent=10))),
            Placed(0, connection("fin").when(downloaded(percent=30))),
        ),
        seed=4,
    )
    (rig,) = rigs_of((RIG,), plant, silent())
    with Crew(1, tmp_path / LOG) as crew:
        outcome = perform_once(crew, RIG, rig, large, "1/0.0", "-", tmp_path)
    assert 4 in outcome.violated, outcome.evidence
    console = silent()
    assert run_shrink(Path(outcome.bundle), RIG, tmp_path / "out", console, most_runs=12)
    told = console.file.getvalue()
    print(told)
    assert "from 2 faults and 2 steps to 0 and 2" in told, told
    (path,) = [line.split()[1] for line in told.splitlines() if line.startswith("bundle: ")]
    smallest = read_bundle(Path(path))
    assert smallest.faults == ()
    assert smallest.verdict.startswith("VIOLATION(4")
    done = replay(Path(path), RIG, lambda text: None)
    assert done.reproduced, done
