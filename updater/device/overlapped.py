"""A block device whose writes and reads go on while the caller prepares the next ones.

One write is under way while the next piece is received, decompressed and hashed, and while one
is hashed in the read-back the next is read: a second core, or a slow medium, is not waited for
twice. One operation at a time, in the caller's order, in a thread that takes no signals. An error
is raised by the caller's next operation, at the latest by `sync` or `close`; nothing is reported
as done before it is.
"""

from __future__ import annotations

import mmap
import queue
import signal
import threading

from updater.device.errors import SlotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from updater.device.ports import BlockDevice


class Overlapped:
    """Wraps `device`; requests are at most `limit_bytes` long."""

    def __init__(self, device: BlockDevice, limit_bytes: int) -> None:
        self._device = device
        self._buffer = memoryview(mmap.mmap(-1, limit_bytes))
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[SlotError | None] = queue.SimpleQueue()
        self._busy = False
        self._ahead = (-1, 0)
        self.size_bytes = device.size_bytes
        self.block_bytes = device.block_bytes
        self._thread = threading.Thread(target=self._work, name="slot", daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def write(self, offset: int, data: memoryview) -> None:
        """Begin to write `data` at `offset`; raise what went wrong with the operation before."""
        self._settle()
        self._ahead = (-1, 0)
        copy = self._buffer[: len(data)]
        copy[:] = data
        self._begin(lambda: self._device.write(offset, copy))

    def sync(self) -> None:
        """Make everything written durable."""
        self._settle()
        self._device.sync()

    def read_medium(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the medium, and begin to read what follows it."""
        self._settle()
        if self._ahead == (offset, len(into)):
            into[:] = self._buffer[: len(into)]
        else:
            self._device.read_medium(offset, into)
        after, length = offset + len(into), len(into)
        self._ahead = (-1, 0)
        if after + length <= self.size_bytes:
            self._ahead = (after, length)
            copy = self._buffer[:length]
            self._begin(lambda: self._device.read_medium(after, copy))

    def close(self) -> None:
        """Close; a late error is raised here."""
        if not self._thread.is_alive():
            return
        try:
            # What was read ahead and is not wanted is no error.
            reading = self._ahead[0] >= 0
            try:
                self._settle()
            except SlotError:
                if not reading:
                    raise
        finally:
            self._jobs.put(None)
            self._thread.join()
            self._device.close()

    def _begin(self, job: Callable[[], None]) -> None:
        self._busy = True
        self._jobs.put(job)

    def _settle(self) -> None:
        """Wait for the operation that is under way."""
        if not self._busy:
            return
        error = self._done.get()
        self._busy = False
        if error is not None:
            raise error

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except SlotError as error:
                self._done.put(error)
            else:
                self._done.put(None)
