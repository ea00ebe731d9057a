"""Streaming reader of Artifact v3: checked in the order in which it arrives.

    version → manifest → [manifest.sig] → header.tar* → data/0000.tar*

What has been verified when: the signature covers the manifest and is checked as soon as
manifest.sig was read, before the header; `version` and the compressed header are compared with
the manifest before the header is parsed, so header, scripts and meta-data are authentic once the
constructor returned. Payload bytes are released as they stream; a file's SHA-256 is compared
behind its last byte, and behind the last file so is the rest of the archive (padding, end marks,
nothing after them). Only when `ArtifactReader.complete` is True is the artifact whole: a consumer
must not activate anything earlier.

    reader = ArtifactReader(stream, keys)
    check_compatible(reader, device_type, provides)
    for file in reader.files():           # or: reader.payload, for a root file system image
        while count := file.readinto(buffer): ...
    assert reader.complete

Memory is constant: one tar block, the bounded texts and scripts (`Limits`), and a decompressor's
window. Refused by name: several payloads in one artifact, and augmented sections, because no
signature covers them. Scripts are handed out, not run; meta-data is checked to be JSON, no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from updater.artifact import metadata
from updater.artifact.compression import MAX_WINDOW_BYTES, compression_of, decompressor
from updater.artifact.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactLimitError,
    ArtifactSignatureError,
)
from updater.artifact.tar import Member, Memory, Readable, TarReader

if TYPE_CHECKING:
    from updater.artifact.signature import PublicKey

_SKIP_BYTES = 256 * 1024
_DATA = "data/0000.tar"


class Limits(NamedTuple):
    """Upper bounds, in bytes unless the name says otherwise.

    All but `payload_total` bound what is held in memory; `payload_total` bounds the sum of the
    payload files' declared sizes, so that a caller can refuse what its disk cannot hold. `window`
    is what xz or zstd may make a reader keep.
    """

    manifest: int = 1024 * 1024
    signature: int = 4096
    compressed_header: int = 4 * 1024 * 1024
    header_member: int = 4 * 1024 * 1024
    header_total: int = 16 * 1024 * 1024
    header_member_count: int = 1000
    payload_total: int = 1 << 40
    window: int = MAX_WINDOW_BYTES


class ArtifactReader:
    """Reads one artifact from `stream`.

    `stream` is any object with `readinto(memoryview) -> int`, for example a binary file or a
    download. With `trusted_keys`, an artifact without a valid signature of one of them is
    refused; without keys a signature is not looked at (`signed` says whether there is one).
    The constructor reads everything before the payload; then the payload is taken once, through
    `files()` or, for a root file system image, through `payload`. Raises ArtifactError and its
    kinds; after one of them the reader is of no more use.

    Attributes:
        signed: there is a signature.
        verified: it was made by one of the trusted keys.
        complete: every byte of the artifact was read and found right.
        header_info: the artifact's name, device types, group, what it provides and needs.
        type_info: what the payload provides, needs and clears.
        payload_type: "rootfs-image", or the name of the update module; None for an artifact
            without a payload (`bootstrap-artifact`). Never holds a slash or a leading dot.
        scripts: file name → content of the state scripts, in the order in which they came.
        header_files: "header-info", "type-info" and "meta-data" (empty when there is none) as
            they came, byte for byte: what update modules get to see.
        meta_data: the payload's meta-data, parsed.
        header_compression: "none", "gzip", "xz" or "zstd".
    """

    def __init__(
        self,
        stream: Readable,
        trusted_keys: Sequence[PublicKey] = (),
        limits: Limits | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._outer = TarReader(stream, "artifact")
        self._unread: set[str] = set()
        self._manifest: dict[str, str] = {}
        self._data: TarReader | None = None
        self._file: PayloadFile | None = None
        self._image: PayloadFile | None = None
        self._payload_total = 0
        self.signed = False
        self.verified = False
        self.complete = False

        self._read_version_and_manifest()
        member = self._next("manifest.sig or header.tar")
        if member.name == "manifest.sig":
            self._read_signature(member, trusted_keys)
            member = self._next("header.tar")
        elif trusted_keys:
            raise ArtifactSignatureError("the artifact is not signed, but trusted keys are set")
        self._refuse_augmented(member)
        self._read_header(member)

    @property
    def manifest(self) -> dict[str, str]:
        """Path → SHA-256 of every listed member."""
        return dict(self._manifest)

    @property
    def manifest_bytes(self) -> bytes:
        """The manifest as it came: what a signature covers."""
        return self._manifest_bytes

    @property
    def artifact_name(self) -> str:
        """The artifact's name."""
        return self.header_info.artifact_name

    @property
    def provides(self) -> dict[str, str]:
        """All that the artifact provides: artifact_name, group, and the payload's keys."""
        return {**self.header_info.provides, **self.type_info.provides}

    @property
    def payload(self) -> PayloadFile:
        """The image of a rootfs-image payload; ArtifactError for any other payload type.

        An image's size is known before its first byte. Its `readinto` returns 0 only when the
        whole artifact was found right.
        """
        if self.payload_type != metadata.ROOTFS_IMAGE:
            raise ArtifactError(
                f"{self.artifact_name} holds a payload of type"
                f" {metadata.type_words(self.payload_type)}, not a rootfs-image"
            )
        self._open_data()
        assert self._image is not None
        return self._image

    @property
    def unchecked_payload(self) -> PayloadFile:
        """As `payload`, but its SHA-256 is left to the caller, who hashes what the medium holds.

        Hashing it here too would double the cost. Everything else is checked as ever; `complete`
        then says nothing about the image's content.
        """
        image = self.payload
        image.hashed_here = False
        return image

    def files(self) -> Iterator[PayloadFile]:
        """Yield the payload's files in the order in which they come; there may be none.

        Each is a stream that must be read before the next is asked for; what is left of it then
        is read and checked, but not handed out. When the iteration ends by itself, `complete`
        is True. Memory does not depend on the files' number or size.
        """
        self._open_data()
        while (file := self._file) is not None:
            yield file
            file.skip()

    def _next(self, expected: str) -> Member:
        member = self._outer.next()
        if member is None:
            raise ArtifactFormatError(f"artifact: ends where {expected} should be")
        return member

    def _read_version_and_manifest(self) -> None:
        member = self._next("version")
        if member.name != "version":
            raise ArtifactFormatError(f"artifact: {member.name!r} comes first, not 'version'")
        version = self._outer.read_all(member, 1024)
        metadata.parse_version(version)
        member = self._next("manifest")
        if member.name != "manifest":
            raise ArtifactFormatError(f"artifact: {member.name!r} where 'manifest' should be")
        self._manifest_bytes = self._outer.read_all(member, self._limits.manifest)
        self._manifest = metadata.parse_manifest(self._manifest_bytes)
        self._unread = set(self._manifest)
        self._check("version", hashlib.sha256(version).hexdigest())

    def _read_signature(self, member: Member, trusted_keys: Sequence[PublicKey]) -> None:
        content = self._outer.read_all(member, self._limits.signature)
        self.signed = True
        if trusted_keys:
            from updater.artifact.signature import verify  # noqa: PLC0415

            verify(self._manifest_bytes, content, trusted_keys)
            self.verified = True

    def _refuse_augmented(self, member: Member) -> None:
        if member.name == "manifest-augment" or member.name.startswith("header-augment.tar"):
            raise ArtifactFormatError(
                f"artifact: {member.name}: augmented sections are refused, no signature covers them"
            )

    def _check(self, name: str, checksum: str) -> None:
        expected = self._manifest.get(name)
        if expected is None:
            raise ArtifactFormatError(f"artifact: {name!r} is not listed in the manifest")
        if expected != checksum:
            raise ArtifactIntegrityError(
                f"{name}: SHA-256 is {checksum}, the manifest says {expected}"
            )
        self._unread.discard(name)

    def _read_header(self, member: Member) -> None:
        compression = compression_of(member.name, "header.tar")
        if compression is None:
            raise ArtifactFormatError(f"artifact: {member.name!r} where header.tar should be")
        if member.name not in self._manifest:
            raise ArtifactFormatError(f"artifact: {member.name!r} is not listed in the manifest")
        self.header_compression = compression
        content = self._outer.read_all(member, self._limits.compressed_header)
        self._check(member.name, hashlib.sha256(content).hexdigest())
        plain = decompressor(compression, Memory(content), member.name, self._limits.window)
        tar = TarReader(plain, member.name)
        files = self._header_members(tar)
        raw_info = files.pop("header-info")
        self.header_info = metadata.parse_header_info(raw_info)
        if len(self.header_info.payload_types) != 1:
            raise ArtifactFormatError("artifacts with several payloads are not supported")
        self.payload_type = self.header_info.payload_types[0]
        raw_type = files.pop("headers/0000/type-info", None)
        if raw_type is None:
            raise ArtifactFormatError("header: headers/0000/type-info is missing")
        self.type_info = metadata.parse_type_info(raw_type, self.payload_type)
        raw_meta = files.pop("headers/0000/meta-data", b"")
        self.meta_data = metadata.parse_meta_data(raw_meta)
        if raw_meta.strip() and self.payload_type in (metadata.ROOTFS_IMAGE, None):
            raise ArtifactFormatError(
                f"header: a payload of type {metadata.type_words(self.payload_type)}"
                " has no meta-data"
            )
        self.header_files: Mapping[str, bytes] = MappingProxyType(
            {"header-info": raw_info, "type-info": raw_type, "meta-data": raw_meta}
        )
        self.scripts: Mapping[str, bytes] = MappingProxyType(
            {name.removeprefix("scripts/"): content for name, content in files.items()}
        )

    def _header_members(self, tar: TarReader) -> dict[str, bytes]:
        """Read the header archive: fixed order, known names, bounded in number and in sum."""
        files: dict[str, bytes] = {}
        total = 0
        rank_before = -1
        while (member := tar.next()) is not None:
            rank = _header_rank(member.name)
            if rank is None:
                raise ArtifactFormatError(f"header: unexpected member {member.name!r}")
            if member.name in files:
                raise ArtifactFormatError(f"header: {member.name!r} occurs twice")
            if rank < rank_before:
                raise ArtifactFormatError(f"header: {member.name!r} is out of order")
            rank_before = rank
            if len(files) == self._limits.header_member_count:
                raise ArtifactLimitError(f"header: more than {len(files)} members")
            total += member.size
            if total > self._limits.header_total:
                raise ArtifactLimitError(
                    f"header: more than {self._limits.header_total} bytes unpacked"
                )
            files[member.name] = tar.read_all(member, self._limits.header_member)
            if len(files) == 1 and member.name != "header-info":
                raise ArtifactFormatError(f"header: {member.name!r} comes first, not header-info")
        if not files:
            raise ArtifactFormatError("header: empty")
        tar.finish()
        return files

    def _open_data(self) -> None:
        """Go to the payload's first file, unless that was done before."""
        if self._data is not None:
            return
        member = self._next(_DATA)
        compression = compression_of(member.name, _DATA)
        if compression is None:
            raise ArtifactFormatError(f"artifact: {member.name!r} where {_DATA} should be")
        self.payload_compression = compression
        self._data_name = member.name
        plain = decompressor(compression, self._outer, member.name, self._limits.window)
        self._data = TarReader(plain, member.name)
        self._advance()
        self._image = self._file
        if self._file is None and self.payload_type == metadata.ROOTFS_IMAGE:
            raise ArtifactFormatError(f"{member.name}: empty")

    def _advance(self) -> None:
        """Go to the payload's next file; behind the last one, check what is left."""
        assert self._data is not None
        before, self._file = self._file, None
        member = self._data.next()
        if member is None:
            self._finish()
            return
        where = self._data_name
        metadata.check_file_name(member.name, where)
        if self.payload_type is None:
            raise ArtifactFormatError(f"{where}: {member.name!r} in an artifact without payload")
        if self.payload_type == metadata.ROOTFS_IMAGE:
            if before is not None:
                raise ArtifactFormatError(f"{where}: second file {member.name!r} in a rootfs-image")
            if member.size == 0:
                raise ArtifactFormatError(f"{where}: {member.name!r} is empty")
        path = f"data/0000/{member.name}"
        if path not in self._manifest:
            raise ArtifactFormatError(f"{where}: {member.name!r} is not listed in the manifest")
        if path not in self._unread:
            raise ArtifactFormatError(f"{where}: {member.name!r} occurs twice")
        self._payload_total += member.size
        if self._payload_total > self._limits.payload_total:
            raise ArtifactLimitError(
                f"{where}: {member.name!r} brings the payload to {self._payload_total} bytes,"
                f" at most {self._limits.payload_total} are allowed"
            )
        self._file = PayloadFile(self, self._data, member, self._manifest[path])

    def _file_ended(self, file: PayloadFile, checksum: str | None) -> None:
        path = f"data/0000/{file.name}"
        if checksum is None:
            self._unread.discard(path)  # the caller's to check
        else:
            self._check(path, checksum)
        self._advance()

    def _finish(self) -> None:
        """Check what can only be known behind the last payload byte."""
        assert self._data is not None
        self._data.finish()
        if self._outer.readinto(memoryview(bytearray(1))):
            raise ArtifactFormatError(f"{self._data_name}: data after the compressed stream")
        after = self._outer.next()
        if after is not None:
            raise ArtifactFormatError(f"artifact: unexpected member {after.name!r} at the end")
        self._outer.finish()
        if self._unread:
            missing = ", ".join(sorted(self._unread)[:5])
            raise ArtifactFormatError(f"artifact: listed in the manifest but absent: {missing}")
        self.complete = True


