"""The client's parts one by one: configuration, health checks, store, slot writer, devices."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from updater_artifacts import image_bytes

from updater.artifact.errors import ArtifactIntegrityError
from updater.device import process
from updater.device.blockdev import DirectDevice, LinuxMachine
from updater.device.config import Slot, load_config
from updater.device.errors import ConfigError, HealthError, SlotError, StoreError
from updater.device.health import HealthRunner
from updater.device.model import Outcome, Part, Result, State, Update
from updater.device.overlapped import Overlapped
from updater.device.slot_writer import CHUNK_BYTES, HEAD_BYTES, SlotWriter
from updater.device.store import SqliteStore, SystemFiles

GOOD = """\
device_type = "x"
data_dir = "/data"
artifact_info = "/etc/artifact_info"
[slots]
a = {device = "/dev/vda2", number = 2}
b = {device = "/dev/vda3", number = 3}
[bootenv]
kind = "uboot"
fw_env_config = "/etc/fw_env.config"
"""


# Configuration


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("device_type", "device_typo", "device_type is missing"),
        ("[slots]", "colour = 1\n[slots]", "unknown key 'colour'"),
        ("number = 3", "number = 3, size = 4", "unknown key 'slots.b.size'"),
        ("number = 3", "number = 2", "same device or number"),
        ("number = 3", 'number = "3"', "slots.b.number must be a number"),
        ("number = 3", "number = 3.5", "must be whole"),
        ('b = {device = "/dev/vda3", number = 3}\n', "", "exactly two slots, not 1"),
        ("/dev/vda3", "vda3", "slots.b.device must be an absolute path"),
        ('"uboot"', '"barebox"', "bootenv.kind must be"),
        ("fw_env_config", "copies", "bootenv.fw_env_config is missing"),
        ('"/data"', "7", "data_dir must be a non-empty string"),
        ("[slots]", "[slots", "not valid TOML"),
        ("[slots]", "tls = 3\n[slots]", "tls must be a table"),
        ("[bootenv]", "[health]\ntimeout_s = 0\n[bootenv]", "health.timeout_s must be from 0.1"),
        ("[bootenv]", '[server]\nurl = "http://x"\n[bootenv]', "server.url must begin with https"),
        ("[bootenv]", "[server]\npoll_s = 9\n[bootenv]", "server.url is missing"),
        (
            "[bootenv]",
            '[server]\nurl = "https://x"\nwindows = ["late"]\n[bootenv]',
            "server.windows: 'late' is not like",
        ),
        ("[bootenv]", "[scripts]\ntimeout = 3\n[bootenv]", "unknown key 'scripts.timeout'"),
        ("device_type", "grow_ext4 = 1\ndevice_type", "grow_ext4 must be true or false"),
        ("[bootenv]", "[trust]\nartifact_keys = 'k'\n[bootenv]", "must be a list of strings"),
    ],
)
def test_configuration_errors_name_file_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "updater.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slots_can_be_named_as_in_fstab(tmp_path: Path) -> None:
    path = tmp_path / "updater.toml"
    text = GOOD.replace("/dev/vda2", "PARTUUID=0a1b-02").replace("/dev/vda3", "PARTLABEL=rootfs-b")
    path.write_text(text)
    first, second = load_config(str(path)).slots
    assert first.device == "/dev/disk/by-partuuid/0a1b-02"
    assert second.device == "/dev/disk/by-partlabel/rootfs-b"
    path.write_text(GOOD.replace("/dev/vda2", "LABEL=../../sda"))
    with pytest.raises(ConfigError, match=r"slots\.a\.device must be an absolute path"):
        load_config(str(path))


def test_configuration_defaults(tmp_path: Path) -> None:
    path = tmp_path / "updater.toml"
    path.write_text(GOOD)
    config = load_config(str(path))
    assert (config.ca_file, config.artifact_keys, config.health_timeout_s) == ("", (), 30.0)
    with pytest.raises(ConfigError, match="cannot read the configuration: No such file"):
        load_config(str(tmp_path / "absent"))


# Health checks and processes


def check(directory: Path, name: str, script: str, mode: int = 0o755) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(mode)


def test_all_checks_run_in_order(tmp_path: Path) -> None:
    for name in ("20-b", "10-a", "30-c"):
        check(tmp_path / "d", name, f"echo {name} >> {tmp_path}/log")
    check(tmp_path / "d", ".hidden", "exit 1")
    check(tmp_path / "d", "10-a~", "exit 1")
    HealthRunner(str(tmp_path / "d"), 5).run()
    assert (tmp_path / "log").read_text().split() == ["10-a", "20-b", "30-c"]
    HealthRunner(None, 5).run()


@pytest.mark.parametrize(
    ("script", "mode", "message"),
    [
        ("echo no route >&2; exit 3", 0o755, "50-x exited with 3: no route"),
        ("kill -9 $$", 0o755, "50-x was killed by signal 9"),
        ("sleep 60", 0o755, "50-x did not finish in time"),
        ("exit 0", 0o644, "50-x is not executable"),
    ],
)
def test_a_check_that_does_not_pass_fails(
    tmp_path: Path, script: str, mode: int, message: str
) -> None:
    check(tmp_path / "d", "50-x", script, mode)
    with pytest.raises(HealthError, match=message):
        HealthRunner(str(tmp_path / "d"), 0.5).run()


def test_a_check_that_cannot_start_fails(tmp_path: Path) -> None:
    check(tmp_path / "d", "50-x", "exit 0")
    (tmp_path / "d" / "50-x").write_text("#!/nonexistent\n")
    with pytest.raises(HealthError, match="50-x"):
        HealthRunner(str(tmp_path / "d"), 1).run()
    with pytest.raises(HealthError, match="cannot be listed"):
        HealthRunner(str(tmp_path / "absent"), 1).run()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_of_a_program_is_left_behind(tmp_path: Path, waits: bool) -> None:
    """Neither at the deadline nor when it ends before its own children."""
    script = f"sleep 300 & echo $! > {tmp_path}/pid; " + ("wait" if waits else "exit 0")
    started = time.monotonic()
    result = process.run(["sh", "-c", script], timeout_s=1.0)
    assert time.monotonic() - started < 10
    assert result.status == (None if waits else 0)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        os.sched_yield()
    assert not alive(pid)


def test_output_is_bounded_and_input_arrives() -> None:
    result = process.run(["sh", "-c", "cat; yes | head -c 3000000 >&2"], timeout_s=10, stdin=b"hi")
    assert (result.status, result.output, len(result.errors)) == (0, b"hi", 10240)
    assert process.run(["true"], timeout_s=10, stdin=b"unread").status == 0


def test_the_child_gets_signals_although_the_caller_holds_them_back() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        assert process.run(["sh", "-c", "kill -TERM $$"], timeout_s=5).status == -signal.SIGTERM
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The store

UPDATE = Update(
    artifact_name="v2",
    previous_name="v1",
    source="a",
    target="b",
    state=State.VERIFY,
    boot_id="boot",
    cause="why",
    provides={"k": "v"},
    clears=("x.*",),
    kind="single-file",
    part=Part.LEAVE,
    steps=7,
    result=Result.COMMITTED,
    inconsistent=True,
    reboot="Yes",
    reverts=False,
    deployment="d-1",
)


def test_the_store_keeps_everything(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    store = SqliteStore(path)
    assert (store.update(), store.provides(), store.last_outcome()) == (None, None, None)
    assert not Path(path).exists(), "reading creates nothing"
    store.save(UPDATE)
    store.close()
    store = SqliteStore(path)
    assert store.update() == UPDATE
    store.save(UPDATE._replace(clears=None, state=State.COMMIT))
    assert store.update() == UPDATE._replace(clears=None, state=State.COMMIT)
    outcome = Outcome(Result.COMMITTED, "v2", "b", "", 1_700_000_000)
    store.finish(outcome, {"artifact_name": "v2"})
    assert store.update() is None
    assert store.provides() == {"artifact_name": "v2"}
    assert store.last_outcome() == outcome._replace(number=1)
    assert store.unreported() == []
    for number in range(105):
        store.finish(outcome._replace(finished_at=number), None)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(*) FROM outcome").fetchone() == (100,)
    store.close()


def test_a_store_from_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer client"):
        SqliteStore(str(path)).update()
    assert path.read_bytes() == before


# The tables as the first released client made them; never to be changed.
SCHEMA_1 = """
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
PRAGMA user_version=1;
INSERT INTO provides VALUES ('artifact_name', 'v1');
INSERT INTO outcome VALUES (3, 'failed', 'v0', 'a', 'because', 1600000000);
"""
IN_PROGRESS_1 = (
    "INSERT INTO update_in_progress VALUES"
    " (1, 'v2', 'v1', 'a', 'b', 'ArtifactReboot', 'boot', '', '{}', 'null');"
)


def schema_1(path: Path, extra: str = "") -> None:
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA_1 + extra)
    connection.close()


def user_version(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    return version


def test_a_store_of_the_first_client_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    schema_1(path)
    store = SqliteStore(str(path))
    assert store.provides() == {"artifact_name": "v1"}
    assert store.last_outcome() == Outcome(
        Result.FAILED, "v0", "a", "because", 1_600_000_000, "", 3
    )
    assert user_version(path) == 2
    store.save(UPDATE)
    assert store.update() == UPDATE
    store.close()


def test_a_store_with_an_update_in_progress_stays_readable_for_the_client_that_began_it(
    tmp_path: Path,
) -> None:
    """The new system is on trial: if it is left, the old client must find its record."""
    path = tmp_path / "state.db"
    schema_1(path, IN_PROGRESS_1)
    store = SqliteStore(str(path))
    update = store.update()
    assert update == Update("v2", "v1", "a", "b", State.REBOOT, "boot")
    store.save(update._replace(state=State.VERIFY, steps=9))
    store.close()
    assert user_version(path) == 1
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT state FROM update_in_progress").fetchone() == (
            "ArtifactVerifyReboot",
        )
    store = SqliteStore(str(path))
    store.finish(Outcome(Result.COMMITTED, "v2", "b", "", 1_700_000_000), {"artifact_name": "v2"})
    assert user_version(path) == 2
    assert store.last_outcome() is not None
    store.close()


def test_outcomes_of_deployments_wait_until_they_are_reported(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "state.db"))
    for deployment in ("", "d-1", "d-2"):
        store.finish(Outcome(Result.COMMITTED, "v2", "b", "", 1, deployment), None)
    waiting = store.unreported()
    assert [outcome.deployment for outcome in waiting] == ["d-1", "d-2"]
    store.mark_reported(waiting[0])
    assert [outcome.deployment for outcome in store.unreported()] == ["d-2"]
    store.close()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("provides", "'{\"a\"; 1}'"),
        ("state", "'ArtifactInstbll'"),
        ("cause", "CAST(x'61ed62' AS TEXT)"),
    ],
)
def test_a_store_with_a_wrong_bit_in_a_value_is_set_aside(
    tmp_path: Path, column: str, value: str
) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(str(path))
    store.save(Update("v2", "v1", "a", "b", State.INSTALL, "boot"))
    store.close()
    with sqlite3.connect(path) as damaged:
        damaged.execute(f"UPDATE update_in_progress SET {column}={value}")
    damaged.close()
    store = SqliteStore(str(path))
    assert store.update() is None
    assert store.set_aside is not None
    store.save(Update("v3", "v1", "a", "b", State.DOWNLOAD, "boot"))
    found = store.update()
    store.close()
    assert found is not None
    assert found.artifact_name == "v3"


def test_a_store_with_a_wrong_bit_in_its_schema_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(str(path))
    store.save(UPDATE)
    store.close()
    content = path.read_bytes()
    assert content.count(b"finished_at") == 1
    path.write_bytes(content.replace(b"finished_at", b"finished_au"))
    store = SqliteStore(str(path))
    store.finish(Outcome(Result.FAILED, "v2", "a", "why", 1), None)
    assert store.set_aside is not None
    assert [store.last_outcome()] == [Outcome(Result.FAILED, "v2", "a", "why", 1, number=1)]
    store.close()


def test_blocks_that_cannot_be_read_are_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"a" * 4096 + b"b" * 4096 + b"c" * 100)
    bad = {4096, 8192}
    pread, pwrite = os.pread, os.pwrite

    def failing(handle: int, length: int, offset: int) -> bytes:
        if offset in bad:
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, length, offset)

    def mending(handle: int, data: bytes, offset: int) -> int:
        assert len(data) == 4096  # less would be read first
        bad.discard(offset)
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(os, "pwrite", mending)
    assert SystemFiles().mend(str(path)) == 2
    monkeypatch.undo()
    assert path.read_bytes() == b"a" * 4096 + bytes(4096 + 100)


def test_a_corrupt_store_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"garbage" * 1000)
    store = SqliteStore(str(path))
    assert store.update() is None
    assert (tmp_path / "state.db.corrupt").read_bytes().startswith(b"garbage")
    store.save(UPDATE)
    assert store.update() == UPDATE
    store.close()


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"state\.db: unable to open"):
        SqliteStore(str(tmp_path / "no" / "state.db")).save(UPDATE)


# Slots


class Payload:
    """Bytes as a payload, in uneven pieces."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._content = content
        self._at = 0

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), 77_777, self.size - self._at)
        buffer[:count] = self._content[self._at : self._at + count]
        self._at += count
        return count


