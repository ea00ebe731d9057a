"""Scenarios for little boards, which the tests of farm runs start; not collected otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def strategy(target: Any) -> Iterator[Any]:
    made = target.get_strategy()
    yield made
    made.transition("off")


@pytest.mark.parametrize("number", range(4))
def test_it_comes_up_and_answers(strategy: Any, number: int) -> None:
    assert strategy.boot().ready
    assert strategy.run(f"echo {number}").text == str(number)


def test_the_product_fails(strategy: Any) -> None:
    strategy.transition("ready")
    assert strategy.run("echo wrong").text == "right"


def test_something_happens_meanwhile(strategy: Any) -> None:
    """Says when it is running, the first time; goes through everything that a rig can spoil."""
    strategy.transition("ready")
    with contextlib.suppress(FileExistsError), Path(os.environ["FARM_MARK"]).open("x") as mark:
        mark.write(json.dumps({"pid": os.getpid(), "token": os.environ["LG_TOKEN"]}) + "\n")
    assert strategy.run("sleep 3; echo done", 60).text == "done"
    strategy.transition("off")
    assert strategy.boot().ready
    assert strategy.run("echo again").text == "again"


@pytest.mark.parametrize("seconds", [0.1, 1.2, 0.2])
def test_it_takes_a_while(strategy: Any, seconds: float) -> None:
    strategy.transition("ready")
    time.sleep(seconds)
