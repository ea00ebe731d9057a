"""Write an image into a slot so that no cut leaves something that looks like a system.

The first 64 KiB (boot sector, ext4 superblock) are zeroed and synced before anything else, held
back while the rest streams, and written only when everything after them is durable: until then
no boot loader can load from the slot. Then the whole image is read back from the medium and its
SHA-256 compared. That is the one time that it is hashed, which on a processor without instructions
for it takes as long as all the rest; an Adler-32 of what came, the cheapest sum there is, compared
with what is there, says whose fault a difference is. Every write, sync and close that fails is
fatal. Constant memory: one buffer.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib

from updater.artifact.errors import ArtifactIntegrityError
from updater.device.errors import SlotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    from updater.device.config import Slot
    from updater.device.ports import BlockDevice

    class Payload(Protocol):
        """What is written: `updater.artifact.Payload` is one."""

        size: int
        sha256: str

        def readinto(self, buffer: memoryview, /) -> int:
            """Fill at least one byte; 0 when everything was read and found right."""
            ...


HEAD_BYTES = 64 * 1024
CHUNK_BYTES = 512 * 1024


class SlotWriter:
    """Writes one payload into one opened slot."""

    def __init__(self, device: BlockDevice, slot: Slot) -> None:
        self._device = device
        self._slot = slot
        self._came = 0
        # An anonymous map is page-aligned, which direct input/output needs.
        self._buffer = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        assert HEAD_BYTES % device.block_bytes == 0

    def check_fits(self, size_bytes: int) -> None:
        """Refuse an image that is larger than the slot."""
        if self._aligned(size_bytes) > self._device.size_bytes:
            raise SlotError(
                f"slot {self._slot.name} ({self._slot.device}) has {self._device.size_bytes}"
                f" bytes, the image needs {size_bytes}"
            )

    def write(self, payload: Payload) -> None:
        """Stream `payload` into the slot; its head goes last and still needs a `sync`."""
        self.check_fits(payload.size)
        self.invalidate()
        head = self._write_body(payload)
        self.sync()
        self._buffer[: len(head)] = head
        self._device.write(0, self._buffer[: len(head)])

    def invalidate(self) -> None:
        """Make the slot unloadable, durably."""
        length = min(HEAD_BYTES, self._device.size_bytes)
        self._buffer[:length] = bytes(length)
        self._device.write(0, self._buffer[:length])
        self.sync()

    def sync(self) -> None:
        """Make everything written durable."""
        self._device.sync()

    def read_back(self, payload: Payload) -> None:
        """Compare what the medium holds with what the payload's manifest promised.

        Raises ArtifactIntegrityError if the image came like this, SlotError if the storage failed.
        """
        digest = hashlib.sha256()
        for chunk in self._chunks(payload.size):
            digest.update(chunk)
        if digest.hexdigest() != payload.sha256:
            there = 0
            for chunk in self._chunks(payload.size):
                there = zlib.adler32(chunk, there)
            self.invalidate()
            if there == self._came:
                raise ArtifactIntegrityError(
                    f"the artifact is damaged: its image has SHA-256 {digest.hexdigest()} instead"
                    f" of {payload.sha256}"
                )
            raise SlotError(
                f"slot {self._slot.name} ({self._slot.device}) does not hold what was written:"
                f" SHA-256 {digest.hexdigest()} instead of {payload.sha256}; the storage may be"
                " failing"
            )

    def _chunks(self, size_bytes: int) -> Iterator[memoryview]:
        """What the medium holds, in pieces that are valid until the next."""
        for offset in range(0, size_bytes, CHUNK_BYTES):
            length = min(CHUNK_BYTES, size_bytes - offset)
            self._device.read_medium(offset, self._buffer[: self._aligned(length)])
            yield self._buffer[:length]

    def _write_body(self, payload: Payload) -> bytes:
        """Write everything behind the head; return the head, padded to whole blocks."""
        head = b""
        offset = self._came = 0
        while True:
            length = self._fill(payload)
            self._came = zlib.adler32(self._buffer[:length], self._came)
            if offset == 0:
                head_length = min(HEAD_BYTES, self._pad(length))
                head = bytes(self._buffer[:head_length])
                if length > HEAD_BYTES:
                    self._device.write(HEAD_BYTES, self._buffer[HEAD_BYTES : self._pad(length)])
            elif length:
                self._device.write(offset, self._buffer[: self._pad(length)])
            offset += length
            if length < CHUNK_BYTES:
                break
        if offset != payload.size:
            raise SlotError(f"the payload ended after {offset} of {payload.size} bytes")
        return head

    def _fill(self, payload: Payload) -> int:
        """Fill the buffer from the payload; less than the buffer only at its end."""
        length = 0
        while length < CHUNK_BYTES:
            count = payload.readinto(self._buffer[length:])
            if count == 0:
                break
            length += count
        return length

    def _pad(self, length: int) -> int:
        """Zero the buffer from `length` to the next whole block; return that block's end."""
        end = self._aligned(length)
        self._buffer[length:end] = bytes(end - length)
        return end

    def _aligned(self, length: int) -> int:
        block = self._device.block_bytes
        return -(-length // block) * block
