"""The disk fails, lies, decays, is slow, or is full."""

import allure
import pytest

from framework.faults import (
    Fault,
    bit_rot,
    data_full,
    read_only,
    slot_write,
    slow_disk,
    state,
    storage_error,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.outcomes import fails_cleanly, goes_through

pytestmark = [allure.feature("Storage"), pytest.mark.lg_feature("power-cut")]


@allure.story("Bit flip")
@pytest.mark.smoke
def test_a_flipped_bit_is_found_before_the_switch(
    device: Device, update: Update, faults: Faults
) -> None:
    """The disk stores one bit of the image wrong: the read-back finds it."""
    faults.bit_flip().when(slot_write(percent=70))
    device.install(update)
    device.check_data()
    device.retry(update)


@allure.story("Errors")
@pytest.mark.parametrize(
    "fault",
    [
        storage_error("write", area="passive slot", count=1).when(slot_write(percent=50)),
        storage_error("write", area="passive slot"),
        storage_error("read", area="passive slot").when(slot_write(percent=100)),
        read_only("passive slot").when(slot_write(percent=30)),
    ],
    ids=str,
)
def test_an_error_in_the_slot_ends_the_installation(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The passive slot can't be written, flushed or read back: it is never started."""
    faults.arm(fault)
    fails_cleanly(device, update)


@allure.story("Errors")
def test_an_error_in_the_boot_environment_is_no_success(
    device: Device, update: Update, faults: Faults
) -> None:
    """The switch can't be written: the installation fails, the old system stays."""
    faults.arm(storage_error("write", area="boot environment"))
    ended = device.install(update)
    assert ended.exit_code == 1, f"exit code {ended.exit_code}"
    faults.clear()
    device.reboot()
    device.retry(update)


@allure.story("Errors")
def test_an_error_of_a_flush_is_no_success(device: Device, update: Update, faults: Faults) -> None:
    """A flush fails, whosever it was: what it should have made durable is not trusted."""
    faults.arm(storage_error("flush", count=1).when(slot_write(percent=100)))
    device.install(update)
    faults.clear()
    device.reboot()
    device.check_data()
    device.retry(update)


@allure.story("Errors")
def test_a_disk_that_turns_read_only(device: Device, update: Update, faults: Faults) -> None:
    """The whole disk takes no more writes; after its replacement all goes on."""
    faults.arm(read_only().when(slot_write(percent=40)))
    ended = device.install(update)
    assert ended.exit_code == 1, f"exit code {ended.exit_code}"
    faults.clear()
    device.reboot()
    device.retry(update)


@allure.story("Slow disk")
@pytest.mark.parametrize(
    "fault",
    [
        slow_disk(0.05, "write", count=60).when(slot_write(percent=20)),
        slow_disk(8, "write", count=1).when(slot_write(percent=50)),
        slow_disk(2, "flush", count=4),
    ],
    ids=str,
)
def test_a_slow_disk_is_only_slow(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """Writes, flushes or reads take long: the update takes longer, and that is all."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Full")
def test_a_full_data_partition_is_told_before_anything_is_written(
    device: Device, update: Update, faults: Faults
) -> None:
    """The data partition is full: refused with the cause; with room it works."""
    faults.arm(data_full())
    fails_cleanly(device, update)


@allure.story("Full")
@pytest.mark.parametrize(
    "fault",
    [
        data_full().when(state("Download").at(percent=50)),
        data_full(2 << 20),
    ],
    ids=str,
)
def test_a_data_partition_that_is_nearly_full(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The data partition fills up during the installation, or has little room."""
    faults.arm(fault)
    device.update(update)
    device.retry(update)


@allure.story("Decay")
@pytest.mark.lg_feature("uboot")
def test_a_copy_of_the_boot_environment_rots_before_the_restart(
    device: Device, update: Update, faults: Faults
) -> None:
    """One bit of one copy of the boot environment decays: the other one counts."""
    device.install(update)
    faults.arm(bit_rot("boot environment", percent=0))
    device.reboot()
    device.retry(update)
