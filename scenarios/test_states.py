"""The power goes at the entry of each of the updater's states, on its way forward and on its way
back; what the state would have done is undone, repeated or finished by the next boot.
"""

import allure
import pytest

from framework.faults import state
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [
    allure.feature("Power"),
    allure.story("Cut at each state"),
    pytest.mark.lg_feature("power-cut"),
]


@pytest.mark.parametrize("name", ["Download", "ArtifactInstall", "ArtifactReboot"])
def test_cut_at_each_state_of_the_install(
    device: Device, update: Update, faults: Faults, name: str
) -> None:
    """Power cut as the updater enters a state, on the old system."""
    faults.power_cut(model="subset").when(state(name))
    device.install(update)
    device.restore()
    device.retry(update)


@pytest.mark.parametrize("name", ["ArtifactVerifyReboot", "ArtifactCommit", "Cleanup"])
def test_cut_at_each_state_after_the_restart(
    device: Device, update: Update, faults: Faults, name: str
) -> None:
    """Power cut as the updater enters a state, on the new system."""
    device.install(update)
    faults.power_cut(model="subset").when(state(name))
    device.reboot()
    device.restore()
    device.retry(update)


@pytest.mark.update("unhealthy")
@pytest.mark.parametrize(
    "name",
    [
        "ArtifactRollback",
        "ArtifactRollbackReboot",
        "ArtifactVerifyRollbackReboot",
        "ArtifactFailure",
        "Cleanup",
    ],
)
def test_cut_at_each_state_of_the_way_back(
    device: Device, update: Update, faults: Faults, name: str
) -> None:
    """Power cut as the updater enters a state, while it leaves a system that is unhealthy."""
    device.install(update)
    faults.power_cut(model="subset").when(state(name))
    device.reboot()
    device.restore()
    assert device.running is not None
    assert device.running.version == device.base.name, f"{device.running.version} runs"
