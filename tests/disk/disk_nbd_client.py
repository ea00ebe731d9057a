"""A second NBD implementation, for tests: a client that sends what and when a test wants.

Written from the protocol document, without the server's code, so that both have to be right.
"""

from __future__ import annotations

import errno
import socket
import struct

READ, WRITE, DISC, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1


class NbdError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(errno.errorcode.get(code, str(code)))
        self.code = code


class GoneError(Exception):
    """The server closed the connection."""


class Client:
    def __init__(self, path, export: str, *, old_style: bool = False, timeout_s: float = 10.0):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout_s)
        self.sock.connect(str(path))
        self._cookie = 0
        self._lengths: dict[int, int] = {}
        self.replies: dict[int, tuple[int, bytes]] = {}
        magic, opts, flags = struct.unpack(">8s8sH", self._get(18))
        assert (magic, opts) == (b"NBDMAGIC", b"IHAVEOPT")
        assert flags == 3
        self.sock.sendall(struct.pack(">I", 3))
        name = export.encode()
        if old_style:
            self.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", 1, len(name)) + name)
            self.size, self.flags = struct.unpack(">QH", self._get(10))
            return
        data = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, 3)
        for kind, payload in self.option(7, data):
            if kind == 3 and payload[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", payload[2:])
            elif kind == 3 and payload[:2] == b"\0\3":
                self.block_sizes = struct.unpack(">III", payload[2:])
            elif kind & 1 << 31:
                raise NbdError(kind & 0xFF)

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        self.sock.sendall(struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data)
        replies = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._get(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self._get(length)))
            if kind == 1 or kind & 1 << 31:
                return replies

    def _get(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except ConnectionError:
                more = b""
            if not more:
                raise GoneError
            data += more
        return bytes(data)

    def packed(self, command, offset=0, data=b"", *, length=None, flags=0) -> tuple[int, bytes]:
        self._cookie += 1
        size = len(data) if length is None else length
        self._lengths[self._cookie] = size if command == READ else 0
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, size)
        return self._cookie, header + data

    def send(self, command, offset=0, data=b"", *, length=None, flags=0) -> int:
        cookie, message = self.packed(command, offset, data, length=length, flags=flags)
        self.sock.sendall(message)
        return cookie

    def next_reply(self) -> int:
        magic, error, cookie = struct.unpack(">IIQ", self._get(16))
        assert magic == 0x67446698
        length = self._lengths.pop(cookie)
        self.replies[cookie] = (error, self._get(length) if length and not error else b"")
        return cookie

    def wait(self, cookie: int) -> bytes:
        while cookie not in self.replies:
            self.next_reply()
        error, data = self.replies.pop(cookie)
        if error:
            raise NbdError(error)
        return data

    def read(self, offset: int, length: int) -> bytes:
        return self.wait(self.send(READ, offset, length=length))

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.wait(self.send(WRITE, offset, data, flags=FUA if fua else 0))

    def flush(self) -> None:
        self.wait(self.send(FLUSH))

    def discard(self, offset: int, length: int) -> None:
        self.wait(self.send(TRIM, offset, length=length))

    def zero(self, offset: int, length: int) -> None:
        self.wait(self.send(ZEROES, offset, length=length))

    def close(self) -> None:
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
