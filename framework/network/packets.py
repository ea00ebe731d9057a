"""A relay of Ethernet frames between two machines, which loses, doubles, delays and reorders them.

For two guests, or a guest and a program of this host, whose TCP stacks see each other: QEMU's
`-netdev dgram` sends each frame as one datagram (qemu(1)), and the relay sits between two such
sockets. Not for QEMU's user-mode network, which ends TCP itself and repeats nothing that is lost on
the guest's side: there one per cent of loss ends every transfer. Between two real stacks it is only
slow (framework.network.proxy has the faults of a stream).

What happens to a frame is decided by its number, its direction and the seed alone, whenever it
comes: `fates` is a pure function. When a delayed frame goes out is the host's timer's business, so
two delays closer than some milliseconds may change places.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from attrs import field, frozen, validators

Way = Literal["a-b", "b-a"]
WAYS: Final[tuple[Way, ...]] = ("a-b", "b-a")
START_TIMEOUT_S: Final = 10.0
FRAME_BYTES: Final = 65536
MOST_HELD: Final = 4096
"""Frames that may wait at once; what comes beyond is lost, as in a router whose queue is full."""
READ_AT_ONCE: Final = 64
RETRY_S: Final = 0.001
# A Unix address has 108 bytes (unix(7)).
LONGEST_PATH: Final = 100


class RelayError(Exception):
    """The relay could not be started; the message names the socket and the cause."""


def _share(_: object, attribute: object, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{getattr(attribute, 'name', '')} is a share from 0 to 1, not {value}")


@frozen
class PacketFaults:
    """What may happen to each frame. Shares are from 0 to 1, of all frames.

    Attributes:
        loss: the share that never arrives.
        duplication: the share that arrives twice.
        reordering: the share that is held back, so that others overtake it.
        held_s: for how long those are held back.
        delay_s: how late all frames are.
        jitter_s: how much later a frame may be by chance; above the time between frames this
            reorders them, too.
        cut: no frame arrives at all.
    """

    loss: float = field(default=0.0, validator=_share)
    duplication: float = field(default=0.0, validator=_share)
    reordering: float = field(default=0.0, validator=_share)
    held_s: float = field(default=0.05, validator=validators.gt(0))
    delay_s: float = field(default=0.0, validator=validators.ge(0))
    jitter_s: float = field(default=0.0, validator=validators.ge(0))
    cut: bool = False

    def __str__(self) -> str:
        """What happens, in words."""
        if self.cut:
            return "no frame arrives"
        said = [
            f"{share * 100:g} % {what}"
            for share, what in (
                (self.loss, "lost"),
                (self.duplication, "doubled"),
                (self.reordering, f"held back for {self.held_s:g} s"),
            )
            if share
        ]
        if self.delay_s or self.jitter_s:
            more = f" to {self.delay_s + self.jitter_s:g}" if self.jitter_s else ""
            said.append(f"{self.delay_s:g}{more} s late")
        return "frames " + ", ".join(said) if said else "frames arrive as they were sent"


WELL: Final = PacketFaults()


def fates(faults: PacketFaults, seed: int, way: Way, number: int) -> tuple[float, ...]:
    """How late each copy of a frame arrives, in seconds: none if it is lost, two if doubled."""
    if faults.cut:
        return ()
    # Not `hash()`, which differs from process to process.
    digest = hashlib.blake2b(f"{seed}:{way}:{number}".encode(), digest_size=8).digest()
    chance = random.Random(int.from_bytes(digest, "big"))  # noqa: S311 - repeatable, no secret
    lost, doubled, held = (chance.random() for _ in range(3))
    if lost < faults.loss:
        return ()
    late = faults.delay_s + faults.jitter_s * chance.random()
    if held < faults.reordering:
        late += faults.held_s
    return (late, late) if doubled < faults.duplication else (late,)


class PacketRelay:
    """Passes frames between `a` and `b` in a thread of its own; a context manager.

    Each end has a socket of the relay's and one of its own, all in `folder` (which should be short:
    a Unix address has room for 108 bytes). `netdev` is what QEMU is given for an end.

    Args:
        folder: where the sockets are.
        seed: of every choice.
        on_event: called on the relay's thread when the faults change.

    Raises:
        RelayError: the sockets can't be made.
    """

    def __init__(
        self, folder: Path, seed: int = 1, on_event: Callable[[str], None] | None = None
    ) -> None:
        self.seed = seed
        self.counts: dict[Way, Counter[str]] = {way: Counter() for way in WAYS}
        """For each way, how many frames came (`in`), went (`out`), were `lost`, `doubled`,
        `late`, were `refused` by an end that is not there, and found the queue `full`."""
        self._folder = folder
        self._on_event = on_event
        self._faults: dict[Way, PacketFaults] = dict.fromkeys(WAYS, WELL)
        self._sockets: dict[str, socket.socket] = {}
        self._held = 0
        self._waiting: dict[Way, deque[bytes]] = {way: deque() for way in WAYS}
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None

    def path(self, end: str, whose: Literal["relay", "own"]) -> Path:
        """The relay's or the end's own socket for the end `a` or `b`."""
        return self._folder / f"{end}-{whose}"

    def netdev(self, end: str, name: str = "net0") -> str:
        """QEMU's `-netdev` for the end `a` or `b`."""
        own, relay = (
            str(self.path(end, whose)).replace(",", ",,") for whose in ("own", "relay")
        )  # fmt: skip
        return (
            f"dgram,id={name},local.type=unix,local.path={own},remote.type=unix,remote.path={relay}"
        )

    def __enter__(self) -> PacketRelay:
        """Bind the sockets and begin."""
        try:
            for end in ("a", "b"):
                path = self.path(end, "relay")
                if len(os.fsencode(path)) > LONGEST_PATH:
                    raise RelayError(f"{path}: too long for a Unix socket; choose a shorter folder")
                path.unlink(missing_ok=True)
                made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sockets[end] = made
                made.bind(str(path))
                made.setblocking(False)
        except OSError as error:
            self._close_sockets()
            raise RelayError(f"{self._folder}: no socket can be made: {error.strerror}") from error
        except RelayError:
            self._close_sockets()
            raise
        started = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            for way in WAYS:
                self._loop.add_reader(self._sockets[way[0]], self._take, way)
            self._loop.call_soon(started.set)
            self._loop.run_forever()
            self._loop.close()

        self._thread = threading.Thread(target=run, name="packet-relay", daemon=True)
        self._thread.start()
        if not started.wait(START_TIMEOUT_S):
            raise RelayError(f"the packet relay did not start within {START_TIMEOUT_S:g} s")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop; frames that wait are lost."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_TIMEOUT_S)
        self._close_sockets()

    def set(self, faults: PacketFaults, ways: tuple[Way, ...] = WAYS) -> None:
        """What happens to frames from now on; from any thread."""

        def change() -> None:
            for way in ways:
                self._faults[way] = faults
            if self._on_event is not None:
                where = "" if len(ways) == len(WAYS) else f" ({ways[0]})"
                self._on_event(f"{faults}{where}")

        self._loop.call_soon_threadsafe(change)

    def totals(self) -> Mapping[str, int]:
        """The counts of both ways together."""
        return sum(self.counts.values(), Counter())

    # -- on the relay's thread -----------------------------------------------------------------

    def _take(self, way: Way) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                frame = self._sockets[way[0]].recv(FRAME_BYTES)
            except (BlockingIOError, ConnectionError):
                return
            counts = self.counts[way]
            number = counts["in"]
            counts["in"] += 1
            copies = fates(self._faults[way], self.seed, way, number)
            if not copies:
                counts["lost"] += 1
            elif len(copies) > 1:
                counts["doubled"] += 1
            for late_s in copies:
                self._send_later(way, frame, late_s)

    def _send_later(self, way: Way, frame: bytes, late_s: float) -> None:
        if late_s <= 0:
            self._send(way, frame)
        elif self._held >= MOST_HELD:
            self.counts[way]["full"] += 1
        else:
            self._held += 1
            self.counts[way]["late"] += 1
            self._loop.call_later(late_s, self._release, way, frame)

    def _release(self, way: Way, frame: bytes) -> None:
        self._held -= 1
        if not self._faults[way].cut:
            self._send(way, frame)

    def _send(self, way: Way, frame: bytes) -> None:
        waiting = self._waiting[way]
        if waiting:
            self._queue(way, frame)
        elif not self._sent(way, frame):
            self._queue(way, frame)
            self._loop.call_later(RETRY_S, self._send_waiting, way)

    def _queue(self, way: Way, frame: bytes) -> None:
        if len(self._waiting[way]) < MOST_HELD:
            self._waiting[way].append(frame)
        else:
            self.counts[way]["full"] += 1

    def _send_waiting(self, way: Way) -> None:
        waiting = self._waiting[way]
        while waiting and self._sent(way, waiting[0]):
            waiting.popleft()
        if waiting:
            self._loop.call_later(RETRY_S, self._send_waiting, way)

    def _sent(self, way: Way, frame: bytes) -> bool:
        """Pass a frame on; False if the end has not read the last ten (unix(7), max_dgram_qlen)."""
        to = way[-1]
        try:
            self._sockets[to].sendto(frame, str(self.path(to, "own")))
            self.counts[way]["out"] += 1
        except BlockingIOError:
            return False
        except OSError:  # nobody there (yet): a frame more that is lost on the way
            self.counts[way]["refused"] += 1
        return True

    def _close_sockets(self) -> None:
        for end, each in self._sockets.items():
            each.close()
            with contextlib.suppress(OSError):
                self.path(end, "relay").unlink(missing_ok=True)
        self._sockets.clear()
