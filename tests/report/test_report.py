"""Results survive as files, and the report is one offline page that escapes what it shows."""

import base64
import hashlib
import json
import random
import re
import weakref
import zlib
from collections.abc import Collection, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from framework.report import (
    ConsoleLine,
    FindingRecord,
    Moment,
    OperationRecord,
    RegionRecord,
    ResultError,
    ResultStore,
    ScenarioResult,
    Strike,
    Traffic,
    write_report,
)
from framework.report.html import grade_of, matrix_of, pack
from framework.report.picture import draw

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
    strikes=(Strike(1.0, "power", "power cut", "Download"),),
    traffic=(Traffic(0.2, 10, 0), Traffic(0.9, 20, 4000)),
    lines=(
        ConsoleLine(0.1, "RX", "<script>alert(1)</script>"),
        ConsoleLine(0.2, "TX", "updater install"),
    ),
    feature="Power",
    story="Cut",
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
    with pytest.raises(ResultError, match="format is not 2"):
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


def pages(text: str) -> list[dict[str, Any]]:
    """What the runs' own pages hold, unpacked as the script does it."""
    found = re.findall(r'<script type="text/plain" id="data-\d+">([^<]*)</script>', text)
    return [json.loads(zlib.decompress(base64.b64decode(one), -zlib.MAX_WBITS)) for one in found]


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    failed = evolve(RESULT, verdict="VIOLATION(2)", title="<b>bold</b>", error="</script><b>")
    text = write_report([RESULT, failed], tmp_path / "report.html", "Title & more").read_text()
    page = Page()
    page.feed(text)
    assert page.fetched == []
    assert "Title & more" in page.text
    assert RESULT.fault in page.text
    assert "alert(1)" not in text, "what the device said is packed"
    assert "b" not in page.tags
    assert page.tags.count("script") == 3
    assert {"img", "link", "iframe"}.isdisjoint(page.tags)


def test_only_the_reports_own_script_may_run(tmp_path: Path) -> None:
    text = write_report([RESULT], tmp_path / "report.html", "t").read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_a_runs_page_has_everything_that_its_result_has(tmp_path: Path) -> None:
    (page,) = pages(write_report([RESULT], tmp_path / "report.html", "t").read_text())
    assert page["operations"] == [
        [0.5, 1, "write", "vda", 4096, 512],
        [0.6, 2, "flush", "vda", 0, 0],
        [0.7, 3, "write", "vda", 0, 512],
    ]
    assert page["lines"][0] == [0.1, "RX", "<script>alert(1)</script>"]
    assert page["traffic"] == [[0.2, 10, 0], [0.9, 20, 4000]]
    assert page["strikes"] == [[1.0, "power", "power cut", "Download"]]
    assert page["spans"][0] == ["off", 0.0, 12.5]
    assert page["left_out"] == []


def test_a_page_that_is_too_large_is_thinned_and_says_so() -> None:
    noise = random.Random(4)
    big = evolve(
        RESULT,
        operations=tuple(
            OperationRecord(at / 100, at, "write", "vda", noise.randrange(1 << 40), 512)
            for at in range(4000)
        ),
        operation_count=9000,
        lines=tuple(ConsoleLine(at, "RX", noise.randbytes(30).hex()) for at in range(1000)),
        traffic=tuple(Traffic(at, at * 7, at * 5) for at in range(1000)),
    )
    packed = pack(big, 16 << 10)
    assert len(packed) <= 16 << 10
    page = json.loads(zlib.decompress(base64.b64decode(packed), -zlib.MAX_WBITS))
    assert {what: of for what, _, of in page["left_out"]} == {
        "disk operations": 9000,
        "console lines": 1000,
    }
    assert page["traffic"][-1] == [999, 6993, 4995], "the sum is never left out"
    assert page["lines"][-1][2] == big.lines[-1].text, "the end of the console is kept"
    assert page["moments"] == [[m.at_s, m.source, m.text] for m in big.moments]


