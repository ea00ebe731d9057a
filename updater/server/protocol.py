"""uvicorn's HTTP protocol with two additions that a server on the open network needs.

A connection that doesn't complete a request's headers within `HEADER_S` is closed (slow-loris),
and the client certificate that TLS verified is put into the request's state, where the device API
looks for it. uvicorn 0.3x documents neither; both hang on its public `http=` option.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_S = 20.0
MAX_HEADER_BYTES = 32 * 1024
# How long a refused client has to read the answer.
_LAST_WORD_S = 1.0


class GuardedProtocol(HttpToolsProtocol):
    """HttpToolsProtocol with a header deadline, a header limit and the peer's certificate."""

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first request."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._disarm()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the clock for this request's headers; note the peer's certificate."""
        super().on_message_begin()
        self._header_bytes = 0
        if self._deadline is None:
            self._arm()
        certificate = self.transport.get_extra_info("peercert")
        if certificate:
            self.scope["state"]["client_certificate"] = certificate

    def on_url(self, url: bytes) -> None:
        """Count the request line into the header limit."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count headers."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Stop the clock: bodies have bounds of their own (`guard.py`)."""
        self._disarm()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """End a connection whose request was refused before its body was read.

        Closing TLS politely waits for the other side, which may go on sending for ever.
        """
        unread = self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if unread and self.transport.is_closing():
            self.loop.call_later(_LAST_WORD_S, self.transport.abort)

    def shutdown(self) -> None:
        """End an idle connection when the server stops.

        An idle client doesn't read TLS's farewell, so waiting for its answer would use up the whole
        grace period.
        """
        super().shutdown()
        if self.transport.is_closing():
            self.loop.call_later(_LAST_WORD_S, self.transport.abort)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self._give_up()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(HEADER_S, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.abort()
