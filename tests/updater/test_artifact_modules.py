"""Artifacts for update modules: several files, meta-data, scripts, streamed in constant memory."""

from __future__ import annotations

import json

import pytest
from test_artifact_format import Stream
from updater_artifacts import Parts, image_bytes, tar_of

from updater.artifact import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactLimitError,
    ArtifactReader,
    Limits,
)
from updater.artifact.signature import PrivateKey

FILES = [("one.bin", image_bytes(70_000, 1)), ("empty", b""), ("two.bin", image_bytes(999, 2))]
SCRIPTS = [
    ("ArtifactInstall_Enter_10_stop", b"#!/bin/sh\nexit 0\n"),
    ("ArtifactCommit_Leave_05", b"#!/bin/sh\nexit 21\n"),
]


class ModuleParts(Parts):
    """A valid artifact of module `single-file`, to be spoilt."""

    def __init__(self, key: PrivateKey, compression: str = "gzip") -> None:
        super().__init__(key, compression)
        self.files = list(FILES)
        self.scripts = list(SCRIPTS)
        self.meta_data = b'{"mode": 420}'
        self.header_info["payloads"] = [{"type": "single-file"}]
        self.type_info["type"] = "single-file"

    def members(self) -> list[tuple[str, bytes]]:
        self.header_members = self.header_members or [
            ("header-info", json.dumps(self.header_info).encode()),
            *((f"scripts/{name}", content) for name, content in self.scripts),
            ("headers/0000/type-info", json.dumps(self.type_info).encode()),
            ("headers/0000/meta-data", self.meta_data),
        ]
        return super().members()


@pytest.fixture
def parts(signing_key: PrivateKey) -> ModuleParts:
    return ModuleParts(signing_key)


def open_reader(
    parts: ModuleParts, limits: Limits | None = None, piece: int = 777
) -> ArtifactReader:
    return ArtifactReader(Stream(parts.build(), piece), [parts.key.public_key()], limits)


def drain(reader: ArtifactReader) -> None:
    for _ in reader.files():
        pass


@pytest.mark.parametrize("compression", ["none", "gzip", "xz", "zstd"])
def test_files_scripts_and_meta_data_arrive(signing_key: PrivateKey, compression: str) -> None:
    reader = open_reader(ModuleParts(signing_key, compression))
    assert reader.payload_type == "single-file"
    assert reader.meta_data == {"mode": 420}
    assert list(reader.scripts.items()) == SCRIPTS
    assert reader.header_files["meta-data"] == b'{"mode": 420}'
    assert json.loads(reader.header_files["type-info"])["type"] == "single-file"
    got = []
    for file in reader.files():
        assert not reader.complete
        got.append((file.name, b"".join(map(bytes, file))))
    assert got == FILES
    assert reader.complete


def test_what_the_consumer_leaves_is_checked_all_the_same(parts: ModuleParts) -> None:
    reader = open_reader(parts)
    drain(reader)
    assert reader.complete
    parts.data_tar = tar_of([FILES[0], FILES[1], ("two.bin", b"x" * 999)])
    with pytest.raises(ArtifactIntegrityError, match=r"two\.bin: SHA-256"):
        drain(open_reader(parts))


def test_a_file_is_not_ended_before_its_checksum_was_compared(parts: ModuleParts) -> None:
    parts.data_tar = tar_of([("one.bin", FILES[0][1][:-1] + b"!"), *FILES[1:]])
    file = next(open_reader(parts).files())
    buffer = memoryview(bytearray(70_000))
    left = file.size
    while left:
        left -= file.readinto(buffer)
    with pytest.raises(ArtifactIntegrityError, match=r"one\.bin: SHA-256"):
        file.readinto(buffer)
    assert not file.complete


def test_the_last_file_is_not_ended_before_the_archive_was_checked(parts: ModuleParts) -> None:
    whole = parts.build()
    with pytest.raises(ArtifactFormatError, match="data after the end"):
        drain(ArtifactReader(Stream(whole + b"x")))
    reader = ArtifactReader(Stream(whole + b"x"))
    files = reader.files()
    for _ in range(2):
        next(files).skip()
    with pytest.raises(ArtifactFormatError, match="data after the end"):
        next(files).skip()
    assert not reader.complete


