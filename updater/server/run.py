"""Serving: uvicorn with TLS 1.2 or newer and nothing in the clear, from settings to a clean end."""

from __future__ import annotations

import logging
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp

from updater.server.errors import ServerError
from updater.server.protocol import GuardedProtocol
from updater.server.settings import Settings

START_TIMEOUT_S = 20.0
_BACKLOG = 4096


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Return the server's TLS context. Raises ServerError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # All that are left are good: the device knows which is fast on its processor.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        context.load_cert_chain(settings.certificate, settings.key)
    except (OSError, ssl.SSLError) as error:
        raise ServerError(
            f"{settings.certificate} and {settings.key}: not a usable certificate and key: {error}"
        ) from error
    if settings.client_ca is not None and settings.client_certificates != "off":
        try:
            context.load_verify_locations(settings.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ServerError(f"{settings.client_ca}: not a usable authority: {error}") from error
        # Browsers come without a certificate; the device API refuses a connection without one.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another port"
        ) from error


def configure(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Return uvicorn's configuration for `app`."""
    context = tls_context(settings)
    config = uvicorn.Config(
        app,
        http=GuardedProtocol,
        loop="uvloop",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.shutdown_s,
        ssl_context_factory=lambda _config, _default: context,
    )
    config.load()
    return config


def set_up_logging(level: str) -> None:
    """One JSON object a line on standard error, for the server's words and its libraries'."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("alembic", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def serve(app: ASGIApp, settings: Settings, ready: Callable[[int], None]) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress get `shutdown_s` to end.

    `ready` is called with the port once connections are accepted.
    """
    # uvicorn stops on these and then raises them again: by then the work is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = configure(app, settings)
    bound = listen(settings.host, settings.port)
    server = _Announcing(config, lambda: ready(int(bound.getsockname()[1])))
    try:
        server.run(sockets=[bound])
    finally:
        bound.close()
    if not server.started:
        raise ServerError("the server did not start; its log says why")


class _Announcing(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


class ServerThread:
    """A server in a thread of this process, for tests and demonstrations; a context manager."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._socket = listen(settings.host, settings.port)
        self.port = int(self._socket.getsockname()[1])
        self._server = uvicorn.Server(configure(app, settings))
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [self._socket]},
            name="update-server",
            daemon=True,
        )

    def __enter__(self) -> ServerThread:
        """Start; returns once connections are accepted."""
        self._thread.start()
        pause = threading.Event()
        for _ in range(int(START_TIMEOUT_S / 0.02)):
            if self._server.started:
                return self
            if not self._thread.is_alive():
                break
            pause.wait(0.02)
        self.__exit__()
        raise ServerError(f"the server did not start within {START_TIMEOUT_S:g} s")

    def __exit__(self, *_: object) -> None:
        """Stop; what is in progress gets a moment."""
        self._server.should_exit = True
        self._thread.join(timeout=START_TIMEOUT_S)
        self._socket.close()
