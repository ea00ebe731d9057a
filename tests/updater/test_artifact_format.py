"""Artifacts that are right: written, read back, the same bytes every time, in bounded memory."""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import cryptography
import pytest
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st
from updater_artifacts import Parts, artifact, image_bytes, make_key, tar_of, write_key_pair

from updater.artifact import (
    ArtifactError,
    ArtifactReader,
    ArtifactSignatureError,
    check_compatible,
)
from updater.artifact.compression import SUFFIXES
from updater.artifact.signature import PrivateKey, load_private_key, load_public_key
from updater.artifact.tar import TarReader
from updater.cli import main


class Stream:
    """Bytes that arrive in pieces of at most `piece`, like a network."""

    def __init__(self, content: bytes, piece: int = 1 << 20) -> None:
        self._file = io.BytesIO(content)
        self._piece = piece

    def readinto(self, buffer: memoryview, /) -> int:
        return self._file.readinto(buffer[: self._piece])


def read_all(reader: ArtifactReader) -> bytes:
    return b"".join(bytes(piece) for piece in reader.payload)


@pytest.mark.parametrize("compression", list(SUFFIXES))
@pytest.mark.parametrize("kind", ["ecdsa", "rsa", "ed25519"])
def test_what_was_written_is_read(tmp_path: Path, compression: str, kind: str) -> None:
    content = image_bytes(300_001, 1)
    key = make_key(kind)
    path = artifact(tmp_path, content, key=key, compression=compression)
    reader = ArtifactReader(
        Stream(path.read_bytes()), [make_key("rsa").public_key(), key.public_key()]
    )
    assert read_all(reader) == content
    assert (reader.verified, reader.artifact_name) == (True, "v2")
    assert reader.provides["rootfs-image.checksum"] == reader.payload.sha256
    assert reader.type_info.clears == ("artifact_group", "rootfs_image_checksum", "rootfs-image.*")


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(min_size=1, max_size=5000),
    piece=st.integers(1, 700),
    compression=st.sampled_from(list(SUFFIXES)),
)
def test_any_content_survives_any_fragmentation(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, piece: int, compression: str
) -> None:
    path = artifact(tmp_path_factory.mktemp("fragment"), content, compression=compression)
    assert read_all(ArtifactReader(Stream(path.read_bytes(), piece))) == content


def twice(directory: Path, compression: str, key: PrivateKey | None) -> list[bytes]:
    made = []
    for place in ("one", "two"):
        (directory / place).mkdir()
        content = image_bytes(99_999, 2)
        made.append(artifact(directory / place, content, key=key, compression=compression))
    return [path.read_bytes() for path in made]


@pytest.mark.parametrize("compression", list(SUFFIXES))
def test_same_inputs_give_the_same_bytes(tmp_path: Path, compression: str) -> None:
    one, two = twice(tmp_path, compression, None)
    assert one == two


@pytest.mark.parametrize("kind", ["ecdsa", "rsa", "ed25519"])
def test_signing_is_deterministic(tmp_path: Path, kind: str) -> None:
    if kind == "ecdsa" and int(cryptography.__version__.split(".")[0]) < 43:
        pytest.skip("RFC 6979 needs cryptography 43; manifest.sig alone differs before it")
    one, two = twice(tmp_path, "gzip", make_key(kind))
    assert one == two


def test_an_independent_tar_reads_ours(tmp_path: Path) -> None:
    path = artifact(tmp_path, image_bytes(5000, 3), compression="xz")
    with tarfile.open(path) as outer:
        assert outer.getnames() == ["version", "manifest", "header.tar.xz", "data/0000.tar.xz"]
        data = outer.extractfile("data/0000.tar.xz")
        assert data is not None
        with tarfile.open(fileobj=data, mode="r:xz") as inner:
            assert inner.getmember("rootfs.img").size == 5000


def test_pax_archives_are_read() -> None:
    name = "d/" + "n" * 150
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = 3, 1.5
        archive.addfile(info, io.BytesIO(b"abc"))
    reader = TarReader(Stream(buffer.getvalue()), "test")
    member = reader.next()
    assert member == (name, 3)
    assert reader.read_all(member, 3) == b"abc"
    assert reader.next() is None
    reader.finish()


def test_der_signatures_are_accepted(signing_key: PrivateKey) -> None:
    parts = Parts(signing_key)
    raw = base64.b64decode(dict(parts.members())["manifest.sig"])
    der = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    parts.signature = base64.b64encode(der) + b"\n"
    reader = ArtifactReader(Stream(parts.build()), [signing_key.public_key()])
    assert read_all(reader) == parts.content


def test_the_signature_is_checked_before_the_header_is_read(signing_key: PrivateKey) -> None:
    """A wrong key is seen although the stream ends right behind the signature."""
    parts = Parts(make_key("ecdsa"))
    front = tar_of(parts.members()[:3])[: -10 * 512]
    with pytest.raises(ArtifactSignatureError):
        ArtifactReader(Stream(front), [signing_key.public_key()])


def test_artifacts_for_others_are_refused(signing_key: PrivateKey) -> None:
    parts = Parts(signing_key)
    parts.type_info["artifact_depends"] = {"rootfs-image.version": ["v1"]}
    reader = ArtifactReader(Stream(parts.build()))
    check_compatible(reader, "test-device", {"rootfs-image.version": "v1"})
    with pytest.raises(ArtifactError, match="is for device type test-device; this is other"):
        check_compatible(reader, "other", {})
    with pytest.raises(ArtifactError, match=r"needs rootfs-image\.version to be v1; .* has v0"):
        check_compatible(reader, "test-device", {"rootfs-image.version": "v0"})


@pytest.mark.parametrize("kind", ["ecdsa", "rsa", "ed25519"])
def test_keys_are_read_from_files(tmp_path: Path, kind: str) -> None:
    private, public = write_key_pair(make_key(kind), tmp_path, kind)
    key = load_private_key(private)
    path = artifact(tmp_path, b"x" * 1000, key=key)
    reader = ArtifactReader(Stream(path.read_bytes()), [load_public_key(public)])
    assert read_all(reader) == b"x" * 1000


def test_weak_and_foreign_keys_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("not a key")
    for load in (load_private_key, load_public_key):
        with pytest.raises(ArtifactError, match=r"bad\.pem: not"):
            load(bad)
        with pytest.raises(ArtifactError, match="cannot read the key: No such file"):
            load(tmp_path / "absent")


def test_command_line_writes_reads_and_validates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    private, public = write_key_pair(make_key("ecdsa"), tmp_path, "k")
    image, output = tmp_path / "rootfs.img", tmp_path / "v2.mender"
    image.write_bytes(image_bytes(70_000, 4))
    write = ["artifact", "write", "rootfs-image", "-f", str(image), "-n", "v2", "-t", "qemu-arm64"]
    assert main([*write, "-o", str(output), "-k", str(private)]) == 0
    assert main(["artifact", "validate", str(output), "-k", str(public)]) == 0
    assert main(["artifact", "read", str(output)]) == 0
    out = capfd.readouterr().out
    assert "valid, signed by a trusted key" in out
    assert "device types: qemu-arm64" in out
    assert main([*write, "-o", str(tmp_path / "no" / "x"), "--compression", "none"]) == 1
    assert main(["artifact", "validate", str(image)]) == 1
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("updater: error: ") for line in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "k.key",
        "k.pem",
        "rootfs.img",
        "v2.mender",
    ]
