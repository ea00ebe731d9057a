"""What an installation takes at its peak, in the user space of an image: Debian's own Python.

The root file system of the built image is unpacked and entered (chroot, in name spaces of its own);
the client in it is the one that the image has. It installs over TLS a signed artifact into a slot
that is a file, and the kernel says its peak (VmHWM). What the processor's architecture and the size
of the image change is measured in a guest, by `tests/benchmarks/client_guest.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_updater_cli import PROGRAM, Device
from test_updater_preflight import have_namespaces
from updater_server import Authority, Request, serving

from images import build_target
from updater.artifact import write_artifact
from updater.artifact.signature import PrivateKey

# What mender-client 3.4 took.
GOAL_MIB = 34.0
# A window of 8 MiB over one of 1, but for what it shares pages with.
WIDER_MIB = 5.0
IMAGE_BYTES, NOISE_BYTES = 12 << 20, 1 << 20
TARGETS = {"x86_64": "qemu-x86_64", "aarch64": "qemu-arm64"}
MEASURED = """\
import sys
import updater_device
code = updater_device.main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM:")))
sys.exit(code)
"""

pytestmark = [
    pytest.mark.skipif(not have_namespaces(), reason="no name spaces of one's own here"),
    pytest.mark.skipif(os.uname().machine not in TARGETS, reason="no image for this processor"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root file system of the image, unpacked."""
    target = TARGETS[os.uname().machine]
    image = build_target(target, ("v1",), relock_if_gone=True).directory / "rootfs-v1.img"
    tree = tmp_path_factory.mktemp("root")
    subprocess.run(["debugfs", "-R", f"rdump / {tree}", image], check=True, capture_output=True)
    shutil.copy(PROGRAM, tree)
    (tree / "measured.py").write_text(MEASURED)
    return tree


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough to fill a window."""
    path = tmp_path_factory.mktemp("image") / "rootfs.img"
    path.write_bytes(os.urandom(NOISE_BYTES) + bytes(IMAGE_BYTES - NOISE_BYTES))
    return path


def install(root: Path, artifact: bytes, key: PrivateKey, name: str, settings: str = "") -> str:
    """Install in the root file system; return what the client and the kernel said."""
    device = Device(root / name, "grub", key)
    with (device.directory / "b.img").open("wb") as slot:
        slot.truncate(IMAGE_BYTES + (1 << 20))
    config = device.directory / "updater.toml"
    config.write_text(config.read_text().replace(str(root), "") + settings)
    authority = Authority(device.directory)

    def behave(request: Request, number: int) -> None:
        request.serve(artifact)

    enter = 'mount --rbind /proc "$0/proc" && exec chroot "$0" "$@"'
    with serving(authority.server_context("127.0.0.1"), behave) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/v2.mender"
        # Every argument is the chroot's: the client gets nothing of this process's environment.
        client = ["python3", "-s", "/measured.py", f"/{name}", "0", "install", url]
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", enter, str(root), *client],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr + done.stdout


def peak_mib(said: str) -> float:
    assert "installed v2 into slot b" in said, said
    return int(said.rpartition("VmHWM:")[2].split()[0]) / 1024


def packed(folder: Path, image: Path, key: PrivateKey, compression: str, **how: int) -> bytes:
    """The image as a signed artifact."""
    made = folder / "v2.mender"
    write_artifact(
        made,
        image,
        name="v2",
        device_types=["test-device"],
        key=key,
        compression=compression,
        file_name="rootfs.img",
        **how,
    )
    return made.read_bytes()


@pytest.mark.parametrize("compression", ["none", "gzip", "xz", "zstd"])
def test_an_installation_takes_no_more_memory_than_was_promised(
    root: Path, image: Path, signing_key: PrivateKey, tmp_path: Path, compression: str
) -> None:
    """Over TLS, signed, packed as a writer packs by itself."""
    made = packed(tmp_path, image, signing_key, compression)
    peak = peak_mib(install(root, made, signing_key, compression))
    print(f"{compression}: {peak:.1f} MiB")
    assert peak <= GOAL_MIB


@pytest.mark.parametrize("level", [("xz", 6), ("zstd", 19)], ids=["xz", "zstd"])
def test_the_memory_that_a_window_takes_is_seen_and_bounded_by_the_device(
    root: Path, image: Path, signing_key: PrivateKey, tmp_path: Path, level: tuple[str, int]
) -> None:
    """8 MiB, as other tools choose; it would also be seen if a writer chose that."""
    compression, effort = level
    wide = packed(tmp_path, image, signing_key, compression, level=effort, window_bytes=8 << 20)
    name = f"wide-{compression}"
    refused = install(root, wide, signing_key, name, "window_mib = 2\n")
    assert refused.count("updater: error: ") == 1, refused
    assert "takes a window of more than the 2 MiB allowed here" in refused
    assert not any((root / name / "b.img").read_bytes()), "before the slot was touched"
    shutil.rmtree(root / name)
    peak = peak_mib(install(root, wide, signing_key, name))
    narrow = packed(tmp_path, image, signing_key, compression, level=effort)
    less = peak_mib(install(root, narrow, signing_key, f"narrow-{compression}"))
    print(f"{compression}: {peak:.1f} MiB with a window of 8 MiB, {less:.1f} with one of 1 MiB")
    assert peak - less > WIDER_MIB
