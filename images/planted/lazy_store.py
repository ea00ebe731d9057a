"""Planted bug: an updater whose state store is never synced, though the slot and the switch are.

What it remembers of the update under way is in the page cache when the slots are switched. After a
cut the new system starts on trial, knows of no update, and gives itself up.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from updater.cli import main

_honest_connect = sqlite3.connect


class _LazyConnection(sqlite3.Connection):
    """A connection on which no PRAGMA can ask for durability."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql.lstrip().upper().startswith("PRAGMA SYNCHRONOUS"):
            sql = "PRAGMA synchronous=OFF"
        return super().execute(sql, *arguments)


def _connect_lazily(*arguments: Any, **options: Any) -> sqlite3.Connection:
    return _honest_connect(*arguments, factory=_LazyConnection, **options)


sqlite3.connect = _connect_lazily  # type: ignore[assignment]

if __name__ == "__main__":
    raise SystemExit(main())
