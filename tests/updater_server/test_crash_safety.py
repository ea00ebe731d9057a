"""Nothing acknowledged is lost and nothing half-written shows, wherever a cut or a kill strikes.

Two ways. *Cuts at every operation*: the upload runs on a disk whose unsynced parts are lost at a
cut (data of files without fsync, renames without an fsync of their folder), cut before and after
each write, fsync, rename and commit in turn; planted bugs show that the check can fail. *Kills*: a
real server process gets SIGKILL in the middle of uploads and of devices' reports.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.orm import Session
from updater_server_world import DEVICE_TYPE, Clock, World, make_artifact

from updater.server import accounts, artifacts
from updater.server.artifacts import ArtifactStore, Stored
from updater.server.database import Database
from updater.server.models import Artifact, User
from updater.server.settings import load_settings
from updater.server.setup import initialise


class CutError(BaseException):
    """The power is gone."""


class Disk:
    """Counts the store's operations, cuts at one of them, and knows what was synced by then."""

    def __init__(self, folder: Path, cut_at: int, *, unsynced: str = "") -> None:
        self.folder = folder
        self.points = 0
        self.synced: set[int] = set()
        self.renamed: list[tuple[Path, Path]] = []
        self._cut_at = cut_at
        self._unsynced = unsynced
        self._dead = False

    def point(self) -> None:
        if self._dead:
            raise CutError
        self.points += 1
        if self.points == self._cut_at:
            self._dead = True
            raise CutError

    def fsync(self, handle: int) -> None:
        self.point()
        is_folder = Path(f"/proc/self/fd/{handle}").resolve().is_dir()
        if self._unsynced != ("folder" if is_folder else "file"):
            if is_folder:
                self.renamed.clear()
            else:
                self.synced.add(os.fstat(handle).st_ino)
        self.point()

    def rename(self, source: Path, target: Path) -> None:
        self.point()
        os.rename(source, target)  # noqa: PTH104 - Path.rename is what is replaced
        self.renamed.append((source, target))
        self.point()

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        self.point()
        with contextlib.suppress(FileNotFoundError) if missing_ok else contextlib.nullcontext():
            os.unlink(path)  # noqa: PTH108 - Path.unlink is what is replaced

    def lose_what_was_not_synced(self) -> None:
        for source, target in reversed(self.renamed):
            if target.exists():
                os.rename(target, source)  # noqa: PTH104
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)


Upload = Callable[[ArtifactStore, Database, Path, Disk], None]


def feed(path: Path, disk: Disk) -> Callable[[], bytes]:
    file = path.open("rb")

    def pull() -> bytes:
        disk.point()
        return file.read(40_000)

    return pull


def honest(store: ArtifactStore, database: Database, path: Path, disk: Disk) -> None:
    stored = store.receive(feed(path, disk), 1 << 30)
    database.write_now(lambda s: artifacts.publish(s, stored, "test", 0.0))


def publishes_first(store: ArtifactStore, database: Database, path: Path, disk: Disk) -> None:
    """Planted: the row is committed before the file has its place."""

    def at_rename(source: Path, target: Path) -> None:
        stored = Stored(target.stem, "v2", (DEVICE_TYPE,), 0, "", "t", False, False, {}, {})
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        stored = stored._replace(sha256=sha, size=path.stat().st_size)
        database.write_now(lambda s: artifacts.publish(s, stored, "test", 0.0))
        disk.rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", at_rename)
        store.receive(feed(path, disk), 1 << 30)


def upload_cut_at(
    folder: Path, artifact: Path, cut_at: int, upload: Upload, unsynced: str = ""
) -> tuple[Disk, str | None]:
    """Upload on a disk that is cut; return it, and what is wrong after the restart."""
    folder.mkdir()
    database = Database(f"sqlite:///{folder / 'server.db'}")
    database.migrate()
    store = ArtifactStore(folder / "artifacts")
    disk = Disk(folder / "artifacts", cut_at, unsynced=unsynced)
    acknowledged = False

    @event.listens_for(database.engine, "commit")
    def at_commit(_: Any) -> None:
        disk.point()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        patch.setattr(Path, "rename", lambda path, to: disk.rename(path, to))  # noqa: PLW0108
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: disk.unlink(path, missing_ok))
        with contextlib.suppress(CutError):
            upload(store, database, artifact, disk)
            acknowledged = True
    database.close()
    disk.lose_what_was_not_synced()

    after = Database(f"sqlite:///{folder / 'server.db'}")
    rows = after.read_now(lambda s: [(a.id, a.sha256) for a in s.scalars(select(Artifact))])
    after.close()
    if acknowledged and not rows:
        return disk, "acknowledged, but gone"
    for identifier, sha256 in rows:
        path = store.path(identifier)
        if not path.exists():
            return disk, "visible without its file"
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            return disk, "visible, but not whole"
    return disk, None


