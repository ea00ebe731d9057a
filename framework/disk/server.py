"""One client of the NBD server: reads requests, has them recorded and carried out, replies.

One thread serves one connection, and a request's arrival has to be truthful: a flush that the
client sent while a write was in flight must be recorded before that write's completion, or it
would seem to cover it. So whatever the socket holds is read and recorded as arrived *before*
anything is completed, and once more just before the replies go out. What remains is the time
between that last look and the reply, a few microseconds; requests of other connections that
arrive there are as truthful, as they are recorded by their own thread.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from typing import Final, Protocol

from framework.disk import nbd
from framework.disk.errors import RecorderError
from framework.disk.journal import SECTOR, Kind

_BUFFER: Final = 2 << 20
_IDLE_MS: Final = 20
_MAX_PENDING: Final = 1024
_KINDS: Final = {
    nbd.CMD_WRITE: Kind.WRITE,
    nbd.CMD_FLUSH: Kind.FLUSH,
    nbd.CMD_TRIM: Kind.DISCARD,
    nbd.CMD_WRITE_ZEROES: Kind.ZEROES,
}


class Pending:
    """A request between its arrival and its reply."""

    __slots__ = (
        "cookie",
        "due",
        "error",
        "flags",
        "kind",
        "length",
        "number",
        "offset",
        "position",
    )

    def __init__(self, kind: Kind | None, cookie: int, offset: int, length: int) -> None:
        self.kind = kind
        """None for a read."""
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.flags = 0
        self.number = 0
        """The operation's number; 0 for a read and for what was not recorded."""
        self.position = -1
        self.error = 0
        self.due = 0.0
        """Monotonic time before which it is not carried out (an injected latency)."""


class Core(nbd.Exports, Protocol):
    """What a connection asks of the recorder."""

    @property
    def silent(self) -> bool:
        """Nothing is answered any more: frozen, or power is being cut."""

    def register(self, device: int, request: Pending, fua: bool, payload: memoryview) -> bool:
        """Record an arrival; False if it is refused for good (frozen)."""

    def register_read(self, device: int, request: Pending) -> None:
        """Note a read's arrival: faults may concern it."""

    def commit(self) -> None:
        """Have what was registered in the journal; raises RecorderError."""

    def settle(self) -> None:
        """Have late records in the journal, too, if there are any."""

    def prepare(self) -> bool:
        """Use an idle moment for what is not urgent, a bit; whether there is more to do."""

    def complete(self, device: int, requests: list[Pending]) -> None:
        """Let operations take effect and record their completion."""

    def read(self, device: int, offset: int, length: int) -> bytes | int:
        """Read, or the NBD error."""


