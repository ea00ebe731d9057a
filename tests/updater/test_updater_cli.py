"""The command line as processes: exit codes, console lines, kills, signals, locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from updater_artifacts import artifact, image_bytes, make_key, write_key_pair
from updater_server import Authority, Request, serving

from updater.artifact.signature import PrivateKey
from updater.device import bootenv
from updater.device.bootenv_grub import format_block
from updater.device.config import Slot, load_config
from updater.device.usage import TEXT, rendered

PROGRAM = Path(__file__).with_name("updater_device.py")
V1 = image_bytes(1_500_000, 1)
V2 = image_bytes(1_500_000, 2)
SLOT_BYTES = 2 << 20

CONFIG = """\
device_type = "test-device"
data_dir = "{directory}/data"
artifact_info = "{directory}/artifact_info"
[slots]
a = {{device = "{directory}/a.img", number = 2}}
b = {{device = "{directory}/b.img", number = 3}}
[bootenv]
{bootenv}
[tls]
ca_file = "{directory}/ca.pem"
[trust]
artifact_keys = ["{directory}/artifact.pem"]
[health]
directory = "{directory}/health.d"
timeout_s = 5
[download]
retries = 2
backoff_s = 0.01
"""


class Device:
    """A directory that stands for a device, and the processes that run on it."""

    def __init__(self, directory: Path, kind: str, key: PrivateKey) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        for name, content in (("a", V1), ("b", b"")):
            (directory / f"{name}.img").write_bytes(content.ljust(SLOT_BYTES, b"\0"))
        (directory / "artifact_info").write_text("artifact_name=v1\n")
        (directory / "health.d").mkdir()
        write_key_pair(key, directory, "artifact")
        if kind == "uboot":
            (directory / "env.img").write_bytes(bytes(2 << 20))
            copies = "".join(f"{directory}/env.img {at} 0x4000\n" for at in ("0x0", "0x100000"))
            (directory / "fw_env.config").write_text(copies)
            text = f'kind = "uboot"\nfw_env_config = "{directory}/fw_env.config"'
        else:
            for number in "12":
                (directory / number).mkdir()
                (directory / number / "lock").write_bytes(format_block({"editing": "0"}))
                (directory / number / "env").write_bytes(format_block({}))
            text = f'kind = "grub"\ncopies = ["{directory}/1/env", "{directory}/2/env"]'
        (directory / "updater.toml").write_text(CONFIG.format(directory=directory, bootenv=text))
        self.config = load_config(str(directory / "updater.toml"))
        self.environment = bootenv.open_environment(self.config.bootenv)
        bootenv.settle(self.environment, self.slot("a"))
        self.boots = 0
        self._boot_into("a")

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.config.slots if slot.name == name)

    def start(
        self, *verb: str, kill_at: int = 0, prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, sys.executable, str(PROGRAM), str(self.directory), str(kill_at), *verb],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *verb: str, kill_at: int = 0) -> tuple[int, str]:
        """Run to the end; return the exit code and both outputs."""
        with self.start(*verb, kill_at=kill_at) as process:
            out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return process.returncode, err + out

    def _boot_into(self, name: str) -> None:
        self.boots += 1
        (self.directory / "running").write_text(name)
        (self.directory / "boot").write_text(str(self.boots))

    def reboot(self) -> str:
        """Do what the boot loader does; return the slot that runs now."""
        values = self.environment.read()
        if values["upgrade_available"] == "1":
            if values["bootcount"] != "0":
                bootenv.settle(self.environment, self.slot(self._other(values)))
            else:
                self.environment.write({"bootcount": "1"})
        name = "a" if self.environment.read()["mender_boot_part"] == "2" else "b"
        self._boot_into(name)
        return name

    def _other(self, values: dict[str, str]) -> str:
        return "b" if values["mender_boot_part"] == "2" else "a"

    def image(self, name: str) -> str:
        content = (self.directory / f"{name}.img").read_bytes()[: len(V1)]
        return {V1: "v1", V2: "v2"}.get(content, "neither")

    def sick(self) -> None:
        check = self.directory / "health.d" / "50-sick"
        check.write_text("#!/bin/sh\necho the sensor is dead >&2\nexit 1\n")
        check.chmod(0o755)


@pytest.fixture(scope="session")
def update(session_directory: Path, signing_key: PrivateKey) -> str:
    return str(artifact(session_directory, V2, key=signing_key, compression="zstd"))


@pytest.fixture(params=["uboot", "grub"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "uboot" and not shutil.which("fw_setenv"):
        pytest.skip("fw_setenv is missing: apt-get install libubootenv-tool")
    return str(request.param)


@pytest.fixture
def device(tmp_path: Path, kind: str, signing_key: PrivateKey) -> Device:
    return Device(tmp_path / "device", kind, signing_key)


@pytest.fixture
def grub_device(tmp_path: Path, signing_key: PrivateKey) -> Device:
    return Device(tmp_path / "device", "grub", signing_key)


def states(text: str) -> list[str]:
    start = "updater: state "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def test_a_whole_update(device: Device, update: str) -> None:
    assert device("resume") == (0, "")
    assert device("show-artifact") == (0, "v1\n")
    code, text = device("install", update)
    assert code == 0
    assert states(text) == ["Download", "ArtifactInstall", "ArtifactReboot"]
    assert text.endswith("updater: installed v2 into slot b; reboot to start it\n")
    assert device.image("b") == "v2"
    assert device("commit")[0] == 1, "not before the reboot"
    assert device("install", update)[0] == 1, "not a second time"
    assert device.reboot() == "b"
    code, text = device("resume")
    assert code == 0
    assert states(text) == ["ArtifactVerifyReboot", "ArtifactCommit", "Cleanup", "Idle"]
    assert "updater: committed v2 (slot b)\n" in text
    assert device("show-artifact") == (0, "v2\n")
    assert "rootfs-image.version=v2\n" in device("show-provides")[1]
    code, text = device("commit")
    assert (code, "nothing to commit" in text) == (2, True)
    assert device("resume") == (0, "")
    assert device.reboot() == "b"
    assert device.image("a") == "v1"


def test_the_reboot_exit_code(grub_device: Device, update: str) -> None:
    assert grub_device("install", "--reboot-exit-code", update)[0] == 4


def test_commit_by_hand(grub_device: Device, update: str) -> None:
    grub_device("install", update)
    grub_device.reboot()
    assert grub_device("show-artifact") == (0, "v2\n")
    code, text = grub_device("commit")
    assert (code, "committed v2 (slot b)" in text) == (0, True)
    assert grub_device("rollback")[0] == 2


def test_an_unhealthy_system_is_left_with_its_cause(device: Device, update: str) -> None:
    device("install", update)
    device.reboot()
    device.sick()
    code, text = device("resume")
    assert code == 4
    assert states(text) == ["ArtifactVerifyReboot", "ArtifactRollback", "ArtifactRollbackReboot"]
    cause = "health check 50-sick exited with 1: the sensor is dead"
    assert f"updater: error: {cause}\n" in text
    assert device.reboot() == "a"
    code, text = device("resume")
    assert code == 0
    assert f"updater: rolled back to v1 (slot a): {cause}\n" in text
    assert device("show-artifact") == (0, "v1\n")
    code, text = device("status")
    assert "state: Idle\nrunning: v1 (slot a)\n" in text
    assert f"v2 rolled-back at 20" in text and cause in text  # noqa: F541


def test_a_fallback_of_the_boot_loader_is_noticed(device: Device, update: str) -> None:
    device("install", update)
    assert device.reboot() == "b"
    assert device.reboot() == "a", "nobody committed in between"
    code, text = device("resume")
    assert code == 0
    assert "rolled back to v1 (slot a): slot b did not come up; the boot loader fell back" in text


def test_rollback_before_and_after_the_reboot(device: Device, update: str) -> None:
    device("install", update)
    code, text = device("rollback")
    assert (code, "rolled back to v1 (slot a): rollback was asked for" in text) == (0, True)
    assert device.reboot() == "a"
    assert device("resume") == (0, "")
    assert device("rollback")[0] == 2
    device("install", update)
    device.reboot()
    assert device("rollback")[0] == 4
    assert device.reboot() == "a"
    assert "rolled back to v1 (slot a): rollback was asked for" in device("resume")[1]


def test_the_first_slot_is_used_again(grub_device: Device, update: str) -> None:
    for target in ("b", "a", "b"):
        assert grub_device("install", update)[0] == 0
        assert grub_device.reboot() == target
        assert "committed" in grub_device("resume")[1]


def refused(device: Device, source: str, message: str) -> None:
    """The update must fail with `message` and leave slots, environment and store usable."""
    before = (device.directory / "a.img").read_bytes()
    environment = device.environment.read()
    code, text = device("install", source)
    assert code == 1
    assert message in text
    assert text.count("updater: error: ") == 1
    assert (device.directory / "a.img").read_bytes() == before
    assert device.environment.read() == environment
    assert device("resume") == (0, "")


def test_bad_updates_are_refused_in_one_line(
    tmp_path: Path, grub_device: Device, update: str, signing_key: PrivateKey
) -> None:
    for name, arguments in {
        "other": {"key": signing_key, "device_type": "other"},
        "unsigned": {},
        "foreign": {"key": make_key("ecdsa")},
    }.items():
        (tmp_path / name).mkdir()
        made = artifact(tmp_path / name, V2, **arguments)  # type: ignore[arg-type]
        message = {
            "other": "is for device type other; this is test-device",
            "unsigned": "not signed",
            "foreign": "none of the 1 trusted",
        }[name]
        refused(grub_device, str(made), message)
        assert (grub_device.directory / "b.img").read_bytes() == bytes(SLOT_BYTES)
    big = artifact(tmp_path, image_bytes(SLOT_BYTES + 4096, 5), name="big", key=signing_key)
    refused(grub_device, str(big), f"has {SLOT_BYTES} bytes, the image needs {SLOT_BYTES + 4096}")
    assert (grub_device.directory / "b.img").read_bytes() == bytes(SLOT_BYTES)
    cut = tmp_path / "cut.mender"
    cut.write_bytes(Path(update).read_bytes()[:400_000])
    refused(grub_device, str(cut), "too early")
    assert (grub_device.directory / "b.img").read_bytes()[:65536] == bytes(65536)
    refused(grub_device, str(tmp_path / "absent"), "No such file")
    assert grub_device("install", update)[0] == 0, "and then a good one works"


def test_an_environment_that_the_boot_loader_never_saved_is_refused(
    device: Device, update: str
) -> None:
    """The canary contract, and the message that says what to do about an orphaned one."""
    device.environment.write({"mender_check_saveenv_canary": "1"})
    refused(device, update, "the boot loader has not saved mender_saveenv_canary=1")
    assert (device.directory / "b.img").read_bytes() == bytes(SLOT_BYTES), "before the download"
    device.environment.write({"mender_saveenv_canary": "1"})
    assert device("install", update)[0] == 0
    assert device.reboot() == "b"
    # Whatever the canary says, a system on trial can still be kept or left.
    device.environment.write({"mender_saveenv_canary": "0"})
    assert "committed v2" in device("resume")[1]


@pytest.mark.skipif(
    not shutil.which("mke2fs"), reason="mke2fs is missing: apt-get install e2fsprogs"
)
def test_an_ext4_image_can_be_grown_to_its_slot(
    tmp_path: Path, grub_device: Device, signing_key: PrivateKey
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "greeting").write_text("hello")
    image = tmp_path / "small.img"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "1024k"]
    subprocess.run(command, check=True)
    made = artifact(tmp_path, image.read_bytes(), key=signing_key)
    config = grub_device.directory / "updater.toml"
    config.write_text("grow_ext4 = true\n" + config.read_text())
    code, text = grub_device("install", str(made))
    assert code == 0, text
    slot = grub_device.directory / "b.img"
    assert f"file system grown from {1 << 20} to {SLOT_BYTES} bytes" in text
    subprocess.run(["e2fsck", "-f", "-n", str(slot)], check=True, capture_output=True)
    said = subprocess.run(
        ["debugfs", "-R", "cat greeting", str(slot)], capture_output=True, text=True, check=True
    )
    assert said.stdout == "hello"
    assert grub_device.reboot() == "b"
    assert "committed v2" in grub_device("resume")[1]


def test_an_image_that_is_no_ext4_is_not_touched_by_growing(
    grub_device: Device, update: str
) -> None:
    config = grub_device.directory / "updater.toml"
    config.write_text("grow_ext4 = true\n" + config.read_text())
    code, text = grub_device("install", update)
    assert (code, "holds no ext4 file system; it is not grown" in text) == (0, True)
    assert grub_device.image("b") == "v2"


def test_settings_and_files_that_are_wrong(grub_device: Device, update: str) -> None:
    config = grub_device.directory / "updater.toml"
    text = config.read_text()
    config.write_text(text + "speed = 3\n")
    code, said = grub_device("install", update)
    assert (code, said) == (1, f"updater: error: {config}: unknown key 'download.speed'\n")
    config.write_text(text.replace("/data", "/artifact_info/x"))
    code, said = grub_device("install", update)
    assert (code, said.count("\n"), "Not a directory" in said) == (1, 1, True)


def test_an_unwritable_environment_is_reported(grub_device: Device, update: str) -> None:
    lock = grub_device.directory / "1" / "lock"
    lock.unlink()
    lock.mkdir()
    code, text = grub_device("install", update)
    assert code == 1
    assert "cannot be written: Is a directory" in text
    assert "installed" not in text
    assert grub_device("status")[1].startswith("state: ArtifactRollback")
    lock.rmdir()
    code, text = grub_device("resume")
    assert code == 0
    assert "rolled back to v1 (slot a): boot environment" in text


def test_a_passive_slot_that_cannot_be_written(grub_device: Device, update: str) -> None:
    (grub_device.directory / "b.img").unlink()
    refused(grub_device, update, "b.img: cannot be opened: No such file or directory")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "healthy"), [("uboot", True), ("grub", False)], indirect=["kind"])
def test_a_kill_at_any_effect_is_recovered(
    tmp_path: Path, kind: str, signing_key: PrivateKey, update: str, healthy: bool
) -> None:
    """SIGKILL between any two effects of the client, files and databases being real."""
    kills = 0
    for kill_at in range(1, 100):
        device = Device(tmp_path / str(kill_at), kind, signing_key)
        code, said = device("install", update, kill_at=kill_at)
        if code == 0 and kills == 0:
            raise AssertionError(said)
        killed = code == -signal.SIGKILL
        kills += killed
        device.reboot()
        if not healthy:
            device.sick()
        # Once installed, the counting goes on over the first boot.
        if not killed:
            code, text = device("resume", kill_at=kill_at - kills)
            said += text
            if code != -signal.SIGKILL:
                break
            device.reboot()
        for _ in range(4):
            code, text = device("resume")
            said += text
            assert code in (0, 4), text
            if (code, text) == (0, ""):
                break
            if code == 4:
                device.reboot()
        else:
            raise AssertionError(f"not settled: {said}")
        running = (device.directory / "running").read_text()
        assert device.image(running) == ("v2" if running == "b" else "v1")
        assert device.environment.read()["upgrade_available"] == "0"
        if running == "b":
            assert healthy
            assert device("show-artifact") == (0, "v2\n")
        else:
            assert "updater: committed" not in said
            (device.directory / "health.d" / "50-sick").unlink(missing_ok=True)
            assert device("install", update)[0] == 0
            assert device.reboot() == "b"
            if kill_at % 3 == 0:
                assert "committed v2" in device("resume")[1]
        shutil.rmtree(device.directory)
    assert kills >= 12


@pytest.fixture
def stuck(grub_device: Device, update: str) -> Iterator[tuple[Device, subprocess.Popen[str]]]:
    """An install that waits for a server which has sent half of the artifact."""
    content = Path(update).read_bytes()
    release, arrived = threading.Event(), threading.Event()
    authority = Authority(grub_device.directory)

    def behave(request: Request, number: int) -> None:
        request.serve(content, stop_after=2048)
        request.wfile.flush()
        arrived.set()
        release.wait(30)

    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        with grub_device.start("install", url) as process:
            assert arrived.wait(20)
            yield grub_device, process
            process.kill()
            release.set()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_it_in_one_line_and_keep_the_state(
    stuck: tuple[Device, subprocess.Popen[str]], number: signal.Signals, code: int, update: str
) -> None:
    device, process = stuck
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"updater: error: interrupted by {number.name}" in err
    assert "Traceback" not in err
    assert "state: Download" in device("status")[1]
    code, text = device("install", update)
    assert code == 0
    assert "v2.mender was not installed, v1 (slot a) stays: interrupted in Download" in text


def test_a_second_install_is_refused(
    stuck: tuple[Device, subprocess.Popen[str]], update: str
) -> None:
    device, process = stuck
    code, text = device("install", update)
    assert code == 1
    assert f"another updater is running (install, process {process.pid})" in text
    assert device("commit")[0] == 1


def test_a_concurrent_commit_finds_nothing_in_progress(grub_device: Device) -> None:
    assert grub_device("resume") == (0, "")
    with (grub_device.directory / "data" / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file.fileno(), os.pwrite(file.fileno(), b"1 commit\n", 0))
        assert grub_device("commit")[0] == 2


def test_an_install_over_https_resumes(grub_device: Device, update: str) -> None:
    content = Path(update).read_bytes()
    authority = Authority(grub_device.directory)

    def behave(request: Request, number: int) -> None:
        request.serve(content, stop_after=300_000 if number < 3 else None)

    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        code, text = grub_device("install", url)
    assert code == 0, text
    assert "download interrupted at byte 300000 of" in text
    assert grub_device.image("b") == "v2"


def test_the_boot_path_imports_neither_tls_nor_cryptography(grub_device: Device) -> None:
    """Starting Python is what costs at boot; this list is what was measured to matter."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from updater import cli\n"
        "from updater.device import config\n"
        "config.DEFAULT_PATH = sys.argv[2]\n"
        "code = cli.main(['resume'])\n"
        "heavy = {'ssl', 'http', 'cryptography', 'zstandard', 'dataclasses', 'inspect', 'lzma',"
        "'updater.artifact', 'urllib', 'argparse', 'subprocess', 'pathlib'} & set(sys.modules)\n"
        "print(code, sorted(heavy))\n"
    )
    root, config = str(PROGRAM.parents[2]), str(grub_device.directory / "updater.toml")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, root, config],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 []\n"


