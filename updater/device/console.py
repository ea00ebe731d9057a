"""The client's lines on standard error: one a fact, prefixed, never more than one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

listeners: list[Callable[[str], None]] = []
"""Called with each line, without the prefix: the deployment's log is one."""


@contextmanager
def captured(listener: Callable[[str], None]) -> Iterator[None]:
    """Give the lines to `listener` alone, without the prefix, and not to standard error."""
    global _captured  # noqa: PLW0603
    before, _captured = _captured, listener
    try:
        yield
    finally:
        _captured = before


_captured: Callable[[str], None] | None = None


def say(text: str) -> None:
    """Print `updater: text`. A console that is gone must not stop an update."""
    line = "".join(char if char.isprintable() else " " for char in text)
    for listener in listeners:
        listener(line)
    if _captured is not None:
        _captured(line)
        return
    try:
        sys.stderr.write(f"updater: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
