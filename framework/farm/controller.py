"""The controller's side of a farm run: pytest-xdist's scheduler, and who does what next.

A worker is a process with one place (`worker`). It gets one scenario at a time. One that ended
INFRASTRUCTURE is reported as tried again and goes to another place. A worker whose rig failed,
whatever became of its scenario, says so in its report and ends; another is started, which takes a
place anew. A worker that is killed is a rig's failure, too: its place is handed back, since its
lease's process is seen to be dead.

This uses three things of xdist that are not its public interface: `DSession._clone_node` (as xdist
itself does for a worker that crashed), and in `worker` the channel and the event of its worker.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import asdict, define, evolve, field, frozen

from framework.farm.history import Attempt, History
from framework.farm.queue import Queue, longest_first
from framework.farm.tenure import free_dead
from framework.farm.worker import EXIT_NO_PLACE, Orders, places_of
from framework.report import ResultStore, ScenarioResult
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.lease import LEASE_S
from framework.targets.places import Places

__all__ = ["Controller", "Final", "Wish"]

STRIKES = 3
"""After so many scenarios in a row that ended INFRASTRUCTURE a place is quarantined."""
_DYING_S = 3.0
_RIG = "INFRASTRUCTURE"


@frozen
class Wish:
    """What a farm run is to do.

    Attributes:
        scenarios: as pytest takes them: files, folders, node ids.
        rig: the rig file, whose place is `+`.
        tags: which boards.
        boards: at most so many at once.
        select, keyword: as pytest's `-m` and `-k`; empty: all.
        retries: how often a scenario that ended INFRASTRUCTURE is tried again.
        wait_s: how long to wait for a place.
        lease_s: how long a lease is good without being renewed.
        check_cycles: power cycles of the check of each board; 0: no check.
        check_s: how long a check may take.
        seed: of every random choice.
        report: the folder for results and report.
        history: the file of what was seen of each board.
        junit: where to write a JUnit file, too; None: nowhere.
        bundles: where to leave bundles; None: nowhere.
    """

    scenarios: tuple[str, ...]
    rig: Path
    tags: dict[str, str]
    boards: int
    report: Path
    history: Path
    select: str = ""
    keyword: str = ""
    retries: int = 2
    wait_s: float = 600.0
    lease_s: float = LEASE_S
    check_cycles: int = 1
    check_s: float = 600.0
    seed: int = 1
    junit: Path | None = None
    bundles: Path | None = None

    @property
    def board(self) -> str:
        """The tags as one text, under which the history keeps what such boards took."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.tags.items()))


@frozen
class Final:
    """How a scenario ended in this run, after all its attempts."""

    scenario: str
    verdict: str
    reason: str
    place: str
    seconds: float
    attempts: int


@define
class _Try:
    """A scenario that is running: what its reports said so far."""

    scenario: str
    place: str
    began: float
    failed: str = ""
    infrastructure: str = ""
    assertion: bool = False
    skipped: bool = False
    retiring: bool = False
    boots: list[tuple[float, bool]] = field(factory=list)
    cycles: int = 0


