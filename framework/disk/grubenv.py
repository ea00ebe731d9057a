"""GRUB's environment block: a file of 1024 bytes that GRUB overwrites in place.

It begins with a signature line, then `name=value` lines (a backslash escapes a backslash or a
newline), the rest is filled with `#`. There is no checksum: a torn block can look valid, which is
why our x86 target keeps two copies, each with a lock file beside it (as grub-mender-grubenv does:
`editing=1` in the lock while the copy is being written), in a file system of its own. Source: the
GRUB manual, "Environment block", and grub-editenv's output in our tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final

from framework.disk.errors import DiskError
from framework.disk.files import FileSystem, open_file_system
from framework.disk.lazy import LazyDisk

SIGNATURE: Final = b"# GRUB Environment Block\n"
SIZE: Final = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class GrubEnvironment:
    """One block as found. `valid`: GRUB takes it, which asks for the signature only.

    `problem` says why it is not valid, or what is wrong with it though GRUB takes it.
    """

    valid: bool
    variables: Mapping[str, str]
    problem: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class GrubEnvironments:
    """Two (or more) copies, and the one that counts."""

    copies: tuple[GrubEnvironment, ...]
    locks: tuple[GrubEnvironment, ...]
    current: int | None
    """Index of the first copy that is valid and settled, None if there is none."""

    @property
    def valid_copies(self) -> int:
        """How many copies are valid and settled."""
        return sum(_usable(c, lock) for c, lock in zip(self.copies, self.locks, strict=True))

    @property
    def variables(self) -> Mapping[str, str]:
        """The variables of the copy that counts; empty without one."""
        return {} if self.current is None else self.copies[self.current].variables


def parse_grub_environment(data: bytes | None) -> GrubEnvironment:
    """Parse a block (None: it can't be read). Never raises for its content."""
    if data is None:
        return GrubEnvironment(False, {}, "missing or unreadable")
    if not data.startswith(SIGNATURE):
        return GrubEnvironment(False, {}, "no signature")
    problem = None if len(data) == SIZE else f"{len(data)} bytes, not {SIZE}"
    variables: dict[str, str] = {}
    line = bytearray()
    escaped = False
    for byte in data[len(SIGNATURE) :]:
        if escaped:
            line.append(byte)
            escaped = False
        elif byte == 0x5C:
            escaped = True
        elif byte == 0x0A:
            name, equals, value = bytes(line).partition(b"=")
            if equals and not line.startswith(b"#"):
                variables[name.decode(errors="replace")] = value.decode(errors="replace")
            line.clear()
        else:
            line.append(byte)
    if line.strip(b"#"):
        problem = problem or "the block's end is not padding"
    return GrubEnvironment(True, variables, problem)


def parse_grub_environments(
    copies: Sequence[bytes | None], locks: Sequence[bytes | None] | None = None
) -> GrubEnvironments:
    """Parse the copies and their lock blocks and choose as our GRUB script does: see `current`.

    A copy is settled if its lock can be read and says `editing=0`; without `locks` every copy is.
    """
    parsed = tuple(parse_grub_environment(data) for data in copies)
    if locks is None:
        held = tuple(GrubEnvironment(True, {"editing": "0"}) for _ in parsed)
    else:
        held = tuple(parse_grub_environment(data) for data in locks)
    current = next(
        (i for i, (c, lock) in enumerate(zip(parsed, held, strict=True)) if _usable(c, lock)), None
    )
    return GrubEnvironments(parsed, held, current)


def read_grub_environments(
    places: Sequence[tuple[LazyDisk, int, int, str]],
) -> GrubEnvironments:
    """Read copies, each at (disk, offset and length of a partition, path in its file system).

    The `lock` beside each is read as well, unless there is one copy only. A file system is read as
    GRUB does: without replaying a journal. A missing or damaged file, or a file system that can't
    be read at all, is an invalid copy.
    """
    copies, locks = [], []
    for disk, offset, length, path in places:
        try:
            files: FileSystem | None = open_file_system(disk, offset, length)
        except DiskError:  # no file system, or its head can't be read
            files = None
        copies.append(_read(files, path))
        locks.append(_read(files, str(PurePosixPath(path).with_name("lock"))))
    return parse_grub_environments(copies, locks if len(places) > 1 else None)


def _read(files: FileSystem | None, path: str) -> bytes | None:
    if files is None:
        return None
    try:
        return files.read_file(path, limit=2 * SIZE)
    except DiskError:
        return None


def _usable(copy: GrubEnvironment, lock: GrubEnvironment) -> bool:
    return copy.valid and lock.variables.get("editing") == "0"
