"""Coverage-guided fuzzing of the artifact reader with atheris (libFuzzer).

    .venv/bin/python tests/fuzz/fuzz_artifact.py -max_total_time=60 NEW_FOLDER tests/fuzz/corpus

The input is an artifact's bytes. Whatever they are, the reader must either refuse them with an
ArtifactError of one line, or accept an artifact that an independent look (Python's `tarfile` and
`hashlib`) finds right as well: order, names, checksums, signature. libFuzzer adds limits of memory
and time, so a bomb or an endless loop is found, too. The mutator is `structured.py`'s.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent))

import structured

with atheris.instrument_imports(include=["updater.artifact"]):
    from updater.artifact import compression, metadata, reader, signature, tar  # noqa: F401
    from updater.artifact.errors import ArtifactError

PUBLIC = structured.KEY.public_key()
LIMITS = reader.Limits(
    manifest=64 * 1024,
    compressed_header=256 * 1024,
    header_member=128 * 1024,
    header_total=512 * 1024,
    payload_total=8 << 20,
    window=8 << 20,
)
_MAX_MESSAGE = 2000
_BUFFER = memoryview(bytearray(64 * 1024))


class Pieces:
    """The input, at most `piece` bytes at a time."""

    def __init__(self, data: bytes, piece: int) -> None:
        self._data = memoryview(data)
        self._piece = piece

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), self._piece, len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def read(data: bytes, piece: int, *, trust: bool) -> tuple[reader.ArtifactReader, dict[str, bytes]]:
    """Read everything that the reader hands out; the payload's files by name."""
    opened = reader.ArtifactReader(Pieces(data, piece), [PUBLIC] if trust else [], LIMITS)
    files: dict[str, bytes] = {}
    for file in opened.files():
        content = bytearray()
        while count := file.readinto(_BUFFER):
            content += _BUFFER[:count]
        assert file.name not in files, f"{file.name} was handed out twice"
        assert len(content) == file.size, f"{file.name}: {len(content)} of {file.size} bytes"
        files[file.name] = bytes(content)
    assert opened.complete, "the files ended, but the artifact is not complete"
    return opened, files


def test_one_input(data: bytes) -> None:
    """What libFuzzer calls."""
    trust = bool(data) and data[-1] % 2 == 0
    try:
        opened, files = read(data, len(data) or 1, trust=trust)
    except ArtifactError as error:
        message = str(error)
        assert message and message.isprintable(), f"message: {message!r}"
        assert len(message) < _MAX_MESSAGE, f"a message of {len(message)} characters"
        return
    check_accepted(data, opened, files, trust=trust)
    again, files_again = read(data, 7 + len(data) // 5, trust=trust)
    assert (again.manifest, files_again) == (opened.manifest, files), "pieces change the result"


def check_accepted(
    data: bytes, opened: reader.ArtifactReader, files: dict[str, bytes], *, trust: bool
) -> None:
    """Compare what was accepted with what an independent reader finds."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        contents = {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    assert all(member.isreg() for member in members), "not a regular file"
    assert len(set(names)) == len(names), f"duplicates in {names}"
    shape = r"version manifest( manifest\.sig)? header\.tar(\.\w+)? data/0000\.tar(\.\w+)?"
    assert re.fullmatch(shape, " ".join(names)), f"order {names}"
    manifest = dict(
        reversed(line.split("  ", 1)) for line in contents["manifest"].decode().splitlines()
    )
    header = names[-2]
    truth = {name: contents[name] for name in ("version", header)}
    truth |= {f"data/0000/{name}": content for name, content in files.items()}
    assert set(truth) == set(manifest), f"listed {set(manifest)}, there {set(truth)}"
    for name, content in truth.items():
        assert hashlib.sha256(content).hexdigest() == manifest[name], f"checksum of {name}"
    assert opened.signed == ("manifest.sig" in names)
    assert opened.verified == trust
    if trust:
        PUBLIC.verify(base64.b64decode(contents["manifest.sig"].strip()), contents["manifest"])
    plain = re.compile(r"[A-Za-z0-9.,_-]+")
    for name in files:
        assert plain.fullmatch(name) and name not in (".", ".."), f"file name {name!r}"
    for name in opened.scripts:
        assert "/" not in name and name.startswith("Artifact"), f"script name {name!r}"
    kind = opened.payload_type
    assert kind is None or (plain.fullmatch(kind) and kind[0] not in ".-"), f"type {kind!r}"
    if kind == "rootfs-image":
        assert len(files) == 1 and all(files.values()), "an image without bytes"
    assert opened.artifact_name and opened.header_info.device_types


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's mutations, through checksums and compression."""
    return structured.mutate(bytes(data), max_size, seed, atheris.Mutate)


def main() -> None:
    """Hand over to libFuzzer; its options are the arguments."""
    defaults = ["-max_len=65536", "-rss_limit_mb=512", "-timeout=20", "-len_control=0"]
    given = [option.split("=")[0] for option in sys.argv[1:]]
    options = [option for option in defaults if option.split("=")[0] not in given]
    atheris.Setup(
        [sys.argv[0], *options, *sys.argv[1:]], test_one_input, custom_mutator=custom_mutator
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
