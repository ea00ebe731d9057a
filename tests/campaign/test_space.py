"""Compositions are named by numbers, fit their rig, survive files, and are steered."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.campaign.composition import Composition, CompositionError, Placed, Step
from framework.campaign.space import (
    CANDIDATES,
    Cell,
    candidates,
    choose,
    draw,
    expected,
    images_of,
    stages_of,
    universe,
    worth,
)
from framework.faults import FaultError, after, power_cut, slot_write, state
from framework.faults.values import from_values, to_values

ALL = frozenset({"emulated", "power-cut", "uboot", "network", "link", "rtc", "watchdog"})
BARE = frozenset({"power-cut", "network"})
CUT = power_cut("torn").when(slot_write(percent=50))
UPDATE = (Step("install", "v2"), Step("restart"))


@given(st.integers(0, 10**6), st.integers(0, CANDIDATES - 1), st.sampled_from((ALL, BARE)))
def test_what_is_drawn_fits_the_rig_and_survives_a_file(
    index: int, candidate: int, features: frozenset[str]
) -> None:
    drawn = draw(features, 7, index, candidate)
    assert drawn.features() <= features
    assert set(drawn.images) <= set(images_of("", features))
    assert Composition.from_json(drawn.to_json()) == drawn
    assert len(expected(drawn)) == len(drawn.faults)
    assert len(stages_of(drawn)) == len(drawn.steps)


def test_the_same_numbers_give_the_same_composition_and_others_do_not() -> None:
    drawn = [draw(ALL, 3, index, 0).to_json() for index in range(50)]
    assert drawn == [draw(ALL, 3, index, 0).to_json() for index in range(50)]
    assert len(set(drawn)) == 50
    assert draw(ALL, 4, 0, 0).to_json() != drawn[0]


def test_a_planted_bug_is_in_every_image_whose_client_matters() -> None:
    for index in range(60):
        drawn = draw(ALL, 1, index, 0, "never-fsync")
        for image in drawn.images:
            base, _, plant = image.partition("+")
            assert plant == ("never-fsync" if base in ("v1", "v2", "unhealthy") else "")


def test_steering_covers_more_than_chance() -> None:
    """The same number of compositions, with and without a choice: what is expected to strike."""

    def covered(*, steered: bool) -> int:
        struck: Counter[Cell] = Counter()
        for index in range(120):
            offered = candidates(ALL, 5, index)
            struck.update(expected(offered[choose(offered, struck) if steered else 0]))
        return len(universe(ALL) & set(struck))

    assert covered(steered=True) > 1.25 * covered(steered=False)


def test_an_unknown_cell_is_worth_more_than_well_known_ones() -> None:
    new = Composition("v1", UPDATE, (Placed(0, CUT),))
    known = Composition("v1", UPDATE, (Placed(0, power_cut("kept").when(state("Download"))),))
    struck = Counter(dict.fromkeys(expected(known), 9))
    assert choose([known, new], struck) == 1
    assert worth(known, struck) < 0.02
    assert choose([known, known], struck) == 0, "a tie is the first"


def test_a_rig_that_can_do_less_has_fewer_cells() -> None:
    assert universe(BARE) < universe(ALL)
    assert not any("hang" in cell.fault for cell in universe(BARE))


BROKEN = {
    "nothing": {},
    "no steps": {"base": "v1", "steps": [], "faults": [], "seed": 1},
    "no installation": {"base": "v1", "steps": ["restart"], "faults": [], "seed": 1},
    "another step": {"base": "v1", "steps": ["dance"], "faults": [], "seed": 1},
    "a fault beyond the steps": {
        "base": "v1",
        "steps": ["install v2"],
        "faults": [{"step": 4, **to_values(CUT)}],
        "seed": 1,
    },
    "a chain to nothing": {
        "base": "v1",
        "steps": ["install v2"],
        "faults": [{"step": 0, **to_values(power_cut().when(after(CUT)))}],
        "seed": 1,
    },
    "an unknown fault": {
        "base": "v1",
        "steps": ["install v2"],
        "faults": [{"step": 0, "fault": "Earthquake"}],
        "seed": 1,
    },
}


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN.keys())
def test_a_composition_that_makes_no_sense_is_one_clear_line(values: object) -> None:
    with pytest.raises(CompositionError) as told:
        Composition.from_values(values)
    assert "\n" not in str(told.value)
    with pytest.raises(CompositionError):
        Composition.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[" * 100_000, '"x"', "{"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(CompositionError, match="no composition"):
        Composition.from_json(text)


@pytest.mark.parametrize(
    "values",
    [
        {"fault": "PowerCut", "model": "granite"},
        {"fault": "PowerCut", "colour": "red"},
        {"fault": "BitFlip", "trigger": {"trigger": "NthFlush", "number": 1}},
        {"fault": "PowerCut", "trigger": {"trigger": "SlotWrite", "percent": 900}},
        {"trigger": "NthFlush", "number": 1},
        {"fault": ["PowerCut"]},
        7,
    ],
)
def test_a_fault_in_a_file_is_checked_like_one_in_a_scenario(values: object) -> None:
    with pytest.raises(FaultError):
        from_values(values)
