"""Artifacts that are wrong: each is refused with an error that says what, and nothing else."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artifact_format import Stream, read_all
from updater_artifacts import Parts, image_bytes, make_key, pack, sha256, tar_of

from updater.artifact import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactLimitError,
    ArtifactReader,
    ArtifactSignatureError,
    ArtifactTruncatedError,
    Limits,
)
from updater.artifact.compression import compressor
from updater.artifact.signature import PrivateKey, sign

Spoil = Callable[[Parts], None]


def _set(**values: object) -> Spoil:
    def spoil(parts: Parts) -> None:
        for name, value in values.items():
            setattr(parts, name, value)

    return spoil


def _swap(first: int, second: int) -> Spoil:
    def spoil(parts: Parts) -> None:
        members = parts.members()
        members[first], members[second] = members[second], members[first]
        parts.members = lambda: members  # type: ignore[method-assign]

    return spoil


def _header(*members: tuple[str, bytes]) -> Spoil:
    return _set(header_members=list(members))


def _listed_but_absent(parts: Parts) -> None:
    manifest = dict(parts.members())["manifest"]
    parts.manifest = manifest + b"0" * 64 + b"  data/0000/other.img\n"


def _wrong_payload(parts: Parts) -> None:
    content = bytearray(parts.content)
    content[5000] ^= 1
    parts.data_tar = tar_of([("rootfs.img", bytes(content))])


def _two_files(parts: Parts) -> None:
    parts.data_tar = tar_of([("rootfs.img", parts.content), ("second.img", b"x")])


def _renamed_payload(parts: Parts) -> None:
    parts.data_tar = tar_of([("passwd", parts.content)])


def _traversal(parts: Parts) -> None:
    parts.data_tar = tar_of([("../../etc/passwd", parts.content)])


def _link(parts: Parts) -> None:
    parts.data_tar = tar_of([("rootfs.img", b"")], type=tarfile.SYMTYPE, linkname="/etc/passwd")


def _device(parts: Parts) -> None:
    parts.data_tar = tar_of([("rootfs.img", b"")], type=tarfile.BLKTYPE, devmajor=8)


def _directory(parts: Parts) -> None:
    parts.data_tar = tar_of([("rootfs.img", b"")], type=tarfile.DIRTYPE)


def _bomb(parts: Parts) -> None:
    """The data archive declares a small file and goes on with 64 MiB of zeros."""
    plain = tar_of([("rootfs.img", parts.content)])
    packer = __import__("zlib").compressobj(9, 8, 31)
    packed = packer.compress(plain)
    for _ in range(64):
        packed += packer.compress(bytes(1 << 20))
    parts.data_packed = packed + packer.flush()


def _size_lies(parts: Parts) -> None:
    parts.data_tar = tar_of([("rootfs.img", parts.content)])[: 60 * 512]


def _garbage_in_member(parts: Parts) -> None:
    packed = pack(tar_of([("rootfs.img", parts.content)]), parts.compression)
    parts.data_packed = packed + b"trailing"


def _huge_header(parts: Parts) -> None:
    parts.header_members = [("header-info", b" " * 5_000_000)]


def _many_scripts(parts: Parts) -> None:
    parts.header_members = [
        ("header-info", b"{}"),
        *((f"scripts/ArtifactInstall_Enter_{n:02}", bytes(4_000_000)) for n in range(5)),
    ]


INFO = (
    b'{"payloads":[{"type":"rootfs-image"}],"artifact_provides":{"artifact_name":"v2"},'
    b'"artifact_depends":{"device_type":["test-device"]}}'
)
TYPE = b'{"type":"rootfs-image"}'

CASES: list[tuple[str, Spoil, type[ArtifactError], str]] = [
    (
        "old version",
        _set(version=b'{"format":"mender","version":2}'),
        ArtifactFormatError,
        "version 2 is not supported",
    ),
    (
        "other format",
        _set(version=b'{"format":"other","version":3}'),
        ArtifactFormatError,
        "format is 'other'",
    ),
    ("version not JSON", _set(version=b"3"), ArtifactFormatError, "not a JSON object"),
    ("deep JSON", _set(version=b"[" * 1000), ArtifactFormatError, "version: not JSON"),
    ("no version", _set(omit={"version"}), ArtifactFormatError, "comes first, not 'version'"),
    ("no manifest", _set(omit={"manifest"}), ArtifactFormatError, "where 'manifest' should be"),
    ("no signature", _set(omit={"manifest.sig"}), ArtifactSignatureError, "not signed"),
    ("no header", _set(omit={"header.tar.gz"}), ArtifactFormatError, "where header.tar should be"),
    (
        "no data",
        _set(omit={"data/0000.tar.gz"}),
        ArtifactFormatError,
        "ends where data/0000.tar should be",
    ),
    ("order: header and data", _swap(3, 4), ArtifactFormatError, "where header.tar should be"),
    ("order: signature first", _swap(1, 2), ArtifactFormatError, "where 'manifest' should be"),
    (
        "duplicate version",
        _set(extra=[(1, "version", b'{"format":"mender","version":3}')]),
        ArtifactFormatError,
        "'version' where 'manifest'",
    ),
    (
        "duplicate signature",
        _set(extra=[(3, "manifest.sig", b"AAAA")]),
        ArtifactFormatError,
        "'manifest.sig' where header.tar",
    ),
    (
        "duplicate data",
        _set(extra=[(5, "data/0000.tar.gz", b"")]),
        ArtifactFormatError,
        "unexpected member 'data/0000.tar.gz'",
    ),
    (
        "second payload",
        _set(extra=[(5, "data/0001.tar.gz", b"")]),
        ArtifactFormatError,
        "unexpected member 'data/0001.tar.gz'",
    ),
    (
        "augmented manifest",
        _set(extra=[(3, "manifest-augment", b"")]),
        ArtifactFormatError,
        "augmented sections",
    ),
    ("unknown member", _set(extra=[(3, "surprise", b"")]), ArtifactFormatError, "'surprise'"),
    (
        "unknown compression",
        _set(extra=[(3, "header.tar.lz4", b"")]),
        ArtifactFormatError,
        "'header.tar.lz4' where header.tar",
    ),
    (
        "absolute name",
        _set(extra=[(3, "/etc/passwd", b"")]),
        ArtifactFormatError,
        "not a plain relative path",
    ),
    ("signature not base64", _set(signature=b"%%%"), ArtifactSignatureError, "not base64"),
    ("signature too long", _set(signature=b"A" * 5000), ArtifactLimitError, "at most 4096"),
    ("other key", _set(key=make_key("ecdsa")), ArtifactSignatureError, "none of the 1 trusted"),
    (
        "manifest malformed",
        _set(manifest=b"abc  version\n"),
        ArtifactFormatError,
        "manifest line 1",
    ),
    ("manifest empty", _set(manifest=b""), ArtifactFormatError, "manifest: 0 lines"),
    (
        "manifest traversal",
        _set(manifest=b"0" * 64 + b"  ../x\n"),
        ArtifactFormatError,
        "not a plain relative path",
    ),
    (
        "manifest twice",
        _set(manifest=(b"0" * 64 + b"  version\n") * 2),
        ArtifactFormatError,
        "listed twice",
    ),
    (
        "manifest lists no version",
        _set(manifest=b"0" * 64 + b"  header.tar.gz\n"),
        ArtifactFormatError,
        "'version' is not listed",
    ),
    (
        "version's hash",
        _set(manifest=b"0" * 64 + b"  version\n"),
        ArtifactIntegrityError,
        "version: SHA-256",
    ),
    (
        "header unlisted",
        _set(manifest=(sha256(b'{"format":"mender","version":3}') + "  version\n").encode()),
        ArtifactFormatError,
        "'header.tar.gz' is not listed",
    ),
    (
        "header's hash",
        _set(
            manifest=(
                sha256(b'{"format":"mender","version":3}')
                + "  version\n"
                + "0" * 64
                + "  header.tar.gz\n"
            ).encode()
        ),
        ArtifactIntegrityError,
        "header.tar.gz: SHA-256",
    ),
    ("listed but absent", _listed_but_absent, ArtifactFormatError, "absent: data/0000/other.img"),
    ("header empty", _header(("x", b"")), ArtifactFormatError, "unexpected member 'x'"),
    (
        "header without info",
        _header(("headers/0000/type-info", TYPE)),
        ArtifactFormatError,
        "comes first, not header-info",
    ),
    (
        "header order",
        _header(
            ("header-info", INFO), ("headers/0000/meta-data", b""), ("headers/0000/type-info", TYPE)
        ),
        ArtifactFormatError,
        "out of order",
    ),
    (
        "header twice",
        _header(("header-info", INFO), ("header-info", INFO)),
        ArtifactFormatError,
        "occurs twice",
    ),
    (
        "script traversal",
        _header(("header-info", INFO), ("scripts/../../x", b"")),
        ArtifactFormatError,
        "not a plain relative path",
    ),
    (
        "script name",
        _header(("header-info", INFO), ("scripts/evil.sh", b"")),
        ArtifactFormatError,
        "script 'evil.sh': not named State_Action_NN",
    ),
    ("no type-info", _header(("header-info", INFO)), ArtifactFormatError, "type-info is missing"),
    (
        "meta-data",
        _header(
            ("header-info", INFO),
            ("headers/0000/type-info", TYPE),
            ("headers/0000/meta-data", b"{}"),
        ),
        ArtifactFormatError,
        "no meta-data",
    ),
    ("header too large", _huge_header, ArtifactLimitError, "at most 4194304"),
    ("header total", _many_scripts, ArtifactFormatError, "more than 16777216 bytes unpacked"),
    (
        "info: no name",
        _set(
            header_info={
                "payloads": [{"type": "rootfs-image"}],
                "artifact_depends": {"device_type": ["x"]},
            }
        ),
        ArtifactFormatError,
        "no artifact_name",
    ),
    (
        "info: no device type",
        _set(
            header_info={
                "payloads": [{"type": "rootfs-image"}],
                "artifact_provides": {"artifact_name": "x"},
            }
        ),
        ArtifactFormatError,
        "no device_type",
    ),
    (
        "info: payload type",
        _set(header_info={"payloads": [{"type": "../x"}]}),
        ArtifactFormatError,
        "malformed payload type",
    ),
    (
        "info: JSON types",
        _set(
            header_info={
                "payloads": [{"type": "rootfs-image"}],
                "artifact_provides": {"artifact_name": 3},
            }
        ),
        ArtifactFormatError,
        "'artifact_name' is not a string",
    ),
    (
        "info: escape codes",
        _set(
            header_info={
                "payloads": [{"type": "rootfs-image"}],
                "artifact_provides": {"artifact_name": "\x1b[2J"},
            }
        ),
        ArtifactFormatError,
        "unprintable",
    ),
    (
        "type-info disagrees",
        _set(type_info={"type": "deb"}),
        ArtifactFormatError,
        "differs from 'rootfs-image'",
    ),
    ("payload changed", _wrong_payload, ArtifactIntegrityError, "data/0000/rootfs.img: SHA-256"),
    ("two files", _two_files, ArtifactFormatError, "second file 'second.img'"),
    ("payload renamed", _renamed_payload, ArtifactFormatError, "'passwd' is not listed"),
    ("payload traversal", _traversal, ArtifactFormatError, "not a plain relative path"),
    ("payload is a link", _link, ArtifactFormatError, "not a regular file"),
    ("payload is a device", _device, ArtifactFormatError, "not a regular file"),
    ("payload is a directory", _directory, ArtifactFormatError, "not a regular file"),
    ("payload bomb", _bomb, ArtifactLimitError, "padding"),
    ("inner size lies", _size_lies, ArtifactTruncatedError, "too early"),
    ("garbage behind the compressed stream", _garbage_in_member, ArtifactFormatError, "gzip"),
]


@pytest.mark.parametrize(
    ("spoil", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_hostile_artifacts_are_refused(
    signing_key: PrivateKey, spoil: Spoil, error: type[ArtifactError], message: str
) -> None:
    parts = Parts(signing_key)
    spoil(parts)
    trusted = [signing_key.public_key()]
    with pytest.raises(error) as caught:
        read_all(ArtifactReader(Stream(parts.build()), trusted))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_honest_base_of_the_table_is_accepted(signing_key: PrivateKey) -> None:
    parts = Parts(signing_key)
    assert read_all(ArtifactReader(Stream(parts.build()), [signing_key.public_key()]))


@pytest.mark.parametrize("compression", ["none", "gzip", "xz", "zstd"])
def test_truncation_anywhere_is_refused(signing_key: PrivateKey, compression: str) -> None:
    whole = Parts(signing_key, compression, image_bytes(20_000, 5)).build()
    # Behind the two blocks of the end mark, tarfile writes optional padding.
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512 + 1024
    boundaries = {*range(0, end, 512), *range(1, end, 997)}
    for length in sorted(boundaries):
        with pytest.raises(ArtifactFormatError):
            read_all(ArtifactReader(Stream(whole[:length])))
    assert read_all(ArtifactReader(Stream(whole[:end])))


def test_trailing_garbage_is_refused(signing_key: PrivateKey) -> None:
    whole = Parts(signing_key).build()
    with pytest.raises(ArtifactFormatError, match="data after the end of the archive"):
        read_all(ArtifactReader(Stream(whole + b"x")))
    with pytest.raises(ArtifactLimitError, match="padding"):
        read_all(ArtifactReader(Stream(whole + bytes(2 << 20))))


def test_header_bombs_are_bounded(signing_key: PrivateKey) -> None:
    parts = Parts(signing_key)
    header = gzip.compress(bytes(100 << 20), mtime=0)
    manifest = f"{sha256(header)}  header.tar.gz\n{sha256(parts.version)}  version\n".encode()
    whole = tar_of(
        [
            ("version", parts.version),
            ("manifest", manifest),
            ("manifest.sig", sign(manifest, signing_key)),
            ("header.tar.gz", header),
        ]
    )
    with pytest.raises(ArtifactFormatError, match="header: empty"):
        ArtifactReader(Stream(whole), [signing_key.public_key()])


def test_limits_are_the_callers(signing_key: PrivateKey) -> None:
    with pytest.raises(ArtifactLimitError, match=r"manifest is \d+ bytes, at most 10 are"):
        ArtifactReader(Stream(Parts(signing_key).build()), limits=Limits(manifest=10))


@pytest.mark.parametrize("compression", ["xz", "zstd"])
def test_a_window_larger_than_allowed_is_refused_before_the_payload_is_taken(
    signing_key: PrivateKey, compression: str
) -> None:
    parts = Parts(signing_key, compression)
    engine = compressor(compression, 6 if compression == "xz" else 19, 8 << 20)
    plain = tar_of(parts.listed_files())
    parts.data_packed = engine.compress(plain) + engine.flush()
    whole = parts.build()
    assert read_all(ArtifactReader(Stream(whole))) == parts.content
    reader = ArtifactReader(Stream(whole), limits=Limits(window=4 << 20))
    with pytest.raises(ArtifactLimitError, match=r"data/0000\.tar.*more than the 4 MiB allowed"):
        _ = reader.payload


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_corruption_gets_through_or_crashes(data: st.DataObject) -> None:
    """Any change of any byte gives either an ArtifactError or the very same payload."""
    key = _FUZZ_KEY
    compression = data.draw(st.sampled_from(["none", "gzip", "xz", "zstd"]))
    parts = Parts(key, compression, image_bytes(3000, 6))
    whole = bytearray(parts.build())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] = data.draw(st.integers(0, 255))
    try:
        reader = ArtifactReader(Stream(bytes(whole)), [key.public_key()])
        content = read_all(reader)
    except ArtifactError as error:
        assert "\n" not in str(error)
    else:
        assert content == parts.content
        assert reader.verified


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000))
def test_arbitrary_bytes_never_crash_the_reader(content: bytes) -> None:
    with pytest.raises(ArtifactError):
        read_all(ArtifactReader(Stream(content)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1500), st.sampled_from(["gzip", "xz", "zstd"]))
def test_arbitrary_compressed_bytes_never_crash_the_reader(
    content: bytes, compression: str
) -> None:
    parts = Parts(_FUZZ_KEY, compression)
    parts.data_packed = content
    with pytest.raises(ArtifactError):
        read_all(ArtifactReader(Stream(parts.build())))


_FUZZ_KEY = make_key("ecdsa")


@pytest.mark.parametrize(
    ("where", "field"),
    [
        (100, b"00006x0\0"),
        (108, b"\0000000\0"),
        (136, b"000\x820000000\0"),
        (124, b"\0000000037\0\0"),
        (124, b"\xb0" + bytes(10) + b"\x1f"),
        (329, b"\xb0000000\0"),
        (337, b"0000 00\0"),
    ],
    ids=["mode", "owner", "time", "size behind a NUL", "size behind 0xb0", "major", "minor"],
)
def test_numbers_that_readers_disagree_on_are_refused(
    signing_key: PrivateKey, where: int, field: bytes
) -> None:
    """Found by fuzzing: tarfile stopped at such a header, so two readers saw two archives."""
    whole = bytearray(Parts(signing_key).build())
    whole[where : where + len(field)] = field
    whole[148:156] = b"        "
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    with pytest.raises(ArtifactFormatError, match="is not octal"):
        ArtifactReader(Stream(bytes(whole)))
