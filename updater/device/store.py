"""The state store: SQLite on the data partition, every method one durable transaction.

Journal mode DELETE with synchronous=EXTRA: the rollback journal is synced before the database is
touched, and the directory after the journal's removal, so that a power cut leaves the old or the
new state and an acknowledged transaction stays (sqlite.org/pragma.html#pragma_synchronous; WAL
would keep two more files for no gain at ten transactions an update). A database from a newer
client is refused untouched. A corrupt one is set aside, because a device must not need a person
to update again.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from typing import TypeVar

from updater.device.errors import StoreError
from updater.device.model import Outcome, Result, State, Update

_SCHEMA_VERSION = 1
_LOCK_TIMEOUT_S = 10.0
_T = TypeVar("_T")

_SCHEMA = """
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
_KEEP_OUTCOMES = 100


def database_path(data_dir: str) -> str:
    """Return where the store of `data_dir` is."""
    return f"{data_dir}/state.db"


class SqliteStore:
    """The store at `path`; opened, and created if needed, at the first use."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
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
            row = connection.execute(
                "SELECT artifact_name, previous_name, source, target, state, boot_id, cause,"
                " provides, clears FROM update_in_progress"
            ).fetchone()
            if row is None:
                return None
            import json  # noqa: PLC0415 - not at a boot with nothing to do

            clears = json.loads(row[8])
            return Update(
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

        return self._transaction(read)

    def save(self, update: Update) -> None:
        """Remember `update` as the one in progress."""
        import json  # noqa: PLC0415

        row = (
            *update[:4],
            update.state.value,
            update.boot_id,
            update.cause,
            json.dumps(update.provides),
            json.dumps(update.clears),
        )
        self._transaction(
            lambda connection: connection.execute(
                "INSERT OR REPLACE INTO update_in_progress VALUES (1,?,?,?,?,?,?,?,?,?)", row
            ),
            "IMMEDIATE",
        )

    def finish(self, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
        """Forget the update, record its outcome and, if given, the new provides."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM update_in_progress")
            connection.execute(
                "INSERT INTO outcome (result, artifact_name, slot, cause, finished_at)"
                " VALUES (?,?,?,?,?)",
                (outcome.result.value, *outcome[1:]),
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
        if not self._exists():
            return None
        row = self._transaction(
            lambda connection: connection.execute(
                "SELECT result, artifact_name, slot, cause, finished_at FROM outcome"
                " ORDER BY number DESC LIMIT 1"
            ).fetchone()
        )
        return None if row is None else Outcome(Result(row[0]), *row[1:])

    def _exists(self) -> bool:
        return self._connection is not None or os.path.exists(self._path)  # noqa: PTH110

    def _transaction(self, work: Callable[[sqlite3.Connection], _T], kind: str = "DEFERRED") -> _T:
        try:
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
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StoreError(f"{self._path}: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = self._open()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                # "not a database", "malformed": OperationalError above is the disk or the lock.
                self._set_aside()
                self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_LOCK_TIMEOUT_S, isolation_level=None, cached_statements=16
        )
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=EXTRA")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise StoreError(
                    f"{self._path}: written by a newer client (schema {version}, this one knows"
                    f" {_SCHEMA_VERSION}); it is left as it is"
                )
            if version == 0:
                connection.executescript(
                    f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version={_SCHEMA_VERSION};COMMIT;"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self) -> None:
        self.set_aside = f"{self._path}.corrupt"
        os.replace(self._path, self.set_aside)  # noqa: PTH105 - boot path
        for suffix in ("-journal", "-wal", "-shm"):
            try:
                os.unlink(self._path + suffix)  # noqa: PTH108 - boot path
            except FileNotFoundError:
                continue