def test_the_matrix_counts_a_run_in_the_cell_of_each_fault_that_struck() -> None:
    cut, lost = ("power", "power cut", "Download"), ("network", "connection lost", "Download")
    again = ("power", "power cut", "starting")
    matrix = matrix_of(
        [
            ("PASS", [cut]),
            ("VIOLATION(2)", [cut, cut, again]),
            ("INFRASTRUCTURE", [lost, cut]),
            ("PASS", []),
        ]
    )
    assert matrix.columns == ("starting", "Download", "no fault")
    rows = {row.what: row.cells for row in matrix.rows}
    assert list(rows) == ["connection lost", "power cut", "no fault"]
    power = rows["power cut"]
    assert [(c.held, c.broken, c.rig) for c in power] == [(0, 1, 0), (1, 1, 1), (0, 0, 0)]
    assert [cell.grade for cell in power] == ["broken", "broken", ""]
    assert rows["connection lost"][1].grade == "rig"
    assert rows["no fault"][2].total == 1
    assert matrix.places == (((1, 1),), ((1, 1), (1, 0)), ((0, 1), (1, 1)), ((2, 2),))


def test_only_what_the_device_did_counts_as_its_failure() -> None:
    verdicts = ("PASS", "VIOLATION(3)", "BRICKED", "FAILED", "BROKEN", "INFRASTRUCTURE")
    assert [grade_of(verdict) for verdict in verdicts] == [
        *("held", "broken", "broken", "broken", "rig", "rig")
    ]


def test_all_failures_are_listed_and_of_the_rest_as_many_as_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.report.html.MOST_RUNS", 3)
    small = evolve(RESULT, operations=(), lines=())
    bad = evolve(small, verdict="BRICKED")
    text = write_report([small] * 6 + [bad] * 2, tmp_path / "r.html", "t").read_text()
    assert [page["verdict"] for page in pages(text)] == ["PASS", "BRICKED", "BRICKED"]
    assert "Of 8 runs 3 are listed" in text
    assert "6 of 8 runs passed, 2 failed" in text
    assert len(pages(write_report([bad] * 5, tmp_path / "r.html", "t").read_text())) == 5


def test_runs_that_have_more_than_their_share_fit_into_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 2 << 20
    monkeypatch.setattr("framework.report.html.PAYLOAD_BYTES", bound)
    noise = random.Random(5)
    full = evolve(
        RESULT,
        lines=tuple(ConsoleLine(at, "RX", noise.randbytes(40).hex()) for at in range(1500)),
    )
    assert len(pack(full, 1 << 30)) > 3 * bound // 100
    runs = Repeated(full, 100)
    assert write_report(runs, tmp_path / "r.html", "t").stat().st_size < bound + (256 << 10)
    assert runs.alive_at_once <= 2, "results are read when they are asked for"


class Repeated(Collection[ScenarioResult]):
    """One result many times, made anew each time; counts how many are alive."""

    def __init__(self, result: ScenarioResult, count: int) -> None:
        self._result, self._count = result, count
        self._alive: list[weakref.ref[object]] = []
        self.alive_at_once = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[ScenarioResult]:
        for number in range(self._count):
            heavy = tuple(evolve(line) for line in self._result.lines[:1]) + self._result.lines[1:]
            self._alive = [one for one in self._alive if one() is not None]
            self._alive.append(weakref.ref(heavy[0]))
            self.alive_at_once = max(self.alive_at_once, len(self._alive))
            yield evolve(self._result, scenario=f"run {number}", lines=heavy)


def test_a_report_without_results_is_a_page_too(tmp_path: Path) -> None:
    assert "0 of 0" in write_report([], tmp_path / "report.html", "t").read_text()


def test_a_console_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    odd = evolve(RESULT, title="bad \udcff", lines=(ConsoleLine(0.0, "RX", "bad \udcff\x00"),))
    text = write_report([odd], tmp_path / "report.html", "t").read_text()
    assert pages(text)[0]["lines"][0][2].startswith("bad")


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot be written"):
        write_report([RESULT], tmp_path / "file" / "report.html", "t")


def test_the_picture_shows_what_lies_in_a_region_and_nothing_else() -> None:
    text = draw(RESULT.operations, RESULT.moments, RESULT.regions, RESULT.elapsed_s)
    assert "operation 1: write, 512 bytes at 4096 of vda" in text
    assert "operation 2: flush" in text
    assert "operation 3" not in text
    assert "cut &lt;here&gt;" in text
