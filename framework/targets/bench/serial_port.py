"""A serial port on the desk: a pty that outlives the power of the board behind it.

It behaves as a USB adapter does: what nobody reads is lost after a small buffer, its bytes take
their time at the baud rate, garbage arrives while power rises, bytes get lost, and it can vanish
and come back under another number. Its path is a link in /dev/shm, because labgrid's exporter
takes only paths in /dev, and a pty's own number changes when it comes back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from framework.targets.errors import RigError

__all__ = ["Line", "VirtualSerialPort"]

_CHUNK_BYTES = 512
_POLL_S = 0.2
_UNREAD_S = 1.0  # how long a full buffer is waited for: an adapter's is no larger than that
_BITS_PER_BYTE = 10  # start, eight, stop


@frozen
class Line:
    """The quality of a serial line.

    Attributes:
        baud: bits a second, which pace what the board sends; 0: no pacing.
        garbage_bytes: random bytes at each power-up, as of a wrong baud rate.
        lost_per_million: bytes of a million, sent by the board, that never arrive.
        flipped_per_million: bytes of a million, sent by the board, with one bit wrong.
        seed: of all of this.
    """

    baud: int = 115200
    garbage_bytes: int = 0
    lost_per_million: int = 0
    flipped_per_million: int = 0
    seed: int = 1

    def __attrs_post_init__(self) -> None:
        rates = (self.lost_per_million, self.flipped_per_million)
        if self.baud < 0 or self.garbage_bytes < 0 or any(not 0 <= r <= 10**6 for r in rates):
            raise RigError(f"{self}: a rate is out of range")


class VirtualSerialPort:
    """One port; `path` is what an exporter opens. `received` gets what comes from that side."""

    def __init__(self, path: Path, line: Line, received: Callable[[bytes], None]) -> None:
        self.path = path
        self.line = line
        self.unread_bytes = 0
        self._full = False
        self._received = received
        self._random = random.Random(line.seed)  # noqa: S311 - noise, not secrets
        self._lock = threading.Lock()
        self._master = self._slave = -1
        self._ended = threading.Event()
        self.plug_in()
        self._reader = threading.Thread(target=self._read, name=f"serial {path.name}", daemon=True)
        self._reader.start()

    # -- the adapter --------------------------------------------------------------------------

    @property
    def plugged_in(self) -> bool:
        """Whether the adapter is there."""
        return self._master >= 0

    def plug_in(self) -> None:
        """The adapter comes (back). Nothing happens if it is there."""
        with self._lock:
            if self._master >= 0:
                return
            self._master, self._slave = os.openpty()
            # Held open by us: without it the pty would hang up whenever the exporter closes it.
            tty.setraw(self._slave)
            os.set_blocking(self._master, False)
            new = self.path.with_name(f".{self.path.name}")
            new.unlink(missing_ok=True)
            new.symlink_to(os.ttyname(self._slave))
            new.replace(self.path)

    def pull_out(self) -> None:
        """The adapter vanishes: whoever has it open sees a hang-up. Idempotent."""
        with self._lock:
            self.path.unlink(missing_ok=True)
            for end in (self._slave, self._master):
                if end >= 0:
                    os.close(end)
            self._master = self._slave = -1

    def close(self) -> None:
        """Gone for good. Idempotent."""
        self._ended.set()
        if self._reader is not threading.current_thread():
            self._reader.join(5 * _POLL_S)
        self.pull_out()

    # -- bytes --------------------------------------------------------------------------------

    def power_rises(self) -> None:
        """The board gets power: the line is not steady yet."""
        self._put(self._random.randbytes(self.line.garbage_bytes))

    def send(self, data: bytes) -> None:
        """What the board says; takes the time that the baud rate takes."""
        for start in range(0, len(data), _CHUNK_BYTES):
            piece = data[start : start + _CHUNK_BYTES]
            began = time.monotonic()
            self._put(self._worn(piece))
            if self.line.baud:
                wire_s = len(piece) * _BITS_PER_BYTE / self.line.baud
                time.sleep(max(0.0, wire_s - (time.monotonic() - began)))

    def _worn(self, data: bytes) -> bytes:
        line = self.line
        if not line.lost_per_million and not line.flipped_per_million:
            return data
        kept = bytearray()
        for byte in data:
            if self._random.randrange(10**6) < line.lost_per_million:
                continue
            flip = self._random.randrange(10**6) < line.flipped_per_million
            kept.append(byte ^ (1 << self._random.randrange(8)) if flip else byte)
        return bytes(kept)

    def _put(self, data: bytes) -> None:
        deadline = time.monotonic() + (0.0 if self._full else _UNREAD_S)
        while data:
            with self._lock:
                master = self._master
                if master < 0:
                    self.unread_bytes += len(data)
                    return
                try:
                    data = data[os.write(master, data) :]
                    self._full = False
                    continue
                except BlockingIOError:
                    pass
                except OSError:
                    self.unread_bytes += len(data)
                    return
            if time.monotonic() > deadline:  # nobody reads: an adapter drops, and so do we
                self._full = True
                self.unread_bytes += len(data)
                return
            with contextlib.suppress(OSError, ValueError):
                select.select([], [master], [], 0.05)

    def _read(self) -> None:
        while not self._ended.is_set():
            master = self._master
            if master < 0:
                self._ended.wait(_POLL_S)
                continue
            data = b""
            try:
                readable, _, _ = select.select([master], [], [], _POLL_S)
                if readable:
                    data = os.read(master, 4096)
            except (OSError, ValueError) as error:  # pulled out meanwhile
                if getattr(error, "errno", None) not in (errno.EIO, errno.EBADF, None):
                    self._ended.wait(_POLL_S)
            if data:
                self._received(data)
