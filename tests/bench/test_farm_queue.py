"""What runs next, and what is remembered of boards: without a farm."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.console import ConsoleDeath, ConsoleLost, ConsoleTimeout
from framework.farm.history import Attempt, History, percentile
from framework.farm.queue import Queue, longest_first
from framework.report import ResultStore, write_report
from framework.targets.blame import infrastructure_in
from framework.targets.errors import InfrastructureError, RigError


def test_the_longest_come_first_and_unknown_ones_before_them() -> None:
    assert longest_first(["a", "b", "c", "d"], {"a": 1.0, "b": 9.0, "d": 5.0}) == [2, 1, 3, 0]


def test_what_failed_on_a_place_goes_to_another_if_there_is_one() -> None:
    queue = Queue([0, 1])
    assert queue.take("one", ["two"]) == 0
    assert queue.infrastructure(0, "one")
    assert queue.take("one", ["two"]) == 1
    assert queue.take("one", ["two"]) is None
    assert queue.take("two", ["one"]) == 0
    assert queue.infrastructure(0, "two")
    assert queue.take("one", ["two"]) == 0  # it failed everywhere
    assert not queue.infrastructure(0, "one")
    assert queue.pending == []


def test_a_lonely_place_tries_again_itself() -> None:
    queue = Queue([0], retries=1)
    assert queue.take("one", []) == 0
    assert queue.infrastructure(0, "one")
    assert queue.take("one", []) == 0
    assert not queue.infrastructure(0, "one")


@given(
    st.integers(1, 12),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200),
)
def test_every_scenario_is_run_and_none_too_often(
    count: int, retries: int, steps: list[tuple[str, bool]]
) -> None:
    queue = Queue(list(range(count)), retries)
    runs = dict.fromkeys(range(count), 0)
    done: set[int] = set()
    for place, rig_fails in [*steps, *((p, False) for p in "abc" * count * (retries + 1))]:
        index = queue.take(place, [other for other in "abc" if other != place])
        if index is None:
            continue
        assert index not in done
        runs[index] += 1
        if not rig_fails or not queue.infrastructure(index, place):
            done.add(index)
    assert done == set(range(count))
    assert all(1 <= times <= retries + 1 for times in runs.values())


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert percentile([5.0], 0.95) == 5.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def attempt(place: str, verdict: str, seconds: float = 2.0, scenario: str = "a::b") -> Attempt:
    boots = ((1.0, True), (3.0, True), (9.0, False)) if place else ()
    return Attempt("run", "board=x", place, scenario, verdict, "why", seconds, 4, boots)


def test_a_history_tells_of_boards_and_of_how_long_scenarios_take(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with History(path) as history:
        history.add(attempt("one", "PASS"))
        history.add(attempt("one", "INFRASTRUCTURE", 500.0))
        history.add(attempt("one", "FAILED"))
        history.add(attempt("two", "PASS", 4.0))
        history.add(attempt("", "INFRASTRUCTURE"))
    with History(path) as history:
        one, two = history.boards()
        assert (one.place, one.attempts, one.failures, one.infrastructure) == ("one", 3, 1, 1)
        assert (one.cycles, one.boots, one.unready) == (12, 6, 3)
        assert (one.boot_median_s, one.boot_p95_s) == (2.0, 3.0)
        assert one.infrastructure_rate == pytest.approx(1 / 3)
        assert two.attempts == 1
        assert history.seconds("board=x") == {"a::b": 3.0}
        assert history.seconds("board=y") == {}
        assert history.boards("another") == []
        report = write_report(
            ResultStore(tmp_path / "results").stored(), tmp_path / "r.html", "t", history.boards()
        ).read_text()
    assert '<th scope="row">one</th><td>3</td><td class="broken">1</td>' in report
    assert '<td class="rig">1 (33 %)</td>' in report


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE x (y)")
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database" * 1000)
    newer = tmp_path / "newer.db"
    with History(newer):
        pass
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version=99")
    for path in (other, garbage, newer, tmp_path):
        with pytest.raises(RigError, match=path.name):
            History(path)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001 - as pytest hands it over
        return caught


def test_what_the_product_did_wrong_stays_that() -> None:
    lost = ConsoleLost("the line ended (gone)")
    died = ConsoleDeath("panic", 0, waiting_for="", tail="", log=None)
    late = ConsoleTimeout("end of 'true'", 1.0, tail="", log=None)
    for error in (died, late, ConsoleLost("the machine restarted"), ConsoleLost("power cut at x")):
        assert infrastructure_in(raised(error)) == ""
    assert infrastructure_in(raised(AssertionError("x"), lost)) == ""
    assert infrastructure_in(raised(ValueError("x"), AssertionError("y"))) == ""
    assert infrastructure_in(raised(KeyError("a scenario's own mistake"))) == ""
    assert infrastructure_in(raised(lost)) == "console lost: the line ended (gone)"
    assert infrastructure_in(raised(InfrastructureError("gone"))) == "gone"
    assert infrastructure_in(raised(ValueError("x"), BrokenPipeError())) == "BrokenPipeError"
