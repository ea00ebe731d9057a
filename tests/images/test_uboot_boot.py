"""Our U-Boot in QEMU, with a real SD card image: counting, falling back, surviving bad copies.

The slots hold a kernel of one line (``uboot_payload.S``), so that a start takes under a second and
the boot loader alone is judged. Linux on the same loader: ``test_uboot_target.py``.
"""

import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pexpect
import pytest

from images import uboot
from images.bootenv import encode_environment
from images.ext4 import fixed_uuid
from images.gpt import Partition, write_gpt

MIB = 1 << 20
COPIES = (4 * MIB, 8 * MIB)
COPY_SIZE = 16 * 1024
SLOT_OFFSETS = {"a": 16 * MIB, "b": 20 * MIB}

pytestmark = [pytest.mark.emulated, pytest.mark.slow]


@dataclass
class Copy:
    valid: bool
    flags: int
    variables: dict[str, str]


class Card:
    """The SD card's image and the disk's, as files."""

    def __init__(self, directory: Path, slots: dict[str, Path | None], *, all_on_sd: bool) -> None:
        self.sd = directory / "sd.img"
        self.disk = None if all_on_sd else directory / "disk.img"
        self._make(self.sd, 64 * MIB, "bootenv")
        slots_on = self.disk or self.sd
        if self.disk:
            self._make(self.disk, 64 * MIB, None)
        self.slots_on = slots_on
        for name, image in slots.items():
            if image is not None:
                self.write(slots_on, SLOT_OFFSETS[name], image.read_bytes())

    def _make(self, path: Path, size: int, first: str | None) -> None:
        partitions = [
            Partition("rootfs-a", 2, SLOT_OFFSETS["a"], 4 * MIB),
            Partition("rootfs-b", 3, SLOT_OFFSETS["b"], 4 * MIB),
        ]
        if first:
            env = Partition(first, 1, 4 * MIB, 8 * MIB)
            partitions = [env, *partitions] if self.disk is None else [env]
        with path.open("wb") as file:
            file.truncate(size)
            write_gpt(file.fileno(), size, partitions, fixed_uuid(path.name))

    def write(self, path: Path, offset: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def set(self, flags: tuple[int, int] = (1, 0), **state: str | int) -> None:
        variables = uboot.stored_environment() | {k: str(v) for k, v in state.items()}
        for offset, flag in zip(COPIES, flags, strict=True):
            self.write(self.sd, offset, encode_environment(variables, COPY_SIZE, flag))

    def copies(self) -> list[Copy]:
        found = []
        raw = self.sd.read_bytes()
        for offset in COPIES:
            copy = raw[offset : offset + COPY_SIZE]
            (crc,) = struct.unpack_from("<I", copy)
            pairs = copy[5:].split(b"\0\0", 1)[0].split(b"\0")
            text = [p.decode("latin-1").partition("=") for p in pairs if b"=" in p]
            variables = {name: value for name, _, value in text}
            found.append(Copy(crc == zlib.crc32(copy[5:]), copy[4], variables))
        return found

    def current(self) -> dict[str, str]:
        good = [copy for copy in self.copies() if copy.valid]
        assert good, "no valid copy"
        if {copy.flags for copy in good} == {0, 255}:
            return next(copy for copy in good if copy.flags == 0).variables
        return max(good, key=lambda copy: copy.flags).variables

    def state(self) -> tuple[str, str, str]:
        now = self.current()
        return now["mender_boot_part"], now["upgrade_available"], now["bootcount"]


@contextmanager
def machine(card: Card, *extra: str) -> Iterator[pexpect.spawn]:
    """QEMU with the card; a reset of the guest ends it. Always gone afterwards."""
    command = ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", "-m", "512"]
    command += ["-display", "none", "-nodefaults", "-no-reboot", "-serial", "stdio"]
    command += ["-bios", str(uboot.build().binary), "-device", "sdhci-pci"]
    command += ["-drive", f"if=none,id=sd0,format=raw,file={card.sd}"]
    command += ["-device", "sd-card,drive=sd0"]
    if card.disk:
        command += ["-drive", f"if=none,id=vda,format=raw,file={card.disk}"]
        command += ["-device", "virtio-blk-pci,drive=vda"]
    child = pexpect.spawn(command[0], [*command[1:], *extra], timeout=30, encoding="latin-1")
    try:
        yield child
    finally:
        child.close(force=True)


def boot(card: Card, *extra: str) -> str:
    """Start once, up to the guest's reset; the console's text."""
    with machine(card, *extra) as child:
        child.expect(pexpect.EOF)
        return str(child.before)


@contextmanager
def prompt(card: Card) -> Iterator[pexpect.spawn]:
    """U-Boot's prompt, the automatic start interrupted with a key."""
    with machine(card) as child:
        child.expect("U-Boot 20")
        child.send(" ")
        child.expect("=> ")
        yield child


@pytest.fixture(scope="session")
def built() -> uboot.UbootBuild:
    return uboot.build()


@pytest.fixture(scope="session")
def payloads(built: uboot.UbootBuild, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """File systems of slots: ``a``, ``b``, ``hang``; real ext4, real arm64 Images."""
    tools = next((uboot.DEFAULT_CACHE / "uboot").glob("toolchain-*")) / "bin"
    images = {}
    for name, letter, hang in (("a", "A", 0), ("b", "B", 0), ("hang", "H", 1)):
        work = tmp_path_factory.mktemp(f"payload-{name}")
        boot_dir = work / "tree" / "boot"
        boot_dir.mkdir(parents=True)
        symbols = [f"--defsym=LETTER={ord(letter)}", f"--defsym=HANG={hang}"]
        source = Path(__file__).with_name("uboot_payload.S")
        assembler, objcopy = (tools / f"{uboot.CROSS_PREFIX}{t}" for t in ("as", "objcopy"))
        subprocess.run([assembler, *symbols, source, "-o", work / "k.o"], check=True)
        binary = [objcopy, "-O", "binary", work / "k.o", boot_dir / "vmlinuz"]
        subprocess.run(binary, check=True)
        (boot_dir / "initrd.img").write_bytes(bytes(512))
        images[name] = work / "rootfs.img"
        format_it = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", work / "tree"]
        subprocess.run([*format_it, images[name], "4M"], check=True)
    return images


@pytest.fixture(params=[False, True], ids=["virtio", "all-on-sd"])
def card(request: pytest.FixtureRequest, tmp_path: Path, payloads: dict[str, Path]) -> Card:
    slots: dict[str, Path | None] = {"a": payloads["a"], "b": payloads["b"]}
    return Card(tmp_path, slots, all_on_sd=request.param)


def test_a_trial_is_counted_started_once_and_rolled_back(card: Card) -> None:
    card.set(mender_boot_part=3, mender_boot_part_hex=3, upgrade_available=1)
    first = boot(card)
    assert "BROWNOUT: booting slot b upgrade_available=1 bootcount=1" in first
    assert "PAYLOAD B RUNS" in first
    assert card.state() == ("3", "1", "1")
    second = boot(card)
    assert "BROWNOUT: rolling back from partition 3" in second
    assert "BROWNOUT: booting slot a upgrade_available=0 bootcount=0" in second
    assert "PAYLOAD A RUNS" in second
    assert card.state() == ("2", "0", "0")
    assert card.current()["mender_boot_part_hex"] == "2"


def test_a_committed_slot_starts_for_ever_without_a_write(card: Card) -> None:
    card.set(mender_boot_part=3, mender_boot_part_hex=3)
    before = card.sd.read_bytes()
    for _ in range(3):
        assert "PAYLOAD B RUNS" in boot(card)
    assert card.sd.read_bytes() == before


@pytest.mark.parametrize("broken", [0, 1])
def test_one_bad_copy_changes_nothing(card: Card, broken: int) -> None:
    # The surviving copy is the older one when copy 0 breaks: both hold the same state here.
    card.set(mender_boot_part=3, mender_boot_part_hex=3, upgrade_available=1)
    card.write(card.sd, COPIES[broken] + 700, b"\xff" * 512)
    assert "PAYLOAD B RUNS" in boot(card)
    assert card.state() == ("3", "1", "1")
    # The script's own save has repaired the broken copy.
    assert all(copy.valid for copy in card.copies())
    assert "PAYLOAD A RUNS" in boot(card)


def test_the_higher_counter_wins_also_over_its_end(card: Card) -> None:
    for flags, newer in (((5, 6), 1), ((6, 5), 0), ((255, 0), 1), ((0, 255), 0)):
        card.set(flags, mender_boot_part=2)
        variables = uboot.stored_environment() | {"mender_boot_part": "3"}
        copy = encode_environment(variables, COPY_SIZE, flags[newer])
        card.write(card.sd, COPIES[newer], copy)
        assert "PAYLOAD B RUNS" in boot(card), flags


def test_without_a_valid_copy_the_first_slot_that_loads_is_started(card: Card) -> None:
    for offset in COPIES:
        card.write(card.sd, offset, os.urandom(COPY_SIZE))
    before = card.sd.read_bytes()
    assert "PAYLOAD A RUNS" in boot(card)
    card.write(card.slots_on, SLOT_OFFSETS["a"], bytes(4 * MIB))
    emptied = card.sd.read_bytes()
    assert "PAYLOAD B RUNS" in boot(card)
    assert card.sd.read_bytes() == emptied
    assert before[: COPIES[1] + COPY_SIZE] == emptied[: COPIES[1] + COPY_SIZE]


def test_a_trial_that_does_not_load_is_undone_in_the_same_start(card: Card) -> None:
    card.set(mender_boot_part=3, mender_boot_part_hex=3, upgrade_available=1)
    card.write(card.slots_on, SLOT_OFFSETS["b"], bytes(4 * MIB))
    text = boot(card)
    assert "BROWNOUT: partition 3 can not be loaded" in text
    assert "PAYLOAD A RUNS" in text
    assert card.state() == ("2", "0", "0")


def test_a_committed_slot_that_does_not_load_gives_way_for_one_start(card: Card) -> None:
    card.set(mender_boot_part=3, mender_boot_part_hex=3)
    card.write(card.slots_on, SLOT_OFFSETS["b"], bytes(4 * MIB))
    before = [copy.variables for copy in card.copies()]
    assert "PAYLOAD A RUNS" in boot(card)
    assert [copy.variables for copy in card.copies()] == before


def test_no_slot_at_all_is_said_and_ends_in_a_reset(card: Card) -> None:
    card.set()
    for offset in SLOT_OFFSETS.values():
        card.write(card.slots_on, offset, bytes(4 * MIB))
    text = boot(card)
    assert "BROWNOUT: no slot can be booted" in text
    assert "PAYLOAD" not in text


def test_a_trial_that_cannot_be_recorded_is_not_started(
    tmp_path: Path, payloads: dict[str, Path]
) -> None:
    card = Card(tmp_path, {"a": payloads["a"], "b": payloads["b"]}, all_on_sd=False)
    card.set(mender_boot_part=3, mender_boot_part_hex=3, upgrade_available=1)
    # A card whose writes all fail, as worn-out cards do.
    rules = tmp_path / "blkdebug.conf"
    rules.write_text('[inject-error]\nevent = "pwritev"\nerrno = "5"\n', "utf-8")
    card.sd, real = Path(f"blkdebug:{rules}:{card.sd}"), card.sd
    text = boot(card)
    assert "BROWNOUT: the environment could not be written" in text
    assert "PAYLOAD A RUNS" in text
    card.sd = real
    assert card.state() == ("3", "1", "0")


def test_a_kernel_that_hangs_at_once_is_reset_by_the_watchdog_and_rolled_back(
    tmp_path: Path, payloads: dict[str, Path]
) -> None:
    card = Card(tmp_path, {"a": payloads["a"], "b": payloads["hang"]}, all_on_sd=False)
    card.set(mender_boot_part=3, mender_boot_part_hex=3, upgrade_available=1, bo_ticks="400")
    watchdog = ("-device", "i6300esb,addr=05", "-action", "watchdog=reset")
    text = boot(card, *watchdog)
    assert "BROWNOUT: watchdog armed" in text
    assert "PAYLOAD H RUNS" in text
    assert "PAYLOAD A RUNS" in boot(card, *watchdog)
    assert card.state() == ("2", "0", "0")


def test_saveenv_by_hand_alternates_between_the_copies(card: Card) -> None:
    card.set()
    with prompt(card) as child:
        for value in "one", "two", "three":
            child.sendline(f"setenv canary {value}; saveenv")
            child.expect("OK")
            child.expect("=> ")
    copies = card.copies()
    assert [copy.valid for copy in copies] == [True, True]
    assert [copy.variables["canary"] for copy in copies] == ["two", "three"]
    assert [copy.flags for copy in copies] == [3, 4]


def test_linux_tools_read_and_write_the_same_copies(card: Card, tmp_path: Path) -> None:
    """libubootenv as a peer, on the image file: what it sets, U-Boot obeys."""
    card.set()
    config = tmp_path / "fw_env.config"
    config.write_text("".join(f"{card.sd} {offset:#x} {COPY_SIZE:#x}\n" for offset in COPIES))
    script = tmp_path / "script"
    script.write_text("mender_boot_part=3\nmender_boot_part_hex=3\nupgrade_available=1\n")
    lock = ["env", f"TMPDIR={tmp_path}"]
    subprocess.run([*lock, "fw_setenv", "-c", config, "-s", script], check=True)
    assert card.state() == ("3", "1", "0")
    assert "PAYLOAD B RUNS" in boot(card)
    shown = subprocess.run(
        [*lock, "fw_printenv", "-c", config, "bootcount"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == "bootcount=1"
