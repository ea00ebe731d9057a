"""A board behind labgrid's power driver and ser2net: cuts, and every fault that a rig can have.

A rig's fault must end in INFRASTRUCTURE, and never in a statement about the product.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from bench_desk import Desk

from framework.console import ConsoleLost, Line
from framework.targets.bench import serial_port
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.strategy import BootFailure, Fate

Rig = Callable[..., Any]


def test_it_boots_runs_commands_and_is_off_in_the_end(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    assert strategy.run("echo one; echo two; exit 3").lines == ("one", "two")
    assert strategy.run("exit 3").code == 3
    strategy.transition("off")
    assert not board.on
    assert board.process is None
    strategy.transition("bootloader")
    strategy.transition("off")


def test_power_goes_at_a_line_of_the_console_and_ends_the_wait(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    power = strategy.power

    def heard(line: Line) -> None:
        if line.direction == "RX" and line.text.startswith("now"):
            power.trip("power cut at now")

    forget = strategy.pump.add_listener(heard)
    with pytest.raises(ConsoleLost, match="power cut at now"):
        strategy.run("echo; echo now; sleep 300", 120)
    forget()
    assert power.power_lost.is_set()
    assert "power cut at now" in power.power_loss.cause
    assert not board.on
    first, last = power.last_cut_between_s
    assert 0 <= first <= last < 20
    outcome = strategy.boot()
    assert outcome.ready
    assert outcome.starts == 1
    assert power.power_loss is None


def test_a_cut_in_the_middle_of_a_start_is_power_lost(desk: Desk, rig: Rig) -> None:
    strategy = rig(desk.board()).get_strategy()
    strategy.transition("off")

    def heard(line: Line) -> None:
        if "BROWNOUT INIT" in line.text:
            strategy.power.trip("cut at INIT")

    forget = strategy.pump.add_listener(heard)
    assert strategy.boot().fate is Fate.POWER_LOST
    forget()
    assert strategy.boot().ready


def test_a_board_that_hangs_is_the_products_failure(desk: Desk, rig: Rig) -> None:
    strategy = rig(desk.board(variant="hangs"), budget_s=3.0).get_strategy()
    with pytest.raises(BootFailure):
        strategy.transition("ready")


def test_a_relay_that_sticks_is_noticed_by_the_console(desk: Desk, rig: Rig) -> None:
    board = desk.board(variant="chatty")
    strategy = rig(board).get_strategy()
    strategy.transition("off")
    since = strategy.pump.position
    board.switch(True)
    strategy.pump.wait_for("still here", 60, since)
    board.weld(True)
    strategy.invalidate()
    with pytest.raises(InfrastructureError, match="still talks after power"):
        strategy.transition("off")


def test_a_relay_that_sticks_makes_no_cut(desk: Desk, rig: Rig) -> None:
    board = desk.board(variant="chatty")
    strategy = rig(board).get_strategy()
    strategy.transition("off")
    board.weld(True)
    since = strategy.pump.position
    strategy.power.on()
    strategy.pump.wait_for("still here", 60, since)
    strategy.power.trip("cut now")
    strategy.power.settle()
    assert strategy.power.power_loss is None
    assert "still talks" in strategy.power.failure
    with pytest.raises(InfrastructureError, match="still talks"):
        strategy.await_boot(budget_s=1.0)


def test_a_head_that_hangs_is_infrastructure_and_not_for_ever(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    strategy.power.switch_timeout_s = 1.5
    board.hangs.set()
    began = time.monotonic()
    with pytest.raises(InfrastructureError, match=r"power head did not answer within 1.5 s"):
        strategy.transition("off")
    assert time.monotonic() - began < 20
    with pytest.raises(InfrastructureError, match="still owes the answer"):
        strategy.transition("off")
    board.hangs.clear()
    deadline = time.monotonic() + 20
    while strategy.power._asked.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    strategy.power.switch_timeout_s = 30.0
    strategy.transition("ready")


def test_a_head_that_hangs_in_a_cut_is_infrastructure(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    strategy.power.switch_timeout_s = 1.5
    board.hangs.set()
    threading.Timer(0.3, lambda: strategy.power.trip("cut")).start()
    with pytest.raises(InfrastructureError, match="did not answer"):
        strategy.run("sleep 200", 90)


def test_a_cut_waits_for_an_order_that_is_being_answered(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    board.hangs.set()
    asking = threading.Thread(target=strategy.power.get, daemon=True)
    asking.start()
    strategy.power.trip("cut while it is asked")
    time.sleep(0.3)
    assert board.process is not None
    board.hangs.clear()
    assert strategy.power.power_lost.wait(30), strategy.power.failure
    asking.join(30)
    assert board.process is None


def test_a_serial_line_that_is_gone_keeps_no_power_on(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    board.serial.pull_out()
    deadline = time.monotonic() + 20
    while strategy.pump.gone is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(InfrastructureError, match=r"cannot be (used|opened)"):
        strategy.transition("off")
    assert not board.on


def test_a_head_that_is_gone_is_infrastructure(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    del desk.boards[board.number]
    try:
        with pytest.raises(InfrastructureError, match="the power head failed: HTTPError: 404"):
            strategy.transition("off")
    finally:
        desk.boards[board.number] = board


def test_an_adapter_that_vanishes_in_a_command_is_infrastructure(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("ready")
    threading.Timer(0.5, board.serial.pull_out).start()
    with pytest.raises((ConsoleLost, InfrastructureError)) as caught:
        strategy.run("sleep 200", 90)
    assert strategy.power.power_loss is None, caught.value
    board.serial.plug_in()
    strategy.transition("ready")
    assert strategy.run("echo back").text == "back"


def test_an_adapter_that_vanishes_in_a_start_is_infrastructure(desk: Desk, rig: Rig) -> None:
    board = desk.board(variant="hangs")
    strategy = rig(board, budget_s=20.0).get_strategy()
    strategy.transition("off")
    threading.Timer(0.8, board.serial.pull_out).start()
    with pytest.raises(InfrastructureError):
        strategy.boot()


def test_garbage_while_power_rises_disturbs_no_boot(desk: Desk, rig: Rig) -> None:
    board = desk.board(serial_port.Line(baud=0, garbage_bytes=200, seed=3))
    strategy = rig(board).get_strategy()
    for _ in range(3):
        assert strategy.boot().ready
    assert strategy.run("echo fine").text == "fine"


def test_the_recovery_line_is_used_and_bounded(desk: Desk, rig: Rig) -> None:
    board = desk.board()
    strategy = rig(board).get_strategy()
    strategy.transition("off")
    strategy.power.fresh()
    assert board.restored == 1
    del desk.boards[board.number]
    try:
        with pytest.raises(InfrastructureError, match="the recovery failed"):
            strategy.power.fresh()
    finally:
        desk.boards[board.number] = board


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"disks": {"vda": "sda"}}, r"disks: must be like"),
        ({"switch_timeout_s": 0}, r"switch_timeout_s: must be positive"),
        ({"min_off_s": -1}, r"min_off_s: must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    from framework.targets.switched import check_settings

    with pytest.raises(RigError, match=message):
        check_settings("rig.yaml", change)
