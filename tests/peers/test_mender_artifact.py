"""Debian's `mender-artifact` reads and validates our artifacts, and we read and validate its."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from updater.artifact import ArtifactReader, ArtifactSignatureError, write_artifact
from updater.artifact.signature import PrivateKey, load_private_key, load_public_key

pytestmark = pytest.mark.skipif(
    not shutil.which("mender-artifact"),
    reason="mender-artifact is missing: apt-get install --no-install-recommends mender-artifact",
)

# mender-artifact calls xz "lzma" and knows no zstd before 4.0.
THEIR_NAMES = {"none": "none", "gzip": "gzip", "xz": "lzma"}


class Bench:
    """An image and a key pair on disk."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self.image = directory / "rootfs.img"
        self.image.write_bytes(bytes(range(256)) * 4000)
        key: PrivateKey = (
            rsa.generate_private_key(public_exponent=65537, key_size=3072)
            if kind == "rsa"
            else ec.generate_private_key(ec.SECP256R1())
        )
        self.private, self.public = directory / "private.pem", directory / "public.pem"
        self.private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        self.public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def theirs(self, *arguments: object) -> str:
        done = subprocess.run(
            ["mender-artifact", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def read(self, path: Path) -> tuple[ArtifactReader, bytes]:
        with path.open("rb", buffering=0) as file:
            reader = ArtifactReader(file, [load_public_key(self.public)])
            return reader, b"".join(bytes(piece) for piece in reader.payload)


@pytest.fixture(params=["ecdsa", "rsa"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, request.param)


@pytest.mark.parametrize("compression", THEIR_NAMES)
def test_they_accept_ours(bench: Bench, compression: str) -> None:
    ours = bench.directory / "ours.mender"
    write_artifact(
        ours,
        bench.image,
        name="release-2",
        device_types=["board-a", "board-b"],
        key=load_private_key(bench.private),
        compression=compression,
    )
    bench.theirs("validate", ours, "-k", bench.public)
    text = bench.theirs("read", ours, "-k", bench.public)
    assert "Name: release-2" in text
    assert "signed and verified correctly" in text
    assert "[board-a board-b]" in text.replace(",", "")
    assert "rootfs-image.version: release-2" in text
    assert 'Clears Provides: ["artifact_group", "rootfs_image_checksum", "rootfs-image.*"]' in text
    dumped = bench.directory / "dumped"
    dumped.mkdir()
    bench.theirs("dump", ours, "--files", dumped)
    assert (dumped / "rootfs.img").read_bytes() == bench.image.read_bytes()


@pytest.mark.parametrize("compression", THEIR_NAMES)
def test_we_accept_theirs(bench: Bench, compression: str) -> None:
    theirs = bench.directory / "theirs.mender"
    bench.theirs(
        "write", "rootfs-image", "-f", bench.image, "-n", "release-3", "-t", "board-a",
        "-o", theirs, "-k", bench.private, "--compression", THEIR_NAMES[compression],
        "--depends", "rootfs-image.version:release-2", "--provides-group", "beta",
    )  # fmt: skip
    reader, content = bench.read(theirs)
    assert content == bench.image.read_bytes()
    assert reader.verified
    assert reader.artifact_name == "release-3"
    assert reader.provides["artifact_group"] == "beta"
    assert reader.type_info.depends == {"rootfs-image.version": ("release-2",)}


def test_what_they_sign_of_ours_we_verify(bench: Bench) -> None:
    ours = bench.directory / "ours.mender"
    write_artifact(ours, bench.image, name="v", device_types=["board-a"], compression="gzip")
    with pytest.raises(ArtifactSignatureError):
        bench.read(ours)
    signed = bench.directory / "signed.mender"
    bench.theirs("sign", ours, "-k", bench.private, "-o", signed)
    reader, content = bench.read(signed)
    assert reader.verified
    assert content == bench.image.read_bytes()


def test_our_texts_are_theirs_byte_for_byte_except_the_type(bench: Bench) -> None:
    """Version 3.9 leaves `type` empty in type-info; everything else agrees."""
    ours, theirs = bench.directory / "ours.mender", bench.directory / "theirs.mender"
    write_artifact(ours, bench.image, name="v", device_types=["board-a"], compression="none")
    bench.theirs(
        "write", "rootfs-image", "-f", bench.image, "-n", "v", "-t", "board-a", "-o", theirs,
        "--compression", "none",
    )  # fmt: skip
    members = []
    for path in (ours, theirs):
        place = bench.directory / path.stem
        place.mkdir()
        subprocess.run(["tar", "-xf", path, "-C", place], check=True)
        subprocess.run(["tar", "-xf", place / "header.tar", "-C", place], check=True)
        members.append(
            {
                name: (place / name).read_bytes()
                for name in ("version", "header-info", "headers/0000/type-info")
            }
        )
    empty = b'"type":""'
    assert empty in members[1]["headers/0000/type-info"]
    members[1]["headers/0000/type-info"] = members[1]["headers/0000/type-info"].replace(
        empty, b'"type":"rootfs-image"'
    )
    assert members[0] == members[1]
