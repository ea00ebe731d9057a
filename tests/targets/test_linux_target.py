"""The driver and the strategy on the real arm64 target: U-Boot, Linux, an A/B disk.

One machine serves the whole file; every test starts from whatever the last one left, which is
what the strategy is for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from targets_rigs import until

from framework.console import ConsoleDeath, ConsoleLost, ConsoleTimeout, Death, Marker
from framework.disk import JournalReader, Kind, Trigger
from framework.targets.errors import InfrastructureError
from framework.targets.rig import load_rig
from framework.targets.strategy import BootFailure, Fate, SlotStrategy, judge_silence

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"
BLOCK = 4096
T = TypeVar("T")

emulated = pytest.mark.emulated
slow = pytest.mark.slow

#: Writes numbered blocks to the passive slot, one operation each, for ever.
WRITER = (
    'python3 -c "import os,mmap; m=mmap.mmap(-1,4096); '
    "f=os.open('/dev/vda3',os.O_WRONLY|os.O_DIRECT)\n"
    'for i in range(1,250): m[:]=bytes([i])*4096; os.pwrite(f,m,(i-1)*4096)"'
)


@pytest.fixture(scope="module")
def slots() -> Iterator[SlotStrategy]:
    from images import build_target

    build_target("qemu-arm64", ("v1",))
    environment = load_rig(RIG)
    target = environment.get_target()
    assert target is not None
    strategy = target.get_strategy()
    yield strategy
    environment.cleanup()
    strategy.power.close()


@pytest.fixture(scope="module")
def slot_b(slots: SlotStrategy) -> int:
    """Where the passive slot begins, in bytes."""
    manifest = json.loads((RIG.parents[1] / "build/qemu-arm64/manifest.json").read_text())
    partitions = {p["name"]: p for p in manifest["layout"]["partitions"]}
    return int(partitions["rootfs-b"]["offset"])


@pytest.fixture
def ready(slots: SlotStrategy) -> SlotStrategy:
    slots.transition("ready")
    return slots


# -- states --------------------------------------------------------------------------------


@emulated
@slow
def test_ready_means_a_shell_on_a_known_slot(ready: SlotStrategy) -> None:
    assert ready.outcome is not None
    assert ready.outcome.boot is not None
    assert (ready.outcome.boot.version, ready.outcome.boot.slot) == ("v1", "a")
    assert ready.check("cat /proc/sys/kernel/random/boot_id") == ready.outcome.boot.boot_id
    assert ready.run("exit 7").code == 7
    assert ready.transition("ready") == []


@emulated
@slow
def test_the_bootloader_can_be_reached_although_its_countdown_is_zero(
    slots: SlotStrategy,
) -> None:
    slots.transition("bootloader")
    start = slots.pump.sendline("version")
    slots.pump.wait_for("gcc", 10, since=start)
    slots.transition("off")
    assert slots.power.get() is False
    assert slots.pump.gone is not None


# -- cuts ----------------------------------------------------------------------------------


@emulated
@slow
@pytest.mark.parametrize("number", [1, *random.Random(20).sample(range(2, 240), 3)])
def test_a_live_cut_at_operation_n_leaves_n_minus_one(
    slots: SlotStrategy, slot_b: int, number: int
) -> None:
    slots.transition("off")
    slots.power.fresh()
    slots.transition("ready")
    driver = slots.power
    before = driver.recorder.operations
    driver.arm_cut(Trigger.operation(number))
    began = time.monotonic()
    with pytest.raises(ConsoleLost, match=rf"before operation {before + number} "):
        slots.run(WRITER, 120)
    assert driver.power_lost.wait(10)
    assert driver.last_cut.operation == before + number - 1
    operations = JournalReader(driver.recorder.journal_path).operations
    assert len(operations.kind) == before + number - 1
    changed = [
        (int(offset) - slot_b) // BLOCK
        for kind, offset in zip(operations.kind, operations.offset, strict=True)
        if Kind(int(kind)) is Kind.WRITE and slot_b <= offset < slot_b + 250 * BLOCK
    ]
    assert len(changed) >= number - 1 - 4, "little else may write meanwhile"
    with driver.recorder.disk("vda") as disk:
        content = disk.read(slot_b, 250 * BLOCK)
    assert [content[block * BLOCK] for block in range(250)] == [
        block + 1 if block in changed else 0 for block in range(250)
    ]
    assert time.monotonic() - began < 60


@emulated
@slow
def test_a_cut_ends_a_running_command_at_once(ready: SlotStrategy) -> None:
    driver = ready.power
    driver.pump.add_listener(
        lambda line: driver.trip("marker") if "now cutting" in line.text else None
    )
    start = driver.pump.position
    began = time.monotonic()
    with pytest.raises(ConsoleLost, match="marker"):
        ready.run("echo now cut''ting; sleep 100", 100)
    marker = driver.pump.wait_for("now cutting", 0, since=start)
    assert marker.start > start
    assert time.monotonic() - began < 5
    with pytest.raises(Exception, match="no shell"):
        ready.run("true")
    outcome = ready.boot()
    assert outcome.ready
    assert ready.run("true").code == 0


@emulated
@slow
def test_after_a_cut_a_transition_starts_from_off_by_itself(ready: SlotStrategy) -> None:
    ready.power.cut("kept")
    assert ready.holds() is False
    assert ready.transition("ready") == ["off", "ready"]


@emulated
@slow
def test_a_cut_during_boot_is_an_outcome_not_an_error(slots: SlotStrategy) -> None:
    slots.transition("off")
    driver = slots.power
    remove = driver.pump.add_listener(
        lambda line: driver.trip("early") if "BROWNOUT: booting slot" in line.text else None
    )
    try:
        outcome = slots.boot()
    finally:
        remove()
    assert outcome.fate is Fate.POWER_LOST
    assert slots.boot().ready


# -- what the device does by itself --------------------------------------------------------


@emulated
@slow
def test_a_reboot_is_followed_into_the_next_boot(ready: SlotStrategy) -> None:
    first = ready.outcome
    start = ready.pump.position
    with pytest.raises(ConsoleLost, match="restarted"):
        ready.run("sync; reboot -f", 60)
    outcome = ready.await_boot(start)
    assert outcome.ready
    # On a busy host the guest has come to its banner before the rig takes its reset over: two then.
    assert outcome.starts in (1, 2)
    assert first is not None
    assert first.boot is not None
    assert outcome.boot is not None
    assert outcome.boot.boot_id != first.boot.boot_id
    assert ready.run("true").code == 0
    assert ready.transition("ready") == []


@emulated
@slow
def test_a_reboot_behind_our_back_is_noticed(ready: SlotStrategy) -> None:
    driver = ready.power
    boots = driver.boots
    driver.pump.sendline("reboot -f")
    until(lambda: driver.boots > boots, 20, "the guest's reset")
    assert ready.holds() is False


@emulated
@slow
def test_a_panic_is_told_at_once_and_the_next_boot_is_found(ready: SlotStrategy) -> None:
    start = ready.pump.position
    with pytest.raises(ConsoleDeath, match="Kernel panic") as caught:
        ready.run("echo c > /proc/sysrq-trigger", 300)
    assert str(ready.pump.log_path) in str(caught.value)
    outcome = ready.await_boot(start)
    assert outcome.ready
    assert outcome.deaths[0].marker.name.startswith("kernel")


@emulated
@slow
def test_a_hang_is_ended_by_the_watchdog(ready: SlotStrategy) -> None:
    driver = ready.power
    start = ready.pump.position
    seen = len(driver.events)
    with pytest.raises(ConsoleDeath):
        # A panic that never reboots: nobody feeds the watchdog any more.
        ready.run("echo 0 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger", 300)
    outcome = ready.await_boot(start, 150)
    assert outcome.ready
    assert "WATCHDOG" in [event.name for event in list(driver.events)[seen:]]


@emulated
@slow
def test_a_device_that_switches_itself_off_is_off(ready: SlotStrategy) -> None:
    start = ready.pump.position
    ready.pump.sendline("sync; poweroff -f")
    outcome = ready.await_boot(start, 60)
    assert outcome.fate is Fate.POWERED_OFF
    assert ready.power.get() is False


@emulated
@slow
def test_a_boot_that_is_not_ready_in_its_budget_is_data_or_a_product_failure(
    slots: SlotStrategy,
) -> None:
    outcome = on_a_host_with_time(slots, lambda: slots.boot(0.5))
    assert outcome.fate in (Fate.NOT_READY, Fate.SILENT)
    assert not outcome.ready

    def ready_in_no_time() -> BootFailure:
        with pytest.raises(BootFailure) as caught:
            slots.transition("ready")
        return caught.value

    budget, slots.boot_budget_s = slots.boot_budget_s, 0.5
    try:
        failure = on_a_host_with_time(slots, ready_in_no_time)
    finally:
        slots.boot_budget_s = budget
    assert isinstance(failure, AssertionError)
    assert slots.path == []


def on_a_host_with_time(slots: SlotStrategy, boot: Callable[[], T]) -> T:
    """With half a second, a host that is busy for one is no verdict: then it is done again."""
    for _ in range(8):
        slots.transition("off")
        try:
            return boot()
        except InfrastructureError as error:
            if "too busy" not in str(error):
                raise
    raise AssertionError("the host was too busy eight times in a row")


# -- the console under load ----------------------------------------------------------------


@emulated
@slow
def test_a_megabyte_of_console_output_that_no_test_reads_does_not_stall_the_guest(
    ready: SlotStrategy,
) -> None:
    program = "for i in range(11000): print('x' * 99)"
    start = ready.pump.sendline(
        f"python3 -c \"{program}\"; touch /tmp/finished; echo all ''written"
    )
    # Nothing reads: neither expect nor wait_for. Only the drain can let the guest go on.
    until(lambda: ready.pump.position - start > 1_000_000, 60, "1 MB through the console")
    ready.pump.wait_for("all written", 30, since=start)
    ready.power.skip_to(ready.pump.position, one_boot=True)
    assert ready.run("test -e /tmp/finished").code == 0


@emulated
@slow
def test_a_command_that_takes_too_long_leaves_no_broken_shell(ready: SlotStrategy) -> None:
    with pytest.raises(ConsoleTimeout, match="sleep 600"):
        ready.run("sleep 600", 0.5)
    with pytest.raises(Exception, match="no shell"):
        ready.run("true")
    ready.invalidate()


# -- the rig's own failures ----------------------------------------------------------------


@emulated
@slow
@pytest.mark.parametrize("reaped_after_s", [0.0, 0.5])
def test_a_killed_qemu_is_infrastructure_not_a_verdict(
    ready: SlotStrategy, monkeypatch: pytest.MonkeyPatch, reaped_after_s: float
) -> None:
    """Also on a busy host, where the console breaks before QEMU's end is noticed."""
    if reaped_after_s:
        exited = ready.power._process.exited
        monkeypatch.setattr(
            exited, "set", lambda: (time.sleep(reaped_after_s), type(exited).set(exited))
        )
    os.kill(ready.power.pid, signal.SIGKILL)
    with pytest.raises(InfrastructureError, match="signal 9") as caught:
        ready.run("sleep 100", 100)
    assert not isinstance(caught.value, AssertionError)
    with pytest.raises(InfrastructureError):
        ready.await_boot(budget_s=30)
    assert ready.transition("ready") == ["off", "ready"]


