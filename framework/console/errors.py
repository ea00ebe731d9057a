"""What can go wrong while somebody waits for a console.

Three outcomes a caller must tell apart, so three classes: the text did not come in time
(`ConsoleTimeout`), the machine said that it died (`ConsoleDeath`), or the line itself is gone
because power was cut or the port vanished (`ConsoleLost`). Every message ends with the tail of
the buffer and the name of the log file, because that is what a person looks for next.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ConsoleDeath", "ConsoleError", "ConsoleLost", "ConsoleTimeout"]


def _evidence(tail: str, log: Path | None) -> str:
    return f"; last output: {tail!r}; log: {log if log is not None else '(none)'}"


class ConsoleError(Exception):
    """Base of everything the console pump raises. `tail`: last output; `log`: the log file."""

    def __init__(self, message: str, *, tail: str = "", log: Path | None = None) -> None:
        super().__init__(message + _evidence(tail, log))
        self.tail = tail
        self.log = log


class ConsoleTimeout(ConsoleError):  # noqa: N818 - an event, named as one
    """A wait's deadline passed. `pattern` is what was waited for, `timeout_s` for how long."""

    def __init__(self, pattern: str, timeout_s: float, *, tail: str, log: Path | None) -> None:
        super().__init__(f"console: no {pattern} within {timeout_s:g} s", tail=tail, log=log)
        self.pattern = pattern
        self.timeout_s = timeout_s


class ConsoleDeath(ConsoleError):  # noqa: N818 - an event, named as one
    """A death string appeared. `death` is its text, `position` the absolute buffer offset."""

    def __init__(
        self, death: str, position: int, *, waiting_for: str, tail: str, log: Path | None
    ) -> None:
        waiting = f" while waiting for {waiting_for}" if waiting_for else ""
        super().__init__(f"console: the machine died{waiting}: {death!r}", tail=tail, log=log)
        self.death = death
        self.position = position


class ConsoleLost(ConsoleError):  # noqa: N818 - an event, named as one
    """The line is gone: power was cut, the port vanished, the pump was closed (`reason`)."""

    def __init__(self, reason: str, *, tail: str = "", log: Path | None = None) -> None:
        super().__init__(f"console lost: {reason}", tail=tail, log=log)
        self.reason = reason
