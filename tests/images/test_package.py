"""The client's packages: a Debian one, a wheel; the same bytes every time, complete, runnable."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import deb as deb_module
from images.deb import PACKAGE_DIR, build_deb, install_client
from images.errors import ImageError
from images.tree import client_files

REPOSITORY = Path(__file__).parent.parent.parent
SBIN = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C"}


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=check, capture_output=True, text=True, env=SBIN, timeout=60
    )


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_deb(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def unpacked(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    run("dpkg-deb", "-x", deb, root)
    return root


def test_the_package_has_the_same_bytes_every_time(deb: Path, tmp_path: Path) -> None:
    """Also from a copy of the client with other times, modes and a stricter umask."""
    copy = tmp_path / "updater"
    shutil.copytree(REPOSITORY / "updater", copy)
    for path in copy.rglob("*.py"):
        os.utime(path, (1, 1))
    before = os.umask(0o077)
    try:
        again = build_deb(tmp_path / "out", updater=copy)
    finally:
        os.umask(before)
    assert again.read_bytes() == deb.read_bytes()
    (copy / "cli.py").write_text("changed = True\n")
    assert build_deb(tmp_path / "out", updater=copy).read_bytes() != deb.read_bytes()


def test_the_package_holds_the_client_and_not_the_server(deb: Path, unpacked: Path) -> None:
    library = unpacked / "usr/lib/python3/dist-packages/updater"
    names = {str(path.relative_to(library)) for path in library.rglob("*") if path.is_file()}
    assert names == {name for name, _ in client_files(REPOSITORY / "updater")}
    assert not any(name.startswith("server") for name in names)
    assert "device/client.py" in names
    with tarfile.open(fileobj=io.BytesIO(run_bytes("dpkg-deb", "--fsys-tarfile", deb))) as archive:
        for member in archive:
            assert (member.uid, member.gid, member.uname) == (0, 0, "root")
            assert member.mode in ((0o755,) if member.isdir() else (0o755, 0o644)), member.name


def run_bytes(*command: str | Path) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def test_the_client_runs_from_the_package(unpacked: Path) -> None:
    launcher = (unpacked / "usr/bin/updater").read_text()
    assert launcher.startswith("#!/usr/bin/python3 -sP\n")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import updater.cli; print(updater.cli.__file__); sys.exit(updater.cli.main())"  # noqa: E501
    library = unpacked / "usr/lib/python3/dist-packages"
    done = run(sys.executable, "-IB", "-c", code, library, "status", check=False)
    assert done.stdout.startswith(str(library))
    assert done.returncode == 1
    assert "updater.toml: cannot read the configuration" in done.stderr


def test_dpkg_installs_and_removes_it(deb: Path, tmp_path: Path) -> None:
    """With a dpkg database of its own: maintainer scripts run, nothing is left but a conffile."""
    if os.geteuid() != 0:
        pytest.skip("dpkg runs maintainer scripts as root only")
    for name in ("updates", "info"):
        (tmp_path / "var/lib/dpkg" / name).mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").touch()
    dpkg = ("dpkg", f"--root={tmp_path}", "--force-depends", "--force-script-chrootless")
    run(*dpkg, "-i", deb)
    assert (tmp_path / "usr/bin/updater").is_file()
    run(*dpkg, "-r", "updater")
    assert not (tmp_path / "usr/bin/updater").exists()
    assert (tmp_path / "etc/init.d/updater").exists()
    run(*dpkg, "--purge", "updater")
    assert not (tmp_path / "etc/init.d/updater").exists()


SCRIPTS = [
    *sorted((PACKAGE_DIR / "control").glob("p*")),
    PACKAGE_DIR / "root/etc/init.d/updater",
    PACKAGE_DIR / "root/usr/lib/updater/at-boot",
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(path: Path) -> None:
    run("sh", "-n", path)
    assert path.stat().st_mode & 0o111 == 0o111


def test_units_are_valid(unpacked: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")
    units = sorted((unpacked / "usr/lib/systemd/system").glob("*.service"))
    assert [unit.name for unit in units] == ["updater-resume.service", "updater.service"]
    done = run("systemd-analyze", "verify", "--man=no", *units, check=False)
    complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert complaints == []
    for unit in units:
        broken = unpacked / "broken.service"
        broken.write_text(unit.read_text().replace("ExecStart=", "ExecStrat="))
        assert "Unknown key" in run("systemd-analyze", "verify", broken, check=False).stderr


class Service:
    """The init script with its paths below a folder, and clients that do as told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        text = (PACKAGE_DIR / "root/etc/init.d/updater").read_text()
        for path, name in (
            ("/usr/bin/updater", "updater"),
            ("/etc/updater/updater.toml", "updater.toml"),
            ("/run/updater.pid", "updater.pid"),
            ("/var/log/updater.log", "updater.log"),
            ("/usr/lib/updater/at-boot", "at-boot"),
        ):
            assert path in text
            text = text.replace(path, str(root / name))
        self.script = self._write("init", text)
        self._write("at-boot", f"#!/bin/sh\necho at-boot >> {root}/calls\n")
        self._write("updater", '#!/bin/sh\necho "daemon: $*" >&2\nexec sleep 300\n')
        self.configure('[server]\nurl = "https://x"\n')

    def _write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def configure(self, text: str) -> None:
        (self.root / "updater.toml").write_text(text)

    def wait_for_log(self) -> None:
        """Until the daemon said what it was called with: it is started in the background."""
        pause = threading.Event()
        for _ in range(300):
            log = self.root / "updater.log"
            if log.exists() and "daemon: daemon" in log.read_text():
                return
            pause.wait(0.1)
        raise AssertionError("the daemon was not started within 30 s")

    def __call__(self, verb: str) -> int:
        return run("sh", self.script, verb, check=False).returncode


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    if shutil.which("start-stop-daemon", path=SBIN["PATH"]) is None:
        pytest.skip("start-stop-daemon is missing: apt-get install dpkg")
    service = Service(tmp_path)
    yield service
    service("stop")


