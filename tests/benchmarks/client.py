"""The device client against what it is compared with, in one run on this machine. Prints ratios.

    python tests/benchmarks/client.py [--image-mib 128] [--rounds 5] [--directory DIR]

Three things, medians of the rounds, the two sides of a ratio taken in turn:

- start: `updater resume` with nothing to do, and `updater --help`, over `python3 -c pass`;
- install: an image from a TLS server on this machine into a file that stands for the slot, over
  `curl | dd` into the same file with the same fsync and the same read-back; also with the spool
  on, which a fast download has not; and the peak resident memory of the installing process;
- resume: a download that was cut at nine tenths, bytes fetched and time, over the whole download.

DIRECTORY should be on a real disk (not tmpfs). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "updater"
sys.path[:0] = [str(TESTS), str(TESTS.parents[1])]

from updater_artifacts import DEVICE_TYPE, make_key, write_key_pair  # noqa: E402
from updater_server import Authority, Request, serving  # noqa: E402

from updater.artifact import write_artifact  # noqa: E402
from updater.device.bootenv_grub import format_block  # noqa: E402

CONFIG = """\
device_type = "{type}"
data_dir = "{directory}/data"
artifact_info = "{directory}/artifact_info"
[slots]
a = {{device = "{directory}/a.img", number = 2}}
b = {{device = "{directory}/b.img", number = 3}}
[bootenv]
kind = "grub"
copies = ["{directory}/1/env", "{directory}/2/env"]
[tls]
ca_file = "{directory}/ca.pem"
[trust]
artifact_keys = ["{directory}/artifact.pem"]
[download]
spool_min_s = {spool}
"""
SETTLED = {
    "mender_boot_part": "2",
    "mender_boot_part_hex": "2",
    "upgrade_available": "0",
    "bootcount": "0",
}


def set_up(directory: Path, image_mib: int) -> Path:
    """Lay out a device of files, and an artifact for it; return the artifact."""
    image = directory / "rootfs.img"
    with image.open("wb") as file:
        for _ in range(image_mib):
            file.write(os.urandom(512 * 1024) + bytes(512 * 1024))
    key = make_key("ecdsa")
    write_key_pair(key, directory, "artifact")
    artifact = directory / "v2.mender"
    write_artifact(
        artifact, image, name="v2", device_types=[DEVICE_TYPE], key=key, compression="zstd"
    )
    (directory / "artifact_info").write_text("artifact_name=v1\n")
    (directory / "running").write_text("a")
    (directory / "boot").write_text("1")
    for number in "12":
        (directory / number).mkdir()
    reset(directory, image_mib)
    return artifact


def reset(directory: Path, image_mib: int, spool: float = 60.0) -> None:
    """Bring the device back to where nothing was installed."""
    for number in "12":
        (directory / number / "env").write_bytes(format_block(SETTLED))
        (directory / number / "lock").write_bytes(format_block({"editing": "0"}))
    (directory / "a.img").write_bytes(bytes(4096))
    with (directory / "b.img").open("wb") as file:
        file.truncate(image_mib << 20)
    for name in ("state.db", "download", "download.checkpoint"):
        (directory / "data" / name).unlink(missing_ok=True)
    text = CONFIG.format(type=DEVICE_TYPE, directory=directory, spool=spool)
    (directory / "updater.toml").write_text(text)
    os.sync()


def timed(command: list[str]) -> tuple[float, int]:
    """Run; return seconds and the peak resident KiB that the program says of itself."""
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr}")
    _, found, peak = done.stderr.rpartition("VmHWM:")
    return taken, int(peak.split()[0]) if found else 0


# ru_maxrss would do, but a child inherits that of this process; VmHWM begins with the program.
REPORTING = """\
import atexit, runpy, sys
atexit.register(lambda: sys.stderr.write(
    next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_up(directory: Path, rounds: int) -> None:
    """Compare starts."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from updater import cli;"
        "from updater.device import config; config.DEFAULT_PATH = sys.argv[2];"
        "sys.exit(cli.main(['resume']))"
    )
    config = str(directory / "updater.toml")
    root = str(TESTS.parents[1])
    commands = {
        "pass": [sys.executable, "-ISc", "pass"],
        "resume": [sys.executable, "-ISc", code, root, config],
        "help": [
            sys.executable,
            "-ISc",
            "import sys; sys.path.insert(0, sys.argv[1]); from updater import cli;"
            "cli.main(['--help'])",
            root,
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds * 4):
        for name, command in commands.items():
            times[name].append(timed(command)[0])
    median = {name: statistics.median(values) for name, values in times.items()}
    for name in ("resume", "help"):
        ratio = median[name] / median["pass"]
        print(f"{name}: {median[name] * 1000:.0f} ms, {ratio:.2f} × `python3 -c pass`")


def installs(directory: Path, artifact: Path, image_mib: int, rounds: int) -> None:
    """Compare installs with curl and dd."""
    content = artifact.read_bytes()
    program = [sys.executable, "-c", REPORTING, str(TESTS / "updater_device.py")]
    program += [str(directory), "0"]
    authority = Authority(directory)

    def behave(request: Request, number: int) -> None:
        request.serve(content)

    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        slot = directory / "b.img"
        fetch = (
            f"curl -sf --cacert {directory}/ca.pem {url}"
            # The image inside: what dd would have to write is the unpacked data.
            f" | tar -xOf - data/0000.tar.zst | zstd -dcq | tar -xOf -"
            f" | dd of={slot} bs=1M iflag=fullblock oflag=direct conv=notrunc,fsync 2>/dev/null"
            f" && dd if={slot} bs=1M iflag=direct 2>/dev/null | sha256sum > /dev/null"
        )
        rows: dict[str, list[float]] = {"curl | dd": [], "install": [], "install, spooled": []}
        peak = 0
        for _ in range(rounds):
            reset(directory, image_mib)
            rows["curl | dd"].append(timed(["sh", "-c", fetch])[0])
            for name, spool in (("install", 60.0), ("install, spooled", 0.0)):
                reset(directory, image_mib, spool)
                seconds, resident = timed([*program, "install", url])
                rows[name].append(seconds)
                peak = max(peak, resident)
        for name, values in rows.items():
            ratios = [other / own for other, own in zip(rows["curl | dd"], values, strict=True)]
            print(
                f"{name}: {statistics.median(values):.2f} s for {image_mib} MiB,"
                f" {statistics.median(ratios):.2f} of the speed of curl | dd"
            )
        print(f"peak resident memory of an install: {peak / 1024:.1f} MiB")


def resumes(directory: Path, artifact: Path, image_mib: int) -> None:
    """Cut a download at nine tenths; measure the rest."""
    content = artifact.read_bytes()
    program = [sys.executable, str(TESTS / "updater_device.py"), str(directory), "0"]
    authority = Authority(directory)
    sent: list[int] = []
    stuck = threading.Event()

    def behave(request: Request, number: int) -> None:
        asked = request.headers.get("Range")
        sent.append(len(content) - int(asked[6:-1]) if asked else len(content))
        if number == 2:
            request.serve(content, stop_after=len(content) * 9 // 10)
            request.wfile.flush()
            stuck.set()
            time.sleep(60)
        else:
            request.serve(content)

    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        reset(directory, image_mib, 0.0)
        whole, _ = timed([*program, "install", url])
        reset(directory, image_mib, 0.0)
        with subprocess.Popen([*program, "install", url], stderr=subprocess.DEVNULL) as process:
            stuck.wait()
            record = directory / "data" / "download.checkpoint"
            deadline = time.monotonic() + 60
            before = b""
            while time.monotonic() < deadline:
                time.sleep(1.0)
                now = record.read_bytes() if record.exists() else b""
                if now and now == before:
                    break
                before = now
            process.send_signal(signal.SIGKILL)
        rest, _ = timed([*program, "install", url])
    print(
        f"resume after a kill at 90 %: {sent[-1] / len(content):.3f} of the bytes fetched again,"
        f" {rest / whole:.2f} of the time of a whole install"
    )


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image-mib", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name).absolute()
        artifact = set_up(directory, options.image_mib)
        Authority(directory)
        start_up(directory, options.rounds)
        installs(directory, artifact, options.image_mib, options.rounds)
        resumes(directory, artifact, options.image_mib)


if __name__ == "__main__":
    main()
