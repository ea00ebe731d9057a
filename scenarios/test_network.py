"""The network fails in the middle of a download."""

import allure
import pytest

from framework.faults import downloaded
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [allure.feature("Network"), pytest.mark.lg_feature("network")]


@allure.story("Connection lost")
@pytest.mark.demo(cost=2)
@pytest.mark.smoke
def test_connection_lost_in_the_middle_of_the_download(
    device: Device, update: Update, faults: Faults
) -> None:
    """The connection breaks twice in the middle of the download; it is resumed."""
    faults.network("fin", times=2).when(downloaded(percent=40))
    ended = device.install(update)
    assert ended.exit_code == 0, f"the download was not resumed: {ended.cause}"
    device.reboot()
    device.retry(update)


@allure.story("Connection lost")
def test_server_gone_for_good(device: Device, update: Update, faults: Faults) -> None:
    """The server refuses from the middle of the download on: a clean failure, then a retry."""
    faults.network("refuse").when(downloaded(percent=50))
    ended = device.install(update)
    assert ended.exit_code == 1
    device.check_data()
    device.retry(update)


@allure.story("Connection silent")
def test_network_silent_for_a_while(device: Device, update: Update, faults: Faults) -> None:
    """The network goes silent for a while; the download goes on."""
    faults.network("stall", lasts_s=6).when(downloaded(percent=50))
    ended = device.install(update)
    assert ended.exit_code == 0, ended.cause
    device.reboot()
    device.retry(update)


@allure.story("Wrong content")
def test_a_corrupted_byte_is_noticed(device: Device, update: Update, faults: Faults) -> None:
    """A byte is corrupted under TLS: never installed as it came."""
    faults.network("corrupt").when(downloaded(percent=50))
    device.update(update)
    device.retry(update)