def test_a_payload_without_files_is_valid(parts: ModuleParts) -> None:
    parts.files = []
    reader = open_reader(parts)
    assert list(reader.files()) == []
    assert reader.complete


def test_a_module_payload_is_no_image(parts: ModuleParts) -> None:
    with pytest.raises(ArtifactError, match="type single-file, not a rootfs-image"):
        _ = open_reader(parts).payload


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ([*FILES, FILES[0]], ArtifactFormatError, "'one.bin' occurs twice"),
        ([*FILES, ("three.bin", b"x")], ArtifactFormatError, "'three.bin' is not listed"),
        (FILES[:2], ArtifactFormatError, "absent: data/0000/two.bin"),
        ([("a/one.bin", b"")], ArtifactFormatError, "not a plain file name"),
        ([("one bin", b"")], ArtifactFormatError, "not a plain file name"),
        ([("one;bin", b"")], ArtifactFormatError, "not a plain file name"),
    ],
    ids=["duplicate", "unlisted", "absent", "folder", "space", "shell"],
)
def test_wrong_files_are_refused(
    parts: ModuleParts, files: list[tuple[str, bytes]], error: type[ArtifactError], message: str
) -> None:
    parts.data_tar = tar_of(files)
    with pytest.raises(error, match=message):
        drain(open_reader(parts))


def test_the_payloads_total_is_the_callers_to_bound(parts: ModuleParts) -> None:
    limit = sum(len(content) for _, content in FILES)
    drain(open_reader(parts, Limits(payload_total=limit)))
    reader = open_reader(parts, Limits(payload_total=limit - 1))
    with pytest.raises(ArtifactLimitError, match=r"'two\.bin' brings the payload to 70999 bytes"):
        drain(reader)


def test_the_number_of_header_members_is_bounded(parts: ModuleParts) -> None:
    parts.scripts = [(f"ArtifactInstall_Enter_00_{n}", b"") for n in range(1001)]
    with pytest.raises(ArtifactLimitError, match="more than 1000 members"):
        open_reader(parts)


@pytest.mark.parametrize(
    "name",
    [
        "Download_Enter_00",
        "Idle_Leave_10_x",
        "ArtifactInstall_Enter_1",
        "ArtifactInstall_Before_10",
        "ArtifactInstall_Enter_10x",
        "ArtifactInstall_Enter_10_a b",
        "ArtifactInstall_Enter_10_\x1b",
        "version",
        "",
    ],
)
def test_scripts_with_other_names_are_refused(parts: ModuleParts, name: str) -> None:
    parts.scripts = [(name, b"")]
    with pytest.raises(ArtifactFormatError):
        open_reader(parts)


@pytest.mark.parametrize("kind", ["a/b", "..", ".hidden", "", "-x", "a b", "x" * 65, 3, ["deb"]])
def test_payload_types_that_are_no_plain_name_are_refused(parts: ModuleParts, kind: object) -> None:
    parts.header_info["payloads"] = [{"type": kind}]
    parts.type_info["type"] = kind
    with pytest.raises(ArtifactFormatError, match="malformed payload type"):
        open_reader(parts)


@pytest.mark.parametrize("meta_data", [b"[1]", b"{", b'{"a":1,"a":2}', b"\xff"])
def test_meta_data_that_is_no_json_object_is_refused(parts: ModuleParts, meta_data: bytes) -> None:
    parts.meta_data = meta_data
    with pytest.raises(ArtifactFormatError, match="meta-data"):
        open_reader(parts)


def test_an_artifact_without_a_payload_is_read(parts: ModuleParts) -> None:
    parts.header_info["payloads"] = [{"type": None}]
    parts.type_info = {"type": None}
    parts.files, parts.meta_data = [], b""
    reader = open_reader(parts)
    assert reader.payload_type is None
    drain(reader)
    assert reader.complete
    parts.data_tar = tar_of([("x", b"x")])
    with pytest.raises(ArtifactFormatError, match="'x' in an artifact without payload"):
        drain(open_reader(parts))


def test_several_payloads_are_refused(parts: ModuleParts) -> None:
    parts.header_info["payloads"] = [{"type": "deb"}, {"type": "deb"}]
    with pytest.raises(ArtifactFormatError, match="several payloads"):
        open_reader(parts)
