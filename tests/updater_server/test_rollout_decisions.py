"""The rollout's decisions, alone: no server, no database, no clock."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updater.server.rollout import (
    FAILED,
    REPORTABLE,
    STARTED,
    SUCCEEDED,
    UNSETTLED,
    Finish,
    Open,
    Phase,
    Status,
    Stop,
    Tally,
    Wait,
    Window,
    decide,
    in_window,
    phase_sizes,
    report,
    retry_delay_s,
)

CANARY = (Phase(count=1, success_percent=100), Phase(share=10, delay_s=60), Phase())


@given(
    st.lists(
        st.one_of(
            st.builds(Phase, count=st.integers(1, 500)),
            st.builds(Phase, share=st.floats(0.1, 100)),
        ),
        max_size=6,
    ),
    st.integers(0, 3000),
)
def test_phases_hold_every_device_once(phases: list[Phase], total: int) -> None:
    sizes = phase_sizes([*phases, Phase()], total)
    assert sum(sizes) == total
    assert all(size >= 0 for size in sizes)
    # Nobody waits for a phase that has nobody while a later one has.
    assert sizes[0] >= 1 or total == 0


def test_phases_by_count_and_by_percentage() -> None:
    assert phase_sizes(CANARY, 1000) == [1, 100, 899]
    assert phase_sizes(CANARY, 2) == [1, 1, 0]


def test_a_phase_opens_when_enough_of_the_one_before_succeeded() -> None:
    waiting = [Tally(1, unsettled=1), Tally(100, unsettled=100), Tally(899, unsettled=899)]
    done = [Tally(1, succeeded=1), *waiting[1:]]
    assert decide(CANARY, waiting, -1, 0, 5, 0) == Open(0)
    assert decide(CANARY, waiting, 0, 0, 5, 0) == Wait()
    assert decide(CANARY, done, 0, 0, 5, 0) == Open(1)
    most = [done[0], Tally(100, succeeded=90, unsettled=10), waiting[2]]
    assert decide(CANARY, most, 1, 1000, 5, 1059) == Wait()
    assert decide(CANARY, most, 1, 1000, 5, 1060) == Open(2)


def test_one_failed_canary_stops_the_rollout() -> None:
    failed = [Tally(1, failed=1), Tally(100, unsettled=100), Tally(899, unsettled=899)]
    decision = decide(CANARY, failed, 0, 0, 5, 0)
    assert isinstance(decision, Stop)
    assert "1 of 1 devices failed" in decision.reason


def test_failures_up_to_the_threshold_are_borne() -> None:
    phases = (Phase(),)
    assert decide(phases, [Tally(100, 90, 5, 5)], 0, 0, 5, 0) == Wait()
    assert isinstance(decide(phases, [Tally(100, 90, 6, 4)], 0, 0, 5, 0), Stop)


def test_a_phase_that_ends_short_of_its_successes_stops() -> None:
    tallies = [Tally(10, succeeded=8, failed=2), Tally(90, unsettled=90)]
    assert isinstance(decide((Phase(count=10), Phase()), tallies, 0, 0, 100, 0), Stop)


def test_all_settled_is_finished() -> None:
    assert decide((Phase(),), [Tally(3, succeeded=2, failed=1)], 0, 0, 100, 0) == Finish()


def test_a_phase_of_devices_that_are_gone_does_not_hold_the_rest() -> None:
    gone = [Tally(1), Tally(9, unsettled=9)]
    assert decide((Phase(count=1), Phase()), gone, 0, 0, 5, 0) == Open(1)


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50)),
        min_size=3,
        max_size=3,
    ),
    st.integers(-1, 2),
    st.floats(0, 100),
)
def test_no_decision_opens_a_phase_past_the_threshold(
    rows: list[tuple[int, int, int]], open_phase: int, threshold: float
) -> None:
    tallies = [Tally(sum(row), *row) for row in rows]
    decision = decide(CANARY, tallies, open_phase, 0, threshold, 1e9)
    let_go = sum(tallies[: open_phase + 1], Tally())
    if isinstance(decision, Open):
        assert decision.phase == open_phase + 1 < len(CANARY)
        assert let_go.failed * 100 <= threshold * max(let_go.total, 1)
    if isinstance(decision, Finish):
        assert sum(tallies, Tally()).unsettled == 0


@pytest.mark.parametrize(
    ("moment", "inside"),
    [
        ("2026-01-05T22:00", True),  # a Monday
        ("2026-01-05T21:59", False),
        ("2026-01-06T03:59", True),  # Tuesday morning belongs to Monday's window
        ("2026-01-06T04:00", False),
        ("2026-01-06T23:00", False),
        ("2026-01-07T01:00", False),
    ],
)
def test_a_window_over_midnight_belongs_to_the_day_it_began(moment: str, inside: bool) -> None:
    window = Window((0,), 22 * 60, 4 * 60, "UTC")
    at = datetime.datetime.fromisoformat(moment).replace(tzinfo=datetime.UTC).timestamp()
    assert in_window(window, at) is inside


def test_a_window_is_local_time_also_in_summer() -> None:
    window = Window(tuple(range(7)), 2 * 60, 3 * 60, "Europe/Berlin")
    noon_utc = datetime.datetime(2026, 7, 1, 0, 30, tzinfo=datetime.UTC).timestamp()
    assert in_window(window, noon_utc)
    assert not in_window(window, noon_utc + 3600)


@given(st.sampled_from(sorted(Status)), st.sampled_from(sorted(REPORTABLE)), st.integers(0, 3))
def test_a_report_never_reopens_what_a_device_ended(
    current: Status, reported: Status, attempts: int
) -> None:
    if current in (Status.ABORTED, Status.DECOMMISSIONED):
        return
    change = report(current, reported, attempts, 3, offered=True)
    if current in SUCCEEDED | {Status.FAILURE, Status.NO_ARTIFACT}:
        assert change is None
    elif change is not None:
        assert change.open is (change.status in UNSETTLED)
        assert change.status == reported or (
            reported == Status.FAILURE and change.status == Status.PENDING
        )


def test_a_failure_is_tried_again_as_often_as_asked_and_no_more() -> None:
    attempts, status = 0, Status.DOWNLOADING
    for _ in range(2):
        change = report(Status.INSTALLING, Status.FAILURE, attempts, 2, offered=True)
        assert change is not None
        status, attempts = change.status, change.attempts
        assert status == Status.PENDING
    last = report(Status.INSTALLING, Status.FAILURE, attempts, 2, offered=True)
    assert last is not None
    assert (last.status, last.open) == (Status.FAILURE, False)


def test_a_repeated_failure_does_not_use_up_the_retry() -> None:
    assert report(Status.PENDING, Status.FAILURE, 1, 2, offered=False) is None


def test_retries_wait_longer_each_time_and_never_more_than_a_day() -> None:
    assert [retry_delay_s(n, 60) for n in (1, 2, 3)] == [60, 120, 240]
    assert retry_delay_s(1000, 60) == 86_400


def test_every_status_is_settled_or_not() -> None:
    assert not UNSETTLED & (SUCCEEDED | FAILED)
    assert STARTED < UNSETTLED
