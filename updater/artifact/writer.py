"""Streaming, deterministic writer of Artifact v3: root file system images and module payloads.

Two passes over each payload file: one for its SHA-256, which the manifest needs before any payload
byte, and one that compresses it into place; a file that changed in between is an error. The
artifact is written under a temporary name, synced, and renamed, so that a half-written one never
has the final name. Same inputs give the same bytes: metadata is constant, files and scripts keep
the order in which they are given, compressors run on one thread, and ECDSA signing follows RFC
6979 where the `cryptography` library can (otherwise manifest.sig alone differs between runs).

What a payload provides and clears by default is what `mender-artifact` 3.9 writes (observed, see
`tests/peers/`), but for `type` in a root file system's type-info, which 3.9 leaves empty.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from updater.artifact import metadata, tar
from updater.artifact.compression import SUFFIXES, WINDOW_BYTES, Compressor, compressor
from updater.artifact.errors import ArtifactError

if TYPE_CHECKING:
    from updater.artifact.signature import PrivateKey

_CHUNK_BYTES = 1024 * 1024
_MAX_SCRIPT_BYTES = 4 * 1024 * 1024
_HEADER_DEPENDS = ("artifact_name", "device_type", "artifact_group")


Progress = Callable[[int], None]


def _silent(_: int) -> None:
    """Show no progress."""


class Software(NamedTuple):
    """The version that a payload provides, as `FILESYSTEM[.NAME].version`.

    `name` defaults to nothing for images and to the module's name for modules; `version` to the
    artifact's name.
    """

    filesystem: str = metadata.ROOTFS_IMAGE
    name: str | None = None
    version: str | None = None


DEFAULT_SOFTWARE = Software()


class Packing(NamedTuple):
    """How an artifact is packed: signing key, compression, level (None: the default), window."""

    key: PrivateKey | None
    compression: str
    level: int | None
    window_bytes: int
    progress: Progress

    def packer(self) -> Compressor:
        """Begin a compressed stream."""
        return compressor(self.compression, self.level, self.window_bytes)


class _File(NamedTuple):
    """A payload file's source and what the first pass found."""

    path: Path
    size: int
    sha256: str
    name: str
    """What it is called in the artifact."""


