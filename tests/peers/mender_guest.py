"""A PC in QEMU that runs Debian's `mender-client` 3.4 unchanged, with its A/B update of the rootfs.

Built from the project's x86-64 images: the same GRUB, kernel and environment copies, but the
client is the peer, and ours stays silent. What a board's integrator adds for Mender is added here:

* the package's binary and the libraries that it needs (from this host, which has the same Debian);
* `grub-mender-grubenv-print` and `-set`, the names that the client calls first (its
  `installer/bootenv.go`; the older `fw_printenv` and `fw_setenv` are its fallback). They read and
  write the two environment copies with our own `GrubEnvironment`;
* identity and inventory scripts, an update module, `mender.conf`, which names the two partitions.

State lives on the data partition, so that it outlives a change of slots. Where the server is, is
told at the console: the images are built once for all ports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framework.targets.strategy import SlotStrategy
from images import TargetImages
from images.store import copy_sparse

DEVICE_TYPE = "qemu-x86_64"
MAC = "52:54:00:be:ef:86"
#: What QEMU's user network calls this host.
HOST = "10.0.2.2"
#: Room for the client and its libraries; a slot has 128 MiB.
ROOTFS_MIB = 96
_LIBRARIES = "/usr/lib/x86_64-linux-gnu"

# Python, because the environment's format and its writing protocol have one implementation.
_PRINT = """#!/usr/bin/python3
import sys
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from updater.device.bootenv_grub import GrubEnvironment
values = GrubEnvironment("/boot/grub/mender_grubenv1/env", "/boot/grub/mender_grubenv2/env").read()
wanted = sys.argv[1:] or list(values)
for name in wanted:
    if name not in values:
        sys.exit(f'## Error: "{name}" not defined')
    print(f"{name}={values[name]}")
"""
_SET = """#!/usr/bin/python3
import sys
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from updater.device.bootenv_grub import GrubEnvironment
values = GrubEnvironment("/boot/grub/mender_grubenv1/env", "/boot/grub/mender_grubenv2/env")
if sys.argv[1:] == ["-s", "-"]:
    lines = [line.rstrip("\\n") for line in sys.stdin if line.strip()]
    # The client finds out by trying whether a line is `name=value` or `name value`.
    pairs = [line.split("=", 1) if "=" in line else line.split(" ", 1) for line in lines]
else:
    pairs = [sys.argv[1:3]]
values.write({name: value for name, value in pairs})
"""
_MODULE = """#!/bin/sh
case "$1" in
    NeedsArtifactReboot) echo No ;;
    SupportsRollback) echo Yes ;;
    ArtifactInstall)
        sleep 1
        if grep -q "^fail" "$2"/files/note; then echo "the note says fail" >&2; exit 1; fi
        cp "$2"/files/note /data/installed ;;
    ArtifactRollback) rm -f /data/installed ;;
esac
exit 0
"""
_START = """#!/bin/sh
# Started by rcS once the disks are mounted; the first time, at the console.
[ -e /data/mender/mender.conf ] || exit 0
exec mender --config /data/mender/mender.conf --data /data/mender --no-syslog --log-level debug \\
    daemon > /dev/ttyS0 2>> /data/mender.log
"""
_SCRIPTS = {
    "/usr/bin/grub-mender-grubenv-print": _PRINT,
    "/usr/bin/grub-mender-grubenv-set": _SET,
    "/usr/bin/mender-start": _START,
    "/usr/share/mender/identity/mender-device-identity": f"#!/bin/sh\necho mac={MAC}\n",
    "/usr/share/mender/inventory/mender-inventory-peer": (
        '#!/bin/sh\necho "kernel=$(uname -r)"\necho ip=1\necho ip=2\n'
    ),
    "/usr/share/mender/modules/v3/note": _MODULE,
}


def configuration(port: int) -> str:
    """The `mender.conf` of a guest whose server listens on this host's `port`."""
    return json.dumps(
        {
            "ServerURL": f"https://{HOST}:{port}",
            "ServerCertificate": "/data/mender/server-ca.pem",
            "RootfsPartA": "/dev/vda2",
            "RootfsPartB": "/dev/vda3",
            "UpdatePollIntervalSeconds": 1,
            "InventoryPollIntervalSeconds": 1,
            "RetryPollIntervalSeconds": 1,
            "DBus": {"Enabled": False},
        }
    )


