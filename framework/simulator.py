"""`brownout simulate`: simulated lifetimes over all cores, with progress, coverage and replay.

What a lifetime is and how schedules are drawn is `framework.campaign`'s; here are the processes,
the display, the files of violations, and the exit codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Final

from attrs import frozen
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.campaign.bundle import SUFFIX, read_bundle
from framework.campaign.kept import RIG, is_simulated, keep, schedule_of
from framework.campaign.lifetimes import Fault, Schedule, live
from framework.campaign.models import CACHE_MODELS
from framework.campaign.search import BATCH, MIXED, Found, Tally, batch, doubles, shrink, singles
from framework.faults import FaultError
from framework.targets.errors import SimulationError
from framework.targets.simulated.device import CLIENT_FOLDER
from framework.targets.simulated.laboratory import BOOTLOADERS, Laboratory
from framework.verdict import Outcome

FILE_VERSION: Final = 1
EXIT_CLEAN: Final = 0
EXIT_VIOLATIONS: Final = 1
EXIT_BROKEN: Final = 3
"""The simulation itself failed in some lifetimes: that is no result of the updater."""
CHECKPOINT_S: Final = 10.0
MAX_FILES: Final = 20
"""Violations that are shrunk and kept; more are counted."""


@frozen
class Search:
    """What to live through: random lifetimes, and whether every single and double cut too.

    Attributes:
        lifetimes: random ones; rounded up to whole batches.
        seed: of all of them.
        workers: processes.
        single: every cut of one update, under every model.
        double: cache models under which every pair of cuts of one update is lived through.
        bootloader: the devices': "uboot", "grub", or "mixed" for either.
    """

    lifetimes: int
    seed: int
    workers: int
    single: bool = False
    double: tuple[str, ...] = ()
    bootloader: str = "uboot"


def run_simulate(search: Search, output: Path, console: Console) -> int:
    """Live through `search`; keep violations in `output`; return the exit code."""
    begun = time.monotonic()
    tally = Tally()
    jobs = list(_jobs(search))
    with (
        Progress(
            TextColumn("simulated lifetimes"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[bad]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress,
        _pool(search.workers) as pool,
    ):
        task = progress.add_task("", total=len(jobs), rate="", bad="")
        written = begun
        try:
            for part in _run(pool, jobs, search.workers):
                tally.add(part)
                elapsed = time.monotonic() - begun
                bad = f"[red]{len(tally.found)} violations" if tally.found else ""
                rate = f"{tally.lifetimes} at {tally.lifetimes / elapsed:.0f}/s"
                progress.update(task, advance=1, rate=rate, bad=bad)
                if time.monotonic() - written > CHECKPOINT_S:
                    written = time.monotonic()
                    _checkpoint(output, search, tally, elapsed)
        except KeyboardInterrupt:
            # What was seen so far is as true as the rest would be.
            _show(console, search, tally, time.monotonic() - begun)
            _keep(tally.found, output, search.seed, console)
            raise
    _show(console, search, tally, time.monotonic() - begun)
    _keep(tally.found, output, search.seed, console)
    return _exit_code(tally)


def _exit_code(tally: Tally) -> int:
    if tally.broken:
        return EXIT_BROKEN
    return EXIT_VIOLATIONS if tally.found else EXIT_CLEAN


def _checkpoint(output: Path, search: Search, tally: Tally, elapsed_s: float) -> None:
    """Leave the figures so far in a file: of a run of hours, not all may be lost."""
    values = {
        "seed": search.seed,
        "lifetimes": tally.lifetimes,
        "seconds": round(elapsed_s, 1),
        "operations": tally.operations,
        "faults": tally.fired,
        "verdicts": dict(sorted(tally.verdicts.items())),
        "broken": tally.broken[:MAX_FILES],
        "violations": [json.loads(found.schedule.to_json()) for found in tally.found[:MAX_FILES]],
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "progress.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SimulationError(f"{output}: {error.strerror}") from error


def run_coverage(search: Search, console: Console) -> int:
    """Live through `search` in this process and say which of the client's branches were taken."""
    try:
        import coverage  # noqa: PLC0415 - only for this
    except ImportError as error:
        raise SimulationError("--coverage needs the package `coverage`") from error
    folder = CLIENT_FOLDER
    # Only branches are of interest: what runs at import has run already.
    measured = coverage.Coverage(branch=True, data_file=None, include=[f"{folder}/*"])
    tally = Tally()
    begun = time.monotonic()
    jobs = list(_jobs(search))
    laboratory = Laboratory()
    measured.start()
    try:
        for job in jobs:
            tally.add(_do(laboratory, job))
    finally:
        measured.stop()
        laboratory.close()
    _show(console, search, tally, time.monotonic() - begun)
    with tempfile.TemporaryDirectory(prefix="brownout-coverage-") as report:
        path = Path(report) / "coverage.json"
        measured.json_report(outfile=str(path))
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    table = Table("module of the client", "branches", "taken", "share", title="branch coverage")
    for name, found in sorted(files.items()):
        summary = found["summary"]
        if summary["covered_branches"]:
            share = summary["covered_branches"] / summary["num_branches"]
            branches, taken = summary["num_branches"], summary["covered_branches"]
            table.add_row(Path(name).stem, str(branches), str(taken), f"{share:.0%}")
    console.print(table)
    return _exit_code(tally)