def test_the_ready_made_help_is_what_the_command_line_would_print(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert rendered() == TEXT, "run `python -m updater.device.usage`"


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_costs_no_imports(option: str) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from updater import cli\n"
        "code = cli.main([sys.argv[2]])\n"
        "print(code, sorted(name for name in set(sys.modules) - before if name != '__future__'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(PROGRAM.parents[2]), option],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        done.stdout
        == f"{TEXT}0 ['updater', 'updater.cli', 'updater.device', 'updater.device.usage']\n"
    )


def test_usage_errors_are_errors_not_nothing_in_progress(grub_device: Device) -> None:
    code, text = grub_device("explode")
    assert (code, text.count("\n")) == (1, 1)
    code, text = grub_device("install")
    assert (code, "required: FILE|URL" in text) == (1, True)


def context_switches(pid: int) -> int:
    """Of all its threads: a process that never runs has none."""
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if "ctxt_switches" in line:
                count += int(line.split()[1])
    return count


def test_an_idle_daemon_does_not_wake_up_between_polls(grub_device: Device) -> None:
    """Port 1 refuses: it asks, fails, says when it asks again, and sleeps in one piece."""
    config = grub_device.directory / "updater.toml"
    server = '[server]\nurl = "https://127.0.0.1:1"\nretry_s = 3600\n'
    config.write_text(config.read_text() + server)
    with grub_device.start("daemon") as daemon:
        try:
            assert daemon.stderr is not None
            said = next(line for line in daemon.stderr if "asking again in" in line)
            assert 1500 <= int(said.split()[-2]) <= 2100, said
            deadline = time.monotonic() + 20
            before, now = -1, context_switches(daemon.pid)
            while before != now and time.monotonic() < deadline:
                time.sleep(0.25)
                before, now = now, context_switches(daemon.pid)
            time.sleep(3)
            assert context_switches(daemon.pid) == now
        finally:
            daemon.kill()


def test_the_count_of_wake_ups_sees_a_thread_that_polls() -> None:
    """The planted bug: a process whose main thread sleeps, and another one looks now and then."""
    program = (
        "import threading, time\n"
        "def look():\n"
        "    while True: time.sleep(0.5)\n"
        "threading.Thread(target=look, daemon=True).start()\n"
        "print('asleep', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            before = context_switches(process.pid)
            time.sleep(3)
            assert context_switches(process.pid) > before
        finally:
            process.kill()
