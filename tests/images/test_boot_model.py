"""The simulated boot loader against real U-Boot: the same choice, and the same bytes afterwards.

All environments that a device can come to have: either slot, on trial or not, every count up to
beyond the limit, either copy newer (also around the wrap of the flags byte), either copy or both
damaged; and either slot, both or none loadable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Disk
from machine import Machine

from framework.disk.ubootenv import build_copy
from framework.targets.simulated.bootloader import Bootloader, EnvironmentArea, read_copies
from framework.targets.simulated.drive import Drive
from images import TargetImages

pytestmark = [pytest.mark.emulated, pytest.mark.night]

DECISION = r"BROWNOUT: (?:booting slot ([ab]) upgrade_available=(\d?) |no slot can be booted)"
# Flags of the two copies; None: the copy is damaged.
FLAGS = ((1, 2), (2, 1), (255, 0), (0, 255), (7, None), (None, 7), (None, None))
LOADABLE = ("ab", "a", "b", "")


class Contents(NamedTuple):
    """What the newer copy says; the older one says the opposite slot, settled."""

    part: str
    trial: str
    count: str


CONTENTS = tuple(itertools.starmap(Contents, itertools.product("23", "01", "012")))


@pytest.mark.parametrize("loadable", LOADABLE, ids=lambda text: f"loads-{text or 'nothing'}")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_model_does_what_uboot_does(
    built: Callable[..., TargetImages],
    make_disk: Callable[..., Disk],
    tmp_path: Path,
    flags: tuple[int | None, int | None],
    loadable: str,
) -> None:
    images = built("qemu-arm64", "v1", "v2")
    disk = make_disk(images)
    disk.put("b", "v2")
    heads = {s: disk.partitions[f"rootfs-{s}"]["offset"] + 1024 for s in "ab"}
    for slot in set("ab") - set(loadable):
        # The superblock: what U-Boot's loader looks for first.
        disk.write(heads[slot], bytes(1024))
    copies = images.manifest["layout"]["env"]["copies"]
    size = copies[0]["size"]
    for contents in CONTENTS if flags != (None, None) else CONTENTS[:1]:
        content = b"".join(_copies(contents, flags, size))
        for index, copy in enumerate(copies):
            disk.write(copy["offset"], content[index * size : (index + 1) * size])
        with Machine(images, disk.path, tmp_path / "log") as machine:
            match = machine.expect(DECISION)
        after = [disk.read(copy["offset"], size) for copy in copies]
        drive = Drive(content)
        area = EnvironmentArea(0, size, size)
        choice = Bootloader(drive, area, lambda slot: slot in loadable).start()
        where = f"{contents} flags {flags} loads {loadable!r}"
        assert choice.slot == match[1], where
        if choice.slot is not None:
            assert choice.trial == (match[2] == "1"), where
        mine = read_copies(drive, area)
        theirs = read_copies(Drive(b"".join(after)), area)
        assert mine.current == theirs.current, where
        for one, other in zip(mine.copies, theirs.copies, strict=True):
            assert (one.valid, one.flags) == (other.valid, other.flags), where
            assert dict(one.variables) == dict(other.variables), where


def _copies(contents: Contents, flags: tuple[int | None, int | None], size: int) -> list[bytes]:
    newest = build_variables(contents)
    older = build_variables(Contents("3" if contents.part == "2" else "2", "0", "0"))
    first, second = flags
    newer = 0 if second is None or (second, first) in ((1, 2), (255, 0)) else 1
    if first is None:
        newer = 1
    made = []
    for index, flag in enumerate(flags):
        variables = newest if index == newer else older
        copy = bytearray(build_copy(variables, size, flags=flag or 0))
        if flag is None:
            copy[:512] = b"\xa5" * 512
        made.append(bytes(copy))
    return made


def build_variables(contents: Contents) -> dict[str, str]:
    """The boot variables as an image starts with them, with these contents."""
    return {
        "mender_boot_part": contents.part,
        "mender_boot_part_hex": contents.part,
        "upgrade_available": contents.trial,
        "bootcount": contents.count,
    }
