"""The NBD protocol, server side: constants, option haggling, request and reply headers.

Source: the NBD project's protocol document (doc/proto.md). Spoken here: fixed newstyle
negotiation with NBD_OPT_EXPORT_NAME, _ABORT, _LIST, _INFO and _GO, and the transmission phase
with simple replies. Not spoken: TLS, structured replies, metadata contexts, resize.

This module knows the wire, not disks: the recorder implements `Exports`.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple, Protocol

NBD_MAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_INFO: Final = 6
OPT_GO: Final = 7

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_ERR_UNSUP: Final = (1 << 31) | 1
REP_ERR_INVALID: Final = (1 << 31) | 3
REP_ERR_UNKNOWN: Final = (1 << 31) | 6

INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

HAS_FLAGS: Final = 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
TRANSMISSION_FLAGS: Final = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_WRITE_ZEROES: Final = 6
CMD_FLAG_FUA: Final = 1
CMD_FLAG_NO_HOLE: Final = 2
KNOWN_COMMAND_FLAGS: Final = CMD_FLAG_FUA | CMD_FLAG_NO_HOLE

EIO: Final = 5
EINVAL: Final = 22
ENOSPC: Final = 28

MAX_REQUEST: Final = 32 << 20
"""Largest read or write, as the protocol recommends and as we advertise."""
_MAX_OPTION: Final = 8192
_MAX_OPTIONS: Final = 64

REQUEST: Final = struct.Struct(">IHHQQI")
REPLY: Final = struct.Struct(">IIQ")
_OPTION: Final = struct.Struct(">QII")
_OPTION_REPLY: Final = struct.Struct(">QIII")


class ProtocolError(Exception):
    """The client doesn't speak NBD as we do, or went away."""


class Request(NamedTuple):
    """The header of a request."""

    magic: int
    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Exports(Protocol):
    """What negotiation needs to know."""

    def export_names(self) -> list[str]:
        """All exports."""

    def export_size(self, name: str) -> int | None:
        """An export's size in bytes, None if there is none of that name."""


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Receive `size` bytes; raises ProtocolError if the peer closes before."""
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ProtocolError("disconnected during negotiation")
        data += more
    return bytes(data)


def negotiate(sock: socket.socket, exports: Exports) -> str | None:
    """Haggle until the client chose an export; None if it left in good order.

    Raises ProtocolError, or OSError (time-out included) from the socket.
    """
    sock.sendall(struct.pack(">QQH", NBD_MAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
    (client_flags,) = struct.unpack(">I", receive_exactly(sock, 4))
    if client_flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
        raise ProtocolError(f"unknown client flags {client_flags:#x}")
    for _ in range(_MAX_OPTIONS):
        magic, option, length = _OPTION.unpack(receive_exactly(sock, _OPTION.size))
        if magic != IHAVEOPT:
            raise ProtocolError("bad option magic")
        if length > _MAX_OPTION:
            raise ProtocolError(f"option {option} of {length} bytes")
        data = receive_exactly(sock, length)
        if option == OPT_EXPORT_NAME:
            name = data.decode(errors="replace")
            size = exports.export_size(name)
            if size is None:  # the protocol leaves nothing else than to hang up
                raise ProtocolError(f"no export {name!r}")
            zeroes = b"" if client_flags & FLAG_NO_ZEROES else bytes(124)
            sock.sendall(struct.pack(">QH", size, TRANSMISSION_FLAGS) + zeroes)
            return name
        if option == OPT_ABORT:
            _reply(sock, option, REP_ACK)
            return None
        if option == OPT_LIST:
            _list(sock, data, exports)
        elif option in (OPT_INFO, OPT_GO):
            chosen = _info(sock, option, data, exports)
            if chosen is not None and option == OPT_GO:
                return chosen
        else:
            _reply(sock, option, REP_ERR_UNSUP, b"not supported")
    raise ProtocolError(f"more than {_MAX_OPTIONS} options")


def _reply(sock: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    sock.sendall(_OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _list(sock: socket.socket, data: bytes, exports: Exports) -> None:
    if data:
        _reply(sock, OPT_LIST, REP_ERR_INVALID, b"LIST takes no data")
        return
    for name in exports.export_names():
        encoded = name.encode()
        _reply(sock, OPT_LIST, REP_SERVER, struct.pack(">I", len(encoded)) + encoded)
    _reply(sock, OPT_LIST, REP_ACK)


def _info(sock: socket.socket, option: int, data: bytes, exports: Exports) -> str | None:
    """Answer INFO or GO; the export's name if it exists."""
    if len(data) < 6:
        _reply(sock, option, REP_ERR_INVALID, b"short option")
        return None
    (name_length,) = struct.unpack_from(">I", data)
    if len(data) < 4 + name_length + 2:
        _reply(sock, option, REP_ERR_INVALID, b"the name is longer than the option")
        return None
    name = data[4 : 4 + name_length].decode(errors="replace")
    (count,) = struct.unpack_from(">H", data, 4 + name_length)
    if len(data) != 4 + name_length + 2 + 2 * count:
        _reply(sock, option, REP_ERR_INVALID, b"wrong number of information requests")
        return None
    size = exports.export_size(name)
    if size is None:
        there = ", ".join(exports.export_names())
        _reply(sock, option, REP_ERR_UNKNOWN, f"no export {name!r}; there are {there}".encode())
        return None
    _reply(sock, option, REP_INFO, struct.pack(">HQH", INFO_EXPORT, size, TRANSMISSION_FLAGS))
    sizes = struct.pack(">HIII", INFO_BLOCK_SIZE, 512, 4096, MAX_REQUEST)
    _reply(sock, option, REP_INFO, sizes)
    _reply(sock, option, REP_ACK)
    return name
