"""Whether the host let a machine run: a verdict on a product needs a host that kept up.

Linux counts for each thread how long it was ready to run and waited for a processor: the second
number of `/proc/PID/task/TID/schedstat`, in nanoseconds (kernel, Documentation/scheduler/
sched-stats). Sampled for an emulator's threads and for our own (the recorder serves its disks),
the sum tells a device that was slow from a host that was busy. A kernel that doesn't count says
zero, and every budget is then wall time, as without this.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

__all__ = ["StarvationWatch", "run_delays"]

_INTERVAL_S: Final = 0.5
_KEPT: Final = 2400
"""Samples: 20 minutes."""

RunDelays = dict[tuple[int, int], float]


def run_delays(pid: int) -> RunDelays:
    """For each thread of a process: seconds it was ready to run and did not; none if it is gone."""
    found: RunDelays = {}
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):
                text = (thread / "schedstat").read_text(encoding="ascii")
                found[pid, int(thread.name)] = int(text.split()[1]) / 1e9
    return found


class StarvationWatch:
    """Samples the machine's process, whichever it is at the time, and our own.

    `pid` says which process the machine is now, None for none; `read` is `run_delays`.
    """

    def __init__(
        self, pid: Callable[[], int | None], read: Callable[[int], RunDelays] = run_delays
    ) -> None:
        self._pid = pid
        self._read = read
        self._lock = threading.Lock()
        self._last: RunDelays = {}
        self._total_s = 0.0
        self._samples: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._ended = threading.Event()
        self._sample()
        threading.Thread(target=self._run, name="starvation", daemon=True).start()

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()

    def since(self, monotonic_s: float) -> float:
        """Seconds since that moment in which the machine was ready to run and was not let.

        Of several threads that waited at the same time, the one that waited longest counts.
        """
        with self._lock:
            self._sample_locked()
            before = next((t for at, t in reversed(self._samples) if at <= monotonic_s), None)
            if before is None:
                before = self._samples[0][1]
            return self._total_s - before

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            self._sample_locked()

    def _sample_locked(self) -> None:
        pid = self._pid()
        theirs = self._read(pid) if pid is not None else {}
        ours = self._read(os.getpid())
        waited = 0.0
        for process in (theirs, ours):
            # A thread seen first has its whole life behind it: ours are old, theirs just began.
            begun = process is theirs
            waits = (
                delay - self._last.get(thread, 0.0 if begun else delay)
                for thread, delay in process.items()
            )
            waited = max(waited, max(waits, default=0.0))
        self._last = {**theirs, **ours}
        self._total_s += waited
        self._samples.append((time.monotonic(), self._total_s))
