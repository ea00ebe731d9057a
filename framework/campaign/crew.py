"""The workers of a campaign as processes: started, given jobs, watched, replaced when they die.

A worker that dies, or that is silent past its deadline, has failed its run as a rig does; another
process takes its place, a bounded number of times. Whatever ends this process ends the workers, and
the machines with them (`setpriv --pdeathsig`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

from attrs import define, field, frozen

from framework.campaign.errors import CrewError

MOST_RUN_S: Final = 1800.0
"""Past this a run is given up: every wait in it is bounded, so the worker must be stuck."""
MOST_DEATHS: Final = 5
STOP_S: Final = 30.0
WORKER: Final = (sys.executable, "-m", "framework.campaign.worker")


@frozen
class Said:
    """A worker's message: what it does, how its run ended, or that it can't do anything."""

    worker: int
    kind: str
    value: Any


@define
class _Hand:
    process: subprocess.Popen[str]
    busy: bool = False
    since: float = field(factory=time.monotonic)


class Crew:
    """A number of workers; use it as a context manager.

    Args:
        count: how many.
        log: where their standard error goes.
        program: what a worker is; another one must speak as `worker` does.
    """

    def __init__(self, count: int, log: Path, program: Sequence[str] = WORKER) -> None:
        self.count = count
        self._program = tuple(program)
        self._log_path = log
        self._said: queue.Queue[Said] = queue.Queue()
        self._hands: dict[int, _Hand] = {}
        self._deaths = 0
        self._log: IO[str] | None = None

    def __enter__(self) -> Crew:
        """Start them."""
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._log = self._log_path.open("a", encoding="utf-8")
        except OSError as error:
            raise CrewError(f"{self._log_path}: {error.strerror}") from error
        try:
            for number in range(self.count):
                self._start(number)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop them."""
        self.close()

    def close(self) -> None:
        """Stop all workers: by an interrupt, so that they switch off; who stays is killed."""
        for hand in self._hands.values():
            with contextlib.suppress(OSError, ValueError):
                assert hand.process.stdin is not None
                hand.process.stdin.close()
            if hand.busy:
                _signal(hand.process, signal.SIGINT)
        deadline = time.monotonic() + STOP_S
        for hand in self._hands.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                hand.process.wait(max(0.1, deadline - time.monotonic()))
            _signal(hand.process, signal.SIGKILL)
            hand.process.wait()
        self._hands.clear()
        if self._log is not None:
            self._log.close()

    @property
    def idle(self) -> list[int]:
        """The workers that have nothing to do."""
        return [number for number, hand in self._hands.items() if not hand.busy]

    def give(self, worker: int, job: Mapping[str, Any]) -> None:
        """Give an idle worker a job."""
        hand = self._hands[worker]
        hand.busy, hand.since = True, time.monotonic()
        assert hand.process.stdin is not None
        with contextlib.suppress(OSError):
            # One that has died is noticed by `hear`.
            hand.process.stdin.write(json.dumps(job) + "\n")
            hand.process.stdin.flush()

    def hear(self, timeout_s: float) -> Said | None:
        """The next message; None if there is none in time.

        Raises:
            CrewError: workers die again and again.
        """
        for number, hand in self._hands.items():
            if hand.busy and time.monotonic() - hand.since > MOST_RUN_S:
                _signal(hand.process, signal.SIGKILL)
                hand.since = time.monotonic()
                self._log_line(f"worker {number} was silent for {MOST_RUN_S:g} s, killed")
        try:
            said = self._said.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if said.kind == "died":
            return self._replace(said)
        if said.kind == "done":
            self._hands[said.worker].busy = False
        return said

    # -- inside ------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        command = ["setpriv", "--pdeathsig", "INT", "--", *self._program]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                process_group=0,
            )
        except OSError as error:
            raise CrewError(f"{command[0]}: {error.strerror}; install util-linux") from error
        self._hands[number] = _Hand(process)
        threading.Thread(
            target=self._listen, args=(number, process), name=f"worker {number}", daemon=True
        ).start()

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                ((kind, value),) = json.loads(line).items()
            except (ValueError, AttributeError):
                self._log_line(f"worker {number} said {line!r}")
                continue
            self._said.put(Said(number, str(kind), value))
        self._said.put(Said(number, "died", process.wait()))

    def _replace(self, said: Said) -> Said | None:
        hand = self._hands[said.worker]
        was_busy = hand.busy
        self._deaths += 1
        if self._deaths > MOST_DEATHS:
            raise CrewError(
                f"{self._deaths} workers have died; the last words are in {self._log_path}"
            )
        self._start(said.worker)
        if not was_busy:
            return None
        return Said(said.worker, "failed", f"the worker's process ended with {said.value}")

    def _log_line(self, text: str) -> None:
        if self._log is not None and not self._log.closed:
            self._log.write(text + "\n")
            self._log.flush()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
