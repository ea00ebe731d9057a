"""From a power cut to its verdict, against a bare QEMU that boots the same disk. Prints the ratio.

    python tests/benchmarks/cut_to_verdict.py [--rig rigs/qemu-arm64.yaml] [--rounds N]

Each round cuts the power in the middle of a burst of writes, exports the disk that the cut left,
and then times two things in turn: a bare QEMU on that raw file (cache=none) until the ready
marker, and the framework's way from the cut to the verdict: looks at the disk, file system check,
restart on the recorder, ready marker, looks again, judgement. Medians of the rounds, and the ratio
per round; the goal is 1.15. Needs the rig's images; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from framework.console import ConsoleLost
from framework.disk import Trigger
from framework.scenario.device import Device
from framework.scenario.manifest import TargetManifest
from framework.targets.rig import load_rig
from framework.targets.uut import BrownoutUpdater
from images import build_target

BURST = "dd if=/dev/zero of=/data/burst bs=64k count=400 conv=fsync 2>/dev/null"
MARKER = b"BROWNOUT READY"
TIMEOUT_S = 120.0


def bare_command(recorded: list[str], disks: dict[str, Path]) -> list[str]:
    """The recorded machine's command line, on raw files, console on standard output."""
    bare: list[str] = []
    skip = {"-chardev", "-serial", "-mon"}
    words = iter(recorded)
    for word in words:
        if word in skip:
            next(words)
        elif word == "-blockdev":
            node = json.loads(next(words))
            name = node["node-name"]
            file = {"driver": "file", "filename": str(disks[node["export"]])}
            raw = {
                "driver": "raw",
                "node-name": name,
                "file": file,
                "cache": {"direct": True, "no-flush": False},
            }
            bare += ["-blockdev", json.dumps(raw)]
        elif word != "-S":
            bare.append(word)
    return [*bare, "-serial", "stdio", "-monitor", "none"]


def time_bare_boot(command: list[str]) -> float:
    """Seconds from the start of QEMU to the ready marker."""
    begun = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    killer = threading.Timer(TIMEOUT_S, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        seen = b""
        while MARKER not in seen:
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                raise SystemExit(f"the bare machine did not become ready: ...{seen[-300:]!r}")
            seen = seen[-200:] + chunk
        return time.monotonic() - begun
    finally:
        killer.cancel()
        process.kill()
        process.wait()


def one_round(
    strategy: Any, machine: Any, manifest: TargetManifest, number: int
) -> tuple[float, float]:
    """(seconds of the bare boot, seconds from cut to verdict)."""
    strategy.transition("off")
    machine.fresh(manifest.disks)
    device = Device(machine, strategy, BrownoutUpdater(), manifest, manifest.images["v1"])
    device.boot()
    recorded = Path(f"/proc/{machine.pid}/cmdline").read_text().rstrip("\0").split("\0")
    # QEMU comes after the wrapper that ties it to this process.
    recorded = recorded[next(i for i, word in enumerate(recorded) if "qemu-system" in word) :]
    machine.arm_cut(Trigger.operation(3 + number % 4), "subset", number)
    try:
        strategy.run(BURST, TIMEOUT_S)
    except ConsoleLost:
        cut = machine.power_loss.monotonic_ns / 1e9
    else:
        raise SystemExit("the burst ended before the cut")
    lost = time.monotonic()
    with tempfile.TemporaryDirectory(dir=manifest.directory) as folder:
        disks = {}
        for name in manifest.disks:
            disks[name] = Path(folder) / name
            with machine.recorder.disk(name) as disk:
                disk.export(disks[name])
        bare = time_bare_boot(bare_command(recorded, disks))
    begun = time.monotonic()
    device.power_went()
    device.boot_after_cut()
    device.check_data()
    device.look("after the start")
    verdict = device.verdict()
    if verdict.violated:
        raise SystemExit(f"{verdict} in a benchmark")
    return bare, (lost - cut) + time.monotonic() - begun


def main() -> None:
    """Run the rounds and print the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rig", type=Path, default=Path("rigs/qemu-arm64.yaml"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    images = build_target(arguments.rig.stem, ("v1",), relock_if_gone=True)
    manifest = TargetManifest.parse(images.manifest, images.directory, "v1")
    target = load_rig(arguments.rig).get_target()
    strategy = target.get_strategy()
    rounds = []
    try:
        for number in range(arguments.rounds):
            rounds.append(one_round(strategy, strategy.power, manifest, number))
            bare, whole = rounds[-1]
            print(f"round {number}: bare boot {bare:.2f} s, cut to verdict {whole:.2f} s")
    finally:
        strategy.transition("off")
    bare, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    print(f"medians: bare boot {bare:.2f} s, cut to verdict {whole:.2f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
