"""A recording: one update on one machine, kept in one file so that it can be cut anywhere later.

It holds the journal over all disks bit for bit, which base images it began with (by hash, with a
hint where they lie; the images themselves are not copied), and the facts of the run: rig, layout,
versions, the file that was synced before. RECORDING.md beside this file specifies the format. Most
of what an update writes stands in the base image already, so the journal is kept as references
into the bases and a compressed rest: a few MiB for an update of 64 MiB.

Written whole or not at all. A file that is cut short, damaged or of a later version gives one
`RecordingError` that says so. Reading unpacks the journal into an unnamed temporary file, which
disappears with this process whatever ends it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from framework.disk import SECTOR, BaseImageError, DiskError, JournalReader, Kind
from framework.disk.recorder import file_sha256

VERSION: Final = 1
SUFFIX: Final = ".recording"
_MAGIC: Final = b"BRWNRECD"
_HEAD: Final = struct.Struct("<8sIIQ")
_LITERAL: Final = 0xFF
_ZERO: Final = 0xFE
_PIECE: Final = np.dtype([("source", "<u8"), ("offset", "<u8"), ("length", "<u8")])
_LEVEL: Final = 12
_CHUNK: Final = 8 << 20
_MAX_HEADER: Final = 16 << 20
_ZEROES: Final = bytes(SECTOR)

Pieces = npt.NDArray[np.void]


class RecordingError(DiskError):
    """A recording can't be read or written; the message names the file and says what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"recording {path}: {reason}")
        self.path = path
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Header:
    """What a recording says of itself.

    `facts` are the run's: see RECORDING.md. `journal_bytes` and `journal_sha256` are of the
    unpacked journal.
    """

    created_utc: str
    facts: Mapping[str, Any]
    journal_bytes: int
    journal_sha256: str
    bases: tuple[Mapping[str, Any], ...]
    sections: Mapping[str, Mapping[str, int]]
    body_at: int


# ---------------------------------------------------------------- writing


