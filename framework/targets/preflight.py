"""What must be true before a machine is started, each with the line a person gets if it is not.

Programs, image files (present, of the right size, for the right architecture) and host ports.
An image's manifest (`manifest.json` beside it, made by the image builder) is believed about
architecture and size; without one only what the file itself shows is checked.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framework.targets.errors import RigError
from framework.targets.machine import Disk, package_of

__all__ = ["Images", "check_images", "find_program", "free_port", "known_sha256"]

_SECTOR = 512
_VIRT_PFLASH_BYTES = 64 << 20  # hw/arm/virt.c: each of the two flash devices
_ARCHITECTURES = {
    "arm64": "aarch64",
    "aarch64": "aarch64",
    "amd64": "x86_64",
    "x86_64": "x86_64",
}


@dataclass(frozen=True)
class Images:
    """The image files of a machine, by what they are for."""

    firmware: Path | None = None
    pflash: Path | None = None
    kernel: Path | None = None
    disks: Mapping[str, Path] = field(default_factory=dict)

    def all(self) -> list[Path]:
        """Every file."""
        single = [path for path in (self.firmware, self.pflash, self.kernel) if path is not None]
        return [*single, *self.disks.values()]


def find_program(where: str, program: str) -> str:
    """The full path of a QEMU program; `RigError` naming its package if it is missing."""
    found = shutil.which(program)
    if found is None:
        raise RigError(f"{where}: {program} is not installed: apt install {package_of(program)}")
    return found


def free_port(where: str, port: int) -> None:
    """`RigError` if a loopback TCP port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RigError(
                f"{where}.network.forward: port {port} on 127.0.0.1 cannot be used "
                f"({error.strerror}); 'host: 0' takes any free port"
            ) from error


def how_to_build(path: Path) -> str:
    """What makes a missing image: ours lie in `build/TARGET/`."""
    if path.parent.parent.name == "build":
        return f"; build it: python -m images build {path.parent.name}"
    return ""


def manifest_of(path: Path) -> Mapping[str, Any]:
    """The manifest beside an image; empty if there is none."""
    manifest = path.parent / "manifest.json"
    try:
        content = json.loads(manifest.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RigError(f"{manifest}: unreadable manifest ({error}){how_to_build(path)}") from error
    return content if isinstance(content, dict) else {}


def known_sha256(path: Path) -> str | None:
    """An image's SHA-256 as its manifest has it, so that nobody need read the whole file."""
    files = manifest_of(path).get("files", {})
    digest = files.get(path.name, {}).get("sha256") if isinstance(files, dict) else None
    return digest if isinstance(digest, str) else None


def check_images(
    where: str, images: Images, disks: Sequence[Disk], architecture: str, machine: str
) -> None:
    """`RigError` for the first image that is missing or does not fit this machine."""
    for path in images.all():
        _check_file(where, path, architecture)
    if images.pflash is not None and machine.partition(",")[0] == "virt":
        size = images.pflash.stat().st_size
        if size != _VIRT_PFLASH_BYTES:
            raise RigError(
                f"{images.pflash}: is {size} bytes, but a pflash of machine 'virt' has exactly "
                f"{_VIRT_PFLASH_BYTES}"
            )
    for disk in disks:
        _check_disk(images.disks[disk.name], disk)


def _check_file(where: str, path: Path, architecture: str) -> None:
    if not path.is_file():
        raise RigError(f"{where}: image {path} is missing{how_to_build(path)}")
    manifest = manifest_of(path)
    made_for = str(manifest.get("arch", architecture))
    if _ARCHITECTURES.get(made_for, made_for) != architecture:
        raise RigError(
            f"{where}: image {path} is for {made_for}, but the machine is {architecture}"
        )
    files = manifest.get("files", {})
    size = files.get(path.name, {}).get("size") if isinstance(files, dict) else None
    if size is not None and path.stat().st_size != size:
        raise RigError(
            f"{where}: image {path} is {path.stat().st_size} bytes, its manifest says {size}"
            f"{how_to_build(path)}"
        )


def _check_disk(path: Path, disk: Disk) -> None:
    size = path.stat().st_size
    if size == 0 or size % _SECTOR:
        raise RigError(f"{path}: {size} bytes are not a disk (a multiple of {_SECTOR})")
    if disk.size_bytes is not None and disk.size_bytes < size:
        raise RigError(f"{path}: is {size} bytes, larger than size_bytes: {disk.size_bytes}")
    total = disk.size_bytes or size
    if disk.interface == "sd" and total & (total - 1):
        raise RigError(
            f"{path}: {total} bytes, but an SD card's size must be a power of two; "
            f"set size_bytes: {1 << total.bit_length()}"
        )