class Controller:
    """The pytest plugin; see the module text."""

    def __init__(self, wish: Wish, run: str, places: Places, history: History) -> None:
        self.wish = wish
        self.run = run
        self.finals: dict[str, Final] = {}
        self.retried = 0
        self.skipped: set[str] = set()
        self.collected: list[str] = []
        self._places = places
        self._history = history
        self._store = ResultStore(wish.report / "results")
        self._finished = wish.report / f".{run}.finished"
        self._tries: dict[str, _Try] = {}
        self._attempts: dict[str, int] = {}
        self._strikes: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._fit: set[str] = set()
        self._alive: set[str] = set()
        self._sched: _Scheduling | None = None
        self._session: Any = None

    # -- workers ------------------------------------------------------------------------------

    @pytest.hookimpl
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Find xdist's session."""
        self._session = session.config.pluginmanager.get_plugin("dsession")

    @pytest.hookimpl
    def pytest_configure_node(self, node: Any) -> None:
        """Give a new worker its orders."""
        self._alive.add(node.gateway.id)
        wish = self.wish
        orders = Orders(
            controller=os.getpid(),
            run=self.run,
            rig=str(wish.rig),
            tags=dict(wish.tags),
            wait_s=wish.wait_s,
            lease_s=wish.lease_s,
            check_cycles=wish.check_cycles,
            check_s=wish.check_s,
            checked=sorted(place for place in self._fit if not self._strikes.get(place)),
            bad={
                place: f"{count} scenarios in a row ended INFRASTRUCTURE: {self._reasons[place]}"
                for place, count in self._strikes.items()
                if count >= STRIKES
            },
            finished=str(self._finished),
        )
        node.workerinput["farm"] = asdict(orders)

    @pytest.hookimpl
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Ours."""
        del log
        self._sched = _Scheduling(config, self)
        return self._sched

    @pytest.hookimpl
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        """A worker ended: hand back what it can't, and start another if there is work for it."""
        self._alive.discard(node.gateway.id)
        node.ensure_teardown()  # its process would idle until the run ends, with its lease
        self._free_dead(node.gateway.id)
        if error is not None:
            return  # xdist starts another
        sched, session = self._sched, self._session
        if sched is None or session.shuttingdown or session.shouldstop:
            return
        output = getattr(node, "workeroutput", {})
        if output.get("exitstatus") == EXIT_NO_PLACE:
            # Nobody may ever have had a place: then only this tells what was to be run.
            self.collected = self.collected or output.get("farm_collected", [])
            if not self._alive:
                sched.abandon()
        elif sched.has_work:
            session._clone_node(node)

    @property
    def nobody(self) -> bool:
        """Whether every worker has ended and none is being started."""
        return not self._alive

    def _free_dead(self, worker: str) -> None:
        """Hand back the place of a worker that could not; it may take a moment to be gone."""
        deadline = time.monotonic() + _DYING_S
        with contextlib.suppress(InfrastructureError):  # at the end, then
            while worker in places_of(self.run, self._places.all()):
                for freed in free_dead(self._places, run=self.run):
                    self._say(str(freed))
                if time.monotonic() > deadline:
                    return
                time.sleep(_DYING_S / 20)

    def places(self) -> dict[str, str]:
        """The place of each of this run's workers; none if the coordinator is away."""
        try:
            return places_of(self.run, self._places.all())
        except InfrastructureError:
            return {}

    def place_of(self, scenario: str) -> str:
        """Where a scenario is running."""
        running = self._tries.get(scenario)
        return running.place if running is not None else ""

    # -- scenarios ------------------------------------------------------------------------------

    def order(self, scenarios: Sequence[str]) -> list[int]:
        """In which order to run them; called once."""
        self.collected = list(scenarios)
        return longest_first(scenarios, self._history.seconds(self.wish.board))

    def began(self, scenario: str, place: str) -> None:
        """A worker was sent a scenario."""
        self._tries[scenario] = _Try(scenario, place, time.monotonic())
        self._attempts[scenario] = self._attempts.get(scenario, 0) + 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a report says; one that says nothing of the product is no failure of it."""
        running = self._tries.get(report.nodeid)
        if running is None:
            return
        told: dict[str, Any] = getattr(report, "farm", None) or {
            "place": running.place,
            "infrastructure": "its worker was killed",
            "assertion": False,
            "retiring": False,
            "boots": [],
            "cycles": 0,
        }
        running.retiring |= told["retiring"]
        running.place = told["place"] or running.place
        running.boots += [(seconds, ready) for seconds, ready in told["boots"]]
        running.cycles += told["cycles"]
        running.skipped |= report.skipped
        if not report.failed:
            return
        if told["infrastructure"]:
            running.infrastructure = running.infrastructure or told["infrastructure"]
        elif not running.infrastructure:  # what goes wrong after the rig failed says nothing
            running.failed = running.failed or _first_line(report)
            running.assertion |= told["assertion"]
        assert self._sched is not None
        killed = report.when not in ("setup", "call", "teardown")
        if running.infrastructure and not running.failed:
            if self._sched.may_retry(report.nodeid):
                report.outcome = "rerun"  # type: ignore[assignment]
            else:
                report.when = "setup"  # an error, not a failure, for whoever reads JUnit
        if killed:
            self._sched.crashed(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """How a scenario that will be tried again is shown."""
        if getattr(report, "outcome", "") == "rerun":
            return "tried again", "R", "INFRASTRUCTURE, tried again"
        return None

    def retires(self, scenario: str) -> bool:
        """Whether the worker that is running a scenario said that it ends after it."""
        running = self._tries.get(scenario)
        return running is not None and running.retiring

    def ended(self, scenario: str) -> bool:
        """A scenario's attempt ended; whether it ended INFRASTRUCTURE."""
        attempt = self._tries.pop(scenario, None)
        if attempt is None:
            return False
        seconds = time.monotonic() - attempt.began
        broken = "FAILED" if attempt.assertion else "BROKEN"
        verdict, reason = "PASS", ""
        if attempt.failed:
            verdict, reason = broken, attempt.failed
        elif attempt.infrastructure:
            verdict, reason = _RIG, attempt.infrastructure
        elif attempt.skipped:
            self.skipped.add(scenario)
            return False
        self._remember(attempt, verdict, reason, seconds)
        if attempt.infrastructure:  # also in the teardown of one that has failed by itself
            self._strikes[attempt.place] = self._strikes.get(attempt.place, 0) + 1
            self._reasons[attempt.place] = attempt.infrastructure
            self._say(f"{attempt.place}: {scenario}: {_RIG}: {attempt.infrastructure}")
        else:
            self._strikes[attempt.place] = 0
            self._fit.add(attempt.place)
        self._finish(scenario, verdict, reason, attempt.place, seconds)
        return verdict == _RIG

    def _remember(self, attempt: _Try, verdict: str, reason: str, seconds: float) -> None:
        """Enter an attempt into the history; a history that can't be written stops no run."""
        try:
            self._history.add(
                Attempt(
                    run=self.run,
                    board=self.wish.board,
                    place=attempt.place,
                    scenario=attempt.scenario,
                    verdict=verdict,
                    reason=reason,
                    seconds=seconds,
                    cycles=attempt.cycles,
                    boots=tuple(attempt.boots),
                )
            )
        except RigError as error:
            self._say(str(error))

    def give_up(self, scenario: str, reason: str) -> None:
        """Nobody is left to run a scenario; what an earlier attempt of it said stands."""
        if scenario not in self.finals and scenario not in self.skipped:
            self._finish(scenario, _RIG, reason, "", 0.0)

    def _finish(self, scenario: str, verdict: str, reason: str, place: str, seconds: float) -> None:
        """Keep how it ended, until an attempt that follows ends otherwise."""
        attempts = self._attempts.get(scenario, 0)
        if attempts > 1:
            self.retried += 1
        self.finals[scenario] = Final(scenario, verdict, reason, place, seconds, attempts)
        facts = {"place": place, "attempts": str(attempts), "run": self.run}
        told = self._store.find(scenario)
        if told is not None and verdict != "PASS" and (told.verdict == "PASS" or verdict == _RIG):
            # It was written before the teardown, which is part of an attempt.
            told = evolve(told, verdict=verdict, error=reason)
        if told is None or told.facts.get("attempts"):  # none, or one that an earlier attempt left
            told = ScenarioResult(
                scenario=scenario,
                title=scenario.rpartition("::")[2].removeprefix("test_").replace("_", " "),
                rig=self.wish.rig.stem,
                fault="",
                did=(),
                verdict=verdict,
                error=reason,
                seed=self.wish.seed,
                elapsed_s=seconds,
            )
        self._store.write(evolve(told, facts={**told.facts, **facts}))

    def _say(self, text: str) -> None:
        """One line between pytest's dots."""
        terminal = self._session.terminal if self._session is not None else None
        if terminal is None:
            say(text)
        else:
            terminal.write_line("")
            terminal.write_line(f"farm: {text}")

    def account_for_all(self) -> None:
        """What was collected and never ended was not run: that says nothing of the product."""
        for scenario in self.collected:
            self.give_up(scenario, "it was not run: nobody was left to run it")

    def results(self) -> Collection[ScenarioResult]:
        """The results of the run."""
        return self._store.stored()

    def close(self) -> None:
        """Remove what is of no use after the run."""
        self._finished.unlink(missing_ok=True)

    def finish(self) -> None:
        """Nobody is wanted any more: those who wait for a place may go."""
        self._finished.touch()


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(getattr(crash, "message", "") or report.longreprtext)
    lines = text.strip().splitlines()
    return lines[0] if lines else "failed"


