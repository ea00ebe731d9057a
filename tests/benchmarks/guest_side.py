"""The part of `client_guest.py` that runs on the device: time and memory of each contestant.

    python3 guest_side.py URL ROUNDS [mender]

Needs nothing but Debian's Python. The programs to compare with come as `tools.mender` (a plain tar)
from the same server and go to a tmpfs. Standard output is one JSON object a line.
"""

import json
import os
import ssl
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

URL = sys.argv[1]
CA = "/etc/updater/server-ca.pem"
SLOT = "/dev/vda3"
PEERS = "/tmp/peers"
LOADER = f"{PEERS}/lib/ld-linux-x86-64.so.2 --library-path {PEERS}/lib {PEERS}/bin"
MENDER = f"{LOADER}/mender --config /tmp/mender/mender.conf --data /tmp/mender"
READ_BACK = f"dd if={SLOT} bs=1M iflag=direct 2>/dev/null | sha256sum > /dev/null"
WRITE = f"dd of={SLOT} bs=1M iflag=fullblock oflag=direct conv=fsync 2>/dev/null"
IDLE_S = 20.0


def tell(**values: object) -> None:
    print("BENCH " + json.dumps(values), flush=True)


def fetch_tools() -> None:
    context = ssl.create_default_context(cafile=CA)
    with (
        urllib.request.urlopen(f"{URL}/tools.mender", context=context) as answer,
        tarfile.open(fileobj=answer, mode="r|") as archive,
    ):
        archive.extractall(PEERS)


def set_up_mender() -> None:
    """A configuration, and the two tools of a boot environment, which lies in a file."""
    Path("/tmp/mender").mkdir(exist_ok=True)
    # Its paths in /etc are fixed, and the root file system is read-only. For an install by hand it
    # trusts the system's authorities.
    shell(
        "cp -a /etc /tmp/etc && mount -o bind /tmp/etc /etc && mkdir -p /etc/mender /etc/ssl/certs"
        f" && cp {CA} /etc/ssl/certs/ca-certificates.crt"
    )
    settings = {
        "ServerURL": URL,
        "RootfsPartA": "/dev/vda2",
        "RootfsPartB": SLOT,
        "ServerCertificate": CA,
        "ArtifactVerifyKey": "/etc/updater/artifact-key.pem",
    }
    texts = {
        "/tmp/mender/mender.conf": json.dumps(settings),
        "/tmp/mender/device_type": "device_type=qemu-x86_64\n",
        "/etc/mender/artifact_info": "artifact_name=v1\n",
        f"{PEERS}/bin/fw_printenv": (
            "#!/bin/sh\n[ $# -eq 0 ] && exec cat /tmp/mender/env\n"
            'code=0\nfor name; do grep "^$name=" /tmp/mender/env || code=1; done\nexit $code\n'
        ),
        f"{PEERS}/bin/fw_setenv": (
            "#!/bin/sh\nwhile read -r line; do\n"
            "case $line in *=*) name=${line%%=*} value=${line#*=} ;;"
            " *) name=${line%% *} value=${line#* } ;; esac\n"
            'sed -i "/^$name=/d" /tmp/mender/env; echo "$name=$value" >> /tmp/mender/env\ndone\n'
        ),
    }
    for path, text in texts.items():
        Path(path).write_text(text)
        Path(path).chmod(0o755)


def reset_mender() -> None:
    shell("rm -rf /tmp/mender/mender-store*")
    Path("/tmp/mender/env").write_text(
        "mender_boot_part=2\nmender_boot_part_hex=2\nupgrade_available=0\nbootcount=0\n"
    )


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True)


def timed(command: str) -> "dict[str, object]":
    """Seconds, processor seconds and the peak resident KiB of the process itself."""
    shell("sync; echo 3 > /proc/sys/vm/drop_caches")
    started = time.monotonic()
    # The shell becomes the program. What this script has resident counts, too: 20 MiB or so.
    pid = os.posix_spawnp(
        "sh",
        ["sh", "-c", command],
        {**os.environ, "PATH": f"{PEERS}/bin:{os.environ['PATH']}"},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, "/tmp/out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    if status:
        said = Path("/tmp/out").read_text(errors="replace")[-800:]
        raise SystemExit(f"{command}: {os.waitstatus_to_exitcode(status)}: {said}")
    return {
        "seconds": seconds,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_kib": usage.ru_maxrss,
    }


def start_up(rounds: int) -> None:
    for _ in range(rounds):
        for name, command in (
            ("python3 -c pass", "exec python3 -c pass"),
            ("updater --help", "exec updater --help"),
            ("updater resume", "exec updater resume"),
        ):
            tell(kind="start", name=name, **timed(command))


def installs(rounds: int, mender: bool) -> None:
    curl = f"{LOADER}/curl -sf --cacert {CA} {URL}"
    for _ in range(rounds):
        for packing in ("none", "gzip", "xz", "zstd"):
            url = f"{URL}/image-{packing}.mender"
            fetch = ""
            if packing == "none":
                fetch = f"{curl}/raw.mender | {WRITE} && {READ_BACK}"
            elif packing == "gzip":
                unpack = "tar -xOf - data/0000.tar.gz | busybox gunzip -c | tar -xOf -"
                fetch = f"{curl}/image-gzip.mender | {unpack} | {WRITE} && {READ_BACK}"
            if fetch:
                tell(kind=packing, name="curl | dd", **timed(fetch))
            tell(kind=packing, name="updater", **timed(f"exec updater install {url}"))
            shell("updater rollback 2>/dev/null")
            if mender and packing == "gzip":
                reset_mender()
                tell(kind=packing, name="mender-client", **timed(f"exec {MENDER} install {url}"))
                # The same policy: what was written is read back and hashed.
                reset_mender()
                checked = f"{MENDER} install {url} && {READ_BACK}"
                tell(kind=packing, name="mender-client, read back", **timed(checked))


def idle() -> None:
    """How often the daemon wakes up while it has nothing to do."""
    stock = Path("/etc/updater/updater.toml").read_text()
    # Port 1 refuses: it asks, fails, and waits.
    server = '\n[server]\nurl = "https://127.0.0.1:1"\nretry_s = 3600\n'
    Path("/tmp/idle.toml").write_text(stock + server)
    daemon = subprocess.Popen(
        ["updater", "--config", "/tmp/idle.toml", "daemon"], stderr=subprocess.PIPE, text=True
    )
    line = ""
    for line in daemon.stderr:
        if "asking again in" in line:
            break
    else:
        raise SystemExit(f"the daemon ended with {daemon.wait()}: {line}")
    # It has said what it will do: until it sleeps, its switches change.
    before, now = -1, switches(daemon.pid)
    while before != now:
        time.sleep(1.0)
        before, now = now, switches(daemon.pid)
    started = time.monotonic()
    time.sleep(IDLE_S)
    tell(
        kind="idle",
        name="updater daemon",
        seconds=time.monotonic() - started,
        wake_ups=switches(daemon.pid) - before,
        resident_kib=status(daemon.pid, "VmRSS"),
    )
    daemon.kill()
    daemon.wait()


def switches(pid: int) -> int:
    return status(pid, "voluntary_ctxt_switches") + status(pid, "nonvoluntary_ctxt_switches")


def status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    shell("mkdir -p /tmp/peers")
    fetch_tools()
    with_mender = "mender" in sys.argv[3:]
    if with_mender:
        set_up_mender()
    start_up(7)
    idle()
    installs(int(sys.argv[2]), with_mender)
    tell(kind="end", name="end")
