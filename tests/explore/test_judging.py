"""Planted bugs are caught with the number of what they break; the honest updater is clean."""

from __future__ import annotations

import pytest
import tiny_ab

from framework.disk import JournalReader, LyingFlush, PrefixCache, TornSector, VolatileCache
from framework.explore.ears import Ears
from framework.explore.examine import Bounds, Examiner
from framework.targets.uut import BrownoutUpdater

HONEST = (PrefixCache(), VolatileCache(), TornSector())


def examined(tmp_path, bug="", updates=("v2", "sick"), models=HONEST):
    journal = JournalReader(tiny_ab.run(tmp_path, updates, bug))
    context = tiny_ab.context(journal, bug)
    uut = BrownoutUpdater
    examiner = Examiner(context, None, Ears(uut.boot_signs, uut.signs, uut.commit_state, ""))
    found = examiner.explore(models, exhaustive_up_to=10, samples=100)
    return examiner.examine(found, ["static", "data"], Bounds())


def broken(examination) -> set[int]:
    return {violation.invariant for violation in examination.violations}


def test_the_honest_updater_is_clean_in_every_state(tmp_path):
    found = examined(tmp_path)
    assert found.violations == []
    assert found.exploration.counts.points > 80
    assert len(found.verdicts) >= 20


@pytest.mark.parametrize(
    ("bug", "invariant"),
    [
        ("no-sync-before-switch", 2),
        ("switch-before-image", 2),
        ("both-copies-at-once", 4),
        ("one-copy-only", 4),
        ("acknowledged-too-early", 3),
        ("never-on-trial", 4),
        ("installed-too-early", 7),
    ],
)
def test_a_planted_bug_breaks_its_invariant(tmp_path, bug, invariant):
    found = examined(tmp_path, bug)
    assert invariant in broken(found)


def test_no_updater_can_hold_on_a_device_that_lies_about_its_flushes(tmp_path):
    found = examined(tmp_path, models=(LyingFlush(),))
    assert {2, 3} <= broken(found)


def test_a_violation_names_the_promise_that_was_broken(tmp_path):
    found = examined(tmp_path, "acknowledged-too-early")
    third = [v for v in found.violations if v.invariant == 3]
    assert third
    assert "the commit of v2 was acknowledged" in third[0].promised
    assert "v1" in third[0].evidence
