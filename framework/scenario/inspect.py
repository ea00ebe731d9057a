"""Reads a machine's disks from the outside: slots, boot environment, data partition.

The witness is the recorder's disk, never the device: what is read here is what the next power-on
finds. Formats are parsed by `framework.disk`; this module only reduces them to events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import xxhash

from framework.disk import SECTOR, LazyDisk, UnreadableSectorError
from framework.disk.ext4check import Repair, check_ext4
from framework.disk.grubenv import read_grub_environments
from framework.disk.ubootenv import read_environment
from framework.scenario.manifest import Extent, TargetManifest
from framework.verdict import (
    BootEnvironment,
    DataChecked,
    DiskSeen,
    ImageFacts,
    SlotContent,
    SlotState,
)

EXT4_MAGIC_OFFSET = 1024 + 56  # s_magic; the kernel's Documentation/filesystems/ext4/super.rst
EXT4_MAGIC = b"\x53\xef"
CHUNK_BYTES = 8 << 20

SEEN_LIMIT = 64

_seen: dict[tuple[object, ...], SlotState] = {}

OpenDisk = Callable[[str], LazyDisk]


def look(
    moment: str, open_disk: OpenDisk, manifest: TargetManifest, images: Iterable[ImageFacts]
) -> DiskSeen:
    """What stands in the slots and in the boot environment."""
    known = sorted(images, key=lambda image: image.size_bytes)
    slots = {}
    for name, extent in manifest.slots.items():
        with open_disk(extent.device) as disk:
            slots[name] = slot_state(disk, extent, known)
    return DiskSeen(moment, slots, boot_environment(open_disk, manifest))


def slot_state(disk: LazyDisk, extent: Extent, known: list[ImageFacts]) -> SlotState:
    """Which of `known` (smallest first) stands in the slot bit for bit, if any.

    A slot that no write has touched since the last look is not read again: where each of its
    sectors lies in base image and journal says so.
    """
    first, count = extent.offset // SECTOR, extent.length // SECTOR
    key = (
        disk.base_path,
        disk.journal_path,
        extent.offset,
        xxhash.xxh3_128_digest(disk.map[first : first + count].tobytes()),
        tuple(image.sha256 for image in known),
    )
    if key not in _seen:
        _seen[key] = _read_slot(disk, extent, known)
        while len(_seen) > SEEN_LIMIT:
            del _seen[next(iter(_seen))]
    return _seen[key]


def _read_slot(disk: LazyDisk, extent: Extent, known: list[ImageFacts]) -> SlotState:
    try:
        if disk.read(extent.offset + EXT4_MAGIC_OFFSET, len(EXT4_MAGIC)) != EXT4_MAGIC:
            return SlotState(SlotContent.UNLOADABLE)
        digest = hashlib.sha256()
        done = 0
        for image in known:
            while done < image.size_bytes:
                length = min(CHUNK_BYTES, image.size_bytes - done)
                digest.update(disk.read(extent.offset + done, length))
                done += length
            if digest.copy().hexdigest() == image.sha256:
                return SlotState(SlotContent.IMAGE, image.name)
    except UnreadableSectorError:
        pass
    return SlotState(SlotContent.MIXED)


def boot_environment(open_disk: OpenDisk, manifest: TargetManifest) -> BootEnvironment:
    """The boot environment, reduced to the copy that a bootloader takes."""
    extents = manifest.environment
    with open_disk(extents[0].device) as disk:
        if manifest.bootloader == "grub":
            grub = read_grub_environments(
                [
                    (disk, extent.offset, extent.length, path)
                    for extent, path in zip(extents, manifest.environment_paths, strict=True)
                ]
            )
            return reduce_environment(grub.valid_copies, grub.variables, manifest)
        uboot = read_environment(disk, [(copy.offset, copy.length) for copy in extents])
        return reduce_environment(uboot.valid_copies, uboot.variables, manifest)


def reduce_environment(
    valid_copies: int, variables: Mapping[str, str], manifest: TargetManifest
) -> BootEnvironment:
    """The copy that counts, as a verdict needs it."""
    part = variables.get("mender_boot_part", "")
    numbers = {str(number): slot for slot, number in manifest.slot_numbers.items()}
    return BootEnvironment(
        valid_copies=valid_copies,
        boot_slot=numbers.get(part),
        upgrade_available=variables.get("upgrade_available") == "1",
        bootcount=int(variables.get("bootcount", "0") or "0"),
    )


DataReader = Callable[[LazyDisk, int, int, str], bytes | None]
"""Reads a file of a data partition that is not ext4: disk, offset, length and name."""


def check_other_data(
    open_disk: OpenDisk, data: Extent, reader: DataReader, path: str, sha256: str
) -> DataChecked:
    """As `check_data`, for a target with a file system of its own."""
    try:
        with open_disk(data.device) as disk:
            content = reader(disk, data.offset, data.length, path.lstrip("/"))
    except OSError as error:
        return DataChecked(False, False, f"file system damaged: {error.strerror}")
    intact = content is not None and hashlib.sha256(content).hexdigest() == sha256
    kept = "intact" if intact else "missing" if content is None else "changed"
    return DataChecked(True, intact, f"file system clean, synced file {kept}")


def check_data(
    open_disk: OpenDisk, data: Extent, repair: Repair | None, path: str, sha256: str
) -> DataChecked:
    """Check the data partition as the device's start leaves it, and one file in it."""
    with open_disk(data.device) as disk:
        found = check_ext4(disk, data.offset, data.length, read=[path], repair=repair)
    content = found.files[path]
    intact = content is not None and hashlib.sha256(content).hexdigest() == sha256
    clean = "clean" if found.clean else f"damaged: {found.output.strip().splitlines()[-1]}"
    kept = "intact" if intact else "missing" if content is None else "changed"
    return DataChecked(found.clean, intact, f"file system {clean}, synced file {kept}")
