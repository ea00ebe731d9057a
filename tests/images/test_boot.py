"""What the bootloaders and images do when they are started: the boot contract, on real machines.

Two targets, the same sentences; what differs is how Linux writes the boot variables.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Disk
from machine import Machine

from images import TargetImages, build_target
from images.host import run

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

TARGETS = ("qemu-arm64", "qemu-x86_64")
GARBAGE = b"\xa5"


@dataclass
class Bench:
    """A target's disk and the means to run it."""

    disk: Disk
    log: Path
    variant: str = "v1"

    @property
    def images(self) -> TargetImages:
        return self.disk.images

    def on(self) -> Machine:
        return Machine(self.images, self.disk.path, self.log, self.variant)

    def boot(self, *commands: str) -> tuple[str, str]:
        """Power on, wait until ready, run commands, pull the plug."""
        with self.on() as machine:
            found = machine.boot()
            for command in commands:
                machine.run(command)
            return found

    def variables(self, machine: Machine) -> dict[str, str]:
        """The boot variables, as Linux reads them."""
        if self.is_uboot:
            text = machine.run("fw_printenv")
        else:
            text = machine.run("grub-editenv /boot/grub/mender_grubenv1/env list")
        return dict(line.split("=", 1) for line in text.splitlines())

    @property
    def is_uboot(self) -> bool:
        return bool(self.images.manifest["bootloader"] == "uboot")

    def set_command(self, **values: str) -> str:
        """A shell command that sets boot variables durably."""
        if self.is_uboot:
            lines = "".join(f"{name}={value}\\n" for name, value in values.items())
            return f"printf '{lines}' > /tmp/e && fw_setenv -s /tmp/e && sync"
        words = " ".join(f"{name}={value}" for name, value in values.items())
        place = "/boot/grub/mender_grubenv$i/env"
        return f"for i in 1 2; do grub-editenv {place} set {words}; done; sync"

    def trial_command(self) -> str:
        """What an installer does last."""
        return self.set_command(
            mender_boot_part="3", mender_boot_part_hex="3", upgrade_available="1", bootcount="0"
        )

    def said(self, text: str) -> int:
        """How often the console said something, over all power-ons."""
        return self.log.read_text().count(text)

    def damage_copies(self, *numbers: int) -> None:
        """Overwrite a sector of copies of the boot variables, as a torn write would."""
        offsets = self._copy_offsets()
        for number in numbers:
            self.disk.write(offsets[number - 1], GARBAGE * 512)

    def _copy_offsets(self) -> list[int]:
        if self.is_uboot:
            return [copy["offset"] for copy in self.images.manifest["layout"]["env"]["copies"]]
        offsets = []
        for copy in self.images.manifest["layout"]["env"]["copies"]:
            boot = self.disk.partitions[copy["partition"]]
            image = self.log.with_name("boot.img")
            image.write_bytes(self.disk.read(boot["offset"], boot["size"]))
            blocks = run(["debugfs", "-R", f"blocks {copy['path']}", image]).stdout.split()
            offsets.append(boot["offset"] + int(blocks[0]) * 1024)
        return offsets


@pytest.fixture(params=TARGETS)
def bench(
    request: pytest.FixtureRequest,
    built: Callable[..., TargetImages],
    make_disk: Callable[..., Disk],
    tmp_path: Path,
) -> Bench:
    return Bench(make_disk(built(request.param, "v1", "v2", "panics", "hangs")), tmp_path / "log")


def test_boots_to_ready_with_everything_the_client_needs(bench: Bench) -> None:
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        variables = bench.variables(machine)
        assert variables["mender_boot_part"] == "2"
        assert variables["upgrade_available"] == "0"
        machine.run("python3 -c 'import ssl, sqlite3, zstandard, cryptography.x509, tomllib, lzma'")
        machine.run("for check in /etc/updater/health.d/*; do $check || exit 1; done")
        assert "ro," in machine.run("grep ' / ext4' /proc/mounts")
        assert "rw," in machine.run("grep ' /data ext4' /proc/mounts")
        machine.run("grep -q updates.brownout.test /etc/hosts")
        machine.run("grep -q 'BEGIN CERTIFICATE' /etc/updater/server-ca.pem")
    images = bench.images
    slot = bench.disk.partitions["rootfs-a"]
    assert bench.said("watchdog armed") == 1
    assert bench.disk.read(slot["offset"], images.manifest["variants"]["v1"]["size"]) == (
        images.rootfs("v1").read_bytes()
    ), "running a slot changed it"


def test_an_uncommitted_trial_runs_once_and_is_taken_back(bench: Bench) -> None:
    bench.disk.put("b", "v2")
    bench.boot(bench.trial_command())
    with bench.on() as machine:
        assert machine.boot() == ("v2", "b")
        variables = bench.variables(machine)
        assert (variables["upgrade_available"], variables["bootcount"]) == ("1", "1")
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        variables = bench.variables(machine)
        assert (variables["upgrade_available"], variables["bootcount"]) == ("0", "0")
        assert variables["mender_boot_part"] == variables["mender_boot_part_hex"] == "2"
    assert bench.said("BROWNOUT: rolling back from partition 3") == 1


