"""Serves a folder of artifacts over TLS, with ranged downloads, and nothing in the clear.

The smallest server that a device can update from: `GET /artifacts/<name>` with `Range`
(RFC 9110, section 14) over TLS 1.2 or newer. Devices, deployments and a database are no business
of this module. Starlette answers, uvicorn listens.
"""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from updater.server.errors import ServerError

START_TIMEOUT_S = 10.0
ARTIFACT_SUFFIX = ".mender"


def application(directory: Path) -> Starlette:
    """An ASGI application that serves the artifacts in `directory` and their names."""

    async def listing(_: Request) -> Response:
        names = sorted(path.name for path in directory.glob(f"*{ARTIFACT_SUFFIX}"))
        return PlainTextResponse("".join(f"{name}\n" for name in names))

    async def artifact(request: Request) -> Response:
        name = request.path_params["name"]
        path = directory / name
        # Starlette's path parameter holds no slash, so a name can't climb out of the folder.
        if not name.endswith(ARTIFACT_SUFFIX) or not path.is_file():
            return PlainTextResponse(f"no artifact named {name}\n", status_code=404)
        return FileResponse(path, media_type="application/vnd.mender-artifact")

    return Starlette(
        routes=[Route("/artifacts/", listing), Route("/artifacts/{name}", artifact)],
    )


class ArtifactFileServer:
    """A TLS server for a folder of artifacts, in a thread of this process; a context manager.

    Args:
        directory: the folder; files that end in `.mender` are served.
        certificate: PEM chain shown to devices.
        key: PEM private key of the certificate.
        host: address to listen on.
        port: port, or 0 for a free one.

    Raises:
        ServerError: the folder or a PEM file is missing or unusable, or the port is in use.
    """

    def __init__(
        self,
        directory: Path,
        certificate: Path,
        key: Path,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if not directory.is_dir():
            raise ServerError(f"{directory}: no such folder of artifacts")
        self._certificate = certificate
        self._key = key
        try:
            config = uvicorn.Config(
                application(directory),
                log_level="warning",
                access_log=False,
                lifespan="off",
                ssl_certfile=str(certificate),
                ssl_keyfile=str(key),
                ssl_version=ssl.PROTOCOL_TLS_SERVER,
            )
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise ServerError(
                f"{certificate} and {key}: not a usable certificate and key: {error}"
            ) from error
        assert config.ssl is not None
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
        # All that are left are good: the device knows which is fast on its processor.
        config.ssl.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        try:
            self._socket = socket.create_server((host, port))
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
            ) from error
        self.host = host
        self.port = int(self._socket.getsockname()[1])
        self._server = uvicorn.Server(config)
        # uvicorn takes signals only on the main thread; in ours it leaves them alone.
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="artifact-server"
        )
        self._thread.daemon = True

    def start(self) -> ArtifactFileServer:
        """Begin to serve; returns once connections are accepted."""
        self._thread.start()
        pause = threading.Event()
        for _ in range(int(START_TIMEOUT_S / 0.02)):
            if self._server.started:
                return self
            if not self._thread.is_alive():
                break
            pause.wait(0.02)
        self.close()
        raise ServerError(f"the artifact server did not start within {START_TIMEOUT_S:g} s")

    def close(self) -> None:
        """Stop serving; open downloads are cut off."""
        self._server.should_exit = True
        self._server.force_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=START_TIMEOUT_S)
        self._socket.close()

    def __enter__(self) -> ArtifactFileServer:
        """Start on entry."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close on exit, whatever happened."""
        self.close()
