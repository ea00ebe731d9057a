"""What Linux finds on an ext4 partition after a cut: journal replayed, checked, files read.

The partition is exported to a temporary file, and what the device does to it at its start is done
to that. Of a device that only mounts it: `e2fsck -fp` replays the journal and repairs what a mount
would put right as well (orphaned inodes, summary counters); anything beyond that makes it give up,
which is the verdict *not clean*. A device that mends the partition first (`Repair`) runs e2fsck
itself, so the same commands are run here. `e2fsck -fn` then has to find nothing.

One run of `e2fsck -fy` does for all that where it replays the journal and finds nothing to put
right but the free counts of the superblock, which no journal holds and every mount and check counts
anew: by far the commonest case. Where it says anything else, and the device's own commands are
others, its result is forgotten, and those are run on another export.

A sector that can't be read takes its whole page with it: Linux reads a block device by pages, and
fails all of one. Told to go on (`-y`), e2fsck takes such a page for zeros, and writes it so. Here
it is zeros from the beginning; but a file's own content is read by no check: it stays unreadable.

Source: e2fsck(8), its exit codes and how it handles read errors; e2fsprogs has to be installed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from framework.disk.errors import DiskError, LayoutError
from framework.disk.files import EXT_MAGIC, ExtReader, LostFile
from framework.disk.lazy import LazyDisk, read_exact

_TIMEOUT_S: Final = 120.0
_PAGE: Final = 4096
_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
_PLENTY: Final = 16
"""How often a partition has to fit: several are checked at once."""
_LEFT_UNCORRECTED: Final = 4
_MAGIC_AT: Final = 0x38
"""Where a superblock, and each copy of it, has its magic."""
_USUAL: Final = re.compile(
    r"e2fsck [^\n]*|[^\n]*: recovering journal|Pass \d: [^\n]*|"
    r"Free (?:blocks|inodes) count wrong \(\d+, counted=\d+\)\.|Fix\? yes|"
    r"Setting free (?:blocks|inodes) count to \d+ \(was \d+\)|"
    r"[^\n]*: \*{5} FILE SYSTEM WAS MODIFIED \*{5}|"
    r"[^\n]*: \d+/\d+ files \([^\n]*\), \d+/\d+ blocks|"
)
"""Every line that e2fsck -fy may say of a file system that only had a journal to be replayed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ext4Check:
    """The verdict on a partition.

    `replayed`: its journal had something to replay. `output`: e2fsck's words, for people.
    `files`: the content of the files asked for, None for one that is missing or unreadable.
    `mended`: a replay was not enough, and the device's own repair was needed. `unreadable`: how
    many ranges can't be read. `tree`: all files, if they were asked for and can be read; `lost`:
    those that can't, by path.
    """

    clean: bool
    replayed: bool
    output: str
    files: Mapping[str, bytes | None]
    mended: bool = False
    unreadable: int = 0
    tree: Mapping[str, bytes | None] | None = None
    lost: Mapping[str, LostFile] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Repair:
    """How a device mends its data partition before it mounts it.

    `e2fsck -fy`; if that fails, which it does without a superblock that can be read, the file
    system's first block is written with zeros, and `e2fsck -fy` begins with a copy of the
    superblock: a block that has a superblock's magic. Always a whole check (`-f`): a repair that a
    cut ended may have left a superblock that calls the file system clean, and then `-y` alone does
    nothing. Not the `e2fsck -p` that distributions run: where the group descriptors are damaged it
    deletes the journal (1.47), and files that were synced are gone with it; `-y` takes a copy of
    the descriptors and replays the journal.

    Attributes:
        block_bytes: the file system's block size.
        backups: block numbers of the superblock's copies, in the order in which they are tried.
    """

    block_bytes: int
    backups: tuple[int, ...]


