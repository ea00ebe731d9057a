"""Streaming reader of Artifact v3: checked in the order in which it arrives.

    version → manifest → [manifest.sig] → header.tar* → data/0000.tar*

What has been verified when: the signature covers the manifest and is checked as soon as
manifest.sig was read, before the header; `version` and the compressed header are compared with
the manifest before the header is parsed; payload bytes are released as they stream and their
SHA-256 is compared when the last one was read, together with the rest of the archive (padding,
end marks, nothing behind). Only when `Payload.readinto` has returned 0 is the artifact whole: a
consumer must not activate anything earlier.

Memory is constant: one tar block, the bounded texts (`Limits`), and a decompressor's window.
Not handled, and refused by name: augmented sections, several payloads, payload types other than
rootfs-image. State scripts are listed, not run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from updater.artifact import metadata
from updater.artifact.compression import compression_of, decompressor
from updater.artifact.errors import (
    ArtifactError,
    ArtifactFormatError,
    ArtifactIntegrityError,
    ArtifactSignatureError,
)
from updater.artifact.tar import Member, Readable, TarReader

if TYPE_CHECKING:
    from updater.artifact.signature import PublicKey

_SCRIPT_NAME = re.compile(r"scripts/[A-Za-z]+_(?:Enter|Leave|Error)_[0-9]{2}(?:_[A-Za-z0-9_.-]+)?")


class Limits(NamedTuple):
    """Upper bounds in bytes of what is held in memory."""

    manifest: int = 1024 * 1024
    signature: int = 4096
    compressed_header: int = 4 * 1024 * 1024
    header_member: int = 4 * 1024 * 1024
    header_total: int = 16 * 1024 * 1024


class ArtifactReader:
    """Reads one artifact from `stream`.

    `stream` is any object with `readinto(memoryview) -> int`, for example a binary file or a
    download. With `trusted_keys`, an artifact without a valid signature of one of them is
    refused; without keys a signature is not looked at (`signed` says whether there is one).
    The constructor reads everything before the payload; `payload` is then ready to stream.
    Raises ArtifactError and its kinds.
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
        self.signed = False
        self.verified = False
        self.scripts: tuple[str, ...] = ()

        self._read_version_and_manifest()
        member = self._next("manifest.sig or header.tar")
        if member.name == "manifest.sig":
            self._read_signature(member, trusted_keys)
            member = self._next("header.tar")
        elif trusted_keys:
            raise ArtifactSignatureError("the artifact is not signed, but trusted keys are set")
        self._refuse_augmented(member)
        self._read_header(member)
        self.payload = self._open_payload()

    @property
    def manifest(self) -> dict[str, str]:
        """Path → SHA-256 of every listed member."""
        return dict(self._manifest)

    @property
    def artifact_name(self) -> str:
        """The artifact's name."""
        return self.header_info.artifact_name

    @property
    def provides(self) -> dict[str, str]:
        """All that the artifact provides: artifact_name, group, and the payload's keys."""
        return {**self.header_info.provides, **self.type_info.provides}

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
            raise ArtifactFormatError(f"artifact: augmented sections ({member.name}) are refused")

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
        content = self._outer.read_all(member, self._limits.compressed_header)
        self._check(member.name, hashlib.sha256(content).hexdigest())
        tar = TarReader(decompressor(compression, _Memory(content), member.name), member.name)
        files = self._header_members(tar)
        self.header_info = metadata.parse_header_info(files.pop("header-info"))
        if len(self.header_info.payload_types) != 1:
            raise ArtifactFormatError("artifacts with several payloads are not supported")
        self.payload_type = self.header_info.payload_types[0]
        if self.payload_type != metadata.ROOTFS_IMAGE:
            raise ArtifactFormatError(f"payload type {self.payload_type!r} is not supported")
        type_info = files.pop("headers/0000/type-info", None)
        if type_info is None:
            raise ArtifactFormatError("header: headers/0000/type-info is missing")
        self.type_info = metadata.parse_type_info(type_info, self.payload_type)
        if files.pop("headers/0000/meta-data", b"").strip():
            raise ArtifactFormatError("header: a rootfs-image payload has no meta-data")
        self.scripts = tuple(name.removeprefix("scripts/") for name in files)

    def _header_members(self, tar: TarReader) -> dict[str, bytes]:
        """Read the header archive: fixed order, known names, bounded in sum."""
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
            total += member.size
            if total > self._limits.header_total:
                raise ArtifactFormatError(
                    f"header: more than {self._limits.header_total} bytes unpacked"
                )
            files[member.name] = tar.read_all(member, self._limits.header_member)
            if len(files) == 1 and member.name != "header-info":
                raise ArtifactFormatError(f"header: {member.name!r} comes first, not header-info")
        if not files:
            raise ArtifactFormatError("header: empty")
        tar.finish()
        return files

    def _open_payload(self) -> Payload:
        member = self._next("data/0000.tar")
        compression = compression_of(member.name, "data/0000.tar")
        if compression is None:
            raise ArtifactFormatError(f"artifact: {member.name!r} where data/0000.tar should be")
        tar = TarReader(decompressor(compression, self._outer, member.name), member.name)
        file = tar.next()
        if file is None:
            raise ArtifactFormatError(f"{member.name}: empty")
        if "/" in file.name:
            raise ArtifactFormatError(f"{member.name}: {file.name!r} is not a plain file name")
        if f"data/0000/{file.name}" not in self._manifest:
            raise ArtifactFormatError(f"{member.name}: {file.name!r} is not listed in the manifest")
        return Payload(self, tar, file, member)

    def _finish(self, payload: Payload, checksum: str) -> None:
        """Check what can only be known after the last payload byte."""
        inner = payload.tar
        extra = inner.next()
        if extra is not None:
            raise ArtifactFormatError(f"{inner_name(payload)}: second file {extra.name!r}")
        inner.finish()
        self._check(f"data/0000/{payload.name}", checksum)
        _drain_nothing(self._outer, payload.member)
        after = self._outer.next()
        if after is not None:
            raise ArtifactFormatError(f"artifact: unexpected member {after.name!r} at the end")
        self._outer.finish()
        if self._unread:
            missing = ", ".join(sorted(self._unread))
            raise ArtifactFormatError(f"artifact: listed in the manifest but absent: {missing}")


