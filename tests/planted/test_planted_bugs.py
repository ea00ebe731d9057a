"""Each planted bug turns a scenario red, with the number of the invariant that it breaks.

The same faults on the honest updater are in `scenarios/` and must be green; a detector that never
fired would prove nothing. Run with a rig: `pytest tests/planted --lg-env rigs/qemu-arm64.yaml`.
"""

import allure
import pytest

from framework.disk import LyingFlush, TornSector
from framework.faults import after_switch, boot_env_write, slot_write
from framework.network import FaultProxy
from framework.scenario.arming import Faults
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update

pytestmark = [pytest.mark.emulated, allure.epic("Planted bugs")]


OPERATIONS_LATER = 20


def cut_a_little_after_the_switch(device: Device, update: Update, faults: Faults) -> None:
    """The power goes some operations after the switch: by then the image must be on the disk."""
    faults.power_cut().when(after_switch(operations=OPERATIONS_LATER))
    if device.install(update).exit_code is not None:
        device.reboot()
    device.restore()


def test_the_honest_updater_survives_the_cut_that_catches_the_others(
    device: Device, update: Update, faults: Faults
) -> None:
    cut_a_little_after_the_switch(device, update, faults)
    device.retry(update)


@pytest.mark.base("v1+switch-before-sync")
@pytest.mark.planted(violates=2)
def test_switching_before_the_image_is_synced_is_caught(
    device: Device, update: Update, faults: Faults
) -> None:
    cut_a_little_after_the_switch(device, update, faults)


def cut_inside_the_switch_of_a_reordering_cache(
    device: Device, update: Update, faults: Faults
) -> None:
    """The power goes inside the switch: what was not flushed is there in the wrong order."""
    faults.power_cut(model="reordered").when(boot_env_write(1))
    device.install(update)
    device.restore()


def test_the_honest_updater_survives_a_reordering_cache(
    device: Device, update: Update, faults: Faults
) -> None:
    cut_inside_the_switch_of_a_reordering_cache(device, update, faults)
    device.retry(update)


@pytest.mark.base("v1+never-fsync")
@pytest.mark.planted(violates=2)
def test_never_syncing_is_caught(device: Device, update: Update, faults: Faults) -> None:
    cut_inside_the_switch_of_a_reordering_cache(device, update, faults)


@pytest.mark.base("v1+skip-read-back")
@pytest.mark.planted(violates=2)
def test_skipping_the_read_back_is_caught_by_a_flipped_bit(
    device: Device, update: Update, faults: Faults
) -> None:
    faults.bit_flip().when(slot_write(percent=70))
    device.update(update)


@pytest.mark.update("unhealthy+commit-before-health")
@pytest.mark.planted(violates=4)
def test_committing_before_the_health_check_is_caught(device: Device, update: Update) -> None:
    device.update(update)


@pytest.mark.update("unhealthy+always-healthy")
@pytest.mark.planted(violates=4)
def test_a_health_check_that_always_passes_is_caught(device: Device, update: Update) -> None:
    device.update(update)


@pytest.mark.lg_feature("uboot")
@pytest.mark.base("v1+single-env")
@pytest.mark.update("v2+single-env")
@pytest.mark.images("unhealthy+single-env")
@pytest.mark.planted(violates=4)
def test_a_boot_environment_without_redundancy_is_caught(
    device: Device, update: Update, faults: Faults, bench: Bench, proxy: FaultProxy
) -> None:
    device.update(update)
    back = bench.update("unhealthy+single-env", proxy.port)
    faults.power_cut(TornSector(newest=True, kinds=("garbage",))).when(boot_env_write(1))
    device.install(back)
    device.restore()


@pytest.mark.base("v1+no-trial")
@pytest.mark.update("panics")
@pytest.mark.planted(violates=(1, 8))
def test_switching_without_a_trial_is_caught_by_an_image_that_panics(
    device: Device, update: Update
) -> None:
    device.update(update)


@pytest.mark.planted(violates=5)
def test_a_drive_that_acknowledges_flushes_and_forgets_is_caught(
    device: Device, update: Update, faults: Faults
) -> None:
    faults.power_cut(LyingFlush(keep=0.0)).when(slot_write(percent=10))
    device.install(update)
    device.restore()


@pytest.mark.managed
@pytest.mark.base("v1+early-success")
@pytest.mark.update("unhealthy")
@pytest.mark.planted(violates=7)
def test_telling_the_server_of_success_before_the_restart_is_caught(
    device: Device, update: Update
) -> None:
    device.update(update)
