"""How many bytes went through over time, in a bounded number of samples.

Samples are taken as bytes pass, at most one an interval; when there are too many, every other one
goes and the interval doubles, so a long run is told as fully as a short one, only coarser.
"""

from __future__ import annotations

from attrs import frozen

FIRST_INTERVAL_NS = 20_000_000
MOST_SAMPLES = 2000


@frozen
class Sample:
    """The bytes forwarded so far; `time_ns` is of the monotonic clock."""

    time_ns: int
    up_bytes: int
    down_bytes: int


class Meter:
    """Takes samples; one thread writes, any may read `samples`."""

    def __init__(self) -> None:
        self.samples: tuple[Sample, ...] = ()
        self._interval_ns = FIRST_INTERVAL_NS

    def note(self, time_ns: int, up_bytes: int, down_bytes: int) -> None:
        """So many bytes have gone through by now."""
        sample = Sample(time_ns, up_bytes, down_bytes)
        taken = self.samples
        if len(taken) > 1 and time_ns - taken[-2].time_ns < self._interval_ns:
            # The newest always stands, so that the last byte is never missing.
            taken = taken[:-1]
        elif len(taken) >= MOST_SAMPLES:
            taken = taken[::2]
            self._interval_ns *= 2
        self.samples = (*taken, sample)