def say(text: str) -> None:
    """One line for the person who watches."""
    print(f"farm: {text}", file=sys.stderr, flush=True)


class _Scheduling:
    """xdist's `Scheduling` over a `Queue`: one scenario at a time to each worker with a place."""

    def __init__(self, config: pytest.Config, controller: Controller) -> None:
        self.config = config
        self._controller = controller
        self._running: dict[Any, int | None] = {}
        self._ready: list[Any] = []
        self._collection: list[str] | None = None
        self._queue = Queue([], controller.wish.retries)
        self._places: dict[str, str] = {}

    # -- what xdist asks ------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Any]:
        """All workers."""
        return list(self._running)

    @property
    def collection_is_completed(self) -> bool:
        """Whether it is known what there is to run: one worker is enough."""
        return self._collection is not None

    @property
    def has_pending(self) -> bool:
        """Whether something is still to be run, or running."""
        return self.has_work or any(index is not None for index in self._running.values())

    @property
    def has_work(self) -> bool:
        """Whether something is still to be run."""
        return bool(self._queue.pending)

    @property
    def tests_finished(self) -> bool:
        """Whether all was run."""
        done = not self.has_pending and (self.collection_is_completed or self._controller.nobody)
        if done:
            self._controller.finish()
        return done

    def add_node(self, node: Any) -> None:
        """A worker has started; it has no place yet."""
        self._running[node] = None

    def add_node_collection(self, node: Any, collection: Sequence[str]) -> None:
        """A worker has collected, and has a place."""
        if self._collection is None:
            self._collection = list(collection)
            self._queue.pending = self._controller.order(self._collection)
        elif list(collection) != self._collection:
            say(f"{node.gateway.id} collected other scenarios than the others; it gets none")
            node.shutdown()
            return
        self._ready.append(node)

    def schedule(self) -> None:
        """Send something to everyone who waits."""
        idle = [node for node in self._ready if self._running.get(node, 0) is None]
        if idle and self.has_work:
            # A worker has one place for its whole life.
            if any(node.gateway.id not in self._places for node in idle):
                self._places.update(self._controller.places())
            for node in idle:
                self._send(node)

    def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
        """A worker has done its scenario."""
        del duration
        self._running[node] = None
        assert self._collection is not None
        if self._controller.retires(self._collection[item_index]):
            self._ready.remove(node)  # it ends by itself now, and another is started
        self._ended(item_index)
        self.schedule()

    def mark_test_pending(self, item: str) -> None:
        """Not used: see `remove_node`."""

    def remove_pending_tests_from_node(self, node: Any, indices: Sequence[int]) -> None:
        """Nothing is sent in advance."""

    def remove_node(self, node: Any) -> str | None:
        """A worker has ended; the scenario in which it died, if it did."""
        index = self._running.pop(node)
        if node in self._ready:
            self._ready.remove(node)
        crashed = None
        if index is not None:
            assert self._collection is not None
            crashed = self._collection[index]
        return crashed

    # -- ours -----------------------------------------------------------------------------------

    def may_retry(self, scenario: str) -> bool:
        """Whether a scenario that ends INFRASTRUCTURE now will be tried again."""
        assert self._collection is not None
        index = self._collection.index(scenario)
        return len(self._queue.tried.get(index, ())) < self._queue.retries

    def crashed(self, scenario: str) -> None:
        """The worker of a scenario was killed."""
        assert self._collection is not None
        self._ended(self._collection.index(scenario))
        self.schedule()

    def abandon(self) -> None:
        """Nobody will run what is left; `Controller.account_for_all` says so of each."""
        self._queue.pending.clear()

    def _ended(self, index: int) -> None:
        assert self._collection is not None
        place = self._controller.place_of(self._collection[index])
        if self._controller.ended(self._collection[index]):
            self._queue.infrastructure(index, place)

    def _send(self, node: Any) -> None:
        place = self._places.get(node.gateway.id, "")
        others = [self._places.get(each.gateway.id, "") for each in self._ready if each != node]
        index = self._queue.take(place, others)
        if index is None:
            return
        assert self._collection is not None
        self._running[node] = index
        self._controller.began(self._collection[index], place)
        with contextlib.suppress(OSError):  # it died just now; xdist will say so
            node.send_runtest_some([index])
