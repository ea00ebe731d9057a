"""A boot on real GRUB never leaves the environment without a copy, whatever a tear left behind it.

GRUB takes a block by its first line, Linux compares the lock with the one that it knows: so there
are blocks that are settled for one of them only, such as a lock whose second sector is garbage.
GRUB can't write that block either (it looks for padding at the end).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from framework.disk import DeviceSpec, Recorder
from framework.explore.layout import GrubStore, Range
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import CrashState, Decision, Disks
from framework.explorer import machine_on
from images.builder import build_target

pytestmark = pytest.mark.emulated

RIG = Path(__file__).parents[2] / "rigs" / "qemu-x86_64.yaml"
READY = re.compile(r"BROWNOUT READY version=(?P<version>\w+) slot=(?P<slot>\w)")
SECTOR = 512


@pytest.mark.parametrize("copy", [1, 2])
def test_there_is_a_valid_copy_after_every_operation_of_a_boot_that_mends_one(
    tmp_path: Path, copy: int
) -> None:
    images = build_target("qemu-x86_64", ("v1",), relock_if_gone=True)
    parts = {part["name"]: part for part in images.manifest["layout"]["partitions"]}
    places = tuple(Range("vda", parts[n]["offset"], parts[n]["size"]) for n in ("boot", "boot-2"))
    store = GrubStore(places, ("/env", "/env"))
    base = tmp_path / "disk.img"
    shutil.copyfile(images.disk("v1"), base)
    with base.open("r+b") as disk:
        disk.seek(places[copy - 1].offset)
        content = disk.read(places[copy - 1].length)
        begin = content.index(b"\nediting=0\n")
        begin -= begin % SECTOR
        assert content[begin : begin + 2] == b"# "
        disk.seek(places[copy - 1].offset + begin + SECTOR)
        disk.write(b"\xa5" * SECTOR)
    with (
        Recorder([DeviceSpec("vda", base)], tmp_path / "unused") as recorder,
        Disks({"vda": recorder.disk("vda")}) as disks,
        Workplace() as place,
        StateMachine(machine_on(RIG), disks, place) as running,
    ):
        before = store.read(disks)
        heard = running.run([READY], 120.0, max_starts=1)
        assert heard.ended == "matched", heard.tail
        journal = running.journal()
        seen = []
        for number in range(len(journal.operations) + 1):
            with CrashState(number, Decision(), "kept").disks(journal) as now:
                seen.append(store.read(now))
    assert before.valid == (True, True)
    assert any(f"{copy}, /env" in problem for problem in before.problems)
    assert [n for n, reading in enumerate(seen) if reading.current is None] == []
    assert {reading.variables["mender_boot_part"] for reading in seen} == {"2"}
    assert seen[-1].valid == (True, True)
    assert seen[-1].problems == ()
