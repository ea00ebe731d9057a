"""A writer of initramfs archives: cpio's "newc" format, as the kernel reads it.

Facts from the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. All owners are
root and all times zero, so that the same tree gives the same bytes.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field


@dataclass
class CpioArchive:
    """An archive being built; `data` ends it."""

    _parts: list[bytes] = field(default_factory=list)
    _next_inode: int = 1

    def add_directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory; parents must have been added before."""
        self._add(name, stat.S_IFDIR | mode, b"")

    def add_file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, content)

    def add_symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device node (no privileges are needed: it is only a header)."""
        self._add(name, stat.S_IFCHR | 0o600, b"", rdev=(major, minor))

    def data(self) -> bytes:
        """The whole archive, padded to four bytes."""
        return b"".join(self._parts) + _member(0, "TRAILER!!!", 0, b"", (0, 0))

    def _add(self, name: str, mode: int, content: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        self._parts.append(_member(self._next_inode, name, mode, content, rdev))
        self._next_inode += 1


def _member(inode: int, name: str, mode: int, content: bytes, rdev: tuple[int, int]) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *rdev, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    head = header + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
