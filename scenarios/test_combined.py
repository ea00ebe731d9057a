"""Faults come together, and one after the other."""

import allure
import pytest

from framework.faults import (
    after,
    bit_rot,
    boot_env_write,
    brown_out,
    clock,
    clock_battery,
    connection,
    console,
    ctrl_c,
    data_full,
    downloaded,
    link_down,
    power_cut,
    process_killed,
    second_command,
    server_answers,
    slot_write,
    slow_disk,
    slow_network,
    state,
    storage_error,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [allure.feature("Combined"), pytest.mark.lg_feature("power-cut")]


@allure.story("Network and power")
def test_a_cut_after_a_lost_connection(device: Device, update: Update, faults: Faults) -> None:
    """The connection is lost, the download is resumed, and then the power goes."""
    lost = connection("fin").when(downloaded(percent=30))
    faults.arm(lost)
    faults.arm(power_cut("subset").when(after(lost, slot_write(percent=10))))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Network and power")
def test_a_lost_connection_after_a_cut(device: Device, update: Update, faults: Faults) -> None:
    """The power goes in the image; in the second try the connection is reset, and resumed."""
    cut = power_cut("torn").when(slot_write(percent=50))
    faults.arm(cut)
    faults.arm(connection("reset").when(after(cut, downloaded(percent=20))))
    device.install(update)
    device.restore()
    device.install(update)
    device.reboot()
    device.retry(update)


@allure.story("Network and power")
def test_a_cut_at_an_exact_byte_of_a_slow_download(
    device: Device, update: Update, faults: Faults
) -> None:
    """The power goes in the middle of a download that trickles."""
    faults.arm(slow_network(bytes_per_s=4 << 20))
    faults.arm(power_cut("subset").when(downloaded(percent=45)))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Network and power")
def test_no_cable_after_a_cut_on_trial(device: Device, update: Update, faults: Faults) -> None:
    """The new system is cut on trial, and after it the cable is out."""
    device.install(update)
    cut = power_cut().when(console("BROWNOUT INIT slot=b"))
    faults.arm(cut)
    faults.arm(link_down().when(after(cut)))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("Server and power")
def test_a_cut_while_the_server_is_overloaded(
    device: Device, update: Update, faults: Faults
) -> None:
    """The server sends the client away with 503; then the power goes."""
    busy = server_answers(503, times=2).when(downloaded(percent=40))
    faults.arm(busy)
    faults.arm(power_cut("prefix").when(after(busy, slot_write(percent=5))))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Storage and power")
def test_a_cut_after_an_error_of_the_disk(device: Device, update: Update, faults: Faults) -> None:
    """A write fails; while the updater cleans up, the power goes."""
    broken = storage_error("write", area="passive slot", count=1).when(slot_write(percent=60))
    faults.arm(broken)
    faults.arm(power_cut("subset").when(after(broken, state("Cleanup"))))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Storage and power")
def test_a_cut_inside_the_switch_of_a_slow_disk(
    device: Device, update: Update, faults: Faults
) -> None:
    """Flushes take long, and the power goes inside the switch."""
    faults.arm(slow_disk(1, "flush"))
    faults.arm(power_cut("torn").when(boot_env_write(1)))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Storage and power")
def test_a_cut_with_a_full_data_partition(device: Device, update: Update, faults: Faults) -> None:
    """The data partition fills up during the installation, and then the power goes."""
    full = data_full().when(slot_write(percent=20))
    faults.arm(full)
    faults.arm(power_cut("subset").when(slot_write(percent=90)))
    device.install(update)
    device.restore()
    device.command("rm -f /data/.fill; sync")
    device.retry(update)


@allure.story("Clock and power")
@pytest.mark.lg_feature("rtc")
def test_a_brown_out_with_a_dead_clock_battery(
    device: Device, update: Update, faults: Faults
) -> None:
    """Every start begins in 1970, and the new system is cut three times."""
    faults.arm(clock_battery())
    device.install(update)
    faults.arm(brown_out(3).when(console("BROWNOUT INIT slot=b")))
    device.reboot()
    device.restore()
    device.retry(update)


@allure.story("People and power")
def test_a_cut_after_ctrl_c(device: Device, update: Update, faults: Faults) -> None:
    """Somebody presses Ctrl-C, tries again, and the power goes."""
    stopped = ctrl_c().when(slot_write(percent=40))
    faults.arm(stopped)
    faults.arm(power_cut("torn").when(after(stopped, state("Download").at(percent=60))))
    device.install(update)
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Three in a row")
def test_killed_then_disconnected_then_cut(device: Device, update: Update, faults: Faults) -> None:
    """The updater is killed; in the second try the connection is lost and the power goes."""
    faults.arm(process_killed().when(slot_write(percent=30)))
    device.install(update)
    lost = connection("fin").when(downloaded(percent=20))
    faults.arm(lost)
    faults.arm(power_cut("subset").when(after(lost, slot_write(percent=30))))
    device.install(update)
    device.restore()
    device.retry(update)


@allure.story("Three in a row")
@pytest.mark.update("unhealthy")
def test_a_sick_image_and_two_cuts(device: Device, update: Update, faults: Faults) -> None:
    """A sick system is cut on trial, and again on its way back."""
    device.install(update)
    cut = power_cut().when(state("ArtifactVerifyReboot"))
    faults.arm(cut)
    faults.arm(power_cut("torn").when(after(cut, boot_env_write(1))))
    device.reboot()
    boot = device.restore()
    assert boot.version == device.base.name, f"{boot.version} runs"


@allure.story("A bad day")
@pytest.mark.lg_feature(["network", "uboot"])
@pytest.mark.demo(cost=4)
def test_everything_but_the_power_fails_in_one_update(
    device: Device, update: Update, faults: Faults
) -> None:
    """Clock, updater, connection, a second hand, a boot environment's copy: all in one update."""
    faults.arm(clock("1970-01-01T00:00:10"))
    faults.arm(process_killed("KILL").when(downloaded(percent=5)))
    killed = device.install(update)
    assert killed.exit_code != 0, "the updater was not killed"
    faults.arm(connection("fin").when(downloaded(percent=40)))
    faults.arm(second_command("rollback").when(slot_write(percent=60)))
    ended = device.install(update)
    assert ended.exit_code in (0, 4), ended.cause
    faults.arm(bit_rot("boot environment", percent=0))
    device.reboot()
    device.read_status()
    device.retry(update)