def build_rootfs(source: Path, name: str, mender: Path, destination: Path) -> None:
    """Make a root file system with the peer in it out of `source`; `name` is its artifact name."""
    folder = destination.with_suffix(".files")
    folder.mkdir()
    shutil.copyfile(source, destination)
    subprocess.run(
        ["resize2fs", "-f", destination, f"{ROOTFS_MIB}M"], check=True, capture_output=True
    )
    rcs = folder / "rcS"
    _debugfs(destination, [f"dump /etc/init.d/rcS {rcs}"])
    before, block, after = _cut(rcs.read_text(), "updater resume 9>&-\n", "\nfi\n")
    assert "reboot -f" in block
    rcs.write_text(f"{before}mkdir -p /data/mender\nmender-start 9>&- &\n{after}")
    lines = ["rm /etc/init.d/rcS", *_put(rcs, "/etc/init.d/rcS", 0o755)]
    for folder_name in (
        "/etc/mender",
        "/usr/share/mender",
        "/usr/share/mender/identity",
        "/usr/share/mender/inventory",
        "/usr/share/mender/modules",
        "/usr/share/mender/modules/v3",
    ):
        lines.append(f"mkdir {folder_name}")
    lines += _put(mender, "/usr/bin/mender", 0o755)
    for number, library in enumerate(_missing_libraries(mender, destination)):
        # Through a copy: debugfs takes no path with a space, and links must be followed.
        copy = folder / f"library{number}"
        shutil.copy(library.resolve(), copy)
        lines += _put(copy, f"{_LIBRARIES}/{library.name}", 0o755)
    texts = {
        **_SCRIPTS,
        "/etc/mender/artifact_info": f"artifact_name={name}\n",
    }
    for number, (place, text) in enumerate(texts.items()):
        file = folder / f"text{number}"
        file.write_text(text)
        lines += _put(file, place, 0o755 if text.startswith("#!") else 0o644)
    device_type = folder / "device_type"
    device_type.write_text(f"device_type={DEVICE_TYPE}\n")
    lines += _put(device_type, "/etc/mender/device_type", 0o644)
    _debugfs(destination, lines)
    shutil.rmtree(folder)


def build_disk(images: TargetImages, rootfs: Path, destination: Path) -> None:
    """The target's disk with `rootfs` in slot a."""
    shutil.copyfile(images.disk(), destination)
    partitions = images.manifest["layout"]["partitions"]
    offset = next(p["offset"] for p in partitions if p["name"] == "rootfs-a")
    with destination.open("r+b") as disk:
        copy_sparse(rootfs, disk.fileno(), offset)


class Guest:
    """The running machine; the client's words are read from its data partition."""

    def __init__(self, strategy: SlotStrategy, disk: Path) -> None:
        self.strategy = strategy
        strategy.transition("off")
        strategy.power.fresh({"vda": disk})

    def start(self, port: int, authority: Path) -> None:
        """Boot, tell the client where its server is, and start it."""
        self.strategy.transition("ready")
        for place, text in (
            ("server-ca.pem", authority.read_text()),
            ("mender.conf", configuration(port)),
        ):
            for number, line in enumerate(text.splitlines()):
                into = ">" if number == 0 else ">>"
                self.strategy.check(f"echo '{line}' {into} /data/mender/{place}")
        self.strategy.check("cp /etc/mender/device_type /data/mender/; sync")
        self.strategy.check("mender-start < /dev/null > /dev/null 2>&1 &")

    @property
    def slot(self) -> str:
        """The slot that runs."""
        outcome = self.strategy.outcome
        assert outcome is not None and outcome.boot is not None
        return outcome.boot.slot

    def read(self, path: str) -> str:
        """A file of the guest; empty if there is none."""
        return self.strategy.run(f"cat {path} 2>/dev/null").text

    def environment(self) -> dict[str, str]:
        """The boot variables, as the client's own tool prints them."""
        text = self.strategy.check("grub-mender-grubenv-print")
        return dict(line.split("=", 1) for line in text.splitlines())

    def log(self) -> str:
        """The end of the client's log."""
        return self.strategy.run("tail -n 60 /data/mender.log").text

    def close(self) -> None:
        """Switch it off."""
        self.strategy.transition("off")


def _cut(text: str, begin: str, end: str) -> tuple[str, str, str]:
    before, found, rest = text.partition(begin)
    assert found, f"no {begin!r} in rcS"
    block, found, after = rest.partition(end)
    assert found
    return before, block, after


def _put(source: Path, place: str, mode: int) -> list[str]:
    return [f"write {source} {place}", f"sif {place} mode 0{0o100000 | mode:o}"]


def _missing_libraries(program: Path, image: Path) -> Iterator[Path]:
    """The libraries of `program` that the image hasn't got."""
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    there = set()
    for folder in (_LIBRARIES, "/lib/x86_64-linux-gnu", "/lib64"):
        there |= {line.split("/")[5] for line in _debugfs(image, [f"ls -p {folder}"]).splitlines()
                  if line.startswith("/")}  # fmt: skip
    for word in listed.split():
        if word.startswith("/") and os.path.basename(word) not in there:  # noqa: PTH119
            yield Path(word)


def _debugfs(image: Path, commands: list[str]) -> str:
    """Run debugfs commands on an image; it goes on after an error, so its words are looked at."""
    done = subprocess.run(
        ["debugfs", "-w", "-f", "-", image],
        input="\n".join(commands) + "\n",
        check=True,
        capture_output=True,
        text=True,
    )
    errors: list[Any] = [
        line for line in done.stderr.splitlines() if line and not line.startswith("debugfs 1.")
    ]
    assert not errors, errors
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith("debugfs:"))
