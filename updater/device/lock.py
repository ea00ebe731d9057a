"""One updater at a time: an flock on `<data_dir>/lock`, held until the process ends.

The kernel drops it with the process, so a killed updater never leaves the device locked.
"""

from __future__ import annotations

import fcntl
import os

from updater.device.errors import BusyError, StoreError


def take(data_dir: str, verb: str) -> int:
    """Take the lock and return its handle (keep it open); BusyError when another has it."""
    path = f"{data_dir}/lock"
    try:
        os.makedirs(data_dir, mode=0o700, exist_ok=True)  # noqa: PTH103 - boot path
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: cannot be created: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 100, 0).decode("utf-8", "replace").partition("\n")[0]
        pid, _, verb_there = holder.partition(" ")
        os.close(handle)
        raise BusyError(verb_there or "?", pid or "?") from None
    except OSError as error:
        os.close(handle)
        raise StoreError(f"{path}: cannot be locked: {error.strerror}") from error
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {verb}\n".encode(), 0)
    except OSError:
        # On a full disk the lock still locks; only its description is missing.
        pass
    return handle
