"""A bare QEMU around a target's images, for the builder's own tests: power on, talk, wait.

Deliberately not the rig's driver: these tests must be able to blame the images alone. Emulation is
always in software (TCG). Guest resets end QEMU (`-no-reboot`), which `wait_off` waits for.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import TracebackType
from typing import Any

import pexpect

from images import TargetImages
from images.console import X86_CPU

PROMPT = r"root@brownout:~# "
READY = r"BROWNOUT READY version=(\S+) slot=([ab]) boot_id=[0-9a-f-]{36}\r"
BOOT_LIMIT_S = 120


def command_line(images: TargetImages, disk: Path, variant: str = "v1") -> list[str]:
    """QEMU's arguments for a target, as documented for its users."""
    files = images.manifest["disks"][variant]
    common = (
        "-nodefaults -display none -m 512 -no-reboot -action watchdog=reset -serial stdio "
        f"-drive if=none,id=vda,format=raw,file={disk} "
        "-device virtio-blk-pci,drive=vda,addr=1 "
        "-netdev user,id=net0,restrict=on -device virtio-net-pci,netdev=net0,romfile=,addr=2 "
        "-device i6300esb,addr=5 "
    )
    if images.manifest["arch"] == "arm64":
        own = (
            "qemu-system-aarch64 -M virt -cpu cortex-a57 "
            f"-bios {images.path(files['firmware'])} "
            f"-drive if=pflash,index=1,format=raw,readonly=on,file={images.path(files['seed'])} "
        )
    else:
        own = f"qemu-system-x86_64 -M q35,accel=tcg -cpu {X86_CPU} "
    return shlex.split(own + common)


class Machine:
    """One power-on of a target; leaving the context kills it."""

    def __init__(self, images: TargetImages, disk: Path, log: Path, variant: str = "v1") -> None:
        self._command = command_line(images, disk, variant)
        self._log_path = log

    def fail_writes(self, sectors: list[int]) -> None:
        """Have the disk refuse writes to these sectors (QEMU's blkdebug); before power-on."""
        place = self._command.index("-drive")
        options = self._command[place + 1].split(",")
        if not any("vda" in option for option in options):
            place = self._command.index("-drive", place + 1)
            options = self._command[place + 1].split(",")
        image = next(o.removeprefix("file=") for o in options if o.startswith("file="))
        rules = []
        for number, sector in enumerate(sectors):
            rule = f"file.inject-error.{number}"
            rules += [f"{rule}.event=write_aio", f"{rule}.sector={sector}", f"{rule}.once=off"]
            rules += [f"{rule}.errno=5", f"{rule}.iotype=write"]
        self._command[place + 1] = ",".join(
            [
                "if=none,id=vda,driver=raw,file.driver=blkdebug,werror=report",
                f"file.image.driver=file,file.image.filename={image}",
                *rules,
            ]
        )

    def __enter__(self) -> Machine:
        self._log = self._log_path.open("a", encoding="utf-8")
        program, *arguments = self._command
        self._child: Any = pexpect.spawn(
            program, arguments, timeout=BOOT_LIMIT_S, encoding="utf-8", codec_errors="replace"
        )
        self._child.logfile_read = self._log
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.close(force=True)
        self._log.close()

    def expect(self, pattern: str, timeout_s: float = BOOT_LIMIT_S) -> re.Match[str]:
        """Wait for the console to say something; says what it said instead."""
        try:
            self._child.expect(pattern, timeout=timeout_s)
        except (pexpect.TIMEOUT, pexpect.EOF) as error:
            tail = self._log_path.read_text(encoding="utf-8")[-2000:]
            raise AssertionError(
                f"waited for {pattern!r}; {self._log_path} ends:\n{tail}"
            ) from error
        match: re.Match[str] = self._child.match
        return match

    def boot(self) -> tuple[str, str]:
        """Wait until it is ready: (version, slot)."""
        match = self.expect(READY)
        self.expect(PROMPT)
        return match[1], match[2]

    def run(self, command: str) -> str:
        """Run a shell command; its output."""
        self._child.sendline(f"{command}; echo rc=$?")
        self.expect(r"rc=\$\?\r+\n")
        match = self.expect(r"(?s)(.*?)rc=(\d+)\r+\n")
        self.expect(PROMPT)
        assert match[2] == "0", f"{command!r} gave {match[2]}: {match[1]}"
        return match[1].replace("\r", "").strip()

    def send(self, command: str) -> None:
        """Type a line without waiting for anything."""
        self._child.sendline(command)

    def wait_off(self, timeout_s: float = BOOT_LIMIT_S) -> None:
        """Wait until the machine has reset or powered off, which ends QEMU."""
        try:
            self._child.expect(pexpect.EOF, timeout=timeout_s)
        except pexpect.TIMEOUT as error:
            tail = self._log_path.read_text(encoding="utf-8")[-2000:]
            raise AssertionError(
                f"still on after {timeout_s} s; the console says:\n{tail}"
            ) from error
