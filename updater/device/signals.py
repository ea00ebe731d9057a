"""Signals as exceptions: SIGINT and SIGTERM stop the client, SIGALRM ends a state that overran.

All of them wait while a transaction is under way (`deferred`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from updater.device.errors import DeadlineError, InterruptedBySignal

_STOPPING = (signal.SIGINT, signal.SIGTERM)
_HELD_BACK = (*_STOPPING, signal.SIGALRM)


def install_handlers() -> None:
    """Make both signals raise InterruptedBySignal in the main thread."""
    for number in _STOPPING:
        signal.signal(number, _raise)


_held = 0
_waiting: list[BaseException] = []


@contextmanager
def deferred() -> Iterator[None]:
    """Hold the signals back until the block is done, then let them take effect."""
    # The mask keeps system calls from being interrupted; the count is for programs with threads,
    # where another thread may take the signal and Python still runs the handler in this one.
    global _held  # noqa: PLW0603
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if _waiting and not _held:
        raise _waiting.pop(0)


def _interrupt(error: BaseException) -> None:
    if _held:
        _waiting.append(error)
    else:
        raise error


@contextmanager
def limit(what: str, seconds: float) -> Iterator[None]:
    """Raise DeadlineError in the block once it took `seconds`; limits do not nest."""

    def overrun(number: int, frame: FrameType | None) -> None:
        _interrupt(DeadlineError(f"{what} did not finish within {seconds:g} s"))

    before = signal.signal(signal.SIGALRM, overrun)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _waiting[:] = [error for error in _waiting if not isinstance(error, DeadlineError)]


def _raise(number: int, frame: FrameType | None) -> None:
    _interrupt(InterruptedBySignal(number, signal.Signals(number).name))
