"""`updater artifact …` on the host: what is written, signed, taken apart and compared is right."""

from __future__ import annotations

import io
import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_artifact_format import Stream
from updater_artifacts import image_bytes, make_key, write_key_pair

from updater.artifact import ArtifactError, ArtifactReader, write_module_artifact
from updater.artifact.signature import load_public_key
from updater.artifact.summary import differences, summarize
from updater.artifact.tar import TarReader, header
from updater.cli import main


class Host:
    """A folder with inputs, and the command line."""

    def __init__(self, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self._capfd = capfd
        self.private, self.public = write_key_pair(make_key("ecdsa"), directory, "key")
        self.one = self.put("one.bin", image_bytes(50_000, 1))
        self.two = self.put("two", b"")
        self.meta = self.put("meta.json", b'{"mode": 420, "to": ["/etc", null]}')
        self.scripts = [
            self.put("ArtifactInstall_Enter_10_stop", b"#!/bin/sh\nexit 0\n"),
            self.put("ArtifactCommit_Leave_05", b"#!/bin/sh\nexit 21\n"),
        ]
        self.output = directory / "out.mender"

    def put(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path

    def run(self, *arguments: object, fails: str | None = None) -> str:
        code = main(["artifact", *map(str, arguments)])
        out, err = self._capfd.readouterr()
        if fails is None:
            assert (code, err) == (0, "")
        else:
            assert code == 1
            assert err.startswith("updater: error: ") and err.count("\n") == 1
            assert fails in err
        return out

    def run_json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def module(self, *more: object, output: Path | None = None) -> Path:
        output = output or self.output
        self.run(
            "write", "module-image", "-T", "single-file", "-n", "v2", "-t", "board", "-f", self.one,
            "-f", self.two, "-m", self.meta, "-s", self.scripts[0], "-s", self.scripts[1],
            "-o", output, *more,
        )  # fmt: skip
        return output

    def left_over(self) -> list[str]:
        return [path.name for path in self.directory.rglob(".*")]


@pytest.fixture
def host(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, capfd)


def test_a_module_artifact_says_everything_that_was_asked_for(host: Host) -> None:
    host.module(
        "-g", "beta", "-G", "alpha", "-G", "gamma", "-N", "v1", "-p", "a:b:c", "-d", "lib:1",
        "-d", "lib:2", "--clears-provides", "old.*", "--software-name", "app",
        "--software-version", "7", "-k", host.private,
    )  # fmt: skip
    found = host.run_json("read", host.output, "-k", host.public)
    files, scripts = found.pop("files"), found.pop("scripts")
    assert found == {
        "name": "v2",
        "device_types": ["board"],
        "group": "beta",
        "depends_names": ["v1"],
        "depends_groups": ["alpha", "gamma"],
        "payload": "single-file",
        "provides": {"a": "b:c", "rootfs-image.app.version": "7"},
        "depends": {"lib": ["1", "2"]},
        "clears": ["old.*", "rootfs-image.app.*"],
        "meta_data": {"mode": 420, "to": ["/etc", None]},
        "compression": "zstd",
        "payload_compression": "zstd",
        "signed": True,
        "verified": True,
    }
    assert {name: file["size"] for name, file in files.items()} == {"one.bin": 50_000, "two": 0}
    assert list(scripts) == [path.name for path in host.scripts]
    text = host.run("read", host.output)
    for line in ("group: beta", "needs group: alpha or gamma", "needs: lib=1 or 2"):
        assert line in text.splitlines()


def test_a_bootstrap_artifact_has_no_payload(host: Host) -> None:
    host.run("write", "bootstrap-artifact", "-n", "v1", "-t", "board", "-o", host.output)
    found = host.run_json("read", host.output)
    assert (found["payload"], found["files"], found["provides"]) == (None, {}, {})


def test_a_dump_makes_the_same_artifact_again_byte_for_byte(host: Host) -> None:
    host.module("-g", "beta", "-N", "v1", "-p", "a:b", "-d", "c:d", "--compression", "gzip")
    folder = host.directory / "with space"
    line = host.run(
        "dump", host.output, "--files", folder, "--scripts", folder, "--meta-data", folder,
        "--print-cmdline",
    )  # fmt: skip
    arguments = shlex.split(line)
    assert arguments[:2] == ["updater", "artifact"]
    again = host.directory / "again.mender"
    host.run(*arguments[2:], "-o", again)
    assert again.read_bytes() == host.output.read_bytes()
    assert (folder / host.scripts[0].name).stat().st_mode & 0o111
    assert host.left_over() == []


def test_a_dump_replaces_nothing_and_a_broken_artifact_leaves_nothing(host: Host) -> None:
    folder = host.directory / "dump"
    whole = host.module("--compression", "none").read_bytes()
    broken = host.put("broken.mender", whole + b"x")
    host.run("dump", broken, "--files", folder, "--scripts", folder, fails="data after")
    assert list(folder.iterdir()) == []
    mine = folder / "two"
    mine.write_text("mine")
    host.run("dump", host.output, "--files", folder, fails="two: exists already")
    assert mine.read_text() == "mine"
    mine.unlink()
    mine.symlink_to(host.directory / "elsewhere")
    host.run("dump", host.output, "--files", folder, fails="two: exists already")
    assert not (host.directory / "elsewhere").exists()
    assert [path.name for path in folder.iterdir()] == ["two"]


def test_signing_changes_nothing_but_the_signature(host: Host) -> None:
    unsigned = host.module().read_bytes()
    signed = host.directory / "signed.mender"
    host.run("sign", host.output, "-k", host.private, "-o", signed)
    assert host.output.read_bytes() == unsigned
    assert "signed by a trusted key" in host.run("validate", signed, "-k", host.public)
    with tarfile.open(host.output) as before, tarfile.open(signed) as after:
        names = after.getnames()
        assert names.pop(2) == "manifest.sig"
        assert names == before.getnames()
        for name in names:
            one, two = before.extractfile(name), after.extractfile(name)
            assert one is not None and two is not None
            assert one.read() == two.read()
    direct = host.module("-k", host.private, output=host.directory / "direct.mender")
    assert differences(summarize(signed), summarize(direct), packing=True) == []


def test_a_signature_is_replaced_only_by_force(host: Host) -> None:
    host.module("-k", host.private)
    other, other_public = write_key_pair(make_key("ed25519"), host.directory, "other")
    host.run("sign", host.output, "-k", other, fails="is signed already")
    host.run("validate", host.output, "-k", host.public)
    host.run("sign", host.output, "-k", other, "--force")
    host.run("validate", host.output, "-k", other_public)
    host.run("validate", host.output, "-k", host.public, fails="none of the 1 trusted key")
    host.run("validate", host.output, "-k", host.public, "-k", other_public)


def test_a_broken_artifact_is_not_signed(host: Host) -> None:
    whole = bytearray(host.module("--compression", "none").read_bytes())
    at = whole.index(image_bytes(50_000, 1)[:100])
    whole[at] ^= 1
    host.output.write_bytes(whole)
    host.run("sign", host.output, "-k", host.private, fails="SHA-256")
    assert host.output.read_bytes() == bytes(whole)
    assert host.left_over() == []


def test_diff_sees_meaning_and_not_packing(host: Host) -> None:
    host.module("--compression", "gzip")
    other = host.module(
        "--compression", "xz", "-k", host.private, output=host.directory / "other.mender"
    )
    assert host.run("diff", host.output, other, "--exit-code") == ""
    packing = host.run_json("diff", host.output, other, "--packing")["differences"]
    assert {change["path"] for change in packing} == {
        "compression",
        "payload_compression",
        "signed",
    }
    host.one.write_bytes(b"changed")
    host.scripts[0].write_bytes(b"#!/bin/sh\nexit 1\n")
    host.meta.write_text('{"mode": 384, "to": ["/etc", null]}')
    host.module("-t", "other-board", "-p", "new:1", output=other)
    changes = host.run_json("diff", host.output, other)["differences"]
    assert {change["path"] for change in changes} == {
        "device_types",
        "provides.new",
        "meta_data.mode",
        "files.one.bin.size",
        "files.one.bin.sha256",
        "scripts.ArtifactInstall_Enter_10_stop.sha256",
    }
    assert main(["artifact", "diff", str(host.output), str(other), "--exit-code"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-T", "../../bin/sh"], "malformed payload type"),
        (["-T", "rootfs-image"], "write it as a rootfs-image"),
        (["-p", "novalue"], "--provides novalue: not KEY:VALUE"),
        (["-d", "device_type:x"], "use --artifact-name-depends, --depends-groups or --device-type"),
        (["-n", "\x1b[2J"], "artifact name: '\\x1b[2J' is empty"),
        (["-s", "{d}/Download_Enter_00"], "not named State_Action_NN"),
        (["-s", "{d}/ArtifactInstall_Enter_10_stop"], "a second script named"),
        (["-s", "{d}/absent"], "not named State_Action_NN"),
        (["-s", "{d}/ArtifactInstall_Enter_11"], "No such file"),
        (["-f", "{d}/one.bin"], "a second file named one.bin"),
        (["-f", "{d}/sp ace"], "not a plain file name"),
        (["-f", "{d}/absent"], "No such file"),
        (["-m", "{d}/list.json"], "list.json: meta-data: not a JSON object"),
        (["-k", "{d}/key.pem"], "not an unencrypted PEM private key"),
        (["--compression", "zstd", "--level", "99"], "zstd has levels 1 to 19"),
        (["-o", "{d}/no/where"], "No such file or directory"),
    ],
)
def test_what_makes_no_good_artifact_is_refused(
    host: Host, arguments: list[str], message: str
) -> None:
    host.put("Download_Enter_00", b"")
    host.put("sp ace", b"")
    host.put("list.json", b"[1]")
    given = [argument.replace("{d}", str(host.directory)) for argument in arguments]
    host.run(
        "write", "module-image", "-T", "m", "-n", "v2", "-t", "board", "-f", host.one,
        "-s", host.scripts[0], "-o", host.output, *given, fails=message,
    )  # fmt: skip
    assert not host.output.exists()
    assert host.left_over() == []


def test_an_empty_image_is_refused(host: Host) -> None:
    host.run(
        "write", "rootfs-image", "-f", host.two, "-n", "v", "-t", "b", "-o", host.output,
        fails="two: empty",
    )  # fmt: skip


def test_a_file_that_changes_while_it_is_packed_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "growing.bin"
    source.write_bytes(b"x" * 100)
    output = tmp_path / "out.mender"

    def grow(_: int) -> None:
        with source.open("ab") as file:
            file.write(b"y")

    with pytest.raises(ArtifactError, match="changed while it was being read"):
        write_module_artifact(
            output, [source], payload_type="m", name="v", device_types=["b"], progress=grow
        )
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("length", [100, 101, 240])
def test_long_names_are_written_and_read(tmp_path: Path, length: int) -> None:
    source = tmp_path / ("n" * length)
    source.write_bytes(b"content")
    output = tmp_path / "out.mender"
    write_module_artifact(
        output, [source], payload_type="m", name="v", device_types=["b"], compression="none"
    )
    reader = ArtifactReader(Stream(output.read_bytes()))
    assert [(f.name, b"".join(map(bytes, f))) for f in reader.files()] == [
        (source.name, b"content")
    ]
    with tarfile.open(output) as outer:
        data = outer.extractfile("data/0000.tar")
        assert data is not None
        with tarfile.open(fileobj=data) as inner:
            assert inner.getnames() == [source.name]


@pytest.mark.parametrize("size", [(1 << 33) - 1, 1 << 33, 1 << 40])
def test_sizes_beyond_ustars_are_written_and_read(size: int) -> None:
    block = header("big.img", size)
    assert len(block) == 512
    assert TarReader(Stream(block), "test").next() == ("big.img", size)
    with tarfile.open(fileobj=io.BytesIO(block + bytes(1024)), mode="r|") as archive:
        member = archive.next()
    assert member is not None
    assert (member.name, member.size) == ("big.img", size)


def test_the_public_key_of_a_private_key_file_is_not_taken_for_one(host: Host) -> None:
    with pytest.raises(ArtifactError, match="not a PEM public key"):
        load_public_key(host.private)
