"""`brownout farm run` on little boards, through labgrid's own coordinator, exporter and ser2net."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from bench_desk import FarmDesk

from framework.farm.history import History

Farm = Callable[..., FarmDesk]


def test_scenarios_run_in_parallel_and_every_place_comes_back(farm_desk: Farm) -> None:
    farm = farm_desk("", "")
    ended = farm.run("--boards", "2", "--skip-check", "-k", "comes_up")
    assert ended.returncode == 0, ended.stdout
    assert "4 PASS; 0 tried again; 0 skipped" in ended.stdout
    assert set(farm.verdicts().values()) == {"PASS"}
    assert len(farm.verdicts()) == 4
    assert not farm.held()


def test_a_failure_of_the_product_is_one_and_is_not_tried_again(farm_desk: Farm) -> None:
    farm = farm_desk("")
    junit = farm.folder / "junit.xml"
    ended = farm.run("--skip-check", "-k", "product_fails or [0]", "--junit", str(junit))
    assert ended.returncode == 1, ended.stdout
    assert farm.verdicts() == {
        "test_it_comes_up_and_answers[0]": "PASS",
        "test_the_product_fails": "FAILED",
    }
    assert "FAILED on little1: tests/bench/little_scenarios.py::test_the_product_fails" in (
        ended.stdout
    )
    assert "0 tried again" in ended.stdout
    assert 'failures="1"' in junit.read_text()
    assert '<property name="place" value="little1"' in junit.read_text()
    report = (farm.folder / "report" / "report.html").read_text()
    assert '<table class="list" id="boards">' in report
    assert '<th scope="row">little1</th><td>2</td><td class="broken">1</td>' in report
    told = json.loads(farm.farm("stats", "--json", "--history", str(farm.history)).stdout)
    assert [(b["place"], b["attempts"], b["failures"], b["infrastructure"]) for b in told] == [
        ("little1", 2, 1, 0)
    ]
    assert told[0]["cycles"] >= told[0]["boots"] >= 1
    assert 0 < told[0]["boot_median_s"] <= told[0]["boot_p95_s"]
    table = farm.farm("stats", "--history", str(farm.history)).stdout
    assert "little1" in table
    assert not farm.held()


@pytest.mark.parametrize("sick", [pytest.param("silent", marks=pytest.mark.night), "welded"])
def test_a_sick_board_is_quarantined_and_the_others_finish(farm_desk: Farm, sick: str) -> None:
    farm = farm_desk("silent" if sick == "silent" else "", "")
    if sick == "welded":
        board = farm.boards["little1"]
        board.switch(True)
        board.weld(True)
    ended = farm.run("--boards", "2", "-k", "comes_up")
    assert ended.returncode == 0, ended.stdout
    assert set(farm.verdicts().values()) == {"PASS"}
    assert "farm: little1: the check says: NO" in ended.stdout
    found = {place.name: place for place in farm.places.all()}
    assert found["little1"].quarantined
    assert found["little1"].comment.startswith("quarantine: Power")
    assert not found["little2"].quarantined
    assert not farm.held()
    places = {each.place for each in History(farm.history).boards()}
    assert places == {"little2"}


def test_where_nothing_can_be_run_it_is_one_line_and_code_two(farm_desk: Farm) -> None:
    farm = farm_desk("")
    for options, message in (
        (["--tags", "board=moon"], "no place has the tags board=moon"),
        (["--tags", "board"], "--tags: 'board' is not like board=rpi4"),
        (["--lg-env", "rigs/qemu-arm64.yaml"], "is not for a farm"),
        (["nowhere.py"], "nowhere.py: there are no such scenarios"),
    ):
        ended = farm.run(*options)
        assert ended.returncode == 2, ended.stdout
        assert message in ended.stdout
        assert len(ended.stdout.splitlines()) == 1, ended.stdout
    farm.places.quarantine("little1", "it smells")
    ended = farm.run()
    assert ended.returncode == 2
    assert ended.stdout.splitlines() == [
        "farm: little1: is in quarantine (it smells)",
        "brownout: all places with the tags board=little are in quarantine",
    ]
