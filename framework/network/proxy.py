"""A TCP proxy that fails on purpose, at an exact byte, between any device and its server.

The proxy forwards bytes and never looks into them, so TLS stays end to end: what a fault cuts is
ciphertext, as on a real network. What happens when is decided in `plan`; this is the I/O.

A refusal closes the listening socket's queue (a new connection gets a reset), a black hole fills it
(a new connection gets no answer at all); the port stays ours in both. It does not lose or reorder
packets: TCP hides that from both ends of a proxy. Against QEMU's user-mode network a reset reaches
the guest as a clean end of stream, because that network stack terminates TCP itself, and a black
hole is not seen before the guest's own time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable

from attrs import frozen

from framework.network.meter import Meter
from framework.network.plan import (
    ENDS_CONNECTIONS,
    MANGLING,
    Direction,
    NetworkFault,
    mangle,
    next_due,
    pause_s,
    piece_bytes,
)

CHUNK_BYTES = 64 * 1024
START_TIMEOUT_S = 10.0
BACKLOG = 100
# With SO_LINGER on and a time of zero, close() sends RST instead of FIN (socket(7)).
LINGER_RESET = struct.pack("ii", 1, 0)
# listen(fd, 0) queues one connection; the next one's SYN is dropped (tcp(7), listen(2)).
FILLERS = 2


class ProxyError(Exception):
    """The proxy could not be started or used; the message names the address and the cause."""


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

    def __init__(self, fault: NetworkFault, on_strike: Callable[[], None] | None) -> None:
        self.fault = fault
        self.bytes_left = fault.at_byte
        self.times_left = fault.times
        self.fired = threading.Event()
        self.on_strike = on_strike


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
        self.meter = Meter()
        self.connections = 0
        self._listen = (listen_host, listen_port)
        self.on_event = on_event
        self._armed: list[_Armed] = []
        self._links: set[_Link] = set()
        self._refusing = False
        self._slow: NetworkFault | None = None
        self._divert: NetworkFault | None = None
        self._diverted_left: int | None = None
        self._healthy = asyncio.Event()
        self._fillers: list[socket.socket] = []
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port that devices connect to."""
        if self._socket is None:
            raise ProxyError("the fault proxy is not running: call start() first")
        return int(self._socket.getsockname()[1])

    def start(self) -> FaultProxy:
        """Bind and begin to forward."""
        host, port = self._listen
        try:
            self._socket = _bound(host, port)
        except OSError as error:
            raise ProxyError(
                f"the fault proxy cannot listen on {host}:{port}: {error.strerror}; "
                "choose another port, or 0 for a free one"
            ) from error
        self._socket.setblocking(False)
        started = threading.Event()

        async def begin() -> None:
            self._healthy.set()
            self._listen_again()
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(begin())
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=run, name="fault-proxy", daemon=True)
        self._thread.start()
        if not started.wait(START_TIMEOUT_S):
            raise ProxyError(f"the fault proxy did not start within {START_TIMEOUT_S:g} s")
        return self

    def close(self) -> None:
        """Stop forwarding and end every connection. Calling it again does nothing."""
        if self._thread is None or not self._thread.is_alive():
            return

        async def shut_down() -> None:
            self._abort_all()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._socket is not None:
                self._loop.remove_reader(self._socket)
                self._socket.close()
            for filler in self._fillers:
                filler.close()
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(shut_down(), self._loop)
        self._thread.join(timeout=START_TIMEOUT_S)

    def __enter__(self) -> FaultProxy:
        """Start on entry."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Close on exit, whatever happened."""
        self.close()

    def arm(
        self, fault: NetworkFault, on_strike: Callable[[], None] | None = None
    ) -> threading.Event:
        """Make `fault` happen; the event returned is set when it first does.

        `on_strike` is called each time, on the proxy's thread, just before the byte is forwarded;
        it must not block.
        """
        armed = _Armed(fault, on_strike)
        with self._lock:
            self._armed.append(armed)
        return armed.fired

    def strike(self, fault: NetworkFault) -> None:
        """Let `fault` happen now, whatever its byte; from any thread, without waiting."""
        self._loop.call_soon_threadsafe(self._strike, fault)

    def disarm(self, fired: threading.Event) -> None:
        """Take back a fault that waits, by the event that `arm` returned."""
        with self._lock:
            self._armed = [armed for armed in self._armed if armed.fired is not fired]

    def restore(self) -> None:
        """Make the network well again: no armed faults, no stall, no refusal, no other server."""
        with self._lock:
            self._armed.clear()
        if threading.current_thread() is self._thread:
            self._heal()
            return
        healed = threading.Event()
        failed: list[OSError] = []

        def heal() -> None:
            try:
                self._heal()
            except OSError as error:
                failed.append(error)
            healed.set()

        with contextlib.suppress(RuntimeError):  # it was closed
            self._loop.call_soon_threadsafe(heal)
            healed.wait(START_TIMEOUT_S)
        if failed:
            raise ProxyError(f"the fault proxy can't listen again: {failed[0].strerror}")

    # -- on the proxy's thread from here on ----------------------------------------------------

    def _abort_all(self) -> None:
        for link in list(self._links):
            _abort(link)

    def _heal(self) -> None:
        self._slow = None
        self._divert = None
        self._diverted_left = None
        if self._refusing or self._fillers:
            self._refusing = False
            self._listen_again()
        self._healthy.set()

    def _listen_again(self) -> None:
        assert self._socket is not None
        _reusable(self._socket, True)
        self._socket.listen(BACKLOG)
        self._loop.add_reader(self._socket, self._accept)

    def _say(self, text: str) -> None:
        if self.on_event is not None:
            self.on_event(ProxyEvent(time.monotonic_ns(), text))

    def _accept(self) -> None:
        assert self._socket is not None
        try:
            connection, peer = self._socket.accept()
        except OSError:
            return  # the device gave up in the queue
        connection.setblocking(False)
        for filler in self._fillers:
            if filler.getsockname() == peer:
                connection.close()
                filler.close()
                self._fillers.remove(filler)
                return
        task = asyncio.ensure_future(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        if self._refusing:
            _reset(writer)
            return
        upstream = self._next_upstream()
        try:
            up_reader, up_writer = await asyncio.open_connection(*upstream)
        except OSError as error:
            self._say(f"server unreachable: {error.strerror}")
            _reset(writer)
            return
        link = _Link(writer, up_writer)
        self._links.add(link)
        self.connections += 1
        self._say("connection opened" + ("" if upstream == self.upstream else " to another server"))
        try:
            await asyncio.gather(
                self._forward(reader, up_writer, "up", link),
                self._forward(up_reader, writer, "down", link),
            )
        except OSError:
            pass
        finally:
            self._links.discard(link)
            for side in (link.device, link.server):
                side.close()
            self._say("connection closed")

    def _next_upstream(self) -> tuple[str, int]:
        fault = self._divert
        if fault is None:
            return self.upstream
        assert fault.upstream is not None
        if self._diverted_left is not None:
            self._diverted_left -= 1
            if self._diverted_left <= 0:
                self._divert = None
        return fault.upstream

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
                slow = self._slow
                limit = None if slow is None else piece_bytes(slow.bytes_per_s)
                armed, clean = self._due(direction, len(chunk[:limit]))
                if slow is not None and clean:
                    await asyncio.sleep(slow.latency_s + pause_s(clean, slow.bytes_per_s))
                    await self._healthy.wait()
                writer.write(chunk[:clean])
                await writer.drain()
                self._count(direction, clean)
                chunk = chunk[clean:]
                if armed is not None:
                    chunk = await self._happen(armed, chunk, writer, direction, link)
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    def _count(self, direction: Direction, size_bytes: int) -> None:
        self.bytes_forwarded[direction] += size_bytes
        forwarded = self.bytes_forwarded
        self.meter.note(time.monotonic_ns(), forwarded["up"], forwarded["down"])

    def _due(self, direction: Direction, length: int) -> tuple[_Armed | None, int]:
        """The fault due within the next `length` bytes, and the bytes to forward before it."""
        with self._lock:
            waiting = [a for a in self._armed if a.fault.direction == direction]
            index, clean = next_due([a.bytes_left for a in waiting], length)
            for armed in waiting:
                armed.bytes_left -= clean
            if index is None:
                return None, clean
            due = waiting[index]
            due.times_left -= 1
            due.bytes_left = due.fault.at_byte
            if due.times_left == 0:
                self._armed.remove(due)
            if due.fault.kind in MANGLING:
                # The struck byte goes out by itself: the others must count it all the same.
                for armed in waiting:
                    armed.bytes_left -= armed is not due and armed.bytes_left > 0
            elif due.fault.kind not in ENDS_CONNECTIONS:
                due.bytes_left += 1  # the byte that it struck comes again, and is not a new one
            return due, clean

    async def _happen(
        self,
        armed: _Armed,
        rest: bytes,
        writer: asyncio.StreamWriter,
        direction: Direction,
        link: _Link,
    ) -> bytes:
        """Let the fault happen to the first byte of `rest`; returns what is still to be sent."""
        fault = armed.fault
        if fault.kind != "watch":
            self._say(str(fault))
        armed.fired.set()
        if armed.on_strike is not None:
            armed.on_strike()
        if fault.kind in MANGLING:
            mangled = mangle(fault.kind, rest)
            extra = len(mangled) - len(rest)
            writer.write(mangled[: 1 + extra])
            await writer.drain()
            self._count(direction, 1 + extra)
            return mangled[1 + extra :]
        self._begin(fault)
        if fault.kind in ENDS_CONNECTIONS:
            if fault.kind == "fin":
                link.device.close()
                link.server.close()
            else:
                _abort(link)
            raise ConnectionAbortedError(str(fault))
        return rest

    def _strike(self, fault: NetworkFault) -> None:
        """A fault that has no byte: it strikes every connection."""
        self._say(str(fault))
        self._begin(fault)
        if fault.kind == "fin":
            for link in list(self._links):
                link.device.close()
                link.server.close()
        elif fault.kind in ENDS_CONNECTIONS:
            self._abort_all()
        elif fault.kind in MANGLING:
            self.arm(NetworkFault(fault.kind, 0, fault.direction, fault.times))

    def _begin(self, fault: NetworkFault) -> None:
        """What a fault does to the network as a whole."""
        match fault.kind:
            case "stall":
                self._healthy.clear()
            case "black-hole":
                self._healthy.clear()
                self._fill_queue()
            case "refuse":
                assert self._socket is not None
                self._refusing = True
                self._loop.remove_reader(self._socket)
                # First: nobody else may take the port in the moment between.
                _reusable(self._socket, False)
                with contextlib.suppress(OSError):  # it refuses already
                    self._socket.shutdown(socket.SHUT_RDWR)
            case "slow":
                self._slow = fault
            case "divert":
                self._divert = fault
                self._diverted_left = fault.connections
            case _:
                return
        if fault.lasts_s is not None:
            self._loop.call_later(fault.lasts_s, self._heal)

    def _fill_queue(self) -> None:
        """Have nothing answer a new connection: take none, and fill the queue ourselves."""
        assert self._socket is not None
        self._loop.remove_reader(self._socket)
        self._socket.listen(0)
        for _ in range(FILLERS):
            filler = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            filler.setblocking(False)
            filler.connect_ex(self._socket.getsockname()[:2])
            self._fillers.append(filler)


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket that keeps its port while it does not listen.

    A port that the kernel chose is given up by shutdown(2), and anybody may get it meanwhile; one
    that was asked for stays bound. So a free one is asked for by its number.
    """
    while True:
        with socket.create_server((host, port), backlog=BACKLOG) as free:
            number = free.getsockname()[1]
        try:
            return socket.create_server((host, number), backlog=BACKLOG)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise  # else somebody was faster, and another one is free


def _reusable(listener: socket.socket, reusable: bool) -> None:
    """Whether another socket may have the port as long as this one does not listen (socket(7))."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reusable)


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
