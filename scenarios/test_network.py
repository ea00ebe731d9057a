"""The network fails in the middle of a download: lost, silent, slow, wrong, unplugged."""

import allure
import pytest

from framework.faults import (
    Fault,
    connection,
    downloaded,
    link_down,
    name_gone,
    slow_network,
    stream_byte,
)
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.outcomes import fails_cleanly, goes_through, went_back

pytestmark = [allure.feature("Network"), pytest.mark.lg_feature("network")]


@allure.story("Connection lost")
@pytest.mark.smoke
def test_connection_lost_in_the_middle_of_the_download(
    device: Device, update: Update, faults: Faults
) -> None:
    """The connection breaks twice in the middle of the download; it is resumed."""
    faults.network("fin", times=2).when(downloaded(percent=40))
    goes_through(device, update)


@allure.story("Connection lost")
@pytest.mark.parametrize(
    "fault",
    [
        connection("fin").when(stream_byte(0)),
        connection("fin").when(stream_byte(300, "up")),
        connection("reset", times=4).when(downloaded(percent=15)),
    ],
    ids=str,
)
def test_a_lost_connection_is_taken_up_again(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The connection is lost: in the handshake, near the end, in the request, again and again."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Connection lost")
def test_server_gone_for_good(device: Device, update: Update, faults: Faults) -> None:
    """The server refuses from the middle of the download on: a clean failure, then a retry."""
    faults.network("refuse").when(downloaded(percent=50))
    fails_cleanly(device, update)


@allure.story("Connection lost")
def test_server_gone_for_a_while(device: Device, update: Update, faults: Faults) -> None:
    """The server refuses for a while in the middle of the download."""
    faults.arm(connection("refuse", lasts_s=4).when(downloaded(percent=50)))
    goes_through(device, update)


@allure.story("Connection lost")
def test_server_gone_after_the_restart(device: Device, update: Update, faults: Faults) -> None:
    """The server is gone when the new system starts: it is good all the same."""
    device.install(update)
    faults.arm(connection("refuse"))
    boot = device.reboot()
    assert boot is not None
    assert boot.version == update.name, f"{boot.version} runs"
    device.read_status()
    device.retry(update)


@allure.story("Connection silent")
@pytest.mark.parametrize(
    "fault",
    [
        connection("stall", lasts_s=6).when(downloaded(percent=50)),
        connection("black-hole", lasts_s=5).when(downloaded(percent=30)),
    ],
    ids=str,
)
def test_network_silent_for_a_while(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The network goes silent for a while; the download goes on."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Slow network")
@pytest.mark.parametrize(
    "fault",
    [
        slow_network(bytes_per_s=2 << 20),
        slow_network(bytes_per_s=20_000, lasts_s=5).when(downloaded(percent=50)),
    ],
    ids=str,
)
def test_a_slow_network_is_only_slow(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """Few bytes a second, or late ones: the update takes longer, and that is all."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Wrong content")
@pytest.mark.parametrize(
    "fault",
    [
        connection("corrupt").when(downloaded(percent=50)),
        connection("duplicate").when(downloaded(percent=50)),
    ],
    ids=str,
)
def test_a_wrong_byte_is_noticed(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """A byte under TLS is wrong, or comes twice: never installed as it came."""
    faults.arm(fault)
    device.update(update)
    device.retry(update)


@allure.story("Cable")
@pytest.mark.lg_feature("link")
def test_the_cable_is_pulled_for_a_while(device: Device, update: Update, faults: Faults) -> None:
    """The cable is pulled and comes back: TCP or the client goes on."""
    faults.arm(link_down(lasts_s=3).when(downloaded(percent=50)))
    goes_through(device, update)


@allure.story("Cable")
@pytest.mark.lg_feature("link")
def test_the_network_flaps_through_the_whole_download(
    device: Device, update: Update, faults: Faults
) -> None:
    """The cable is pulled and put back again and again during a slow download."""
    faults.arm(slow_network(bytes_per_s=3 << 20))
    faults.arm(link_down(lasts_s=0.8, times=6).when(downloaded(percent=5)))
    goes_through(device, update)


@allure.story("Cable")
@pytest.mark.lg_feature("link")
def test_a_new_system_without_a_cable_is_not_committed(
    device: Device, update: Update, faults: Faults
) -> None:
    """The cable is out when the new system starts: it can't prove itself, and goes back."""
    device.install(update)
    faults.arm(link_down())
    device.reboot()
    device.check_data()
    went_back(device)


@allure.story("Names")
def test_the_servers_name_is_gone(device: Device, update: Update, faults: Faults) -> None:
    """Nobody resolves the server's name: a clean failure that says so, then a retry."""
    faults.arm(name_gone())
    fails_cleanly(device, update, says="name")
