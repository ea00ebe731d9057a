"""A log that a real kernel's dm-log-writes wrote says what our own recorder saw of the same device.

A guest maps a recorded disk through dm-log-writes, makes it work, and unmaps it: so one and the
same run is in the kernel's log and in our journal. The device-mapper's ioctls are called by a few
lines of Python in the guest (the kernel's include/uapi/linux/dm-ioctl.h), as the images have no
dmsetup.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from framework.disk import (
    DeviceSpec,
    JournalReader,
    Kind,
    LayoutError,
    PrefixCache,
    Recorder,
    check_ext4,
    open_file_system,
)
from framework.disk.dmlogwrites import import_log
from framework.explore.judges.kit import archive
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import Disks
from framework.targets.machine import Disk, Machine
from images.builder import Places, TargetImages, build_target
from images.elf import module_order

pytestmark = pytest.mark.emulated

MIB = 1 << 20
SIZE = 16 * MIB
DONE = re.compile(r"RECORDED (?P<how>\w+)\s*\n")

INIT = """\
#!/bin/sh
mount -t devtmpfs dev /dev
mount -t proc proc /proc
while read -r module; do insmod "$module"; done < /load
for module in /log-writes/*; do insmod "$module"; done
mount -t ext4 -o ro /dev/vdb /root
mount -t devtmpfs dev /root/dev
mount -t tmpfs run /root/run
busybox cp /dm.py /root/run
busybox mkdir /data
dm() { busybox chroot /root /usr/bin/python3 /run/dm.py "$@" || echo "RECORDED badly"; }
dm create
mount -t ext4 /dev/dm-0 /data
echo first > /data/first
busybox sync
dm mark middle
busybox mkdir /data/folder
for n in 1 2 3 4 5 6; do
    busybox dd if=/dev/urandom of=/data/folder/$n bs=30k count=$n conv=fsync 2> /dev/null
done
busybox mv /data/folder/3 /data/moved
busybox rm /data/folder/5
busybox sync
busybox umount /data
dm remove
busybox sync
echo "RECORDED well"
while :; do usleep 1000000; done
"""

DM = f"""\
import fcntl, struct, sys

def call(number, payload=b"", count=0):
    head = struct.pack("=3IIIIiIIIQ128s129s7s", 4, 0, 0, 312 + len(payload), 312, count, 0, 0, 0, 0,
                       0, b"rec", b"", b"")
    with open("/dev/mapper/control", "rb+", buffering=0) as control:
        fcntl.ioctl(control, 3 << 30 | 312 << 16 | 0xFD << 8 | number, bytearray(head + payload))

match sys.argv[1:]:
    case ["create"]:
        table = b"/dev/vda /dev/vdc" + bytes(7)
        call(3)
        call(9, struct.pack("=QQiI16s", 0, {SIZE // 512}, 0, 0, b"log-writes") + table, 1)
        call(6)
    case ["mark", text]:
        call(14, struct.pack("=Q", 0) + b"mark " + text.encode() + b"\\0")
    case ["remove"]:
        call(4)
"""


@pytest.fixture(scope="module")
def images() -> TargetImages:
    return build_target("qemu-arm64", ("v1",), relock_if_gone=True)


def initrd(images: TargetImages, folder: Path) -> tuple[Path, Path]:
    """The target's kernel, and its initrd with an init of our own and the modules."""
    with images.rootfs("v1").open("rb") as file:
        size = file.seek(0, 2)
        files = open_file_system(_File(images.rootfs("v1")), 0, size)
    kernel = folder / "kernel"
    kernel.write_bytes(files.read_file("/boot/vmlinuz"))
    package = next(p for p in images.manifest["packages"] if p["name"].startswith("linux-image-"))
    tree = folder / "tree"
    deb = Places().cache / "debs" / f"{package['sha256']}.deb"
    subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    (modules,) = (tree / "lib/modules").iterdir()
    added = {"init": INIT.encode(), "dm.py": DM.encode()}
    for number, module in enumerate(module_order(modules / "kernel", ("dm_log_writes",))):
        added[f"log-writes/{number}-{module.name}"] = module.read_bytes()
    path = folder / "initrd"
    path.write_bytes(files.read_file("/boot/initrd.img") + archive(added))
    return kernel, path


class _File:
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise LayoutError(self.name, offset, "beyond the end")
        return data


def durable_states(journal: JournalReader) -> list[str]:
    """What is certainly on the medium at each flush, changes only."""
    states: list[str] = []
    for row in range(len(journal.operations)):
        if journal.operations.kind[row] != Kind.FLUSH:
            continue
        number = int(journal.operations.number[row])
        _, cycle = journal.power_cycle_at(number)
        with Disks(journal.disks_of(PrefixCache(keep=0).decide(cycle, 0), number)) as disks:
            digest = disks["vda"].sha256()
        if not states or states[-1] != digest:
            states.append(digest)
    return states


def test_a_real_kernels_log_and_our_recorder_tell_the_same_run(images, tmp_path):
    base = tmp_path / "base.img"
    with base.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", base], check=True)
    log = tmp_path / "log.img"
    with log.open("wb") as file:
        file.truncate(64 * MIB)
    kernel, archive_path = initrd(images, tmp_path)
    drives = []
    for name, path, mode in (("root", images.rootfs("v1"), "on"), ("log", log, "off")):
        drives += ["-drive", f"if=none,id={name},format=raw,readonly={mode},file={path}"]
        drives += ["-device", f"virtio-blk-pci,drive={name}"]
    machine = Machine(
        program="qemu-system-aarch64",
        machine="virt",
        cpu="cortex-a57",
        memory="512M",
        accelerator="tcg",
        kernel=kernel,
        boot_args="console=ttyAMA0 loglevel=4 panic=1",
        disks=(Disk("vda", "data"),),
        extra_args=("-initrd", str(archive_path), *drives),
    )
    with (
        Recorder([DeviceSpec("vda", base)], tmp_path / "unused") as recorder,
        Disks({"vda": recorder.disk("vda")}) as disks,
        Workplace() as place,
        StateMachine(machine, disks, place) as running,
    ):
        heard = running.run([DONE], 120.0, max_starts=1)
        assert heard.ended == "matched", heard.tail
        assert heard.matches[-1]["how"] == "well", heard.console[-2000:]
        ours = running.journal()
        told = import_log(log, base, tmp_path / "kernel.journal")
        theirs = JournalReader(tmp_path / "kernel.journal")
        assert told.problem is None
        assert told.operations > 50
        assert "middle" in [mark.text for mark in theirs.marks]
        with ours.final("vda") as mine, theirs.final("vda") as its:
            assert mine.sha256() == its.sha256()
            found = check_ext4(its, 0, SIZE, read=["/first", "/moved"])
        assert found.clean
        assert found.files["/first"] == b"first\n"
        assert len(found.files["/moved"] or b"") == 3 * 30 * 1024
        mine_states, its_states = durable_states(ours), durable_states(theirs)
    assert len(its_states) > 8
    position = iter(mine_states)
    missing = [state for state in its_states if state not in position]
    assert not missing, f"{len(missing)} of {len(its_states)} durable states were never ours"
