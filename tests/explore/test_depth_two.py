"""Cuts in the recovery from a cut: honest recoveries hold, planted ones are caught only here."""

from __future__ import annotations

import pytest
import tiny_ab
from tiny_recovery import recovered

from framework.disk import JournalReader, PrefixCache, TornSector, VolatileCache
from framework.explore import confirm, explore
from framework.explore.bulk import BulkOracle, judge_all, phases_of
from framework.explore.deep import Deeper, judge_recovery
from framework.explorer import DISHONEST, deeper_for

MODELS = (PrefixCache(), VolatileCache(), TornSector())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """An honest update, all its cuts, and what they owe."""
    folder = tmp_path_factory.mktemp("recorded")
    context = tiny_ab.context(JournalReader(tiny_ab.run(folder)))
    return context, explore(context.journal, context.layout, MODELS, samples=100)


def cut_again(recorded, folder, bug="", retry="", every=1):
    """Yield (violations, distinct states) of depth two, a class after the other."""
    context, found = recorded
    for number, crash_class in enumerate(found.classes[::every]):
        first = crash_class.representative
        journal = recovered(context, first, folder / f"{number}", bug, retry)
        phases = [phase for _, phase in phases_of(crash_class, context.timeline)]
        (deeper,), broken, _ = judge_recovery(
            context, journal, first, phases, Deeper(models=MODELS)
        )
        yield broken, deeper.counts.states


def test_at_depth_one_there_is_nothing_to_find(recorded):
    context, found = recorded
    assert judge_all(BulkOracle(context), found.classes) == 0


def test_an_honest_recovery_holds_wherever_it_is_cut(recorded, tmp_path):
    found = list(cut_again(recorded, tmp_path, every=2))
    assert all(violations == [] for violations, _ in found)
    assert sum(states for _, states in found) > 1000


def test_an_honest_update_tried_again_holds_wherever_it_is_cut(recorded, tmp_path):
    found = list(cut_again(recorded, tmp_path, retry="v2", every=25))
    assert all(violations == [] for violations, _ in found)
    assert sum(states for _, states in found) > 1000


@pytest.mark.parametrize(
    ("bug", "retry", "invariant"),
    [
        ("both-copies-at-once", "", 4),
        ("acknowledged-too-early", "", 3),
        ("no-sync-before-switch", "v2", 2),
        ("both-copies-at-once", "sick", 4),
    ],
)
def test_a_bug_of_the_recovery_is_caught_at_depth_two_only(
    recorded, tmp_path, bug, retry, invariant
):
    caught = (
        violation
        for violations, _ in cut_again(recorded, tmp_path, bug, retry, every=10)
        for violation in violations
        if violation.invariant == invariant
    )
    assert next(caught).recovery, "the journal that shows it is kept"


def on_a_card(recorded, folder, bug="", retry=""):
    """Depth two under the models that a recording on an SD card is given there."""
    context, found = recorded
    deeper = deeper_for({"interfaces": {"vda": "sd"}}, {})
    for number, crash_class in enumerate(found.classes[::20]):
        first = crash_class.representative
        journal = recovered(context, first, folder / f"{number}", bug, retry)
        phases = [phase for _, phase in phases_of(crash_class, context.timeline)]
        yield from judge_recovery(context, journal, first, phases, deeper)[1]


def test_on_an_sd_card_an_honest_recovery_holds_and_what_the_card_loses_is_told_apart(
    recorded, tmp_path
):
    found = list(on_a_card(recorded, tmp_path, retry="v2"))
    assert {v.second.model for v in found} <= set(DISHONEST), "the card loses what it acknowledged"


def test_on_an_sd_card_what_breaks_without_a_lie_does_not_pass_for_one(recorded, tmp_path):
    """Planted: a commit that is acknowledged too early; both an honest card and a lying show it."""
    found = on_a_card(recorded, tmp_path, "acknowledged-too-early")
    assert {(3, "kept"), (3, "sd")} <= {(v.invariant, v.second.model) for v in found}


def test_on_an_sd_card_a_switch_that_overtakes_its_image_is_caught(recorded, tmp_path):
    found = on_a_card(recorded, tmp_path, "no-sync-before-switch", retry="v2")
    assert (2, "sd") in {(v.invariant, v.second.model) for v in found}


def test_elsewhere_the_second_cut_is_in_order_or_of_any_subset():
    assert deeper_for({"interfaces": {"vda": "virtio"}}, {}) == deeper_for({}, {}) == Deeper()


def test_a_recovery_that_writes_nothing_has_no_cuts_of_its_own(recorded, tmp_path):
    context, found = recorded
    idle = next(c for c in found.classes if c.first_operation == 0)
    journal = recovered(context, idle.representative, tmp_path / "idle")
    assert len(journal.operations) == 0
    again = explore(journal, context.layout, MODELS)
    assert again.counts.states == 1


def test_what_the_engine_says_of_a_recovery_is_what_its_bytes_say(recorded, tmp_path):
    """The content beneath, which lies in another journal, is hashed as it reads."""
    context, found = recorded
    for number, crash_class in enumerate(found.classes[::40]):
        journal = recovered(
            context, crash_class.representative, tmp_path / f"{number}", retry="sick"
        )
        again = explore(journal, context.layout, MODELS, samples=50)
        confirm(journal, context.layout, MODELS, again)
        images = {s.image for c in again.classes for s in c.slots.values()}
        assert "sick" in images
