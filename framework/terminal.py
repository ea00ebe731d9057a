"""A machine's console on this terminal: keys in, output out, and the terminal as it was at the end.

Linux terminals (termios(3)). Where standard input is none, its bytes are the keys.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator
from typing import Final

ESCAPE: Final = b"\x1d"  # Ctrl-]


def show(data: bytes) -> None:
    """Write what a machine says."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def keys() -> bytes | None:
    """What was typed since the last call; None: the end, by Ctrl-] or the end of the input."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    if not ready:
        return b""
    data = os.read(sys.stdin.fileno(), 4096)
    return None if not data or ESCAPE in data else data


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Keys go to the machine one by one, if this is a terminal; restored whatever happens."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
