"""The pytest plugin refuses what a rig can't do at collection, before anything is started."""

import pytest

pytest_plugins = ["pytester"]

RIG = """
targets:
  main:
    features: [linux, network, power-cut]
    drivers: {}
"""
SCENARIOS = """
import pytest
from framework.faults import after, connection, flush, hang, link_down, power_cut, stream_byte

@pytest.mark.parametrize("fault", [
    connection("fin").when(stream_byte(1)),
    link_down(),
    hang().when(flush()),
    power_cut().when(after(link_down())),
], ids=str)
def test_something(fault):
    pass

def test_without_faults():
    pass
"""


def test_a_scenario_whose_fault_the_rig_cannot_do_is_skipped_by_the_features_name(
    pytester: pytest.Pytester,
) -> None:
    pytester.makefile(".yaml", bare=RIG)
    pytester.makepyfile(SCENARIOS)
    arguments = ("-p", "no:cacheprovider", "-rs", "--lg-env", "bare.yaml")
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines_random(
        [
            "*needs the feature link, which bare.yaml does not have",
            "*needs the feature watchdog, which bare.yaml does not have",
        ]
    )
