"""`python -m images boot`: a reset of the guest's starts QEMU again, everything else ends it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from images import console
from images.builder import TargetImages
from images.errors import ImageError

ROOT = Path(__file__).parents[2]

#: At a PC's reset vector: ask the keyboard controller for a reset, then stand still.
RESETS = bytes.fromhex("b0fee664f4ebfd")
STANDS_STILL = bytes.fromhex("f4ebfd")


def machine(tmp_path: Path, code: bytes) -> list[str]:
    """A PC whose firmware is a few bytes at the reset vector, 16 below its end."""
    firmware = tmp_path / "firmware"
    firmware.write_bytes(bytes(65536 - 16) + code.ljust(16, b"\x90"))
    return [
        "qemu-system-x86_64", "-M", "pc,accel=tcg", "-nodefaults", "-display", "none", "-no-reboot",
        "-bios", str(firmware),
    ]  # fmt: skip


def test_a_reset_of_the_guest_is_told_from_a_person_who_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert console._run_once(machine(tmp_path, RESETS)) is True
    monkeypatch.setattr(console, "_EVENTS", console._EVENTS + '{"execute":"quit"}\n')
    assert console._run_once(machine(tmp_path, STANDS_STILL)) is False


def test_a_watchdogs_reset_counts_and_a_switched_off_guest_does_not() -> None:
    watchdog = '{"event": "WATCHDOG", "data": {"action": "reset"}}\n'
    reset = '{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}\n'
    off = '{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}\n'
    assert console.was_reset(f'{{"QMP": {{}}}}\n{watchdog}{reset}')
    assert console.was_reset(reset)
    assert not console.was_reset(off)
    assert not console.was_reset("")
    assert not console.was_reset("torn {")


def test_qemu_that_does_not_start_is_one_line() -> None:
    with pytest.raises(ImageError, match="exit code"):
        console._run_once(["false"])


def test_a_target_with_an_sd_card_is_refused(tmp_path: Path) -> None:
    manifest = {"disks": {"v1": {"file": "disk.img", "other_disks": {"mmc0": "sd.img"}}}}
    images = TargetImages("qemu-arm64-sd", tmp_path, manifest)
    with pytest.raises(ImageError, match="rig file"):
        console.command_line(images, tmp_path / "disk.img")


def test_a_persons_pc_has_the_processor_of_its_rig():
    rig = yaml.safe_load((ROOT / "rigs" / "qemu-x86_64.yaml").read_text())
    driver = rig["targets"]["main"]["drivers"]["RecordedQEMUDriver"]
    assert driver["cpu"] == console.X86_CPU
