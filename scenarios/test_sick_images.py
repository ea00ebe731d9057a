"""The new system is sick: the device goes back to the old one by itself, and says why."""

import allure
import pytest

from framework.scenario.device import Device, Update
from framework.scenario.outcomes import went_back

pytestmark = [allure.feature("Boot"), allure.story("Sick image")]


def is_left(device: Device, update: Update) -> None:
    """Install the sick update, restart, and expect the old system."""
    device.update(update)
    device.check_data()
    went_back(device)


@pytest.mark.smoke
@pytest.mark.update("unhealthy")
def test_an_unhealthy_image_is_rolled_back(device: Device, update: Update) -> None:
    """The new system boots and fails its health check."""
    is_left(device, update)


@pytest.mark.update("panics")
def test_an_image_that_panics_is_rolled_back(device: Device, update: Update) -> None:
    """The new system's kernel panics at boot."""
    is_left(device, update)


@pytest.mark.lg_feature("watchdog")
@pytest.mark.update("hangs")
def test_an_image_that_hangs_is_rolled_back(device: Device, update: Update) -> None:
    """The new system hangs before it is ready: the watchdog resets it."""
    is_left(device, update)


@pytest.mark.update("offline")
def test_an_image_without_network_is_rolled_back(device: Device, update: Update) -> None:
    """The new system has no network."""
    is_left(device, update)
