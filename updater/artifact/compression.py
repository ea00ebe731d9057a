"""The four compressions of Artifact v3, as bounded readers and as deterministic writers.

Every reader fills the caller's buffer and no more, so a few bytes that unfold to gigabytes cost
nothing until someone asks for them; the caller stops at the size that was declared. Windows are
bounded too (`_MAX_ZSTD_WINDOW`, `_MAX_XZ_MEMORY`): memory stays constant whatever the file says.
zlib, lzma and zstandard are imported when first used; the device's boot path needs none of them.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from updater.artifact.errors import ArtifactError, ArtifactFormatError, ArtifactTruncatedError
from updater.artifact.tar import Readable

SUFFIXES = {"none": "", "gzip": ".gz", "xz": ".xz", "zstd": ".zst"}
DEFAULT_LEVELS = {"none": 0, "gzip": 6, "xz": 6, "zstd": 9}
_LEVEL_RANGES = {"none": (0, 0), "gzip": (1, 9), "xz": (0, 9), "zstd": (1, 19)}
_INPUT_BYTES = 64 * 1024
# Level 19 needs 8 MiB of window, xz -6 a dictionary of 8 MiB (9 MiB of memory), xz -9 64 MiB.
_MAX_ZSTD_WINDOW = 16 * 1024 * 1024
_MAX_XZ_MEMORY = 68 * 1024 * 1024


class Compressor(Protocol):
    """What zlib, lzma and zstandard agree on."""

    def compress(self, data: bytes, /) -> bytes:
        """Take input, return what is ready."""
        ...

    def flush(self) -> bytes:
        """End the stream, return the rest."""
        ...


def compression_of(name: str, stem: str) -> str | None:
    """Return the compression that `name` has if it is `stem` plus a known suffix."""
    for compression, suffix in SUFFIXES.items():
        if name == stem + suffix:
            return compression
    return None


def decompressor(compression: str, source: Readable, where: str) -> Readable:
    """Return a reader of the plain bytes of `source`."""
    if compression == "none":
        return source
    if compression == "zstd":
        return _Zstd(source, where)
    return _Buffered(source, compression, where)


def compressor(compression: str, level: int | None = None) -> Compressor:
    """Return a compressor whose output depends on nothing but its input and level."""
    if compression not in SUFFIXES:
        raise ArtifactError(f"unknown compression {compression!r}; known: {', '.join(SUFFIXES)}")
    if level is None:
        level = DEFAULT_LEVELS[compression]
    low, high = _LEVEL_RANGES[compression]
    if not low <= level <= high:
        raise ArtifactError(f"{compression} has levels {low} to {high}, not {level}")
    if compression == "gzip":
        import zlib  # noqa: PLC0415

        # wbits 31: a gzip wrapper whose time field is zero.
        return zlib.compressobj(level, zlib.DEFLATED, 31)
    if compression == "xz":
        import lzma  # noqa: PLC0415

        return lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC64, level)
    if compression == "zstd":
        zstandard = _zstandard()
        context = zstandard.ZstdCompressor(level=level, write_checksum=True)
        made: Compressor = context.compressobj()
        return made
    return _Plain()


class _Plain:
    """No compression."""

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _Buffered:
    """gzip and xz through the standard library, one bounded piece at a time."""

    def __init__(self, source: Readable, compression: str, where: str) -> None:
        self._source = source
        self._compression = compression
        self._where = where
        self._input = memoryview(bytearray(_INPUT_BYTES))
        self._pending = b""
        self._engine = self._new_engine()

    def _new_engine(self) -> Any:
        if self._compression == "gzip":
            import zlib  # noqa: PLC0415

            return zlib.decompressobj(31)
        import lzma  # noqa: PLC0415

        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_XZ_MEMORY)

    def readinto(self, buffer: memoryview, /) -> int:
        while len(buffer):
            if self._engine.eof:
                # Both formats allow several streams in a row; anything else after one is garbage.
                self._pending = self._engine.unused_data
                if not self._pending and not self._refill():
                    return 0
                self._engine = self._new_engine()
            ended = not self._pending and self._wants_input() and not self._refill()
            # Also at the end of the input: the engine may still hold output back.
            data = self._step(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            if ended and not self._engine.eof:
                raise ArtifactTruncatedError(
                    f"{self._where}: the {self._compression} stream is cut off"
                )
        return 0

    def _wants_input(self) -> bool:
        return self._compression == "gzip" or bool(self._engine.needs_input)

    def _step(self, limit: int) -> bytes:
        given, self._pending = self._pending, b""
        try:
            data: bytes = self._engine.decompress(given, limit)
        except _codec_errors() as error:
            raise ArtifactFormatError(f"{self._where}: bad {self._compression} data") from error
        if self._compression == "gzip":
            self._pending = self._engine.unconsumed_tail
        return data

    def _refill(self) -> bool:
        count = self._source.readinto(self._input)
        self._pending = bytes(self._input[:count])
        return count > 0


class _Source:
    """Gives zstandard's stream_reader the `read` that it wants."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._input = memoryview(bytearray(_INPUT_BYTES))

    def read(self, size: int) -> bytes:
        count = self._source.readinto(self._input[: min(size, _INPUT_BYTES)])
        return bytes(self._input[:count])


class _Zstd:
    """zstd, decompressed straight into the caller's buffer."""

    def __init__(self, source: Readable, where: str) -> None:
        zstandard = _zstandard()
        self._where = where
        self._error: type[Exception] = zstandard.ZstdError
        context = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
        # Across frames: what follows a frame must be a frame, so that garbage is seen.
        self._reader: Any = context.stream_reader(
            _Source(source), read_size=_INPUT_BYTES, read_across_frames=True
        )

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            raise ArtifactFormatError(f"{self._where}: bad zstd data ({error})") from error


def _zstandard() -> Any:
    try:
        import zstandard  # noqa: PLC0415
    except ImportError as error:
        raise ArtifactError(
            "zstd needs the Python package zstandard (Debian: python3-zstandard)"
        ) from error
    return zstandard


def _codec_errors() -> tuple[type[Exception], ...]:
    """Return what the codecs that were imported so far may raise."""
    found: list[type[Exception]] = [OSError, EOFError, ValueError, MemoryError]
    for module, name in (("zlib", "error"), ("lzma", "LZMAError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)