class PayloadFile:
    """One file of the payload: its name, its size in bytes, its SHA-256, and its bytes, once.

    `readinto` returns 0 only after the file's SHA-256 was found right, and, for the last file,
    the rest of the artifact too; any defect raises. Iterating yields the same bytes in pieces
    that are valid until the next. The name is a plain file name: no slash, not `.` or `..`.
    """

    def __init__(self, reader: ArtifactReader, tar: TarReader, member: Member, sha256: str) -> None:
        self.name = member.name
        self.size = member.size
        self.sha256 = sha256
        self.complete = False
        self.hashed_here = True
        self._reader = reader
        self._tar = tar
        self._digest = hashlib.sha256()
        self._left = member.size

    def readinto(self, buffer: memoryview, /) -> int:
        """Read at least one byte into `buffer`; 0 when all were read and found right."""
        if self.complete:
            return 0
        assert len(buffer), "an empty buffer would look like the end"
        if self._left:
            count = self._tar.readinto(buffer)
            if self.hashed_here:
                self._digest.update(buffer[:count])
            self._left -= count
            return count
        self._reader._file_ended(self, self._digest.hexdigest() if self.hashed_here else None)
        self.complete = True
        return 0

    def skip(self) -> None:
        """Read what is left, check it and throw it away."""
        if not self.complete:
            buffer = memoryview(bytearray(_SKIP_BYTES))
            while self.readinto(buffer):
                pass

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_SKIP_BYTES))
        while count := self.readinto(buffer):
            yield buffer[:count]


def _header_rank(name: str) -> int | None:
    if name == "header-info":
        return 0
    if name.startswith("scripts/"):
        metadata.check_script_name(name.removeprefix("scripts/"))
        return 1
    return {"headers/0000/type-info": 2, "headers/0000/meta-data": 3}.get(name)


def check_compatible(reader: ArtifactReader, device_type: str, provides: Mapping[str, str]) -> None:
    """Refuse an artifact that is not for this device or not for what runs on it.

    `provides` is what the device's committed software provides; `artifact_name` and
    `artifact_group` among them. Every key of both `artifact_depends` must be provided with one of
    its values. Raises ArtifactError, which says what is needed and what there is.
    """
    if device_type not in reader.header_info.device_types:
        raise ArtifactError(
            f"{reader.artifact_name} is for device type "
            f"{', '.join(reader.header_info.device_types)}; this is {device_type}"
        )
    here = {**provides, "device_type": device_type}
    for depends in (reader.header_info.depends, reader.type_info.depends):
        for key, allowed in depends.items():
            have = here.get(key)
            if have not in allowed:
                raise ArtifactError(
                    f"{reader.artifact_name} needs {key} to be {' or '.join(allowed)}; "
                    f"this device has {have if have is not None else 'none'}"
                )
