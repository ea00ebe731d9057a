"""The demonstration: the scenarios marked `demo` on one rig, with a live display and a report.

It builds the images, runs pytest (the same scenarios that a QA engineer runs) in worker processes,
follows their progress file, and prints the table of faults and verdicts. Nothing is judged here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import define
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.report import ResultStore, ScenarioResult, write_report
from images import ImageError, build_target

DEMO_VARIANTS = ("v1", "v2")
STOP_TIMEOUT_S = 20.0
POLL_S = 0.2
LEAST_FREE_BYTES = 1 << 20
PYTEST_PASSED = 0
PYTEST_FAILED = 1
PYTEST_NO_TESTS = 5


class DemoError(Exception):
    """The demonstration could not run; the message says what to do."""


@define
class _Row:
    """One scenario in the live display."""

    fault: str
    doing: str
    started: float
    verdict: str = ""
    ended: float | None = None


def run_demo(rig: Path, output: Path, workers: int, console: Console) -> bool:
    """Run the demonstration; returns whether every scenario passed.

    Raises:
        DemoError: the rig file is missing, images can't be built, or pytest could not run.
    """
    if not rig.is_file():
        raise DemoError(f"{rig}: no such rig; `ls rigs/*.yaml` lists those there are")
    started = time.monotonic()
    _build(rig.stem, console)
    for stale in ("results", "allure-results"):
        shutil.rmtree(output / stale, ignore_errors=True)
    store = ResultStore(output / "results")
    exit_code = _run_scenarios(rig, output, store, workers, console)
    results = store.read_all()
    if exit_code not in (PYTEST_PASSED, PYTEST_FAILED) or not results:
        if shutil.disk_usage(output).free < LEAST_FREE_BYTES:
            raise DemoError(f"{output}: the disk is full; free some space or choose --output")
        raise DemoError(
            f"the scenarios could not run (pytest exit code {exit_code}); see {_log(output)}"
        )
    console.print(verdict_table(results))
    report = write_report(results, output / "report.html", f"Brownout: {rig.stem}")
    passed = sum(result.passed for result in results)
    console.print(f"{passed} of {len(results)} passed in {time.monotonic() - started:.0f} s")
    console.print(f"report:         {report}")
    console.print(f"Allure results: {output / 'allure-results'}")
    return exit_code == PYTEST_PASSED and passed == len(results)


def _build(target: str, console: Console) -> None:
    """Build the rig's images, or find that they are built."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(f"images for {target}")
        try:
            build_target(
                target,
                DEMO_VARIANTS,
                progress=lambda step: progress.update(
                    task, description=f"images: {step.step} {step.detail}"
                ),
                relock_if_gone=True,
            )
        except ImageError as error:
            raise DemoError(str(error)) from error


def _log(output: Path) -> Path:
    return output / "pytest.log"


def _run_scenarios(
    rig: Path, output: Path, store: ResultStore, workers: int, console: Console
) -> int:
    """Run pytest in `workers` processes and show their progress; returns the worst exit code."""
    command = [
        # Whatever ends this process ends the run: nothing is left behind.
        *("setpriv", "--pdeathsig", "TERM", "--"),
        *(sys.executable, "-m", "pytest", "scenarios", "-m", "demo", "-q"),
        *("-p", "no:cacheprovider", "-p", "no:xdist"),
        *("--lg-env", str(rig)),
        *("--brownout-results", str(store.directory)),
        *("--alluredir", str(output / "allure-results")),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    with _log(output).open("w") as log:
        try:
            for index in range(workers):
                processes.append(
                    subprocess.Popen(
                        [*command, "--brownout-share", f"{index + 1}/{workers}"],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                )
            _follow(processes, store, console)
        finally:
            _stop(processes)
    # A process whose share is empty has run no test, which is no failure.
    codes = {process.returncode for process in processes} - {PYTEST_NO_TESTS}
    return max(codes, default=PYTEST_NO_TESTS)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Interrupt the process groups that still run so that fixtures clean up; kill what stays."""
    running = [process for process in processes if process.poll() is None]
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        running = [process for process in running if process.poll() is None]


def _follow(processes: list[subprocess.Popen[bytes]], store: ResultStore, console: Console) -> None:
    rows: dict[str, _Row] = {}
    lines = _tail(store.progress_path)
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    )
    task = bar.add_task("scenarios", total=0)
    with Live(console=console, refresh_per_second=5, transient=True) as live:
        while any(process.poll() is None for process in processes):
            for line in lines:
                if line is None:
                    break
                _apply(rows, json.loads(line), bar, task)
            live.update(Group(_live_table(rows), bar))
            with contextlib.suppress(subprocess.TimeoutExpired):
                next(p for p in processes if p.returncode is None).wait(POLL_S)


def _tail(path: Path) -> Iterator[str | None]:
    """Complete lines of a growing file; None whenever there is none at the moment."""
    while not path.exists():
        yield None
    with path.open(encoding="utf-8") as file:
        rest = ""
        while True:
            rest += file.readline()
            if rest.endswith("\n"):
                yield rest
                rest = ""
            else:
                yield None


def _apply(rows: dict[str, _Row], event: dict[str, str], bar: Progress, task: TaskID) -> None:
    """Take one line of progress into the display."""
    scenario, kind, text = event["scenario"], event["kind"], event["text"]
    if kind == "count":
        bar.update(task, total=(bar.tasks[0].total or 0) + int(text))
        return
    row = rows.setdefault(scenario, _Row(text, "starting", time.monotonic()))
    if kind == "fault":
        row.fault = text
    elif kind == "step":
        row.doing = text
    elif kind == "verdict":
        row.verdict, row.ended = text, time.monotonic()
        bar.advance(task)


def _live_table(rows: dict[str, _Row]) -> Table:
    table = Table(expand=True)
    table.add_column("Fault", ratio=3)
    table.add_column("Now", ratio=3)
    table.add_column("s", justify="right", width=4)
    table.add_column("Verdict", width=14)
    for row in rows.values():
        elapsed = (row.ended or time.monotonic()) - row.started
        table.add_row(row.fault, row.doing, f"{elapsed:.0f}", _coloured(row.verdict))
    return table


def verdict_table(results: list[ScenarioResult]) -> Table:
    """The table of faults, what the device did, and the verdict for each invariant."""
    table = Table(title="Faults and verdicts", expand=True)
    table.add_column("Fault", ratio=3)
    table.add_column("What the device did", ratio=5)
    numbered = next((result.findings for result in results if result.findings), ())
    for finding in numbered:
        table.add_column(str(finding.invariant), justify="center", width=1)
    table.add_column("Verdict", width=12)
    for result in results:
        marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]–[/]"}
        cells = [marks[finding.held] for finding in result.findings] or ["–"] * len(numbered)
        did = "; ".join(result.did) or result.error
        table.add_row(result.fault or result.title, did, *cells, _coloured(result.verdict))
    table.caption = "  ".join(f"{finding.invariant} {finding.name}" for finding in numbered)
    return table


def _coloured(verdict: str) -> str:
    return f"[green]{verdict}[/]" if verdict == "PASS" else f"[red]{verdict}[/]"
