"""Compositions are named by numbers, fit their rig, survive files, and are steered."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.campaign.composition import Composition, CompositionError, Placed, Step
from framework.campaign.perform import Whereabouts
from framework.campaign.space import (
    CANDIDATES,
    SPOTS,
    Cell,
    Struck,
    candidates,
    choose,
    draw,
    expected,
    images_of,
    prevented,
    stages_of,
    trigger_name,
    universe,
    worth,
)
from framework.console import Line
from framework.faults import (
    After,
    Fault,
    FaultError,
    after,
    bit_flip,
    boot_env_write,
    brown_out,
    connection,
    console,
    downloaded,
    flush,
    link_down,
    name_gone,
    on_record,
    operation,
    power_cut,
    process_killed,
    slot_write,
    state,
    storage_error,
)
from framework.faults.values import from_values, to_values
from framework.targets.uut import BrownoutUpdater

ALL = frozenset({"emulated", "power-cut", "uboot", "network", "link", "rtc", "watchdog"})
BARE = frozenset({"power-cut", "network"})
CUT = power_cut("torn").when(slot_write(percent=50))
UPDATE = (Step("install", "v2"), Step("restart"))


@settings(deadline=None)
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


def test_the_many_cells_of_power_cuts_do_not_keep_other_faults_waiting() -> None:
    """Nearly every kind of fault is drawn within 80 runs, although cuts are half of all cells."""
    struck: Counter[Cell] = Counter()
    for index in range(80):
        offered = candidates(ALL, 5, index)
        struck.update(expected(offered[choose(offered, struck)]))
    kinds = {cell.fault for cell in universe(ALL)}
    assert len(kinds - {cell.fault for cell in struck}) <= len(kinds) // 10


def test_an_unknown_cell_is_worth_more_than_well_known_ones() -> None:
    new = Composition("v1", UPDATE, (Placed(0, CUT),))
    known = Composition("v1", UPDATE, (Placed(0, power_cut("kept").when(state("Download"))),))
    struck = Counter(dict.fromkeys(expected(known), 9))
    assert choose([known, new], struck) == 1
    so_far = Struck.of(struck)
    assert worth(known, so_far) < worth(new, so_far) / 5
    assert choose([known, known], struck) == 0, "a tie is the first"


def test_a_rare_kind_of_fault_is_worth_more_than_one_more_cell_of_a_common_one() -> None:
    cut = [
        Composition("v1", UPDATE, (Placed(1, power_cut(model).when(trigger)),))
        for model in ("kept", "torn", "subset")
        for trigger in (state("Cleanup"), console("updater: committed"), on_record("Cleanup"))
    ]
    error = storage_error("write", area="passive slot").when(slot_write(percent=50))
    rare = Composition("v1", UPDATE, (Placed(0, error),))
    struck = Counter(cell for one in cut[:-1] for cell in expected(one))
    assert choose([cut[-1], rare], struck) == 1
    struck.update(expected(rare))
    assert choose([cut[-1], rare], struck) == 0


def test_what_never_strikes_where_it_is_expected_is_not_tried_for_ever() -> None:
    one = Composition("v1", UPDATE, (Placed(0, CUT),))
    other = Composition("v1", UPDATE, (Placed(0, power_cut("kept").when(state("Download"))),))
    struck = Counter(dict.fromkeys(expected(other), 3))
    assert choose([other, one], struck) == 1
    assert choose([other, one], struck, Counter(dict.fromkeys(expected(one), 40))) == 0
    assert Struck.of(struck).cells == Struck.of(struck, struck).cells, "what struck counts once"


# -- what prevents what --------------------------------------------------------------------------

WRITE_ERROR = storage_error("write", area="passive slot", count=1).when(slot_write(percent=40))
LATE = connection("fin").when(downloaded(percent=90))
NO_CABLE = link_down().when(console("BROWNOUT INIT slot="))
ROLLING = power_cut().when(state("ArtifactRollback"))
SICK = (Step("install", "unhealthy"), Step("restart"))


@pytest.mark.parametrize(
    ("steps", "faults", "which"),
    [
        (UPDATE, ((0, CUT), (0, power_cut().when(slot_write(percent=70)))), (False, True)),
        (UPDATE, ((0, WRITE_ERROR), (0, CUT)), (False, True)),
        (UPDATE, ((0, CUT), (0, process_killed().when(state("ArtifactReboot")))), (False, True)),
        (UPDATE, ((0, connection("fin").when(downloaded(percent=20))), (0, CUT)), (False, False)),
        (UPDATE, ((0, bit_flip().when(slot_write(percent=60))), (0, CUT)), (True, False)),
        (UPDATE, ((0, CUT), (1, power_cut().when(state("ArtifactCommit")))), (False, False)),
        (UPDATE, ((0, name_gone()), (1, power_cut().when(state("Cleanup")))), (False, True)),
        (
            UPDATE,
            ((0, power_cut().when(state("ArtifactReboot"))), (1, power_cut().when(flush(2)))),
            (False, True),
        ),
        (SICK, ((1, NO_CABLE), (1, ROLLING)), (False, True)),
        (SICK, ((1, power_cut().when(flush(1))), (1, ROLLING)), (False, True)),
        (SICK, ((1, ROLLING), (1, power_cut().when(after(ROLLING, flush(1))))), (False, False)),
        (UPDATE, ((0, CUT), (0, power_cut().when(after(CUT, operation(3))))), (False, False)),
        (
            UPDATE,
            ((0, WRITE_ERROR), (0, power_cut().when(after(WRITE_ERROR, flush(1))))),
            (False, True),
        ),
        (UPDATE, ((0, LATE), (0, CUT.when(after(LATE, slot_write(percent=30))))), (False, True)),
        (UPDATE, ((0, LATE), (0, CUT.when(after(LATE, slot_write(percent=5))))), (False, False)),
        (UPDATE, ((0, LATE), (0, CUT.when(after(LATE, state("Download"))))), (False, True)),
        (
            UPDATE,
            ((0, brown_out(3).when(flush(1))), (0, CUT.when(after(brown_out(3).when(flush(1)))))),
            (False, True),
        ),
    ],
)
def test_a_fault_that_another_one_keeps_from_striking_is_known(
    steps: tuple[Step, ...], faults: tuple[tuple[int, Fault], ...], which: tuple[bool, ...]
) -> None:
    placed = tuple(Placed(step, fault) for step, fault in faults)
    assert prevented(Composition("v1", steps, placed)) == which


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, CANDIDATES - 1), st.sampled_from((ALL, BARE)))
def test_no_fault_is_drawn_that_another_one_prevents(
    index: int, candidate: int, features: frozenset[str]
) -> None:
    drawn = draw(features, 7, index, candidate)
    ending = [p for p, vain in zip(drawn.faults, prevented(drawn), strict=True) if vain]
    assert not ending, str(drawn)


def test_a_cut_may_come_within_every_state_and_not_only_as_it_begins() -> None:
    for stage, spots in SPOTS.items():
        kinds: dict[str, set[str]] = {}
        for spot in spots:
            kinds.setdefault(spot.expects, set()).add(trigger_name(spot.make(Random(1))))
        for name, triggers in kinds.items():
            if "state" in triggers and name != "Download":
                assert "within a state" in triggers, f"{name} in {stage}"


# -- where a fault struck ------------------------------------------------------------------------


def test_a_start_is_known_by_what_it_is_for() -> None:
    whereabouts = Whereabouts(BrownoutUpdater())
    seen = []
    for text in (
        "U-Boot 2023.01",
        "updater: state ArtifactRollbackReboot",
        "U-Boot 2023.01",
        "BROWNOUT INIT slot=a",
        "updater: state Cleanup",
        "updater: state Idle",
        "BROWNOUT INIT slot=a",
    ):
        whereabouts.heard(Line("RX", 0, 0, 0, 1, text))
        seen.append(whereabouts.now)
    assert seen == [
        "bootloader",
        "ArtifactRollbackReboot",
        "bootloader after ArtifactRollbackReboot",
        "start after ArtifactRollbackReboot",
        "Cleanup",
        "Idle",
        "start",
    ]


@pytest.mark.parametrize(
    ("steps", "fault", "place"),
    [
        (UPDATE, power_cut().when(console("BROWNOUT INIT slot=")), "start after ArtifactReboot"),
        (SICK, power_cut().when(console("BROWNOUT INIT slot=")), "start after ArtifactReboot"),
        (
            SICK,
            power_cut().when(console("BROWNOUT INIT slot=a")),
            "start after ArtifactRollbackReboot",
        ),
        (
            SICK,
            power_cut().when(boot_env_write(1, after="ArtifactRollbackReboot")),
            "bootloader after ArtifactRollbackReboot",
        ),
        (SICK, power_cut().when(boot_env_write(1, after="ArtifactRollback")), "ArtifactRollback"),
        (SICK, power_cut().when(after(ROLLING, flush(1))), "start after ArtifactRollback"),
    ],
)
def test_a_start_is_expected_by_what_it_is_for(
    steps: tuple[Step, ...], fault: Fault, place: str
) -> None:
    waits = isinstance(fault.trigger, After)
    placed = (*((Placed(1, ROLLING),) if waits else ()), Placed(1, fault))
    assert expected(Composition("v1", steps, placed))[-1].state == place


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
