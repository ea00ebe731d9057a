"""Rig files for tests: a bare U-Boot machine that starts in half a second, and the real targets."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

UBOOT = Path("/usr/lib/u-boot/qemu_arm64/u-boot.bin")
DISK_BYTES = 8 << 20
PROMPT = "=> "

RIG = """
targets:
  main:
    features: [emulated]
    drivers:
      RecordedQEMUDriver:
        qemu_bin: {qemu}
        machine: {machine}
        cpu: cortex-a57
        memory: 128M
        firmware: u-boot
        disks:
          - {{name: vda, image: disk}}
        network: {network}
        log_dir: logs
        start_deadline_s: {start_deadline_s}
        extra_args: {extra_args}
      UBootDriver: {{prompt: '=> ', autoboot: 'stop autoboot', interrupt: ' '}}
images:
  u-boot: {firmware}
  disk: disk.img
imports: [framework.targets.qemu]
"""


def write_rig(directory: Path, **changes: Any) -> Path:
    """A rig of Debian's prebuilt U-Boot with an empty disk; `changes` replace its values."""
    values: dict[str, Any] = {
        "qemu": "qemu-system-aarch64",
        "machine": "virt",
        "network": "none",
        "start_deadline_s": 20,
        "extra_args": [],
        "firmware": UBOOT,
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    disk = directory / "disk.img"
    if not disk.exists():
        disk.touch()
        with disk.open("r+b") as file:
            file.truncate(DISK_BYTES)
    rig = directory / "rig.yaml"
    rig.write_text(RIG.format(**values))
    return rig


def to_prompt(driver: Any) -> int:
    """Stop the present boot's countdown; the position behind the prompt."""
    pump = driver.pump
    start = pump.generation_start
    pump.wait_for("stop autoboot", 30, since=start)
    pump.write(b" ")
    return int(pump.wait_for(PROMPT, 10, since=start).end)


def uboot(driver: Any, command: str, timeout_s: float = 20) -> str:
    """Run one U-Boot command by hand; its output."""
    start = driver.pump.sendline(command)
    echoed = driver.pump.wait_for("\n", timeout_s, since=start).end
    match = driver.pump.wait_for(PROMPT, timeout_s, since=echoed)
    return str(driver.pump.slice(echoed, match.start).text)


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait for a condition of the outside world; how long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.005)
    return time.monotonic() - began
