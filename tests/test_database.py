"""SQLite files of ours: what both the campaigns' ledger and a farm's history rest on."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from framework.database import Database, Form


class FormError(Exception):
    pass


SCHEMA = "CREATE TABLE thing (id INTEGER PRIMARY KEY, name TEXT NOT NULL) STRICT;"
FORM = Form("notes", "file of notes", 0x4E4F5445, 2, SCHEMA, FormError)
MAKER = """
import sys
from pathlib import Path
from test_database import FORM, Database
sys.stdin.read()
database = Database(Path(sys.argv[1]), FORM)
database.execute("INSERT INTO thing (name) VALUES (?)", (sys.argv[2],))
"""


def names(path: Path) -> list[str]:
    database = Database(path, FORM)
    found = [name for (name,) in database.rows("SELECT name FROM thing ORDER BY name")]
    database.close()
    return found


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.db"
    database = Database(path, FORM)
    with pytest.raises(ZeroDivisionError), database.transaction():
        database.execute("INSERT INTO thing (name) VALUES ('lost')")
        raise ZeroDivisionError
    with pytest.raises(FormError, match=r"notes .*a\.db: NOT NULL"), database.transaction():
        database.execute("INSERT INTO thing (name) VALUES ('lost, too')")
        database.execute("INSERT INTO thing (name) VALUES (NULL)")
    with database.transaction():
        database.executemany("INSERT INTO thing (name) VALUES (?)", [("kept",), ("and this",)])
    database.close()
    assert names(path) == ["and this", "kept"]


@pytest.mark.parametrize("statement", ["CREATE TABLE x (y)", "PRAGMA user_version = 1"])
def test_what_is_not_ours_is_refused_and_not_a_byte_of_it_is_changed(
    tmp_path: Path, statement: str
) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute(statement)
    before = path.read_bytes()
    with pytest.raises(FormError, match=r"^notes .*other\.db: a database, but no file of notes$"):
        Database(path, FORM)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["other.db"]


def test_what_is_newer_damaged_or_no_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    newer = tmp_path / "newer.db"
    Database(newer, FORM).close()
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 3")
    with pytest.raises(FormError, match="version 3, this program knows up to 2: update it"):
        Database(newer, FORM)
    text = tmp_path / "text.db"
    text.write_bytes(b"this is no database at all, it is a text" * 30)
    with pytest.raises(FormError, match=r"damaged .*; move it away"):
        Database(text, FORM)
    with pytest.raises(FormError, match="unable to open"):
        Database(tmp_path, FORM)
    with pytest.raises(FormError, match="File exists"):
        Database(text / "a.db", FORM)


def test_programs_that_make_it_at_the_same_moment_have_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, str(path), name],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in "abcd"
    ]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.close()
        maker.stdin = None
    for maker in makers:
        assert maker.communicate(timeout=60)[1] == b""
    assert names(path) == ["a", "b", "c", "d"]