def run_replay(given: str, console: Console) -> int:
    """Live through one schedule (a violation's file, or the schedule itself) and show it."""
    schedule = _schedule_of(given)
    laboratory = Laboratory()
    try:
        lifetime = live(laboratory, schedule)
    finally:
        laboratory.close()
    console.print(str(schedule), highlight=False, markup=False)
    for line in lifetime.lines:
        console.print(f"  {line}", highlight=False, markup=False)
    console.print(f"verdict: {lifetime.verdict}", highlight=False, markup=False)
    for finding in lifetime.verdict.findings:
        if finding.held is False:
            console.print(f"  {finding.invariant}: {finding.evidence}", markup=False)
    return EXIT_VIOLATIONS if lifetime.verdict.violated else EXIT_CLEAN


def run_promote(given: str, rig: Path, console: Console) -> int:
    """Live through a violation's schedule on another rig; return the exit code."""
    from framework.campaign.promote import faults_of, promote, variants_of  # noqa: PLC0415
    from framework.scenario.bench import open_bench_on  # noqa: PLC0415

    schedule = _schedule_of(given)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    laboratory = Laboratory()
    try:
        say(f"{schedule}: {live(laboratory, schedule).verdict} on {RIG}")
        chosen = faults_of(laboratory, schedule)
    except FaultError as error:
        raise SimulationError(str(error)) from error
    finally:
        laboratory.close()
    try:
        with contextlib.closing(open_bench_on(rig, variants_of(schedule))) as bench:
            verdict = promote(schedule, chosen, bench, rig, say)
    except FaultError as error:
        raise SimulationError(str(error)) from error
    say(f"{verdict} on {rig.name}")
    for finding in verdict.findings:
        if finding.held is False:
            say(f"  {finding.invariant}: {finding.evidence}")
    return EXIT_CLEAN if verdict.outcome is Outcome.PASS else EXIT_VIOLATIONS


def _schedule_of(given: str) -> Schedule:
    """The schedule in a bundle, in a file, or itself."""
    if given.lstrip().startswith("{"):
        return _read_schedule(given, "the schedule")
    path = Path(given)
    if path.suffix == SUFFIX:
        bundle = read_bundle(path)
        if not is_simulated(bundle):
            raise SimulationError(f"{path}: a bundle of {bundle.rig}, not of a simulated lifetime")
        return schedule_of(bundle)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SimulationError(f"{given}: {error}") from error
    return _read_schedule(text, given)


def _read_schedule(text: str, name: str) -> Schedule:
    try:
        values = json.loads(text)
        if isinstance(values, dict) and "schedule" in values:
            if values.get("version") != FILE_VERSION:
                raise SimulationError(
                    f"{name}: version {values.get('version')!r}; this program reads {FILE_VERSION}"
                )
            text = json.dumps(values["schedule"])
        return Schedule.from_json(text)
    except ValueError as error:
        raise SimulationError(f"{name}: no schedule of a simulated lifetime: {error}") from error


Job = tuple[str, tuple[Any, ...]]


