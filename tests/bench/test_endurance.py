"""Power cycles by the hundred, on little boards: counted, resumed, and the rig's failures apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_desk import Desk

from framework.targets.endurance import Cycle, CycleRecord, Tally, endure
from framework.targets.errors import RigError
from framework.targets.health import strategy_of

Rig = Callable[..., Any]


def test_each_cycle_is_a_new_boot_and_an_interrupted_count_goes_on(
    desk: Desk, rig: Rig, tmp_path: Path
) -> None:
    board = desk.board()
    strategy = strategy_of(rig(board))
    seen: list[tuple[int, str]] = []

    def interrupt(number: int, cycle: Cycle) -> None:
        seen.append((number, cycle.verdict))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with CycleRecord(tmp_path / "a.db") as record:
        with pytest.raises(KeyboardInterrupt):
            endure(strategy, record, "one", 5, say=interrupt)
        assert record.tally("one").done == 2
        tally = endure(strategy, record, "one", 5, say=interrupt)
        assert (tally.ready, tally.not_ready, tally.spoilt) == (5, 0, 0)
        assert endure(strategy, record, "one", 5) == tally
        assert record.tally("two").done == 0
    assert seen == [(n, "ready") for n in range(1, 6)]
    assert len(tally.boots_s) == 5
    assert str(tally).startswith("one: 5 power cycles: 5 ready, 0 not; 0 INFRASTRUCTURE (0.0 %); ")
    assert not board.on


def test_what_the_rig_spoils_is_counted_apart_and_done_again(
    desk: Desk, rig: Rig, tmp_path: Path
) -> None:
    board = desk.board()
    strategy = strategy_of(rig(board))
    said: list[Cycle] = []

    def weld(number: int, cycle: Cycle) -> None:
        said.append(cycle)
        board.weld(number == 2)

    with CycleRecord(tmp_path / "a.db") as record:
        tally = endure(strategy, record, "one", 4, say=weld)
        assert (tally.ready, tally.not_ready, tally.spoilt) == (2, 0, 3)
        assert tally.spoilt_share == pytest.approx(0.6)
        assert [cycle.verdict for cycle in said] == ["ready"] * 2 + ["INFRASTRUCTURE"] * 3
        assert "still answers after the power was cut" in said[-1].fact
        board.weld(False)
        board.switch(False)
        tally = endure(strategy, record, "one", 4)
        assert (tally.ready, tally.not_ready, tally.spoilt) == (4, 0, 3)


def test_a_board_that_does_not_come_back_is_no_failure_of_the_rig(
    desk: Desk, rig: Rig, tmp_path: Path
) -> None:
    strategy = strategy_of(rig(desk.board(variant="hangs"), budget_s=2.0))
    with CycleRecord(tmp_path / "a.db") as record:
        tally = endure(strategy, record, "one", 2)
    assert (tally.ready, tally.not_ready, tally.spoilt) == (0, 2, 0)


def test_it_ends_when_the_time_is_over(desk: Desk, rig: Rig, tmp_path: Path) -> None:
    strategy = strategy_of(rig(desk.board()))
    with CycleRecord(tmp_path / "a.db") as record:
        assert 0 < endure(strategy, record, "one", 1000, seconds=2.0).done < 20


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"something else" * 300)
    with pytest.raises(RigError, match=r"^record .*a\.db: damaged"):
        CycleRecord(tmp_path / "a.db")
    assert Tally("one", 0, 0, 0, ()).spoilt_share == 0.0
