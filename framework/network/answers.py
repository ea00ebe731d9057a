"""A TLS server with one wrong answer for everybody: the server that has gone bad.

It stands in for the real server while a fault lasts (the proxy leads connections here), so any
server can be seen to fail, and none needs code for it. Not a web server: it reads a request's head,
sends one answer and closes (RFC 9112).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import threading
from http import HTTPStatus

from attrs import field, frozen, validators

START_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
MAX_REQUEST_BYTES = 64 * 1024
PORTAL = (
    b"<!DOCTYPE html><html><head><title>Hotel guest network</title></head>"
    b"<body><h1>Please accept our terms of use</h1></body></html>\n"
)
_RANGE = re.compile(rb"^range:\s*bytes=(\d+)-\s*$", re.IGNORECASE | re.MULTILINE)
_GARBAGE = bytes(range(251, 0, -1)) * 257


@frozen
class Answer:
    """One answer, the same for every request.

    Attributes:
        status: of the status line.
        headers: further header lines' names and values.
        body: what is sent.
        garbage_bytes: the size of a file of garbage that is sent instead of a body, from the byte
            that was asked for on.
        promised_bytes: added to the Content-Length, and never sent.
    """

    status: int = field(validator=validators.and_(validators.ge(100), validators.le(599)))
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    garbage_bytes: int = 0
    promised_bytes: int = 0


def answer_to(answer: Answer, request: bytes) -> bytes:
    """The bytes of the answer to a request's head."""
    status, body = answer.status, answer.body
    headers = list(answer.headers)
    if answer.garbage_bytes:
        size = answer.garbage_bytes
        asked = _RANGE.search(request)
        start = min(int(asked[1]), size - 1) if asked else 0
        body = (_GARBAGE * (size // len(_GARBAGE) + 1))[start:size]
        if asked:
            status = 206
            headers.append(("Content-Range", f"bytes {start}-{size - 1}/{size}"))
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Something"
    headers.append(("Content-Length", str(len(body) + answer.promised_bytes)))
    headers.append(("Connection", "close"))
    head = f"HTTP/1.1 {status} {phrase}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers)
    return head.encode() + b"\r\n" + body


class AnswerServer:
    """Serves one `Answer` over TLS, in a thread of its own; a context manager.

    Args:
        answer: what everybody gets.
        context: the TLS context, with the certificate that it shows.
        host: where it listens, on a free port.
    """

    def __init__(self, answer: Answer, context: ssl.SSLContext, host: str = "127.0.0.1") -> None:
        self.answer = answer
        self.requests = 0
        self._context = context
        self._socket = socket.create_server((host, 0))
        self.address: tuple[str, int] = (host, int(self._socket.getsockname()[1]))
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._server: asyncio.Server | None = None

    def start(self) -> AnswerServer:
        """Begin to serve; returns once it does."""
        started = threading.Event()

        async def begin() -> None:
            self._server = await asyncio.start_server(
                self._serve, sock=self._socket, ssl=self._context
            )
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.set_exception_handler(lambda loop, context: None)  # broken handshakes
            self._loop.run_until_complete(begin())
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=run, name="answer-server", daemon=True)
        self._thread.start()
        if not started.wait(START_TIMEOUT_S):
            raise TimeoutError(f"the answer server did not start within {START_TIMEOUT_S:g} s")
        return self

    def close(self) -> None:
        """Stop. Calling it again does nothing."""
        if self._thread is None or not self._thread.is_alive():
            return

        async def shut_down() -> None:
            if self._server is not None:
                self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(shut_down(), self._loop)
        self._thread.join(START_TIMEOUT_S)

    def __enter__(self) -> AnswerServer:
        """Start on entry."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close on exit, whatever happened."""
        self.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            writer.write(answer_to(self.answer, request[:MAX_REQUEST_BYTES]))
            await writer.drain()
        writer.close()
