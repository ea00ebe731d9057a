"""The running system fails: the updater is killed, the kernel panics, it hangs, memory is gone."""

import allure
import pytest

from framework.faults import (
    Fault,
    hang,
    kernel_panic,
    memory_pressure,
    process_killed,
    slot_write,
    state,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [allure.feature("Guest"), pytest.mark.lg_feature("network")]


@allure.story("Process killed")
@pytest.mark.parametrize(
    "fault",
    [
        process_killed("KILL").when(state("Download")),
        process_killed("KILL").when(slot_write(percent=50)),
        process_killed("TERM").when(slot_write(percent=50)),
        process_killed("INT").when(slot_write(percent=90)),
    ],
    ids=str,
)
def test_a_killed_updater_leaves_nothing_to_clean_up(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The updater gets a signal in the middle of its work: the same command works again."""
    faults.arm(fault)
    ended = device.install(update)
    assert ended.exit_code != 0, "the updater was not killed"
    device.check_data()
    device.retry(update)


@allure.story("Panic")
@pytest.mark.parametrize("trigger", [slot_write(percent=50), state("Download")], ids=str)
def test_a_kernel_panic_in_the_installation(
    device: Device, update: Update, faults: Faults, trigger: Fault
) -> None:
    """The kernel panics during an installation; the device restarts by itself."""
    faults.arm(kernel_panic().when(trigger))
    device.install(update)
    device.await_restart()
    device.retry(update)


@allure.story("Hang")
@pytest.mark.lg_feature("watchdog")
def test_a_hang_in_the_installation_is_ended_by_the_watchdog(
    device: Device, update: Update, faults: Faults
) -> None:
    """Nothing gets the processor any more: the watchdog resets the device."""
    faults.arm(hang().when(slot_write(percent=50)))
    device.install(update)
    device.await_restart()
    device.retry(update)


@allure.story("Memory")
@pytest.mark.parametrize("leave_mib", [64, 12])
def test_an_update_without_much_memory(
    device: Device, update: Update, faults: Faults, leave_mib: int
) -> None:
    """Memory is nearly gone: slow, or killed; never half done."""
    faults.arm(memory_pressure(leave_mib))
    device.update(update)
    device.check_data()
    device.retry(update)
