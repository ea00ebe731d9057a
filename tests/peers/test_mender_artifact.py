"""Debian's `mender-artifact` reads and validates our artifacts, and we read and validate its."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from updater.artifact import (
    ArtifactFormatError,
    ArtifactReader,
    ArtifactSignatureError,
    sign_artifact,
    write_artifact,
)
from updater.artifact.signature import PrivateKey, load_private_key, load_public_key
from updater.artifact.summary import differences, summarize
from updater.cli import main

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

    def ours(self, *arguments: object) -> None:
        assert main(["artifact", *map(str, arguments)]) == 0

    def put(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path

    def module_arguments(self) -> list[object]:
        """Arguments that both command lines understand: everything a module artifact can have."""
        arguments: list[object] = ["write", "module-image", "-T", "single-file", "-n", "v2"]
        arguments += ["-t", "board-a", "-t", "board-b", "-g", "beta", "-G", "alpha", "-G", "gamma"]
        arguments += ["-N", "v1", "-p", "zz:1", "-p", "aa:2", "-d", "lib:3"]
        arguments += ["--clears-provides", "old.*", "--software-name", "app"]
        arguments += ["-f", self.put("two.bin", bytes(range(256)) * 90)]
        arguments += ["-f", self.put("one", b"")]
        arguments += ["-m", self.put("meta.json", b'{"to": "/etc/x", "mode": 420, "a": [1, null]}')]
        for name in ("ArtifactInstall_Enter_10_stop", "ArtifactCommit_Leave_05"):
            arguments += ["-s", self.put(name, b"#!/bin/sh\nexit 0\n")]
        return arguments

    def unpacked(self, path: Path) -> dict[str, bytes]:
        """Every member of artifact, header and payload, found by GNU tar."""
        place = self.directory / f"{path.stem}.unpacked"
        place.mkdir()
        subprocess.run(["tar", "-xf", path, "-C", place], check=True)
        for inner in (*place.glob("header.tar*"), *place.glob("data/0000.tar*")):
            subprocess.run(["tar", "-xf", inner, "-C", inner.parent], check=True)
            inner.unlink()
        return {
            str(file.relative_to(place)): file.read_bytes()
            for file in place.rglob("*")
            if file.is_file()
        }

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


@pytest.mark.parametrize("compression", THEIR_NAMES)
def test_module_artifacts_of_both_are_the_same_member_for_member(
    bench: Bench, compression: str
) -> None:
    ours, theirs = bench.directory / "ours.mender", bench.directory / "theirs.mender"
    arguments = [*bench.module_arguments(), "--compression", THEIR_NAMES[compression]]
    bench.ours(*arguments, "-o", ours)
    bench.theirs(*arguments, "-o", theirs)
    one, two = bench.unpacked(ours), bench.unpacked(theirs)
    assert len(one) == 9
    # The header archives differ in their files' times; so the manifests do in its checksum.
    manifests = [content.pop("manifest").decode().splitlines() for content in (one, two)]
    assert one == two
    assert [line.split("  ")[1] for line in manifests[0]] == [
        line.split("  ")[1] for line in manifests[1]
    ]
    assert differences(summarize(ours), summarize(theirs), packing=True) == []


@pytest.mark.parametrize("compression", THEIR_NAMES)
def test_they_validate_read_sign_and_dump_our_module_artifacts(
    bench: Bench, compression: str
) -> None:
    ours = bench.directory / "ours.mender"
    bench.ours(*bench.module_arguments(), "--compression", compression, "-o", ours)
    bench.theirs("validate", ours)
    signed = bench.directory / "signed.mender"
    bench.theirs("sign", ours, "-k", bench.private, "-o", signed)
    text = bench.theirs("read", signed, "-k", bench.public)
    for words in ("signed and verified correctly", "Provides group: beta", "zz: 1", "lib: 3",
                  "Depends on one of artifact(s): [v1]", "of group(s): [alpha, gamma]",
                  "ArtifactInstall_Enter_10_stop", "rootfs-image.app.version: v2"):  # fmt: skip
        assert words in text
    assert summarize(signed, [load_public_key(bench.public)])["verified"]
    folder = bench.directory / "dumped"
    folder.mkdir()
    bench.theirs("dump", ours, "--files", folder, "--scripts", folder, "--meta-data", folder)
    dumped = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert dumped.pop("0000.meta-data").strip() == b'{"a":[1,null],"mode":420,"to":"/etc/x"}'
    assert dumped == {name: (bench.directory / name).read_bytes() for name in dumped}
    assert len(dumped) == 4


@pytest.mark.parametrize("compression", THEIR_NAMES)
def test_we_validate_sign_dump_and_remake_their_module_artifacts(
    bench: Bench, compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = bench.directory / "theirs.mender"
    bench.theirs(*bench.module_arguments(), "--compression", THEIR_NAMES[compression], "-o", theirs)
    signed = bench.directory / "signed.mender"
    sign_artifact(theirs, signed, load_private_key(bench.private))
    bench.theirs("validate", signed, "-k", bench.public)
    bench.ours("validate", signed, "-k", bench.public)
    capfd.readouterr()
    folder = bench.directory / "dumped"
    bench.ours("dump", theirs, "--files", folder, "--scripts", folder, "--meta-data", folder,
               "--print-cmdline")  # fmt: skip
    arguments = shlex.split(capfd.readouterr().out)[2:]
    again = bench.directory / "again.mender"
    bench.ours(*arguments, "-o", again)
    assert differences(summarize(theirs), summarize(again), packing=True) == []
    bench.theirs("validate", again)


ROOTFS_OPTIONS = [
    [],
    ["--software-filesystem", "myfs"],
    ["--software-name", "app"],
    ["--software-filesystem", "myfs", "--software-name", "app", "--software-version", "7"],
    ["--no-default-software-version"],
    ["--no-checksum-provide"],
    ["--legacy-rootfs-image-checksum"],
    ["--no-default-clears-provides"],
    ["--clears-provides", "foo", "--clears-provides", "rootfs-image.*"],
    ["-p", "rootfs-image.version:9", "-p", "aa:1", "-d", "bb:2"],
]


@pytest.mark.parametrize("options", ROOTFS_OPTIONS, ids=" ".join)
def test_options_mean_the_same_to_both(tmp_path: Path, options: list[str]) -> None:
    bench = Bench(tmp_path, "ecdsa")
    made = []
    for command, name in ((bench.ours, "ours"), (bench.theirs, "theirs")):
        output = tmp_path / f"{name}.mender"
        command("write", "rootfs-image", "-f", bench.image, "-n", "v2", "-t", "board-a",
                "--compression", "gzip", *options, "-o", output)  # fmt: skip
        made.append(summarize(output))
    assert differences(*made, packing=True) == []
    assert made[0]["clears"] == made[1]["clears"]


def test_bootstrap_artifacts_are_the_same_to_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "ecdsa")
    made = []
    for command, name in ((bench.ours, "ours"), (bench.theirs, "theirs")):
        output = tmp_path / f"{name}.mender"
        command("write", "bootstrap-artifact", "-n", "v1", "-t", "board-a", "--compression", "gzip",
                "-o", output, "-k", bench.private)  # fmt: skip
        bench.theirs("validate", output, "-k", bench.public)
        made.append(summarize(output, [load_public_key(bench.public)]))
    assert differences(*made, packing=True) == []


def test_augmented_artifacts_are_refused_with_the_reason(tmp_path: Path) -> None:
    """A real one, as mender-artifact writes it: no signature covers the augmented part."""
    bench = Bench(tmp_path, "ecdsa")
    theirs = tmp_path / "augmented.mender"
    extra = bench.put("extra", b"x")
    bench.theirs("write", "module-image", "-T", "m", "-n", "v2", "-t", "b", "-f", bench.image,
                 "--augment-type", "m", "--augment-file", extra, "-o", theirs)  # fmt: skip
    with pytest.raises(ArtifactFormatError, match="manifest-augment: augmented sections"):
        summarize(theirs)


def test_they_do_not_read_our_ed25519_signatures(tmp_path: Path) -> None:
    """A limit of 3.9, and a trap: it exits with 0 all the same, having checked nothing."""
    from cryptography.hazmat.primitives.asymmetric import ed25519

    bench = Bench(tmp_path, "ecdsa")
    key = ed25519.Ed25519PrivateKey.generate()
    ours = tmp_path / "ours.mender"
    write_artifact(ours, bench.image, name="v", device_types=["b"], key=key, compression="gzip")
    public = bench.put(
        "ed.pem",
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )
    assert summarize(ours, [load_public_key(public)])["verified"]
    assert "validated successfully" not in bench.theirs("validate", ours, "-k", public)
