"""The power goes: while the image is written, inside the boot environment, before the commit."""

import allure
import pytest

from framework.disk import TornSector
from framework.disk.models import Tear
from framework.faults import (
    Trigger,
    after,
    after_switch,
    boot_env_write,
    brown_out,
    console,
    flush,
    operation,
    power_cut,
    slot_write,
    state,
    stream_byte,
    writes_to,
)
from framework.network import FaultProxy
from framework.scenario.arming import Faults
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update

APPLICATIONS = (
    "for n in 1 2 3 4 5 6 7 8 9; do dd if=/dev/zero of=/data/work-$n bs=4096 count=$n conv=fsync"
    " 2>/dev/null; mv /data/work-$n /data/done-$n; sync; done"
)
"""What applications do: files written, synced, and renamed, one after the other."""
pytestmark = [
    allure.feature("Power"),
    pytest.mark.lg_feature("power-cut"),
]


@allure.story("Cut without an update")
@pytest.mark.lg_feature("linux")
@pytest.mark.parametrize("model", ["subset", "torn"])
def test_cut_while_applications_write(device: Device, faults: Faults, model: str) -> None:
    """No update is under way: applications write files and sync them, and the power goes."""
    faults.power_cut(model=model).when(writes_to("data", nth=30))
    device.operate(APPLICATIONS)
    device.restore()


@allure.story("Cut while the image is written")
@pytest.mark.smoke
def test_cut_in_the_middle_of_the_image(device: Device, update: Update, faults: Faults) -> None:
    """Power cut in the middle of the image."""
    faults.power_cut(model="subset").when(slot_write(percent=50))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut while the image is written")
@pytest.mark.parametrize(("percent", "model"), [(1, "torn"), (97, "prefix"), (100, "torn")])
def test_cut_at_the_edges_of_the_image(
    device: Device, update: Update, faults: Faults, percent: int, model: str
) -> None:
    """Power cut near the beginning or the end of the image."""
    faults.power_cut(model=model).when(slot_write(percent=percent))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut inside the boot environment")
@pytest.mark.demo(cost=3)
@pytest.mark.smoke
def test_cut_inside_the_switch(device: Device, update: Update, faults: Faults) -> None:
    """Power cut inside the write of the boot environment that switches slots."""
    faults.power_cut(TornSector(newest=True, kinds=("garbage",))).when(boot_env_write(1))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut inside the boot environment")
@pytest.mark.parametrize("tear", ["mix", "unreadable"])
def test_cut_inside_the_switch_leaves_a_torn_copy(
    device: Device, update: Update, faults: Faults, tear: Tear
) -> None:
    """Power cut inside the switch; the copy is a mix of old and new, or can't be read."""
    faults.power_cut(TornSector(newest=True, kinds=(tear,))).when(boot_env_write(1))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut inside the boot environment")
