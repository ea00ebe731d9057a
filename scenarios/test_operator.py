"""People interrupt, and do things twice, too early or too late."""

import allure
import pytest

from framework.faults import Fault, ctrl_c, second_command, slot_write, state
from framework.faults.operators import Order
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.outcomes import fails_cleanly
from framework.scenario.striking import SECOND_HAND

pytestmark = [allure.feature("Operator")]

NOTHING_IN_PROGRESS = 2


@allure.story("Ctrl-C")
@pytest.mark.parametrize(
    "fault",
    [
        ctrl_c().when(state("Download")),
        ctrl_c(5).when(slot_write(percent=95)),
    ],
    ids=str,
)
def test_an_interrupted_installation_can_be_repeated(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """Ctrl-C in the middle: one line, nothing lost, and the same command works."""
    faults.arm(fault)
    fails_cleanly(device, update, exit_code=130)


@allure.story("Two hands")
@pytest.mark.lg_feature("network")
@pytest.mark.parametrize("command", ["install", "rollback", "commit"])
def test_a_second_command_does_not_disturb_the_first(
    device: Device, update: Update, faults: Faults, command: Order
) -> None:
    """Somebody else runs a command while an installation works: it is refused, with the reason."""
    faults.arm(second_command(command).when(slot_write(percent=10)))
    ended = device.update(update)
    assert ended.exit_code == 0, ended.cause
    told = device.heard(SECOND_HAND)
    assert told, "the second command did not end"
    assert "ended with 0" not in told, told
    device.retry(update)


@allure.story("Two hands")
@pytest.mark.lg_feature("network")
def test_the_status_can_be_asked_for_meanwhile(
    device: Device, update: Update, faults: Faults
) -> None:
    """Somebody asks for the status during an installation: it is told."""
    faults.arm(second_command("status").when(slot_write(percent=10)))
    ended = device.update(update)
    assert ended.exit_code == 0, ended.cause
    assert "ended with 0" in device.heard(SECOND_HAND)
    device.retry(update)


@allure.story("Too early, too late")
def test_a_second_commit_has_nothing_to_do(device: Device, update: Update) -> None:
    """Commit, after the device has committed by itself."""
    device.update(update)
    for _ in range(2):
        assert device.command(device.uut.commit()).code == NOTHING_IN_PROGRESS
    device.retry(update)


@allure.story("Too early, too late")
def test_a_rollback_after_the_commit_has_nothing_to_do(device: Device, update: Update) -> None:
    """Rollback, after the commit: the new system stays."""
    device.update(update)
    assert device.command(device.uut.rollback()).code == NOTHING_IN_PROGRESS
    device.reboot()
    device.retry(update)


@allure.story("Too early, too late")
def test_a_commit_before_the_restart_is_refused(device: Device, update: Update) -> None:
    """Commit, before the new system has run at all."""
    device.install(update)
    assert device.command(device.uut.commit()).code == 1
    device.look("after the refused commit")
    device.reboot()
    device.retry(update)


@allure.story("Too early, too late")
def test_a_rollback_before_the_restart(device: Device, update: Update) -> None:
    """Rollback, before the restart: the old system stays, and the update can be repeated."""
    device.install(update)
    assert device.command(device.uut.rollback()).code == 0
    boot = device.reboot()
    assert boot is not None
    assert boot.version == device.base.name, f"{boot.version} runs"
    device.read_status()
    device.retry(update)


@allure.story("Too early, too late")
@pytest.mark.parametrize("command", ["commit", "rollback"])
def test_nothing_in_progress_is_told(device: Device, command: str) -> None:
    """Commit or rollback on a device that never had an update."""
    assert device.command(f"updater {command}").code == NOTHING_IN_PROGRESS
    device.look("afterwards")
    device.reboot()


@allure.story("Too early, too late")
def test_installing_twice_before_the_restart(device: Device, update: Update) -> None:
    """The same update is installed again before the restart: refused, the first one stands."""
    device.install(update)
    again = device.command(device.uut.install(update.url))
    assert again.code == 1
    assert "not finished" in again.text, again.text
    device.look("after the refused installation")
    device.reboot()
    device.retry(update)
