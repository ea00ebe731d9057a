"""What all scenarios share: they need a rig, and they are Allure's epic."""

import allure
import pytest


@pytest.fixture(autouse=True)
def _epic(request: pytest.FixtureRequest) -> None:
    """File every scenario under one epic, with the rig as its parameter."""
    allure.dynamic.epic("A/B update under faults")
    rig = request.config.getoption("lg_env")
    allure.dynamic.parameter("rig", str(rig).rsplit("/", 1)[-1].removesuffix(".yaml"))