class LoggedDevice(DirectDevice):
    """A real device that remembers the order, and fails where it is told to."""

    def __init__(self, path: Path, fail_at: int = 0) -> None:
        super().__init__(str(path))
        self.log: list[tuple[str, int, int]] = []
        self._fail_at = fail_at

    def _note(self, what: str, offset: int, length: int) -> None:
        self.log.append((what, offset, length))
        if len(self.log) == self._fail_at:
            raise SlotError(f"{what} failed at byte {offset}: Input/output error")

    def write(self, offset: int, data: memoryview) -> None:
        self._note("write", offset, len(data))
        super().write(offset, data)

    def sync(self) -> None:
        self._note("sync", 0, 0)
        super().sync()


SLOT = Slot("b", "/dev/vda3", 3)


def slot_file(directory: Path, size: int = 4 << 20) -> Path:
    path = directory / "slot.img"
    path.write_bytes(b"\xee" * size)
    return path


@pytest.mark.parametrize(
    "size",
    [
        1,
        4096,
        4097,
        HEAD_BYTES - 1,
        HEAD_BYTES,
        HEAD_BYTES + 1,
        CHUNK_BYTES,
        CHUNK_BYTES + 1,
        3 * CHUNK_BYTES - 1,
        3 * CHUNK_BYTES,
        4 << 20,
    ],
)
def test_images_of_any_size_are_written_exactly(tmp_path: Path, size: int) -> None:
    content = image_bytes(size, size) if size > 1 else b"x"
    device = LoggedDevice(slot_file(tmp_path))
    writer, payload = SlotWriter(device, SLOT), Payload(content)
    writer.write(payload)
    writer.sync()
    writer.read_back(payload)
    device.close()
    written = (tmp_path / "slot.img").read_bytes()
    padded = -(-size // 4096) * 4096
    assert written[:padded] == content.ljust(padded, b"\0")
    assert written[max(padded, HEAD_BYTES) :] == b"\xee" * (len(written) - max(padded, HEAD_BYTES))


def test_the_head_is_zeroed_first_and_written_last(tmp_path: Path) -> None:
    device = LoggedDevice(slot_file(tmp_path))
    writer = SlotWriter(device, SLOT)
    writer.write(Payload(image_bytes(CHUNK_BYTES + 8192, 1)))
    writer.sync()
    device.close()
    assert device.log == [
        ("write", 0, HEAD_BYTES),
        ("sync", 0, 0),
        ("write", HEAD_BYTES, CHUNK_BYTES - HEAD_BYTES),
        ("write", CHUNK_BYTES, 8192),
        ("sync", 0, 0),
        ("write", 0, HEAD_BYTES),
        ("sync", 0, 0),
    ]


def test_every_failing_write_and_sync_is_fatal(tmp_path: Path) -> None:
    for fail_at in range(1, 8):
        device = LoggedDevice(slot_file(tmp_path), fail_at)
        writer = SlotWriter(device, SLOT)
        with pytest.raises(SlotError, match="Input/output error"):
            writer.write(Payload(image_bytes(CHUNK_BYTES + 8192, 1)))
            writer.sync()
        device.close()
        if fail_at > 2:
            assert (tmp_path / "slot.img").read_bytes()[:HEAD_BYTES] in (
                bytes(HEAD_BYTES),
                image_bytes(CHUNK_BYTES + 8192, 1)[:HEAD_BYTES],
            )


def test_overlapped_writes_keep_content_and_order(tmp_path: Path) -> None:
    content = image_bytes(3 * CHUNK_BYTES + 5000, 8)
    inner = LoggedDevice(slot_file(tmp_path))
    device = Overlapped(inner, CHUNK_BYTES)
    writer, payload = SlotWriter(device, SLOT), Payload(content)
    writer.write(payload)
    writer.sync()
    writer.read_back(payload)
    device.close()
    device.close()
    assert (tmp_path / "slot.img").read_bytes()[: len(content)] == content
    assert [what for what, _, _ in inner.log] == [
        "write",
        "sync",
        *["write"] * 4,
        "sync",
        "write",
        "sync",
    ]


def test_an_error_of_an_overlapped_write_is_never_lost(tmp_path: Path) -> None:
    """At whichever effect it strikes, and at the very last too: then `sync` or `close` raises."""
    for fail_at in range(1, 8):
        device = Overlapped(LoggedDevice(slot_file(tmp_path), fail_at), CHUNK_BYTES)
        writer = SlotWriter(device, SLOT)
        with pytest.raises(SlotError, match="Input/output error"):
            writer.write(Payload(image_bytes(CHUNK_BYTES + 8192, 1)))
            writer.sync()
        device.close()
    device = Overlapped(LoggedDevice(slot_file(tmp_path), 1), CHUNK_BYTES)
    device.write(0, memoryview(bytes(4096)))
    with pytest.raises(SlotError, match="Input/output error"):
        device.close()


def test_an_overlapped_read_back_finds_a_difference(tmp_path: Path) -> None:
    content = image_bytes(CHUNK_BYTES * 3, 3)
    path = slot_file(tmp_path)
    for position in (CHUNK_BYTES - 1, CHUNK_BYTES + 1, CHUNK_BYTES * 3 - 1):
        device = Overlapped(DirectDevice(str(path)), CHUNK_BYTES)
        writer, payload = SlotWriter(device, SLOT), Payload(content)
        writer.write(payload)
        writer.sync()
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([content[position] ^ 4]))
        with pytest.raises(SlotError, match="does not hold what was written"):
            writer.read_back(payload)
        device.close()


