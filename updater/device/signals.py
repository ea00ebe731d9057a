"""SIGINT and SIGTERM become one exception, and wait while a transaction is under way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from updater.device.errors import InterruptedBySignal

_STOPPING = (signal.SIGINT, signal.SIGTERM)


def install_handlers() -> None:
    """Make both signals raise InterruptedBySignal in the main thread."""
    for number in _STOPPING:
        signal.signal(number, _raise)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold the signals back until the block is done, then let them take effect."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise InterruptedBySignal(number, signal.Signals(number).name)
