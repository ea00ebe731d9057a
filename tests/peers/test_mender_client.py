"""Debian's own `mender-client` 3.4 updates from our server: the real peer, unchanged.

The client runs as a daemon in a root directory of its own (chroot: its paths are built in), with
only what it needs copied there; it speaks TLS to a server of ours on the loopback. Payloads go to
an update module of the test's. A root file system needs a bootloader: test_mender_guest.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.network import FaultProxy, NetworkFault
from updater.artifact import ArtifactReader

sys.path.insert(0, str(Path(__file__).parents[1] / "updater_server"))
from updater_server_world import World, world

# .ci/bootstrap unpacks the package there: installing it would start a service.
MENDER = Path(__file__).parents[2] / "build" / "peers" / "mender-client" / "usr" / "bin" / "mender"
DEVICE_TYPE = "peer-board"
_PROGRAMS = ("sh", "cat", "cp", "mkdir", "rm", "ls", "sleep", "grep")
_INVENTORY = """#!/bin/sh
echo kernel=6.1-peer
echo ip=1
echo ip=2
"""
_MODULE = """#!/bin/sh
case "$1" in
    NeedsArtifactReboot) echo No ;;
    SupportsRollback) echo Yes ;;
    ArtifactInstall)
        sleep 1
        if grep -q "^fail" "$2"/files/note; then echo "the note says fail" >&2; exit 1; fi
        cp "$2"/files/note /installed ;;
    ArtifactRollback) rm -f /installed ;;
esac
exit 0
"""


def why_not() -> str:
    """Why the peer can't run here; empty if it can."""
    if not MENDER.exists():
        return "Debian's mender-client is not unpacked (.ci/bootstrap does it)"
    if os.getuid() != 0:
        return "the client's fixed paths need a chroot, which needs root"
    if not shutil.which("mender-artifact"):
        return "mender-artifact is missing (apt-get install mender-artifact)"
    if not hasattr(ArtifactReader, "files"):
        return "the artifact reader takes no update modules yet"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")


@pytest.fixture(autouse=True)
def long_ones_when_asked(request: pytest.FixtureRequest) -> None:
    expression = request.config.option.markexpr
    if request.node.get_closest_marker("server_night") and "server_night" not in expression:
        pytest.skip("long: make server-night")


