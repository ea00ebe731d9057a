"""The four compressions of Artifact v3, as bounded readers and as deterministic writers.

Every reader fills the caller's buffer and no more, so a few bytes that unfold to gigabytes cost
nothing until someone asks for them; the caller stops at the size that was declared. Whoever unpacks
xz or zstd has to keep the window in memory that the packer chose: the readers refuse more than they
are allowed, and the writers choose a small one, whatever the level. zlib, lzma and zstandard are
imported when first used; the device's boot path needs none of them.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from updater.artifact.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactLimitError,
    ArtifactTruncatedError,
)
from updater.artifact.tar import Readable

SUFFIXES = {"none": "", "gzip": ".gz", "xz": ".xz", "zstd": ".zst"}
DEFAULT_LEVELS = {"none": 0, "gzip": 6, "xz": 6, "zstd": 9}
_LEVEL_RANGES = {"none": (0, 0), "gzip": (1, 9), "xz": (0, 9), "zstd": (1, 19)}
_INPUT_BYTES = 64 * 1024
MIB = 1024 * 1024
# What a writer chooses. Measured on a root file system: zstd's own choice at level 9 is 4 MiB, and
# saves 4.5 %; that of xz is 8 MiB. The device would hold that in memory beside everything else.
WINDOW_BYTES = MIB
# What a reader allows: other tools leave it to zstd -19 (8 MiB), xz -6 (8 MiB), xz -9 (64 MiB).
MAX_WINDOW_BYTES = 64 * MIB
# What liblzma keeps beside its dictionary.
_XZ_OVERHEAD_BYTES = MIB


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


def decompressor(
    compression: str, source: Readable, where: str, window_bytes: int = MAX_WINDOW_BYTES
) -> Readable:
    """Return a reader of the plain bytes of `source`, which refuses a larger window."""
    if compression == "none":
        return source
    if compression == "zstd":
        return _Zstd(source, where, window_bytes)
    return _Buffered(source, compression, where, window_bytes)


def compressor(
    compression: str, level: int | None = None, window_bytes: int = WINDOW_BYTES
) -> Compressor:
    """Return a compressor whose output depends on nothing but its input and these arguments.

    `window_bytes` is a power of two from 64 KiB on; a level that wants less has less.
    """
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

        # The dictionaries of xz(1)'s presets, in MiB.
        own = (0.25, 1, 2, 4, 4, 8, 8, 16, 32, 64)[level]
        size = min(int(own * MIB), window_bytes)
        chain = [{"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": size}]
        return lzma.LZMACompressor(lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=chain)
    if compression == "zstd":
        parameters = _zstandard().ZstdCompressionParameters
        log = min(parameters.from_level(level).window_log, window_bytes.bit_length() - 1)
        chosen = parameters.from_level(level, window_log=log, write_checksum=True)
        made: Compressor = _zstandard().ZstdCompressor(compression_params=chosen).compressobj()
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

    def __init__(self, source: Readable, compression: str, where: str, window_bytes: int) -> None:
        self._source = source
        self._compression = compression
        self._where = where
        self._window_bytes = window_bytes
        self._input = memoryview(bytearray(_INPUT_BYTES))
        self._pending = b""
        self._engine = self._new_engine()

    def _new_engine(self) -> Any:
        if self._compression == "gzip":
            import zlib  # noqa: PLC0415

            return zlib.decompressobj(31)
        import lzma  # noqa: PLC0415

        limit = self._window_bytes + _XZ_OVERHEAD_BYTES
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=limit)

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
            if "emory usage limit" in str(error):
                raise _too_large_a_window(self._where, self._window_bytes) from error
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

    def __init__(self, source: Readable, where: str, window_bytes: int) -> None:
        zstandard = _zstandard()
        self._where = where
        self._window_bytes = window_bytes
        self._error: type[Exception] = zstandard.ZstdError
        context = zstandard.ZstdDecompressor(max_window_size=window_bytes)
        # Across frames: what follows a frame must be a frame, so that garbage is seen.
        self._reader: Any = context.stream_reader(
            _Source(source), read_size=_INPUT_BYTES, read_across_frames=True
        )

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return int(self._reader.readinto(buffer))
        except self._error as error:
            if "too much memory" in str(error):
                raise _too_large_a_window(self._where, self._window_bytes) from error
            raise ArtifactFormatError(f"{self._where}: bad zstd data ({error})") from error


def _too_large_a_window(where: str, allowed_bytes: int) -> ArtifactLimitError:
    return ArtifactLimitError(
        f"{where}: unpacking it takes a window of more than the {allowed_bytes // MIB} MiB allowed"
        " here; pack it with a smaller one (--window-mib), or raise [download] window_mib"
    )


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
