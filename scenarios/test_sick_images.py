"""The new system is sick: the device goes back to the old one by itself, and says why."""

import allure
import pytest

from framework.scenario.device import Device, Update

pytestmark = [allure.feature("Boot"), allure.story("Sick image")]


def went_back(device: Device, update: Update) -> None:
    """Install the sick update, restart, and expect the old system."""
    device.update(update)
    device.check_data()
    assert device.running is not None
    assert device.running.version == device.base.name, f"{device.running.version} runs"


@pytest.mark.smoke
@pytest.mark.update("unhealthy")
def test_an_unhealthy_image_is_rolled_back(device: Device, update: Update) -> None:
    """The new system boots and fails its health check."""
    went_back(device, update)


@pytest.mark.update("panics")
def test_an_image_that_panics_is_rolled_back(device: Device, update: Update) -> None:
    """The new system's kernel panics at boot."""
    went_back(device, update)


@pytest.mark.lg_feature("watchdog")
@pytest.mark.update("hangs")
def test_an_image_that_hangs_is_rolled_back(device: Device, update: Update) -> None:
    """The new system hangs before it is ready: the watchdog resets it."""
    went_back(device, update)


@pytest.mark.update("offline")
def test_an_image_without_network_is_rolled_back(device: Device, update: Update) -> None:
    """The new system has no network."""
    went_back(device, update)
