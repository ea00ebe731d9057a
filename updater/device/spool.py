"""What was downloaded so far, kept on the data partition, so that a power cut does not undo it.

A checkpoint must let the whole artifact be checked again from its first byte: signature, hashes,
and the state of hash functions and decompressors, none of which can be stored (`hashlib` and the
decompressors have no serialised form, and mid-stream there is no place in a compressed payload to
start from). So the artifact's raw bytes are kept, and replayed: that works for every compression
and payload, and nothing unverified is trusted. It costs the artifact's size on the data partition
and in writes, so it is done only for downloads that are slow enough to be worth it.

`download` holds the bytes; `download.checkpoint`, replaced atomically, says how many of them were
fsynced, their SHA-256, and what they are the beginning of. Bytes beyond it do not count; bytes that
do not match it are thrown away. A spool that cannot be written is given up, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import NamedTuple

from updater.device import files
from updater.device.console import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import _Hash

CHECKPOINT_BYTES = 4 * 1024 * 1024
RESERVE_BYTES = 8 * 1024 * 1024
# What is held in memory until it is known whether the download is slow; the pace of the second
# half counts, because the first is the connection's slow start.
HOLD_BYTES = 256 * 1024
_PIECE_BYTES = 256 * 1024


class Checkpoint(NamedTuple):
    """How much of what is there: `identity` names the source, `validator` is its ETag."""

    identity: str
    total: int
    validator: str
    size: int
    sha256: str


def worth_it(
    total_bytes: int, sample_bytes: int, elapsed_s: float, free_bytes: int, min_s: float
) -> bool:
    """Say whether a download whose last `sample_bytes` took that long should be spooled."""
    expected_s = total_bytes * elapsed_s / max(1, sample_bytes)
    return expected_s >= min_s and free_bytes >= total_bytes + RESERVE_BYTES


class Spool:
    """The spool in `directory`; `close` makes a last checkpoint."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._path = f"{directory}/download"
        self._record = f"{directory}/download.checkpoint"
        self._handle = -1
        self._digest: _Hash | None = None
        self._size = 0
        self._durable = 0
        self._head: tuple[str, int, str] = ("", 0, "")

    def free_bytes(self) -> int:
        """Return the room on the data partition; 0 when that cannot be told."""
        try:
            return files.free_bytes(self._directory)
        except OSError:
            return 0

    def find(self, identity: str) -> Checkpoint | None:
        """Return the checkpoint of this source if its bytes are all there and right."""
        try:
            with open(self._record, "rb") as file:  # noqa: PTH123
                values = json.loads(file.read(16 * 1024))
            checkpoint = Checkpoint(**values)
            if checkpoint.identity != identity:
                return None
            self._handle = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            digest = self._hash(checkpoint.size)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            say(f"warning: {self._record}: {error}; the download starts again")
            self.discard()
            return None
        if digest.hexdigest() != checkpoint.sha256:
            say(f"warning: {self._path} is not what was downloaded; the download starts again")
            self.discard()
            return None
        self._digest = digest
        self._size = self._durable = checkpoint.size
        self._head = (checkpoint.identity, checkpoint.total, checkpoint.validator)
        return checkpoint

    def _hash(self, size: int) -> _Hash:
        digest = hashlib.sha256()
        at = 0
        while at < size:
            piece = os.pread(self._handle, min(_PIECE_BYTES, size - at), at)
            if not piece:
                break
            digest.update(piece)
            at += len(piece)
        return digest

    def read(self, at: int, buffer: memoryview) -> int:
        """Replay: fill `buffer` from byte `at` of what the checkpoint covers."""
        return os.preadv(self._handle, [buffer[: self._durable - at]], at)

    def begin(self, identity: str, total: int, validator: str, held: bytes) -> None:
        """Start anew with the first bytes."""
        self.discard()
        self._head = (identity, total, validator)
        self._digest = hashlib.sha256()
        self._size = self._durable = 0
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._handle = os.open(self._path, flags, 0o600)
        except OSError as error:
            self._give_up(error)
            return
        self.append(held)

    def append(self, data: bytes | memoryview) -> None:
        """Add bytes; every few MiB they become durable."""
        if self._handle < 0 or self._digest is None:
            return
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], self._size + done)
        except OSError as error:
            self._give_up(error)
            return
        self._digest.update(data)
        self._size += len(data)
        if self._size - self._durable >= CHECKPOINT_BYTES:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Make what was added durable, and only then say so."""
        if self._handle < 0 or self._digest is None or self._size == self._durable:
            return
        record = Checkpoint(*self._head, self._size, self._digest.hexdigest())
        try:
            os.fsync(self._handle)
            files.write_durably(self._record, json.dumps(record._asdict()).encode())
        except OSError as error:
            self._give_up(error)
            return
        self._durable = self._size

    def close(self) -> None:
        """Keep what there is for the next time."""
        self.checkpoint()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def discard(self) -> None:
        """Remove everything; the record first, so that it never speaks of bytes that are gone."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        for path in (self._record, self._path):
            try:
                os.unlink(path)  # noqa: PTH108
            except OSError:
                continue

    def _give_up(self, error: OSError) -> None:
        say(f"warning: {self._path}: {error.strerror}; a restart would begin the download again")
        self.discard()
