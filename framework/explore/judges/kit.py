"""What a guest that only probes data partitions is started from: the device's kernel, its initrd.

All of it comes from the recording's own base disk: kernel and initrd (busybox, modules) from the
slot that runs at the beginning, `e2fsck` and its libraries from the same slot, if the device mends
its data partition. A second archive behind the initrd brings those and an init of our own; the
kernel unpacks archives one over the other (Documentation/driver-api/early-userspace/
buffer-format.rst, which is the format's source as well).
"""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from framework.disk import SECTOR, DiskError, LayoutError, Repair, open_file_system
from framework.disk.files import FileSystem
from framework.explore.layout import Range
from framework.explore.states import Disks

READY: Final = re.compile(r"PROBE READY\s*\n")
DONE: Final = re.compile(
    r"PROBE DONE mounted=(?P<mounted>[01]) check=(?P<check>\d+)(?P<files>[^\n]*)\n"
)

_E2FSCK: Final = "/sbin/e2fsck"
_LIBRARIES: Final = ("lib", "usr/lib")
_INTERPRETER: Final = re.compile(rb"/lib[0-9]*/ld-[a-z0-9_.-]+")
_SONAME: Final = re.compile(rb"\0(lib[a-z0-9_]+\.so\.\d+)(?=\0)")
_MULTIARCH: Final = re.compile(r"[a-z0-9_]+-linux-gnu[a-z]*")


class KitError(DiskError):
    """The base disk lacks what the probing guest needs; the message says what."""


@frozen
class Kit:
    """Files for QEMU's `-kernel` and `-initrd`."""

    kernel: Path
    initrd: Path


def make_kit(
    disks: Disks,
    slot: Range,
    data: Range,
    repair: Repair | None,
    *,
    paths: Sequence[str],
    folder: Path,
) -> Kit:
    """Make the kit below `folder` from the system in `slot`.

    `paths` are files whose SHA-256 the guest tells. Raises KitError if the slot lacks something.
    """
    try:
        files = open_file_system(disks[slot.device], slot.offset, slot.length)
        kernel, initrd = files.read_file("/boot/vmlinuz"), files.read_file("/boot/initrd.img")
        programs = {} if repair is None else _e2fsck(files)
    except LayoutError as error:
        raise KitError(f"the recording's first system can't be probed with: {error}") from error
    script = _script(data.offset // SECTOR, repair, paths).encode()
    kit = Kit(folder / "probe-kernel", folder / "probe-initrd")
    kit.kernel.write_bytes(kernel)
    kit.initrd.write_bytes(initrd + bytes(-len(initrd) % 4) + archive({**programs, "init": script}))
    return kit


def _e2fsck(files: FileSystem) -> dict[str, bytes]:
    """e2fsck, the dynamic loader and the libraries that they name, at their places."""
    program = files.read_file(_E2FSCK)
    found = {_E2FSCK[1:]: program}
    folders = []
    for top in _LIBRARIES:
        names = [n for n in files.list_directory(f"/{top}") if _MULTIARCH.fullmatch(n)]
        folders += [f"/{top}/{name}" for name in names]
    places = {name: f for f in reversed(folders) for name in files.list_directory(f)}
    loader = _INTERPRETER.search(program)
    if loader is None:
        raise KitError(f"{_E2FSCK} names no dynamic loader")
    loader_path = loader.group().decode()
    name = loader_path.rpartition("/")[2]
    if name not in places:
        raise KitError(f"the slot has no {name}")
    found[loader_path[1:]] = files.read_file(f"{places[name]}/{name}")
    todo = [program]
    while todo:
        for match in _SONAME.finditer(todo.pop()):
            soname = match[1].decode()
            path = f"lib/{soname}"
            # The name is a link to the file, which has the longest of the names that begin so.
            real = max((n for n in places if n.startswith(soname)), key=len, default=None)
            if path in found or real is None:
                continue
            found[path] = files.read_file(f"{places[real]}/{real}")
            todo.append(found[path])
    return found


def _script(first_sector: int, repair: Repair | None, paths: Sequence[str]) -> str:
    """The guest's init: all but the disk's driver, then a line from the console, then the probe."""
    hashes = "".join(
        f"    digest=$(busybox sha256sum {shlex.quote('/root' + path)} 2> /dev/null)\n"
        '    digest=${digest%% *}\n    told="$told ${digest:--}"\n'
        for path in paths
    )
    return f"""#!/bin/sh
export LD_LIBRARY_PATH=/lib
mount -t devtmpfs dev /dev
mount -t proc proc /proc
busybox mkdir -p /sys
mount -t sysfs sys /sys
late=
while read -r module; do
    case $module in
        *virtio_blk*|*mmc*|*sdhci*) late="$late $module" ;;
        *) insmod "$module" ;;
    esac
done < /load
echo "PROBE READY"
read -r line
for module in $late; do insmod "$module"; done
device=
tries=0
while [ -z "$device" ] && [ $tries -lt 1000 ]; do
    for start in /sys/class/block/*/start; do
        read -r sector < "$start"
        if [ "$sector" = {first_sector} ]; then
            device=/dev/$(busybox basename "${{start%/start}}")
        fi
    done
    [ -n "$device" ] || usleep 5000
    tries=$((tries + 1))
done
{_mend(repair)}mounted=0
told=
if mount -t ext4 -o noatime,noinit_itable "$device" /root; then
    mounted=1
{hashes}    busybox umount /root
fi
{_check(repair)}echo "PROBE DONE mounted=$mounted check=$check$told"
while :; do usleep 1000000; done
"""


def _mend(repair: Repair | None) -> str:
    """The device's own steps; see `Repair`."""
    if repair is None:
        return ""
    return f"""check() {{ e2fsck -fy "$@" "$device" > /dev/null 2>&1; [ $? -lt 4 ]; }}
if ! check; then
    for backup in {" ".join(map(str, repair.backups))}; do
        magic=$(busybox dd if="$device" bs=1 skip=$((backup * {repair.block_bytes} + 56)) count=2 \
            2> /dev/null | busybox od -An -tx1)
        case $magic in *53?ef*) ;; *) continue ;; esac
        busybox dd if=/dev/zero of="$device" bs={repair.block_bytes} count=1 conv=fsync 2> /dev/null
        check -b $backup -B {repair.block_bytes} && break
    done
fi
"""


def _check(repair: Repair | None) -> str:
    if repair is None:
        return "check=0\n"
    return 'e2fsck -fn "$device" > /dev/null 2>&1\ncheck=$?\n'


def archive(files: Mapping[str, bytes]) -> bytes:
    """An initramfs archive ("newc") of executable files, with their directories."""
    folders: dict[str, None] = {}
    for name in files:
        parts = name.split("/")[:-1]
        folders |= dict.fromkeys("/".join(parts[: n + 1]) for n in range(len(parts)))
    members = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    members += [(name, stat.S_IFREG | 0o755, content) for name, content in files.items()]
    packed = bytearray()
    for number, (name, mode, content) in enumerate([*members, ("TRAILER!!!", 0, b"")], 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        packed += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return bytes(packed)
