"""Run one program with a deadline, in a session of its own, and leave nothing of it behind.

`subprocess` is not used: it costs a tenth of a second of import on an emulated board and hands
the caller's signal mask to the child. Bounded in time (deadline, then SIGKILL to the whole
session's process group) and in memory (the tail of the output is kept).
"""

from __future__ import annotations

import os
import select
import signal
import time
from typing import NamedTuple

_KEEP_BYTES = 10 * 1024
_READ_BYTES = 64 * 1024


class Completed(NamedTuple):
    """How a program ended; `status` is negative for a signal, None at the deadline."""

    status: int | None
    output: bytes
    errors: bytes

    def failure(self) -> str:
        """Say how it failed and the last line that it wrote."""
        if self.status is None:
            how = "did not finish in time"
        elif self.status < 0:
            how = f"was killed by signal {-self.status}"
        else:
            how = f"exited with {self.status}"
        lines = (self.errors or self.output).decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        said = "".join(char if char.isprintable() else "?" for char in last[:300])
        return f"{how}: {said}" if said else how


def run(arguments: list[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
    """Run `arguments` (looked up in PATH) and wait for it and for its output.

    `stdin` must fit a pipe (64 KiB). Raises OSError when the program cannot be started.
    """
    with Program(arguments, stdin) as program:
        return program.wait(timeout_s)


class Program:
    """A running program; leaving the block ends it and everything that it started.

    Raises OSError when the program cannot be started.
    """

    def __init__(self, arguments: list[str], stdin: bytes = b"") -> None:
        assert len(stdin) <= 65536, "larger input could block"
        in_read, in_write = os.pipe()
        self._out, out_write = os.pipe()
        self._err, err_write = os.pipe()
        try:
            self._pid = os.posix_spawnp(
                arguments[0],
                arguments,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, in_read, 0),
                    (os.POSIX_SPAWN_DUP2, out_write, 1),
                    (os.POSIX_SPAWN_DUP2, err_write, 2),
                ],
                setpgroup=0,
                setsigmask=[],
                setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGPIPE],
            )
        except BaseException:
            for handle in (in_read, in_write, self._out, out_write, self._err, err_write):
                os.close(handle)
            raise
        for handle in (in_read, out_write, err_write):
            os.close(handle)
        self._status: int | None = None
        self._tails = {self._out: b"", self._err: b""}
        self._handle = os.pidfd_open(self._pid)
        self._poller = select.poll()
        self._waiting = {self._out, self._err, self._handle}
        for number in self._waiting:
            self._poller.register(number, select.POLLIN)
        try:
            os.write(in_write, stdin)
        except BrokenPipeError:
            pass
        finally:
            os.close(in_write)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle in self._waiting:
            _kill_group(self._pid)
            os.waitpid(self._pid, 0)
        for handle in (self._handle, self._out, self._err):
            os.close(handle)

    @property
    def running(self) -> bool:
        """Whether the program itself has not ended yet."""
        return self._handle in self._waiting

    def wait(self, timeout_s: float) -> Completed:
        """Wait for the program and for its output, then say how it went."""
        deadline = time.monotonic() + timeout_s
        while self._waiting:
            left = deadline - time.monotonic()
            if left <= 0 or not self.poll(left):
                break
        return Completed(self._status, self._tails[self._out], self._tails[self._err])

    def poll(self, timeout_s: float, writable: int = -1) -> bool:
        """Take in what happens until something does; False when nothing did in time.

        With `writable`, a file descriptor, it also counts when that can be written to.
        """
        if writable >= 0:
            self._poller.register(writable, select.POLLOUT)
        try:
            events = self._poller.poll(timeout_s * 1000)
        finally:
            if writable >= 0:
                self._poller.unregister(writable)
        for number, _ in events:
            if number == writable:
                continue
            if number == self._handle:
                self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                # What the program left behind holds the pipes open; it ends with it.
                _kill_group(self._pid)
            elif data := os.read(number, _READ_BYTES):
                self._tails[number] = (self._tails[number] + data)[-_KEEP_BYTES:]
                continue
            self._poller.unregister(number)
            self._waiting.discard(number)
        return bool(events)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
