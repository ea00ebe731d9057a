"""The report in a real headless browser: small and with a thousand runs, light and dark.

The runs are real ones, of the emulated arm64 board (`kept/`): two that passed, one that was left
again by itself, and one that failed, because the fault proxy of that day had lost its port.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from attrs import evolve
from report_browser import chromium, shoot, wait

from framework.report import ScenarioResult, write_report
from framework.report.html import PAYLOAD_BYTES
from framework.report.results import from_json

KEPT = Path(__file__).parent / "kept" / "runs.jsonl.zst"
THOUSAND = 1000
RESPONSE_S = 10.0
"""Generous: a page that blocks for longer than this hangs, on however slow a machine."""


def kept() -> list[ScenarioResult]:
    data = zstandard.ZstdDecompressor().stream_reader(KEPT.read_bytes()).read()
    return [from_json(json.loads(line)) for line in data.splitlines()]


class Many(Collection[ScenarioResult]):
    """The kept runs over and over, with verdicts and states that vary."""

    def __init__(self, count: int) -> None:
        self._kept, self._count = kept(), count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, _: object) -> bool:
        return True

    def __iter__(self) -> Iterator[ScenarioResult]:
        for number in range(self._count):
            run = self._kept[number % len(self._kept)]
            run = evolve(run, scenario=f"{run.scenario}#{number}", seed=number)
            if number % 11 == 3:
                run = evolve(run, verdict="FAILED", error=f"AssertionError: exit code {number}")
            elif number % 53 == 5:
                run = evolve(run, verdict="INFRASTRUCTURE", error="InfrastructureError: QEMU ended")
            states = ("Download", "ArtifactInstall", "ArtifactCommit", "starting", "Cleanup")
            strikes = tuple(
                evolve(strike, state=states[(number + at) % len(states)])
                for at, strike in enumerate(run.strikes)
            )
            yield evolve(run, strikes=strikes)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def opened(browser: Any, path: Path) -> None:
    browser.get(f"{path.as_uri()}")
    wait(browser, "document.getElementById('count').textContent !== ''", "the script did not run")


def visible_rows(browser: Any) -> int:
    return int(
        browser.execute_script(
            "return document.querySelectorAll('tr[data-run]:not([hidden])').length"
        )
    )


def view(browser: Any) -> tuple[float, float]:
    # Drawn in the browser's next frame.
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    data = "document.querySelector('canvas').dataset"
    return tuple(browser.execute_script(f"return [+{data}.from, +{data}.to]"))


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def show_run(browser: Any, index: int) -> None:
    browser.execute_script(f"location.hash = '#run-{index}'")
    wait(browser, f"document.getElementById('run').dataset.shown === '{index}'", f"no run {index}")


@pytest.mark.slow
def test_a_developer_goes_from_the_matrix_to_the_moment_of_the_failure(
    browser: Any, tmp_path: Path
) -> None:
    runs = kept()
    (failed,) = [at for at, run in enumerate(runs) if not run.passed]
    opened(browser, write_report(runs, tmp_path / "report.html", "Brownout: qemu-arm64"))
    assert visible_rows(browser) == len(runs)
    shoot(browser, "report-index")

    cell = browser.find_element("css selector", ".matrix button.broken")
    cell.click()
    assert visible_rows(browser) == 1, "a cell shows its runs"
    browser.find_element("css selector", "tr[data-run]:not([hidden]) a").click()
    wait(browser, f"document.getElementById('run').dataset.shown === '{failed}'", "no page")
    cause = browser.find_element("id", "cause").text
    assert cause.startswith("After server refusing in Download: invariant 6 (converges) broke: ")
    assert view(browser) == (0, pytest.approx(runs[failed].elapsed_s, abs=0.01))
    shoot(browser, "run-whole")

    strike = runs[failed].strikes[0]
    browser.find_element("xpath", "//button[starts-with(., '⚡')]").click()
    start, end = view(browser)
    assert start < strike.at_s < end
    assert end - start < 4
    here = browser.find_element("css selector", ".console .here")
    assert abs(float(here.find_element("css selector", "span").text) - strike.at_s) < 5
    assert here.is_displayed()
    box, line = browser.find_element("css selector", ".console").rect, here.rect
    assert box["y"] <= line["y"] <= box["y"] + box["height"], "the console is at that moment"
    shoot(browser, "run-at-the-fault")
    assert errors(browser) == []


@pytest.mark.slow
def test_the_timeline_zooms_moves_and_tells_what_is_under_the_pointer(
    browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    runs = kept()
    opened(browser, write_report(runs, tmp_path / "report.html", "t"))
    show_run(browser, 0)
    canvas = browser.find_element("css selector", "canvas")
    whole = view(browser)
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -400).perform()
    closer = view(browser)
    assert closer[1] - closer[0] < 0.9 * (whole[1] - whole[0])
    ActionChains(browser).drag_and_drop_by_offset(canvas, -150, 0).perform()
    moved = view(browser)
    assert moved[0] > closer[0]
    assert moved[1] - moved[0] == pytest.approx(closer[1] - closer[0])
    canvas.send_keys(Keys.ARROW_LEFT)
    assert view(browser)[0] < moved[0]
    canvas.send_keys("+")
    assert view(browser)[1] - view(browser)[0] < closer[1] - closer[0]
    canvas.send_keys("0")
    assert view(browser) == whole
    ActionChains(browser).move_to_element_with_offset(
        canvas, 0, -canvas.size["height"] // 2 + 20
    ).perform()
    tip = browser.find_element("css selector", ".tip")
    assert tip.is_displayed()
    doing = ("Download", "starting", "Idle", "Artifact", "Installed", "off", "Cleanup")
    assert tip.text.startswith(doing)
    assert errors(browser) == []


@pytest.mark.slow
def test_a_thousand_runs_open_are_filtered_and_shown_without_a_pause(
    browser: Any, tmp_path: Path
) -> None:
    runs = Many(THOUSAND)
    path = write_report(runs, tmp_path / "report.html", "Brownout: a night of 1000 runs")
    assert path.stat().st_size < PAYLOAD_BYTES
    began = time.monotonic()
    opened(browser, path)
    took = time.monotonic() - began
    print(f"{path.stat().st_size / 2**20:.1f} MiB, opened in {took:.2f} s")
    assert visible_rows(browser) == THOUSAND
    assert browser.execute_script("return document.getElementById('run').childElementCount") == 0
    shoot(browser, "thousand-index")
    for index in (0, 500, 999):
        began = time.monotonic()
        show_run(browser, index)
        took = time.monotonic() - began
        print(f"run {index} shown in {took:.2f} s")
        assert took < RESPONSE_S
        assert view(browser)[1] > 10
    shoot(browser, "thousand-run")
    browser.find_element("link text", "All runs").click()
    wait(browser, "!document.getElementById('index').hidden", "the list did not come back")
    began = time.monotonic()
    browser.find_element("css selector", "button[data-grade='broken']").click()
    failed = sum(run.verdict not in ("PASS", "INFRASTRUCTURE") for run in runs)
    assert visible_rows(browser) == failed
    words = browser.find_element("id", "words")
    words.send_keys("exit code 509")
    assert visible_rows(browser) == 1
    print(f"filtered in {time.monotonic() - began:.2f} s")
    shoot(browser, "thousand-filtered")
    assert errors(browser) == []


@pytest.mark.slow
def test_the_report_is_readable_on_a_dark_screen(tmp_path: Path) -> None:
    path = write_report(kept(), tmp_path / "report.html", "Brownout: dark")
    with chromium(tmp_path / "profile", dark=True) as browser:
        opened(browser, path)
        ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert max(int(part) for part in ground.strip("rgb()").split(",")) < 60
        shoot(browser, "dark-index")
        show_run(browser, 0)
        view(browser)
        shoot(browser, "dark-run")


def test_a_run_that_cannot_be_unpacked_is_told_on_the_page(browser: Any, tmp_path: Path) -> None:
    path = write_report(kept()[:1], tmp_path / "report.html", "t")
    text = path.read_text()
    at = text.index('id="data-0">') + len('id="data-0">')
    path.write_text(text[:at] + "AAAA" + text[at + 400 :])
    opened(browser, path)
    show_run(browser, 0)
    assert "This run can't be shown here" in browser.find_element("id", "run").text
