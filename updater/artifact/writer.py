"""Streaming, deterministic writer of Artifact v3 with a rootfs-image payload.

Two passes over the image: one for its SHA-256, which the manifest needs before any payload byte,
and one that compresses it into place. The file is written under a temporary name, synced, and
renamed, so that a half-written artifact never has the final name. Same inputs give the same
bytes: metadata is constant, compressors run on one thread, and ECDSA signing follows RFC 6979
where the `cryptography` library can (otherwise manifest.sig alone differs between runs).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from updater.artifact import metadata, tar
from updater.artifact.compression import SUFFIXES, compressor
from updater.artifact.errors import ArtifactError

if TYPE_CHECKING:
    from updater.artifact.signature import PrivateKey

_CHUNK_BYTES = 1024 * 1024


class _Image(NamedTuple):
    """The payload's source and what the first pass found."""

    path: Path
    size: int
    checksum: str


def write_artifact(
    output: Path | str,
    image: Path | str,
    *,
    name: str,
    device_types: Sequence[str],
    key: PrivateKey | None = None,
    compression: str = "zstd",
    level: int | None = None,
    provides: Mapping[str, str] | None = None,
    depends: Mapping[str, Sequence[str]] | None = None,
    clears: Sequence[str] = metadata.DEFAULT_CLEARS,
) -> None:
    """Write `image` as the artifact `name` to `output`.

    `provides` and `depends` are added to the payload's own (`rootfs-image.checksum`,
    `rootfs-image.version`); `depends` may hold `artifact_name` and `artifact_group` too, which
    go to the header. Raises ArtifactError when an input is unusable or the disk is full.
    """
    output, image = Path(output), Path(image)
    metadata.check_text(name, "artifact name")
    if not device_types:
        raise ArtifactError("an artifact needs at least one device type")
    for device_type in device_types:
        metadata.check_text(device_type, "device type")
    compressor(compression, level)
    tar.check_name(image.name, "image")
    try:
        size, checksum = _hash_file(image)
        if size == 0:
            raise ArtifactError(f"{image}: empty")
        extra = {key_: tuple(values) for key_, values in (depends or {}).items()}
        header_depends: dict[str, tuple[str, ...]] = {
            key_: extra.pop(key_) for key_ in ("artifact_name", "artifact_group") if key_ in extra
        }
        header = _header_archive(
            metadata.HeaderInfo(
                (metadata.ROOTFS_IMAGE,),
                {"artifact_name": name},
                {**header_depends, "device_type": tuple(device_types)},
            ),
            metadata.TypeInfo(
                {
                    "rootfs-image.checksum": checksum,
                    "rootfs-image.version": name,
                    **(provides or {}),
                },
                extra,
                tuple(clears),
            ),
            compression,
            level,
        )
        header_name = "header.tar" + SUFFIXES[compression]
        manifest = metadata.format_manifest(
            {
                "version": hashlib.sha256(metadata.VERSION).hexdigest(),
                header_name: hashlib.sha256(header).hexdigest(),
                f"data/0000/{image.name}": checksum,
            }
        )
        front = tar.member("version", metadata.VERSION) + tar.member("manifest", manifest)
        if key is not None:
            from updater.artifact.signature import sign  # noqa: PLC0415

            front += tar.member("manifest.sig", sign(manifest, key))
        front += tar.member(header_name, header)
        _write_atomically(output, front, _Image(image, size, checksum), compression, level)
    except OSError as error:
        raise ArtifactError(f"{error.filename or output}: {error.strerror or error}") from error


def _write_atomically(
    output: Path, front: bytes, image: _Image, compression: str, level: int | None
) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(front)
            _write_data(file, image, compression, level)
            file.write(tar.END_OF_ARCHIVE)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(output)
        _sync_directory(output.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_data(file: IO[bytes], image: _Image, compression: str, level: int | None) -> None:
    """Write data/0000.tar: its header last, when the compressed size is known."""
    member_name = "data/0000.tar" + SUFFIXES[compression]
    header_at = file.tell()
    file.write(bytes(tar.BLOCK))
    packer = compressor(compression, level)
    digest = hashlib.sha256()
    read = 0
    file.write(packer.compress(tar.header(image.path.name, image.size)))
    with image.path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            read += len(chunk)
            file.write(packer.compress(chunk))
    if read != image.size or digest.hexdigest() != image.checksum:
        raise ArtifactError(f"{image.path}: changed while it was being read")
    file.write(packer.compress(tar.padding(image.size) + tar.END_OF_ARCHIVE))
    file.write(packer.flush())
    end = file.tell()
    packed = end - header_at - tar.BLOCK
    file.write(tar.padding(packed))
    end = file.tell()
    file.seek(header_at)
    file.write(tar.header(member_name, packed))
    file.seek(end)


def _header_archive(
    info: metadata.HeaderInfo, type_info: metadata.TypeInfo, compression: str, level: int | None
) -> bytes:
    content = (
        tar.member("header-info", metadata.format_header_info(info))
        + tar.member(
            "headers/0000/type-info",
            metadata.format_type_info(type_info, info.payload_types[0]),
        )
        + tar.member("headers/0000/meta-data", b"")
        + tar.END_OF_ARCHIVE
    )
    packer = compressor(compression, level)
    return packer.compress(content) + packer.flush()


def _hash_file(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
