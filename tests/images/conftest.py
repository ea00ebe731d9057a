"""Images for the tests below: built once a session, with a client that does nothing.

With the real client a trial that nothing recorded is undone by the client itself; these tests are
about bootloaders and images, and must see what those do alone. One test boots the real one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from images import Places, TargetImages, build_target
from images.builder import REPOSITORY
from images.keys import ensure_keys

IDLE_CLIENT = '''
"""A client that has nothing to do."""


def main():
    return 0
'''


@pytest.fixture(scope="session")
def idle_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package `updater` that does nothing."""
    package = tmp_path_factory.mktemp("client") / "updater"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(IDLE_CLIENT)
    return package


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, idle_client: Path) -> Places:
    """An output of this session's own; packages and base trees come from the checkout's cache."""
    output = tmp_path_factory.mktemp("build")
    ensure_keys(output / "keys")
    return Places(build=output, cache=REPOSITORY / ".cache", updater=idle_client)


@pytest.fixture(scope="session")
def built(places: Places) -> Callable[..., TargetImages]:
    """Builds a target with the given variants."""

    def build(target: str, *variants: str) -> TargetImages:
        return build_target(target, variants, places=places, relock_if_gone=True)

    return build


class Disk:
    """A working copy of a target's disk, with ways to damage it."""

    def __init__(self, images: TargetImages, path: Path, variant: str = "v1") -> None:
        self.images = images
        self.path = path
        self.partitions = {p["name"]: p for p in images.manifest["layout"]["partitions"]}
        source = images.disk(variant)
        subprocess.run(["cp", "--sparse=always", str(source), str(path)], check=True)

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the disk."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the disk."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def put(self, slot: str, variant: str) -> None:
        """Write a root file system into a slot."""
        offset = self.partitions[f"rootfs-{slot}"]["offset"]
        self.write(offset, self.images.rootfs(variant).read_bytes())

    def destroy_slot(self, slot: str) -> None:
        """Overwrite the beginning of a slot."""
        self.write(self.partitions[f"rootfs-{slot}"]["offset"], b"\xa5" * (8 << 20))


@pytest.fixture
def make_disk(tmp_path: Path) -> Callable[..., Disk]:
    """Makes working copies of disks."""

    def make(images: TargetImages, variant: str = "v1") -> Disk:
        return Disk(images, tmp_path / "disk.img", variant)

    return make
