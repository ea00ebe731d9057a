"""The worker's side of a farm run: a pytest plugin in each of pytest-xdist's worker processes.

A worker takes a place after it has collected, has it checked, and only then tells the controller
that it is ready. It runs one scenario at a time and is sent the next when that has ended (xdist
itself keeps one in advance, which would wait behind a slow board). After a scenario that ended
INFRASTRUCTURE it hands its place back and ends; the controller starts another.

It can't outlive the controller: the kernel kills it then (prctl(2), PR_SET_PDEATHSIG), so a place
whose run was killed is not used any more when it is freed.

Each report says which place it is from, and whether it says anything of the product. An error that
is not an assertion may come from a rig that vanishes in the middle: those of the rig's own kind, a
console whose line ended, and a broken connection count as INFRASTRUCTURE.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from framework.farm.tenure import Tenure
from framework.targets.blame import infrastructure_in
from framework.targets.errors import InfrastructureError
from framework.targets.lease import Lease, death_of
from framework.targets.places import HEALTHY, Place, Places
from framework.targets.strategy import SlotStrategy

__all__ = ["EXIT_NO_PLACE", "Orders"]

EXIT_NO_PLACE = 90
"""Exit status of a worker that got no place, which is no failure."""
_PR_SET_PDEATHSIG = 1
_LOOK_S = 2.0


@frozen
class Orders:
    """What the controller tells a worker; plain values, xdist carries them.

    Attributes:
        controller: the controller's process.
        run: the farm run.
        rig: the rig file.
        tags: which boards.
        wait_s: how long to wait for a place.
        lease_s: how long a lease is good.
        check_cycles: power cycles of the check before the first scenario; 0: no check.
        check_s: how long a check may take.
        checked: places that are known to be fit.
        bad: places that failed too often in this run, and the reason.
        finished: a file that is there once no worker is wanted any more.
    """

    controller: int
    run: str
    rig: str
    tags: dict[str, str]
    wait_s: float
    lease_s: float
    check_cycles: int
    check_s: float
    checked: list[str]
    bad: dict[str, str]
    finished: str


def pytest_configure(config: pytest.Config) -> None:
    """Become a worker of a farm run, in a process that was told so."""
    told = getattr(config, "workerinput", {}).get("farm")
    if told is not None:
        config.pluginmanager.register(_Worker(config, Orders(**told)), "brownout-farm-worker")


class _Worker:
    def __init__(self, config: pytest.Config, orders: Orders) -> None:
        _die_with(orders.controller)
        self.config = config
        self.orders = orders
        self.name = str(config.workerinput["workerid"])  # type: ignore[attr-defined]
        self.places = Places()
        self.tenure = Tenure(self.places, orders.run, self.name, orders.lease_s)
        self.retiring = False
        self.boots: list[tuple[float, bool]] = []
        self.cycles = 0
        self._looked = 0.0
        self._unwanted = False
        SlotStrategy.observers.append(self._seen)

    # -- its place ----------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take a place before the controller is told that we are ready."""
        if session.items and not self._settle():
            self.config.workeroutput["farm_collected"] = [  # type: ignore[attr-defined]
                item.nodeid for item in session.items
            ]
            pytest.exit("there is no place for this worker", returncode=EXIT_NO_PLACE)

    def _settle(self) -> bool:
        """Take a place that is fit; whether there was one."""
        deadline = time.monotonic() + self.orders.wait_s
        while (left := deadline - time.monotonic()) > 0:
            if not self.tenure.obtain(self.orders.tags, left, self._no_place_for_us):
                return False
            os.environ["LG_TOKEN"] = self.tenure.token
            if self._usable():
                return True
            with contextlib.suppress(InfrastructureError):
                self.tenure.give_back()
            self.tenure = Tenure(self.places, self.orders.run, self.name, self.orders.lease_s)
        return False

    def _usable(self) -> bool:
        """Whether scenarios can be run on the place; it is quarantined if not."""
        orders, place = self.orders, self.tenure.place
        if place in orders.bad:
            self._quarantine(orders.bad[place])
            return False
        return not orders.check_cycles or place in orders.checked or self._fit()

    def _quarantine(self, reason: str) -> None:
        self._say(f"quarantined: {reason}")
        with contextlib.suppress(InfrastructureError):
            self.tenure.quarantine(reason)

    def _no_place_for_us(self) -> bool:
        """Whether to stop waiting: the run is over, or no healthy place is left to wait for."""
        if Path(self.orders.finished).exists():
            return True
        if time.monotonic() - self._looked < _LOOK_S:
            return self._unwanted
        self._looked = time.monotonic()
        try:
            everything = self.places.all()
        except InfrastructureError:
            return False  # a coordinator that is away is waited for
        wanted = {**self.orders.tags, "health": HEALTHY}.items()
        self._unwanted = not any(
            wanted <= {**place.tags, "name": place.name}.items() and not self._is_ours(place)
            for place in everything
        )
        return self._unwanted

    def _is_ours(self, place: Place) -> bool:
        """Whether another worker of this run has a place."""
        lease = Lease.of(place.tags)
        return lease is not None and lease.run == self.orders.run and not death_of(lease)

    def _fit(self) -> bool:
        """Have the board checked (`brownout rig check`), which quarantines it if it is not fit."""
        command = [
            *(sys.executable, "-c", "from framework.cli import main; main()"),
            *("rig", "check", self.orders.rig, "--live", "--quarantine"),
            *("--cycles", str(self.orders.check_cycles)),
        ]
        with subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as check:
            try:
                told, _ = check.communicate(timeout=self.orders.check_s)
            except subprocess.TimeoutExpired:
                check.kill()
                check.communicate()
                self._quarantine(f"the check had not ended after {self.orders.check_s:g} s")
                return False
            except BaseException:
                check.kill()
                raise
        if check.returncode == 0:
            return True
        lines = told.strip().splitlines() or [f"exit code {check.returncode}"]
        wrong = [line for line in lines if line.startswith("NO ")] or lines
        self._say("the check says: " + "; ".join(wrong))
        return False

    def _say(self, text: str) -> None:
        print(f"farm: {self.tenure.place}: {text}", file=sys.stderr, flush=True)

    # -- running ------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run what the controller sends, one at a time; in xdist's place."""
        xdist = next(
            plugin
            for plugin in self.config.pluginmanager.get_plugins()
            if type(plugin).__name__ == "WorkerInteractor"
        )
        sent: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def heard(command: tuple[str, dict[str, Any]] | None) -> None:
            for index in command[1]["indices"] if command and command[0] == "runtests" else [None]:
                sent.put(index)

        xdist.channel.setcallback(heard, endmarker=None)
        items = session.items
        while not self.retiring and not session.shouldstop and not session.shouldfail:
            index = sent.get()
            if index is None:
                break
            # Another item as the next one keeps what the whole session shares.
            following = items[(index + 1) % len(items)] if len(items) > 1 else None
            xdist.item_index = index
            self.boots, self.cycles = [], 0
            began = time.perf_counter()
            try:
                self.config.hook.pytest_runtest_protocol(item=items[index], nextitem=following)
            except pytest.exit.Exception as error:
                self._exited(items[index], str(error))
            duration = time.perf_counter() - began
            xdist.sendevent("runtest_protocol_complete", item_index=index, duration=duration)
        return True

    def _exited(self, item: pytest.Item, said: str) -> None:
        """labgrid ends the whole session where a place can't be used: only this worker ends."""
        self.retiring = True
        report = pytest.TestReport(
            item.nodeid, item.location, {}, "failed", f"the place can't be used: {said}", "setup"
        )
        self._mark(report, said, assertion=False)
        self.config.hook.pytest_runtest_logreport(report=report)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Say where it was, and whether it says anything of the product."""
        report = yield
        reason = ""
        if report.failed and call.excinfo is not None:
            reason = self.tenure.lost or infrastructure_in(call.excinfo.value)
        if reason:
            self.retiring = True
        wrong = call.excinfo is not None and call.excinfo.errisinstance(AssertionError)
        self._mark(report, reason, assertion=wrong)
        return report

    def _mark(self, report: pytest.TestReport, reason: str, *, assertion: bool) -> None:
        report.farm = {  # type: ignore[attr-defined]
            "place": self.tenure.place,
            "infrastructure": reason,
            "assertion": assertion,
            "retiring": self.retiring,
            "boots": [list(boot) for boot in self.boots],
            "cycles": self.cycles,
        }
        report.user_properties.append(("place", self.tenure.place))
        self.boots, self.cycles = [], 0

    def _seen(self, what: str, seconds: float) -> None:
        """A strategy switched power on, or a boot ended."""
        if what == "power on":
            self.cycles += 1
        else:
            self.boots.append((seconds, what == "ready"))

    # -- ending -------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, None, None]:
        """Hand the place back, after everything that used it was torn down, however that went."""
        try:
            yield
        except Exception as error:
            # Of a rig that failed in a scenario, which has said so already.
            if not infrastructure_in(error):
                raise
            self._say(f"was not put away in order: {infrastructure_in(error)}")
        finally:
            with contextlib.suppress(InfrastructureError):  # the controller does, later
                self.tenure.give_back()
            self.places.close()


def _die_with(controller: int) -> None:
    """Have the kernel kill this process when the controller ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != controller:
        os._exit(EXIT_NO_PLACE)  # it ended in between


def places_of(run: str, everything: Iterable[Place]) -> dict[str, str]:
    """The place of each worker of a run, from the leases."""
    held = ((Lease.of(place.tags), place.name) for place in everything)
    return {lease.worker: name for lease, name in held if lease is not None and lease.run == run}
