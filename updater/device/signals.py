"""Signals as exceptions: SIGINT and SIGTERM stop the client, SIGALRM ends a state that overran.

All of them wait while a transaction is under way (`deferred`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from updater.device.errors import DeadlineError, InterruptedBySignal

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_HELD_BACK = (*_STOPPING, signal.SIGALRM)


def install_handlers() -> None:
    """Make both signals raise InterruptedBySignal in the main thread."""
    for number in _STOPPING:
        signal.signal(number, _raise)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold the signals back until the block is done, then let them take effect."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def limit(what: str, seconds: float) -> Iterator[None]:
    """Raise DeadlineError in the block once it took `seconds`; limits do not nest."""

    def overrun(number: int, frame: FrameType | None) -> NoReturn:
        raise DeadlineError(f"{what} did not finish within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise InterruptedBySignal(number, signal.Signals(number).name)
