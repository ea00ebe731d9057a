"""The targets on an SD card, booted: Linux on our own U-Boot, updated and rolled back by hand.

fw_setenv on the device is what the client uses too; here it stands alone, so that a failure is
the loader's or the image's.
"""

import http.server
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pexpect
import pytest

from images import Places, TargetImages, build_target
from images.keys import ensure_keys
from updater.artifact import write_artifact
from updater.artifact.signature import load_private_key

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

PROMPT = "root@brownout:~# "
BOOT_S = 90
TRIAL = "mender_boot_part=3\\nmender_boot_part_hex=3\\nupgrade_available=1\\nbootcount=0\\n"


class Board:
    """A machine's disks, and how to switch it on."""

    def __init__(self, images: TargetImages, directory: Path) -> None:
        facts = images.manifest["disks"]["v1"]
        self.images = images
        self.firmware = images.path(facts["firmware"])
        self.disks = {"vda": images.disk()}
        self.disks |= {n: images.path(f) for n, f in facts.get("other_disks", {}).items()}
        for name, image in self.disks.items():
            self.disks[name] = directory / f"{name}.img"
            copy = ["cp", "--sparse=always", image, self.disks[name]]
            subprocess.run(copy, check=True)
        self.all_on_sd = len(self.disks) == 1

    def write_slot_b(self, variant: str) -> None:
        """What an installer would do, done by the host."""
        layout = self.images.manifest["layout"]["partitions"]
        offset = next(p["offset"] for p in layout if p["name"] == "rootfs-b")
        with self.disks["vda"].open("r+b") as disk, self.images.rootfs(variant).open("rb") as new:
            disk.seek(offset)
            shutil.copyfileobj(new, disk)

    @contextmanager
    def on(self) -> Iterator[pexpect.spawn]:
        command = ["-nodefaults", "-nographic", "-M", "virt", "-cpu", "cortex-a57", "-m", "512"]
        command += ["-no-reboot", "-serial", "stdio", "-monitor", "none"]
        command += ["-bios", str(self.firmware)]
        card = self.disks["vda"] if self.all_on_sd else self.disks["mmc0"]
        command += ["-drive", f"if=none,id=mmc0,format=raw,file={card}"]
        command += ["-device", "sdhci-pci,addr=3", "-device", "sd-card,drive=mmc0"]
        if not self.all_on_sd:
            command += ["-drive", f"if=none,id=vda,format=raw,file={self.disks['vda']}"]
            command += ["-device", "virtio-blk-pci,drive=vda,addr=1"]
        command += ["-netdev", "user,id=net0"]
        command += ["-device", "virtio-net-pci,netdev=net0,romfile=,addr=2"]
        command += ["-device", "i6300esb,addr=5", "-action", "watchdog=reset"]
        child = pexpect.spawn(
            "qemu-system-aarch64", command, timeout=BOOT_S, encoding="utf-8", codec_errors="replace"
        )
        try:
            yield child
        finally:
            child.close(force=True)

    def ready(self, child: pexpect.spawn) -> tuple[str, str]:
        """(version, slot) of the ready line; then the shell's prompt."""
        child.expect(r"BROWNOUT READY version=(\S+) slot=(\S) boot_id=\S+")
        found = str(child.match[1]), str(child.match[2])
        child.expect_exact(PROMPT)
        return found

    def boot_to_reset(self) -> str:
        with self.on() as child:
            child.expect(pexpect.EOF)
            return str(child.before)

    def boot_to_ready(self) -> tuple[str, str]:
        with self.on() as child:
            return self.ready(child)


def say(child: pexpect.spawn, command: str) -> str:
    """Run a command at the shell; what it printed."""
    child.sendline(command)
    child.expect_exact("\r\n")
    child.expect_exact(PROMPT)
    return str(child.before)


def start_trial(child: pexpect.spawn) -> None:
    assert say(child, f"printf '{TRIAL}' | fw_setenv -s - && echo DO''NE").strip().endswith("DONE")
    assert "upgrade_available=1" in say(child, "fw_printenv upgrade_available")
    child.sendline("sync; reboot -f")
    child.expect(pexpect.EOF)


@pytest.fixture(scope="module")
def images(request: pytest.FixtureRequest) -> TargetImages:
    return build_target(request.param, ("v1", "v2", "panics", "hangs"))


@pytest.fixture
def board(images: TargetImages, tmp_path: Path) -> Board:
    return Board(images, tmp_path)


