"""The pytest plugin refuses what a rig can't do at collection, and counts a rig that is lost."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from framework.report import ResultStore

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


REPOSITORY = Path(__file__).parents[2]
LOST = """
import os, signal, threading, time
import allure, pytest

pytestmark = allure.feature("Lost")

@pytest.fixture
def lost_soon(bench):
    def kill():
        while not bench.machine.get():
            time.sleep(0.02)
        os.kill(bench.machine.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()

def test_at_the_start(lost_soon, device):
    pass

def test_in_the_middle(device, update):
    threading.Timer(1.0, os.kill, (device.machine.pid, signal.SIGKILL)).start()
    device.install(update)
"""


@pytest.mark.emulated
@pytest.mark.slow
def test_a_rig_that_is_lost_is_infrastructure_wherever_one_looks(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU is killed by somebody else: in the first start, and in an installation."""
    monkeypatch.chdir(REPOSITORY)
    path = pytester.makepyfile(test_lost=LOST)
    folder = pytester.path
    result = pytester.run(
        *(
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            f"--rootdir={REPOSITORY}",
            path,
        ),
        *("--lg-env", REPOSITORY / "rigs" / "qemu-arm64.yaml"),
        *("--brownout-results", folder / "results", "--alluredir", folder / "allure"),
        *("--junitxml", folder / "junit.xml"),
    )
    result.assert_outcomes(failed=1, errors=1)
    found = ResultStore(folder / "results").read_all()
    assert [run.verdict for run in found] == ["INFRASTRUCTURE"] * 2
    assert all("QEMU ended by itself" in run.error for run in found)
    assert {run.feature for run in found} == {"Lost"}
    cases = ElementTree.parse(folder / "junit.xml").iter("testcase")
    told = [{p.get("name"): p.get("value") for p in case.iter("property")} for case in cases]
    assert [one["verdict"] for one in told] == ["INFRASTRUCTURE"] * 2
    assert all(str(one["cause"]).startswith("The rig lost contact") for one in told)
    allure = [json.loads(one.read_text()) for one in (folder / "allure").glob("*-result.json")]
    assert [one["status"] for one in allure] == ["broken"] * 2
    assert all("InfrastructureError" in one["statusDetails"]["message"] for one in allure)
