"""The device's clock."""

from __future__ import annotations

import time


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
