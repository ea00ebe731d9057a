"""A real server over TLS in this process, a clock that tests turn, and devices that speak to it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pwd
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from sqlalchemy.orm import Session

from updater.artifact import write_artifact
from updater.server import accounts
from updater.server.app import create_app
from updater.server.core import Core, open_core
from updater.server.jobs import one_round
from updater.server.models import Base, User
from updater.server.run import ServerThread, set_up_logging
from updater.server.settings import load_settings
from updater.server.setup import initialise

DEVICE_TYPE = "test-board"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class Clock:
    """The server's clock: it stands still until a test turns it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class World:
    """One running server: its address, its admin, its core for looking inside."""

    def __init__(self, folder: Path, port: int, core: Core, clock: Clock, password: str) -> None:
        self.folder = folder
        self.port = port
        self.core = core
        self.clock = clock
        self.password = password
        self.url = f"https://localhost:{port}"
        self.context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        self._clients: list[httpx.Client] = []
        self.admin = self.client()
        self.admin.base_url = httpx.URL(f"{self.url}/api/management/v1")
        self.reset()

    def reset(self) -> None:
        """Empty the database and the store; a fresh admin session, by no slow login."""
        now = self.clock.now = time.time()

        def job(session: Session) -> str:
            admin = session.query(User).filter_by(name="admin").one()
            row = (admin.id, admin.password)
            for table in reversed(Base.metadata.sorted_tables):
                session.execute(table.delete())
            session.expunge_all()
            session.add(
                User(id=row[0], name="admin", password=row[1], role="admin", created_at=now)
            )
            session.flush()
            return accounts.grant(session, row[0], accounts.SESSION, "test", now, 1e6)

        secret = self.core.database.write_now(job)
        self.admin.headers["Authorization"] = f"Bearer {secret}"
        self.core.seen.clear()
        for path in self.core.settings.artifacts.rglob("*.*"):
            path.unlink()

    def client(self, **headers: str) -> httpx.Client:
        client = httpx.Client(base_url=self.url, verify=self.context, headers=headers, timeout=20.0)
        self._clients.append(client)
        return client

    def user(self, name: str, password: str) -> httpx.Client:
        """Log in; the client's paths begin at the management API."""
        client = self.client()
        client.base_url = httpx.URL(f"{self.url}/api/management/v1")
        answer = client.post("/login", json={"name": name, "password": password})
        assert answer.status_code == 200, answer.text
        client.headers["Authorization"] = f"Bearer {answer.json()['token']}"
        return client

    def device(self, name: str = "d1", key: PrivateKey | None = None) -> TestDevice:
        return TestDevice(self, {"mac": name}, key or ec.generate_private_key(ec.SECP256R1()))

    def accepted(self, name: str = "d1", artifact: str = "v1") -> TestDevice:
        """A device that was accepted, authenticated and sent its inventory."""
        device = self.device(name)
        assert device.authenticate().status_code == 401
        device_id = self.device_id(name)
        assert self.admin.post(f"/devices/{device_id}/accept").status_code == 204
        assert device.authenticate().status_code == 200
        device.id = device_id
        device.artifact = artifact
        assert device.send_inventory().status_code == 200
        return device

    def device_id(self, name: str) -> str:
        found = self.admin.get("/devices", params={"limit": 500}).json()["devices"]
        return str(next(d["id"] for d in found if d["identity"] == {"mac": name}))

    def upload(self, path: Path) -> httpx.Response:
        return self.admin.post(
            "/artifacts",
            content=path.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )

    def deploy(self, artifact: str, **options: Any) -> str:
        body = {"name": artifact, "artifact_name": artifact, "target": {"all": True}, **options}
        answer = self.admin.post("/deployments", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def deployment(self, deployment_id: str) -> dict[str, Any]:
        answer = self.admin.get(f"/deployments/{deployment_id}")
        assert answer.status_code == 200
        result: dict[str, Any] = answer.json()
        return result

    async def tick(self) -> bool:
        return await one_round(self.core)

    def close(self) -> None:
        for client in self._clients:
            client.close()


class TestDevice:
    """A device as the device API sees it: a key, a token, the artifact it runs."""

    __test__ = False

    def __init__(self, world: World, identity: dict[str, str], key: PrivateKey) -> None:
        self.identity = identity
        self.key = key
        self.id = ""
        self.artifact = "v1"
        self._world = world
        self.client = world.client()
        self.client.base_url = httpx.URL(f"{world.url}/api/devices")

    def auth_body(self) -> bytes:
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        body = {
            "id_data": json.dumps(self.identity),
            "tenant_token": "",
            "pubkey": public.decode(),
        }
        return json.dumps(body).encode() + b"\n"

    def sign(self, body: bytes) -> str:
        if isinstance(self.key, ed25519.Ed25519PrivateKey):
            raw = self.key.sign(body)
        elif isinstance(self.key, rsa.RSAPrivateKey):
            raw = self.key.sign(body, padding.PKCS1v15(), hashes.SHA256())
        else:
            raw = self.key.sign(body, ec.ECDSA(hashes.SHA256()))
        return base64.b64encode(raw).decode()

    def authenticate(
        self, body: bytes | None = None, signature: str | None = None
    ) -> httpx.Response:
        body = self.auth_body() if body is None else body
        answer = self.client.post(
            "/v1/authentication/auth_requests",
            content=body,
            headers={
                "X-MEN-Signature": self.sign(body) if signature is None else signature,
                "Content-Type": "application/json",
                # 3.4 sends the tenant token here too.
                "Authorization": "Bearer tenant",
            },
        )
        if answer.status_code == 200:
            self.client.headers["Authorization"] = f"Bearer {answer.text}"
        return answer

    def send_inventory(self, **more: str | list[str]) -> httpx.Response:
        values = {"device_type": DEVICE_TYPE, "artifact_name": self.artifact, **more}
        return self.client.put(
            "/v1/inventory/device/attributes",
            # In pieces, as 3.4 sends its bodies: Transfer-Encoding: chunked.
            content=_in_pieces([{"name": n, "value": v} for n, v in values.items()]),
            headers={"Content-Type": "application/json"},
        )

    def next(self, **provides: str) -> httpx.Response:
        return self.client.post(
            "/v2/deployments/device/deployments/next",
            content=_in_pieces(
                {
                    "device_provides": {
                        "artifact_name": self.artifact,
                        "device_type": DEVICE_TYPE,
                        **provides,
                    },
                    "update_control_map": True,
                }
            ),
            headers={"Content-Type": "application/json"},
        )

    def report(self, deployment_id: str, status: str, substate: str = "") -> int:
        body = {"status": status, **({"substate": substate} if substate else {})}
        return self.client.put(
            f"/v1/deployments/device/deployments/{deployment_id}/status", json=body
        ).status_code

    def send_log(self, deployment_id: str, messages: list[dict[str, str]]) -> httpx.Response:
        return self.client.put(
            f"/v1/deployments/device/deployments/{deployment_id}/log", json={"messages": messages}
        )

    def update(self, deployment_id: str, *, ends: str = "success", cause: str = "") -> None:
        """Go through a deployment as a client does."""
        offered = self.next()
        assert offered.status_code == 200, offered.text
        assert offered.json()["id"] == deployment_id
        for status in ("downloading", "installing", "rebooting"):
            assert self.report(deployment_id, status) == 204
        assert self.report(deployment_id, ends, cause) == 204
        if ends == "success":
            self.artifact = offered.json()["artifact"]["artifact_name"]


def _in_pieces(value: Any) -> Iterator[bytes]:
    text = json.dumps(value).encode()
    yield text[:7]
    yield text[7:]


def make_artifact(
    folder: Path, name: str = "v2", size: int = 100_000, key: Any = None, seed: int = 0
) -> Path:
    """A rootfs-image artifact with `size` bytes that don't compress."""
    image = folder / f"{name}.img"
    image.write_bytes(hashes_of(seed, size))
    path = folder / f"{name}.mender"
    write_artifact(path, image, name=name, device_types=[DEVICE_TYPE], compression="none", key=key)
    return path


def hashes_of(seed: int, size: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


@contextlib.contextmanager
def world(
    folder: Path,
    database_url: str = "",
    names: Sequence[str] = ("localhost", "127.0.0.1"),
    **settings: Any,
) -> Iterator[World]:
    """Make and serve a server in `folder`; background jobs run only when a test calls `tick`."""
    set_up_logging("warning")
    made = initialise(folder, list(names), 0, "127.0.0.1", database_url=database_url)
    clock = Clock()
    core = open_core(load_settings(folder, port=0, **settings), clock)
    try:
        with ServerThread(create_app(core, background=False), core.settings) as running:
            there = World(folder, running.port, core, clock, made.admin_password)
            try:
                yield there
            finally:
                there.close()
    finally:
        core.database.close()


class Postgres:
    """A PostgreSQL server of Debian's package in a folder of its own, on a unix socket only."""

    def __init__(self) -> None:
        self.bin = self.find()
        assert self.bin is not None
        # A socket's path has at most 107 bytes, and PostgreSQL refuses to run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="pg."))
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            if not self.bin.is_relative_to("/usr"):
                # The checkout may be where nobody else can go.
                self._copy_programs()
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._run(
            "initdb",
            "-D",
            "data",
            "-U",
            "brownout",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
            "--locale=C",
        )
        self._databases = 0
        self.start()

    @staticmethod
    def find() -> Path | None:
        """Where the newest PostgreSQL's programs are: unpacked by .ci/bootstrap, or installed."""
        unpacked = Path(__file__).parents[2] / "build" / "peers" / "postgresql"
        for root in (unpacked / "usr/lib/postgresql", Path("/usr/lib/postgresql")):
            if found := sorted(root.glob("*/bin/postgres")):
                return found[-1].parent
        return None

    def _copy_programs(self) -> None:
        assert self.bin is not None
        root = self.bin.parents[4]
        unneeded = shutil.ignore_patterns("bitcode", "locale", "doc", "man")
        shutil.copytree(root / "usr", self.folder / "usr", symlinks=True, ignore=unneeded)
        self.bin = self.folder / self.bin.relative_to(root)

    def start(self) -> None:
        self._run(
            "pg_ctl", "-D", "data", "-w", "-t", "60", "-l", "log", "-o",
            f"-c listen_addresses='' -c unix_socket_directories={self.folder}",
            "start",
        )  # fmt: skip

    def stop(self) -> None:
        self._run("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")

    def new_database(self) -> str:
        """A fresh database's URL."""
        self._databases += 1
        name = f"fleet{self._databases}"
        self._run("createdb", "-h", str(self.folder), "-U", "brownout", name)
        return f"postgresql://brownout@/{name}?host={self.folder}"

    def close(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        assert self.bin is not None
        subprocess.run(
            [self.bin / program, *arguments],
            cwd=self.folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=120,
            **self._user,
        )
