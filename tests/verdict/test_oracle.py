"""The static oracle decides as the boot contract says, for every state of disk and environment."""

import itertools

import pytest

from framework.verdict import BootEnvironment, Decision, SlotContent, SlotState, next_boot

WHOLE = SlotState(SlotContent.IMAGE, "v1")
MIXED = SlotState(SlotContent.MIXED)
BLANK = SlotState(SlotContent.UNLOADABLE)


@pytest.mark.parametrize(
    ("environment", "a", "b", "decision"),
    [
        (BootEnvironment(2, "a"), WHOLE, BLANK, Decision("a")),
        (BootEnvironment(1, "b"), WHOLE, WHOLE, Decision("b")),
        (BootEnvironment(2, "b"), WHOLE, BLANK, Decision("a")),
        (BootEnvironment(2, "b", True, 0), WHOLE, WHOLE, Decision("b", on_trial=True)),
        (BootEnvironment(2, "b", True, 1), WHOLE, WHOLE, Decision("a", rolled_back=True)),
        (BootEnvironment(2, "b", True, 0), WHOLE, BLANK, Decision("a", rolled_back=True)),
        (BootEnvironment(2, "a", True, 1), WHOLE, BLANK, Decision("a", rolled_back=True)),
        (BootEnvironment(2, "a", True, 1), BLANK, BLANK, Decision(None, rolled_back=True)),
        (BootEnvironment(0), BLANK, WHOLE, Decision("b")),
        (BootEnvironment(0), WHOLE, WHOLE, Decision("a")),
        (BootEnvironment(0), BLANK, BLANK, Decision(None)),
        (BootEnvironment(2, "a"), BLANK, BLANK, Decision(None)),
    ],
)
def test_decision(
    environment: BootEnvironment, a: SlotState, b: SlotState, decision: Decision
) -> None:
    assert next_boot(environment, {"a": a, "b": b}) == decision


def test_a_loadable_slot_is_always_found_and_an_unloadable_one_never_chosen() -> None:
    contents = [WHOLE, MIXED, BLANK]
    environments = [
        BootEnvironment(copies, slot, trial, count)
        for copies, slot, trial, count in itertools.product(
            (0, 1, 2), ("a", "b"), (False, True), (0, 1, 2)
        )
    ]
    for environment, a, b in itertools.product(environments, contents, contents):
        slots = {"a": a, "b": b}
        decision = next_boot(environment, slots)
        if decision.slot is not None:
            assert slots[decision.slot] is not BLANK
        else:
            assert a is BLANK
            assert b is BLANK
