"""A real management server beside the rig: `updater server run` in a process of its own.

It has a folder of its own, an admin, and the certificate that the images trust. What a scenario
asks of it goes through the management API, as an operator's tools do; what it was told by the
device is a witness of the verdict. It dies with the process that started it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import selectors
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from attrs import define
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from framework.targets.uut import UutError, make_management

SERVER_NAME = "updates.brownout.test"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
# QEMU's first network card (its manual, "-nic"): the identity of a device without a script.
IDENTITY = {"mac": "52:54:00:12:34:56"}
_LISTENING = re.compile(rb"listening on https://[^\s:]+:(\d+)\s")


@define
class Enrolment:
    """A device that the server accepts: its id there, and its private key as PEM."""

    device_id: str
    key_pem: str


class ManagementServer:
    """The server, running; a context manager.

    Raises UutError when it does not start.
    """

    def __init__(self, folder: Path, keys: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        password = make_management(folder, SERVER_NAME, keys / "artifact.pem")
        # The images trust the rig's authority, not one that was made a second ago.
        for name in ("server.pem", "server.key"):
            shutil.copyfile(keys / name, folder / name)
        self._folder = folder
        self._log = folder / "log"
        self._process = self._run(folder)
        try:
            self.port = self._await_port()
            self._api = httpx.Client(
                base_url=f"https://127.0.0.1:{self.port}/api",
                verify=ssl.create_default_context(cafile=str(keys / "ca.pem")),
                timeout=60.0,
            )
            login = {"name": "admin", "password": password}
            token = self._call("POST", "/login", json=login)["token"]
            self._api.headers["Authorization"] = f"Bearer {token}"
        except BaseException:
            self.close()
            raise
        self._uploaded: set[Path] = set()

    def close(self) -> None:
        """Stop it, and remove its folder."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """What a device calls it."""
        return f"https://{SERVER_NAME}:{self.port}"

    def enrol(self) -> Enrolment:
        """Accept the rig's device with a new key; whatever it was known by before is forgotten."""
        for device in self._call("GET", "/devices", params={"limit": 500})["devices"]:
            self._call("DELETE", f"/devices/{device['id']}")
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        body = {"identity": IDENTITY, "pubkey": public.decode()}
        device_id = self._call("POST", "/devices", json=body)["id"]
        self._first_contact(key, public)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Enrolment(str(device_id), private.decode())

    def deploy(self, artifact: Path, name: str, device_id: str) -> str:
        """Make a deployment of `artifact`, called `name`, to the device; return its id."""
        if artifact not in self._uploaded:
            with artifact.open("rb") as file:
                self._call(
                    "POST",
                    "/artifacts",
                    content=iter(lambda: file.read(1 << 20), b""),
                    headers={
                        "Content-Type": "application/octet-stream",
                        "Content-Length": str(artifact.stat().st_size),
                    },
                )
            self._uploaded.add(artifact)
        body = {"name": name, "artifact_name": name, "target": {"devices": [device_id]}}
        return str(self._call("POST", "/deployments", json=body)["id"])

    def told(self, deployment_id: str) -> tuple[str, str]:
        """What the device told: its status in the deployment, and the cause of a failure."""
        (entry,) = self._call("GET", f"/deployments/{deployment_id}/devices")
        return str(entry["status"]), str(entry["cause"] or "")

    # -- inside ------------------------------------------------------------------------------

    def _run(self, folder: Path) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                # Whatever ends this process ends the server.
                ["setpriv", "--pdeathsig", "KILL", "--"]  # noqa: RUF005 - one line a program
                + [sys.executable, "-m", "updater.cli", "server", "run", str(folder)],
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def _await_port(self) -> int:
        """Read the line that says where it listens."""
        assert self._process.stdout is not None
        said = b""
        end = time.monotonic() + START_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while (found := _LISTENING.search(said)) is None:
                if not selector.select(max(0.0, end - time.monotonic())):
                    break
                piece = self._process.stdout.read1(4096)  # type: ignore[attr-defined]
                if not piece:
                    break
                said += piece
        if found is None:
            with contextlib.suppress(OSError):
                said += self._log.read_bytes()[-400:]
            raise UutError(f"the management server did not start: {said.decode(errors='replace')}")
        return int(found[1])

    def _first_contact(self, key: Ed25519PrivateKey, public: bytes) -> None:
        """Authenticate once as the device, as at the factory: from then on it can be a target."""
        body = {"id_data": json.dumps(IDENTITY), "tenant_token": "", "pubkey": public.decode()}
        content = json.dumps(body).encode()
        signature = base64.b64encode(key.sign(content)).decode()
        answer = self._api.post(
            "/devices/v1/authentication/auth_requests",
            content=content,
            headers={"X-MEN-Signature": signature, "Content-Type": "application/json"},
        )
        if answer.status_code != 200:
            raise UutError(f"the device is not accepted: {answer.status_code} {answer.text}")

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            answer = self._api.request(method, f"/management/v1{path}", **kwargs)
        except httpx.HTTPError as error:
            raise UutError(f"the management server: {method} {path}: {error}") from error
        if answer.status_code >= 400:
            raise UutError(f"{method} {path}: {answer.status_code} {answer.text[:400]}")
        return answer.json() if answer.content else None
