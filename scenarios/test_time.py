"""The clock is wrong: in the past, in the future, and it jumps."""

import allure
import pytest

from framework.faults import Fault, clock, clock_battery, downloaded, state
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update
from framework.scenario.outcomes import fails_cleanly, goes_through

pytestmark = [allure.feature("Time")]


@allure.story("Dead battery")
@pytest.mark.lg_feature("rtc")
@pytest.mark.parametrize("at", ["1970-01-01", "2000-01-01"])
def test_a_device_whose_clock_starts_in_the_past_updates(
    device: Device, update: Update, faults: Faults, at: str
) -> None:
    """The clock's battery is dead: no certificate is valid yet, and the update works."""
    faults.arm(clock_battery(at))
    device.reboot()
    goes_through(device, update)


@allure.story("Jumps")
@pytest.mark.parametrize(
    "fault",
    [
        clock("1970-01-01T00:00:10"),
        clock("1970-01-01T00:00:10").when(downloaded(percent=50)),
        clock("2037-06-01").when(downloaded(percent=50)),
        clock("2003-01-01").when(state("ArtifactInstall")),
    ],
    ids=str,
)
def test_a_clock_that_jumps_ends_no_update(
    device: Device, update: Update, faults: Faults, fault: Fault
) -> None:
    """The clock is set back or forward, before or during the installation."""
    faults.arm(fault)
    goes_through(device, update)


@allure.story("Jumps")
def test_a_clock_beyond_the_certificates_end_is_told(
    device: Device, update: Update, faults: Faults
) -> None:
    """The clock says 2060: the certificate has expired, and the device says so."""
    faults.arm(clock("2060-01-01"))
    fails_cleanly(device, update, says="certificate")
