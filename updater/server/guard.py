"""The outermost layers around the application: bounds on bodies, one log line, counters.

Every body has a limit in bytes and a limit in time, whatever a client declares or doesn't. A
request whose declared length is over the limit is refused before a byte is read; one that turns
out larger or slower is refused where it crosses the line, and its connection closed, because the
rest of its body is of no use. Header time-outs belong to the protocol (`protocol.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from updater.server.core import Core
from updater.server.database import one_line
from updater.server.errors import RefusedError

BODY_LIMIT = 1 << 20
UPLOAD_PATHS = ("/api/management/v1/artifacts", "/artifacts")
DOWNLOAD_PATH = "/api/devices/v1/download/"
_log = structlog.get_logger("updater.server")


def problem(status: int, message: str, retry_after_s: int | None = None) -> Response:
    """Return an error as the API words it."""
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if status in (408, 413, 507):
        headers["Connection"] = "close"
    return JSONResponse({"error": message}, status_code=status, headers=headers)


def database_problem(error: SQLAlchemyError) -> Response:
    """Return what a client is told when the database fails."""
    text = one_line(error)
    _log.error("database failed", error=text)
    if "disk is full" in text or "No space left" in text:
        return problem(507, "the database's disk is full", 30)
    return problem(503, "the database does not answer; try again", 5)


class Guard:
    """ASGI middleware; see the module's first paragraph."""

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self.inner = app
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0
        metrics = self._core.metrics
        sends_artifact = scope["path"].startswith(DOWNLOAD_PATH)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.body" and sends_artifact:
                metrics.downloaded.inc(len(message.get("body", b"")))
            elif message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *_SECURITY_HEADERS,
                ]
            await send(message)

        metrics.open_requests.inc()
        try:
            await self._guarded(scope, receive, watched)
        finally:
            metrics.open_requests.dec()
            elapsed = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            metrics.requests.labels(route, _method(scope), str(status)).inc()
            metrics.seconds.labels(route).observe(elapsed)
            _log.debug(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(elapsed * 1000, 1),
                client=(scope.get("client") or ("",))[0],
            )

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        settings = self._core.settings
        upload = scope["method"] == "POST" and scope["path"] in UPLOAD_PATHS
        limit = settings.max_artifact_bytes if upload else BODY_LIMIT
        declared = _declared_length(scope)
        if declared is not None and declared > limit:
            message = f"the body has {declared} bytes, at most {limit} are allowed"
            await problem(413, message)(scope, receive, send)
            return
        begun = complete = False

        async def watched(message: Message) -> None:
            nonlocal begun, complete
            begun = True
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body")

        bounded = _bounded(
            receive, limit, settings.idle_s if upload else settings.request_s, per_piece=upload
        )
        try:
            await self.inner(scope, bounded, watched)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if complete:
                # Starlette answered 500 and raised again; the cause was logged where it happened.
                return
            if begun:
                _log.error("response broken off", error=f"{type(error).__name__}: {error}")
                raise
            await answer_to(error)(scope, receive, watched)


def answer_to(error: Exception) -> Response:
    """Return what a client is told about an error."""
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail))
    if isinstance(error, RefusedError):
        return problem(error.status, error.message, error.retry_after_s)
    if isinstance(error, SQLAlchemyError):
        return database_problem(error)
    _log.error("internal error", error=f"{type(error).__name__}: {error}", exc_info=error)
    return problem(500, "internal error; the server's log says more")


def _bounded(
    receive: Receive, limit: int, seconds: float, *, per_piece: bool
) -> Callable[[], Awaitable[Message]]:
    """Wrap `receive`: at most `limit` bytes, within `seconds` in all or for each piece."""
    total = 0
    ended = False
    deadline: float | None = None

    async def bounded() -> Message:
        nonlocal total, ended, deadline
        if ended:
            # Only the end of the connection can follow.
            return await receive()
        loop = asyncio.get_running_loop()
        if deadline is None or per_piece:
            deadline = loop.time() + seconds
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {seconds:g} s") from None
        if message["type"] != "http.request":
            ended = True
            return message
        total += len(message.get("body", b""))
        ended = not message.get("more_body", False)
        if total > limit:
            raise HTTPException(413, f"the body is larger than {limit} bytes")
        return message

    return bounded


def _declared_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else None
    return None


_SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"strict-transport-security", b"max-age=31536000"),
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _method(scope: dict[str, Any] | Scope) -> str:
    method = str(scope["method"])
    return method if method in _METHODS else "other"