def write_artifact(
    output: Path | str,
    image: Path | str,
    *,
    name: str,
    device_types: Sequence[str],
    key: PrivateKey | None = None,
    compression: str = "zstd",
    level: int | None = None,
    window_bytes: int = WINDOW_BYTES,
    group: str | None = None,
    provides: Mapping[str, str] | None = None,
    depends: Mapping[str, Sequence[str]] | None = None,
    clears: Sequence[str] = (),
    default_clears: bool = True,
    software: Software | None = DEFAULT_SOFTWARE,
    checksum_key: str | None = "rootfs-image.checksum",
    scripts: Sequence[Path | str] = (),
    file_name: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the root file system `image` as the artifact `name` to `output`.

    Args:
        output: the file to write; replaced only by a whole artifact.
        image: the root file system; not empty.
        name: the artifact's name.
        device_types: the device types that may install it; at least one.
        key: signs the artifact.
        compression: "none", "gzip", "xz" or "zstd", for header and payload.
        level: the compression's level.
        window_bytes: what unpacking xz or zstd may take in memory; a power of two.
        group: the group that the artifact provides.
        provides: more that the payload provides; overrides the defaults.
        depends: what a device must provide; `artifact_name` and `artifact_group` go to the
            header, the rest to the payload.
        clears: patterns of what the payload clears, before the default ones.
        default_clears: add the default patterns (they need `software`).
        software: the version key; None for none.
        checksum_key: what the image's SHA-256 is provided as; None for nothing.
        scripts: files named `State_Action_NN[_text]`.
        file_name: what the image is called in the artifact; its own name unless given.
        progress: called with the number of bytes read since the last call; each payload byte is
            read twice.

    Raises:
        ArtifactError: an input is unusable, or the disk is full.
    """
    image = Path(image)
    with _readable_errors(output):
        file = _hash_file(image, progress or _silent)
        file = file._replace(name=file_name or file.name)
        if file.size == 0:
            raise ArtifactError(f"{image}: empty")
        own: dict[str, str] = {}
        if checksum_key is not None:
            own[checksum_key] = file.sha256
        prefix = None
        if software is not None:
            prefix = _prefix(software, software.name)
            own[f"{prefix}.version"] = software.version or name
        defaults: Sequence[str] = ()
        if prefix is not None and default_clears:
            whole = prefix == metadata.ROOTFS_IMAGE
            defaults = metadata.DEFAULT_CLEARS if whole else [f"{prefix}.*"]
        _write(
            output,
            [file],
            meta_data=b"",
            info=_header_info(metadata.ROOTFS_IMAGE, name, device_types, group, depends),
            type_info=_type_info({**own, **(provides or {})}, depends, [*clears, *defaults]),
            scripts=scripts,
            packing=Packing(key, compression, level, window_bytes, progress or _silent),
        )


def write_module_artifact(
    output: Path | str,
    files: Sequence[Path | str],
    *,
    payload_type: str,
    name: str,
    device_types: Sequence[str],
    meta_data: Mapping[str, Any] | None = None,
    key: PrivateKey | None = None,
    compression: str = "zstd",
    level: int | None = None,
    window_bytes: int = WINDOW_BYTES,
    group: str | None = None,
    provides: Mapping[str, str] | None = None,
    depends: Mapping[str, Sequence[str]] | None = None,
    clears: Sequence[str] = (),
    default_clears: bool = True,
    software: Software | None = DEFAULT_SOFTWARE,
    scripts: Sequence[Path | str] = (),
    progress: Progress | None = None,
) -> None:
    """Write `files` as an artifact for the update module `payload_type`.

    `meta_data` is any JSON object that the module understands; None writes none. The other
    arguments are those of `write_artifact`. Raises ArtifactError.
    """
    metadata.check_payload_type(payload_type)
    if payload_type == metadata.ROOTFS_IMAGE:
        raise ArtifactError("a rootfs-image is no module payload: write it as a rootfs-image")
    with _readable_errors(output):
        own = {}
        defaults = []
        if software is not None:
            prefix = _prefix(software, software.name or payload_type)
            own[f"{prefix}.version"] = software.version or name
            defaults = [f"{prefix}.*"] if default_clears else []
        _write(
            output,
            [_hash_file(Path(path), progress or _silent) for path in files],
            meta_data=None if meta_data is None else metadata.format_meta_data(meta_data),
            info=_header_info(payload_type, name, device_types, group, depends),
            type_info=_type_info({**own, **(provides or {})}, depends, [*clears, *defaults]),
            scripts=scripts,
            packing=Packing(key, compression, level, window_bytes, progress or _silent),
        )


def write_bootstrap_artifact(
    output: Path | str,
    *,
    name: str,
    device_types: Sequence[str],
    key: PrivateKey | None = None,
    compression: str = "zstd",
    level: int | None = None,
    window_bytes: int = WINDOW_BYTES,
    group: str | None = None,
    provides: Mapping[str, str] | None = None,
    depends: Mapping[str, Sequence[str]] | None = None,
    clears: Sequence[str] = (),
) -> None:
    """Write an artifact without a payload, which says what a device was provisioned with."""
    with _readable_errors(output):
        _write(
            output,
            [],
            meta_data=None,
            info=_header_info(None, name, device_types, group, depends),
            type_info=_type_info(provides or {}, depends, clears),
            scripts=(),
            packing=Packing(key, compression, level, window_bytes, _silent),
        )


def sign_artifact(
    source: Path | str,
    output: Path | str,
    key: PrivateKey,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write `source` with a signature of `key` to `output`, which may be `source` itself.

    The whole artifact is read and checked first. All but the signature is copied byte for byte.
    Raises ArtifactError; also when there is a signature and `replace` is False.
    """
    from updater.artifact.reader import ArtifactReader  # noqa: PLC0415
    from updater.artifact.signature import sign  # noqa: PLC0415

    with _readable_errors(output), Path(source).open("rb") as file:
        reader = ArtifactReader(tar.Counted(file, progress))
        if reader.signed and not replace:
            raise ArtifactError(f"{source}: is signed already; --force replaces the signature")
        for _ in reader.files():
            pass
        front = (
            tar.member("version", metadata.VERSION)
            + tar.member("manifest", reader.manifest_bytes)
            + tar.member("manifest.sig", sign(reader.manifest_bytes, key))
        )
        file.seek(_offset_behind_signature(file))
        with _replacing(Path(output)) as written:
            written.write(front)
            while chunk := file.read(_CHUNK_BYTES):
                written.write(chunk)
                (progress or _silent)(len(chunk))


def _offset_behind_signature(file: io.BufferedReader) -> int:
    """Return where the first member behind version, manifest and signature begins."""
    file.seek(0)
    archive = tar.TarReader(file, "artifact")
    while True:
        # The reader has consumed whole members, so only a member's padding lies ahead.
        start = -(-file.tell() // tar.BLOCK) * tar.BLOCK
        member = archive.next()
        assert member is not None
        if member.name not in ("version", "manifest", "manifest.sig"):
            return start
        archive.read_all(member, member.size)


def _prefix(software: Software, name: str | None) -> str:
    parts = [software.filesystem, name] if name else [software.filesystem]
    return ".".join(metadata.check_text(part, "software") for part in parts)


def _header_info(
    payload_type: str | None,
    name: str,
    device_types: Sequence[str],
    group: str | None,
    depends: Mapping[str, Sequence[str]] | None,
) -> metadata.HeaderInfo:
    metadata.check_text(name, "artifact name")
    if not device_types:
        raise ArtifactError("an artifact needs at least one device type")
    provides = {"artifact_name": name}
    if group is not None:
        provides["artifact_group"] = metadata.check_text(group, "group")
    here = {"device_type": tuple(device_types)}
    for key in ("artifact_name", "artifact_group"):
        if depends and key in depends:
            here[key] = tuple(depends[key])
    for key, values in here.items():
        for value in values:
            metadata.check_text(value, key.replace("_", " "))
    return metadata.HeaderInfo(
        (payload_type,), provides, {key: here[key] for key in _HEADER_DEPENDS if key in here}
    )


def _type_info(
    provides: Mapping[str, str],
    depends: Mapping[str, Sequence[str]] | None,
    clears: Sequence[str],
) -> metadata.TypeInfo:
    extra = {
        key: tuple(values)
        for key, values in (depends or {}).items()
        if key not in ("artifact_name", "artifact_group")
    }
    for key in {*provides, *extra}:
        metadata.check_text(key, "key")
    for key, values in extra.items():
        if not values:
            raise ArtifactError(f"depends: {key} without a value")
        for value in values:
            metadata.check_text(value, f"depends: {key}")
    for key, value in provides.items():
        if value:
            metadata.check_text(value, f"provides: {key}")
    once = tuple(dict.fromkeys(metadata.check_text(pattern, "clears") for pattern in clears))
    return metadata.TypeInfo(provides, extra, once or None)


def _write(
    output: Path | str,
    files: Sequence[_File],
    *,
    meta_data: bytes | None,
    info: metadata.HeaderInfo,
    type_info: metadata.TypeInfo,
    scripts: Sequence[Path | str],
    packing: Packing,
) -> None:
    _check_names(files)
    header = _header_archive(info, _scripts(scripts), type_info, meta_data, packing)
    header_name = "header.tar" + SUFFIXES[packing.compression]
    manifest = metadata.format_manifest(
        {
            **{f"data/0000/{file.name}": file.sha256 for file in files},
            header_name: hashlib.sha256(header).hexdigest(),
            "version": hashlib.sha256(metadata.VERSION).hexdigest(),
        }
    )
    front = tar.member("version", metadata.VERSION) + tar.member("manifest", manifest)
    if packing.key is not None:
        from updater.artifact.signature import sign  # noqa: PLC0415

        front += tar.member("manifest.sig", sign(manifest, packing.key))
    front += tar.member(header_name, header)
    with _replacing(Path(output)) as file:
        file.write(front)
        _write_data(file, files, packing)
        file.write(tar.END_OF_ARCHIVE)


def _check_names(files: Sequence[_File]) -> None:
    seen = set()
    for file in files:
        metadata.check_file_name(file.name, str(file.path))
        if file.name in seen:
            raise ArtifactError(f"{file.path}: a second file named {file.name}")
        seen.add(file.name)


def _scripts(paths: Sequence[Path | str]) -> dict[str, bytes]:
    scripts: dict[str, bytes] = {}
    for path in map(Path, paths):
        metadata.check_script_name(path.name)
        if path.name in scripts:
            raise ArtifactError(f"{path}: a second script named {path.name}")
        with path.open("rb") as file:
            content = file.read(_MAX_SCRIPT_BYTES + 1)
        if len(content) > _MAX_SCRIPT_BYTES:
            raise ArtifactError(f"{path}: a script larger than {_MAX_SCRIPT_BYTES} bytes")
        scripts[path.name] = content
    return scripts


def _header_archive(
    info: metadata.HeaderInfo,
    scripts: Mapping[str, bytes],
    type_info: metadata.TypeInfo,
    meta_data: bytes | None,
    packing: Packing,
) -> bytes:
    (payload_type,) = info.payload_types
    members = [("header-info", metadata.format_header_info(info))]
    members += [(f"scripts/{name}", content) for name, content in scripts.items()]
    members.append(("headers/0000/type-info", metadata.format_type_info(type_info, payload_type)))
    if meta_data is not None:
        members.append(("headers/0000/meta-data", meta_data))
    content = b"".join(tar.member(name, data) for name, data in members) + tar.END_OF_ARCHIVE
    packer = packing.packer()
    return packer.compress(content) + packer.flush()


def _write_data(file: IO[bytes], files: Sequence[_File], packing: Packing) -> None:
    """Write data/0000.tar: its header last, when the compressed size is known."""
    member_name = "data/0000.tar" + SUFFIXES[packing.compression]
    header_at = file.tell()
    file.write(bytes(tar.BLOCK))
    packer = packing.packer()
    for source in files:
        _write_file(file, source, packer, packing.progress)
    file.write(packer.compress(tar.END_OF_ARCHIVE))
    file.write(packer.flush())
    end = file.tell()
    packed = end - header_at - tar.BLOCK
    file.write(tar.padding(packed))
    end = file.tell()
    file.seek(header_at)
    file.write(tar.header(member_name, packed))
    file.seek(end)


def _write_file(file: IO[bytes], source: _File, packer: Any, progress: Progress) -> None:
    digest = hashlib.sha256()
    file.write(packer.compress(tar.header(source.name, source.size)))
    with source.path.open("rb") as content:
        for chunk in _exactly(content, source.size, progress):
            digest.update(chunk)
            file.write(packer.compress(chunk))
    if digest.hexdigest() != source.sha256:
        raise ArtifactError(f"{source.path}: changed while it was being read")
    file.write(packer.compress(tar.padding(source.size)))


def _hash_file(path: Path, progress: Progress) -> _File:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        for chunk in _exactly(file, size, progress):
            digest.update(chunk)
    return _File(path, size, digest.hexdigest(), path.name)


def _exactly(file: IO[bytes], size: int, progress: Progress) -> Iterator[bytes]:
    """Yield the file's `size` bytes; a file that shrank or grew is an error, and ends."""
    left = size
    while chunk := file.read(_CHUNK_BYTES):
        left -= len(chunk)
        if left < 0:
            break
        yield chunk
        progress(len(chunk))
    if left:
        raise ArtifactError(f"{file.name}: changed while it was being read")


@contextmanager
def _readable_errors(output: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{error.filename or output}: {error.strerror or error}") from error


@contextmanager
def _replacing(output: Path) -> Iterator[IO[bytes]]:
    """Write a new `output`, which appears whole, synced, or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(output)
        _sync_directory(output.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
