"""What `make server` prints is followed to the letter: a QEMU device is connected and updates.

The block between the device's prompt and "Then accept it" is pasted into the console that
`make device` opens; the two commands for an update are run as they stand. Nothing else is known.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pexpect
import pytest
from test_crash_safety import server_process
from updater_server_world import Clock, World

from updater.server.settings import load_settings

ROOT = Path(__file__).parents[2]
LIMIT_S = 300


@pytest.mark.emulated
@pytest.mark.server_night
def test_a_qemu_device_is_connected_by_the_printed_text_and_updates(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    names = ["--name", "localhost", "--name", "127.0.0.1", "--name", "10.0.2.2"]
    said = subprocess.run(
        [sys.executable, "-m", "updater.cli", "server", "init", folder, *names, "--port", "18443"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    password = said.split("password: ")[1].split()[0]
    pasted = said.split("from then on):\n\n")[1].split("\n\nThen accept it")[0]
    update = said.split("An update for it:\n\n")[1].split("\n\nuploaded")[0]
    with server_process(folder) as server:
        there = signed_in(folder, server.url, password)
        boot = [sys.executable, "-m", "images", "boot", "qemu-arm64"]
        log = (tmp_path / "console").open("wb")
        console: Any = pexpect.spawn(
            shlex.join([*boot, "--disk", str(tmp_path / "device.img")]),
            cwd=ROOT, timeout=LIMIT_S, logfile=log,
        )  # fmt: skip
        try:
            console.expect("BROWNOUT READY version=v1 slot=a")
            console.expect("root@brownout:~# ")
            for line in pasted.splitlines():
                console.sendline(line)
                console.expect("\n")
            pending = devices(there, LIMIT_S)
            (device,) = pending
            assert device["status"] == "pending"
            there.admin.post(f"/devices/{device['id']}/accept").raise_for_status()
            subprocess.run(update, shell=True, check=True, cwd=ROOT, capture_output=True)
            assert there.upload(ROOT / "build" / "v2.mender").status_code == 201
            deployment = there.deploy("v2", target={"devices": [device["id"]]})
            console.expect("BROWNOUT READY version=v2 slot=b")
            end = time.monotonic() + LIMIT_S
            while there.deployment(deployment)["status"] != "finished":
                assert time.monotonic() < end, there.deployment(deployment)
                time.sleep(0.5)
            assert there.deployment(deployment)["counts"] == {"success": 1}
            console.send("\x01x")
            console.expect(pexpect.EOF)
        finally:
            console.close(force=True)
            log.close()
            there.close()
    assert load_settings(folder).port == 18443


def signed_in(folder: Path, url: str, password: str) -> World:
    """An operator with the password that was printed."""
    import ssl

    there = World.__new__(World)
    there.folder, there.url, there.clock = folder, url, Clock()
    there.context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    there._clients = []
    there.admin = there.client()
    there.admin.base_url = httpx.URL(f"{url}/api/management/v1")
    token = there.admin.post("/login", json={"name": "admin", "password": password}).json()["token"]
    there.admin.headers["Authorization"] = f"Bearer {token}"
    return there


def devices(there: World, limit_s: float) -> list[dict[str, Any]]:
    """Those that called, once one did."""
    end = time.monotonic() + limit_s
    while True:
        found: list[dict[str, Any]] = there.admin.get("/devices").json()["devices"]
        if found:
            return found
        assert time.monotonic() < end, "no device called"
        time.sleep(0.5)
