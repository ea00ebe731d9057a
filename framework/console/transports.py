"""The byte pipes a pump can drain: a socket, a pyserial port, any labgrid console driver.

Each answers the same three questions: bytes within a time-out (`b""` if none came), write all of
this, close. A pipe that is gone raises `EOFError`. None of them is used by two readers.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from typing import Any, Protocol

from pexpect import TIMEOUT

__all__ = [
    "ConsoleDriverTransport",
    "SerialTransport",
    "SocketTransport",
    "Transport",
    "end_reader_quietly",
]

_CHUNK_BYTES = 65536
_log = logging.getLogger(__name__)


def end_reader_quietly(port: Any) -> None:
    """Have pySerial's RFC 2217 reader end as at an end of file when its connection breaks.

    It answers telnet negotiations from its own thread, and what breaks there (the other side, or
    we, closed the line in the middle) ended that thread with an unhandled error. To be called
    before the port is opened; for any other port, nothing happens.
    """
    loop = getattr(port, "_telnet_read_loop", None)
    if loop is None:
        return

    def read() -> None:
        buffer = port._read_buffer  # this opening's: the next one has another
        try:
            loop()
        except (OSError, ValueError, AttributeError, TypeError) as error:
            # AttributeError, TypeError: the socket is None once `close` was here.
            _log.debug("%s: the reader ended: %s: %s", port, type(error).__name__, error)
            buffer.put(None)

    port._telnet_read_loop = read


class Transport(Protocol):
    """What a `ConsolePump` drains."""

    def read(self, timeout_s: float) -> bytes:
        """Bytes as soon as there are any, `b""` after `timeout_s`; `EOFError` when gone."""

    def write(self, data: bytes, timeout_s: float) -> None:
        """Write all of `data`; `TimeoutError` if the other side does not take it in time."""

    def close(self) -> None:
        """Let go of the pipe; a blocked `read` returns or raises at once. Idempotent."""


class SocketTransport:
    """A connected stream socket (one end of a socketpair, a unix or a TCP connection)."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)

    def read(self, timeout_s: float) -> bytes:
        """See `Transport.read`."""
        try:
            readable, _, _ = select.select([self._socket], [], [], timeout_s)
            if not readable:
                return b""
            data = self._socket.recv(_CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return b""
        except (OSError, ValueError) as error:  # closed under us: ValueError from fileno() -1
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("closed by the other side")
        return data

    def write(self, data: bytes, timeout_s: float) -> None:
        """See `Transport.write`."""
        deadline = time.monotonic() + timeout_s
        view = memoryview(data)
        while view:
            try:
                remaining = deadline - time.monotonic()
                _, writable, _ = select.select([], [self._socket], [], max(0.0, remaining))
                if not writable:
                    raise TimeoutError(f"{len(view)} bytes not taken within {timeout_s:g} s")
                view = view[self._socket.send(view) :]
            except (BlockingIOError, InterruptedError):
                continue
            except TimeoutError:
                raise
            except (OSError, ValueError) as error:
                raise EOFError(str(error)) from error

    def close(self) -> None:
        """See `Transport.close`."""
        with contextlib.suppress(OSError):
            # close() alone does not wake a select() in another thread; a shutdown does.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class SerialTransport:
    """An open pyserial port (`serial.Serial` or any URL handler)."""

    def __init__(self, port: Any) -> None:
        self._port = port

    def read(self, timeout_s: float) -> bytes:
        """See `Transport.read`."""
        try:
            self._port.timeout = timeout_s
            return bytes(self._port.read(max(1, self._port.in_waiting)))
        except (OSError, TypeError) as error:  # TypeError: pyserial when closed meanwhile
            raise EOFError(str(error)) from error

    def write(self, data: bytes, timeout_s: float) -> None:
        """See `Transport.write`."""
        try:
            self._port.write_timeout = timeout_s
            self._port.write(data)
        except OSError as error:
            if "timeout" in str(error).lower():
                raise TimeoutError(str(error)) from error
            raise EOFError(str(error)) from error

    def close(self) -> None:
        """See `Transport.close`."""
        with contextlib.suppress(OSError):
            self._port.close()


class ConsoleDriverTransport:
    """Another labgrid console driver (e.g. `SerialDriver`).

    labgrid's public `read` and `write` are wrapped in `@step`, whose stack is one global list
    without a lock (labgrid issue 1851): from a background thread it corrupts the test's own
    steps. So this goes to the `_read` and `_write` below them, which labgrid's console drivers
    share through `ConsoleExpectMixin`.
    """

    def __init__(self, console: Any) -> None:
        for name in ("_read", "_write"):
            if not callable(getattr(console, name, None)):
                raise TypeError(
                    f"{console!r} has no {name}(): only drivers on labgrid's ConsoleExpectMixin "
                    "can be read from a background thread"
                )
        self._console = console

    def read(self, timeout_s: float) -> bytes:
        """See `Transport.read`."""
        started = time.monotonic()
        try:
            return bytes(self._console._read(size=1, timeout=timeout_s))
        except TIMEOUT as error:
            # pyserial's network ports report a closed peer as an early time-out.
            if time.monotonic() - started < timeout_s / 2:
                raise EOFError(str(error)) from error
            return b""
        except (OSError, TypeError) as error:
            raise EOFError(str(error)) from error

    def write(self, data: bytes, timeout_s: float) -> None:
        """See `Transport.write`; the time-out is the driver's own."""
        del timeout_s
        try:
            self._console._write(data)
        except OSError as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        """Nothing to do: labgrid owns the driver's life."""
