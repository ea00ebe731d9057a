"""gzip as RFC 1952 has it: every kind of header, members in a row, pieces of any size."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updater.artifact.compression import decompressor
from updater.artifact.errors import ArtifactFormatError, ArtifactTruncatedError
from updater.artifact.tar import Memory

EXTRA, NAME, COMMENT, HEADER_CHECKSUM = 4, 8, 16, 2


class Pieces:
    """Hands out at most so many bytes at a time."""

    def __init__(self, content: bytes, piece: int) -> None:
        self.memory = Memory(content)
        self.piece = piece

    def readinto(self, buffer: memoryview, /) -> int:
        return self.memory.readinto(buffer[: self.piece])


def member(content: bytes, flags: int = 0, length: int | None = None) -> bytes:
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff"
    if flags & EXTRA:
        head += b"\x05\x00a\0b\0c"
    if flags & NAME:
        head += b"rootfs.img\0"
    if flags & COMMENT:
        head += b"no comment\0"
    if flags & HEADER_CHECKSUM:
        head += (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little")
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    size = len(content) if length is None else length
    tail = zlib.crc32(content).to_bytes(4, "little") + size.to_bytes(4, "little")
    return head + packer.compress(content) + packer.flush() + tail


def unpacked(packed: bytes, piece: int = 1 << 16, room: int = 4096) -> bytes:
    reader = decompressor("gzip", Pieces(packed, piece), "x.gz")
    plain, buffer = b"", memoryview(bytearray(room))
    while count := reader.readinto(buffer):
        plain += buffer[:count]
    return plain


@settings(deadline=None)
@given(
    contents=st.lists(st.binary(max_size=400), min_size=1, max_size=3),
    flags=st.integers(0, 15).map(lambda number: number << 1),
    piece=st.integers(1, 60),
    room=st.integers(1, 600),
)
def test_it_unpacks_what_gzip_does(
    contents: list[bytes], flags: int, piece: int, room: int
) -> None:
    packed = b"".join(member(content, flags) for content in contents)
    assert unpacked(packed, piece, room) == gzip.decompress(packed) == b"".join(contents)


@pytest.mark.parametrize("flags", [0, EXTRA | NAME | COMMENT | HEADER_CHECKSUM])
def test_a_stream_that_is_cut_off_anywhere_is_refused(flags: int) -> None:
    packed = member(b"content" * 30, flags)
    for end in range(1, len(packed)):
        with pytest.raises(ArtifactTruncatedError):
            unpacked(packed[:end], piece=7)


@pytest.mark.parametrize(
    "packed",
    [
        b"PK\x03\x04" + bytes(40),
        b"\x1f\x8b\x07" + bytes(40),
        member(b"x", flags=0x20),
        member(b"content", length=8),
        member(b"content") + b"behind it",
        member(b"content")[:10] + b"\xff" * 40,
    ],
    ids=["zip", "method", "reserved flag", "length", "behind", "deflate"],
)
def test_what_is_no_gzip_is_refused(packed: bytes) -> None:
    with pytest.raises(ArtifactFormatError, match="bad gzip data"):
        unpacked(packed)
