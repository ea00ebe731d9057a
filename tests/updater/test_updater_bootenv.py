"""Boot environments with the real tools: fw_setenv and fw_printenv, grub-editenv."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from updater.device import bootenv, bootenv_grub
from updater.device.bootenv_grub import BLOCK_BYTES, GrubEnvironment, format_block, parse_block
from updater.device.bootenv_uboot import UBootEnvironment
from updater.device.config import Slot
from updater.device.errors import BootEnvError
from updater.device.model import Boot

SLOTS = (Slot("a", "/dev/vda2", 2), Slot("b", "/dev/vda3", 3))
SETTLED_A = {
    "mender_boot_part": "2",
    "mender_boot_part_hex": "2",
    "upgrade_available": "0",
    "bootcount": "0",
}

have_libubootenv = pytest.mark.skipif(
    not shutil.which("fw_setenv"), reason="fw_setenv is missing: apt-get install libubootenv-tool"
)
have_grub_editenv = pytest.mark.skipif(
    not shutil.which("grub-editenv"), reason="grub-editenv is missing: apt-get install grub-common"
)


class CutError(BaseException):
    """The power went away."""


# U-Boot


@pytest.fixture
def uboot(tmp_path: Path) -> tuple[UBootEnvironment, Path]:
    disk, config = tmp_path / "disk.img", tmp_path / "fw_env.config"
    with disk.open("wb") as file:
        file.truncate(2 << 20)
    config.write_text(f"{disk} 0x100000 0x4000\n{disk} 0x140000 0x4000\n")
    return UBootEnvironment(str(config)), disk


def spoil(disk: Path, offset: int) -> None:
    with disk.open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\xff" * 50)


@have_libubootenv
def test_uboot_keeps_what_is_written(uboot: tuple[UBootEnvironment, Path]) -> None:
    environment, _ = uboot
    with pytest.raises(BootEnvError, match="fw_printenv exited with"):
        environment.read()
    bootenv.settle(environment, SLOTS[0])
    assert environment.read() == SETTLED_A
    environment.write({"ethaddr": "02:00:00:00:00:01"})
    bootenv.start_trial(environment, SLOTS[1])
    assert bootenv.read_boot(environment, SLOTS) == Boot("b", trial=True)
    assert environment.read()["ethaddr"] == "02:00:00:00:00:01"
    bootenv.settle(environment, SLOTS[1])
    assert bootenv.read_boot(environment, SLOTS) == Boot("b", trial=False)


@have_libubootenv
def test_uboot_writes_one_copy_a_transaction_and_survives_its_loss(
    uboot: tuple[UBootEnvironment, Path],
) -> None:
    environment, disk = uboot
    bootenv.settle(environment, SLOTS[0])
    bootenv.settle(environment, SLOTS[0])
    before = disk.read_bytes()
    bootenv.start_trial(environment, SLOTS[1])
    after = disk.read_bytes()
    changed = [
        offset
        for offset in (0x100000, 0x140000)
        if before[offset : offset + 0x4000] != after[offset : offset + 0x4000]
    ]
    assert len(changed) == 1
    spoil(disk, changed[0])
    assert environment.read() == SETTLED_A
    spoil(disk, 0x100000)
    spoil(disk, 0x140000)
    with pytest.raises(BootEnvError):
        environment.read()
    bootenv.settle(environment, SLOTS[1])
    assert bootenv.read_boot(environment, SLOTS) == Boot("b", trial=False)


@have_libubootenv
def test_a_write_that_the_tool_ignores_is_noticed(
    uboot: tuple[UBootEnvironment, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap: lines without `=` are dropped with exit code 0."""
    environment, _ = uboot
    bootenv.settle(environment, SLOTS[0])
    honest = environment._run

    def old_syntax(command: list[str], stdin: bytes = b"") -> object:
        return honest(command, stdin.replace(b"=", b" "))

    monkeypatch.setattr(environment, "_run", old_syntax)
    with pytest.raises(BootEnvError, match="mender_boot_part reads back as '2' instead of '3'"):
        bootenv.start_trial(environment, SLOTS[1])


@have_libubootenv
def test_uboot_failures_name_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = UBootEnvironment(str(tmp_path / "absent.config"))
    with pytest.raises(BootEnvError, match=r"absent\.config\): fw_setenv exited with"):
        environment.write({"a": "1"})
    with pytest.raises(BootEnvError, match="cannot hold"):
        environment.write({"a": "1\nb=2"})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootEnvError, match="install libubootenv-tool"):
        environment.read()


# GRUB


@pytest.fixture
def grub(tmp_path: Path) -> GrubEnvironment:
    return make_grub(tmp_path)


def make_grub(directory: Path) -> GrubEnvironment:
    copies = []
    for name in ("mender_grubenv1", "mender_grubenv2"):
        (directory / name).mkdir(parents=True)
        (directory / name / "lock").write_bytes(format_block({"editing": "0"}))
        (directory / name / "env").write_bytes(format_block(SETTLED_A))
        copies.append(str(directory / name / "env"))
    return GrubEnvironment(*copies)


def grub_reads(directory: Path) -> dict[str, str]:
    """Read as grub.cfg does, with GRUB's own tool: copy 1 if editing=0, else copy 2."""
    chosen = "mender_grubenv1"
    if editenv(directory / chosen / "lock") != {"editing": "0"}:
        chosen = "mender_grubenv2"
    return editenv(directory / chosen / "env")


def by_the_rule(directory: Path) -> dict[str, str]:
    """Read like `grub_reads`, without starting a process (the format is checked above)."""
    blocks = {}
    for number in (1, 2):
        for name in ("lock", "env"):
            content = (directory / f"mender_grubenv{number}" / name).read_bytes()
            try:
                blocks[name, number] = parse_block(content)
            except ValueError:
                blocks[name, number] = {}
    return blocks["env", 1 if blocks["lock", 1] == {"editing": "0"} else 2]