class Client:
    """The daemon in its own root directory."""

    def __init__(self, root: Path, there: World, url: str) -> None:
        self.root = root
        for program in (MENDER, *(Path(shutil.which(name) or name) for name in _PROGRAMS)):
            _copy_program(program, root)
        for folder in ("etc/mender", "dev", "tmp", "var/lib/mender", "usr/share/mender/modules/v3"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        os.mknod(root / "dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.mknod(root / "dev/urandom", 0o666 | stat.S_IFCHR, os.makedev(1, 9))
        etc = root / "etc/mender"
        shutil.copy(there.folder / "ca.pem", etc / "server-ca.pem")
        (etc / "artifact_info").write_text("artifact_name=original\n")
        (root / "var/lib/mender/device_type").write_text(f"device_type={DEVICE_TYPE}\n")
        settings = {
            "ServerURL": url,
            "ServerCertificate": "/etc/mender/server-ca.pem",
            "UpdatePollIntervalSeconds": 1,
            "InventoryPollIntervalSeconds": 1,
            "RetryPollIntervalSeconds": 1,
            "DBus": {"Enabled": False},
        }
        (etc / "mender.conf").write_text(json.dumps(settings))
        scripts = {
            "identity/mender-device-identity": "#!/bin/sh\necho mac=52:54:00:be:ef:01\n",
            "inventory/mender-inventory-peer": _INVENTORY,
            "modules/v3/note": _MODULE,
        }
        for name, text in scripts.items():
            path = root / "usr/share/mender" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self._log = (root / "log").open("wb")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["/usr/bin/mender", "--no-syslog", "--log-level", "debug", "daemon"]
        self._process = subprocess.Popen(
            ["chroot", self.root, *command], stdout=self._log, stderr=self._log
        )

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def installed(self) -> str:
        path = self.root / "installed"
        return path.read_text() if path.exists() else ""

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")


def _copy_program(program: Path, root: Path) -> None:
    target = root / ("usr/bin/mender" if program == MENDER else f"bin/{program.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program.resolve(), target)
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    for word in listed.split():
        if word.startswith("/"):
            library = root / word[1:]
            library.parent.mkdir(parents=True, exist_ok=True)
            if not library.exists():
                shutil.copy(Path(word).resolve(), library)


def note(folder: Path, name: str, text: str) -> Path:
    """An artifact for the module, made by Debian's mender-artifact."""
    (folder / "note").write_text(text)
    path = folder / f"{name}.mender"
    command = ["mender-artifact", "write", "module-image", "-T", "note", "-n", name]
    command += ["-t", DEVICE_TYPE, "-o", str(path), "-f", str(folder / "note")]
    command += ["--compression", "none"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def wait_until(
    condition: Callable[[], Any], what: str, client: Client, limit_s: float = 90
) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}; the client said:\n{client.log()[-3000:]}"
        time.sleep(0.1)


@contextlib.contextmanager
def peer(tmp_path: Path, *, proxied: bool = False) -> Iterator[tuple[World, Client, Any]]:
    """Server, client (started) and, if asked for, a proxy between them."""
    port_holder: dict[str, Any] = {}
    with world(tmp_path / "server") as there, contextlib.ExitStack() as stack:
        port = there.port
        if proxied:
            proxy = stack.enter_context(FaultProxy(("127.0.0.1", there.port)))
            port = proxy.port
            port_holder["proxy"] = proxy
        root = tmp_path / "root"
        client = Client(root, there, f"https://127.0.0.1:{port}")
        stack.callback(client.stop)
        client.start()
        yield there, client, port_holder.get("proxy")


def accept(there: World, client: Client) -> str:
    def pending() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = there.admin.get("/devices").json()["devices"]
        return found

    wait_until(pending, "the client asked for nothing", client)
    (device,) = pending()
    assert device["identity"] == {"mac": "52:54:00:be:ef:01"}
    assert device["status"] == "pending"
    assert there.admin.post(f"/devices/{device['id']}/accept").status_code == 204
    return str(device["id"])


@pytest.mark.slow
def test_the_real_client_is_accepted_updates_commits_and_fails_with_its_log(
    tmp_path: Path,
) -> None:
    with peer(tmp_path) as (there, client, _):
        device_id = accept(there, client)

        def inventory() -> dict[str, Any]:
            shown: dict[str, Any] = there.admin.get(f"/devices/{device_id}").json()["inventory"]
            return shown

        wait_until(lambda: inventory().get("kernel") == "6.1-peer", "no inventory", client)
        assert inventory()["ip"] == ["1", "2"]
        assert inventory()["artifact_name"] == "original"

        # Update of a module payload, to its commit.
        assert there.upload(note(tmp_path, "hello", "hello\n")).status_code == 201
        good = there.deploy("hello")
        wait_until(
            lambda: there.deployment(good)["status"] == "finished", "no end of the update", client
        )
        assert there.deployment(good)["counts"] == {"success": 1}
        assert client.installed == "hello\n"
        history = there.admin.get(f"/devices/{device_id}").json()["history"]
        assert [e["status"] for e in history[0]["events"]] == [
            "downloading",
            "installing",
            "success",
        ]
        wait_until(lambda: inventory()["artifact_name"] == "hello", "old inventory", client)

        # A failure comes with its log.
        assert there.upload(note(tmp_path, "bad", "fail\n")).status_code == 201
        bad = there.deploy("bad")
        wait_until(lambda: there.deployment(bad)["counts"].get("failure"), "no failure", client)
        # It reports first and sends the log after that.
        place = f"/deployments/{bad}/devices/{device_id}/log"
        wait_until(lambda: there.admin.get(place).status_code == 200, "no log", client)
        messages = there.admin.get(place).json()["messages"]
        assert any("the note says fail" in m["message"] for m in messages)
        # The module rolled back what its broken update had not replaced.
        assert there.admin.get(f"/devices/{device_id}").json()["last_failure"]["cause"]

        # Aborted in the middle: the client gives up at its next report.
        (tmp_path / "slow").mkdir()
        assert there.upload(note(tmp_path / "slow", "slow", "x" * 100)).status_code == 201
        aborted = there.deploy("slow")
        wait_until(
            lambda: there.deployment(aborted)["in_progress"], "the client began nothing", client
        )
        assert there.admin.post(f"/deployments/{aborted}/abort").status_code == 204
        wait_until(lambda: "409" in client.log() or "aborted" in client.log(), "no 409", client)
        assert there.deployment(aborted)["counts"] == {"aborted": 1}


@pytest.mark.server_night
def test_the_real_client_resumes_a_download_that_was_cut(tmp_path: Path) -> None:
    with peer(tmp_path, proxied=True) as (there, client, proxy):
        accept(there, client)
        artifact = note(tmp_path, "big", "y" * 3_000_000)
        assert there.upload(artifact).status_code == 201
        proxy.arm(NetworkFault("reset", at_byte=2_000_000))
        deployment = there.deploy("big")
        # Its first retry comes a minute later.
        wait_until(
            lambda: there.deployment(deployment)["status"] == "finished", "no end", client, 300
        )
        assert there.deployment(deployment)["counts"] == {"success": 1}
        assert client.installed == "y" * 3_000_000
        assert "resum" in client.log().lower()
