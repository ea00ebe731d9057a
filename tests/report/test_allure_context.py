"""Allure's environment, categories and history: every failure is in exactly one category."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from framework.report.allure import CATEGORIES, leave_context
from framework.targets.errors import InfrastructureError
from framework.verdict import ViolationError


@pytest.mark.parametrize(
    ("status", "message", "category"),
    [
        ("failed", "ViolationError: VIOLATION(2,5): 2 all or nothing: x", "an invariant broke"),
        ("failed", f"{ViolationError.__name__}: BRICKED: 1 boots:\nsilent", "bricked"),
        ("failed", "AssertionError: exit code 4\nassert 4 == 1", "not as expected"),
        ("broken", f"x.{InfrastructureError.__name__}: QEMU\nended", "the rig was lost"),
        ("broken", "UnfiredError: the fault never happened: power cut", "proves nothing"),
        ("broken", "", "proves nothing"),
    ],
)
def test_every_failure_is_in_exactly_one_category(status: str, message: str, category: str) -> None:
    inside = [
        one["name"]
        for one in CATEGORIES
        if status in one["matchedStatuses"] and re.fullmatch(str(one["messageRegex"]), message)
    ]
    assert len(inside) == 1
    assert category in inside[0]


def test_the_environment_is_a_file_of_properties(tmp_path: Path) -> None:
    leave_context(tmp_path, {"rig": "qemu-arm64", "path": "C:\\x\ny"})
    text = (tmp_path / "environment.properties").read_text()
    assert text == "rig=qemu-arm64\npath=C:\\\\x y\n"
    assert "buildOrder" not in json.loads((tmp_path / "executor.json").read_text())


def test_the_history_of_the_last_report_is_gone_on_with(tmp_path: Path) -> None:
    last, results = tmp_path / "history", tmp_path / "results"
    last.mkdir()
    results.mkdir()
    (last / "history-trend.json").write_text('[{"buildOrder": 4, "data": {}}, {"buildOrder": 3}]')
    (last / "history.json").write_text("{}")
    (last / "retry-trend.json").write_text("{ damaged")
    leave_context(results, {"rig": "r"}, history=last)
    assert {path.name for path in (results / "history").iterdir()} == {
        "history-trend.json",
        "history.json",
    }
    executor = json.loads((results / "executor.json").read_text())
    assert (executor["buildOrder"], executor["buildName"]) == (5, "r #5")
    leave_context(results, {"rig": "r"}, history=tmp_path / "none")
    assert json.loads((results / "executor.json").read_text())["buildOrder"] == 1


def test_without_results_nothing_is_left(tmp_path: Path) -> None:
    leave_context(tmp_path / "none", {})
    assert not (tmp_path / "none").exists()