def _jobs(search: Search) -> Iterator[Job]:
    """What the workers do, as plain values; each job is its own, whoever does it."""
    for bootloader in BOOTLOADERS if search.bootloader == MIXED else (search.bootloader,):
        laboratory = Laboratory()
        try:
            operations = live(laboratory, Schedule(bootloader=bootloader)).exposed
        finally:
            laboratory.close()
        if search.single:
            yield from (("single", (bootloader, operations, model)) for model in CACHE_MODELS)
        for model in search.double:
            yield from (("double", (bootloader, at, model)) for at in range(1, operations + 1))
    batches = -(-search.lifetimes // BATCH)
    yield from (("batch", (search.seed, number, search.bootloader)) for number in range(batches))


_laboratory: Laboratory | None = None


def _begin_worker() -> None:
    """Leave interrupts to the parent; what a worker makes is its own."""
    global _laboratory  # noqa: PLW0603 - one a process, as SQLite's VFS is
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _laboratory = Laboratory()


def _end_with_parent() -> None:
    """However the parent ends: one that is killed can't tell its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> Tally:
    assert _laboratory is not None
    return _do(_laboratory, job)


def _do(laboratory: Laboratory, job: Job) -> Tally:
    kind, arguments = job
    if kind == "batch":
        seed, number, bootloader = arguments
        return batch(laboratory, seed, number, bootloader=bootloader)
    tally = Tally()
    if kind == "single":
        bootloader, operations, model = arguments
        for schedule in singles(operations, (model,), Schedule(bootloader=bootloader)):
            tally.live(laboratory, schedule)
        return tally
    bootloader, at, model = arguments
    base = Schedule(bootloader=bootloader)
    for schedule in doubles(laboratory, Fault(at, "cut", model, at), base):
        tally.live(laboratory, schedule)
    return tally


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # "spawn": a worker starts with nothing of this process's, neither threads nor VFS.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    try:
        yield pool
    except BaseException:
        children = list(pool._processes or ())
        pool.shutdown(wait=False, cancel_futures=True)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        raise
    pool.shutdown()


def _run(pool: ProcessPoolExecutor, jobs: list[Job], workers: int) -> Iterator[Tally]:
    """Yield the tallies as they come in; a few jobs are waiting at any time, not all of them."""
    waiting: set[Future[Tally]] = set()
    todo = iter(jobs)
    while True:
        while len(waiting) < 2 * workers and (job := next(todo, None)) is not None:
            waiting.add(pool.submit(_work, job))
        if not waiting:
            return
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _show(console: Console, search: Search, tally: Tally, elapsed_s: float) -> None:
    rate = tally.lifetimes / max(elapsed_s, 1e-9)
    console.print(
        f"{tally.lifetimes:,} lifetimes, {tally.operations:,} drive operations, {tally.fired:,}"
        f" faults struck, in {elapsed_s:.1f} s ({rate:.0f}/s with {search.workers} processes,"
        f" seed {search.seed})",
        highlight=False,
    )
    kinds = sorted({what for _, what in tally.struck})
    table = Table("state of the client", *kinds, title="faults that struck")
    for state in sorted({state for state, _ in tally.struck}):
        table.add_row(state, *(str(tally.struck.get((state, kind), 0)) for kind in kinds))
    console.print(table)
    console.print(f"power was cut at {len(tally.positions)} different operations", highlight=False)
    for verdict, count in sorted(tally.verdicts.items()):
        console.print(f"{verdict}: {count:,}", highlight=False)
    if tally.broken:
        console.print(f"the simulation itself failed in {len(tally.broken):,}", highlight=False)
        for broken in tally.broken[:MAX_FILES]:
            console.print(f"  {broken}", highlight=False, markup=False, soft_wrap=True)


def _keep(found: list[Found], output: Path, seed: int, console: Console) -> None:
    """Shrink the violations, write a bundle for each different one, say how to replay it."""
    if not found:
        return
    laboratory = Laboratory()
    kept: dict[str, str] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for violation in found[:MAX_FILES]:
            smallest, runs = shrink(laboratory, violation.schedule, violation.violated[0])
            text = smallest.to_json()
            if text in kept:
                continue
            lifetime = live(laboratory, smallest, hash_drives=True)
            path = output / f"violation-{len(kept) + 1}{SUFFIX}"
            kept[text] = str(path)
            keep(path, lifetime, seed)
            say = f"{lifetime.verdict}: {smallest} (shrunk in {runs} lifetimes)"
            console.print(say, highlight=False, markup=False)
            console.print(f"  brownout replay {path}", highlight=False, markup=False)
    except OSError as error:
        raise SimulationError(f"{output}: {error.strerror}") from error
    finally:
        laboratory.close()
