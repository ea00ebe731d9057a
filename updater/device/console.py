"""The client's lines on standard error: one a fact, prefixed, never more than one line."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print `updater: text`. A console that is gone must not stop an update."""
    line = "".join(char if char.isprintable() else " " for char in text)
    try:
        sys.stderr.write(f"updater: {line}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return
