"""What recording costs: the block recorder against a raw file, in the same run.

    python tests/benchmarks/recorder.py [--rounds N] [--target NAME] [--directory DIR] [--json]

Two workloads: 64 MiB in 1 MiB writes with one fsync at the end, and 4 KiB writes with a fsync after
each. Backends alternate in every round. Printed are medians, and the median over the rounds of each
backend's time over the raw file's (cache=none) in the same round: 1.00 is as fast.

*In a guest*: what counts. One machine of a built target boots with both backends as further disks,
each with a thread of its own in QEMU as the driver gives it, and writes to them in turn. The goal,
at most 1.05 for the 64 MiB, is judged here.
*On the host*: through `qemu-img bench`, for diagnosis. There is no guest to be slow, so memory
bandwidth is compared: a raw file with cache=none takes no copy, the recorder takes two (socket,
page cache).

`recorder` acknowledges a flush once the journal is in the host's page cache, which is what survives
the harness being killed; `recorder, durable` syncs its journal to the host's disk at every flush.
Exit code 0; 1 if the goal is missed; 2 if it can't run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pexpect

from framework.disk import DeviceSpec, DiskError, Recorder

MIB = 1 << 20
SIZE = 128 * MIB
GOAL = 1.05
SMALL_WRITES = 100
_TIMEOUT_S = 300.0


Times = dict[str, dict[str, list[float]]]
"""Seconds by workload and backend."""


@dataclass(frozen=True)
class Workload:
    """A `qemu-img bench` run: `writes` of `size_bytes`, a flush after every `flush_every`."""

    name: str
    writes: int
    size_bytes: int
    depth: int
    flush_every: int

    @property
    def total_bytes(self) -> int:
        """Bytes written in one run."""
        return self.writes * self.size_bytes


BULK = "64 MiB write + fsync"
WORKLOADS = (
    Workload(BULK, 64, MIB, 1, 64),
    Workload("64 MiB write + fsync, queue depth 8", 64, MIB, 8, 64),
    Workload("4 KiB sync writes", 1000, 4096, 1, 1),
)


@dataclass(frozen=True)
class Figures:
    """One backend's figures for one workload; `ratio` is paired within rounds."""

    seconds: float
    mb_per_s: float
    ratio: float
    least_s: float
    most_s: float


class BenchmarkError(Exception):
    """The benchmark can't run; the message says why."""