def test_a_committed_trial_stays(bench: Bench) -> None:
    bench.disk.put("b", "v2")
    bench.boot(bench.trial_command())
    assert bench.boot(bench.set_command(upgrade_available="0")) == ("v2", "b")
    assert bench.boot() == ("v2", "b")
    assert bench.said("rolling back") == 0


@pytest.mark.parametrize(
    ("variant", "limit_s"), [("panics", 90), pytest.param("hangs", 150, marks=pytest.mark.night)]
)
def test_a_system_that_never_gets_ready_is_taken_back(
    bench: Bench, variant: str, limit_s: int
) -> None:
    bench.disk.put("b", variant)
    bench.boot(bench.trial_command())
    with bench.on() as machine:
        machine.wait_off(limit_s)
    assert bench.boot() == ("v1", "a")
    assert bench.said("BROWNOUT READY version=" + variant) == 0


def test_a_trial_that_cannot_be_loaded_is_taken_back_at_once(bench: Bench) -> None:
    bench.boot(bench.trial_command())
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        assert bench.variables(machine)["upgrade_available"] == "0"
    assert bench.said("BROWNOUT: partition 3 can not be loaded") == 1


def test_a_committed_slot_that_cannot_be_loaded_gives_way_without_a_write(bench: Bench) -> None:
    bench.disk.put("b", "v2")
    bench.disk.destroy_slot("a")
    with bench.on() as machine:
        assert machine.boot() == ("v2", "b")
        assert bench.variables(machine)["mender_boot_part"] == "2"


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.night)])
def test_one_damaged_copy_changes_nothing(bench: Bench, number: int) -> None:
    bench.disk.put("b", "v2")
    to_b = bench.set_command(mender_boot_part="3", mender_boot_part_hex="3")
    # Twice, because U-Boot's copies take turns: both must say the same to be interchangeable.
    bench.boot(to_b, to_b)
    bench.damage_copies(number)
    assert bench.boot() == ("v2", "b")
    assert bench.said("no valid environment") == 0


@pytest.mark.parametrize("destroyed", [pytest.param("none", marks=pytest.mark.night), "a"])
def test_without_any_valid_copy_a_slot_that_loads_is_started_and_recorded(
    bench: Bench, destroyed: str
) -> None:
    bench.disk.put("b", "v2")
    if destroyed == "a":
        bench.disk.destroy_slot("a")
    bench.damage_copies(1, 2)
    expected = ("v2", "b") if destroyed == "a" else ("v1", "a")
    with bench.on() as machine:
        assert machine.boot() == expected
        part = "3" if destroyed == "a" else "2"
        assert bench.variables(machine)["mender_boot_part"] == part
        machine.run("sync")
    assert bench.boot() == expected
    assert bench.said("no valid environment") == 1
    assert bench.said("ENV-RESTORED") == 1