@emulated
@slow
def test_a_power_cut_while_the_shell_is_taken_leaves_one_that_works(
    slots: SlotStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between labgrid's login and its preparation of the shell."""
    inject = type(slots.shell)._inject_run

    def cut(shell: Any) -> None:
        monkeypatch.undo()
        slots.power.cut()
        inject(shell)

    monkeypatch.setattr(type(slots.shell), "_inject_run", cut)
    assert slots.boot(adopt=False).ready
    with pytest.raises(ConsoleLost):
        slots.run("true")
    assert slots.boot().ready
    assert slots.check("echo there") == "there"


@emulated
@slow
def test_a_qemu_that_does_not_answer_is_infrastructure_not_silence(
    ready: SlotStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.targets import strategy as module

    monkeypatch.setattr(module, "_QMP_TIMEOUT_S", 0.5)
    pid = ready.power.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(InfrastructureError, match="does not answer"):
            ready.await_boot(budget_s=1.0)
    finally:
        os.kill(pid, signal.SIGCONT)


# -- the decision, alone -------------------------------------------------------------------

PANIC = Death(Marker("kernel panic", "Kernel panic"), "Kernel panic", 10, 22, 0)
RESET = Death(Marker("U-Boot reset", "resetting"), "resetting ...", 30, 40, 0)


@pytest.mark.parametrize(
    ("changes", "fate"),
    [
        ({"received": 0, "silent_s": 60.0}, Fate.SILENT),
        ({"silent_s": 60.0}, Fate.SILENT),
        ({}, Fate.NOT_READY),
        ({"deaths": (PANIC,)}, Fate.PANIC),
        ({"deaths": (PANIC,), "silent_s": 60.0}, Fate.PANIC),
        ({"deaths": (PANIC, RESET)}, Fate.NOT_READY),
        ({"starts": 6, "deaths": (PANIC,)}, Fate.REBOOT_LOOP),
        ({"at_prompt": True, "silent_s": 60.0}, Fate.BOOTLOADER),
    ],
)
def test_silence_is_told_apart_by_what_came_before_it(changes: dict[str, Any], fate: Fate) -> None:
    seen: dict[str, Any] = {
        "starts": 1,
        "loop_limit": 6,
        "deaths": (),
        "received": 1000,
        "at_prompt": False,
        "silent_s": 0.1,
        "quiet_s": 5.0,
    }
    assert judge_silence(**{**seen, **changes}) is fate
