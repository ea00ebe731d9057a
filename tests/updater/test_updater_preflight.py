"""What is refused, or put right, before an update begins: real file systems, real TLS."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_updater_cli import SLOT_BYTES, V2, Device
from updater_artifacts import artifact, image_bytes
from updater_judge import judge, operate, settle
from updater_server import Authority, Request, serving
from updater_world import World, world_artifact

from updater.artifact import write_module_artifact
from updater.artifact.signature import PrivateKey


@pytest.fixture
def device(tmp_path: Path, signing_key: PrivateKey) -> Device:
    return Device(tmp_path / "device", "grub", signing_key)


@pytest.fixture(scope="session")
def update(session_directory: Path, signing_key: PrivateKey) -> str:
    (session_directory / "preflight").mkdir()
    return str(artifact(session_directory / "preflight", V2, key=signing_key, compression="zstd"))


def have_namespaces() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and (
        subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


small_disks = pytest.mark.skipif(
    not have_namespaces(), reason="mounting in a user namespace is not allowed here"
)


def on_a_small_disk(device: Device, size: str, *verb: str) -> tuple[int, str]:
    """Run a verb with the data directory on a file system of that size."""
    data = device.directory / "data"
    data.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o size={size} none "{data}" && exec "$@"'
    with device.start(*verb, prefix=("unshare", "-rm", "sh", "-c", script, "sh")) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, err + out


@small_disks
def test_a_full_data_partition_is_refused_before_anything_is_touched(
    device: Device, update: str
) -> None:
    environment = device.environment.read()
    code, text = on_a_small_disk(device, "256k", "install", update)
    assert code == 1
    assert text.count("updater: error: ") == 1
    assert "bytes are free, an update needs at least 1048576; remove something" in text
    assert (device.directory / "b.img").read_bytes() == bytes(SLOT_BYTES)
    assert device.environment.read() == environment
    assert device("install", update)[0] == 0, "with room again, it works"


@small_disks
def test_a_module_payload_that_does_not_fit_is_refused_by_its_size(
    device: Device, tmp_path: Path, signing_key: PrivateKey
) -> None:
    (tmp_path / "big").write_bytes(image_bytes(3_000_000, 1))
    made = tmp_path / "big.mender"
    write_module_artifact(
        made,
        [tmp_path / "big"],
        payload_type="script",
        name="v2",
        device_types=["test-device"],
        key=signing_key,
    )
    code, text = on_a_small_disk(device, "2m", "install", str(made))
    assert code == 1
    assert "files: big needs 4048576 bytes" in text
    assert device("show-artifact") == (0, "v1\n")


def test_a_store_of_a_newer_client_is_refused_in_one_line_and_left_alone(
    device: Device, update: str
) -> None:
    store = device.directory / "data" / "state.db"
    store.parent.mkdir()
    with sqlite3.connect(store) as connection:
        connection.execute("CREATE TABLE hoverboard (x)")
        connection.execute("PRAGMA user_version=99")
    connection.close()
    before = {path: path.read_bytes() for path in device.directory.rglob("*") if path.is_file()}
    before.pop(device.directory / "data" / "lock", None)
    for verb in (("install", update), ("commit",), ("rollback",), ("resume",), ("status",)):
        code, text = device(*verb)
        assert code == 1
        assert text.count("\n") == 1
        assert (
            "written by a newer client (schema 99, this one knows 2); it is left as it is" in text
        )
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.skipif(not shutil.which("fw_setenv"), reason="needs libubootenv-tool")
def test_without_the_environment_tool_nothing_is_begun(
    tmp_path: Path, signing_key: PrivateKey, update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(tmp_path / "device", "uboot", signing_key)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        code, text = device("install", update)
    assert code == 1
    assert "cannot be run (No such file or directory); install libubootenv-tool" in text
    assert (device.directory / "b.img").read_bytes() == bytes(SLOT_BYTES)
    assert device("status")[1].startswith("state: Idle")


@small_disks
@pytest.mark.skipif(not shutil.which("fw_setenv"), reason="needs libubootenv-tool")
def test_a_commit_into_an_environment_that_cannot_be_written_is_never_called_good(
    tmp_path: Path, signing_key: PrivateKey, update: str
) -> None:
    """The real tool on a file system that is read-only: the device goes back by itself."""
    device = Device(tmp_path / "device", "uboot", signing_key)
    assert device("install", update)[0] == 0
    assert device.reboot() == "b"
    file = device.directory / "env.img"
    script = f'mount --bind "{file}" "{file}" && mount -o remount,ro,bind "{file}" && exec "$@"'
    with device.start("resume", prefix=("unshare", "-rm", "sh", "-c", script, "sh")) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "committed" not in err + out
    assert "fw_setenv exited with" in err
    assert device.reboot() == "a", "the boot loader has counted"
    assert "rolled back to v1 (slot a): boot environment" in device("resume")[1]


@small_disks
def test_a_read_only_passive_slot_is_refused_and_nothing_is_touched(
    device: Device, update: str
) -> None:
    environment = device.environment.read()
    slot = device.directory / "b.img"
    script = f'mount --bind "{slot}" "{slot}" && mount -o remount,ro,bind "{slot}" && exec "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh")
    with device.start("install", update, prefix=prefix) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.count("updater: error: ") == 1
    assert f"{slot}: cannot be opened: Read-only file system" in err
    assert slot.read_bytes() == bytes(SLOT_BYTES)
    assert device.environment.read() == environment
    assert device("status")[1].startswith("state: Idle")
    assert device("install", update)[0] == 0, "and once it can be written, it works"


def test_an_artifact_that_ends_at_any_member_boundary_is_refused(
    device: Device, tmp_path: Path, update: str
) -> None:
    environment = device.environment.read()
    whole = Path(update).read_bytes()
    with tarfile.open(update) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names == ["version", "manifest", "manifest.sig", "header.tar.zst", "data/0000.tar.zst"]
    # In front of each header, behind each header, and behind the last content.
    last = members[-1].offset_data + -(-members[-1].size // 512) * 512
    ends = {*(m.offset for m in members), *(m.offset_data for m in members), last}
    for end in sorted(ends):
        cut = tmp_path / "cut.mender"
        cut.write_bytes(whole[:end])
        code, text = device("install", str(cut))
        assert (code, text.count("updater: error: ")) == (1, 1), f"{end}: {text}"
        assert "too early" in text or "cut off" in text or "ends" in text, f"{end}: {text}"
        assert device.environment.read() == environment
        # What was begun is nothing that a boot loader could start.
        assert (device.directory / "b.img").read_bytes()[:65536] == bytes(65536)
    assert device("status")[1].startswith("state: Idle")
    assert device("install", update)[0] == 0


# A stand-in for a clock that nobody can turn back on a shared machine: the real time functions
# behind an offset, which setting the clock corrects.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long offset; static int begun;
static int real(clockid_t id, struct timespec *t) {
    static int (*get)(clockid_t, struct timespec *);
    if (!get) get = dlsym(RTLD_NEXT, "clock_gettime");
    return get(id, t);
}
static long shift(void) {
    struct timespec t;
    if (!begun) { begun = 1; real(CLOCK_REALTIME, &t); offset = 100 - t.tv_sec; }
    return offset;
}
int clock_gettime(clockid_t id, struct timespec *t) {
    int r = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += shift();
    return r;
}
time_t time(time_t *p) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    if (p) *p = t.tv_sec;
    return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *z) {
    struct timespec t; clock_gettime(CLOCK_REALTIME, &t);
    v->tv_sec = t.tv_sec; v->tv_usec = t.tv_nsec / 1000;
    return 0;
}
int clock_settime(clockid_t id, const struct timespec *t) {
    if (getenv("CLOCK_FIXED")) { errno = EPERM; return -1; }
    struct timespec now; shift(); real(id, &now);
    offset = t->tv_sec - now.tv_sec;
    return 0;
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_a_device_without_a_clock_can_speak_tls(
    device: Device, update: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real TLS with a certificate that is not valid before yesterday, on a device in 1970."""
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(tmp_path / "clock.c")]
    subprocess.run([*command, "-ldl"], check=True)
    authority = Authority(device.directory)
    content = Path(update).read_bytes()

    def behave(request: Request, number: int) -> None:
        request.serve(content)

    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("CLOCK_FIXED", "1")
        code, text = device("install", url)
        assert code == 1, "the clock could not be set: that the test can fail at all"
        assert "and cannot be set" in text
        assert "certificate is not yet valid" in text
        monkeypatch.delenv("CLOCK_FIXED")
        code, text = device("install", url)
    assert code == 0, text
    assert "the clock said 1970-01-01T00:01:4" in text


def test_a_cut_after_the_activation_does_not_lose_the_update(tmp_path: Path) -> None:
    """Whichever way the device goes down then, the next start is the new system's."""
    made = world_artifact(tmp_path)
    for number, moment in enumerate(("store ArtifactReboot", "")):
        world = World(tmp_path / str(number), made, number)
        world.power.trip_on = moment
        operate(world, "install", "v2.mender")
        assert world.power.off == bool(moment)
        world.power.trip_on = ""
        said = settle(world)
        judge(world, said)
        assert "committed v2 (slot b)" in said
