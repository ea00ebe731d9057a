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
    assert len(stdin) <= 65536, "larger input could block"
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    try:
        pid = os.posix_spawnp(
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
            setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGPIPE],
        )
    except BaseException:
        for handle in (in_read, in_write, out_read, out_write, err_read, err_write):
            os.close(handle)
        raise
    for handle in (in_read, out_write, err_write):
        os.close(handle)
    try:
        try:
            os.write(in_write, stdin)
        except BrokenPipeError:
            pass
        finally:
            os.close(in_write)
        return _collect(pid, out_read, err_read, timeout_s)
    finally:
        os.close(out_read)
        os.close(err_read)


def _collect(pid: int, out_read: int, err_read: int, timeout_s: float) -> Completed:
    deadline = time.monotonic() + timeout_s
    tails = {out_read: b"", err_read: b""}
    reaped: int | None = None
    handle = os.pidfd_open(pid)
    poller = select.poll()
    for number in (out_read, err_read, handle):
        poller.register(number, select.POLLIN)
    waiting = {out_read, err_read, handle}
    try:
        while waiting:
            left = deadline - time.monotonic()
            events = poller.poll(max(0, left) * 1000) if left > 0 else []
            if not events:
                break
            for number, _ in events:
                if number == handle:
                    reaped = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    # What the program left behind holds the pipes open; it ends with it.
                    _kill_group(pid)
                elif data := os.read(number, _READ_BYTES):
                    tails[number] = (tails[number] + data)[-_KEEP_BYTES:]
                    continue
                poller.unregister(number)
                waiting.discard(number)
    finally:
        if reaped is None and handle in waiting:
            _kill_group(pid)
            os.waitpid(pid, 0)
        os.close(handle)
    return Completed(reaped, tails[out_read], tails[err_read])


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
