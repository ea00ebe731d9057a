"""The recorder's disk as the simulated device's drive: recorded, faulted and cut as elsewhere.

The recorder is asked as its NBD connections ask it (`framework.disk.server.Core`), from the
device's own thread, one operation at a time. So triggers, injected faults, cache models, journal
and crash states are those of every other rig. A latency passes on the device's clock.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Final

from framework.disk import Recorder
from framework.disk.journal import Kind
from framework.disk.server import Pending
from framework.targets.simulated.drive import DriveError, PowerLost

DEVICE: Final = "vda"
_INDEX: Final = 0


class RecordedDrive:
    """The one disk of `recorder`.

    `settled` is called behind every operation, and may raise: what was typed or pulled meanwhile
    takes effect there. `wait` lets time pass on the device's clock.
    """

    def __init__(
        self,
        recorder: Recorder,
        settled: Callable[[], None],
        wait: Callable[[float], None],
    ) -> None:
        size = recorder.export_size(DEVICE)
        assert size is not None
        self.off = self.killed = False
        self.size_bytes = size
        self._recorder = recorder
        self._settled = settled
        self._wait = wait

    def read(self, offset: int, length: int) -> bytes:
        """Return what the drive holds; DriveError where that can't be read."""
        self._powered()
        request = Pending(None, 0, offset, length)
        self._recorder.register_read(_INDEX, request)
        self._let_time_pass(request)
        found = self._recorder.read(_INDEX, offset, length)
        if request.error or isinstance(found, int):
            raise DriveError(errno.EIO, f"read failed at byte {offset}")
        self._settled()
        return found

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole sectors into the cache; DriveError when that fails."""
        self._change(Kind.WRITE, offset, memoryview(data))

    def flush(self) -> None:
        """Make durable all that was written; DriveError when that fails."""
        self._change(Kind.FLUSH, 0, memoryview(b""))

    def power_on(self) -> None:
        """Give the power back."""
        self.off = False

    def _change(self, kind: Kind, offset: int, data: memoryview) -> None:
        self._powered()
        request = Pending(kind, 0, offset, len(data))
        if not self._recorder.register(_INDEX, request, False, data):
            self.off = True
            raise PowerLost
        self._recorder.commit()
        self._let_time_pass(request)
        self._recorder.complete(_INDEX, [request])
        if request.error:
            raise DriveError(errno.EIO, f"{kind.name.lower()} failed at byte {offset}")
        self._settled()

    def _powered(self) -> None:
        if self.off:
            raise PowerLost

    def _let_time_pass(self, request: Pending) -> None:
        if request.due:
            self._wait(max(0.0, request.due - time.monotonic()))
