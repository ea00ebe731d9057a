"""One farm run, from the first reservation to the last place handed back."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.table import Table

from framework.farm.controller import Controller, Wish, say
from framework.farm.history import History
from framework.farm.tenure import free_dead
from framework.report import BoardStatistics, write_report
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.lease import Lease, death_of
from framework.targets.places import HEALTHY, Place, Places
from framework.targets.rig import check_rig, load_rig, remote_place

__all__ = ["EXIT_INFRASTRUCTURE", "boards_table", "exit_code", "run_farm"]

EXIT_PASSED, EXIT_FAILED, EXIT_UNUSABLE, EXIT_INFRASTRUCTURE, EXIT_INTERRUPTED = 0, 1, 2, 4, 130
_SWEEP_S = 60.0
_AGAIN_S = 0.2


def run_farm(wish: Wish, console: Console) -> int:
    """Run scenarios on a farm; the exit code (see `brownout farm run --help`).

    Raises:
        RigError: the rig is not for a farm, or no healthy board has these tags.
        InfrastructureError: the coordinator does not answer.
    """
    check_rig(wish.rig)
    if remote_place(load_rig(wish.rig)) != "+":
        raise RigError(f"{wish.rig}: is not for a farm: it needs `RemotePlace: {{name: +}}`")
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%d%H%M%S}_{os.getpid()}"
    results = wish.report / "results"
    shutil.rmtree(results, ignore_errors=True)
    with Places() as places, History(wish.history) as history:
        for freed in free_dead(places):
            say(str(freed))
        boards = _healthy(wish, places.all())
        os.environ["LG_COORDINATOR"] = places.coordinator
        controller = Controller(wish, run, places, history)
        code: int = pytest.ExitCode.INTERNAL_ERROR
        interrupted = False
        try:
            with _ended_by_term():
                code = pytest.main(_arguments(wish, min(wish.boards, boards)), plugins=[controller])
        except KeyboardInterrupt:
            interrupted = True
        finally:
            with _undisturbed():
                kept = _sweep(places, run)
                controller.close()
        interrupted |= code == pytest.ExitCode.INTERRUPTED
        if not interrupted:
            controller.account_for_all()
        _tell(controller, history, console)
    for name in kept:
        say(f"{name}: could not be handed back; `brownout farm free` will, once it is there again")
    if interrupted:
        return EXIT_INTERRUPTED
    return exit_code(code, controller)


def exit_code(code: int, controller: Controller) -> int:
    """The run's exit code, from pytest's and how the scenarios ended."""
    verdicts = {final.verdict for final in controller.finals.values()}
    if verdicts & {"FAILED", "BROKEN"}:
        return EXIT_FAILED
    if "INFRASTRUCTURE" in verdicts:
        return EXIT_INFRASTRUCTURE
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and verdicts:
        return EXIT_PASSED
    if not controller.collected:
        return EXIT_UNUSABLE
    return EXIT_PASSED if code == pytest.ExitCode.OK else EXIT_UNUSABLE


def _healthy(wish: Wish, everything: list[Place]) -> int:
    """How many boards there are. RigError if none is healthy."""
    wanted = wish.tags.items()
    fitting = [p for p in everything if wanted <= {**p.tags, "name": p.name}.items()]
    for place in fitting:
        if place.quarantined:
            say(f"{place.name}: is in quarantine ({place.comment.removeprefix('quarantine: ')})")
    healthy = [p for p in fitting if p.tags.get("health") == HEALTHY]
    if healthy:
        return len(healthy)
    if not fitting:
        raise RigError(f"no place has the tags {wish.board}")
    unknown = [p.name for p in fitting if "health" not in p.tags]
    if unknown:
        raise RigError(
            f"nobody has checked {', '.join(unknown)} yet: lock one and run "
            f"`brownout rig check {wish.rig} --live --quarantine`"
        )
    raise RigError(f"all places with the tags {wish.board} are in quarantine")


def _arguments(wish: Wish, workers: int) -> list[str]:
    return [
        *wish.scenarios,
        *("-p", "framework.farm.worker", "-p", "no:cacheprovider", "-q"),
        *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
        *("-n", str(workers), "--dist", "load", "--max-worker-restart", str(20 + 4 * workers)),
        *("--lg-env", str(wish.rig), "--brownout-seed", str(wish.seed)),
        *("--brownout-results", str(wish.report / "results")),
        *(("-m", wish.select) if wish.select else ()),
        *(("-k", wish.keyword) if wish.keyword else ()),
        *(("--junitxml", str(wish.junit)) if wish.junit is not None else ()),
        *(("--brownout-bundles", str(wish.bundles)) if wish.bundles is not None else ()),
    ]


def _sweep(places: Places, run: str) -> list[str]:
    """Hand back whatever the run still holds; the names of what could not be, as far as known."""
    deadline = time.monotonic() + _SWEEP_S
    held: dict[str, Lease] = {}
    away = False
    while True:
        try:
            held = {
                place.name: lease
                for place in places.all()
                if (lease := Lease.of(place.tags)) is not None and lease.run == run
            }
            if not held:
                return []
            for lease in held.values():
                if not death_of(lease):  # one of our workers, which pytest-xdist gave up
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(lease.pid, signal.SIGKILL)
            for freed in free_dead(places, run=run):
                say(str(freed))
        except InfrastructureError as error:
            if not away:
                say(f"{error}; waiting, to hand places back".removeprefix("INFRASTRUCTURE: "))
            away = True
        if time.monotonic() > deadline:
            if away and not held:
                say("places may still be held; `brownout farm free` hands them back, later")
            return sorted(held)
        time.sleep(_AGAIN_S)


@contextlib.contextmanager
def _ended_by_term() -> Iterator[None]:
    """SIGTERM ends a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Handing back is not interrupted; it is bounded."""
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(controller: Controller, history: History, console: Console) -> None:
    """The table of the run, its report, and what is left to do."""
    finals = sorted(controller.finals.values(), key=lambda final: final.scenario)
    counts = Counter(final.verdict for final in finals)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    for final in finals:
        if final.verdict != "PASS":
            where = final.place or "no board"
            console.print(
                f"{final.verdict} on {where}: {final.scenario}: {final.reason}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    console.print(
        f"{told or 'nothing was run'}; {controller.retried} tried again; "
        f"{len(controller.skipped)} skipped"
    )
    if finals:
        boards = history.boards()
        console.print(boards_table(history.boards(controller.run), "This run's boards"))
        wish = controller.wish
        path = write_report(
            controller.results(), wish.report / "report.html", f"Farm: {wish.board}", boards
        )
        console.print(f"report: {path}", soft_wrap=True)


def boards_table(boards: list[BoardStatistics], title: str) -> Table:
    """What was seen of each board."""
    table = Table(title=title)
    table.add_column("Place")
    for name in ("Scenarios", "Failed", "INFRASTRUCTURE", "Cycles", "Boots", "Not ready"):
        table.add_column(name, justify="right")
    for name in ("Boot median", "p95"):
        table.add_column(name, justify="right")
    table.add_column("Last used")
    for board in boards:
        median, p95 = board.boot_median_s, board.boot_p95_s
        table.add_row(
            board.place,
            str(board.attempts),
            str(board.failures),
            f"{board.infrastructure} ({100 * board.infrastructure_rate:.0f} %)",
            str(board.cycles),
            str(board.boots),
            str(board.unready),
            "–" if median is None else f"{median:.1f} s",
            "–" if p95 is None else f"{p95:.1f} s",
            board.last,
        )
    return table
