"""The state store: SQLite on the data partition, every method one durable transaction.

Journal mode DELETE with synchronous=EXTRA: the rollback journal is synced before the database is
touched, and the directory after the journal's removal, so that a power cut leaves the old or the
new state and an acknowledged transaction stays (sqlite.org/pragma.html#pragma_synchronous; WAL
would keep two more files for no gain at ten transactions an update). A database from a newer
client is refused untouched. A corrupt one is set aside, because a device must not need a person to
update again.

A power cut may leave the block that was just being written unreadable. While a rollback journal is
there, nothing is lost by that: such a block of the journal is one that was not synced, so that the
database is untouched; such a block of the database is in the journal, whole. But SQLite reads
before it undoes, and gives up. So these blocks are overwritten with zeroes, which makes them
readable; SQLite takes zeroes for a journal's end and puts the database's blocks back.

A store of an older client is migrated, in one transaction, but not while an update is in progress
in it: if the system on trial is left again, the older client must still find its own record. Until
then the older columns are used and what only the newer ones could keep is kept in memory.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Mapping
from typing import TypeVar

from updater.device.errors import StoreError
from updater.device.model import Outcome, Part, Result, State, Update

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.ports import DatabaseFiles

_SCHEMA_VERSION = 2
_LOCK_TIMEOUT_S = 10.0
_T = TypeVar("_T")

_SCHEMA_1 = """
CREATE TABLE update_in_progress (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    artifact_name TEXT NOT NULL, previous_name TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL,
    state TEXT NOT NULL, boot_id TEXT NOT NULL, cause TEXT NOT NULL,
    provides TEXT NOT NULL, clears TEXT NOT NULL
) STRICT;
CREATE TABLE provides (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE outcome (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    result TEXT NOT NULL, artifact_name TEXT NOT NULL, slot TEXT NOT NULL,
    cause TEXT NOT NULL, finished_at INTEGER NOT NULL
) STRICT;
"""
_FROM_1_TO_2 = """
ALTER TABLE update_in_progress ADD COLUMN kind TEXT NOT NULL DEFAULT 'rootfs-image';
ALTER TABLE update_in_progress ADD COLUMN part TEXT NOT NULL DEFAULT '';
ALTER TABLE update_in_progress ADD COLUMN steps INTEGER NOT NULL DEFAULT 0;
ALTER TABLE update_in_progress ADD COLUMN result TEXT NOT NULL DEFAULT '';
ALTER TABLE update_in_progress ADD COLUMN inconsistent INTEGER NOT NULL DEFAULT 0;
ALTER TABLE update_in_progress ADD COLUMN reboot TEXT NOT NULL DEFAULT 'Automatic';
ALTER TABLE update_in_progress ADD COLUMN reverts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE update_in_progress ADD COLUMN deployment TEXT NOT NULL DEFAULT '';
ALTER TABLE outcome ADD COLUMN deployment TEXT NOT NULL DEFAULT '';
ALTER TABLE outcome ADD COLUMN reported INTEGER NOT NULL DEFAULT 0;
"""
_BLOCK_BYTES = 4096
_COLUMNS_1 = "artifact_name, previous_name, source, target, state, boot_id, cause, provides, clears"
_COLUMNS_2 = f"{_COLUMNS_1}, kind, part, steps, result, inconsistent, reboot, reverts, deployment"
_KEEP_OUTCOMES = 100
# SQLITE_CORRUPT and SQLITE_NOTADB (sqlite.org/rescode.html); and SQLITE_ERROR, _CONSTRAINT and
# _MISMATCH, which no statement here has caused in tables of a schema that is known: then the
# schema's own text is damaged ("no such column").
_DAMAGED = (11, 26, 1, 19, 20)
# SQLITE_IOERR_READ, _SHORT_READ and _CORRUPTFS, which is what SQLite's own VFS makes of EIO
# (unixRead in os_unix.c); and _WRITE: a store is opened by reading, and where an unfinished
# transaction is undone, by writing parts of blocks, which are read first.
_UNREAD = (10 | 1 << 8, 10 | 2 << 8, 10 | 33 << 8)
_UNREADABLE = (*_UNREAD, 10 | 3 << 8)


def _is_damage(error: sqlite3.DatabaseError | ValueError) -> bool:
    """Whether what the store holds can't be what was put there: pages, or a value in them.

    SQLite has no checksums, so one wrong bit in a text is seen only by who reads it: as JSON, as
    the name of a state, as UTF-8 (which `sqlite3` says by an error of its own, without a code).
    """
    if isinstance(error, ValueError):
        return not isinstance(error, UnicodeEncodeError)  # that is what was to be written
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return isinstance(error, sqlite3.OperationalError) and "decode" in str(error)
    return code in _UNREAD or code & 0xFF in _DAMAGED


def database_path(data_dir: str) -> str:
    """Return where the store of `data_dir` is."""
    return f"{data_dir}/state.db"


class SystemFiles:
    """Where the database's files are: the device's own file system."""

    def connect(self, path: str) -> sqlite3.Connection:
        """Open the database, making it if there is none."""
        return sqlite3.connect(
            path, timeout=_LOCK_TIMEOUT_S, isolation_level=None, cached_statements=16
        )

    def exists(self, path: str) -> bool:
        """Say whether there is such a file."""
        return os.path.exists(path)  # noqa: PTH110

    def set_aside(self, path: str, to: str) -> None:
        """Rename a database to `to`, and remove what SQLite keeps beside it."""
        os.replace(path, to)  # noqa: PTH105 - boot path
        for suffix in ("-journal", "-wal", "-shm"):
            try:
                os.unlink(path + suffix)  # noqa: PTH108 - boot path
            except FileNotFoundError:
                continue

    def mend(self, path: str) -> int:
        """Overwrite every block of a file that can't be read with zeroes, durably."""
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(handle).st_size
            mended = 0
            for offset in range(0, size, _BLOCK_BYTES):
                try:
                    os.pread(handle, _BLOCK_BYTES, offset)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    # A part of a block would be read first.
                    os.pwrite(handle, bytes(_BLOCK_BYTES), offset)
                    mended += 1
            if mended:
                os.ftruncate(handle, size)
                os.fsync(handle)
            return mended
        finally:
            os.close(handle)


class SqliteStore:
    """The store at `path`; opened, and created if needed, at the first use."""

    def __init__(self, path: str, files: DatabaseFiles | None = None) -> None:
        self._path = path
        self._files = files or SystemFiles()
        self._connection: sqlite3.Connection | None = None
        self._version = _SCHEMA_VERSION
        self.set_aside: str | None = None

    def close(self) -> None:
        """Close the database if it was opened."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def update(self) -> Update | None:
        """Return the update in progress."""
        if not self._exists():
            return None

        def read(connection: sqlite3.Connection) -> Update | None:
            columns = _COLUMNS_1 if self._version == 1 else _COLUMNS_2
            row = connection.execute(f"SELECT {columns} FROM update_in_progress").fetchone()  # noqa: S608
            if row is None:
                return None
            import json  # noqa: PLC0415 - not at a boot with nothing to do

            clears = json.loads(row[8])
            update = Update(
                artifact_name=row[0],
                previous_name=row[1],
                source=row[2],
                target=row[3],
                state=State(row[4]),
                boot_id=row[5],
                cause=row[6],
                provides=json.loads(row[7]),
                clears=None if clears is None else tuple(clears),
            )
            if len(row) == 9:
                return update
            return update._replace(
                kind=row[9],
                part=Part(row[10]),
                steps=row[11],
                result=Result(row[12]) if row[12] else None,
                inconsistent=bool(row[13]),
                reboot=row[14],
                reverts=bool(row[15]),
                deployment=row[16],
            )

        return self._transaction(read)

    def save(self, update: Update) -> None:
        """Remember `update` as the one in progress."""
        import json  # noqa: PLC0415

        values: tuple[str | int, ...] = (
            *update[:4],
            update.state.value,
            update.boot_id,
            update.cause,
            json.dumps(update.provides),
            json.dumps(update.clears),
            update.kind,
            update.part.value,
            update.steps,
            update.result.value if update.result else "",
            int(update.inconsistent),
            update.reboot,
            int(update.reverts),
            update.deployment,
        )

        def write(connection: sqlite3.Connection) -> None:
            columns, row = _COLUMNS_2, values
            if self._version == 1:
                columns, row = _COLUMNS_1, values[:9]
            marks = ",".join("?" * len(row))
            connection.execute(
                f"INSERT OR REPLACE INTO update_in_progress (id, {columns})"  # noqa: S608
                f" VALUES (1,{marks})",
                row,
            )

        self._transaction(write, "IMMEDIATE")

    def finish(self, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
        """Forget the update, record its outcome and, if given, the new provides."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM update_in_progress")
            if self._version == 1:
                self._migrate(connection)
            connection.execute(
                "INSERT INTO outcome"
                " (result, artifact_name, slot, cause, finished_at, deployment, reported)"
                " VALUES (?,?,?,?,?,?,?)",
                (
                    outcome.result.value,
                    *outcome[1:6],
                    int(outcome.again or not outcome.deployment),
                ),
            )
            connection.execute(
                "DELETE FROM outcome WHERE number <= (SELECT max(number) FROM outcome) - ?",
                (_KEEP_OUTCOMES,),
            )
            if provides is not None:
                connection.execute("DELETE FROM provides")
                connection.executemany("INSERT INTO provides VALUES (?,?)", provides.items())

        self._transaction(write, "IMMEDIATE")

    def provides(self) -> dict[str, str] | None:
        """Return what the committed system provides; None before the first commit."""
        if not self._exists():
            return None
        rows = self._transaction(
            lambda connection: connection.execute(
                "SELECT key, value FROM provides ORDER BY key"
            ).fetchall()
        )
        return dict(rows) or None

    def last_outcome(self) -> Outcome | None:
        """Return how the last update ended."""
        outcomes = self._outcomes("1=1 ORDER BY number DESC LIMIT 1")
        return outcomes[0] if outcomes else None

    def unreported(self) -> list[Outcome]:
        """Return the outcomes of deployments that the server does not know yet, oldest first."""
        return self._outcomes("reported=0 AND deployment<>'' ORDER BY number")

    def attempts(self, deployment: str) -> int:
        """Return how often this deployment has ended before."""
        if not self._exists():
            return 0
        if self._version == 1:
            return 0
        return self._transaction(
            lambda connection: int(
                connection.execute(
                    "SELECT count(*) FROM outcome WHERE deployment=?", (deployment,)
                ).fetchone()[0]
            )
        )

    def mark_reported(self, outcome: Outcome) -> None:
        """Note that the server knows this outcome."""
        self._transaction(
            lambda connection: connection.execute(
                "UPDATE outcome SET reported=1 WHERE number=?", (outcome.number,)
            ),
            "IMMEDIATE",
        )

    def _outcomes(self, which: str) -> list[Outcome]:
        if not self._exists():
            return []

        def read(connection: sqlite3.Connection) -> list[Outcome]:
            old = self._version == 1
            if old and "reported" in which:
                return []
            deployment = "''" if old else "deployment"
            rows = connection.execute(
                "SELECT result, artifact_name, slot, cause, finished_at,"  # noqa: S608
                f" {deployment}, number FROM outcome WHERE {which}"
            ).fetchall()
            return [Outcome(Result(row[0]), *row[1:]) for row in rows]

        return self._transaction(read)

    def _exists(self) -> bool:
        return self._connection is not None or self._files.exists(self._path)

    def _transaction(self, work: Callable[[sqlite3.Connection], _T], kind: str = "DEFERRED") -> _T:
        try:
            try:
                return self._attempt(work, kind)
            except (sqlite3.DatabaseError, ValueError) as error:
                if not _is_damage(error):
                    raise
                # The damage lay behind what opening had looked at.
                self.close()
                if not self._mend(error):
                    self._set_aside()
                return self._attempt(work, kind)
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StoreError(f"{self._path}: {error}") from error

    def _attempt(self, work: Callable[[sqlite3.Connection], _T], kind: str) -> _T:
        connection = self._connect()
        connection.execute(f"BEGIN {kind}")
        try:
            result = work(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return result

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._open()
            except sqlite3.DatabaseError as error:
                # "Not a database", "malformed", or a sector that a power cut left unreadable. Any
                # other OperationalError is a full disk, the lock, or a write that failed.
                unreadable = getattr(error, "sqlite_errorcode", 0) in _UNREADABLE
                if isinstance(error, sqlite3.OperationalError) and not unreadable:
                    raise
                if not self._mend(error):
                    self._set_aside()
                self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        connection = self._files.connect(self._path)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path}: written by a newer client (schema {version}, this one knows"
                    f" {_SCHEMA_VERSION}); it is left as it is"
                )
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=EXTRA")
            self._version = version or 1
            if version == 0:
                connection.executescript(
                    f"BEGIN IMMEDIATE;{_SCHEMA_1}{_FROM_1_TO_2}"
                    f"PRAGMA user_version={_SCHEMA_VERSION};COMMIT;"
                )
                self._version = _SCHEMA_VERSION
            elif version == 1:
                self._migrate_unless_in_progress(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate_unless_in_progress(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("SELECT count(*) FROM update_in_progress").fetchone() == (0,):
            self._migrate(connection)
        connection.execute("COMMIT")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        """Bring the tables from schema 1 to 2, inside the caller's transaction."""
        for statement in _FROM_1_TO_2.split(";"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
        self._version = _SCHEMA_VERSION

    def _mend(self, error: sqlite3.DatabaseError | ValueError) -> bool:
        """Undo what a cut in a transaction made unreadable; say whether the store is whole.

        It is, too, where a request to the medium failed once and succeeds now. Without a journal
        there was no transaction: then what can't be read is lost.
        """
        mended = 0
        try:
            journal = f"{self._path}-journal"
            if self._files.exists(journal):
                mended = self._files.mend(journal) + self._files.mend(self._path)
            # A journal that can't be read makes SQLite say "malformed", too.
            if not mended and getattr(error, "sqlite_errorcode", 0) not in _UNREADABLE:
                return False
            connection = self._open()
        except (sqlite3.DatabaseError, OSError):
            return False
        try:
            return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        except sqlite3.DatabaseError:
            return False
        finally:
            connection.close()

    def _set_aside(self) -> None:
        self.set_aside = f"{self._path}.corrupt"
        self._files.set_aside(self._path, self.set_aside)
