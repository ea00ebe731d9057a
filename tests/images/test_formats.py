"""The builder's own writers, held against independent readers: the rig's, and the host's tools."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.disk.grubenv import parse_grub_environment
from images.bootenv import encode_environment, encode_grubenv, parse_script
from images.cpio import CpioArchive
from images.elf import missing_libraries, needed_libraries
from images.errors import ImageTooLargeError, RecipeError
from images.ext4 import MIB, make_ext4
from images.gpt import Partition, write_gpt
from images.host import find_tool

NAMES = st.from_regex(r"\A[a-z_][a-z0-9_]{0,15}\Z")
VALUES = st.from_regex(r"\A[ -~]{0,40}\Z")


def crc_is_right(data: bytes) -> bool:
    return data[:4] == struct.pack("<I", zlib.crc32(data[5:]))


@given(st.dictionaries(NAMES, VALUES, max_size=10), st.integers(0, 255))
def test_a_redundant_environment_holds_what_was_put_in(
    variables: dict[str, str], flags: int
) -> None:
    data = encode_environment(variables, 0x4000, flags)
    assert len(data) == 0x4000
    assert crc_is_right(data)
    assert data[4] == flags
    text = data[5 : data.index(b"\0\0", 4 if not variables else 5)] if variables else b""
    found = dict(e.decode().split("=", 1) for e in text.split(b"\0") if e)
    assert found == variables


def test_an_environment_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RecipeError, match="59 fit"):
        encode_environment({"a": "b" * 64}, 64, 1)


@given(st.dictionaries(NAMES, st.from_regex(r"\A[a-z0-9]{0,20}\Z"), max_size=8))
def test_a_grub_environment_block_is_read_back_by_the_rig(variables: dict[str, str]) -> None:
    found = parse_grub_environment(encode_grubenv(variables))
    assert found.valid
    assert dict(found.variables) == variables


def test_a_boot_script_is_joined_and_filled_in() -> None:
    text = "# no\nplain = a b\nscript {\n  # no\n  echo one;\n  echo @X@\n}\n"
    assert parse_script(text, {"X": "two"}) == {"plain": "a b", "script": "echo one; echo two"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("what is this", "line 1 is not understood"),
        ("a = 1\na = 2", "line 2: a is set twice"),
        ("a {\nx", "the block a isn't closed"),
        ("a = @B@", "wants @B@"),
    ],
)
def test_a_wrong_boot_script_is_refused_with_its_line(text: str, cause: str) -> None:
    with pytest.raises(RecipeError, match=cause):
        parse_script(text, {})


def test_a_partition_table_is_accepted_by_sfdisk(tmp_path: Path) -> None:
    sfdisk = shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin")
    if sfdisk is None:
        pytest.skip("sfdisk is not installed")
    disk = tmp_path / "disk"
    size = 16 * MIB
    with disk.open("wb+") as file:
        file.truncate(size)
        partitions = [
            Partition("rootfs-a", 2, 2 * MIB, 4 * MIB),
            Partition("bootenv", 1, MIB, MIB),
            Partition("data", 4, 10 * MIB, 5 * MIB),
        ]
        write_gpt(file.fileno(), size, partitions, uuid.UUID(int=7))
    assert subprocess.run([sfdisk, "--verify", disk], check=False).returncode == 0
    shown = subprocess.run([sfdisk, "-d", disk], check=True, capture_output=True, text=True).stdout
    assert "start=        4096, size=        8192" in shown
    assert 'name="rootfs-a"' in shown
    # Both tables must serve alone.
    with disk.open("rb+") as file:
        file.seek(512)
        file.write(bytes(512))
    again = subprocess.run([sfdisk, "-d", disk], check=False, capture_output=True, text=True)
    assert 'name="data"' in again.stdout


def test_a_partition_over_a_table_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb+") as file, pytest.raises(ValueError, match="overlaps"):
        write_gpt(file.fileno(), MIB, [Partition("x", 1, 0, MIB)], uuid.UUID(int=7))


def test_an_initramfs_is_unpacked_by_cpio(tmp_path: Path) -> None:
    cpio = shutil.which("cpio")
    if cpio is None:
        pytest.skip("cpio is not installed")
    archive = CpioArchive()
    archive.add_directory("d")
    archive.add_file("d/odd", b"abc", 0o755)
    archive.add_symlink("l", "d/odd")
    subprocess.run([cpio, "-id", "--quiet"], input=archive.data(), cwd=tmp_path, check=True)
    assert (tmp_path / "l").read_bytes() == b"abc"
    assert (tmp_path / "d/odd").stat().st_mode & 0o777 == 0o755


def _tree(root: Path, order: list[str]) -> Path:
    for name in order:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(name.encode()).digest() * 200)
        path.chmod(0o640)
    (root / "link").symlink_to("a")
    for path in (*root.rglob("*"), root):
        os.utime(path, (5, 5), follow_symlinks=False)
    return root


def test_the_same_tree_gives_the_same_ext4_whatever_the_host_did(tmp_path: Path) -> None:
    names = ["a", "b/c", "b/d", "z"]
    images = []
    for number, order in enumerate((names, names[::-1])):
        image = tmp_path / f"{number}.img"
        tree = _tree(tmp_path / str(number), order)
        make_ext4(image, name="t", label="t", timestamp=1_700_000_000, tree=tree)
        images.append(image.read_bytes())
    assert images[0] == images[1]


def test_files_in_an_ext4_belong_to_root_and_have_the_set_time(tmp_path: Path) -> None:
    image = tmp_path / "i"
    tree = _tree(tmp_path / "t", ["a", "b/c"])
    if os.geteuid() == 0:
        os.chown(tree / "a", 65534, 65534)
    make_ext4(image, name="t", label="t", timestamp=1_700_000_000, tree=tree)
    debugfs = find_tool("debugfs")
    for name in ("/a", "/b", "/b/c", "/link"):
        said = subprocess.run(
            [debugfs, "-R", f"stat {name}", image], check=True, capture_output=True, text=True
        ).stdout
        assert "User:     0   Group:     0" in said
        assert said.count("0x6553f100:00000000") == 4


def test_a_tree_larger_than_its_file_system_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "t"
    tree.mkdir()
    (tree / "big").write_bytes(os.urandom(3 * MIB))
    with pytest.raises(ImageTooLargeError, match="needs 3 MiB, its file system has 2 MiB"):
        make_ext4(tmp_path / "i", name="t", label="t", timestamp=1, tree=tree, size=2 * MIB)


def test_libraries_a_program_needs_are_found_missing(tmp_path: Path) -> None:
    shell = Path("/bin/sh").resolve()
    needed = needed_libraries(shell.read_bytes())
    assert "libc.so.6" in needed
    (tmp_path / "sh").write_bytes(shell.read_bytes())
    assert f"sh needs {needed[0]}" in missing_libraries(tmp_path)
    for name in needed:
        (tmp_path / name).write_bytes(b"")
    assert missing_libraries(tmp_path) == []


def test_the_writer_of_archives_marks_its_devices() -> None:
    archive = CpioArchive()
    archive.add_character_device("dev/console", 5, 1)
    header = io.BytesIO(archive.data()).read(110)
    fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
    assert stat.S_ISCHR(fields[1])
    assert (fields[9], fields[10]) == (5, 1)