def run(workload: Workload, target: str) -> float:
    """Seconds that qemu-img took, by its own clock (without its start)."""
    command = ["qemu-img", "bench", "-w", "-f", "raw", "-t", "none", "--pattern=165"]
    command += ["-c", str(workload.writes), "-s", str(workload.size_bytes)]
    command += ["-d", str(workload.depth), f"--flush-interval={workload.flush_every}", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    found = re.search(r"Run completed in ([0-9.]+) seconds", done.stdout)
    if done.returncode or not found:
        raise BenchmarkError(f"qemu-img bench {target}: {done.stderr.strip() or done.stdout}")
    return float(found.group(1))


def measure_on_host(directory: Path, rounds: int) -> Times:
    """Seconds by workload and backend, backends alternating within each round."""
    raw, base = _images(directory)
    times: Times = {w.name: {} for w in WORKLOADS}

    def recorded(number: int, durable: bool) -> Callable[[Workload], float]:
        def once(workload: Workload) -> float:
            folder = directory / f"run-{number}-{durable}-{workload.size_bytes}-{workload.depth}"
            spec = DeviceSpec("vda", base)
            with Recorder([spec], folder, durable_journal=durable) as recorder:
                seconds = run(workload, recorder.endpoint("vda").uri)
                if recorder.operations < workload.writes:
                    raise BenchmarkError(f"only {recorder.operations} operations were recorded")
            shutil.rmtree(folder)
            return seconds

        return once

    for number in range(rounds):
        backends: list[tuple[str, Callable[[Workload], float]]] = [
            ("raw file", lambda workload: run(workload, str(raw))),
            ("recorder", recorded(number, False)),
            ("recorder, durable", recorded(number, True)),
        ]
        for workload in WORKLOADS:
            shift = number % len(backends)
            for name, once in backends[shift:] + backends[:shift]:
                times[workload.name].setdefault(name, []).append(once(workload))
    return times


def _images(directory: Path) -> tuple[Path, Path]:
    raw = directory / "raw.img"
    base = directory / "base.img"
    if not raw.exists():
        with raw.open("wb") as file:  # written, so that the raw file allocates nothing while timed
            for _ in range(SIZE // MIB):
                file.write(b"\x5a" * MIB)
        with base.open("wb") as file:
            file.truncate(SIZE)
    return raw, base


# Runs in the guest: rounds of both workloads on vdb (raw) and vdc (recorder), alternating.
_GUEST_SCRIPT = """
import os, time, json
def bulk(f):
    for i in range(64): os.pwrite(f, b, i << 20)
    os.fsync(f)
def small(f):
    for i in range(SMALL):
        os.pwrite(f, b[:4096], i * 4096)
        os.fsync(f)
b = b"\\xa5" * (1 << 20)
r = {}
for n in range(ROUNDS + 1):
    for w in (bulk, small):
        for d in ("vdb", "vdc")[:: 1 if n % 2 else -1]:
            f = os.open("/dev/" + d, os.O_WRONLY)
            t = time.monotonic()
            w(f)
            t = time.monotonic() - t
            os.close(f)
            if n: r.setdefault(w.__name__, {}).setdefault(d, []).append(t)
print("RES" + "ULT", json.dumps(r))
"""
_PROMPT = "root@brownout:~# "


def measure_in_guest(directory: Path, rounds: int, target: Path) -> Times:
    """Seconds in one arm64 guest that has both backends as disks; `target`: a built target."""
    raw, base = _images(directory)
    specs = [DeviceSpec("vda", target / "disk.img"), DeviceSpec("vdc", base)]
    with Recorder(specs, directory / "guest") as recorder:
        command = ["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"]
        command += ["-machine", "virt", "-cpu", "cortex-a57", "-m", "512M", "-nic", "none"]
        command += ["-bios", str(target / "u-boot.bin")]
        command += ["-drive", f"if=pflash,index=1,format=raw,readonly=on,file={target}/seed.img"]
        for name, source in (
            ("vda", f"file={recorder.endpoint('vda').uri}"),
            ("vdb", f"file={raw},cache=none"),
            ("vdc", f"file={recorder.endpoint('vdc').uri},cache=none"),
        ):
            command += ["-drive", f"if=none,id={name},format=raw,{source}"]
            command += ["-object", f"iothread,id={name}-io"]  # as the driver gives each disk one
            command += ["-device", f"virtio-blk-pci,drive={name},iothread={name}-io"]
        command += ["-device", "i6300esb,addr=5"]
        console = pexpect.spawn("qemu-system-aarch64", command, timeout=120, encoding="utf-8")
        try:
            console.expect_exact(_PROMPT)
            script = _GUEST_SCRIPT.replace("ROUNDS", str(rounds)).replace(
                "SMALL", str(SMALL_WRITES)
            )
            console.sendline("cat > /tmp/bench.py <<'EOF'" + script.replace("\n", "\r") + "EOF")
            console.expect_exact(_PROMPT)
            console.sendline("python3 /tmp/bench.py")
            console.expect(r"RESULT (\{.*?\}\})", timeout=60 + 30 * rounds)
            assert isinstance(console.match, re.Match)
            found = json.loads(console.match.group(1))
        except (pexpect.EOF, pexpect.TIMEOUT) as error:
            last = str(console.before)[-300:].strip()
            raise BenchmarkError(f"the guest gave no result; its last words: {last}") from error
        finally:
            console.close(force=True)
        if recorder.operations < 64 * rounds:
            raise BenchmarkError(f"only {recorder.operations} operations were recorded")
    names = {"vdb": "raw file", "vdc": "recorder"}
    small = "4 KiB sync writes"
    return {
        name: {names[d]: times for d, times in sorted(found[key].items())}
        for key, name in (("bulk", BULK), ("small", small))
    }


def summarise(times: Times, sizes: dict[str, int]) -> dict[str, dict[str, Figures]]:
    """Medians, rates and ratios."""
    result = {}
    for name, backends in times.items():
        raw = backends["raw file"]
        result[name] = {
            backend: Figures(
                seconds=statistics.median(found),
                mb_per_s=sizes[name] / statistics.median(found) / 1e6,
                ratio=statistics.median(f / r for f, r in zip(found, raw, strict=True)),
                least_s=min(found),
                most_s=max(found),
            )
            for backend, found in backends.items()
        }
    return result


def _print(title: str, result: dict[str, dict[str, Figures]], rounds: int) -> None:
    print(f"{title}, median of {rounds} rounds")
    for name, backends in result.items():
        print(f"  {name}")
        for backend, f in backends.items():
            print(
                f"    {backend:18} {f.mb_per_s:8.1f} MB/s   time over raw {f.ratio:5.2f}"
                f"   ({f.least_s:.3f}..{f.most_s:.3f} s)"
            )


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/recorder.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=21, help="rounds, backends alternating (21)")
    parser.add_argument("--directory", type=Path, help="where to write (default: temporary)")
    parser.add_argument(
        "--target", type=Path, default=Path("build/qemu-arm64"), help="a built arm64 U-Boot target"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    packages = {"qemu-img": "qemu-utils", "qemu-system-aarch64": "qemu-system-arm"}
    for program, package in packages.items():
        if shutil.which(program) is None:
            print(f"{program} is not installed: install the package {package}", file=sys.stderr)
            return 2
    if not (options.target / "disk.img").exists():
        print(
            f"{options.target}: no images there; build them: "
            f"python -m images build {options.target.name}",
            file=sys.stderr,
        )
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="brownout-bench-", dir=options.directory) as folder:
            guest = measure_in_guest(Path(folder), options.rounds, options.target)
            host = measure_on_host(Path(folder), options.rounds)
    except (BenchmarkError, DiskError, OSError, subprocess.TimeoutExpired) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 2
    sizes = {w.name: w.total_bytes for w in WORKLOADS}
    in_guest = summarise(guest, {**sizes, "4 KiB sync writes": SMALL_WRITES * 4096})
    on_host = summarise(host, sizes)
    if options.json:
        plain = {
            where: {n: {b: asdict(f) for b, f in bs.items()} for n, bs in result.items()}
            for where, result in (("guest", in_guest), ("host", on_host))
        }
        print(json.dumps(plain, indent=2))
    else:
        _print("In a guest", in_guest, options.rounds)
        _print("On the host", on_host, options.rounds)
    ratio = in_guest[BULK]["recorder"].ratio
    if ratio > GOAL:
        print(f"goal missed: {BULK} takes {ratio:.2f} of the raw file's time", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
