"""Artifacts taken apart and put together again, whatever is in them: the fuzzer's mutator.

A mutation of raw bytes dies at the first checksum. So this module opens an artifact as far as it
can be opened (tar, compression, inner tar), mutates one piece, and mends everything around it that
a checksum or a signature covers: compressed streams, tar checksums, the manifest, the signature.
What it mends is drawn too, so the checks themselves are exercised. It shares no code with
`updater.artifact`: a mistake there must not hide itself.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import lzma
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import zstandard
from cryptography.hazmat.primitives.asymmetric import ed25519

KEY = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
BLOCK = 512
_MAX_UNPACKED = 256 * 1024
_MAX_MEMBERS = 40
_SUFFIXES = {"": "none", ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}

Mutate = Callable[[bytes, int], bytes]


@dataclass
class Entry:
    """One tar member as it is in the file: header block, content, padding."""

    header: bytearray
    content: bytes
    archive: Archive | None = None
    compression: str = "none"

    @property
    def name(self) -> str:
        return bytes(self.header[:100]).split(b"\0", 1)[0].decode(errors="replace")


@dataclass
class Archive:
    """Members and whatever follows the last one that could be read."""

    entries: list[Entry] = field(default_factory=list)
    tail: bytes = b""


def take_apart(data: bytes) -> Archive:
    """Open an artifact as far as it opens; the rest stays as bytes."""
    outer = _open(data)
    for entry in outer.entries:
        for stem in ("header.tar", "data/0000.tar"):
            compression = _SUFFIXES.get(entry.name.removeprefix(stem))
            if entry.name.startswith(stem) and compression is not None:
                plain = _unpack(entry.content, compression)
                if plain is not None:
                    entry.archive = _open(plain)
                    entry.compression = compression
    return outer


def _open(data: bytes) -> Archive:
    archive = Archive()
    position = 0
    while position + BLOCK <= len(data) and len(archive.entries) < _MAX_MEMBERS:
        header = bytearray(data[position : position + BLOCK])
        if not any(header):
            break
        try:
            size = int(bytes(header[124:136]).strip(b"\0 ") or b"0", 8)
        except ValueError:
            break
        content = data[position + BLOCK : position + BLOCK + size]
        if len(content) < size:
            break
        archive.entries.append(Entry(header, content))
        position += BLOCK + -(-size // BLOCK) * BLOCK
    archive.tail = data[position:]
    return archive


def _unpack(content: bytes, compression: str) -> bytes | None:
    try:
        if compression == "gzip":
            return zlib.decompressobj(31).decompress(content, _MAX_UNPACKED)
        if compression == "xz":
            engine = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 27)
            return engine.decompress(content, _MAX_UNPACKED)
        if compression == "zstd":
            reader = zstandard.ZstdDecompressor().stream_reader(content)
            return bytes(reader.read(_MAX_UNPACKED))
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError, MemoryError):
        return None
    return content


def _pack(content: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(content, 1, mtime=0)
    if compression == "xz":
        return lzma.compress(content, preset=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(content)
    return content


def put_together(archive: Archive, *, mend_sizes: bool = True, mend_sums: bool = True) -> bytes:
    """Return the archive's bytes, with header fields mended as asked."""
    pieces = []
    for entry in archive.entries:
        if entry.archive is not None:
            plain = put_together(entry.archive, mend_sizes=mend_sizes, mend_sums=mend_sums)
            entry.content = _pack(plain, entry.compression)
        header = bytearray(entry.header)
        if mend_sizes:
            header[124:136] = b"%011o\0" % len(entry.content)
        if mend_sums:
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % sum(header)
        pieces += [bytes(header), entry.content, bytes(-len(entry.content) % BLOCK)]
    return b"".join(pieces) + archive.tail


def mend_manifest(outer: Archive, *, sign: bool) -> None:
    """Make the manifest tell the truth about what is there, and sign it if it was signed."""
    lines = []
    for entry in outer.entries:
        if entry.name == "version" or entry.name.startswith("header.tar"):
            lines.append((entry.name, entry.content))
        if entry.name.startswith("data/0000.tar") and entry.archive is not None:
            lines += [(f"data/0000/{e.name}", e.content) for e in entry.archive.entries]
    manifest = b"".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode() for name, content in lines
    )
    for entry in outer.entries:
        if entry.name == "manifest":
            entry.content = manifest
        if entry.name == "manifest.sig" and sign:
            entry.content = base64.b64encode(KEY.sign(manifest))


def mutate(data: bytes, max_size: int, seed: int, mutate_bytes: Mutate) -> bytes:
    """Return a mutation of an artifact, mended so far as the drawn flags say."""
    draw = random.Random(seed)
    outer = take_apart(data)
    if not outer.entries or draw.random() < 0.1:
        return mutate_bytes(data, max_size)
    archives = [outer] + [e.archive for e in outer.entries if e.archive is not None]
    archive = draw.choice(archives)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _change(archive, draw, mutate_bytes)
    mend_sizes, mend_sums = draw.random() < 0.9, draw.random() < 0.95
    # The inner archives must be packed before the manifest can tell the truth about them.
    put_together(outer, mend_sizes=mend_sizes, mend_sums=mend_sums)
    if draw.random() < 0.8:
        mend_manifest(outer, sign=draw.random() < 0.95)
    whole = put_together(outer, mend_sizes=mend_sizes, mend_sums=mend_sums)
    return whole[:max_size]


def _change(archive: Archive, draw: random.Random, mutate_bytes: Mutate) -> None:
    entries = archive.entries
    if not entries:
        archive.tail = mutate_bytes(archive.tail, len(archive.tail) + BLOCK)
        return
    index = draw.randrange(len(entries))
    entry = entries[index]
    kind = draw.randrange(10)
    if kind < 4:
        # Content. A packed archive that is changed as bytes is no longer opened.
        entry.archive = None
        entry.content = mutate_bytes(entry.content, len(entry.content) + 256)
    elif kind == 4:
        entry.header = bytearray(mutate_bytes(bytes(entry.header), BLOCK).ljust(BLOCK, b"\0"))
    elif kind == 5:
        name = mutate_bytes(entry.name.encode(), 99)[:99]
        entry.header[:100] = name.ljust(100, b"\0")
    elif kind == 6:
        other = draw.randrange(len(entries))
        entries[index], entries[other] = entries[other], entries[index]
    elif kind == 7 and len(entries) < _MAX_MEMBERS:
        entries.insert(draw.randrange(len(entries) + 1), _copy(entry))
    elif kind == 8:
        del entries[index]
    else:
        entry.header[156] = draw.choice(b"0\x001234567xgLKS")


def _copy(entry: Entry) -> Entry:
    return Entry(bytearray(entry.header), entry.content, None, entry.compression)
