"""The device client on an emulated device, against what it is compared with, in one run. Ratios.

    python tests/benchmarks/client_guest.py [--rounds 3] [--image-mib 128] [--rig RIG]

One guest boots; a TLS server on this host has the artifacts. In the guest, in turn, and into the
same passive slot (`guest_side.py`):

- start: `updater --help` and `updater resume` with nothing to do, over `python3 -c pass`;
- idle: how often the daemon wakes up between two polls, by its context switches;
- install, an image that is not compressed: `updater install` against `curl | dd` of the bare image,
  with direct writes, fsync, and everything read back from the medium and hashed;
- install, gzip: the same with `curl | tar | gunzip | tar | dd`; and, on the x86 target, Debian's
  mender-client 3.4 (`.ci/bootstrap tests` unpacks it) installing the same artifact from the same
  server, as it is and followed by the same read-back, which it lacks. Its boot environment is a
  file, which is faster than a real one.
- install, xz and zstd: ours alone, for its memory: the window of the compression is in it.

Peak resident memory is the process's own, as the kernel counts it (wait4). Speeds are medians of
the rounds' ratios. Nothing else should run on the machine; an image of 128 MiB fills the slot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from framework.console import ConsoleTimeout
from framework.scenario.manifest import TargetManifest
from framework.targets.rig import load_rig
from images import build_target
from updater.artifact import write_artifact
from updater.artifact.signature import load_private_key

MENDER = Path(__file__).parents[2] / "build/peers/mender-client/usr/bin/mender"
GUEST_SIDE = Path(__file__).with_name("guest_side.py")
NAME = "updates.brownout.test"
GOAL_SPEED, GOAL_MIB = 0.9, 34.0
ROUND_TIMEOUT_S = 900.0
SERVER = """\
import sys
from pathlib import Path
from updater.server import ArtifactFileServer
server = ArtifactFileServer(*map(Path, sys.argv[1:4])).start()
print(server.port, flush=True)
sys.stdin.read()
server.close()
"""


def make_image(path: Path, mib: int) -> None:
    """Half of it noise, half zeros, as file systems are."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(512 * 1024) + bytes(512 * 1024))


def collect_tools(tar: Path, mender: bool) -> None:
    """Curl and mender-client with the libraries that they are linked with, as a plain tar."""
    programs = [Path(shutil.which("curl") or "curl"), *([MENDER] if mender else [])]
    with tarfile.open(tar, "w") as archive:
        seen = set()
        for program in programs:
            archive.add(program.resolve(), f"bin/{program.name}")
            listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True)
            for word in listed.stdout.split():
                library = Path(word)
                if library.is_absolute() and library.name not in seen:
                    seen.add(library.name)
                    archive.add(library.resolve(), f"lib/{library.name}")


def make_artifacts(folder: Path, image_mib: int, target: str, key: Path) -> None:
    """Everything that the guest fetches."""
    image = folder / "raw.mender"
    make_image(image, image_mib)
    for packing in ("none", "gzip", "xz", "zstd"):
        write_artifact(
            folder / f"image-{packing}.mender",
            image,
            name=f"image-{packing}",
            device_types=[target],
            key=load_private_key(key),
            compression=packing,
            file_name="rootfs.img",
        )
    shutil.copyfile(GUEST_SIDE, folder / "guest_side.mender")


@contextlib.contextmanager
def serving(folder: Path, keys: Path) -> Iterator[int]:
    """A server in a process of its own; its port."""
    command = [sys.executable, "-c", SERVER, folder, keys / "server.pem", keys / "server.key"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


def run_in_guest(strategy: Any, port: int, rounds: int, mender: bool) -> list[dict[str, Any]]:
    """Boot, fetch the other side, run it; return what it told."""
    strategy.transition("ready")
    url = f"https://{NAME}:{port}/artifacts"
    fetch = (
        "import ssl,urllib.request as u;"
        "c=ssl.create_default_context(cafile='/etc/updater/server-ca.pem');"
        f"open('/tmp/guest_side.py','wb').write(u.urlopen('{url}/guest_side.mender',context=c).read())"
    )
    strategy.check(f'python3 -c "{fetch}"', 120.0)
    command = f"python3 /tmp/guest_side.py {url} {rounds} {'mender' if mender else ''}".rstrip()
    try:
        result = strategy.run(command, ROUND_TIMEOUT_S * (rounds + 1))
    except ConsoleTimeout as error:
        raise SystemExit(f"the guest did not end in time: {error}") from error
    told = [json.loads(line[6:]) for line in result.lines if line.startswith("BENCH ")]
    if result.code != 0 or not told or told[-1]["kind"] != "end":
        report(told)
        raise SystemExit(f"the guest's part ended with {result.code}: {result.text[-1500:]}")
    return told[:-1]


def report(told: list[dict[str, Any]]) -> None:
    """Print the ratios, and say where a goal is missed."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for entry in told:
        rows[entry["kind"]][entry["name"]].append(entry)
    starts = {
        name: statistics.median(entry["seconds"] for entry in entries)
        for name, entries in rows["start"].items()
    }
    for name, seconds in starts.items():
        ratio = seconds / starts["python3 -c pass"]
        print(f"{name}: {seconds * 1000:.0f} ms, {ratio:.2f} × `python3 -c pass`")
    for entry in rows["idle"]["updater daemon"]:
        print(
            f"idle daemon: {entry['wake_ups']} wake-ups in {entry['seconds']:.0f} s,"
            f" {entry['resident_kib'] / 1024:.1f} MiB resident"
        )
    for packing in [name for name in ("none", "gzip", "xz", "zstd") if rows[name]["updater"]]:
        ours = rows[packing]["updater"]
        for name, entries in rows[packing].items():
            seconds = statistics.median(entry["seconds"] for entry in entries)
            cpu = statistics.median(entry["cpu_s"] for entry in entries)
            peak = max(entry["peak_kib"] for entry in entries) / 1024
            speed = statistics.median(
                other["seconds"] / own["seconds"] for other, own in zip(entries, ours, strict=False)
            )
            shown = "" if "|" in name or "," in name else f", at most {peak:.1f} MiB resident"
            told_ratio = "" if name == "updater" else f"; ours has {speed:.2f} of its speed"
            print(f"{packing}: {name}: {seconds:.1f} s ({cpu:.1f} s CPU){shown}{told_ratio}")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-mib", type=int, default=128)
    parser.add_argument("--rig", type=Path, default=Path("rigs/qemu-x86_64.yaml"))
    options = parser.parse_args()
    images = build_target(options.rig.stem, ("v1",), relock_if_gone=True)
    manifest = TargetManifest.parse(images.manifest, images.directory, "v1")
    keys = images.directory.parent / "keys"
    # Its programs are this host's, so the guest must be of its kind.
    native = os.uname().machine in options.rig.stem
    if not native:
        raise SystemExit("curl comes from this host: the rig must be of the same architecture")
    strategy = load_rig(options.rig).get_target().get_strategy()
    with tempfile.TemporaryDirectory(dir=images.directory) as name:
        folder = Path(name)
        make_artifacts(folder, options.image_mib, options.rig.stem, keys / "artifact.key")
        collect_tools(folder / "tools.mender", MENDER.exists())
        strategy.transition("off")
        strategy.power.fresh(manifest.disks)
        try:
            with serving(folder, keys) as port:
                report(run_in_guest(strategy, port, options.rounds, MENDER.exists()))
        finally:
            strategy.transition("off")


if __name__ == "__main__":
    main()
