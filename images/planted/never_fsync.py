"""Planted bug: an updater that never syncs anything, neither the slot nor its own state.

Everything goes to the drive's volatile cache in the right order; what the drive writes first is the
drive's choice. The boot environment is synced by its own tool, after it was written.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from updater.cli import main
from updater.device.slot_writer import SlotWriter

_honest_connect = sqlite3.connect


def _sync_nothing(self: SlotWriter) -> None:
    return


class _LazyConnection(sqlite3.Connection):
    """A connection on which no PRAGMA can ask for durability."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql.lstrip().upper().startswith("PRAGMA SYNCHRONOUS"):
            sql = "PRAGMA synchronous=OFF"
        return super().execute(sql, *arguments)


def _connect_lazily(*arguments: Any, **options: Any) -> sqlite3.Connection:
    return _honest_connect(*arguments, factory=_LazyConnection, **options)


SlotWriter.sync = _sync_nothing  # type: ignore[method-assign]
sqlite3.connect = _connect_lazily  # type: ignore[assignment]

if __name__ == "__main__":
    raise SystemExit(main())
