"""Scenarios that prove nothing are errors: a fault that never struck, a body that did nothing."""

import allure
import pytest

from framework.faults import (
    FaultError,
    NetworkDrop,
    UnfiredError,
    connection,
    slot_write,
    state,
    stream_byte,
)
from framework.pytest_plugin import NoVerdictError
from framework.scenario.arming import Faults
from framework.scenario.device import Device, Update

pytestmark = [pytest.mark.emulated, allure.epic("Planted bugs")]


@pytest.mark.xfail(raises=UnfiredError, strict=True)
def test_a_fault_that_never_struck_is_an_error_of_the_scenario(
    device: Device, faults: Faults
) -> None:
    faults.arm(connection("fin").when(stream_byte(1 << 40)))
    faults.power_cut().when(slot_write(percent=50))
    device.look("without an update")


@pytest.mark.xfail(raises=NoVerdictError, strict=True)
def test_a_scenario_that_judges_nothing_is_an_error(device: Device) -> None:
    assert device.running is not None


def test_a_rig_without_the_feature_refuses_before_anything_is_armed(
    device: Device, update: Update, faults: Faults
) -> None:
    faults.features = frozenset({"power-cut"})
    with pytest.raises(FaultError, match="needs the feature network, which the rig"):
        faults.arm(NetworkDrop("fin").when(state("Download")))
    assert faults.armed == []
    device.look("afterwards")
