"""What the fault proxy decides, without any I/O: faults as values, and pure functions over them.

A fault counts the bytes of one direction from the moment it is armed, over all connections, so
"byte N" means the same whatever the number of connections that a client opens. `up` is device to
server, `down` is server to device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import field, frozen, validators

Direction = Literal["up", "down"]
FaultKind = Literal[
    "fin",
    "reset",
    "stall",
    "refuse",
    "black-hole",
    "corrupt",
    "duplicate",
    "slow",
    "divert",
    "watch",
]

VERBS: dict[str, str] = {
    "fin": "connection closed",
    "reset": "connection reset",
    "stall": "network gone silent",
    "refuse": "connection reset and server refusing",
    "black-hole": "network swallowing everything",
    "corrupt": "byte inverted",
    "duplicate": "byte sent twice",
    "slow": "network slow",
    "divert": "another server answering",
    "watch": "watched",
}
ENDS_CONNECTIONS = ("fin", "reset", "refuse", "divert")
"""Kinds that end the connection on which they strike."""
MANGLING = ("corrupt", "duplicate")
"""Kinds that change one byte and let the stream go on."""


@frozen
class NetworkFault:
    """What happens to the stream when its `at_byte`-th byte is about to be forwarded.

    Attributes:
        kind: `fin` closes both sides cleanly, `reset` with RST, `stall` forwards nothing more but
            keeps the connections open, `refuse` resets and then refuses every new connection,
            `black-hole` is a stall in which nothing answers a new connection either, `corrupt`
            inverts the byte and `duplicate` sends it twice, and both go on; `slow` limits and
            delays what follows; `divert` resets and leads new connections to `upstream`; `watch`
            does nothing (whoever armed it is told).
        direction: the direction whose bytes are counted.
        at_byte: bytes forwarded in that direction, counted from arming, before the fault.
        times: how often it may happen; the count starts anew after each.
        lasts_s: for `stall`, `refuse`, `black-hole`, `slow` and `divert`, seconds until the network
            is well again; None: until `FaultProxy.restore` is called.
        bytes_per_s: for `slow`, at most so many in each direction; None: no limit.
        latency_s: for `slow`, each piece of data is so late.
        upstream: for `divert`, the host and port of the other server.
        connections: for `divert`, how many connections are led there; None: all.
    """

    kind: FaultKind = field(validator=validators.in_(tuple(VERBS)))
    at_byte: int = field(validator=validators.ge(0))
    direction: Direction = field(default="down", validator=validators.in_(("up", "down")))
    times: int = field(default=1, validator=validators.ge(1))
    lasts_s: float | None = None
    bytes_per_s: float | None = None
    latency_s: float = 0.0
    upstream: tuple[str, int] | None = None
    connections: int | None = None

    def __attrs_post_init__(self) -> None:
        if (self.kind == "divert") != (self.upstream is not None):
            raise ValueError("a divert, and only a divert, names another upstream")
        if self.bytes_per_s is not None and self.bytes_per_s <= 0:
            raise ValueError("bytes_per_s must be positive")

    def __str__(self) -> str:
        """The fault as a sentence of a report."""
        length = "" if self.lasts_s is None else f" for {self.lasts_s:g} s"
        often = "" if self.times == 1 else f", {self.times} times"
        toward = "device" if self.direction == "down" else "server"
        return f"{VERBS[self.kind]}{length} at byte {self.at_byte} towards the {toward}{often}"


def next_due(bytes_left: Sequence[int], length: int) -> tuple[int | None, int]:
    """Which of the waiting faults strikes within a chunk, and the bytes to forward before it.

    `bytes_left` has each fault's bytes until it strikes, `length` is the chunk's. A fault at byte N
    needs a byte N: at the very end of a chunk it waits for the next one.
    """
    if not bytes_left:
        return None, length
    index = min(range(len(bytes_left)), key=bytes_left.__getitem__)
    if bytes_left[index] >= length:
        return None, length
    return index, bytes_left[index]


def mangle(kind: FaultKind, rest: bytes) -> bytes:
    """What is forwarded of `rest` when a fault strikes its first byte."""
    if kind == "corrupt":
        return bytes([rest[0] ^ 0xFF]) + rest[1:]
    if kind == "duplicate":
        return rest[:1] + rest
    return rest


def piece_bytes(bytes_per_s: float | None, pieces_per_s: float = 20.0) -> int | None:
    """How much a slow network takes at a time, so that it trickles; None: all."""
    return None if bytes_per_s is None else max(1, int(bytes_per_s / pieces_per_s))


def pause_s(length: int, bytes_per_s: float | None) -> float:
    """How long `length` bytes take on a slow network."""
    return 0.0 if bytes_per_s is None else length / bytes_per_s
