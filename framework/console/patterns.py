r"""Bounded patterns: what a console wait may look for.

A rolling buffer can be searched in one pass only if every match has a greatest length: then a
new search starts `width - 1` bytes before the end of the last one and cannot miss a match that
straddles two reads. An unbounded pattern (`.*`, `\S+`) has no such length, and on a megabyte of
output it turns a wait into a quadratic scan. So they are refused, with the way to write them.
The idea that console patterns must be bounded is tbot's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["DEFAULT_DEATHS", "Marker", "PatternError", "as_marker", "as_markers"]

#: The longest match allowed; a screenful, not a log.
WIDTH_LIMIT_BYTES = 16384


class PatternError(ValueError):
    """The pattern is not a usable bounded regular expression."""


def _width(pattern: re.Pattern[bytes]) -> int:
    # The only place Python computes a pattern's greatest width is its own (private) parser.
    from re import _parser  # type: ignore[attr-defined]  # noqa: PLC0415

    return int(_parser.parse(pattern.pattern, pattern.flags).getwidth()[1])


@dataclass(frozen=True)
class Marker:
    """A named bounded pattern: `name` for people and messages, `pattern` for the machine.

    `restart` is for death strings after which the machine starts again: they do not disturb a
    reader that is not bound to one boot (labgrid's UBootDriver.reset waits across one).
    """

    name: str
    pattern: str | bytes
    restart: bool = False
    compiled: re.Pattern[bytes] = field(init=False, repr=False, compare=False)
    width: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        raw = self.pattern.encode() if isinstance(self.pattern, str) else self.pattern
        try:
            compiled = re.compile(raw)
        except re.error as error:
            raise PatternError(f"console pattern {self.pattern!r}: {error}") from error
        width = _width(compiled)
        if width > WIDTH_LIMIT_BYTES:
            raise PatternError(
                f"console pattern {self.pattern!r} has no bound: write {{1,128}} instead of + "
                f"and {{0,128}} instead of * (at most {WIDTH_LIMIT_BYTES} bytes in all)"
            )
        if compiled.match(b""):
            raise PatternError(f"console pattern {self.pattern!r} matches nothing at all")
        object.__setattr__(self, "compiled", compiled)
        object.__setattr__(self, "width", max(width, 1))

    def __str__(self) -> str:
        shown = self.pattern if isinstance(self.pattern, str) else repr(self.pattern)
        return f"{self.name} ({shown})" if self.name and self.name != shown else f"{shown!r}"


def as_marker(pattern: str | bytes | Marker) -> Marker:
    """A marker from whatever a caller wrote; `PatternError` if it is unbounded or malformed."""
    if isinstance(pattern, Marker):
        return pattern
    return Marker(pattern if isinstance(pattern, str) else repr(pattern), pattern)


def as_markers(patterns: str | bytes | Marker | Sequence[str | bytes | Marker]) -> list[Marker]:
    """The same for one pattern or several alternatives."""
    if isinstance(patterns, str | bytes | Marker):
        return [as_marker(patterns)]
    return [as_marker(pattern) for pattern in patterns]


#: Output after which nothing that was waited for can still come from this boot.
#: Kernel strings: Linux kernel/panic.c, arch/{arm64,x86}/mm/fault.c, arch/arm64/kernel/traps.c;
#: U-Boot's: lib/hang.c, common/board_f.c, arch/arm/lib/interrupts_64.c, drivers/sysreset.
DEFAULT_DEATHS: tuple[Marker, ...] = (
    Marker("kernel panic", r"Kernel panic - not syncing[^\r\n]{0,200}"),
    Marker("kernel oops", r"(?:Internal error: |BUG: unable to |Unable to )[^\r\n]{1,120}"),
    Marker("kernel oops", r"Oops: [0-9a-f]{4,16}"),
    Marker("U-Boot hang", r"### ERROR ### [^\r\n]{1,80}"),
    Marker("U-Boot reset", r"resetting \.\.\.", restart=True),
    Marker("U-Boot exception", r'"Synchronous Abort" handler'),
)
