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


@pytest.mark.base("v2")
@pytest.mark.update("v1")
def test_downgrade(device: Device, update: Update) -> None:
    """An older system is installed over a newer one."""
    device.update(update)
    device.retry(update)


@pytest.mark.update("v1")
def test_update_to_what_runs_already(device: Device, update: Update) -> None:
    """The system that runs is installed into the other slot."""
    device.update(update)
    device.retry(update)


@pytest.mark.images("unhealthy")
def test_an_update_after_one_that_was_rolled_back(
    device: Device, update: Update, bench: Bench, proxy: FaultProxy
) -> None:
    """A sick update is left again; the next, healthy one is installed."""
    device.update(bench.update("unhealthy", proxy.port))
    device.update(update)
    device.retry(update)
