"""Updates without a fault, there and back: what every other scenario is compared with."""

import allure
import pytest

from framework.network import FaultProxy
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update

pytestmark = [allure.feature("Update"), allure.story("No fault")]


@pytest.mark.smoke
def test_update_is_installed_checked_and_committed(device: Device, update: Update) -> None:
    """An update without a fault."""
    device.update(update)
    device.retry(update)


def test_second_update_goes_back_to_the_first_slot(
    device: Device, update: Update, bench: Bench, proxy: FaultProxy
) -> None:
    """An update of an update: slot b back to slot a."""
    device.update(update)
    back = bench.update("v1", proxy.port)
    device.update(back)
    device.retry(back)
