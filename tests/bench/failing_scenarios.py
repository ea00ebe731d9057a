"""Scenarios whose rig fails at an awkward moment; tests of farm runs start them, nobody else."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import little_scenarios
import pytest

from framework.targets.errors import InfrastructureError

strategy = little_scenarios.strategy


@pytest.fixture
def rig_fails_afterwards() -> Iterator[None]:
    yield
    raise InfrastructureError("the rig failed in the teardown")


def test_the_product_fails_and_then_the_rig(strategy: Any, rig_fails_afterwards: None) -> None:
    strategy.transition("ready")
    assert strategy.run("echo wrong").text == "right"


def test_something_else(strategy: Any) -> None:
    strategy.transition("ready")


@pytest.fixture
def everything_fails_afterwards(strategy: Any) -> Iterator[None]:
    yield
    assert not mark().exists(), "what a rig that has failed leaves behind"


def test_the_rig_fails_and_then_all_else(strategy: Any, everything_fails_afterwards: None) -> None:
    strategy.transition("ready")
    if mark().exists():
        mark().unlink()
        return
    mark().touch()
    raise InfrastructureError("the rig failed")


@pytest.fixture(scope="session")
def nobody_has_used_the_place() -> None:
    """Says that there is a place, and waits until whoever reads it says to go on."""
    with contextlib.suppress(FileExistsError), mark().open("x") as written:
        written.write(json.dumps({"pid": os.getpid(), "token": os.environ["LG_TOKEN"]}) + "\n")
    deadline = time.monotonic() + 200
    while not mark().with_name("go").exists():
        assert time.monotonic() < deadline, "nobody says to go on"
        time.sleep(0.02)


def test_the_place_is_used_late(
    nobody_has_used_the_place: None, request: pytest.FixtureRequest
) -> None:
    assert request.getfixturevalue("strategy").boot().ready


def mark() -> Path:
    return Path(os.environ["FARM_MARK"])