def _place(length: int) -> Path | None:
    """Memory, if there is plenty: removing the file costs more than the check on a real disk."""
    try:
        room = os.statvfs(_MEMORY)
    except OSError:
        return None
    plenty = room.f_bavail * room.f_frsize > _PLENTY * length and os.access(_MEMORY, os.W_OK)
    return _MEMORY if plenty else None


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

    A context manager. Pages that can't be read become zeros in it, as for a file system check
    that goes on after an I/O error; the content of files in them stays unreadable.
    """

    def __init__(self, disk: LazyDisk, offset: int, length: int) -> None:
        self._disk = disk
        self._offset = offset
        self._length = length
        self._directory: Path | None = None
        self.path = Path()
        self.unreadable = [
            _pages(at - offset, size) for at, size in disk.unreadable(offset, length)
        ]
        """(Offset, length) from the partition's start, in whole pages."""

    def __enter__(self) -> Ext4Image:
        self._directory = Path(tempfile.mkdtemp(prefix="brownout-ext4-", dir=_place(self._length)))
        self.path = self._directory / "partition.img"
        try:
            self._export()
        except BaseException:
            self._remove()
            raise
        return self

    def _export(self) -> None:
        self._disk.export(self.path, self._offset, self._length, zero_unreadable=True)
        if self.unreadable:
            with self.path.open("r+b") as file:
                for at, size in self.unreadable:
                    file.seek(at)
                    file.write(bytes(min(size, self._length - at)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._directory is not None:
            self.path.unlink(missing_ok=True)
            self._directory.rmdir()
            self._directory = None

    def recover(self, repair: Repair | None = None) -> tuple[bool, bool, str, bool]:
        """Do what the device does, and check: (clean, replayed, output, mended).

        Raises DiskError if e2fsck is missing or does not end.
        """
        code, words = _e2fsck(self.path, "-fy")
        replayed = "recovering journal" in words
        if code < _LEFT_UNCORRECTED and all(map(_USUAL.fullmatch, words.splitlines())):
            return True, replayed, words, False
        if repair is None:
            self._export()
            return self._preen()
        if code >= _LEFT_UNCORRECTED:
            code, more = self._from_copies(repair, code)
            words += more
        if code >= _LEFT_UNCORRECTED:
            return False, replayed, words, True
        code, more = _e2fsck(self.path, "-fn")
        return code == 0, replayed, words + more, True

    def _preen(self) -> tuple[bool, bool, str, bool]:
        """What a mount would put right is; then nothing may be wrong."""
        code, words = _e2fsck(self.path, "-fp")
        replayed = "recovering journal" in words
        if code >= _LEFT_UNCORRECTED:
            return False, replayed, words, False
        code, more = _e2fsck(self.path, "-fn")
        return code == 0, replayed, words + more, False

    def _from_copies(self, repair: Repair, code: int) -> tuple[int, str]:
        words = ""
        for backup in repair.backups:
            with self.path.open("r+b") as file:
                file.seek(backup * repair.block_bytes + _MAGIC_AT)
                if int.from_bytes(file.read(2), "little") != EXT_MAGIC:
                    continue
                file.seek(0)
                file.write(bytes(repair.block_bytes))
            where = ("-b", str(backup), "-B", str(repair.block_bytes))
            code, more = _e2fsck(self.path, "-fy", *where)
            words += more
            if code < _LEFT_UNCORRECTED:
                break
        return code, words

    def read_file(self, path: str) -> bytes:
        """A file's content as it is now; raises LayoutError if it is missing or damaged."""
        source = _ImageFile(self.path)
        try:
            return self._reader(source).read_file(path)
        finally:
            source.close()

    def list_directory(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises LayoutError."""
        source = _ImageFile(self.path)
        try:
            return self._reader(source).list_directory(path)
        finally:
            source.close()

    def everything(
        self,
    ) -> tuple[dict[str, bytes | None] | None, dict[str, LostFile]]:
        """See `ExtReader.everything` and `lost`; None where there is no reading it."""
        source = _ImageFile(self.path)
        try:
            reader = self._reader(source)
            return reader.everything(), reader.lost
        except DiskError:
            return None, {}
        finally:
            source.close()

    def _reader(self, source: _ImageFile) -> ExtReader:
        return ExtReader(source, 0, self._length, self.unreadable)


def _pages(at: int, size: int) -> tuple[int, int]:
    """The whole pages that a range touches."""
    begin = at // _PAGE * _PAGE
    return begin, -(-(at + size) // _PAGE) * _PAGE - begin


def check_ext4(
    disk: LazyDisk,
    offset: int,
    length: int,
    *,
    read: Sequence[str] = (),
    repair: Repair | None = None,
    everything: bool = False,
) -> Ext4Check:
    """Check a partition as a device's start leaves it, and read files of it afterwards.

    `everything`: all of them, for `Ext4Check.tree`. `repair`: what the device does to it before it
    mounts it. Raises DiskError if e2fsck is missing or does not end, or there is no room for the
    export.
    """
    with Ext4Image(disk, offset, length) as image:
        clean, replayed, output, mended = image.recover(repair)
        files: dict[str, bytes | None] = {}
        for path in read:
            try:
                files[path] = image.read_file(path)
            except LayoutError:
                files[path] = None
        tree, lost = image.everything() if everything else (None, {})
        holes = len(image.unreadable)
        if holes:
            output = f"{holes} unreadable ranges were read as zeros\n{output}"
        return Ext4Check(clean, replayed, output, files, mended, holes, tree, lost)


def _e2fsck(path: Path, *options: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["e2fsck", *options, str(path)],
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
        raise DiskError(f"e2fsck {options[0]} did not end within {_TIMEOUT_S:g} s") from error
    return done.returncode, done.stdout.decode(errors="replace")
