"""What Linux finds on an ext4 partition after a cut: journal replayed, checked, files read.

The partition is exported to a temporary file. `e2fsck -fp` replays the journal and repairs only
what a mount would put right as well (orphaned inodes, summary counters); anything beyond that
makes it give up, which is the verdict *not clean*. `e2fsck -fn` then has to find nothing. Source:
e2fsck(8), its exit codes; e2fsprogs has to be installed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from framework.disk.errors import DiskError, LayoutError
from framework.disk.files import ExtReader
from framework.disk.lazy import LazyDisk, read_exact

_TIMEOUT_S: Final = 120.0
_CORRECTED: Final = 1
_REBOOT: Final = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Ext4Check:
    """The verdict on a partition.

    `replayed`: its journal had something to replay. `output`: e2fsck's words, for people.
    `files`: the content of the files asked for, None for one that is missing or unreadable.
    """

    clean: bool
    replayed: bool
    output: str
    files: Mapping[str, bytes | None]


class _ImageFile:
    """An exported partition as a source for the file system readers."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        return read_exact(self._fd, length, offset, self.name)

    def close(self) -> None:
        os.close(self._fd)


class Ext4Image:
    """A partition exported to a temporary file, which is removed at the end.

    A context manager. Sectors that can't be read become zeros in it, as for a file system check
    that goes on after an I/O error.
    """

    def __init__(self, disk: LazyDisk, offset: int, length: int) -> None:
        self._disk = disk
        self._offset = offset
        self._length = length
        self._directory: Path | None = None
        self.path = Path()

    def __enter__(self) -> Ext4Image:
        self._directory = Path(tempfile.mkdtemp(prefix="brownout-ext4-"))
        self.path = self._directory / "partition.img"
        try:
            self._disk.export(self.path, self._offset, self._length, zero_unreadable=True)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def recover(self) -> tuple[bool, bool, str]:
        """Replay the journal and check: (clean, replayed, output).

        Raises DiskError if e2fsck is missing or does not end.
        """
        code, first = _e2fsck("-fp", self.path)
        replayed = "recovering journal" in first
        if code & ~(_CORRECTED | _REBOOT):
            return False, replayed, first
        code, second = _e2fsck("-fn", self.path)
        return code == 0, replayed, first + second

    def read_file(self, path: str) -> bytes:
        """A file's content as it is now; raises LayoutError if it is missing or damaged."""
        source = _ImageFile(self.path)
        try:
            return ExtReader(source, 0, self._length).read_file(path)
        finally:
            source.close()

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises LayoutError."""
        source = _ImageFile(self.path)
        try:
            return ExtReader(source, 0, self._length).list_directory(path)
        finally:
            source.close()


def check_ext4(disk: LazyDisk, offset: int, length: int, *, read: Sequence[str] = ()) -> Ext4Check:
    """Check a partition as a mount would find it, and read files of it afterwards.

    Raises DiskError if e2fsck is missing or does not end, or there is no room for the export.
    """
    with Ext4Image(disk, offset, length) as image:
        clean, replayed, output = image.recover()
        files: dict[str, bytes | None] = {}
        for path in read:
            try:
                files[path] = image.read_file(path)
            except LayoutError:
                files[path] = None
        holes = disk.unreadable(offset, length)
        if holes:
            output = f"{len(holes)} unreadable ranges were read as zeros\n{output}"
        return Ext4Check(clean, replayed, output, files)


def _e2fsck(mode: str, path: Path) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["e2fsck", mode, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
            env={
                **os.environ,
                "LC_ALL": "C",
                "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            },
        )
    except FileNotFoundError as error:
        raise DiskError("e2fsck is not installed: install the package e2fsprogs") from error
    except subprocess.TimeoutExpired as error:
        raise DiskError(f"e2fsck {mode} did not end within {_TIMEOUT_S:g} s") from error
    return done.returncode, done.stdout.decode(errors="replace")