class Payload:
    """The image: its name, its size, and its bytes, once.

    `readinto` returns 0 only after the SHA-256 and the rest of the artifact were found right;
    any defect raises. Iterating yields the same bytes in pieces that are valid until the next.
    """

    def __init__(
        self, reader: ArtifactReader, tar: TarReader, file: Member, member: Member
    ) -> None:
        self.name = file.name
        self.size = file.size
        self.sha256 = reader.manifest[f"data/0000/{file.name}"]
        self.tar = tar
        self.member = member
        self._reader = reader
        self._digest = hashlib.sha256()
        self._left = file.size
        self.complete = False

    def readinto(self, buffer: memoryview, /) -> int:
        """Read the next bytes into `buffer`; 0 when the whole artifact was found valid."""
        if self.complete:
            return 0
        assert len(buffer), "an empty buffer would look like the end"
        if self._left:
            count = self.tar.readinto(buffer)
            self._digest.update(buffer[:count])
            self._left -= count
            return count
        self._reader._finish(self, self._digest.hexdigest())
        self.complete = True
        return 0

    def __iter__(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(256 * 1024))
        while count := self.readinto(buffer):
            yield buffer[:count]


class _Memory:
    """Bytes as a `Readable`."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)

    def readinto(self, buffer: memoryview, /) -> int:
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


def inner_name(payload: Payload) -> str:
    """Return the archive's name that holds `payload`."""
    return payload.member.name


def _drain_nothing(outer: TarReader, member: Member) -> None:
    """The compressed stream must fill its member exactly."""
    if outer.readinto(memoryview(bytearray(1))):
        raise ArtifactFormatError(f"{member.name}: data after the compressed stream")


def _header_rank(name: str) -> int | None:
    if name == "header-info":
        return 0
    if _SCRIPT_NAME.fullmatch(name):
        return 1
    return {"headers/0000/type-info": 2, "headers/0000/meta-data": 3}.get(name)


def check_compatible(reader: ArtifactReader, device_type: str, provides: dict[str, str]) -> None:
    """Refuse an artifact that is not for this device or not for what runs on it."""
    if device_type not in reader.header_info.device_types:
        raise ArtifactError(
            f"{reader.artifact_name} is for device type "
            f"{', '.join(reader.header_info.device_types)}; this is {device_type}"
        )
    for depends in (reader.header_info.depends, reader.type_info.depends):
        for key, allowed in depends.items():
            if key == "device_type":
                continue
            have = provides.get(key)
            if have not in allowed:
                raise ArtifactError(
                    f"{reader.artifact_name} needs {key} to be {' or '.join(allowed)}; "
                    f"this device has {have if have is not None else 'none'}"
                )
