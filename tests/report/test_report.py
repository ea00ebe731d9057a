"""Results survive as files, and the report is one offline page that escapes what it shows."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from attrs import evolve

from framework.report import (
    FindingRecord,
    Moment,
    OperationRecord,
    RegionRecord,
    ResultError,
    ResultStore,
    ScenarioResult,
    write_report,
)

RESULT = ScenarioResult(
    scenario="scenarios/test_power.py::test_cut[50-torn]",
    title="Power cut in the middle",
    rig="qemu-arm64",
    fault="power cut when 50 % of the image is written (cache: torn)",
    did=("install of v2 cut short", "runs v1 in slot a after 4.0 s"),
    verdict="PASS",
    findings=(FindingRecord(1, "boots", True, "2 starts"), FindingRecord(2, "whole", None, "-")),
    seed=7,
    elapsed_s=12.5,
    moments=(Moment(1.0, "power", "cut <here>"), Moment(2.0, "console", "U-Boot")),
    operations=(
        OperationRecord(0.5, 1, "write", "vda", 4096, 512),
        OperationRecord(0.6, 2, "flush", "vda", 0, 0),
        OperationRecord(0.7, 3, "write", "vda", 0, 512),
    ),
    operation_count=3,
    regions=(RegionRecord("slot a", "vda", 2048, 8192),),
    console="<script>alert(1)</script>",
    facts={"image v1": "ab" * 32},
)


def test_results_read_back_as_they_were_written(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    other = evolve(RESULT, scenario="scenarios/a.py::b", verdict="VIOLATION(2)")
    store.write(RESULT)
    store.write(other)
    store.write(RESULT)
    assert store.read_all() == [other, RESULT]
    assert [result.passed for result in store.read_all()] == [False, True]


def test_scenarios_with_similar_names_do_not_share_a_file(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    paths = {store.write(evolve(RESULT, scenario=name)) for name in ("a::b[1-2]", "a::b[1_2]")}
    assert len(paths) == 2


def test_a_damaged_result_is_one_clear_line(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.write(RESULT)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ResultError, match=re.escape(str(path))):
        store.read_all()


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.write(RESULT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ResultError, match="format is not 1"):
        store.read_all()


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot make the folder"):
        ResultStore(tmp_path / "file" / "results")


def test_progress_lines_are_whole(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for index in range(3):
        store.progress("s", "step", f"line {index}\nnext")
    lines = store.progress_path.read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == [f"line {i}\nnext" for i in range(3)]


class Page(HTMLParser):
    """Collects what a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("#"):
                self.fetched.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    path = write_report([RESULT], tmp_path / "report.html", "Title & more")
    page = Page()
    page.feed(path.read_text())
    assert page.fetched == []
    assert "script" not in page.tags
    assert "Title & more" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert RESULT.fault in page.text
    assert page.tags.count("svg") == 1


def test_the_picture_shows_what_lies_in_a_region_and_nothing_else(tmp_path: Path) -> None:
    text = write_report([RESULT], tmp_path / "report.html", "t").read_text()
    assert "operation 1: write, 512 bytes at 4096 of vda" in text
    assert "operation 2: flush" in text
    assert "operation 3" not in text
    assert "cut &lt;here&gt;" in text


def test_a_report_without_results_is_a_page_too(tmp_path: Path) -> None:
    assert "0 of 0" in write_report([], tmp_path / "report.html", "t").read_text()


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot be written"):
        write_report([RESULT], tmp_path / "file" / "report.html", "t")