def cut_everywhere(
    folder: Path, artifact: Path, upload: Upload = honest, unsynced: str = ""
) -> dict[int, str]:
    """Cut at each operation in turn; return what was wrong at which."""
    whole, wrong = upload_cut_at(folder / "whole", artifact, 0, upload, unsynced)
    found = {} if wrong is None else {0: wrong}
    assert whole.points > 8
    for point in range(1, whole.points + 1):
        _, wrong = upload_cut_at(folder / str(point), artifact, point, upload, unsynced)
        if wrong is not None:
            found[point] = wrong
    return found


def test_an_upload_cut_at_any_operation_is_whole_or_absent(
    tmp_path: Path, artifact_v2: Path
) -> None:
    assert cut_everywhere(tmp_path, artifact_v2) == {}


@pytest.mark.parametrize(
    ("upload", "unsynced", "symptom"),
    [
        (publishes_first, "", "visible without its file"),
        (honest, "file", "visible, but not whole"),
        (honest, "folder", "visible without its file"),
    ],
    ids=["published before renamed", "file not synced", "folder not synced"],
)
def test_planted_bugs_in_the_upload_are_caught(
    tmp_path: Path, artifact_v2: Path, upload: Upload, unsynced: str, symptom: str
) -> None:
    assert symptom in cut_everywhere(tmp_path, artifact_v2, upload, unsynced).values()


def test_sqlite_syncs_every_commit(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'server.db'}")
    try:
        with database.engine.connect() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
            assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    finally:
        database.close()


def test_a_grouped_write_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    import asyncio

    database = Database(f"sqlite:///{tmp_path / 'server.db'}")
    database.migrate()

    def add(name: str) -> Callable[[Session], str]:
        return lambda s: accounts.create_user(s, name, "x", "viewer", "test", 0.0)

    async def all_at_once() -> list[Any]:
        names = ["a", "b", "a", "c", "b", "d"]
        return await asyncio.gather(
            *(database.write(add(name)) for name in names), return_exceptions=True
        )

    results = asyncio.run(all_at_once())
    assert [isinstance(r, Exception) for r in results] == [False, False, True, False, True, False]
    names = database.read_now(lambda s: sorted(s.scalars(select(User.name))))
    assert names == ["a", "b", "c", "d"]
    database.close()