split = pytest.mark.parametrize("images", ["qemu-arm64-sd"], indirect=True)
"""The environment on the card, the slots on a virtio disk."""
both = pytest.mark.parametrize(
    "images",
    ["qemu-arm64-sd", pytest.param("qemu-arm64-sd-all", marks=pytest.mark.night)],
    indirect=True,
)
"""And everything on the card."""


@contextmanager
def served(directory: Path) -> Iterator[int]:
    """The files of a directory for the guest; the port on 10.0.2.2."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@both
def test_an_update_by_the_client_is_tried_committed_and_stays(board: Board, tmp_path: Path) -> None:
    write_artifact(
        tmp_path / "v2.mender",
        board.images.rootfs("v2"),
        name="v2",
        device_types=[board.images.target],
        key=load_private_key(ensure_keys(Places().build / "keys").artifact_key),
        level=1,
    )
    with served(tmp_path) as port, board.on() as child:
        assert board.ready(child) == ("v1", "a")
        assert "mmcblk0 0x400000 0x4000" in say(child, "cat /etc/fw_env.config")
        fetched = say(child, f"wget -q -O /data/v2 http://10.0.2.2:{port}/v2.mender; echo $?")
        assert fetched.strip() == "0"
        child.sendline("updater install /data/v2")
        child.expect("updater: installed v2 into slot b; reboot to start it", timeout=240)
        child.expect_exact(PROMPT)
        child.sendline("reboot -f")
        child.expect(pexpect.EOF)
    with board.on() as child:
        child.expect("BROWNOUT: booting slot b upgrade_available=1 bootcount=1")
        child.expect(r"updater: committed v2 \(slot b\)")
        assert board.ready(child) == ("v2", "b")
        assert "upgrade_available=0" in say(child, "fw_printenv upgrade_available")
    assert board.boot_to_ready() == ("v2", "b")


@split
def test_a_trial_that_the_client_knows_nothing_of_ends_in_the_old_system(board: Board) -> None:
    board.write_slot_b("v2")
    with board.on() as child:
        board.ready(child)
        start_trial(child)
    assert "BROWNOUT REBOOT" in board.boot_to_reset()
    with board.on() as child:
        assert board.ready(child) == ("v1", "a")
        shown = say(child, "fw_printenv upgrade_available bootcount mender_boot_part")
    assert re.findall(r"\w+=\d", shown) == [
        "upgrade_available=0",
        "bootcount=0",
        "mender_boot_part=2",
    ]


@pytest.mark.parametrize(
    ("images", "variant", "said"),
    [
        ("qemu-arm64-sd", "panics", "Kernel panic"),
        ("qemu-arm64-sd", "hangs", "INIT slot=b"),
        ("qemu-arm64-sd-all", "panics", "Kernel panic"),
    ],
    indirect=["images"],
)
def test_a_sick_update_ends_in_the_old_system(board: Board, variant: str, said: str) -> None:
    board.write_slot_b(variant)
    with board.on() as child:
        board.ready(child)
        start_trial(child)
    text = board.boot_to_reset()
    assert "booting slot b upgrade_available=1" in text
    assert said in text
    assert "BROWNOUT READY" not in text
    assert board.boot_to_ready() == ("v1", "a")


@split
def test_a_card_without_a_valid_copy_is_repaired_by_the_system_that_starts(board: Board) -> None:
    card = board.disks["mmc0"]
    copies = [(c["offset"], c["size"]) for c in board.images.manifest["layout"]["env"]["copies"]]
    with card.open("r+b") as file:
        for offset, size in copies:
            file.seek(offset)
            file.write(b"\xa5" * size)
    with board.on() as child:
        child.expect("bad CRC")
        child.expect("BROWNOUT ENV-RESTORED")
        assert board.ready(child) == ("v1", "a")
        child.sendline("sync; reboot -f")
        child.expect(pexpect.EOF)
    raw = card.read_bytes()
    for offset, size in copies:
        copy = raw[offset : offset + size]
        assert zlib.crc32(copy[5:]) == int.from_bytes(copy[:4], "little")
        assert b"\0mender_boot_part=2\0" in copy
    board.write_slot_b("v2")
    with board.on() as child:
        child.expect("Loading Environment from MMC... OK")
        board.ready(child)
        start_trial(child)
    text = board.boot_to_reset()
    assert "BROWNOUT: booting slot b upgrade_available=1 bootcount=1" in text
    assert "ENV-RESTORED" not in text
