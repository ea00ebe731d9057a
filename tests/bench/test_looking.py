"""What a device tells of its disk: the looker's program against the harness's own reader."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from framework.disk.ubootenv import build_copy
from framework.faults import boot_env_write, console, power_cut
from framework.scenario.board import disk_seen, look_command
from framework.scenario.manifest import Extent, TargetManifest
from framework.targets.errors import InfrastructureError
from framework.verdict import DiskSeen, ImageFacts, SlotContent

SLOT, ENVIRONMENT = 3 << 20, 16384


def image(seed: bytes, size: int) -> bytes:
    data = bytearray(hashlib.shake_256(seed).digest(size))
    data[1080:1082] = b"\x53\xef"
    return bytes(data)


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, TargetManifest, dict[str, bytes]]:
    images = {"v1": image(b"one", 2 << 20), "v2": image(b"two", (2 << 20) + 4096)}
    manifest = TargetManifest(
        target="test",
        directory=tmp_path,
        bootloader="uboot",
        slots={"a": Extent("a", "vda", 1 << 20, SLOT), "b": Extent("b", "vda", 4 << 20, SLOT)},
        slot_numbers={"a": 2, "b": 3},
        data=Extent("data", "vda", 7 << 20, 1 << 20),
        environment=(
            Extent("env 1", "vda", 65536, ENVIRONMENT),
            Extent("env 2", "vda", 131072, ENVIRONMENT),
        ),
        environment_paths=(),
        data_repair=None,
        images={
            name: ImageFacts(name, hashlib.sha256(data).hexdigest(), len(data))
            for name, data in images.items()
        },
        disks={},
        firmware={},
    )
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    return path, manifest, images


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def environment(part: int, flags: int, **variables: str) -> bytes:
    values = {"mender_boot_part": str(part), "upgrade_available": "0", "bootcount": "0"}
    return build_copy({**values, **variables}, ENVIRONMENT, flags=flags)


def see(path: Path, manifest: TargetManifest) -> DiskSeen:
    command = look_command(manifest, manifest.images.values(), {"vda": str(path)})
    assert len(command) < 2500, "a terminal's line has 4096 bytes"
    printed = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout
    return disk_seen("now", printed, manifest, manifest.images.values())


def test_images_and_environment_are_recognised(disk: Any) -> None:
    path, manifest, images = disk
    put(path, 1 << 20, images["v1"])
    put(path, 4 << 20, images["v2"])
    put(path, 65536, environment(2, 1))
    put(path, 131072, environment(3, 2, upgrade_available="1", bootcount="1"))
    seen = see(path, manifest)
    assert (seen.slots["a"].image, seen.slots["b"].image) == ("v1", "v2")
    assert seen.environment.valid_copies == 2
    assert seen.environment.boot_slot == "b"
    assert seen.environment.upgrade_available
    assert seen.environment.bootcount == 1


def test_one_wrong_bit_is_seen_wherever_it_is(disk: Any) -> None:
    path, manifest, images = disk
    put(path, 65536, environment(2, 1))
    for place in (0, 4096, 1_500_000, (2 << 20) - 1):
        wrong = bytearray(images["v1"])
        wrong[place] ^= 4
        put(path, 1 << 20, bytes(wrong))
        assert see(path, manifest).slots["a"].content is SlotContent.MIXED
    broken = bytearray(environment(3, 2))
    broken[100] ^= 1
    put(path, 131072, bytes(broken))
    seen = see(path, manifest)
    assert seen.environment.valid_copies == 1
    assert seen.environment.boot_slot == "a"


def test_a_blank_slot_is_unloadable(disk: Any) -> None:
    path, manifest, _ = disk
    seen = see(path, manifest)
    assert seen.slots["b"].content is SlotContent.UNLOADABLE
    assert seen.environment.valid_copies == 0


def test_a_garbled_line_is_infrastructure_and_no_verdict(disk: Any) -> None:
    path, manifest, images = disk
    put(path, 1 << 20, images["v1"])
    command = look_command(manifest, manifest.images.values(), {"vda": str(path)})
    printed = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout
    for wrong in ("", "LOOK [[", printed[: len(printed) // 2], printed.replace("[", "(", 1)):
        with pytest.raises(InfrastructureError, match="garbled"):
            disk_seen("now", wrong, manifest, manifest.images.values())


def test_a_disk_that_the_rig_does_not_name_is_infrastructure(disk: Any) -> None:
    _, manifest, _ = disk
    with pytest.raises(InfrastructureError, match="does not say which device node the disk vda"):
        look_command(manifest, manifest.images.values(), {})


SWITCH = frozenset({"power-switch"})


def test_a_power_head_cuts_where_nobody_asks_what_the_drive_kept() -> None:
    assert not power_cut().when(console("x")).lacks(SWITCH)
    assert power_cut("subset").when(console("x")).lacks(SWITCH) == {"power-cut"}
    assert power_cut().when(boot_env_write(1)).lacks(SWITCH) == {"power-cut"}
    assert power_cut().when(console("x")).lacks(frozenset()) == {"power-cut"}
    assert not power_cut("subset").when(boot_env_write(1)).lacks(frozenset({"power-cut"}))