class ServerProcess:
    """`updater server run` as a process that can be killed."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "updater.cli", "server", "run", str(folder)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read()[-2000:])
        self.url = f"https://localhost:{line.rsplit(':', 1)[1].strip()}"
        # The log is drained, or a full pipe would stop the server.
        self._drain = threading.Thread(target=self.process.stderr.read, daemon=True)  # type: ignore[union-attr]
        self._drain.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def server_process(folder: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(folder)
    try:
        yield server
    finally:
        server.kill()


def rounds_of_kills(tmp_path: Path, database_url: str, rounds: int) -> None:
    import random

    folder = tmp_path / "server"
    made = initialise(folder, ["localhost"], 0, "127.0.0.1", database_url=database_url)
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    files = [make_artifact(tmp_path, f"a{n}", 400_000, seed=n) for n in range(6)]
    database = Database(made.settings.database_url)
    admin = database.write_now(lambda s: accounts.require_user(s, "admin").id)
    token = database.write_now(
        lambda s: accounts.grant(s, admin, accounts.TOKEN, "t", time.time(), 1e6)
    )
    database.close()
    bearer = {"Authorization": f"Bearer {token}"}
    api = "/api/management/v1"
    chance = random.Random(8)
    uploaded: dict[str, bytes] = {}
    reports: dict[int, list[str]] = {n: [] for n in range(4)}
    deployment = ""

    with server_process(folder) as server:
        world = _world_for(folder, server, bearer)
        devices = [world.accepted(f"d{n}") for n in range(4)]
        assert world.upload(make_artifact(tmp_path, "v2", 20_000)).status_code == 201
        deployment = world.deploy("v2")
        for device in devices:
            assert device.next().status_code == 200
    names = iter(range(1000))
    statuses = ["downloading", "installing", "rebooting", "downloading", "installing"] * 200
    steps = {n: iter(statuses) for n in range(4)}

    for _ in range(rounds):
        with server_process(folder) as server:
            stop = threading.Event()

            def upload(url: str = server.url, stop: threading.Event = stop) -> None:
                with httpx.Client(base_url=url, verify=context, headers=bearer) as client:
                    while not stop.is_set():
                        file = files[next(names) % len(files)]
                        with contextlib.suppress(httpx.HTTPError):
                            content = file.read_bytes()
                            answer = client.post(f"{api}/artifacts", content=_pieces(content))
                            if answer.status_code == 201:
                                uploaded[answer.json()["id"]] = content
                            elif answer.status_code == 409:
                                stop.wait(0.02)

            def report(number: int, url: str = server.url, stop: threading.Event = stop) -> None:
                headers = dict(devices[number].client.headers)
                path = f"/api/devices/v1/deployments/device/deployments/{deployment}/status"
                with httpx.Client(base_url=url, verify=context, headers=headers) as client:
                    while not stop.is_set():
                        status = next(steps[number])
                        with contextlib.suppress(httpx.HTTPError):
                            answer = client.put(path, json={"status": status})
                            if answer.status_code == 204:
                                reports[number].append(status)

            threads = [threading.Thread(target=upload)]
            threads += [threading.Thread(target=report, args=(n,)) for n in range(4)]
            for thread in threads:
                thread.start()
            # Only once all of them are at work, then at any moment.
            before, end = {n: len(done) for n, done in reports.items()}, time.monotonic() + 60
            while any(len(reports[n]) == before[n] for n in reports):
                assert time.monotonic() < end
                stop.wait(0.02)
            stop.wait(chance.uniform(0.0, 1.0))
            server.kill()
            stop.set()
            for thread in threads:
                thread.join()

        with server_process(folder) as server:
            world = _world_for(folder, server, bearer)
            listed = {a["id"]: a for a in world.admin.get("/artifacts").json()}
            assert set(uploaded) <= set(listed), "an acknowledged upload is gone"
            for identifier, shown in listed.items():
                file = folder / "artifacts" / f"{identifier}.mender"
                assert hashlib.sha256(file.read_bytes()).hexdigest() == shown["sha256"]
            for number, device in enumerate(devices):
                history = world.admin.get(f"/devices/{device.id}").json()["history"]
                events = [e["status"] for e in history[0]["events"]]
                assert _is_subsequence(reports[number], events), "an acknowledged report is gone"
            # Free the names for the next round.
            for identifier, shown in listed.items():
                if shown["name"] != "v2":
                    assert world.admin.delete(f"/artifacts/{identifier}").status_code == 204
            uploaded.clear()


def _world_for(folder: Path, server: ServerProcess, bearer: dict[str, str]) -> World:
    world = World.__new__(World)
    world.folder, world.url, world.clock = folder, server.url, Clock()
    world.context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    world._clients = []
    world.admin = world.client(**bearer)
    world.admin.base_url = httpx.URL(f"{server.url}/api/management/v1")
    return world


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 32_768):
        yield content[start : start + 32_768]
        time.sleep(0.001)


def _is_subsequence(short: list[str], long: list[str]) -> bool:
    """Consecutive repeats count once: a repeated report changes nothing and is not stored."""
    changes = [s for i, s in enumerate(short) if i == 0 or short[i - 1] != s]
    rest = iter(long)
    return all(status in rest for status in changes)


@pytest.mark.slow
def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    rounds_of_kills(tmp_path, "", rounds=1)


@pytest.mark.server_night
def test_many_kills_lose_nothing(tmp_path: Path, own_database_url: str) -> None:
    rounds_of_kills(tmp_path, own_database_url, rounds=25)


def test_a_terminated_server_ends_cleanly_and_gives_the_lease_up(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    initialise(folder, ["localhost"], 0, "127.0.0.1")
    with server_process(folder) as server:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        assert httpx.get(f"{server.url}/health/ready", verify=context).status_code == 200
        assert server.terminate() == 0
    database = Database(load_settings(folder).database_url)
    until = database.read_now(lambda s: s.execute(text("SELECT until FROM lease")).scalar())
    assert until == 0
    database.close()


@pytest.mark.server_night
def test_two_workers_are_one_server(tmp_path: Path, own_database_url: str) -> None:
    folder = tmp_path / "server"
    made = initialise(folder, ["localhost"], 0, "127.0.0.1", database_url=own_database_url)
    database = Database(made.settings.database_url)
    admin = database.read_now(lambda s: accounts.require_user(s, "admin").id)
    token = database.write_now(
        lambda s: accounts.grant(s, admin, accounts.TOKEN, "t", time.time(), 1e6)
    )
    database.close()
    bearer = {"Authorization": f"Bearer {token}"}
    with server_process(folder) as one, server_process(folder) as two:
        first, second = (_world_for(folder, server, bearer) for server in (one, two))
        device = first.accepted()
        assert second.upload(make_artifact(tmp_path, "v2", 20_000)).status_code == 201
        deployment = second.deploy("v2")
        offer = device.next().json()
        # What one worker signed, the other takes; what one stored, the other sends.
        device.client.base_url = httpx.URL(f"{two.url}/api/devices")
        assert device.next().json()["id"] == offer["id"]
        uri = offer["artifact"]["source"]["uri"].replace(one.url, two.url)
        assert second.client().get(uri).status_code == 200
        device.update(deployment)
        assert first.deployment(deployment)["status"] == "finished"
        first.admin.post(f"/devices/{device.id}/reject")
        assert device.next().status_code == 401
        # The worker with the lease dies; the other goes on.
        one.kill()
        end = time.monotonic() + 60
        database = Database(made.settings.database_url)
        query = text("SELECT holder, until FROM lease")
        before = database.read_now(lambda s: s.execute(query).one())
        while tuple(database.read_now(lambda s: s.execute(query).one())) == tuple(before):
            assert time.monotonic() < end, "nobody took the lease"
            time.sleep(0.5)
        database.close()
