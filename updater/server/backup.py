"""Backup and restore of the embedded default: one tar with the database and every artifact.

The database is copied by SQLite's online backup (sqlite.org, "Backup API"): a consistent moment,
while the server runs. Artifacts are copied after it, so each one that the copy names is there or
was deleted meanwhile, which is said. Keys and settings are in the tar too: keep it as secret as
the server's folder. A PostgreSQL installation is backed up by its own tools (pg_dump) and a copy
of the artifacts.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from updater.server.database import Database
from updater.server.errors import ServerError
from updater.server.settings import SETTINGS_NAME, Settings

_DATABASE = "server.db"
_OWN_FILES = (
    SETTINGS_NAME, "ca.pem", "ca.key", "server.pem", "server.key", "secret.key", "s3.key", "s3.pem",
)  # fmt: skip


def back_up(settings: Settings, output: Path, say: Callable[[str], None]) -> None:
    """Write everything to `output`, which appears only when it is whole and synced."""
    source = _embedded(settings)
    folder = settings.path.parent
    if output.exists():
        raise ServerError(f"{output} exists; choose another name")
    part = output.with_name(f".{output.name}.part")
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".backup.") as name:
            copy = Path(name) / _DATABASE
            _copy_database(source, copy)
            # A bucket is copied by its own tools.
            wanted = [] if settings.bucket else _artifact_files(copy)
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
                tar.add(copy, _DATABASE)
                for own in (*_OWN_FILES, *(path.name for path in folder.glob("artifact-key-*"))):
                    if (folder / own).is_file():
                        tar.add(folder / own, own)
                for number, path in enumerate(settings.artifacts / item for item in wanted):
                    try:
                        tar.add(path, f"artifacts/{path.name}")
                    except FileNotFoundError:
                        say(f"{path.name} was deleted meanwhile and is left out")
                    if number % 100 == 99:
                        say(f"{number + 1} of {len(wanted)} artifacts")
                tar.close()
                file.flush()
                os.fsync(file.fileno())
        part.rename(output)
        _sync(output.parent)
    except OSError as error:
        raise ServerError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    say(f"{output}: the database and {len(wanted)} artifacts")
    if settings.bucket:
        say(f"the artifacts stay in s3://{settings.bucket.name}/{settings.bucket.prefix}")


def restore(backup: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Unpack `backup` into `folder`, which must not exist or be empty; check it; all or nothing."""
    if folder.exists() and any(folder.iterdir()):
        raise ServerError(f"{folder} is not empty; restore into a new folder")
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        raise ServerError(f"{part} is left from a restore that was cut off; remove it first")
    try:
        part.mkdir(mode=0o700, parents=True)
        with tarfile.open(backup) as tar:
            _extract(tar, part)
        for path in (part / name for name in _OWN_FILES):
            if path.exists():
                path.chmod(0o600)
        (part / "artifacts").mkdir(exist_ok=True)
        database = part / _DATABASE
        with sqlite3.connect(database) as connection:
            (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        if verdict != "ok":
            raise ServerError(f"{backup}: its database is damaged: {verdict}")
        settings = tomllib.loads((part / SETTINGS_NAME).read_text())
        in_bucket = str(settings.get("artifacts", "")).startswith("s3:")
        missing = [
            name
            for name in ([] if in_bucket else _artifact_files(database))
            if not (part / "artifacts" / name).is_file()
        ]
        for path in part.rglob("*"):
            if path.is_file():
                _sync(path)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        _sync(folder.parent)
    except (OSError, ValueError, tarfile.TarError, sqlite3.Error) as error:
        raise ServerError(f"{backup}: cannot be restored: {error}") from error
    for name in missing:
        say(f"{name} is not in the backup: it was deleted while that was made")
    say(f"{folder} is restored; start it with: updater server run {folder}")


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Unpack plain files only, below `folder` only.

    As PEP 706's filter `data` would, which Python 3.11 has only from 3.11.4 on.
    """
    for member in tar:
        name = PurePosixPath(member.name)
        source = tar.extractfile(member) if member.isreg() else None
        if source is None or name.is_absolute() or ".." in name.parts:
            raise tarfile.TarError(f"{member.name!r} is no plain file below the backup's folder")
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with source, place.open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _embedded(settings: Settings) -> Path:
    database = Database(settings.database_url)
    name = database.url.database
    embedded = database.embedded
    database.close()
    if not embedded or name is None:
        raise ServerError("this server uses PostgreSQL: back it up with pg_dump")
    return Path(name)


def _copy_database(source: Path, copy: Path) -> None:
    try:
        with sqlite3.connect(source) as original, sqlite3.connect(copy) as target:
            original.backup(target)
    except sqlite3.Error as error:
        raise ServerError(f"{source}: cannot be copied: {error}") from error


def _artifact_files(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        return [name for (name,) in connection.execute("SELECT file FROM artifact ORDER BY file")]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
