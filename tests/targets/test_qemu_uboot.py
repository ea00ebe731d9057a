"""The QEMU driver on a real machine that starts in half a second: Debian's U-Boot for arm64."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from labgrid import Environment
from labgrid.driver.exception import ExecutionError
from targets_rigs import DISK_BYTES, PROMPT, to_prompt, uboot, until, write_rig

from framework.console import ConsoleLost, ConsoleTimeout
from framework.disk import Fault, JournalReader, Kind, Trigger
from framework.targets import rundir
from framework.targets.errors import RigError
from framework.targets.process import MachineProcess
from framework.targets.qmp import QmpConnection
from framework.targets.rig import load_rig
from framework.targets.rundir import RunDirectory, base_directory, start_time, sweep

pytestmark = pytest.mark.emulated

Make = Callable[..., Any]

HARNESS = """
import sys, threading
from framework.targets.rig import load_rig
driver = load_rig(sys.argv[1]).get_target().get_driver("RecordedQEMUDriver")
driver.on()
print(driver.pid, driver.run_directory, flush=True)
threading.Event().wait()
"""


def lives(pid: int) -> bool:
    return start_time(pid) is not None


# -- as a plain labgrid driver --------------------------------------------------------------


def test_it_is_a_plain_labgrid_driver(tmp_path: Path) -> None:
    environment = Environment(config_file=str(write_rig(tmp_path)))
    target = environment.get_target()
    power = target.get_driver("PowerProtocol")
    power.on()
    try:
        bootloader = target.get_driver("UBootDriver")
        assert "U-Boot" in bootloader.run("version")[0][0]
        bootloader.reset()
        assert bootloader.run("echo hello")[0] == ["hello"]
        power.cycle()
        assert bootloader.state.name == "bound", "a power cycle must invalidate the console"
        assert target.get_driver("UBootDriver").run("true")[2] == 0
    finally:
        environment.cleanup()
    assert power.get() is False
    power.close()


def test_a_misspelt_key_is_refused_without_load_rig_too(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(rig.read_text().replace("log_dir:", "logdir:"))
    with pytest.raises(RigError, match=r"rig.yaml: .*unknown key 'logdir' .*'log_dir'"):
        Environment(config_file=str(rig)).get_target()


# -- power ---------------------------------------------------------------------------------


def test_power_is_what_the_process_is(uboot_machine: Make) -> None:
    driver = uboot_machine()
    assert driver.get() is False
    driver.on()
    pid = driver.pid
    assert driver.get() is True
    assert lives(pid)
    driver.on()
    assert driver.pid == pid, "a second on() does nothing"
    driver.off()
    assert driver.get() is False
    assert not lives(pid)
    driver.off()
    with pytest.raises(ConsoleLost, match="switched off"):
        driver.pump.wait_for("U-Boot", 30)


def test_a_qemu_that_dies_at_start_is_an_error_with_its_own_words(uboot_machine: Make) -> None:
    driver = uboot_machine(machine="virt,no-such-option=on")
    began = time.monotonic()
    with pytest.raises(ExecutionError, match="no-such-option") as caught:
        driver.on()
    assert time.monotonic() - began < 5
    assert "did not start (exit code 1)" in str(caught.value)
    assert driver.get() is False
    with pytest.raises(ConsoleLost):
        driver.pump.wait_for("U-Boot", 30)


def test_a_qemu_that_hangs_at_start_meets_the_deadline(uboot_machine: Make, tmp_path: Path) -> None:
    sleeper = tmp_path / "qemu-system-aarch64"
    sleeper.write_text("#!/bin/sh\nexec sleep 1000\n")
    sleeper.chmod(0o755)
    driver = uboot_machine(qemu=str(sleeper), start_deadline_s=0.5)
    began = time.monotonic()
    with pytest.raises(ExecutionError, match=r"not ready within 0\.5 s"):
        driver.on()
    assert time.monotonic() - began < 5
    assert driver.get() is False


def test_a_qemu_killed_from_outside_is_noticed_told_and_started_again(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    start = to_prompt(driver)
    began = time.monotonic()
    os.kill(driver.pid, signal.SIGKILL)
    with pytest.raises(ConsoleLost, match="ended by itself: signal 9"):
        driver.pump.wait_for("never", 30, since=start)
    assert time.monotonic() - began < 2
    assert driver.get() is False
    assert "signal 9" in driver.failure
    with pytest.raises(ExecutionError):
        driver.monitor_command("query-status")
    driver.on()
    to_prompt(driver)
    assert driver.failure is None


@pytest.fixture
def slow_reaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host: a dead process's connections break long before its end is noticed."""
    reap = MachineProcess._reap

    def late(self: MachineProcess) -> None:
        self._popen.wait()
        time.sleep(0.5)
        reap(self)

    monkeypatch.setattr(MachineProcess, "_reap", late)


