"""The simulated GRUB against the real one: the same choice, and the same bytes afterwards.

All states of the two copies that a device can come to have (alike, one older, either or both locks
open, a block or a lock that is none), with either slot, on trial or not, every count up to beyond
the limit; and either slot, both or none loadable. The simulated one runs the images' own script, so
what is compared is how the script is read, and what its commands do to the drive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Disk
from machine import Machine

from framework.targets.simulated.device import DRIVE_BYTES
from framework.targets.simulated.drive import Drive
from framework.targets.simulated.grub import (
    COPIES,
    LOCK,
    GrubBootloader,
    format_block,
    read_script,
    shipped_script,
)
from images import TargetImages

pytestmark = [pytest.mark.emulated, pytest.mark.night]

DECISION = r"BROWNOUT: (?:booting slot ([ab]) upgrade_available=(\d?) |no slot can be booted)"
BLOCK = 1024
OPEN, CLOSED = format_block({"editing": "1"}), format_block({"editing": "0"})
NO_BLOCK = b"\xa5" * BLOCK
LOADABLE = ("ab", "a", "b", "")


class Contents(NamedTuple):
    """What the newer copy says; an older one says the opposite slot, settled."""

    part: str
    trial: str
    count: str

    @property
    def block(self) -> bytes:
        """A block with these contents, its variables in the order that images begin with."""
        return format_block(
            {
                "bootcount": self.count,
                "mender_boot_part": self.part,
                "mender_boot_part_hex": self.part,
                "upgrade_available": self.trial,
            }
        )

    @property
    def older(self) -> bytes:
        """What was there before it."""
        return Contents("3" if self.part == "2" else "2", "0", "0").block


class State(NamedTuple):
    """The four blocks: both copies, and their locks."""

    env: Callable[[Contents], tuple[bytes, bytes]]
    locks: tuple[bytes, bytes]


STATES = {
    "alike": State(lambda new: (new.block, new.block), (CLOSED, CLOSED)),
    "second-older": State(lambda new: (new.block, new.older), (CLOSED, CLOSED)),
    "first-open": State(lambda new: (new.older, new.block), (OPEN, CLOSED)),
    "second-open": State(lambda new: (new.block, new.older), (CLOSED, OPEN)),
    "both-open": State(lambda new: (new.block, new.block), (OPEN, OPEN)),
    "first-no-block": State(lambda new: (NO_BLOCK, new.block), (CLOSED, CLOSED)),
    "first-lock-no-block": State(lambda new: (new.older, new.block), (NO_BLOCK, CLOSED)),
    "second-lock-no-block": State(lambda new: (new.block, new.older), (CLOSED, NO_BLOCK)),
}
CONTENTS = tuple(itertools.starmap(Contents, itertools.product("23", "01", "012")))
# With what can't be loaded, the copies' states matter less: two contents each.
FEW = (Contents("3", "1", "0"), Contents("2", "0", "0"))


@pytest.mark.parametrize("loadable", LOADABLE, ids=lambda text: f"loads-{text or 'nothing'}")
@pytest.mark.parametrize("state", STATES)
def test_the_model_does_what_grub_does(
    built: Callable[..., TargetImages],
    make_disk: Callable[..., Disk],
    tmp_path: Path,
    state: str,
    loadable: str,
) -> None:
    images = built("qemu-x86_64", "v1", "v2")
    disk = make_disk(images)
    disk.put("b", "v2")
    heads = {s: disk.partitions[f"rootfs-{s}"]["offset"] + 1024 for s in "ab"}
    for slot in set("ab") - set(loadable):
        # The superblock: what GRUB's file system looks for first.
        disk.write(heads[slot], bytes(1024))
    places = _places(disk, images)
    script = read_script(shipped_script())
    for contents in CONTENTS if loadable == "ab" and state != "both-open" else FEW:
        blocks = (*STATES[state].env(contents), *STATES[state].locks)
        for place, block in zip(places, blocks, strict=True):
            disk.write(place, block)
        with Machine(images, disk.path, tmp_path / "log") as machine:
            match = machine.expect(DECISION)
        drive = Drive(bytes(DRIVE_BYTES))
        mine = (*COPIES, *(copy + LOCK for copy in COPIES))
        for place, block in zip(mine, blocks, strict=True):
            drive.write(place, block)
        choice = GrubBootloader(drive, script, lambda slot: slot in loadable).start()
        where = f"{state}, {contents}, loads {loadable!r}"
        assert choice.slot == match[1], where
        if choice.slot is not None:
            assert choice.trial == (match[2] == "1"), where
        for number, (here, there) in enumerate(zip(mine, places, strict=True)):
            assert drive.read(here, BLOCK) == disk.read(there, BLOCK), f"{where}: block {number}"


def _places(disk: Disk, images: TargetImages) -> list[int]:
    """Where the blocks are on the disk: both `env`, then both `lock`; a file is one block there."""
    found: dict[tuple[str, bool], int] = {}
    for copy in images.manifest["layout"]["env"]["copies"]:
        partition = disk.partitions[copy["partition"]]
        begin = partition["offset"]
        content = disk.read(begin, partition["size"])
        for at in range(0, len(content), BLOCK):
            block = content[at : at + BLOCK]
            if block.startswith(b"# GRUB Environment Block\n"):
                is_lock = b"editing=" in block
                assert (copy["partition"], is_lock) not in found
                found[copy["partition"], is_lock] = begin + at
    names = [copy["partition"] for copy in images.manifest["layout"]["env"]["copies"]]
    return [found[name, is_lock] for is_lock in (False, True) for name in names]
