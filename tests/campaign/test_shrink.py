"""Shrinking ends at the smallest composition that violates, whatever it began with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from framework.campaign.composition import Composition, Placed, Step
from framework.campaign.shrink import shrink, simpler, size
from framework.campaign.space import draw
from framework.faults import (
    After,
    AtState,
    BootEnvWrite,
    Downloaded,
    NetworkSlow,
    Operation,
    PowerCut,
    SlotWrite,
    after,
    boot_env_write,
    brown_out,
    connection,
    downloaded,
    power_cut,
    slot_write,
    slow_network,
    state,
)

ALL = frozenset({"emulated", "power-cut", "uboot", "network", "link", "rtc", "watchdog"})


def update(*faults: Placed, image: str = "v2") -> Composition:
    return Composition("v1", (Step("install", image), Step("restart")), faults, seed=5)


def has_a_cut_in_the_image(composition: Composition) -> bool:
    """A bug that any cut in the image shows, under a model that loses something."""
    return any(
        isinstance(p.fault, PowerCut)
        and p.fault.model != "kept"
        and isinstance(p.fault.trigger, SlotWrite | Downloaded | Operation)
        for p in composition.faults
    )


def has_a_cut_in_the_rollback(composition: Composition) -> bool:
    """A bug that needs a sick image, and a cut on the way back."""
    sick = any(step.image == "unhealthy" for step in composition.steps)
    places = [p.fault.trigger for p in composition.faults if isinstance(p.fault, PowerCut)]
    return sick and any(
        (isinstance(t, AtState) and "Rollback" in t.name)
        or (isinstance(t, BootEnvWrite) and t.after == "ArtifactRollback")
        for t in places
    )


def has_a_cut_in_a_slow_download(composition: Composition) -> bool:
    """A bug that needs two faults at once."""
    faults = [p.fault for p in composition.faults]
    return any(isinstance(f, NetworkSlow) for f in faults) and has_a_cut_in_the_image(composition)


Bug = Callable[[Composition], bool]


def test_one_fault_among_three_is_found_and_made_simple() -> None:
    slow = slow_network(bytes_per_s=1 << 20, lasts_s=20)
    large = Composition(
        "v1",
        (
            Step("install", "v2"),
            Step("restart"),
            Step("install", "unhealthy"),
            Step("restart"),
        ),
        (
            Placed(0, slow),
            Placed(0, connection("fin", times=4).when(downloaded(percent=30))),
            Placed(0, brown_out(4, "torn").when(slot_write(percent=70))),
        ),
        seed=9,
    )
    found = shrink(large, has_a_cut_in_the_image)
    assert found.complete
    assert [str(step) for step in found.composition.steps] == ["install v2"]
    (placed,) = found.composition.faults
    assert placed.fault == power_cut("prefix").when(slot_write(percent=0))
    assert found.composition.seed == 9, "what the faults leave open stays what it was"


def test_what_needs_a_conjunction_keeps_both() -> None:
    slow = slow_network(bytes_per_s=1 << 20, lasts_s=20)
    cut = power_cut("torn").when(after(slow, slot_write(percent=70)))
    again = power_cut("kept").when(after(cut, boot_env_write(1)))
    large = update(Placed(0, slow), Placed(0, cut), Placed(0, again))
    found = shrink(large, has_a_cut_in_a_slow_download)
    kinds = [type(p.fault) for p in found.composition.faults]
    assert kinds == [NetworkSlow, PowerCut]
    assert found.composition.faults[1].fault == power_cut("prefix").when(slot_write(percent=0))


def test_a_chain_follows_what_it_waits_for() -> None:
    """The first fault becomes simpler while the second one waits for it."""
    first = power_cut("torn").when(slot_write(percent=50))
    second = power_cut("subset").when(after(first, boot_env_write(1)))

    def both_cuts_in_a_chain(c: Composition) -> bool:
        if len(c.faults) != 2:
            return False
        first, second = (p.fault for p in c.faults)
        return isinstance(second.trigger, After) and second.trigger.first == first

    found = shrink(update(Placed(0, first), Placed(0, second)), both_cuts_in_a_chain)
    one, two = (p.fault for p in found.composition.faults)
    assert one == power_cut("kept").when(slot_write(percent=0))
    assert two == power_cut("kept").when(after(one, boot_env_write(1)))


@pytest.mark.parametrize(
    "bug", [has_a_cut_in_the_image, has_a_cut_in_the_rollback, has_a_cut_in_a_slow_download]
)
def test_whatever_is_drawn_shrinks_to_something_that_violates_and_has_nothing_simpler(
    bug: Bug,
) -> None:
    shrunk = 0
    for index in range(600):
        drawn = draw(ALL, 11, index, 0)
        if not bug(drawn):
            continue
        found = shrink(drawn, bug, most_runs=500)
        assert bug(found.composition)
        assert found.complete
        assert size(found.composition) <= size(drawn)
        assert not any(bug(candidate) for candidate in simpler(found.composition))
        assert len(found.composition.faults) == (2 if bug is has_a_cut_in_a_slow_download else 1)
        shrunk += 1
        if shrunk == 8:
            break
    assert shrunk >= 3, "the bug was never drawn: the test shows nothing"


def test_every_simplification_is_smaller_and_makes_sense() -> None:
    for index in range(150):
        drawn = draw(ALL, 2, index, 1)
        for candidate in simpler(drawn):
            assert size(candidate) < size(drawn)
            assert Composition.from_json(candidate.to_json()) == candidate


def test_runs_are_bounded_and_it_is_told() -> None:
    large = draw(ALL, 2, 3, 0)
    tried: list[Composition] = []

    def never(composition: Composition) -> bool:
        tried.append(composition)
        return False

    found = shrink(large, never, most_runs=4)
    assert not found.complete
    assert found.runs == len(tried) == 4
    assert found.composition == large


def test_nothing_is_tried_twice() -> None:
    tried: list[str] = []

    def seldom(composition: Composition) -> bool:
        tried.append(composition.to_json())
        return len(tried) % 3 == 0 and bool(composition.faults)

    shrink(draw(ALL, 2, 8, 0), seldom, most_runs=200)
    assert len(tried) == len(set(tried))


def test_a_state_is_simpler_than_a_place_in_it() -> None:
    placed = update(Placed(1, power_cut("kept").when(state("Cleanup").at(operations=4))))
    found = shrink(placed, lambda c: bool(c.faults) and "Cleanup" in str(c.faults[0].fault))
    assert found.composition.faults[0].fault == power_cut("kept").when(state("Cleanup"))
    assert evolve(found.composition) == found.composition
