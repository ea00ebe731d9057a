"""Keys and artifacts for the tests, made once a session, and pieces to make bad ones from."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from updater.artifact import write_artifact
from updater.artifact.compression import SUFFIXES, compressor
from updater.artifact.signature import PrivateKey, sign

DEVICE_TYPE = "test-device"


def make_key(kind: str) -> PrivateKey:
    if kind == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(ec.SECP256R1())


def write_key_pair(key: PrivateKey, directory: Path, name: str) -> tuple[Path, Path]:
    private, public = directory / f"{name}.key", directory / f"{name}.pem"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL
            if not isinstance(key, ed25519.Ed25519PrivateKey)
            else serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def image_bytes(size: int, seed: int) -> bytes:
    """Return `size` bytes that compress to about half and never begin with zeros."""
    source = random.Random(seed)
    half = source.randbytes(size // 2)
    return (half + bytes(size))[:size]


def artifact(
    directory: Path,
    content: bytes,
    *,
    name: str = "v2",
    key: PrivateKey | None = None,
    compression: str = "none",
    device_type: str = DEVICE_TYPE,
) -> Path:
    image = directory / "rootfs.img"
    image.write_bytes(content)
    output = directory / f"{name}.mender"
    write_artifact(
        output, image, name=name, device_types=[device_type], key=key, compression=compression
    )
    return output


def tar_of(members: list[tuple[str, bytes]], **attributes: object) -> bytes:
    """Return a tar made by Python's tarfile: an independent writer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pack(data: bytes, compression: str) -> bytes:
    engine = compressor(compression)
    return engine.compress(data) + engine.flush()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Parts:
    """A valid artifact taken apart, to be spoilt in one place and put together again."""

    def __init__(self, key: PrivateKey, compression: str = "gzip", content: bytes = b"") -> None:
        self.key = key
        self.compression = compression
        self.content = content or image_bytes(100_000, 7)
        self.version = b'{"format":"mender","version":3}'
        self.header_info: dict[str, object] = {
            "payloads": [{"type": "rootfs-image"}],
            "artifact_provides": {"artifact_name": "v2"},
            "artifact_depends": {"device_type": [DEVICE_TYPE]},
        }
        self.type_info: dict[str, object] = {
            "type": "rootfs-image",
            "artifact_provides": {"rootfs-image.version": "v2"},
            "clears_artifact_provides": ["rootfs-image.*"],
        }
        self.files: list[tuple[str, bytes]] | None = None
        self.header_members: list[tuple[str, bytes]] | None = None
        self.data_tar: bytes | None = None
        self.data_packed: bytes | None = None
        self.manifest: bytes | None = None
        self.signature: bytes | None = None
        self.omit: set[str] = set()
        self.extra: list[tuple[int, str, bytes]] = []

    def listed_files(self) -> list[tuple[str, bytes]]:
        """The payload's files as the manifest lists them."""
        return [("rootfs.img", self.content)] if self.files is None else self.files

    def members(self) -> list[tuple[str, bytes]]:
        suffix = SUFFIXES[self.compression]
        files = self.listed_files()
        inner = self.header_members or [
            ("header-info", json.dumps(self.header_info).encode()),
            ("headers/0000/type-info", json.dumps(self.type_info).encode()),
            ("headers/0000/meta-data", b""),
        ]
        header = pack(tar_of(inner), self.compression)
        data = self.data_packed
        if data is None:
            data = pack(self.data_tar or tar_of(files), self.compression)
        manifest = self.manifest
        if manifest is None:
            manifest = (
                "".join(f"{sha256(content)}  data/0000/{name}\n" for name, content in files)
                + f"{sha256(header)}  header.tar{suffix}\n"
                f"{sha256(self.version)}  version\n"
            ).encode()
        members = [
            ("version", self.version),
            ("manifest", manifest),
            ("manifest.sig", self.signature or sign(manifest, self.key)),
            (f"header.tar{suffix}", header),
            (f"data/0000.tar{suffix}", data),
        ]
        for position, name, content in self.extra:
            members.insert(position, (name, content))
        return [member for member in members if member[0] not in self.omit]

    def build(self) -> bytes:
        return tar_of(self.members())