def test_cut_inside_the_switch_with_a_reordering_cache(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power cut inside the switch; of what was not flushed only the newest write is on the disk."""
    faults.power_cut(model="reordered").when(boot_env_write(1))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut inside the boot environment")
def test_cut_inside_the_switch_of_the_second_update(
    device: Device, update: Update, faults: Faults, bench: Bench, proxy: FaultProxy
) -> None:
    """Power cut inside the switch from slot b back to slot a."""
    device.update(update)
    base = next(name for name, facts in device.manifest.images.items() if facts is device.base)
    back = bench.update(base, proxy.port)
    faults.power_cut(model="torn").when(boot_env_write(1))
    device.install(back)
    device.restore()
    device.retry(back)


@allure.story("Cut inside the boot environment")
def test_cut_while_the_bootloader_counts(device: Device, update: Update, faults: Faults) -> None:
    """Power cut inside the bootloader's own write of its attempt count."""
    device.install(update)
    faults.power_cut(model="torn").when(boot_env_write(1))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Cut before the commit")
@pytest.mark.demo(cost=3)
@pytest.mark.smoke
def test_cut_after_the_switch_before_the_commit(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power cut on the new system, before it is committed."""
    device.install(update)
    faults.power_cut().when(console("BROWNOUT INIT slot=b"))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Cut before the commit")
def test_cut_inside_the_commit(device: Device, update: Update, faults: Faults) -> None:
    """Power cut while the commit is written to the boot environment."""
    device.install(update)
    faults.power_cut(TornSector(newest=True, kinds=("garbage",))).when(
        boot_env_write(1, after="ArtifactCommit")
    )
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Cut after the commit")
def test_cut_right_after_the_commit(device: Device, update: Update, faults: Faults) -> None:
    """Power cut as soon as the commit is acknowledged, the cache lost."""
    device.install(update)
    faults.power_cut(model="subset").when(console("updater: committed"))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Cut after the install")
def test_cut_between_switch_and_restart(device: Device, update: Update, faults: Faults) -> None:
    """Power cut after the install was acknowledged, before the restart; the cache lost."""
    faults.power_cut(model="subset").when(console("updater: installed"))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut after the install")
@pytest.mark.parametrize("operations", [2, 20])
def test_cut_a_little_after_the_switch(
    device: Device, update: Update, faults: Faults, operations: int
) -> None:
    """Power cut some disk operations after the switch."""
    faults.power_cut(model="subset").when(after_switch(operations=operations))
    if device.install(update).exit_code is not None:
        device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Repeated cuts")
def test_cut_twice_in_a_row(device: Device, update: Update, faults: Faults) -> None:
    """Power cut in the image, and again in the image of the second try."""
    faults.power_cut(model="subset").when(slot_write(percent=60))
    device.install(update)
    device.restore()
    faults.power_cut(model="torn").when(slot_write(percent=30))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Repeated cuts")
def test_cut_in_every_boot_of_one_update(device: Device, update: Update, faults: Faults) -> None:
    """The new system is cut in each of its starts, until the bootloader gives up on it."""
    device.install(update)
    first = power_cut().when(console("BROWNOUT INIT slot=b"))
    second = power_cut().when(after(first, console("BROWNOUT INIT slot=")))
    faults.arm(first)
    faults.arm(second)
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Repeated cuts")
def test_brown_out_on_the_new_system(device: Device, update: Update, faults: Faults) -> None:
    """Several short cuts in a row while the new system is on trial."""
    device.install(update)
    faults.arm(brown_out(5, "subset").when(console("BROWNOUT INIT slot=b")))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Repeated cuts")
def test_brown_out_in_the_image(device: Device, update: Update, faults: Faults) -> None:
    """Several short cuts in a row, the first in the middle of the image."""
    faults.arm(brown_out(3, "torn").when(slot_write(percent=40)))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut anywhere on the disk")
@pytest.mark.parametrize(
    "trigger",
    [
        operation(7),
        flush(2),
        writes_to("data", nth=6),
        writes_to("passive slot", 0, 4096),
        # Inside the request: all that the client sends is little more.
        stream_byte(700, "up"),
    ],
    ids=str,
)
def test_cut_at_a_place_of_an_install(
    device: Device, update: Update, faults: Faults, trigger: Trigger
) -> None:
    """Power cut at a certain operation, flush, place or byte of an installation."""
    faults.arm(power_cut("subset").when(trigger))
    if device.install(update).exit_code is not None:
        device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Cut under a hard cache")
@pytest.mark.parametrize("model", ["emmc", "discard"])
def test_cut_in_the_image_under_another_cache_model(
    device: Device, update: Update, faults: Faults, model: str
) -> None:
    """Power cut in the image, on a disk that forgets in another way."""
    faults.power_cut(model=model).when(slot_write(percent=80))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Cut on the way back")
@pytest.mark.update("unhealthy")
def test_cut_inside_the_rollback(device: Device, update: Update, faults: Faults) -> None:
    """Power cut while the way back is written to the boot environment."""
    device.install(update)
    faults.arm(power_cut("torn").when(boot_env_write(1, after="ArtifactRollback")))
    device.reboot()
    boot = device.restore()
    assert boot.version == device.base.name, f"{boot.version} runs"


@allure.story("Cut on the way back")
@pytest.mark.update("panics")
def test_cut_while_the_bootloader_falls_back(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power cut inside the bootloader's write by which it leaves a system that panics."""
    device.install(update)
    faults.arm(power_cut("torn").when(boot_env_write(2)))
    device.reboot()
    boot = device.restore()
    assert boot.version == device.base.name, f"{boot.version} runs"


@allure.story("Cut at a state")
def test_cut_within_the_download(device: Device, update: Update, faults: Faults) -> None:
    """Power cut in the state Download, at a share of the image."""
    faults.arm(power_cut("subset").when(state("Download").at(percent=75)))
    device.install(update)
    device.restore()
    device.retry(update)