def test_the_pc_survives_the_loss_of_its_boot_partitions(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    bench = Bench(make_disk(built("qemu-x86_64", "v2")), tmp_path / "log")
    for name in ("boot", "boot-2"):
        boot = bench.disk.partitions[name]
        bench.disk.write(boot["offset"], GARBAGE * boot["size"])
    assert bench.boot() == ("v1", "a")
    assert bench.boot(bench.set_command(bootcount="0")) == ("v1", "a")
    assert bench.said("ENV-RESTORED") == 1


@pytest.mark.parametrize("lost", ["boot", pytest.param("boot-2", marks=pytest.mark.night)])
def test_the_pc_makes_a_lost_copy_anew_from_the_other(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path, lost: str
) -> None:
    bench = Bench(make_disk(built("qemu-x86_64", "v2")), tmp_path / "log")
    bench.disk.put("b", "v2")
    bench.boot(bench.set_command(mender_boot_part="3", mender_boot_part_hex="3"))
    partition = bench.disk.partitions[lost]
    bench.disk.write(partition["offset"], GARBAGE * partition["size"])
    assert bench.boot() == ("v2", "b")
    # Now the other one is lost, and what counts is the copy that was made anew.
    other = bench.disk.partitions["boot-2" if lost == "boot" else "boot"]
    bench.disk.write(other["offset"], GARBAGE * other["size"])
    assert bench.boot() == ("v2", "b")
    assert bench.boot() == ("v2", "b")
    assert bench.said("ENV-RESTORED") == 0


def test_a_trial_whose_attempt_cannot_be_recorded_is_not_started(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    bench = Bench(make_disk(built("qemu-arm64", "v2")), tmp_path / "log")
    bench.disk.put("b", "v2")
    bench.boot(bench.trial_command())
    copies = bench.images.manifest["layout"]["env"]["copies"]
    broken = bench.on()
    broken.fail_writes([copy["offset"] // 512 for copy in copies])
    with broken as machine:
        assert machine.boot() == ("v1", "a")
    assert bench.said("the environment could not be written") == 1
    assert bench.boot() == ("v2", "b"), "once the disk takes writes again, the trial is made"


def test_a_data_partition_that_cannot_be_mounted_is_said_and_survived(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    bench = Bench(make_disk(built("qemu-arm64", "v2")), tmp_path / "log")
    data = bench.disk.partitions["data"]
    bench.disk.write(data["offset"], GARBAGE * data["size"])
    assert bench.boot("touch /data/x") == ("v1", "a")
    assert bench.said("BROWNOUT DATA-FAILED") == 1


@pytest.mark.parametrize("sectors", [(2, 1), (8, 1), pytest.param((0, 8), marks=pytest.mark.night)])
def test_a_data_partition_whose_head_is_torn_is_mended_from_the_copies_of_it(
    built: Callable[..., TargetImages],
    make_disk: Callable[..., Disk],
    tmp_path: Path,
    sectors: tuple[int, int],
) -> None:
    bench = Bench(make_disk(built("qemu-arm64", "v2")), tmp_path / "log")
    bench.boot("echo kept > /data/x; sync")
    first, count = sectors
    offset = bench.disk.partitions["data"]["offset"] + 512 * first
    bench.disk.write(offset, GARBAGE * (512 * count))
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        assert machine.run("cat /data/x") == "kept"
    assert bench.said("BROWNOUT DATA-REPAIR") == 1
    assert bench.said("BROWNOUT DATA-FAILED") == 0


def test_a_torn_head_before_a_damaged_directory_is_mended(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    """A start looks for a copy with `e2fsck -n`, which can't get past such a directory."""
    bench = Bench(make_disk(built("qemu-arm64", "v2")), tmp_path / "log")
    bench.boot("echo kept > /data/x; sync")
    partition = bench.disk.partitions["data"]
    part = tmp_path / "data.img"
    part.write_bytes(bench.disk.read(partition["offset"], partition["size"]))
    found = subprocess.run(
        ["debugfs", "-R", "blocks /lost+found", part], check=True, capture_output=True, text=True
    )
    bench.disk.write(partition["offset"] + 4096 * int(found.stdout.split()[0]), GARBAGE * 4096)
    bench.disk.write(partition["offset"] + 1024, GARBAGE * 512)
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        assert machine.run("cat /data/x") == "kept"
    assert bench.said("BROWNOUT DATA-FAILED") == 0


def test_damage_behind_a_superblock_that_says_clean_is_mended(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    """What a repair leaves that a cut has ended; `e2fsck -y` would believe the superblock."""
    bench = Bench(make_disk(built("qemu-arm64", "v2")), tmp_path / "log")
    bench.boot("mkdir /data/d; echo kept > /data/x; sync")
    partition = bench.disk.partitions["data"]
    part = tmp_path / "data.img"
    part.write_bytes(bench.disk.read(partition["offset"], partition["size"]))
    subprocess.run(["e2fsck", "-fy", part], check=False, capture_output=True)
    subprocess.run(["debugfs", "-w", "-R", "clri /d", part], check=True, capture_output=True)
    believing = subprocess.run(["e2fsck", "-y", part], check=False, capture_output=True)
    assert believing.returncode == 0, "it is not noticed without -f"
    bench.disk.write(partition["offset"], part.read_bytes())
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        assert machine.run("cat /data/x") == "kept"
        device = machine.run("mount | grep ' /data ' | cut -d' ' -f1")
        machine.run("umount /data")
        assert machine.run(f"e2fsck -fn {device} > /dev/null 2>&1; echo $?") == "0"


def test_offline_and_unhealthy_fail_the_checks_they_should(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    images = built("qemu-arm64", "offline", "unhealthy")
    for variant, failing in (("offline", "10-network"), ("unhealthy", "50-sick")):
        bench = Bench(make_disk(images), tmp_path / f"log-{variant}")
        bench.disk.put("a", variant)
        with bench.on() as machine:
            assert machine.boot() == (variant, "a")
            said = machine.run(
                "for c in /etc/updater/health.d/*; do $c 2>/dev/null || echo bad ${c##*/}; done"
            )
            assert said == f"bad {failing}"


def test_a_system_that_is_just_ready_is_healthy(bench: Bench) -> None:
    with bench.on() as machine:
        machine.boot()
        machine.run("/etc/updater/health.d/10-network")


def test_a_single_environment_is_the_flaw_it_says(
    built: Callable[..., TargetImages], make_disk: Callable[..., Disk], tmp_path: Path
) -> None:
    images = built("qemu-arm64", "v1+single-env")
    name = "v1+single-env"
    bench = Bench(make_disk(images, name), tmp_path / "log", name)
    config = "grep -v '^#' /etc/fw_env.config | sort -u | wc -l"
    with bench.on() as machine:
        assert machine.boot() == (name, "a")
        assert machine.run(config) == "1"
    bench.damage_copies(1)
    bench.boot()
    assert bench.said("no valid environment") == 1


def test_the_real_client_gets_ready_and_reports(tmp_path: Path) -> None:
    images = build_target("qemu-arm64", ("v1",), relock_if_gone=True)
    bench = Bench(Disk(images, tmp_path / "disk.img"), tmp_path / "log")
    with bench.on() as machine:
        assert machine.boot() == ("v1", "a")
        assert "slot a" in machine.run("updater status")
    assert bench.said("Traceback") == 0
