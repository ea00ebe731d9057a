"""Boots a target in QEMU with its console on this terminal, for a person who wants to touch one.

A plain machine on a plain copy of the disk image, which keeps what is written to it; no recorder,
no faults: those are the rigs'. The guest reaches this host as 10.0.2.2 (QEMU's user networking).
When the guest resets, QEMU ends and is started again, because a warm reset under emulation can
stall for half a minute in U-Boot; what ended it is read from QEMU's own event (QMP, "SHUTDOWN").
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

from images.builder import TargetImages
from images.errors import ImageError

# As the rig has it: no vector instructions that OpenSSL would choose and TCG makes slow.
X86_CPU = "Nehalem,+rdrand,-ssse3,-sse4.1,-sse4.2"
# Paused at first (-S), so that no event comes before they are asked for.
_EVENTS = '{"execute":"qmp_capabilities"}\n{"execute":"cont"}\n'


def command_line(images: TargetImages, disk: Path, network: str = "user") -> list[str]:
    """QEMU's arguments for a target whose disk is `disk`, without console and monitor.

    Raises:
        ImageError: the target needs more than one disk; its rig file knows how.
    """
    files = images.manifest["disks"]["v1"]
    if files.get("other_disks"):
        raise ImageError(f"{images.target} has more than one disk: its rig file knows how to start")
    common = (
        "-nodefaults -display none -m 512 -no-reboot -action watchdog=reset "
        f"-drive if=none,id=vda,format=raw,file={_quoted(disk)} "
        "-device virtio-blk-pci,drive=vda,addr=1 "
        f"-netdev {network},id=net0 -device virtio-net-pci,netdev=net0,romfile=,addr=2 "
        "-device i6300esb,addr=5 "
    )
    if images.manifest["arch"] == "arm64":
        own = (
            "qemu-system-aarch64 -M virt -cpu cortex-a57 "
            f"-bios {shlex.quote(str(images.path(files['firmware'])))} -drive if=pflash,index=1,"
            f"format=raw,readonly=on,file={_quoted(images.path(files['seed']))} "
        )
    else:
        own = f"qemu-system-x86_64 -M q35,accel=tcg -cpu {X86_CPU} "
    return shlex.split(own + common)


def attend(images: TargetImages, disk: Path) -> None:
    """Run the target until a person ends it (Ctrl-A X) or it powers off; makes `disk` if need be.

    Raises:
        ImageError: QEMU is missing or does not start, or the disk can't be made.
    """
    try:
        if not disk.exists():
            part = disk.with_suffix(".part")
            shutil.copyfile(images.disk(), part)
            part.replace(disk)
        while _run_once([*command_line(images, disk), "-serial", "mon:stdio"]):
            pass
    except OSError as error:
        raise ImageError(f"{images.target} can't be started: {error}") from error


def _run_once(command: list[str]) -> bool:
    """Run QEMU; return whether a reset of the guest's ended it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            # It waits in the socket until QEMU reads it; QEMU's few events wait there for us.
            ours.sendall(_EVENTS.encode())
            monitor = f"socket,id=events,fd={theirs.fileno()}"
            ended = subprocess.run(
                [*command, "-chardev", monitor, "-mon", "chardev=events,mode=control", "-S"],
                check=False,
                pass_fds=(theirs.fileno(),),
            )
        if ended.returncode:
            raise ImageError(f"QEMU ended with exit code {ended.returncode}")
        said = b""
        with contextlib.suppress(ConnectionError):
            while piece := ours.recv(65536):
                said += piece
    return was_reset(said.decode(errors="replace"))


def was_reset(events: str) -> bool:
    """Return whether QEMU's events say that the guest (or its watchdog) reset the machine."""
    reasons = []
    for line in events.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") in ("SHUTDOWN", "WATCHDOG"):
            reasons.append(event.get("data", {}).get("reason", "watchdog"))
    return bool(reasons) and reasons[-1] in ("guest-reset", "watchdog")


def _comma(path: Path) -> str:
    """A path inside one of QEMU's comma-separated options."""
    return str(path).replace(",", ",,")


def _quoted(path: Path) -> str:
    return shlex.quote(_comma(path))
