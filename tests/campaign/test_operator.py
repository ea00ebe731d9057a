"""An operator does anything in any order, with faults in between; Hypothesis finds what is odd.

Hypothesis' rules act on one simulated device; at the end of each example the update is tried once
more without faults, and the judge looks at everything that was seen. What fails is shrunk by
Hypothesis, and said as a schedule, which `brownout simulate --replay` lives through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulated_bugs import BUGS

from framework.campaign.lifetimes import Life, Schedule, live
from framework.campaign.models import CACHE_MODELS
from framework.targets.simulated.laboratory import Laboratory

MOST_FAULTS = 6


def machine_of(laboratory: Laboratory) -> type[RuleBasedStateMachine]:
    """The operator's rules on the devices of a laboratory."""

    class Operator(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.actions: list[str] = []
            self.faults = 0

        @initialize(
            behaviour=st.sampled_from(["well", "panics", "hangs", "unhealthy"]),
            fresh=st.booleans(),
        )
        def power_on(self, behaviour: str, fresh: bool) -> None:
            self.life = Life(laboratory, Schedule(behaviour=behaviour, actions=(), fresh=fresh))
            self.life.begin()

        @rule(
            action=st.sampled_from(["install", "stage", "restart", "commit", "rollback", "resume"])
        )
        def act(self, action: str) -> None:
            self.actions.append(action)
            self.life.act(action)

        @precondition(lambda self: self.faults < MOST_FAULTS)
        @rule(
            ahead=st.integers(1, 150),
            kind=st.sampled_from(["cut", "cut", "error", "flip", "kill"]),
            model=st.sampled_from(CACHE_MODELS),
            seed=st.integers(0, 1 << 16),
        )
        def arm(self, ahead: int, kind: str, model: str, seed: int) -> None:
            self.faults += 1
            self.life.arm(ahead, kind, model if kind == "cut" else "kept", seed)

        def teardown(self) -> None:
            if not hasattr(self, "life"):
                return
            lifetime = self.life.end()
            schedule = dataclasses.replace(lifetime.schedule, actions=tuple(self.actions))
            assert not lifetime.verdict.violated, f"{lifetime.verdict}: {schedule.to_json()}"
            # Said as a schedule it is the same lifetime, bit for bit.
            again = live(laboratory, schedule)
            assert again.lines == lifetime.lines
            assert again.events == lifetime.events

    return Operator


def run(laboratory: Laboratory, examples: int) -> None:
    """Let Hypothesis play the operator."""
    machine: Any = machine_of(laboratory).TestCase
    machine.settings = settings(
        max_examples=examples,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    machine("runTest").runTest()


@pytest.fixture
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


def test_whatever_an_operator_does_is_survived(laboratory: Laboratory) -> None:
    run(laboratory, 25)


@pytest.mark.night
def test_whatever_an_operator_does_all_night_is_survived(laboratory: Laboratory) -> None:
    run(laboratory, 3000)


@pytest.mark.parametrize("bug", ["no-health-check", "rollback-forgets-environment"])
def test_an_operator_finds_a_planted_bug(bug: str) -> None:
    laboratory = BUGS[bug].laboratory()
    try:
        with pytest.raises(AssertionError, match=r"VIOLATION\("):
            run(laboratory, 100)
    finally:
        laboratory.close()
