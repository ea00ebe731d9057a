"""What a data partition is to the system that starts on it: its files, as their readers see them.

Thousands of crash states differ in a data partition's bytes, and few of them in what a system finds
there. A *view* is the identity of what it finds: names and contents of all files, a database as
what it says after its own recovery, and nothing at all for files that no start reads. Numbers that
only tell the time and identifiers that are drawn at random are masked, so that views of two runs
can be compared. Which file is what is the updater's to say (`Kinds`); nothing here knows one.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sqlite3
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from framework.disk.files import LostFile

Kinds = Mapping[str, str]
"""By path: `sqlite` for a database, `ignored` for what no start depends on; else plain content."""

Files = Mapping[str, bytes | None]
"""By path: the content; None for what is there and can't be read."""

Lost = Mapping[str, LostFile]
"""By path: of a file that can't be read, what is left."""

DATABASE: Final = "sqlite"
IGNORED: Final = "ignored"
_BESIDE: Final = ("-journal", "-wal", "-shm")
_OF_THE_RUN: Final = re.compile(
    r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"  # RFC 4122, section 3
    r"|\b[12][0-9]{9}\b"  # seconds since 1970, from 2001 to 2065
)


def view_of(files: Files, kinds: Kinds, lost: Lost | None = None) -> str:
    """The view of these files: equal texts, equal to a system that starts."""
    lost = {} if lost is None else lost
    told: list[str] = []
    beside = {p + end for p, kind in kinds.items() if kind == DATABASE for end in _BESIDE}
    for path, content in sorted(files.items()):
        kind = kinds.get(path)
        if kind == IGNORED or path in beside:
            continue
        blocks, rest = lost.get(path, ((), content))
        if kind == DATABASE and rest is not None:
            seen = _database(rest, files.get(path + "-journal"), files.get(path + "-wal"))
        else:
            seen = _digest(rest)
        if content is None:
            seen += f" without {blocks}"
        if kind == DATABASE:
            for end in _BESIDE:
                if files.get(path + end, b"") is None:
                    blocks, rest = lost.get(path + end, ((), None))
                    seen += f" {end} {_digest(rest)} without {blocks}"
        told.append(f"{path}={seen}")
    return _digest("\n".join(told).encode(errors="surrogateescape"))


def _digest(content: bytes | None) -> str:
    return "?" if content is None else hashlib.sha256(content).hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def _database(content: bytes, journal: bytes | None, wal: bytes | None) -> str:
    """What a database says once it is opened, and whether a transaction was undone for that."""
    with tempfile.TemporaryDirectory(prefix="brownout-view-") as folder:
        path = Path(folder) / "database"
        path.write_bytes(content)
        beside = Path(f"{path}-journal")
        if journal is not None:
            beside.write_bytes(journal)
        if wal is not None:
            Path(f"{path}-wal").write_bytes(wal)
        try:
            connection = sqlite3.connect(path)
            try:
                said = "\n".join(connection.iterdump())
            finally:
                connection.close()
        except (sqlite3.Error, UnicodeError) as error:
            return f"{type(error).__name__} {error}: {_digest(content)}"
        kept = beside.exists()
    undone = "" if journal is None else " journal kept" if kept else " journal undone"
    return _digest(_OF_THE_RUN.sub("*", said).encode()) + undone