@pytest.mark.usefixtures("slow_reaper")
@pytest.mark.parametrize("before", ["qmp_capabilities", "cont"])
def test_a_qemu_killed_while_it_starts_is_told_as_such(
    uboot_machine: Make, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Before it is ours: the start failed. Afterwards: the machine ended by itself."""
    driver = uboot_machine()
    if before == "cont":
        execute = QmpConnection.execute

        def killed(self: QmpConnection, command: str, *args: Any, **keywords: Any) -> Any:
            if command == "cont":
                os.kill(driver.pid, signal.SIGKILL)
            return execute(self, command, *args, **keywords)

        monkeypatch.setattr(QmpConnection, "execute", killed)
        with contextlib.suppress(ExecutionError):
            driver.on()
        driver.settle()
        assert driver.failure == "QEMU ended by itself: signal 9 (SIGKILL)"
    else:
        connect = QmpConnection._connect

        async def dead(self: QmpConnection, *args: Any) -> Any:
            processes[0].signal_kill()
            return await connect(self, *args)

        processes: list[MachineProcess] = []
        begin = MachineProcess.__init__

        def kept(self: MachineProcess, *args: Any, **keywords: Any) -> None:
            begin(self, *args, **keywords)
            processes.append(self)

        monkeypatch.setattr(MachineProcess, "__init__", kept)
        monkeypatch.setattr(QmpConnection, "_connect", dead)
        with pytest.raises(ExecutionError, match=r"did not start \(signal 9"):
            driver.on()
    assert driver.get() is False


@pytest.mark.parametrize("starved_s", [0.0, 12.0])
def test_a_watchdog_that_fires_on_a_starved_guest_is_the_hosts_doing(
    uboot_machine: Make, monkeypatch: pytest.MonkeyPatch, starved_s: float
) -> None:
    """The guest's watchdog counts while the guest may not run."""
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    monkeypatch.setattr(driver, "starved_s", lambda since: starved_s)
    driver._take_event("WATCHDOG", {"action": "reset"}, time.time())
    since = driver.pump.position
    with contextlib.suppress(ExecutionError):  # QEMU may be gone before it answers
        driver.monitor_command("system_reset")
    if starved_s:
        until(lambda: driver.failure is not None, 10, "failure")
        assert "the host kept the machine from running for 12.0 s" in driver.failure
    else:
        driver.pump.wait_for("U-Boot 20", 10, since=since)
        assert (driver.resets, driver.failure) == (1, None)


def test_a_guest_reset_starts_afresh_on_the_same_disk(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "virtio scan; mw.b 0x42000000 5a 0x200; virtio write 0x42000000 7 1")
    boots, first = driver.boots, driver.pid
    start = driver.pump.sendline("reset")
    driver.pump.wait_for("stop autoboot", 30, since=start, deaths=False)
    to_prompt(driver)
    assert driver.boots == boots + 1
    assert driver.resets == 1
    assert driver.pid != first
    assert driver.last_cut is None, "a reset is not a power cut"
    assert "guest-reset" in [event.data.get("reason") for event in driver.events]
    uboot(driver, "virtio scan; mw.b 0x43000000 0 0x200; virtio read 0x43000000 7 1")
    assert "5a5a5a5a" in uboot(driver, "md.l 0x43000000 4")


def test_a_reset_does_not_flush_what_the_guest_did_not_flush(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "virtio scan; virtio write 0x42000000 7 1")
    start = driver.pump.sendline("reset")
    driver.pump.wait_for("stop autoboot", 30, since=start, deaths=False)
    driver.cut("subset", seed=1)
    operations = JournalReader(driver.recorder.journal_path).operations
    kinds = [Kind(int(kind)) for kind in operations.kind]
    assert kinds == [Kind.WRITE], "QEMU's own flushes at its exit hide a missing fsync"


def test_the_reset_button_restarts_and_keeps_the_disk(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    driver.reset()
    to_prompt(driver)
    assert (driver.boots, driver.last_cut) == (2, None)
    driver.off()
    with pytest.raises(ExecutionError, match="off"):
        driver.reset()


def test_a_reset_loop_is_followed_boot_by_boot(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    for number in range(5):
        to_prompt(driver)
        start = driver.pump.sendline("reset")
        driver.pump.wait_for("stop autoboot", 30, since=start, deaths=False)
        assert driver.resets == number + 1


# -- cuts ----------------------------------------------------------------------------------


def test_twenty_live_cuts_leave_exactly_the_operations_before_them(uboot_machine: Make) -> None:
    driver = uboot_machine()
    seed = random.SystemRandom().randrange(1 << 32)
    numbers = [random.Random(seed).randint(1, 40) for _ in range(20)]
    script = "; ".join(
        f"mw.b 0x42000000 {block + 1:#x} 0x200; virtio write 0x42000000 {block:#x} 1"
        for block in range(41)
    )
    for number in numbers:
        driver.fresh()
        driver.on()
        to_prompt(driver)
        uboot(driver, "virtio scan; virtio dev 0")
        armed = driver.arm_cut(Trigger.operation(number))
        start = driver.pump.position
        # U-Boot's line is limited to 1 KiB: send what is needed in pieces, without waiting.
        for piece in range(0, 41, 8):
            part = "; ".join(script.split("; ")[2 * piece : 2 * (piece + 8)])
            try:
                driver.pump.sendline(part)
                driver.pump.wait_for("OK\r?\n=> ", 20, since=start)
                start = driver.pump.position
            except ConsoleLost:
                break
        assert driver.power_lost.wait(10), f"seed {seed}, operation {number}"
        assert driver.get() is False
        assert armed.operation == driver.last_cut.operation + 1 == number
        with driver.recorder.disk("vda") as disk:
            content = disk.read(0, 41 * 512)
        written = [content[512 * block] for block in range(41)]
        expected = [block + 1 for block in range(number - 1)]
        assert written == expected + [0] * (41 - len(expected)), f"seed {seed}, {number}"


def test_a_cut_without_a_machine_is_an_error(uboot_machine: Make) -> None:
    driver = uboot_machine()
    with pytest.raises(ExecutionError, match="no power"):
        driver.cut()


def test_a_bare_freeze_stays_pending_until_a_model_is_named(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "virtio scan")
    driver.recorder.arm(Trigger.operation(2))
    driver.pump.sendline("virtio write 0x42000000 0 1; virtio write 0x42000000 1 1")
    assert driver.power_lost.wait(10)
    assert driver.last_cut is None
    assert "before operation 2" in driver.power_loss.cause
    record = driver.cut("subset", seed=5)
    assert (record.model, record.seed, record.operation) == ("subset", 5, 1)
    driver.restore()
    to_prompt(driver)


def test_a_listener_can_cut_the_power(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    driver.pump.add_listener(
        lambda line: driver.trip("the marker came", "kept") if line.text == "now!" else None
    )
    driver.pump.sendline("echo now!")
    assert driver.power_lost.wait(10)
    assert driver.power_loss.cause == "the marker came"
    assert driver.last_cut.model == "kept"
    driver.restore()
    to_prompt(driver)


def test_fresh_disks_are_pristine_and_the_base_image_never_changes(
    uboot_machine: Make, tmp_path: Path
) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "virtio scan; mw.b 0x42000000 5a 0x200; virtio write 0x42000000 0 1")
    with pytest.raises(ExecutionError, match="off"):
        driver.fresh()
    driver.off()
    with driver.recorder.disk("vda") as disk:
        assert disk.read(0, 4) == b"ZZZZ"
    driver.fresh()
    with driver.recorder.disk("vda") as disk:
        assert disk.read(0, 4) == bytes(4)
    assert not any((tmp_path / "machine0" / "disk.img").read_bytes())
    other = tmp_path / "other.img"
    other.write_bytes(b"other".ljust(DISK_BYTES, b"\0"))
    driver.fresh({"vda": other})
    with driver.recorder.disk("vda") as disk:
        assert disk.read(0, 5) == b"other"


def test_faults_of_the_recorder_reach_the_guest(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "virtio scan")
    driver.recorder.inject(Fault.error(on=("write",)))
    assert "ERROR" in uboot(driver, "virtio write 0x42000000 0 1")
    assert driver.monitor_command("query-status")["running"] is True


# -- the journal's timeline ----------------------------------------------------------------


def test_console_qmp_and_power_are_marks_in_the_journal(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    to_prompt(driver)
    uboot(driver, "echo find me")
    driver.cut("kept")
    marks = JournalReader(driver.recorder.journal_path).marks
    told = {(mark.source, mark.text) for mark in marks}
    assert ("console", "find me") in told
    assert ("power", "switched on") in told
    assert any(source == "qmp" and text.startswith("RESUME") for source, text in told)


# -- network -------------------------------------------------------------------------------


def test_free_host_ports_are_forwarded_and_told(uboot_machine: Make) -> None:
    driver = uboot_machine(network="{forward: [{guest: 22}]}")
    driver.on()
    assert 1024 < driver.forwarded_port(22) < 65536
    with pytest.raises(ExecutionError, match="23 is not forwarded"):
        driver.forwarded_port(23)


def test_a_pulled_cable_stays_pulled_over_a_power_cycle(uboot_machine: Make) -> None:
    driver = uboot_machine(network="user")
    driver.on()
    driver.set_link(False)
    driver.cycle()
    to_prompt(driver)
    uboot(driver, "setenv ipaddr 10.0.2.15")
    start = driver.pump.sendline("ping 10.0.2.2")
    with pytest.raises(ConsoleTimeout):
        driver.pump.wait_for("is alive", 1.5, since=start)
    driver.pump.write(b"\x03")
    driver.pump.wait_for(PROMPT, 10, since=start)
    driver.set_link(True)
    assert "is alive" in uboot(driver, "ping 10.0.2.2", 60)


# -- nothing is left behind ----------------------------------------------------------------


def test_close_leaves_nothing(uboot_machine: Make) -> None:
    driver = uboot_machine()
    driver.on()
    pid, directory = driver.pid, driver.run_directory
    driver.close()
    assert not lives(pid)
    assert not directory.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_qemu_dies_with_its_harness(tmp_path: Path, how: signal.Signals) -> None:
    rig = write_rig(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", HARNESS, str(rig)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as harness:
        assert harness.stdout is not None
        pid_text, directory_text = harness.stdout.readline().split()
        pid, directory = int(pid_text), Path(directory_text)
        assert lives(pid)
        harness.send_signal(how)
        harness.wait(10)
    took = until(lambda: not lives(pid), 5, "QEMU's end")
    assert took < 2
    sweep()
    assert not directory.exists()


def test_a_machine_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    # The trap: the kernel's parent-death signal is sent when the forking *thread* ends.
    made: list[MachineProcess] = []
    thread = threading.Thread(
        target=lambda: made.append(
            MachineProcess(["sleep", "1000"], output_path=tmp_path / "output")
        )
    )
    thread.start()
    thread.join()
    assert not made[0].exited.wait(0.5)
    made[0].kill()
    assert made[0].ended == "signal 9 (SIGKILL)"


def _dead_owners_directory() -> Path:
    """A run directory whose owner has ended without removing it."""
    script = "from framework.targets.rundir import RunDirectory as R; print(R.create().path)"
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return Path(made.stdout.strip())


def test_the_sweep_ends_programs_of_dead_harnesses_and_only_those() -> None:
    stale = _dead_owners_directory()
    own = RunDirectory.create()
    foreign = base_directory() / "something-else"
    foreign.mkdir(exist_ok=True)
    orphan = subprocess.Popen(["sleep", "1000"], env=RunDirectory(stale).environment)
    bystander = subprocess.Popen(["sleep", "1000"], env=own.environment)
    try:
        assert stale in sweep()
        assert orphan.wait(5) == -signal.SIGKILL
        assert bystander.poll() is None
        assert not stale.exists()
        assert own.path.exists()
        assert foreign.exists()
    finally:
        for process in (orphan, bystander):
            process.kill()
            process.wait()
        own.remove()
        foreign.rmdir()


def test_a_recycled_process_id_is_not_taken_for_a_living_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stale = _dead_owners_directory()
    owner = int(stale.name.split("-")[1])
    # The id in the name now belongs to someone who started at another time; every other owner
    # lives on, such as that of a run beside this one.
    monkeypatch.setattr(rundir, "start_time", lambda pid: 1 if pid == owner else start_time(pid))
    assert stale in sweep()


def test_a_next_start_sweeps_what_a_killed_harness_left(uboot_machine: Make) -> None:
    stale = _dead_owners_directory()
    uboot_machine()
    assert not stale.exists()


def test_two_workers_run_in_parallel_without_touching_each_other(tmp_path: Path) -> None:
    shared = tmp_path / "disk.img"
    rigs = [write_rig(tmp_path / name) for name in ("one", "two")]
    shared.write_bytes(bytes(DISK_BYTES))
    for rig in rigs:  # the same read-only base image for both
        rig.write_text(rig.read_text().replace("disk: disk.img", "disk: ../disk.img"))
    drivers = [load_rig(rig).get_target().get_driver("RecordedQEMUDriver") for rig in rigs]
    try:
        for driver in drivers:
            driver.on()
        for number, driver in enumerate(drivers, 1):
            to_prompt(driver)
            uboot(driver, f"virtio scan; mw.b 0x42000000 {number} 0x200")
            uboot(driver, "virtio write 0x42000000 0 1")
        drivers[0].cut()
        assert drivers[1].get() is True
        for number, driver in enumerate(drivers, 1):
            with driver.recorder.disk("vda") as disk:
                assert disk.read(0, 1) == bytes([number])
    finally:
        for driver in drivers:
            driver.close()
