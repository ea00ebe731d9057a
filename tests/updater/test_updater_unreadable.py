"""A power cut leaves a block of the state store unreadable: the real SQLite on such a medium."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from updater.device.model import State, Update
from updater.device.store import SqliteStore

BEFORE = Update("v2", "v1", "a", "b", State.INSTALL, "boot", cause="")
AFTER = BEFORE._replace(state=State.REBOOT, cause="x" * 9000)
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")

SAVE = """
from updater.device.store import SqliteStore
from updater.device.model import State
store = SqliteStore({path!r})
update = store.update()
store.save(update._replace(state=State.REBOOT, cause="x" * 9000))
"""
READ = """
from updater.device.store import SqliteStore
store = SqliteStore({path!r})
update = store.update()
print(update and update.state.value, store.set_aside)
store.save(update or __import__("updater.device.model").device.model.Update(
    "v3", "v1", "a", "b", __import__("updater.device.model").device.model.State.DOWNLOAD, "boot"))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("medium") / "unreadable.so"
    source = Path(__file__).with_name("unreadable.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"],
        check=True,
    )
    return library


def on(medium: Path, program: str, path: Path, **faults: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program.format(path=str(path))],
        env={**os.environ, "LD_PRELOAD": str(medium), **faults},
        capture_output=True,
        text=True,
        check=False,
    )


def saved(path: Path) -> Path:
    store = SqliteStore(str(path))
    store.save(BEFORE)
    store.close()
    return path


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("suffix", ["", "-journal"])
def test_a_block_that_a_cut_in_a_transaction_left_unreadable_costs_nothing(
    tmp_path: Path, medium: Path, suffix: str, block: int
) -> None:
    path = saved(tmp_path / "state.db")
    assert on(medium, SAVE, path, DIE_IN=str(path)).returncode == 9
    journal, bad = tmp_path / "state.db-journal", tmp_path / f"state.db{suffix}"
    assert bad.stat().st_size > 4096 * block, "there is no such block"
    assert journal.exists()
    came = on(medium, READ, path, UNREADABLE=f"{bad.stat().st_ino} {block}")
    assert came.returncode == 0, came.stderr
    assert came.stdout.split() == ["ArtifactInstall", "None"]
    assert not journal.exists()


def test_a_block_that_no_journal_has_is_lost_and_the_store_set_aside(
    tmp_path: Path, medium: Path
) -> None:
    path = saved(tmp_path / "state.db")
    came = on(medium, READ, path, UNREADABLE=f"{path.stat().st_ino} 0")
    assert came.returncode == 0, came.stderr
    assert came.stdout.split() == ["None", f"{path}.corrupt"]
    assert on(medium, READ, path).stdout.split() == ["Download", "None"]
