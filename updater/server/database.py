"""The database: reads, durable writes, migrations. SQLite embedded, PostgreSQL by URL.

What is acknowledged is durable: SQLite runs in WAL mode with `synchronous=FULL`, so a commit
returns after its fsync (sqlite.org, "WAL" and "PRAGMA synchronous"). Since a disk syncs far less
often than devices report, SQLite's writes go through one thread that takes all waiting jobs into
one transaction, each inside a savepoint of its own, and acknowledges them together after the
commit: a job that fails undoes only itself. PostgreSQL groups commits by itself; there each job
is a transaction in a bounded thread pool, tried again when the database asks for it.

A job is a plain function of a Session that returns plain values: it may run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, make_url
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from updater.server.errors import RefusedError, ServerError

T = TypeVar("T")
Job = Callable[[Session], T]

_BUSY_TIMEOUT_MS = 10_000
_GROUP = 256
_WAITING = 20_000
_POOL = 16
_TRIES = 5
# PostgreSQL: serialization_failure, deadlock_detected.
_TRY_AGAIN = frozenset({"40001", "40P01"})
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """An open database. `close()` ends the writer after what was accepted is on disk."""

    def __init__(self, url: str) -> None:
        try:
            self.url = make_url(url)
        except SQLAlchemyError as error:
            raise ServerError("database_url: not a database URL") from error
        backend = self.url.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ServerError(f"database_url: {backend!r} is neither sqlite nor postgresql")
        self.embedded = backend == "sqlite"
        if self.embedded:
            self.engine = _sqlite_engine(url, "BEGIN IMMEDIATE", read_only=False)
            self._readers = _sqlite_engine(url, "BEGIN", read_only=True)
            self._writer: _GroupWriter | None = _GroupWriter(self.engine)
        else:
            self.engine = create_engine(
                self.url.set(drivername="postgresql+psycopg"),
                pool_size=_POOL,
                max_overflow=0,
                pool_timeout=10,
                pool_pre_ping=True,
                connect_args={"connect_timeout": 5, "options": "-c statement_timeout=30000"},
            )
            self._readers = self.engine
            self._writer = None
        self._threads = ThreadPoolExecutor(_POOL, thread_name_prefix="database")

    async def read(self, job: Job[T]) -> T:
        """Run a reading job away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, _in_session, self._readers, job
        )

    async def look_up(self, job: Job[T]) -> T:
        """Run a job that is a few index look-ups.

        On SQLite it runs on the event loop: with WAL a reader never waits for a writer, and a
        thread switch costs more than the look-up.
        """
        if self.embedded:
            return _in_session(self._readers, job)
        return await self.read(job)

    async def write(self, job: Job[T]) -> T:
        """Run a writing job; returns when its changes are durable."""
        if self._writer is not None:
            return await asyncio.wrap_future(self._writer.submit(job))
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.write_now, job)

    def write_now(self, job: Job[T]) -> T:
        """Run a writing job in this thread; for commands and background threads."""
        for attempt in range(_TRIES):
            try:
                with Session(self.engine, expire_on_commit=False) as session, session.begin():
                    return job(session)
            except DBAPIError as error:
                code = getattr(error.orig, "sqlstate", None)
                if code not in _TRY_AGAIN or attempt == _TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    def read_now(self, job: Job[T]) -> T:
        """Run a reading job in this thread."""
        return _in_session(self._readers, job)

    def close(self) -> None:
        """Finish accepted writes, then close every connection."""
        if self._writer is not None:
            self._writer.close()
        self._threads.shutdown(wait=True, cancel_futures=False)
        self._readers.dispose()
        self.engine.dispose()

    def migrate(self) -> None:
        """Bring the schema to this version's. Raises ServerError."""
        try:
            with self.engine.connect() as connection:
                config = AlembicConfig()
                config.set_main_option("script_location", str(MIGRATIONS))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
        except SQLAlchemyError as error:
            raise ServerError(f"the database cannot be migrated: {one_line(error)}") from error

    def check_schema(self) -> None:
        """Refuse a database of another version of this server. Raises ServerError."""
        script = AlembicConfig()
        script.set_main_option("script_location", str(MIGRATIONS))
        head = ScriptDirectory.from_config(script).get_current_head()
        try:
            with self._readers.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
        except SQLAlchemyError as error:
            raise ServerError(f"the database does not answer: {one_line(error)}") from error
        if found != head:
            raise ServerError(
                f"the database has schema {found or 'none'}, this server needs {head}: "
                "run `updater server migrate`"
            )


def _in_session(engine: Engine, job: Job[T]) -> T:
    with Session(engine, expire_on_commit=False, autoflush=False) as session:
        return job(session)


def _sqlite_engine(url: str, begin: str, *, read_only: bool) -> Engine:
    engine = create_engine(
        url,
        pool_size=_POOL if read_only else 2,
        max_overflow=4,
        connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _: Any) -> None:
        # Transactions are ours: the driver's own BEGIN comes too late and is deferred.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        if read_only:
            connection.execute("PRAGMA query_only=ON")

    @event.listens_for(engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


class _GroupWriter:
    """One thread that commits all waiting jobs together, each in its own savepoint."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.Queue[tuple[Job[Any], Future[Any]] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="database-writer", daemon=True)
        self._thread.start()
        self._closed = False

    def submit(self, job: Job[T]) -> Future[T]:
        """Queue a job. Raises RefusedError when too many wait already."""
        future: Future[T] = Future()
        if self._closed:
            raise RefusedError(503, "the server is stopping", retry_after_s=5)
        try:
            self._jobs.put_nowait((job, future))
        except queue.Full:
            raise RefusedError(503, "too many changes wait for the disk", retry_after_s=5) from None
        return future

    def close(self) -> None:
        """Commit what was queued, then end."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch = [first]
            ending = False
            while len(batch) < _GROUP and not ending:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    ending = True
                else:
                    batch.append(more)
            self._commit(batch)
            if ending:
                return

    def _commit(self, batch: list[tuple[Job[Any], Future[Any]]]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                for job, future in batch:
                    try:
                        with session.begin_nested():
                            result = job(session)
                    except OperationalError:
                        # The disk or the file, not the job: nothing of this batch is safe.
                        raise
                    except Exception as error:  # noqa: BLE001 - handed to whoever waits for it
                        future.set_exception(error)
                    else:
                        done.append((future, result))
        except BaseException as error:  # noqa: BLE001 - nobody may wait for ever
            cause = _first_failure(error)
            for _, future in batch:
                if not future.done():
                    future.set_exception(cause)
            return
        for future, result in done:
            with contextlib.suppress(Exception):
                future.set_result(result)


def _first_failure(error: BaseException) -> BaseException:
    """Return what began it.

    A full disk makes SQLite roll the whole transaction back, and what comes up then is that the
    savepoint is gone.
    """
    found = error
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, DBAPIError):
            found = error
    return found


def one_line(error: BaseException) -> str:
    """Return the database's own words without SQLAlchemy's wrapping."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return " ".join(str(cause).split())[:300]
