"""Debian's own `mender-client` 3.4 in a guest, up to an A/B update of its root file system.

The real peer on the x86-64 target (QEMU, GRUB, real disks and reboots) against a server of ours:
accepted, its inventory, a module's payload, a failure with its log, an abort; then the root file
system, downloaded (in the long test through a proxy that cuts the connection), written to the
other slot, booted, committed. What makes the images a Mender device: tests/peers/mender_guest.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.network.proxy import FaultProxy, NetworkFault
from framework.targets.rig import load_rig
from images import build_target

sys.path.insert(0, str(Path(__file__).parents[1] / "updater_server"))
from mender_guest import DEVICE_TYPE, HOST, MAC, Guest, build_disk, build_rootfs
from test_mender_client import MENDER, why_not
from updater_server_world import World, world

RIG = Path(__file__).parents[2] / "rigs" / "qemu-x86_64.yaml"
LIMIT_S = 180.0
#: 3.4 says "installing" once more before it commits.
REPORTED = ["downloading", "installing", "rebooting", "installing", "success"]

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs"),
]


class Files:
    """Disk and artifacts of the guest."""

    def __init__(self, folder: Path) -> None:
        images = build_target(DEVICE_TYPE, ("v1", "v2"))
        self.folder = folder
        self.disk = folder / "disk.img"
        build_rootfs(images.rootfs("v1"), "v1", MENDER, folder / "v1.img")
        build_disk(images, folder / "v1.img", self.disk)
        (folder / "v1.img").unlink()
        build_rootfs(images.rootfs("v2"), "v2", MENDER, folder / "v2.img")
        self.rootfs = self._artifact("rootfs-image", "v2", folder / "v2.img")
        (folder / "v2.img").unlink()

    def note(self, name: str, text: str) -> Path:
        """An artifact for the update module."""
        place = self.folder / name / "note"
        place.parent.mkdir()
        place.write_text(text)
        return self._artifact("module-image", name, place, "-T", "note")

    def _artifact(self, kind: str, name: str, payload: Path, *options: str) -> Path:
        path = self.folder / f"{name}.mender"
        subprocess.run(
            ["mender-artifact", "write", kind, "-t", DEVICE_TYPE, "-n", name, "-f", payload,
             "-o", path, "--compression", "none" if options else "gzip", *options],
            check=True, capture_output=True,
        )  # fmt: skip
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def there(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "server", names=["localhost", "127.0.0.1", HOST]) as running:
        yield running


@pytest.fixture
def guest(files: Files) -> Iterator[Guest]:
    environment = load_rig(RIG)
    target = environment.get_target()
    assert target is not None
    strategy = target.get_strategy()
    running = Guest(strategy, files.disk)
    yield running
    running.close()
    environment.cleanup()
    strategy.power.close()


def wait_until(
    condition: Callable[[], Any], what: str, guest: Guest, limit_s: float = LIMIT_S
) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"{what}; the client said:\n{guest.log()[-4000:]}"
        time.sleep(0.2)


def accept(there: World, guest: Guest) -> str:
    def pending() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = there.admin.get("/devices").json()["devices"]
        return found

    wait_until(pending, "the client asked for nothing", guest)
    (device,) = pending()
    assert (device["identity"], device["status"]) == ({"mac": MAC}, "pending")
    assert there.admin.post(f"/devices/{device['id']}/accept").status_code == 204
    return str(device["id"])


def events(there: World, device_id: str) -> list[str]:
    """What the device reported in its newest deployment."""
    history = there.admin.get(f"/devices/{device_id}").json()["history"]
    return [event["status"] for event in history[0]["events"]]


def update_of_the_root_file_system(
    there: World, guest: Guest, files: Files, device_id: str
) -> None:
    """From slot a to slot b and committed, as the server and the disk's variables tell it."""
    assert guest.slot == "a"
    assert guest.environment()["mender_boot_part"] == "2"
    since = guest.strategy.pump.position
    assert there.upload(files.rootfs).status_code == 201
    deployment = there.deploy("v2")
    boot = guest.strategy.await_boot(since, LIMIT_S)
    assert boot.ready and boot.boot is not None, boot
    assert (boot.boot.version, boot.boot.slot) == ("v2", "b")
    wait_until(lambda: there.deployment(deployment)["status"] == "finished", "no end", guest)
    assert there.deployment(deployment)["counts"] == {"success": 1}
    assert events(there, device_id) == REPORTED
    variables = guest.environment()
    assert (variables["mender_boot_part"], variables["upgrade_available"]) == ("3", "0")
    # Committed: the next start, with nobody's help, is the new system again.
    guest.strategy.transition("off")
    again = guest.strategy.boot()
    assert again.boot is not None
    assert (again.boot.version, again.boot.slot) == ("v2", "b")


def test_the_real_client_updates_its_root_file_system_and_commits(
    there: World, guest: Guest, files: Files
) -> None:
    guest.start(there.port, there.folder / "ca.pem")
    device_id = accept(there, guest)
    update_of_the_root_file_system(there, guest, files, device_id)


@pytest.mark.server_night
def test_the_real_client_goes_through_everything_in_a_guest(
    there: World, guest: Guest, files: Files
) -> None:
    with FaultProxy(("127.0.0.1", there.port)) as proxy:
        guest.start(proxy.port, there.folder / "ca.pem")
        device_id = accept(there, guest)

        def shown() -> dict[str, Any]:
            device: dict[str, Any] = there.admin.get(f"/devices/{device_id}").json()
            return device

        wait_until(lambda: shown()["inventory"].get("ip") == ["1", "2"], "no inventory", guest)
        assert shown()["inventory"]["kernel"].startswith("6.1.")
        assert shown()["inventory"]["device_type"] == DEVICE_TYPE
        assert shown()["inventory"]["artifact_name"] == "v1"

        # A module's payload, to its commit.
        assert there.upload(files.note("hello", "hello\n")).status_code == 201
        good = there.deploy("hello")
        wait_until(lambda: there.deployment(good)["status"] == "finished", "no end", guest)
        assert there.deployment(good)["counts"] == {"success": 1}
        assert guest.read("/data/installed") == "hello"

        # A failure comes with its log, and with a cause to show.
        assert there.upload(files.note("bad", "fail\n")).status_code == 201
        bad = there.deploy("bad")
        wait_until(lambda: there.deployment(bad)["counts"].get("failure"), "no failure", guest)
        # It reports first and sends the log after that.
        place = f"/deployments/{bad}/devices/{device_id}/log"
        wait_until(lambda: there.admin.get(place).status_code == 200, "no log", guest)
        messages = there.admin.get(place).json()["messages"]
        assert any("the note says fail" in message["message"] for message in messages)
        assert shown()["last_failure"]["cause"]

        # Aborted in the middle: the client gives up at its next report.
        assert there.upload(files.note("slow", "x" * 100)).status_code == 201
        aborted = there.deploy("slow")
        wait_until(lambda: there.deployment(aborted)["in_progress"], "nothing began", guest)
        assert there.admin.post(f"/deployments/{aborted}/abort").status_code == 204
        wait_until(lambda: "abort" in guest.log().lower(), "the client went on", guest)
        assert there.deployment(aborted)["counts"] == {"aborted": 1}

        # The root file system, whose download is cut in the middle; a minute later it goes on.
        size = files.rootfs.stat().st_size
        proxy.arm(NetworkFault("reset", at_byte=size // 2))
        update_of_the_root_file_system(there, guest, files, device_id)
        assert "resum" in guest.read("/data/mender.log").lower()
