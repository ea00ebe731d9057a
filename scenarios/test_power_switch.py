"""The power of a board goes at its switch, at what can be seen from outside.

What the drive keeps is the drive's own affair. Where the power can be cut at an operation of the
disk, `test_power.py` and `test_states.py` cut it at these moments.
"""

import allure
import pytest

from framework.faults import Trigger, console, power_cut, state, stream_byte
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [
    allure.feature("Power"),
    allure.story("Cut at the switch"),
    pytest.mark.lg_feature("power-switch"),
]


@pytest.mark.smoke
def test_switched_off_before_the_new_system_is_committed(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power off on the new system, before it is committed."""
    device.install(update)
    faults.arm(power_cut().when(console("BROWNOUT INIT slot=b")))
    device.reboot()
    device.restore()
    device.retry(update)


@pytest.mark.parametrize(
    "trigger",
    [
        state("Download"),
        state("ArtifactInstall"),
        console("updater: installed"),
        stream_byte(1_000_000),
    ],
    ids=str,
)
def test_switched_off_in_an_install(
    device: Device, update: Update, faults: Faults, trigger: Trigger
) -> None:
    """Power off at what an installation says, or at a byte of its download."""
    faults.arm(power_cut().when(trigger))
    if device.install(update).exit_code is not None:
        device.reboot()
    device.restore()
    device.retry(update)


def test_switched_off_right_after_the_commit(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power off as soon as the commit is acknowledged."""
    device.install(update)
    faults.arm(power_cut().when(console("updater: committed")))
    device.reboot()
    device.restore()
    device.retry(update)
