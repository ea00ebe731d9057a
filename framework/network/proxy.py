"""A TCP proxy that fails on purpose, at an exact byte, between any device and its server.

The proxy forwards bytes and never looks into them, so TLS stays end to end: what a fault cuts is
ciphertext, as on a real network. Bytes are counted per direction from the moment a fault is armed,
over all connections, so "byte N" means the same whatever the number of connections that a client
opens. `up` is device to server, `down` is server to device.

It does not lose or reorder packets: TCP hides that from both ends of a proxy. Against QEMU's
user-mode network a reset reaches the guest as a clean end of stream, because that network stack
terminates TCP itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Literal

from attrs import field, frozen, validators

Direction = Literal["up", "down"]
FaultKind = Literal["fin", "reset", "stall", "refuse", "corrupt"]

CHUNK_BYTES = 64 * 1024
START_TIMEOUT_S = 10.0
# With SO_LINGER on and a time of zero, close() sends RST instead of FIN (socket(7)).
LINGER_RESET = struct.pack("ii", 1, 0)


class ProxyError(Exception):
    """The proxy could not be started or used; the message names the address and the cause."""


@frozen
class NetworkFault:
    """What happens to the stream when its `at_byte`-th byte is about to be forwarded.

    Attributes:
        kind: `fin` closes both sides cleanly, `reset` with RST, `stall` forwards nothing more but
            keeps the connection open, `refuse` resets and then refuses every new connection,
            `corrupt` inverts the byte and goes on.
        direction: the direction whose bytes are counted.
        at_byte: bytes forwarded in that direction, counted from arming, before the fault.
        times: how often it may happen; the count starts anew after each.
        lasts_s: for `stall` and `refuse`, seconds until the network is well again; None: until
            `FaultProxy.restore` is called.
    """

    kind: FaultKind = field(
        validator=validators.in_(("fin", "reset", "stall", "refuse", "corrupt"))
    )
    at_byte: int = field(validator=validators.ge(0))
    direction: Direction = field(default="down", validator=validators.in_(("up", "down")))
    times: int = field(default=1, validator=validators.ge(1))
    lasts_s: float | None = None

    def __str__(self) -> str:
        """The fault as a sentence of a report."""
        verbs = {
            "fin": "connection closed",
            "reset": "connection reset",
            "stall": "network gone silent",
            "refuse": "connection reset and server refusing",
            "corrupt": "byte inverted",
        }
        length = "" if self.lasts_s is None else f" for {self.lasts_s:g} s"
        often = "" if self.times == 1 else f", {self.times} times"
        toward = "device" if self.direction == "down" else "server"
        return f"{verbs[self.kind]}{length} at byte {self.at_byte} towards the {toward}{often}"


@frozen
class ProxyEvent:
    """Something that the proxy did: `time_ns` is of the monotonic clock."""

    time_ns: int
    text: str


@frozen
class _Link:
    """One forwarded connection: both writers, so that a fault can end both sides."""

    device: asyncio.StreamWriter
    server: asyncio.StreamWriter


class _Armed:
    """A fault that waits: how many bytes are left, how often it has fired."""

    def __init__(self, fault: NetworkFault) -> None:
        self.fault = fault
        self.bytes_left = fault.at_byte
        self.times_left = fault.times
        self.fired = threading.Event()


class FaultProxy:
    """Forwards TCP connections to `upstream`, with faults.

    A context manager; it owns a thread with an event loop. All public methods may be called from
    any thread.

    Args:
        upstream: host and port of the real server.
        listen_host: address to listen on (loopback by default).
        listen_port: port, or 0 for a free one.
        on_event: called, on the proxy's thread, for each connection and each fault.

    Raises:
        ProxyError: the address cannot be bound.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        on_event: Callable[[ProxyEvent], None] | None = None,
    ) -> None:
        self.upstream = upstream
        self.bytes_forwarded: dict[Direction, int] = {"up": 0, "down": 0}
        self._listen = (listen_host, listen_port)
        self.on_event = on_event
        self._armed: list[_Armed] = []
        self._links: set[_Link] = set()
        self._refusing = False
        self._healthy = asyncio.Event()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port that devices connect to."""
        if self._server is None:
            raise ProxyError("the fault proxy is not running: call start() first")
        return int(self._server.sockets[0].getsockname()[1])

    def start(self) -> FaultProxy:
        """Bind and begin to forward."""
        started: threading.Event = threading.Event()
        failure: list[OSError] = []

        async def bind() -> None:
            self._healthy.set()
            try:
                self._server = await asyncio.start_server(self._accept, *self._listen)
            except OSError as error:
                failure.append(error)

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(bind())
            started.set()
            if not failure:
                self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=run, name="fault-proxy", daemon=True)
        self._thread.start()
        if not started.wait(START_TIMEOUT_S):
            raise ProxyError(f"the fault proxy did not start within {START_TIMEOUT_S:g} s")
        if failure:
            host, port = self._listen
            raise ProxyError(
                f"the fault proxy cannot listen on {host}:{port}: {failure[0].strerror}; "
                "choose another port, or 0 for a free one"
            ) from failure[0]
        return self

    def close(self) -> None:
        """Stop forwarding and end every connection. Calling it again does nothing."""
        if self._thread is None or not self._thread.is_alive():
            return

        async def shut_down() -> None:
            if self._server is not None:
                self._server.close()
            self._abort_all()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(shut_down(), self._loop)
        self._thread.join(timeout=START_TIMEOUT_S)

    def __enter__(self) -> FaultProxy:
        """Start on entry."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close on exit, whatever happened."""
        self.close()

    def arm(self, fault: NetworkFault) -> threading.Event:
        """Make `fault` happen; the event returned is set when it first does."""
        armed = _Armed(fault)
        with self._lock:
            self._armed.append(armed)
        return armed.fired

    def restore(self) -> None:
        """Make the network well again: no armed faults, no stall, no refusal."""
        with self._lock:
            self._armed.clear()
        self._loop.call_soon_threadsafe(self._heal)

    def _abort_all(self) -> None:
        for link in list(self._links):
            _abort(link)

    def _heal(self) -> None:
        self._refusing = False
        self._healthy.set()

    def _say(self, text: str) -> None:
        if self.on_event is not None:
            self.on_event(ProxyEvent(time.monotonic_ns(), text))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            self._say("connection refused")
            _reset(writer)
            return
        try:
            up_reader, up_writer = await asyncio.open_connection(*self.upstream)
        except OSError as error:
            self._say(f"server unreachable: {error.strerror}")
            _reset(writer)
            return
        link = _Link(writer, up_writer)
        self._links.add(link)
        self._say("connection opened")
        try:
            await asyncio.gather(
                self._forward(reader, up_writer, "up", link),
                self._forward(up_reader, writer, "down", link),
            )
        except (ConnectionError, OSError):
            pass
        finally:
            self._links.discard(link)
            for side in (link.device, link.server):
                side.close()
            self._say("connection closed")

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Direction,
        link: _Link,
    ) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            while chunk:
                await self._healthy.wait()
                armed, clean = self._due(direction, len(chunk))
                writer.write(chunk[:clean])
                await writer.drain()
                self.bytes_forwarded[direction] += clean
                chunk = chunk[clean:]
                if armed is not None:
                    chunk = self._happen(armed, chunk, link)
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    def _due(self, direction: Direction, length: int) -> tuple[_Armed | None, int]:
        """The fault due within the next `length` bytes, and the bytes to forward before it."""
        with self._lock:
            waiting = [a for a in self._armed if a.fault.direction == direction]
            due = min(waiting, key=lambda a: a.bytes_left, default=None)
            clean = length if due is None else min(length, due.bytes_left)
            for armed in waiting:
                armed.bytes_left -= clean
            # A fault at byte N needs a byte N: it waits for one rather than strike an idle stream.
            if due is None or due.bytes_left > 0 or clean == length:
                return None, clean
            due.times_left -= 1
            due.bytes_left = due.fault.at_byte
            if due.times_left == 0:
                self._armed.remove(due)
            return due, clean

    def _happen(self, armed: _Armed, rest: bytes, link: _Link) -> bytes:
        """Let the fault happen; returns what is still to be forwarded."""
        fault = armed.fault
        self._say(str(fault))
        armed.fired.set()
        if fault.kind == "corrupt":
            return bytes([rest[0] ^ 0xFF]) + rest[1:]
        if fault.kind == "stall":
            self._healthy.clear()
            self._heal_later(fault)
            return rest
        if fault.kind == "refuse":
            self._refusing = True
            self._heal_later(fault)
        if fault.kind == "fin":
            link.device.close()
            link.server.close()
        else:
            _abort(link)
        raise ConnectionAbortedError(str(fault))

    def _heal_later(self, fault: NetworkFault) -> None:
        if fault.lasts_s is not None:
            self._loop.call_later(fault.lasts_s, self._heal)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    writer.transport.abort()


def _abort(link: _Link) -> None:
    _reset(link.device)
    _reset(link.server)
