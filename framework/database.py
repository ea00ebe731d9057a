"""SQLite files of ours: made, recognised, and refused with one line where they can't be used.

A file says in its `application_id` what it is, and in `user_version` which version of it. Another
program's database, or a newer version, is refused before a byte of it is changed. What is written
is synced (WAL with `synchronous = FULL`): whatever ends the machine loses no finished transaction.

Campaigns, farms and boards keep such files; this imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import datetime
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from attrs import frozen

__all__ = ["Database", "Form", "utc_now"]

_BUSY_S: Final = 20.0


@frozen
class Form:
    """A kind of file.

    Attributes:
        name: what it is called before its path in every message, such as `ledger`.
        what: what it is, such as `ledger of campaigns`.
        application: its `application_id`.
        version: the newest version that this program knows.
        schema: the statements that make an empty one.
        error: what is raised where it can't be used, with one line as its message.
    """

    name: str
    what: str
    application: int
    version: int
    schema: str
    error: type[Exception]


def utc_now() -> str:
    """Now, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Database:
    """An open file; it is made if it is missing, with its folder. A context manager.

    Each kind of file is a subclass, which knows its tables.

    Raises:
        form.error: also from every method: it is damaged, newer than this program, another
            program's, full, or can't be read or written.
    """

    def __init__(self, path: Path, form: Form) -> None:
        self.path = path
        self.form = form
        with self.told():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _open(self) -> None:
        form = self.form
        with self.transaction("DEFERRED"):  # all three of one moment: another may be making it
            application = self._number("PRAGMA application_id")
            version = self._number("PRAGMA user_version")
            tables = self._number("SELECT count(*) FROM sqlite_schema")
        if application != form.application and (tables or version):
            raise self._refused(f"a database, but no {form.what}")
        if version > form.version:
            raise self._refused(
                f"version {version}, this program knows up to {form.version}: update it"
            )
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if not tables:
            with self.transaction():
                if not self._number("SELECT count(*) FROM sqlite_schema"):
                    self._make()
        elif self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise self._refused("damaged; move it away, or restore a copy")

    def _make(self) -> None:
        for statement in self.form.schema.split(";"):  # `executescript` would commit
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {self.form.application}")
        self._connection.execute(f"PRAGMA user_version = {self.form.version}")

    def _number(self, query: str) -> int:
        return int(self._connection.execute(query).fetchone()[0])

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._connection.close()

    def execute(self, statement: str, given: Iterable[object] = ()) -> sqlite3.Cursor:
        """Execute a statement; outside a `transaction` it is one of its own."""
        with self.told():
            return self._connection.execute(statement, tuple(given))

    def executemany(self, statement: str, given: Iterable[tuple[object, ...]]) -> None:
        """Execute a statement once for each tuple of values."""
        with self.told():
            self._connection.executemany(statement, given)

    def rows(self, query: str, given: Iterable[object] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.told():
            return self._connection.execute(query, tuple(given)).fetchall()

    @contextlib.contextmanager
    def transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """All of it or, where it raises, nothing."""
        with self.told():
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turn what goes wrong, also with a row's values, into one line that says what to do."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "full" in text:
                text = "the disk is full; free some space, the same command goes on"
            elif "not a database" in text or "malformed" in text:
                text = f"damaged ({text}); move it away, or restore a copy"
            raise self._refused(text) from error
        except (ValueError, TypeError, KeyError) as error:
            raise self._refused(f"damaged: {error!r:.120}") from error
        except OSError as error:
            raise self._refused(str(error.strerror)) from error

    def _refused(self, text: str) -> Exception:
        return self.form.error(f"{self.form.name} {self.path}: {text}")
