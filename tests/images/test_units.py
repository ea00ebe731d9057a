"""What one write can destroy on our targets' disks: never both copies of the boot variables.

An interrupted write may cost whatever shares a unit with it: a sector, a flash page, an erase unit
(`framework.disk.models`). Each such unit of the disks is made unreadable in turn, and the copies
are read as the bootloader reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from framework.disk import SECTOR, LazyDisk
from framework.disk.lazy import UNREADABLE, new_map
from framework.explore.layout import EnvironmentReading, Range
from framework.scenario.layouts import layout_of
from framework.scenario.manifest import TargetManifest
from images.builder import build_target

MIB = 1 << 20
TARGETS = ("qemu-arm64", "qemu-x86_64", "qemu-arm64-sd")


@pytest.fixture(scope="module", params=TARGETS)
def manifest(request: pytest.FixtureRequest) -> TargetManifest:
    built = build_target(request.param, ("v1",), relock_if_gone=True)
    return TargetManifest.parse(built.manifest, built.directory, "v1")


@contextmanager
def opened(manifest: TargetManifest, journal: Path) -> Iterator[dict[str, LazyDisk]]:
    journal.write_bytes(b"")
    with ExitStack() as stack:
        disks = {}
        for name, path in manifest.disks.items():
            size = path.stat().st_size
            disks[name] = stack.enter_context(LazyDisk(name, new_map(size, size), path, journal))
        yield disks


def without(disks: dict[str, LazyDisk], store, *lost: Range) -> EnvironmentReading:
    """The environment with ranges that can't be read."""
    before = {name: disk.map.copy() for name, disk in disks.items()}
    for part in lost:
        disks[part.device].map[part.offset // SECTOR : part.end // SECTOR] = UNREADABLE
    try:
        return store.read(disks)
    finally:
        for name, disk in disks.items():
            disk.map[:] = before[name]


@pytest.mark.parametrize(
    ("unit", "reach"), [(512, 64 << 10), (16 << 10, MIB), (512 << 10, 4 * MIB), (4 * MIB, 4 * MIB)]
)
def test_no_unit_of_a_medium_holds_both_copies(manifest, tmp_path, unit, reach):
    with opened(manifest, tmp_path / "journal") as disks:
        sizes = {name: disk.size_bytes for name, disk in disks.items()}
        store = layout_of(manifest, sizes, ()).store
        copies = [part for region in store.regions() for part in region.ranges]
        assert len(copies) == 2
        assert without(disks, store).valid == (True, True)
        assert without(disks, store, *copies).valid == (False, False)
        destroyed = 0
        for copy in copies:
            for offset in range(copy.offset - copy.offset % unit, copy.offset + reach, unit):
                valid = without(disks, store, Range(copy.device, offset, unit)).valid
                assert any(valid), f"{unit} bytes at {offset}"
                destroyed += not all(valid)
        assert destroyed >= 2


def test_no_erase_unit_holds_a_copy_and_anything_else_that_is_needed(manifest):
    needed = [*manifest.slots.values(), manifest.data]
    unit = 4 * MIB
    for copy in manifest.environment:
        units = range(copy.offset // unit, -(-(copy.offset + copy.length) // unit))
        for extent in needed:
            if extent.device == copy.device:
                first, after = extent.offset // unit, -(-(extent.offset + extent.length) // unit)
                assert not set(units) & set(range(first, after)), (copy, extent)
        assert 0 not in units  # the partition table's