def test_the_init_script_starts_and_stops_the_daemon(service: Service) -> None:
    assert service("status") == 3
    assert service("start") == 0
    pid = int((service.root / "updater.pid").read_text())
    service.wait_for_log()
    assert service("status") == 0
    assert service("start") == 0
    assert int((service.root / "updater.pid").read_text()) == pid
    assert (service.root / "calls").read_text() == "at-boot\nat-boot\n"
    assert service("restart") == 0
    again = int((service.root / "updater.pid").read_text())
    assert again != pid
    service.wait_for_log()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert service("stop") == 0
    assert service("status") == 3
    assert service("stop") == 0
    assert service("dance") == 2


def test_without_a_server_only_the_boots_work_is_done(service: Service) -> None:
    service.configure('device_type = "x"\n')
    assert service("start") == 0
    assert service("status") == 3
    assert (service.root / "calls").read_text() == "at-boot\n"
    (service.root / "updater.toml").unlink()
    assert service("start") == 0
    assert (service.root / "calls").read_text() == "at-boot\n"


@pytest.mark.parametrize(("code", "restarts"), [(0, False), (1, False), (4, True)])
def test_a_boot_restarts_the_device_only_on_exit_code_4(
    tmp_path: Path, code: int, restarts: bool
) -> None:
    for name, text in (("updater", f"exit {code}"), ("reboot", f"echo > {tmp_path}/restarted"),
                       ("sync", ":")):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    text = (PACKAGE_DIR / "root/usr/lib/updater/at-boot").read_text()
    assert "\nPATH=/usr/sbin" in text
    script = tmp_path / "at-boot"
    script.write_text(text.replace("PATH=/usr/sbin", f"PATH={tmp_path}:/usr/sbin"))
    done = run("sh", script, check=False)
    assert (tmp_path / "restarted").exists() == restarts
    assert done.returncode == (0 if restarts else code)


def test_an_image_gets_what_the_package_holds(
    unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is no pyproject.toml to take a version from."""

    def no_version() -> str:
        raise ImageError("no pyproject.toml")

    monkeypatch.setattr(deb_module, "package_version", no_version)
    install_client(tmp_path / "root", REPOSITORY / "updater", 1_700_000_000)
    held = [
        {
            str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode)
            for path in root.rglob("*")
            if path.is_file()
        }
        for root in (unpacked, tmp_path / "root")
    ]
    held[0].pop("broken.service", None)
    assert held[0] == held[1]


def test_a_tree_without_a_client_makes_no_package(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="there is no update client"):
        build_deb(tmp_path / "out", updater=tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_wheel_is_complete_and_the_same_every_time(tmp_path: Path) -> None:
    wheels = []
    for name in ("one", "two"):
        # A copy, because setuptools leaves a build folder behind.
        source = tmp_path / name
        source.mkdir()
        for part in ("updater", "framework", "images"):
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(REPOSITORY / part, source / part, symlinks=True, ignore=ignore)
        for part in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / part, source)
        out = tmp_path / f"{name}-out"
        done = subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--no-index", "--wheel-dir", out, source],
            check=False, capture_output=True, text=True,
            env={**SBIN, "SOURCE_DATE_EPOCH": "1700000000"}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        wheels += list(out.glob("*.whl"))
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    with zipfile.ZipFile(wheels[0]) as archive:
        names = set(archive.namelist())
    for name, _ in client_files(REPOSITORY / "updater"):
        assert f"updater/{name}" in names
    for name in ("framework/cli.py", "images/locks/arm64.lock", "framework/report/report.html.j2"):
        assert name in names
