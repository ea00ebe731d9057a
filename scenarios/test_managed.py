"""The daemon on the device, a real management server, and the power cut in between."""

import allure
import pytest

from framework.faults import slot_write
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [
    allure.feature("Managed"),
    pytest.mark.lg_feature("power-cut"),
    pytest.mark.managed,
]


@allure.story("Cut while the image is written")
@pytest.mark.demo(cost=4)
def test_cut_in_the_middle_of_a_deployed_image(
    device: Device, update: Update, faults: Faults
) -> None:
    """Power cut in the middle of an image that the management server deployed."""
    faults.power_cut(model="subset").when(slot_write(percent=50))
    device.install(update)
    device.restore()
    device.retry(update)
