"""Files on the data partition that must survive a power cut, and directories of them.

Written, fsynced, and their directory fsynced, so that after a cut they are there whole or not at
all. `os` functions instead of pathlib: parts of this are on the boot path.
"""

from __future__ import annotations

import os

from updater.device.errors import StoreError


def write_durably(path: str, content: bytes, mode: int = 0o600) -> None:
    """Replace the file by `content`; after a cut it is the old or the new one."""
    temporary = f"{path}.new"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(handle, mode)
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.rename(temporary, path)  # noqa: PTH104 - boot path
    sync_directory(path.rpartition("/")[0])


def sync_directory(path: str) -> None:
    """Make the entries of the directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(path: str) -> None:
    """Remove the directory and what is in it; StoreError when something stays."""
    if not os.path.lexists(path):
        return
    import shutil  # noqa: PLC0415 - slow to import

    try:
        shutil.rmtree(path)
        sync_directory(path.rpartition("/")[0])
    except OSError as error:
        raise StoreError(f"{path}: cannot be removed: {error.strerror}") from error


def free_bytes(path: str) -> int:
    """Return how much an unprivileged process may still write to the file system of `path`."""
    numbers = os.statvfs(path)
    return numbers.f_bavail * numbers.f_frsize
