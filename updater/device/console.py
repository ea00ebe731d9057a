"""The client's lines on standard error: one a fact, prefixed, never more than one line."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

listeners: list[Callable[[str], None]] = []
"""Called with each line, without the prefix: the deployment's log is one."""


def say(text: str) -> None:
    """Print `updater: text`. A console that is gone must not stop an update."""
    line = "".join(char if char.isprintable() else " " for char in text)
    for listener in listeners:
        listener(line)
    try:
        sys.stderr.write(f"updater: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
