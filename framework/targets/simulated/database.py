"""SQLite on the simulated data partition: a VFS, and a connection that the client's store accepts.

The client's state store is SQLite with full synchronisation. Its pages, its rollback journal and
its syncs go through `DataVfs` to `FileSystem` and so to the drive, where the power can go between
any two of them (sqlite.org/vfs.html, sqlite.org/atomiccommit.html). SQLite's own random numbers
come from a counter, so that the same lifetime writes the same bytes.

apsw has its own SQLite and its own exceptions; `Connection` gives the client the ones of `sqlite3`
that the store handles on a device.
"""

from __future__ import annotations

import errno
import hashlib
import sqlite3
from collections.abc import Iterable
from typing import Any

import apsw

from framework.targets.simulated.drive import PowerLost
from framework.targets.simulated.filesystem import FileSystem, FileSystemError

_NAME = "simulated"
_CODE = "extendedresult"


class _File(apsw.VFSFile):
    """An open file; SQLite's locks are not needed, as one process runs at a time."""

    def __init__(self, disk: FileSystem, name: str) -> None:
        self._disk = disk
        self._name = name

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        try:
            return self._disk.read(self._name, offset, amount)
        except FileSystemError as error:
            # As SQLite's own VFS says of EIO (unixRead in os_unix.c).
            raise _in_sqlite(error, apsw.SQLITE_IOERR_CORRUPTFS) from error

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        try:
            self._disk.write(self._name, offset, data)
        except FileSystemError as error:
            raise _in_sqlite(error) from error

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._disk.truncate(self._name, size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        try:
            self._disk.sync(self._name)
        except FileSystemError as error:
            raise _in_sqlite(error) from error

    def xFileSize(self) -> int:  # noqa: N802
        return self._disk.size(self._name)

    def xLock(self, level: int) -> None:  # noqa: N802
        return

    def xUnlock(self, level: int) -> None:  # noqa: N802
        return

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xFileControl(self, operation: int, pointer: int) -> bool:  # noqa: N802
        return False

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0

    def xSectorSize(self) -> int:  # noqa: N802
        return 4096

    def xClose(self) -> None:  # noqa: N802
        return

    def excepthook(self, kind: Any, value: Any, trace: Any) -> bool:
        """Say nothing: the error is the caller's."""
        return True


class DataVfs(apsw.VFS):
    """SQLite's view of the data partition that is in `disk`; set it at every mount."""

    def __init__(self) -> None:
        self.disk: FileSystem | None = None
        self._drawn = 0
        # SQLite seeds its random numbers from the default VFS, whichever one a connection uses.
        super().__init__(_NAME, "", makedefault=True, maxpathname=128)

    @property
    def _mounted(self) -> FileSystem:
        assert self.disk is not None
        return self.disk

    def restart(self) -> None:
        """Begin the sequence of random numbers again: a lifetime begins."""
        self._drawn = 0

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        """There are no folders."""
        return name

    def xAccess(self, name: str, flags: int) -> bool:  # noqa: N802
        """Say whether there is such a file."""
        return self._mounted.exists(name)

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802
        """Remove a file; with `sync`, durably."""
        try:
            self._mounted.remove(name)
            if sync:
                self._mounted.sync_directory()
        except FileSystemError as error:
            raise _in_sqlite(error) from error

    def xOpen(self, name: Any, flags: list[int]) -> _File:  # noqa: N802
        """Open a file, making it if SQLite wants that."""
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or "temporary"
        if flags[0] & apsw.SQLITE_OPEN_CREATE:
            self._mounted.create(path)
        elif not self._mounted.exists(path):
            raise apsw.CantOpenError(f"{path}: no such file")
        flags[1] = flags[0]
        return _File(self._mounted, path)

    def xRandomness(self, count: int) -> bytes:  # noqa: N802
        """Return bytes that are the same in every run."""
        self._drawn += 1
        return hashlib.shake_128(self._drawn.to_bytes(8, "little")).digest(count)

    def xSleep(self, microseconds: int) -> int:  # noqa: N802
        """Return at once."""
        return microseconds

    def xCurrentTime(self) -> float:  # noqa: N802
        """Return one moment, as a Julian day."""
        return 2_460_000.5

    def xCurrentTimeInt64(self) -> int:  # noqa: N802
        """Return one moment, in milliseconds of Julian days."""
        return int(2_460_000.5 * 86_400_000)

    def excepthook(self, kind: Any, value: Any, trace: Any) -> bool:
        """Say nothing: the error is the caller's."""
        return True


class Connection:
    """An apsw connection with the part of `sqlite3.Connection` that the client's store uses."""

    def __init__(self, path: str, disk: FileSystem) -> None:
        self._disk = disk
        # To ask for none seeds them anew (sqlite.org/c3ref/randomness.html): what is written must
        # not depend on what was drawn before.
        apsw.randomness(0)
        try:
            self._real = apsw.Connection(path, vfs=_NAME, statementcachesize=32)
        except apsw.Error as error:
            raise self._as_sqlite3(error) from error
        self._cursor = self._real.cursor()

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return bool(self._real.in_transaction)

    def execute(self, sql: str, values: Any = None) -> _Rows:
        """Run one statement; its rows are fetched at once."""
        try:
            return _Rows(self._cursor.execute(sql, values).fetchall())
        except apsw.Error as error:
            raise self._as_sqlite3(error) from error

    def executemany(self, sql: str, rows: Iterable[Any]) -> None:
        """Run a statement for every row of values."""
        try:
            self._cursor.executemany(sql, rows).fetchall()
        except apsw.Error as error:
            raise self._as_sqlite3(error) from error

    def executescript(self, sql: str) -> None:
        """Run several statements."""
        self.execute(sql)

    def close(self) -> None:
        """Close; nothing is written by that."""
        self._cursor.close(True)
        self._real.close(True)

    def _as_sqlite3(self, error: apsw.Error) -> BaseException:
        # The power may have gone in the middle of it, or long before, in whose handling this is.
        if self._disk.off and isinstance(error.__context__, PowerLost):
            return error.__context__
        return _in_sqlite3(error)


class _Rows:
    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def fetchall(self) -> list[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None


def _in_sqlite(error: FileSystemError, extended: int = apsw.SQLITE_IOERR_WRITE) -> apsw.Error:
    """What the file system says, in the terms of SQLite's result codes."""
    if error.errno == errno.ENOSPC:
        return apsw.FullError("database or disk is full")
    failed = apsw.IOError("disk I/O error")
    setattr(failed, _CODE, extended)
    return failed


def _in_sqlite3(error: apsw.Error) -> sqlite3.Error:
    """What apsw raises, as the standard library's module would."""
    if isinstance(error, apsw.NotADBError | apsw.CorruptError):
        corrupt = sqlite3.DatabaseError(str(error))
        corrupt.sqlite_errorcode = getattr(error, _CODE, apsw.SQLITE_CORRUPT)
        return corrupt
    failed = sqlite3.OperationalError(str(error))
    failed.sqlite_errorcode = getattr(error, _CODE, 0)
    return failed
