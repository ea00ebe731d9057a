"""The disk lies: a bit stored wrong, and nobody says so."""

import allure
import pytest

from framework.faults import slot_write
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

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
