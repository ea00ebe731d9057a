"""The device's clock, and what to do when it is plainly wrong.

A device whose clock battery is dead starts in 1970 or at some fixed date, and then no certificate
is valid yet. It cannot be earlier than when its own files were made, so before TLS is used the
clock is set forward to that, as systemd does with its own build time.
"""

from __future__ import annotations

import os
import time

from updater.device.console import say


class SystemClock:
    """Real time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()

    def utc_seconds(self) -> int:
        """Seconds since 1970."""
        return int(time.time())

    def wait(self, seconds: float) -> None:
        """Wait; a signal's exception ends it at once."""
        time.sleep(seconds)


def floor_seconds(paths: list[str]) -> int:
    """Return the newest modification time of the files, seconds since 1970; 0 without any."""
    newest = 0
    for path in paths:
        try:
            newest = max(newest, int(os.stat(path).st_mtime))  # noqa: PTH116
        except OSError:
            continue
    return newest


def raise_to(floor: int) -> None:
    """Set the system's clock forward to `floor` if it is behind; say so when that fails."""
    now = int(time.time())
    if now >= floor:
        return
    before, after = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) for at in (now, floor))
    try:
        time.clock_settime(time.CLOCK_REALTIME, floor)
    except OSError as error:
        say(f"warning: the clock says {before}, before {after}, and cannot be set: {error}")
        return
    say(f"the clock said {before}; set forward to {after}, when this system was made")
