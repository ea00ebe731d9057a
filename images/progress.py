"""Progress reports of a build: plain values handed to a callback, so that any front end can draw.

The builder never prints. `Reporter` also measures, so that a caller can say what took long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report.

    Attributes:
        step: what is being done, for a person ("fetching packages").
        done: finished units, or 0.
        total: all units, or 0 where the amount isn't known.
        finished: True on the last report of a step.
        seconds: time since the step began.
        detail: what the step is at, or what it found.
    """

    step: str
    done: int = 0
    total: int = 0
    finished: bool = False
    seconds: float = 0.0
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


class Step:
    """One running step; `update` reports how far it is."""

    def __init__(self, name: str, callback: ProgressCallback) -> None:
        self._name = name
        self._callback = callback
        self._start = time.monotonic()
        self._detail = ""
        callback(Progress(name))

    def update(self, done: int, total: int, detail: str = "") -> None:
        """Report `done` of `total` units."""
        self._detail = detail or self._detail
        elapsed = time.monotonic() - self._start
        self._callback(Progress(self._name, done, total, False, elapsed, detail))

    def finish(self) -> None:
        """Report the end of the step."""
        elapsed = time.monotonic() - self._start
        self._callback(Progress(self._name, 1, 1, True, elapsed, self._detail))


class Reporter:
    """Hands out steps; without a callback all reports are dropped."""

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self._callback = callback or (lambda progress: None)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Report the beginning and the end of a piece of work."""
        step = Step(name, self._callback)
        yield step
        step.finish()

    def note(self, text: str) -> None:
        """Report something a person should read (a warning), outside any step."""
        self._callback(Progress(text, finished=True, detail="note"))
