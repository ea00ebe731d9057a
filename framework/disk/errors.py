"""What can go wrong with a recorded disk.

Every message is one line: what failed, which file, device or offset, and what to do.
The facts are also fields, so that a caller needs no parsing.
"""

from __future__ import annotations

from pathlib import Path


class DiskError(Exception):
    """Root of the errors of this package."""


class RecorderError(DiskError):
    """The recorder can't start or can't go on; `path` is the file concerned, if any."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class BaseImageError(RecorderError):
    """A base image is missing, has the wrong size or other content than was recorded."""


class JournalError(DiskError):
    """A file is not a journal, or can't be read; `offset` is where, in bytes."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"journal {path}: offset {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.reason = reason


class UnreadableSectorError(DiskError):
    """A sector that a tear made unreadable was read; a guest gets EIO for it."""

    def __init__(self, device: str, offset: int, length: int) -> None:
        super().__init__(
            f"device {device}: {length} bytes at offset {offset} are unreadable (torn by a cut)"
        )
        self.device = device
        self.offset = offset
        self.length = length


class LayoutError(DiskError):
    """A structure on a disk (partition table, environment, file system) is not valid."""

    def __init__(self, device: str, offset: int, reason: str) -> None:
        super().__init__(f"device {device}: offset {offset}: {reason}")
        self.device = device
        self.offset = offset
        self.reason = reason