def editenv(path: Path) -> dict[str, str]:
    done = subprocess.run(
        ["grub-editenv", str(path), "list"], capture_output=True, text=True, check=False
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines()) if not done.stderr else {}


@have_grub_editenv
def test_grub_reads_what_we_write_and_we_what_it_writes(
    tmp_path: Path, grub: GrubEnvironment
) -> None:
    bootenv.start_trial(grub, SLOTS[1])
    assert grub_reads(tmp_path) == grub.read()
    assert bootenv.read_boot(grub, SLOTS) == Boot("b", trial=True)
    env = tmp_path / "mender_grubenv1" / "env"
    subprocess.run(["grub-editenv", str(env), "set", "bootcount=1", "x=a b"], check=True)
    assert (grub.read()["bootcount"], grub.read()["x"]) == ("1", "a b")
    bootenv.settle(grub, SLOTS[1])
    both = [editenv(tmp_path / f"mender_grubenv{number}" / "env") for number in (1, 2)]
    assert both[0] == both[1] == grub.read()
    assert both[0]["x"] == "a b"


@have_grub_editenv
@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,10}", fullmatch=True),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
        max_size=8,
    )
)
def test_the_grub_format_matches_the_tool(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("format") / "env"
    subprocess.run(["grub-editenv", str(path), "create"], check=True)
    if values:
        pairs = [f"{key}={value}" for key, value in values.items()]
        subprocess.run(["grub-editenv", str(path), "set", *pairs], check=True)
    assert parse_block(path.read_bytes()) == values
    assert parse_block(format_block(values)) == values
    path.write_bytes(format_block(values))
    subprocess.run(["grub-editenv", str(path), "set", "probe=1"], check=True)
    assert parse_block(path.read_bytes()) == {**values, "probe": "1"}


def damage(whole: bytes) -> list[bytes]:
    """Return what a cut in the overwriting of a 1024-byte block may leave (but the two ends)."""
    return [
        b"\xa5" * 512 + whole[512:],
        whole[:512] + b"\xa5" * 512,
        b"\xa5" * BLOCK_BYTES,
    ]


@have_grub_editenv
@pytest.mark.parametrize("recover", ["retry", "settle-source"])
def test_a_cut_in_any_step_leaves_the_old_or_the_new_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recover: str
) -> None:
    """Torn sectors included, and again while the next write repairs the copies."""
    honest = bootenv_grub._overwrite
    # The cuts are made between whole overwrites; whether each is durable is not the question.
    monkeypatch.setattr(bootenv_grub.os, "fsync", lambda handle: None)
    new = {
        **SETTLED_A,
        "mender_boot_part": "3",
        "mender_boot_part_hex": "3",
        "upgrade_available": "1",
    }

    def cut_in(step: int, kind: int) -> Callable[[str, bytes], None]:
        count = 0

        def overwrite(path: str, block: bytes) -> None:
            nonlocal count
            count += 1
            if count == step:
                left = [None, block, *damage(block)][kind]
                if left is not None:
                    Path(path).write_bytes(left)
                raise CutError
            honest(path, block)

        return overwrite

    def write(environment: GrubEnvironment, values: Mapping[str, str]) -> bool:
        try:
            environment.write(values)
        except CutError:
            return False
        return True

    cases = 0
    for first in range(1, 7):
        for first_kind in range(5):
            for second in range(1, 10):
                directory = tmp_path / f"{first}-{first_kind}-{second}"
                environment = make_grub(directory)
                monkeypatch.setattr(bootenv_grub, "_overwrite", cut_in(first, first_kind))
                assert not write(environment, new)
                seen = grub_reads(directory) if second == 1 else by_the_rule(directory)
                assert seen in (SETTLED_A, new), f"cut in step {first}, kind {first_kind}"
                assert environment.read() == seen
                then = new if recover == "retry" else SETTLED_A
                monkeypatch.setattr(bootenv_grub, "_overwrite", cut_in(second, second % 5))
                if write(environment, then):
                    break
                assert by_the_rule(directory) in (seen, then), f"cuts in {first} and {second}"
                monkeypatch.setattr(bootenv_grub, "_overwrite", honest)
                assert write(environment, then)
                assert by_the_rule(directory) == environment.read() == then
                cases += 1
                shutil.rmtree(directory)
    assert cases > 150


def test_grub_files_are_overwritten_in_place(tmp_path: Path, grub: GrubEnvironment) -> None:
    """GRUB does not replay a journal: a replaced file could be invisible to it."""
    files = sorted(tmp_path.rglob("*"))
    before = [(path.stat().st_ino, path.stat().st_size) for path in files]
    bootenv.start_trial(grub, SLOTS[1])
    assert [(path.stat().st_ino, path.stat().st_size) for path in files] == before


def test_grub_with_no_valid_copy_says_so_and_can_be_settled(
    tmp_path: Path, grub: GrubEnvironment
) -> None:
    for path in tmp_path.rglob("env"):
        path.write_bytes(b"")
    with pytest.raises(BootEnvError, match="not a GRUB environment block"):
        grub.read()
    bootenv.settle(grub, SLOTS[0])
    assert grub.read() == SETTLED_A


def test_grub_refuses_what_does_not_fit(grub: GrubEnvironment) -> None:
    with pytest.raises(BootEnvError, match="the block has 1024"):
        grub.write({"x": "y" * 1000})
    with pytest.raises(BootEnvError, match="cannot be stored"):
        grub.write({"a=b": "c"})
    assert grub.read() == SETTLED_A