def test_too_small_a_slot_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    device = LoggedDevice(slot_file(tmp_path, 1 << 20))
    with pytest.raises(SlotError, match="has 1048576 bytes, the image needs 1048577"):
        SlotWriter(device, SLOT).write(Payload(bytes((1 << 20) + 1)))
    device.close()
    assert device.log == []


def test_an_image_that_came_damaged_is_the_artifacts_fault_not_the_storages(
    tmp_path: Path,
) -> None:
    """It is hashed only on the medium; what came is told from what was kept by another sum."""
    content = image_bytes(CHUNK_BYTES * 2 + 5, 3)
    path = slot_file(tmp_path)
    device = DirectDevice(str(path))
    writer, payload = SlotWriter(device, SLOT), Payload(content)
    payload.sha256 = hashlib.sha256(b"another").hexdigest()
    writer.write(payload)
    writer.sync()
    with pytest.raises(ArtifactIntegrityError, match="the artifact is damaged: its image has"):
        writer.read_back(payload)
    device.close()
    assert path.read_bytes()[:HEAD_BYTES] == bytes(HEAD_BYTES)


def test_a_difference_on_the_medium_is_found_and_the_slot_made_unloadable(tmp_path: Path) -> None:
    content = image_bytes(CHUNK_BYTES * 2, 3)
    path = slot_file(tmp_path)
    device = DirectDevice(str(path))
    writer, payload = SlotWriter(device, SLOT), Payload(content)
    writer.write(payload)
    writer.sync()
    with path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(bytes([content[1_000_000] ^ 4]))
    with pytest.raises(SlotError, match="does not hold what was written"):
        writer.read_back(payload)
    device.close()
    assert path.read_bytes()[:HEAD_BYTES] == bytes(HEAD_BYTES)


def test_the_device_bypasses_the_page_cache_where_it_can(tmp_path: Path) -> None:
    """On a file system with O_DIRECT; on others (tmpfs) the cache is dropped before reading."""
    device = DirectDevice(str(slot_file(tmp_path)))
    try:
        os.close(os.open(tmp_path / "slot.img", os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    finally:
        direct = device._direct
        device.close()
    assert direct


def test_the_machine_refuses_what_is_not_a_slot(tmp_path: Path) -> None:
    machine = LinuxMachine()
    slots = (Slot("a", str(slot_file(tmp_path)), 2), Slot("b", "/nonexistent", 3))
    with pytest.raises(SlotError, match="is not a block device"):
        machine.running_slot(slots)
    with pytest.raises(SlotError, match="No such file"):
        machine.open_slot(slots[1])
    assert machine.boot_id() == machine.boot_id()
