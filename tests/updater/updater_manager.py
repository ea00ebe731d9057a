"""A management server: the documented device API over real TLS, with knobs to misbehave."""

from __future__ import annotations

import base64
import http.server
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

DEPLOYMENTS = "/deployments/device/deployments"


def verify(public_pem: str, signature: str, body: bytes) -> None:
    """Check a request's signature as the reference server does; raises InvalidSignature."""
    key = load_pem_public_key(public_pem.encode())
    raw = base64.b64decode(signature, validate=True)
    if isinstance(key, rsa.RSAPublicKey):
        key.verify(raw, body, padding.PKCS1v15(), hashes.SHA256())
    elif isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(raw, body, ec.ECDSA(hashes.SHA256()))
    else:
        assert isinstance(key, ed25519.Ed25519PublicKey)
        key.verify(raw, body)


class Manager:
    """What the server knows, and how it behaves."""

    def __init__(self, artifact: Path, device_type: str) -> None:
        self.artifact = artifact
        self.device_type = device_type
        self.accepted = True
        self.deployment: str | None = "d-1"
        self.name = "v2"
        self.control: dict[str, Any] | None = None
        self.has_v2 = True
        self.aborted_at = ""
        self.token = "token-1"
        self.down = False
        self.link = 1
        self.stop_after: int | None = None
        self.expires_after: int | None = None
        self.answers: list[tuple[str, int, bytes, dict[str, str]]] = []
        self.port = 0
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.statuses: list[tuple[str, str, str]] = []
        self.logs: dict[str, list[dict[str, str]]] = {}
        self.inventory: dict[str, object] = {}
        self.identities: list[dict[str, Any]] = []
        self.provides: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def reported(self) -> list[str]:
        return [status for _, status, _ in self.statuses]


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

    def _handle(self) -> None:
        manager = self.server.manager
        self.close_connection = True
        if manager.down:
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        manager.requests.append((self.command, parts.path))
        for index, (pattern, status, content, headers) in enumerate(manager.answers):
            if re.search(pattern, f"{self.command} {parts.path}"):
                del manager.answers[index]
                self._answer(status, content, headers)
                return
        if parts.path == "/artifact":
            self._artifact(parse_qs(parts.query))
            return
        assert parts.path.startswith("/api/devices/"), parts.path
        path = parts.path.removeprefix("/api/devices/")
        if path == "v1/authentication/auth_requests":
            self._authenticate(body)
        elif self.headers.get("Authorization") != f"Bearer {manager.token}":
            self._answer(401, b'{"error":"unauthorized"}')
        else:
            self._api(path, parse_qs(parts.query), json.loads(body) if body else None)

    def _authenticate(self, body: bytes) -> None:
        manager = self.server.manager
        request = json.loads(body)
        assert body.endswith(b"\n")
        verify(request["pubkey"], self.headers["X-MEN-Signature"], body)
        manager.identities.append(json.loads(request["id_data"]))
        if manager.accepted:
            self._answer(200, manager.token.encode(), {"Content-Type": "application/jwt"})
        else:
            self._answer(401, b'{"error":"dev auth: unauthorized"}')

    def _api(self, path: str, query: dict[str, list[str]], value: Any) -> None:
        manager = self.server.manager
        if path == "v1/inventory/device/attributes":
            manager.inventory = {item["name"]: item["value"] for item in value}
            self._answer(200)
        elif path == f"v2{DEPLOYMENTS}/next" and manager.has_v2:
            assert self.command == "POST"
            manager.provides = value["device_provides"]
            assert manager.provides["device_type"] == manager.device_type
            self._next()
        elif path == f"v1{DEPLOYMENTS}/next":
            assert self.command == "GET"
            manager.provides = {key: values[0] for key, values in query.items()}
            self._next()
        elif match := re.fullmatch(rf"v1{DEPLOYMENTS}/([^/]+)/(status|log)", path):
            self._report(match[1], match[2], value)
        elif path.endswith("/update_control_map"):
            self._answer(200, json.dumps({"update_control_map": manager.control or {}}).encode())
        else:
            self._answer(404, b'{"error":"not found"}')

    def _next(self) -> None:
        manager = self.server.manager
        if manager.deployment is None:
            self._answer(204)
            return
        value: dict[str, Any] = {
            "id": manager.deployment,
            "artifact": {
                "artifact_name": manager.name,
                "device_types_compatible": [manager.device_type],
                "source": {
                    "uri": f"{manager.url}/artifact?link={manager.link}",
                    "expire": "2030-01-01T00:00:00Z",
                },
            },
        }
        if manager.control is not None:
            value["update_control_map"] = manager.control
        self._answer(200, json.dumps(value).encode())

    def _report(self, deployment: str, what: str, value: Any) -> None:
        manager = self.server.manager
        if what == "log":
            manager.logs[deployment] = value["messages"]
            self._answer(204)
            return
        status = value["status"]
        if status == manager.aborted_at:
            self._answer(409, b'{"error":"deployment was aborted"}')
            return
        manager.statuses.append((deployment, status, value.get("substate", "")))
        if status in ("success", "failure", "already-installed"):
            manager.deployment = None
        self._answer(204)

    def _artifact(self, query: dict[str, list[str]]) -> None:
        manager = self.server.manager
        assert "Authorization" not in self.headers
        if query["link"] != [str(manager.link)]:
            self._answer(403)
            return
        content = manager.artifact.read_bytes()
        asked = self.headers.get("Range")
        manager.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        body = content[start:]
        stop_after = manager.stop_after
        if manager.expires_after is not None:
            stop_after, manager.expires_after = manager.expires_after, None
            manager.link += 1
        self.wfile.write(body if stop_after is None else body[:stop_after])

    def _answer(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, manager: Manager) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.manager = manager
        self.errors: list[str] = []
        self._context = context
        manager.port = self.server_address[1]

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        connection.settimeout(10)
        return self._context.wrap_socket(connection, server_side=True), address

    def handle_error(self, request: object, client_address: object) -> None:
        import traceback

        self.errors.append(traceback.format_exc())


@contextmanager
def managing(context: ssl.SSLContext, manager: Manager) -> Iterator[Manager]:
    """Run the server for the block; an assertion that failed in it fails the block."""
    server = _Server(context, manager)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield manager
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    wrong = [text for text in server.errors if "Assertion" in text or "InvalidSignature" in text]
    assert not wrong, wrong[0]