class Connection:
    """Serves one client until it leaves, breaks the protocol, or power is cut."""

    def __init__(self, sock: socket.socket, core: Core, device: int, size_bytes: int) -> None:
        self._sock = sock
        self._core = core
        self._device = device
        self._size = size_bytes
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._missing = 0  # of a write whose beginning is in the buffer
        self._held = False  # the journal's queue refers to the buffer
        self._pending: deque[Pending] = deque()
        self._leaving = False
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def serve(self) -> str:
        """Serve; return why it ended."""
        reason = "left"
        try:
            while not self._core.silent:
                self._receive()
                if self._execute():
                    continue
                if self._leaving:
                    break
                self._core.settle()
                if not self._pending and self._missing:
                    self._receive_rest()
                else:
                    self._wait()
        except nbd.ProtocolError as error:
            reason = f"dropped: {error}"
        except OSError as error:
            reason = f"dropped: {error.strerror}"
        finally:
            self._drain()
        return reason

    def wait_until_dropped(self) -> None:
        """Answer nothing, read nothing, until the connection is shut down."""
        hangup = select.poll()
        hangup.register(self._sock, 0)
        hangup.poll()

    def _drain(self) -> None:
        """Carry out what had arrived, whether or not a reply still finds its client."""
        for request in self._pending:
            request.due = 0.0
        try:
            self._execute(receive=False)
        except OSError:
            pass
        finally:
            self._core.settle()

    def _wait(self) -> None:
        full = len(self._pending) >= _MAX_PENDING
        self._poll.modify(self._sock, 0 if full else select.POLLIN)
        if not self._pending:
            idle = not self._poll.poll(_IDLE_MS)
            while idle and self._core.prepare():
                idle = not self._poll.poll(0)
            if idle:
                self._poll.poll()
            return
        due = min(r.due for r in self._pending)
        left = due - time.monotonic()
        if left > 0:
            self._poll.poll(left * 1000 + 1)

    def _receive(self) -> None:
        """Read and record whatever the socket holds, without waiting."""
        if self._leaving:
            return
        if self._start == self._end and not self._held:
            self._start = self._end = 0
        while len(self._pending) < _MAX_PENDING:
            if self._end == len(self._buffer):
                self._make_room()
            try:
                got = self._sock.recv_into(self._view[self._end :], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                got = 0
            if not got:
                self._leaving = True
                return
            self._end += got
            if not self._parse():
                return

    def _receive_rest(self) -> None:
        """Wait for the rest of a write in the kernel: nothing else is under way here."""
        while self._end + self._missing > len(self._buffer):
            self._make_room()
        into = self._view[self._end : self._end + self._missing]
        try:
            got = self._sock.recv_into(into, 0, socket.MSG_WAITALL)
        except ConnectionError:
            got = 0
        if got < self._missing:
            self._leaving = True
            return
        self._end += got
        self._parse()

    def _make_room(self) -> None:
        if self._held:
            self._commit()
        rest = self._end - self._start
        if self._start == 0:  # one request that is larger than the buffer
            grown = bytearray(min(2 * len(self._buffer), nbd.MAX_REQUEST + _BUFFER))
            grown[:rest] = self._view[:rest]
            self._buffer, self._view = grown, memoryview(grown)
        else:
            self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest

    def _parse(self) -> bool:
        """Record every complete request in the buffer; False if nothing more is to be read."""
        self._missing = 0
        while self._end - self._start >= nbd.REQUEST.size:
            header = nbd.Request(*nbd.REQUEST.unpack_from(self._buffer, self._start))
            if header.magic != nbd.REQUEST_MAGIC:
                raise nbd.ProtocolError("bad request magic")
            body = self._start + nbd.REQUEST.size
            after = body
            if header.command == nbd.CMD_WRITE:
                if header.length > nbd.MAX_REQUEST:
                    raise nbd.ProtocolError(f"a write of {header.length} bytes")
                after += header.length
                if after > self._end:
                    self._missing = after - self._end
                    return True
            if header.command == nbd.CMD_DISC:
                self._leaving = True
                return False
            self._start = after
            if not self._arrive(header, self._view[body:after]):
                return False
        return True

    def _arrive(self, header: nbd.Request, payload: memoryview) -> bool:
        kind = _KINDS.get(header.command)
        request = Pending(kind, header.cookie, header.offset, header.length)
        request.error = self._invalid(header, kind)
        if not request.error:
            if kind is None:
                self._core.register_read(self._device, request)
            else:
                if kind is Kind.FLUSH:
                    request.offset = request.length = 0
                fua = bool(header.flags & nbd.CMD_FLAG_FUA)
                self._held = self._held or bool(payload)
                if not self._core.register(self._device, request, fua, payload):
                    return False
        self._pending.append(request)
        return True

    def _invalid(self, header: nbd.Request, kind: Kind | None) -> int:
        """The NBD error of a request that can't be carried out, 0 if it can."""
        if kind is None and header.command != nbd.CMD_READ:
            return nbd.EINVAL
        if header.flags & ~nbd.KNOWN_COMMAND_FLAGS:
            return nbd.EINVAL
        if kind is Kind.FLUSH:
            return 0
        if header.offset % SECTOR or header.length % SECTOR or not header.length:
            return nbd.EINVAL
        if kind is None and header.length > nbd.MAX_REQUEST:
            return nbd.EINVAL
        if header.offset + header.length > self._size:
            return nbd.ENOSPC if kind is Kind.WRITE else nbd.EINVAL
        return 0

    def _commit(self) -> None:
        try:
            self._core.commit()
        except RecorderError:
            for request in self._pending:
                if request.number:
                    request.error = request.error or nbd.EIO
        self._held = False

    def _ready(self) -> list[Pending]:
        pending = self._pending
        if not any(r.due for r in pending):
            ready = list(pending)
            pending.clear()
            return ready
        now = time.monotonic()
        ready = [r for r in pending if r.due <= now]
        self._pending = deque(r for r in pending if r.due > now)
        return ready

    def _execute(self, *, receive: bool = True) -> bool:
        """Carry out what is due; whether there was something."""
        if not self._pending:
            return False
        if self._held or any(r.number for r in self._pending):
            self._commit()
        ready = self._ready()
        if not ready:
            return False
        if receive:
            self._receive()
        changing = [r for r in ready if r.number]
        if changing:
            self._core.complete(self._device, changing)
        replies: list[bytes] = []
        for request in ready:
            if request.kind is None:
                if self._core.silent:
                    continue
                data = b""
                if not request.error:
                    result = self._core.read(self._device, request.offset, request.length)
                    if isinstance(result, int):
                        request.error = result
                    else:
                        data = result
                replies.append(_reply(request))
                if data:
                    replies.append(data)
            else:
                replies.append(_reply(request))
        if replies:
            self._sock.sendall(replies[0] if len(replies) == 1 else b"".join(replies))
        return True


def _reply(request: Pending) -> bytes:
    return nbd.REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, request.error, request.cookie)
