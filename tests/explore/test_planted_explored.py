"""Updaters with one safety step taken out are recorded once, and the explorer names what breaks.

No cut is aimed: the recording is an update without any fault. The honest updater's is clean under
all models that find a bug here. Long: a recording each, so it is `make night`'s.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from framework.explore.examine import Bounds
from framework.explorer import Wish, parse_models, run_explore, run_record

pytestmark = [pytest.mark.emulated, pytest.mark.night]

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"
STATIC = ("static",)


def test_the_honest_updater_is_clean_under_the_same_models(tmp_path):
    judges = ("static", "data", "coldboot")
    models = ("subset", "torn", "prefix")
    code, result = explored(tmp_path, ("v1", ["v2", "unhealthy"], models, judges))
    assert (code, result["violations"], result["disagreements"]) == (0, [], [])
    assert {row["judge"]: row["looked_at"] for row in result["judges"]}["coldboot"] == 14


@pytest.mark.parametrize(
    ("case", "invariant"),
    [
        (("v1+switch-before-sync", ["v2"], "subset", STATIC), 2),
        (("v1+never-fsync", ["v2"], "subset", STATIC), 2),
        (("v1+single-env", ["v2+single-env", "unhealthy+single-env"], "torn", STATIC), 4),
        (("v1", ["v2+both-copies", "unhealthy"], "prefix", STATIC), 4),
        (("v1", ["v2+early-acknowledgement"], "prefix", STATIC), 3),
        (("v1+lazy-store", ["v2"], "prefix", ("static", "coldboot")), 7),
        (("v1", ["unhealthy+commit-before-health"], "prefix", STATIC), 4),
        (("v1", ["unhealthy+always-healthy"], "prefix", STATIC), 4),
    ],
    ids=lambda case: "-".join((case[0], *case[1])) if isinstance(case, tuple) else None,
)
def test_a_planted_bug_is_found_without_aiming(tmp_path, case, invariant):
    code, result = explored(tmp_path, case)
    assert code == 1
    assert invariant in {row["invariant"] for row in result["violations"] if row["counts"]}


def test_a_read_back_from_the_page_cache_misses_a_flipped_bit_that_the_honest_one_finds(tmp_path):
    code, result = explored(
        tmp_path, ("v1+page-cache-read-back", ["v2"], "prefix", STATIC), flip_percent=70
    )
    assert code == 1
    assert 2 in {row["invariant"] for row in result["violations"]}
    code, result = explored(tmp_path, ("v1", ["v2"], "prefix", STATIC), flip_percent=70)
    assert (code, result["violations"]) == (0, [])


def test_a_device_that_lies_about_flushes_breaks_the_honest_updater_and_is_told_apart(tmp_path):
    code, result = explored(tmp_path, ("v1", ["v2"], "lying", STATIC))
    assert code == 0
    assert {row["invariant"] for row in result["violations"]} >= {2, 3}
    assert not any(row["counts"] for row in result["violations"])


def explored(tmp_path, case, *, flip_percent=None):
    base, updates, models, judges = case
    quiet = Console(file=io.StringIO())
    path = tmp_path / f"{base}-{len(updates)}.recording"
    run_record(RIG, base, updates, path, quiet, flip_percent=flip_percent)
    out = io.StringIO()
    models = parse_models([models] if isinstance(models, str) else models)
    wish = Wish(models, 10, 300, 1, judges, Bounds(data=1500, cold_boots=14))
    code = run_explore(
        [path], wish, tmp_path / "bundles", Console(file=out, width=200), rig=RIG, as_json=True
    )
    return code, json.loads(out.getvalue())["recordings"][0]
