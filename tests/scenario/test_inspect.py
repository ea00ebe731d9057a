"""What stands in a slot is read from the disk, bit for bit, whatever the device says."""

import hashlib
from pathlib import Path

import pytest

from framework.disk import DeviceSpec, Recorder
from framework.scenario.inspect import slot_state
from framework.scenario.manifest import Extent, ManifestError, TargetManifest
from framework.verdict import ImageFacts, SlotContent, SlotState

SLOT = Extent("rootfs-a", "vda", 4096, 64 * 1024)


def image(name: str, size: int) -> bytes:
    """Something with an ext4 superblock's magic at its place."""
    data = bytearray(hashlib.shake_256(name.encode()).digest(size))
    data[1080:1082] = b"\x53\xef"
    return bytes(data)


IMAGES = {"v1": image("v1", 16384), "v2": image("v2", 32768)}
KNOWN = [
    ImageFacts(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in IMAGES.items()
]


def state_of(content: bytes, tmp_path: Path) -> SlotState:
    disk_image = tmp_path / "disk.img"
    disk_image.write_bytes((bytes(4096) + content).ljust(256 * 1024, b"\0"))
    with (
        Recorder([DeviceSpec("vda", disk_image)], tmp_path / "run") as recorder,
        recorder.disk("vda") as disk,
    ):
        return slot_state(disk, SLOT, KNOWN)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_a_whole_image_is_recognised_with_anything_behind_it(tmp_path: Path, name: str) -> None:
    found = state_of(IMAGES[name] + b"rest of an older image", tmp_path)
    assert found == SlotState(SlotContent.IMAGE, name)


def test_one_wrong_bit_makes_it_none_of_the_images(tmp_path: Path) -> None:
    data = bytearray(IMAGES["v2"])
    data[-1] ^= 1
    assert state_of(bytes(data), tmp_path) == SlotState(SlotContent.MIXED)


def test_without_a_superblock_nothing_can_be_loaded(tmp_path: Path) -> None:
    blank_head = bytes(4096) + IMAGES["v2"][4096:]
    assert state_of(blank_head, tmp_path) == SlotState(SlotContent.UNLOADABLE)


VALID = {
    "target": "t",
    "bootloader": "uboot",
    "layout": {
        "partitions": [
            {"name": "bootenv", "number": 1, "offset": 0, "size": 10, "device": "mmc0"},
            {"name": "rootfs-a", "number": 2, "offset": 10, "size": 10},
            {"name": "rootfs-b", "number": 3, "offset": 20, "size": 10},
            {"name": "data", "number": 4, "offset": 30, "size": 10},
        ],
        "env": {"kind": "uboot", "device": "mmc0", "copies": [{"offset": 1, "size": 2}]},
    },
    "slots": {
        "a": {"partition": "rootfs-a", "number": 2},
        "b": {"partition": "rootfs-b", "number": 3},
    },
    "variants": {
        "v1": {"file": "r1", "sha256": "0", "size": 1, "artifact_name": "v1"},
        "hangs+x": {"file": "r2", "sha256": "1", "size": 1, "artifact_name": "h"},
    },
    "disks": {"v1": {"file": "d.img", "seed": "s.img", "other_disks": {"mmc0": "sd.img"}}},
}


def test_a_manifest_says_where_everything_is() -> None:
    manifest = TargetManifest.parse(VALID, Path("/m"), "v1")
    assert manifest.environment == (Extent("env 1", "mmc0", 1, 2),)
    assert manifest.slots["b"] == Extent("rootfs-b", "vda", 20, 10)
    assert manifest.disks == {"vda": Path("/m/d.img"), "mmc0": Path("/m/sd.img")}
    assert manifest.firmware == {"seed": Path("/m/s.img")}
    assert [image.healthy for image in manifest.images.values()] == [True, False]


def test_a_base_that_was_not_built_is_one_clear_line() -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: unusable for base v9"):
        TargetManifest.parse(VALID, Path("/m"), "v9")