def write_recording(journal: Path, destination: Path, facts: Mapping[str, Any]) -> Path:
    """Make a recording of a journal that is complete; its base images must be where it says.

    Raises RecordingError if it can't be written, JournalError or BaseImageError for its inputs.
    """
    reader = JournalReader(journal)
    bases = [
        {"name": d.name, "size": d.base.size_bytes, "sha256": d.base.sha256}
        for d in reader.header.devices
    ]
    paths = [reader.base_paths[d.name] for d in reader.header.devices]
    with journal.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.sha256(data).hexdigest()
        pieces, literals = _split(data, reader, paths)
        size = len(data)
    compressor = zstandard.ZstdCompressor(level=_LEVEL, threads=0)
    bodies = {
        "pieces": compressor.compress(pieces.tobytes()),
        "literals": compressor.compress(literals),
    }
    sections: dict[str, dict[str, int]] = {}
    at = 0
    for name, body in bodies.items():
        sections[name] = {"offset": at, "length": len(body), "xxh3": _digest(body)}
        at += len(body)
    text = json.dumps(
        {
            "created_utc": reader.header.created_utc,
            "facts": facts,
            "journal": {"size": size, "sha256": digest},
            "bases": bases,
            "sections": sections,
        },
        sort_keys=True,
    ).encode()
    head = _HEAD.pack(_MAGIC, VERSION, len(text), _digest(text))
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as out:
            for part in (head, text, *bodies.values()):
                out.write(part)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(destination)
    except OSError as error:
        raise RecordingError(destination, f"can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return destination


def _digest(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


class _Pieces:
    """Collects pieces, joining those that continue the one before."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self.literals = bytearray()

    def add(self, source: int, offset: int, length: int) -> None:
        if self.rows:
            last, start, size = self.rows[-1]
            if last == source and (source != _LITERAL and start + size == offset):
                self.rows[-1] = (source, start, size + length)
                return
        self.rows.append((source, offset, length))

    def literal(self, data: bytes | memoryview) -> None:
        self.literals += data
        if self.rows and self.rows[-1][0] == _LITERAL:
            self.rows[-1] = (_LITERAL, 0, self.rows[-1][2] + len(data))
        else:
            self.rows.append((_LITERAL, 0, len(data)))


def _split(data: mmap.mmap, reader: JournalReader, paths: Sequence[Path]) -> tuple[Pieces, bytes]:
    """The journal as pieces of base images and a rest."""
    operations = reader.operations
    writes = np.flatnonzero(operations.kind == Kind.WRITE)
    maps = [_Base(number, path) for number, path in enumerate(paths)]
    index: dict[int, tuple[_Base, int]] = {}
    for base in maps:
        for offset, digest in base.sectors():
            index.setdefault(digest, (base, offset))
    out = _Pieces()
    view = memoryview(data)
    try:
        at = 0
        for row in writes.tolist():
            position, length = int(operations.position[row]), int(operations.length[row])
            out.literal(view[at:position])
            _payload(out, view[position : position + length], index)
            at = position + length
        out.literal(view[at:])
    finally:
        view.release()
        for base in maps:
            base.close()
    return np.array(out.rows, dtype=_PIECE), bytes(out.literals)


class _Base:
    """A base image, mapped, as a source of sectors."""

    def __init__(self, number: int, path: Path) -> None:
        self.number = number
        with path.open("rb") as file:
            self._fd = os.dup(file.fileno())
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def sectors(self) -> Iterator[tuple[int, int]]:
        """The (offset, hash) of every sector that isn't all zeros. Holes are not read."""
        size = len(self.data)
        at = 0
        while at < size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError:
                return  # only a hole is left
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            for offset in range(start - start % SECTOR, min(at, size), SECTOR):
                sector = self.data[offset : offset + SECTOR]
                if sector != _ZEROES:
                    yield offset, xxhash.xxh3_64_intdigest(sector)

    def same(self, offset: int, data: memoryview) -> bool:
        """Whether `data` stands at `offset`."""
        return self.data[offset : offset + len(data)] == data

    def close(self) -> None:
        """Release the image."""
        self.data.close()
        os.close(self._fd)


def _payload(out: _Pieces, payload: memoryview, index: Mapping[int, tuple[_Base, int]]) -> None:
    """One write's payload: what a base holds as references, the rest as it is."""
    size = len(payload)
    at = 0
    while at < size:
        sector = payload[at : at + SECTOR]
        if sector == _ZEROES:
            out.add(_ZERO, 0, SECTOR)
            at += SECTOR
            continue
        found = index.get(xxhash.xxh3_64_intdigest(sector))
        if found is None or not found[0].same(found[1], sector):
            out.literal(sector)
            at += SECTOR
            continue
        base, offset = found
        length = SECTOR
        if base.same(offset, payload[at:]):
            length = size - at
        else:
            while at + length < size and base.same(
                offset + length, payload[at + length : at + length + SECTOR]
            ):
                length += SECTOR
        out.add(base.number, offset, length)
        at += length


# ---------------------------------------------------------------- reading


def read_header(path: Path) -> Header:
    """What a recording says of itself, without unpacking it.

    Raises RecordingError: it is no recording, cut short, damaged, or of a later version.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_HEAD.size)
            if not start.startswith(_MAGIC[: len(start)]) or not start:
                raise RecordingError(path, "not a recording (`brownout record` makes one)")
            if len(start) < _HEAD.size:
                raise RecordingError(path, f"cut short: {size} bytes, not even its header")
            _, version, length, checksum = _HEAD.unpack(start)
            if version != VERSION:
                raise RecordingError(
                    path, f"format version {version}, this program knows {VERSION}: update it"
                )
            text = file.read(min(length, _MAX_HEADER))
    except OSError as error:
        raise RecordingError(path, error.strerror or str(error)) from error
    if len(text) < length:
        raise RecordingError(path, f"cut short: {size} bytes, not even its header; copy it again")
    if _digest(text) != checksum:
        raise RecordingError(path, "its header is damaged (checksum); copy it again")
    try:
        fields = json.loads(text)
        sections = {
            str(name): {key: int(s[key]) for key in ("offset", "length", "xxh3")}
            for name, s in fields["sections"].items()
        }
        header = Header(
            created_utc=str(fields["created_utc"]),
            facts=dict(fields["facts"]),
            journal_bytes=int(fields["journal"]["size"]),
            journal_sha256=str(fields["journal"]["sha256"]),
            bases=tuple(dict(b) for b in fields["bases"]),
            sections=sections,
            body_at=_HEAD.size + length,
        )
        whole = header.body_at + max(s["offset"] + s["length"] for s in sections.values())
        _ = sections["pieces"], sections["literals"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(path, f"its header is malformed: {error!r}") from error
    if size < whole:
        raise RecordingError(path, f"cut short: {size} of {whole} bytes; copy it again")
    return header


class Recording:
    """A recording, unpacked. A context manager; `close` frees the space.

    `bases` gives base images by device name where they are not at the place that the journal
    names; their content is verified.
    """

    def __init__(self, path: Path, bases: Mapping[str, Path] | None = None) -> None:
        """Unpack the journal.

        Raises RecordingError for the file, BaseImageError for a base that is missing or another.
        """
        self.path = Path(path)
        self.header = read_header(self.path)
        self.facts: Mapping[str, Any] = self.header.facts
        self._file = tempfile.TemporaryFile(prefix="brownout-recording-")  # noqa: SIM115
        try:
            # Unnamed, so it can't be left behind; opened by others through this process.
            self.journal_path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
            self.base_paths = self._find_bases(bases or {})
            self._unpack()
            self.reader = JournalReader(self.journal_path, self.base_paths)
        except BaseException:
            self.close()
            raise

    def _find_bases(self, given: Mapping[str, Path]) -> dict[str, Path]:
        names = [str(b["name"]) for b in self.header.bases]
        for name in given:
            if name not in names:
                raise RecordingError(self.path, f"no device {name!r}; there are {', '.join(names)}")
        hints = self.facts.get("base_hints", {})
        found: dict[str, Path] = {}
        for base in self.header.bases:
            name = str(base["name"])
            path = Path(given.get(name, hints.get(name, "")))
            where = f"recording {self.path}: base image of {name}"
            ask = f"give it with --base {name}=PATH"
            if not path.is_file():
                raise BaseImageError(f"{where} is not at {path}; {ask}", path)
            if path.stat().st_size != base["size"] or file_sha256(path) != base["sha256"]:
                raise BaseImageError(
                    f"{where}: {path} is another image than was recorded (SHA-256); {ask}, "
                    "or build the images of that time",
                    path,
                )
            found[name] = path
        return found

    def _section(self, name: str) -> bytes:
        section = self.header.sections[name]
        with self.path.open("rb") as file:
            file.seek(self.header.body_at + section["offset"])
            body = file.read(section["length"])
        if _digest(body) != section["xxh3"]:
            raise RecordingError(self.path, f"damaged (checksum of its {name}); copy it again")
        try:
            return zstandard.ZstdDecompressor().decompress(body)
        except zstandard.ZstdError as error:
            raise RecordingError(self.path, f"damaged ({name}: {error})") from error

    def _unpack(self) -> None:
        pieces = np.frombuffer(self._section("pieces"), dtype=_PIECE)
        literals = memoryview(self._section("literals"))
        digest = hashlib.sha256()
        at = 0
        sources = [self.base_paths[str(b["name"])].open("rb") for b in self.header.bases]
        try:
            buffer = bytearray()
            for source, offset, length in pieces.tolist():
                if source == _LITERAL:
                    buffer += literals[at : at + length]
                    at += length
                elif source == _ZERO:
                    buffer += bytes(length)
                elif source < len(sources):
                    buffer += os.pread(sources[source].fileno(), length, offset)
                else:
                    raise RecordingError(self.path, f"damaged: it refers to base {source}")
                if len(buffer) >= _CHUNK:
                    digest.update(buffer)
                    self._file.write(buffer)
                    buffer.clear()
            digest.update(buffer)
            self._file.write(buffer)
            self._file.flush()
        except OSError as error:
            raise RecordingError(self.path, f"can't be unpacked: {error.strerror}") from error
        finally:
            for file in sources:
                file.close()
        if digest.hexdigest() != self.header.journal_sha256:
            raise RecordingError(self.path, "unpacks to another journal than was recorded")

    def close(self) -> None:
        """Free the unpacked journal."""
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
