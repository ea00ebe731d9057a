"""Maintenance windows: the local times at which a device may be disturbed. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_TEXT = re.compile(r"(?:([A-Za-z,]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)")
_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES


class Window(NamedTuple):
    """`days` are 0 (Monday) to 6; `start` and `end` are minutes of the day it starts on.

    An end that is not after the start is on the next day.
    """

    days: tuple[int, ...]
    start: int
    end: int


def parse_window(text: str) -> Window:
    """Read "22:00-04:30" or "Sat,Sun 00:00-24:00"; ValueError says what is wrong."""
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not like '22:00-04:30' or 'Sat,Sun 00:00-24:00'")
    names = match[1].split(",") if match[1] else _DAYS
    for name in names:
        if name not in _DAYS:
            raise ValueError(f"{text!r}: {name!r} is none of {', '.join(_DAYS)}")
    start, end = (int(match[at]) * 60 + int(match[at + 1]) for at in (2, 4))
    if start >= _DAY_MINUTES or end > _DAY_MINUTES or int(match[3]) > 59 or int(match[5]) > 59:
        raise ValueError(f"{text!r}: no such time of day")
    if end <= start:
        end += _DAY_MINUTES
    return Window(tuple(_DAYS.index(name) for name in names), start, end)


def minutes_until_open(windows: Sequence[Window], weekday: int, minute: int) -> int:
    """Return how long to wait, in minutes, at that minute of that day; 0: go ahead."""
    if not windows:
        return 0
    now = weekday * _DAY_MINUTES + minute
    best = _WEEK_MINUTES
    for window in windows:
        for day in window.days:
            start = day * _DAY_MINUTES + window.start
            length = window.end - window.start
            if (now - start) % _WEEK_MINUTES < length:
                return 0
            best = min(best, (start - now) % _WEEK_MINUTES)
    return best
