"""The recovery decision row by row, and the small pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updater.device.model import (
    Boot,
    Decision,
    Part,
    State,
    Update,
    decide,
    fallback_cause,
    provides_after,
)

ON_SOURCE = Boot("a", False)
TRIAL = Boot("b", True)
KEPT = Boot("b", False)
UNREADABLE = Boot(None, False)

ROWS = [
    # running, state, boot environment, restarted, decision
    ("b", State.COMMIT, KEPT, False, Decision.FINISH_COMMIT),
    ("b", State.COMMIT, KEPT, True, Decision.FINISH_COMMIT),
    ("b", State.COMMIT, TRIAL, True, Decision.PROVE),
    ("b", State.INSTALL, TRIAL, True, Decision.PROVE),
    ("b", State.REBOOT, TRIAL, True, Decision.PROVE),
    ("b", State.REBOOT, UNREADABLE, True, Decision.PROVE),
    ("b", State.VERIFY, TRIAL, False, Decision.PROVE),
    ("b", State.ROLLBACK, TRIAL, False, Decision.ROLL_BACK),
    ("b", State.ROLLBACK, KEPT, True, Decision.ROLL_BACK),
    ("b", State.ROLLBACK, ON_SOURCE, False, Decision.REBOOT_AGAIN),
    ("b", State.ROLLBACK, ON_SOURCE, True, Decision.STRANDED),
    ("b", State.DOWNLOAD, TRIAL, True, Decision.ROLL_BACK),
    ("a", State.DOWNLOAD, ON_SOURCE, True, Decision.CLOSE_INTERRUPTED),
    ("a", State.DOWNLOAD, ON_SOURCE, False, Decision.CLOSE_INTERRUPTED),
    ("a", State.INSTALL, ON_SOURCE, True, Decision.CLOSE_INTERRUPTED),
    ("a", State.INSTALL, TRIAL, False, Decision.AWAIT_REBOOT),
    ("a", State.INSTALL, TRIAL, True, Decision.CLOSE_ROLLED_BACK),
    ("a", State.REBOOT, TRIAL, False, Decision.AWAIT_REBOOT),
    ("a", State.REBOOT, ON_SOURCE, True, Decision.CLOSE_ROLLED_BACK),
    ("a", State.REBOOT, TRIAL, True, Decision.CLOSE_ROLLED_BACK),
    ("a", State.VERIFY, ON_SOURCE, True, Decision.CLOSE_ROLLED_BACK),
    ("a", State.COMMIT, KEPT, True, Decision.CLOSE_ROLLED_BACK),
    ("a", State.ROLLBACK, ON_SOURCE, True, Decision.CLOSE_ROLLED_BACK),
]


def update(state: State, cause: str = "") -> Update:
    return Update("v2", "v1", "a", "b", state, "boot-1", cause)


@pytest.mark.parametrize(("running", "state", "boot", "restarted", "decision"), ROWS)
def test_decision(
    running: str, state: State, boot: Boot, restarted: bool, decision: Decision
) -> None:
    assert decide(update(state), running, boot, "boot-2" if restarted else "boot-1") is decision


@pytest.mark.parametrize("kind", ["rootfs-image", "script"])
@pytest.mark.parametrize("restarted", [False, True])
def test_only_an_installation_that_was_held_and_not_begun_goes_on(
    kind: str, restarted: bool
) -> None:
    boot_id = "boot-2" if restarted else "boot-1"
    held = update(State.INSTALL)._replace(part=Part.WAIT, kind=kind)
    assert decide(held, "a", ON_SOURCE, boot_id) is Decision.HELD
    for begun in (part for part in Part if part is not Part.WAIT):
        assert decide(held._replace(part=begun), "a", ON_SOURCE, boot_id) is not Decision.HELD
    if kind == "rootfs-image":
        assert decide(held, "a", TRIAL, boot_id) is not Decision.HELD
        assert decide(held, "b", TRIAL, boot_id) is not Decision.HELD


@given(
    st.sampled_from("ab"),
    st.sampled_from(State),
    st.builds(Boot, st.sampled_from(["a", "b", None]), st.booleans()),
    st.booleans(),
)
def test_no_decision_keeps_an_unproven_system(
    running: str, state: State, boot: Boot, restarted: bool
) -> None:
    """Only a system whose commit had begun, in an environment that says so, is kept unchecked."""
    decision = decide(update(state), running, boot, "boot-2" if restarted else "boot-1")
    if decision is Decision.FINISH_COMMIT:
        assert (running, state, boot) == ("b", State.COMMIT, KEPT)


def test_the_recorded_cause_wins() -> None:
    assert fallback_cause(update(State.VERIFY, "50-sick failed")) == "50-sick failed"
    assert "did not come up" in fallback_cause(update(State.REBOOT))
    assert all(fallback_cause(update(state)) for state in State)


def test_provides_are_cleared_by_pattern() -> None:
    old = {"artifact_name": "v1", "rootfs-image.version": "v1", "app.version": "7"}
    new = {"artifact_name": "v2", "rootfs-image.version": "v2"}
    assert provides_after(old, new, ("rootfs-image.*",)) == {**new, "app.version": "7"}
    assert provides_after(old, {"artifact_name": "v2"}, None) == {"artifact_name": "v2"}
