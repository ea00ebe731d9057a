"""Layout readers against what the real tools write, and against damage."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from disk_nbd_client import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.disk import (
    DeviceSpec,
    LayoutError,
    LazyDisk,
    Recorder,
    build_copy,
    check_ext4,
    compare_with_image,
    ext4check,
    open_file_system,
    parse_copy,
    parse_environment,
    parse_grub_environment,
    parse_grub_environments,
    read_environment,
    read_gpt,
    read_grub_environments,
    region_sha256,
)
from framework.disk.ext4check import Ext4Image, Repair
from framework.disk.files import ExtReader
from framework.disk.lazy import UNREADABLE, new_map

MIB = 1 << 20
S = 512


def needs(*tools: str):
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [t for t in tools if shutil.which(t, path=path) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing")


def run(*command: object, stdin: str | None = None) -> str:
    return subprocess.run(
        [str(c) for c in command],
        input=stdin,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
    ).stdout


def disk_of(path: Path) -> LazyDisk:
    size = path.stat().st_size
    journal = path.with_suffix(".nojournal")
    journal.touch()
    return LazyDisk("vda", new_map(size, size), path, journal)


# ---------------------------------------------------------------- GPT


@pytest.fixture
def gpt_image(tmp_path: Path) -> Path:
    path = tmp_path / "gpt.img"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    table = (
        'label: gpt\nstart=2048, size=2048, name="bootenv"\n'
        'start=4096, size=8192, name="rootfs-a"\nstart=12288, size=8192, name="rootfs-b"\n'
    )
    run("sfdisk", "-q", path, stdin=table)
    return path


@needs("sfdisk")
def test_gpt_as_sfdisk_writes_it(gpt_image):
    with disk_of(gpt_image) as disk:
        table = read_gpt(disk)
    assert [p.name for p in table.partitions] == ["bootenv", "rootfs-a", "rootfs-b"]
    part = table.partition("rootfs-a")
    assert (part.number, part.offset, part.length) == (2, 4096 * S, 8192 * S)
    assert table.partition(3).name == "rootfs-b"
    assert table.problems == ()
    with pytest.raises(KeyError, match="data"):
        table.partition("data")


@needs("sfdisk")
@pytest.mark.parametrize("sector", [1, 2])
def test_a_damaged_primary_falls_back_to_the_backup(gpt_image, sector):
    with gpt_image.open("r+b") as file:
        file.seek(sector * S + 20)
        file.write(b"\xff")
    with disk_of(gpt_image) as disk:
        table = read_gpt(disk)
        assert table.from_backup
        assert "primary" in table.problems[0]
        assert table.partition("rootfs-b").offset == 12288 * S


@needs("sfdisk")
def test_a_damaged_backup_is_told_and_none_is_an_error(gpt_image):
    with gpt_image.open("r+b") as file:
        file.seek(32 * MIB - S)
        file.write(bytes(S))
    with disk_of(gpt_image) as disk:
        assert "backup" in read_gpt(disk).problems[0]
    with gpt_image.open("r+b") as file:
        file.seek(S)
        file.write(bytes(S))
    with disk_of(gpt_image) as disk, pytest.raises(LayoutError, match="no valid GPT"):
        read_gpt(disk)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=4 * S, max_size=8 * S).map(lambda d: d[: len(d) // S * S]))
def test_no_content_breaks_the_readers(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "any.img"
    path.write_bytes(data[:S] + b"EFI PART" + data[S + 8 :])
    with disk_of(path) as disk:
        with pytest.raises(LayoutError):
            read_gpt(disk)
        with pytest.raises(LayoutError):
            open_file_system(disk, 0, len(data)).list_directory("/")


# ---------------------------------------------------------------- U-Boot


@needs("mkenvimage")
def test_environments_as_mkenvimage_writes_them(tmp_path):
    text = tmp_path / "env.txt"
    text.write_text("bootcount=0\nmender_boot_part=2\nbootcmd=run a; run b\n")
    expected = {"bootcount": "0", "mender_boot_part": "2", "bootcmd": "run a; run b"}
    for options, redundant in ((["-r"], True), ([], False)):
        out = tmp_path / "env.bin"
        run("mkenvimage", *options, "-p", "0", "-s", "16384", "-o", out, text)
        copy = parse_copy(out.read_bytes(), redundant=redundant)
        assert copy.valid
        assert copy.variables == expected
        assert not parse_copy(out.read_bytes(), redundant=not redundant).valid


@needs("fw_setenv", "fw_printenv")
def test_environments_as_libubootenv_writes_them(tmp_path):
    image = tmp_path / "env.img"
    image.write_bytes(bytes(2 * MIB))
    copies = [(MIB, 16384), (MIB + 262144, 16384)]
    with image.open("r+b") as file:
        for offset, size in copies:
            file.seek(offset)
            file.write(build_copy({"a": "1"}, size, flags=1))
    config = tmp_path / "fw_env.config"
    config.write_text("".join(f"{image} {offset:#x} {size:#x}\n" for offset, size in copies))
    seen = []
    for i in range(300):  # beyond the flags byte's wrap
        run("fw_setenv", "-c", config, "mender_boot_part", i)
        with disk_of(image) as disk:
            environment = read_environment(disk, copies)
        assert environment.valid_copies == 2
        assert environment.variables == {"a": "1", "mender_boot_part": str(i)}
        seen.append(environment.current)
        if i % 50 == 0:
            out = run("fw_printenv", "-c", config, "-n", "mender_boot_part")
            assert out.strip() == str(i)
    assert seen[:4] in ([1, 0, 1, 0], [0, 1, 0, 1])
    with image.open("r+b") as file:  # damage the current one: the other counts, as for the tool
        file.seek(copies[seen[-1]][0] + 100)
        file.write(b"\xff")
    with disk_of(image) as disk:
        environment = read_environment(disk, copies)
    assert environment.copies[seen[-1]].problem == "CRC is wrong"
    assert environment.variables["mender_boot_part"] == "298"
    out = run("fw_printenv", "-c", config, "-n", "mender_boot_part")
    assert out.strip() == "298"


@pytest.mark.parametrize(
    ("flags", "current"),
    [((1, 2), 1), ((2, 1), 0), ((255, 0), 1), ((0, 255), 0), ((7, 7), 0), ((254, 255), 1)],
)
def test_which_copy_counts(flags, current):
    copies = [build_copy({"n": str(f)}, 1024, flags=f) for f in flags]
    assert parse_environment(copies).current == current


def test_invalid_copies_are_named(tmp_path):
    good = build_copy({"x": "y"}, 1024, flags=3)
    assert parse_environment([None, good]).current == 1
    assert parse_environment([None, good]).copies[0].problem == "unreadable sectors"
    none = parse_environment([bytes(1024), b"\xff" * 1024])
    assert none.current is None
    assert none.variables == {}
    assert [c.problem for c in none.copies] == ["blank", "blank"]
    assert parse_environment([b"abc", b""]).valid_copies == 0
    image = tmp_path / "env.img"
    image.write_bytes(good + good + bytes(2048))
    with disk_of(image) as disk:
        disk.map[0] = UNREADABLE
        assert read_environment(disk, [(0, 1024), (1024, 1024)]).current == 1
        with pytest.raises(LayoutError, match="beyond the end"):
            read_environment(disk, [(4096, 1024)])


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_characters="=\0", blacklist_categories=["Cs"]), min_size=1),
        st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])),
        max_size=10,
    ),
    st.one_of(st.none(), st.integers(0, 255)),
)
def test_environments_round_trip(variables, flags):
    data = build_copy(variables, 65536, flags=flags)
    copy = parse_copy(data, redundant=flags is not None)
    assert copy.valid
    assert copy.variables == variables
    assert copy.flags == flags


@pytest.mark.parametrize("variables", [{"": "x"}, {"a=b": "c"}, {"a": "\0"}, {"a": "x" * 1020}])
def test_what_an_environment_cannot_express_is_refused(variables):
    with pytest.raises(ValueError, match="environment"):
        build_copy(variables, 1024, flags=0)


# ---------------------------------------------------------------- GRUB


@needs("grub-editenv")
def test_blocks_as_grub_editenv_writes_them(tmp_path):
    path = tmp_path / "grubenv"
    run("grub-editenv", path, "create")
    assert parse_grub_environment(path.read_bytes()).variables == {}
    values = {"mender_boot_part": "3", "empty": "", "path": "a\\b", "lines": "x\ny"}
    for name, value in values.items():
        run("grub-editenv", path, "set", f"{name}={value}")
    block = parse_grub_environment(path.read_bytes())
    assert block.valid
    assert block.problem is None
    assert block.variables == values


def block(**variables: str) -> bytes:
    text = b"# GRUB Environment Block\n"
    text += b"".join(f"{n}={v}\n".encode() for n, v in variables.items())
    return text.ljust(1024, b"#")


def test_which_grub_copy_counts():
    idle, busy = block(editing="0"), block(editing="1")
    one, two = block(n="1"), block(n="2")
    assert parse_grub_environments([one, two]).variables == {"n": "1"}
    assert parse_grub_environments([one, two], [busy, idle]).variables == {"n": "2"}
    assert parse_grub_environments([bytes(1024), two], [idle, idle]).current == 1
    assert parse_grub_environments([None, two], [None, idle]).current == 1
    assert parse_grub_environments([one, two], [None, idle]).current == 1  # as the script has it
    assert parse_grub_environments([one, two], [busy, busy]).current is None
    torn = parse_grub_environment(one[:512] + b"\x7f" * 512)
    assert torn.valid  # as GRUB takes it: there is no checksum
    assert torn.problem is not None


# ---------------------------------------------------------------- file systems


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    rng = random.Random(7)
    for name, size in (
        ("empty", 0),
        ("small", 100),
        ("block", 4096),
        ("dir/deep/big file with a long name.bin", 3 * MIB + 17),
        ("boot/grub/mender_grubenv1/env", 0),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    for number, value in ((1, "2"), (2, "3")):
        copies = folder / f"boot/grub/mender_grubenv{number}"
        copies.mkdir(parents=True, exist_ok=True)
        (copies / "env").write_bytes(block(mender_boot_part=value))
        (copies / "lock").write_bytes(block(editing="0"))
    with (folder / "sparse").open("wb") as file:
        file.seek(MIB)
        file.write(b"end")
    for i in range(300):
        (folder / "dir" / f"entry-{i:03}").write_text(str(i))
    return folder


PATHS = [f"/boot/grub/mender_grubenv{n}/env" for n in (1, 2)]
EXT = {
    "ext4": ["-t", "ext4", "-b", "4096"],
    "ext4-1k": ["-t", "ext4", "-b", "1024"],
    "ext4-32bit": ["-t", "ext4", "-O", "^64bit,^metadata_csum"],
    "ext2": ["-t", "ext2"],
    "ext3-1k": ["-t", "ext3", "-b", "1024"],
}


def make_ext(tree: Path, path: Path, options: list[str], offset: int = 0) -> Path:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    run("mke2fs", "-q", "-F", *options, "-d", tree, part, "24M")
    path.write_bytes(bytes(offset) + part.read_bytes())
    return path


def same_tree(files, tree: Path) -> None:
    for path in tree.rglob("*"):
        name = "/" + str(path.relative_to(tree))
        if path.is_dir():
            found = [n for n in files.list_directory(name) if n != "lost+found"]
            assert found == sorted(p.name for p in path.iterdir())
        else:
            assert files.read_file(name) == path.read_bytes(), name


@needs("mke2fs")
@pytest.mark.parametrize("kind", EXT)
def test_files_of_ext_file_systems(tree, tmp_path, kind):
    image = make_ext(tree, tmp_path / "fs.img", EXT[kind], offset=MIB)
    with disk_of(image) as disk:
        files = open_file_system(disk, MIB, 24 * MIB)
        assert files.kind == "ext"
        same_tree(files, tree)
        environment = read_grub_environments([(disk, MIB, 24 * MIB, path) for path in PATHS])
        assert environment.variables == {"mender_boot_part": "2"}
        assert environment.valid_copies == 2
        for bad in ("/none", "/small/x", "/dir"):
            with pytest.raises(LayoutError):
                files.read_file(bad)
        with pytest.raises(LayoutError, match="more than"):
            files.read_file("/small", limit=10)


@needs("mke2fs")
@pytest.mark.parametrize("kind", EXT)
def test_the_place_of_a_files_byte_is_where_it_is_stored(tree, tmp_path, kind):
    image = make_ext(tree, tmp_path / "fs.img", EXT[kind], offset=MIB)
    name = "dir/deep/big file with a long name.bin"
    content = (tree / name).read_bytes()
    with disk_of(image) as disk:
        files = open_file_system(disk, MIB, 24 * MIB)
        assert isinstance(files, ExtReader)
        size = files.file_size(f"/{name}")
        assert size == len(content)
        for at in (0, 1, size // 3, size - 1):
            place = MIB + files.place_of(f"/{name}", at)
            assert disk.read(place, 1)[0] == content[at]
        for bad, where in ((f"/{name}", size), ("/none", 0)):
            with pytest.raises(LayoutError):
                files.place_of(bad, where)


@needs("mkfs.fat", "mcopy")
@pytest.mark.parametrize(("bits", "size"), [(12, 8), (16, 32), (32, 64)])
def test_files_of_fat_file_systems(tree, tmp_path, bits, size):
    image = tmp_path / "fat.img"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    options = ["-s", "1"] if bits == 32 else []
    run("mkfs.fat", "-F", bits, *options, image)
    run("mcopy", "-i", image, "-s", *sorted(tree.iterdir()), "::")
    with disk_of(image) as disk:
        files = open_file_system(disk, 0, size * MIB)
        assert files.kind == "fat"
        same_tree(files, tree)
        places = [(disk, 0, size * MIB, path) for path in PATHS]
        assert read_grub_environments(places).valid_copies == 2
        with pytest.raises(LayoutError, match="no such file"):
            files.read_file("/none")


@needs("mke2fs")
def test_damaged_file_systems_give_layout_errors_and_never_hang(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", EXT["ext4-1k"])
    whole = image.read_bytes()
    rng = random.Random(8)
    for _ in range(60):
        spoiled = bytearray(whole)
        for _ in range(200):
            spoiled[rng.randrange(1024, 2 * MIB)] = rng.randrange(256)
        image.write_bytes(spoiled)
        with disk_of(image) as disk:
            try:
                files = open_file_system(disk, 0, len(spoiled))
                for name in ("/small", "/dir/deep/big file with a long name.bin"):
                    files.read_file(name)
            except LayoutError as error:
                assert "vda" in str(error)


@needs("mke2fs", "e2fsck")
def test_a_clean_partition_is_clean_and_its_files_are_read(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", EXT["ext4"], offset=MIB)
    with disk_of(image) as disk:
        before = disk.sha256()
        result = check_ext4(disk, MIB, 24 * MIB, read=["/small", "/none"])
        assert disk.sha256() == before
    assert result.clean
    assert not result.replayed
    assert result.files == {"/small": (tree / "small").read_bytes(), "/none": None}


@needs("mke2fs", "e2fsck")
def test_planted_damage_makes_a_partition_unclean(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", EXT["ext4"])
    run("debugfs", "-w", "-R", "clri /dir", image)
    with disk_of(image) as disk:
        result = check_ext4(disk, 0, 24 * MIB)
    assert not result.clean
    assert "UNEXPECTED INCONSISTENCY" in result.output
    image.write_bytes(bytes(24 * MIB))
    with disk_of(image) as disk:
        assert not check_ext4(disk, 0, 24 * MIB).clean


@needs("mke2fs", "e2fsck", "debugfs")
def test_a_journal_is_replayed_as_a_mount_would(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", EXT["ext4"])
    whole = image.read_bytes()
    # A transaction in the journal only: a new content for the block of /block.
    out = run("debugfs", "-R", "blocks /block", image).split()
    new = tmp_path / "new"
    new.write_bytes(b"J" * 4096)
    script = f"journal_open\njournal_write -b {out[0]} {new}\njournal_close\n"
    run("debugfs", "-w", "-f", "-", image, stdin=script)
    assert image.read_bytes() != whole
    with disk_of(image) as disk:
        raw = open_file_system(disk, 0, 24 * MIB).read_file("/block")
        assert raw == (tree / "block").read_bytes()  # as GRUB sees it: not replayed
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"])
    assert result.clean
    assert result.replayed
    assert result.files["/block"] == b"J" * 4096


GROUPS = [*EXT["ext4"], "-g", "1024"]  # so that 24 MiB have copies of the superblock
MENDS = Repair(4096, (1024, 3072))


@needs("mke2fs", "e2fsck", "debugfs")
@pytest.mark.parametrize("sectors", [[2], [3], [0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("kind", ["garbage", "unreadable"])
def test_a_lost_superblock_is_mended_by_a_device_that_does_so_and_by_no_other(
    tree, tmp_path, sectors, kind
):
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    disk = disk_of(image)
    if kind == "unreadable":
        disk.map[sectors] = UNREADABLE
    else:
        with image.open("r+b") as file:
            for sector in sectors:
                file.seek(sector * S)
                file.write(random.Random(sector).randbytes(S))
    with disk:
        assert not check_ext4(disk, 0, 24 * MIB).clean
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"], repair=MENDS)
        assert result.clean, result.output
        assert result.mended
        assert result.unreadable == (kind == "unreadable")
        assert result.files["/block"] == (tree / "block").read_bytes()
        # Planted: a device that looks for the copies at the wrong places.
        assert not check_ext4(disk, 0, 24 * MIB, repair=Repair(4096, (2048,))).clean


@needs("mke2fs", "e2fsck", "debugfs")
def test_a_lost_superblock_before_a_damaged_directory_is_mended(tree, tmp_path):
    """What `e2fsck -n` can't get past is no reason to take a copy for none."""
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    block = int(run("debugfs", "-R", "blocks /lost+found", image).split()[0])
    with image.open("r+b") as file:
        for at, size in ((2 * S, S), (4096 * block, 4096)):
            file.seek(at)
            file.write(random.Random(at).randbytes(size))
    looked = subprocess.run(
        ["e2fsck", "-n", "-b", "1024", "-B", "4096", image], check=False, capture_output=True
    )
    assert looked.returncode == 12, "it is got past: this shows nothing"
    with disk_of(image) as disk:
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"], repair=MENDS)
    assert result.clean, result.output
    assert result.mended
    assert result.files["/block"] == (tree / "block").read_bytes()


@needs("mke2fs", "e2fsck", "debugfs")
def test_torn_group_descriptors_do_not_cost_what_only_the_journal_holds(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    block = run("debugfs", "-R", "blocks /block", image).split()[0]
    new = tmp_path / "new"
    new.write_bytes(b"J" * 4096)
    script = f"journal_open\njournal_write -b {block} {new}\njournal_close\n"
    run("debugfs", "-w", "-f", "-", image, stdin=script)
    with image.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(4).randbytes(S))
    with disk_of(image) as disk:
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"], repair=MENDS)
    assert result.clean, result.output
    assert result.mended
    assert result.files["/block"] == b"J" * 4096
    # What a distribution does instead: the journal is deleted, and what it held is gone.
    preen = ["e2fsck", "-p", str(image)]
    preened = subprocess.run(preen, check=False, capture_output=True, text=True)
    assert "journal has been deleted" in preened.stdout
    subprocess.run(["e2fsck", "-y", str(image)], check=False, capture_output=True)
    with disk_of(image) as disk:
        assert check_ext4(disk, 0, 24 * MIB, read=["/block"]).files["/block"] != b"J" * 4096


@needs("mke2fs", "e2fsck", "debugfs", "tune2fs")
@pytest.mark.parametrize("mapped", ["block by block", "by extents"])
def test_a_torn_journal_inode_costs_the_journal_only_where_extents_map_it(tree, tmp_path, mapped):
    """Planted: a file system made with extents, as mke2fs does it."""
    whole = mapped == "block by block"
    features = ["-O", "^64bit,^extent"] if whole else []
    image = make_ext(tree, tmp_path / "fs.img", [*GROUPS, *features])
    if whole:
        run("tune2fs", "-O", "extent", image)
    block = run("debugfs", "-R", "blocks /block", image).split()[0]
    new = tmp_path / "new"
    new.write_bytes(b"J" * 4096)
    where = run("debugfs", "-R", "imap <8>", image)
    at = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", where)
    assert at is not None
    table = int(at[1])
    old = tmp_path / "table"
    old.write_bytes(image.read_bytes()[table * 4096 : (table + 1) * 4096])
    script = f"journal_open\njournal_write -b {block} {new}\njournal_write -b {table} {old}\n"
    run("debugfs", "-w", "-f", "-", image, stdin=script + "journal_close\n")
    with image.open("r+b") as file:
        file.seek(table * 4096 + int(at[2], 16) // S * S)
        file.write(random.Random(5).randbytes(S))
    with disk_of(image) as disk:
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"], repair=MENDS)
    assert (result.files["/block"] == b"J" * 4096) == whole, result.output


@needs("mke2fs", "e2fsck", "debugfs")
def test_a_device_that_mends_looks_behind_a_superblock_that_says_clean(tree, tmp_path):
    """What a repair leaves that a cut has ended; `e2fsck -y` alone believes the superblock."""
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    run("debugfs", "-w", "-R", "clri /dir", image)
    with disk_of(image) as disk:
        result = check_ext4(disk, 0, 24 * MIB, repair=MENDS)
    assert (result.clean, result.mended) == (True, True)
    believing = subprocess.run(["e2fsck", "-y", str(image)], check=False, capture_output=True)
    assert believing.returncode == 0
    checked = subprocess.run(["e2fsck", "-fn", str(image)], check=False, capture_output=True)
    assert checked.returncode != 0


@needs("mke2fs", "e2fsck", "debugfs")
def test_a_files_unreadable_sector_costs_the_file_and_its_page_and_nothing_else(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    block = int(run("debugfs", "-R", "blocks /block", image).split()[0])
    with disk_of(image) as disk:
        disk.map[block * 4096 // S + 5] = UNREADABLE
        result = check_ext4(disk, 0, 24 * MIB, read=["/block"], repair=MENDS, everything=True)
    assert (result.clean, result.mended, result.unreadable) == (True, False, 1)
    assert result.files == {"/block": None}
    assert result.tree is not None
    assert {name for name, content in result.tree.items() if content is None} == {"/block"}
    assert result.lost == {"/block": ((0,), bytes(4096))}


@needs("mke2fs", "e2fsck", "debugfs")
def test_an_unreadable_sector_between_inodes_costs_all_of_its_page(tree, tmp_path):
    """A block device is read by pages; a file system check takes one that fails for zeros."""
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    where = re.search(r"located at block (\d+)", run("debugfs", "-R", "imap /block", image))
    assert where is not None
    table = int(where[1])
    inside = [
        n
        for n in tree.iterdir()
        if f"block {table}," in run("debugfs", "-R", f"imap /{n.name}", image)
    ]
    assert len(inside) > 1
    with disk_of(image) as disk:
        disk.map[table * 4096 // S + 7] = UNREADABLE
        found = check_ext4(disk, 0, 24 * MIB, repair=MENDS, everything=True).tree
    assert found is not None
    assert not {f"/{path.name}" for path in inside} & set(found)


def test_no_temporary_files_are_left(tree, tmp_path, monkeypatch):
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr("framework.disk.ext4check._MEMORY", scratch)
    image = tmp_path / "fs.img"
    image.write_bytes(bytes(MIB))
    with disk_of(image) as disk:
        assert not check_ext4(disk, 0, MIB).clean
    assert list(scratch.iterdir()) == []


# ---------------------------------------------------------------- digests


def test_regions_are_hashed_and_compared(tmp_path, base, recorder, connect):
    client = connect()
    image = tmp_path / "image"
    image.write_bytes(random.Random(2).randbytes(2 * MIB + 100))
    data = image.read_bytes()
    client.write(MIB, data[:MIB])
    client.write(2 * MIB, data[MIB : 2 * MIB])
    client.write(3 * MIB, data[2 * MIB :].ljust(S, b"\0"))
    client.zero(4 * MIB, 4 * MIB)
    with recorder.disk("vda") as disk:
        assert compare_with_image(disk, MIB, image).identical
        assert region_sha256(disk, 0, 8 * MIB) == disk.sha256()
        assert region_sha256(disk, 3, 1001) == disk.sha256(3, 1001)
    client.write(MIB + 10 * S, b"!" * S)
    client.write(MIB + 99 * S, b"!" * S)
    with recorder.disk("vda") as disk:
        result = compare_with_image(disk, MIB, image)
    assert not result.identical
    assert result.differing_sectors == 2
    assert result.first_difference == 10 * S
    assert result.compared_bytes == 2 * MIB + 100


def test_planted_a_digest_of_the_base_alone_would_miss_a_write(tmp_path, base):
    with Recorder([DeviceSpec("vda", base)], tmp_path / "digest") as rec:
        with rec.disk("vda") as disk:
            before = region_sha256(disk, 0, MIB)
        endpoint = rec.endpoint("vda")
        with Client(endpoint.socket, "vda") as client:
            client.write(S, bytes(S))
        with rec.disk("vda") as disk:
            assert region_sha256(disk, 0, MIB) != before


def planted(tree, tmp_path, damage):
    """A file system after a cut: plain, with a journal to be replayed, or damaged."""
    image = make_ext(tree, tmp_path / "fs.img", GROUPS)
    if "journal" in damage:
        block = run("debugfs", "-R", "blocks /block", image).split()[0]
        (tmp_path / "new").write_bytes(b"J" * 4096)
        script = f"journal_open\njournal_write -b {block} {tmp_path / 'new'}\njournal_close\n"
        run("debugfs", "-w", "-f", "-", image, stdin=script)
    if "counts" in damage:
        run("debugfs", "-w", "-R", "set_super_value free_blocks_count 7", image)
    if "links" in damage:
        run("debugfs", "-w", "-R", "set_inode_field /block links_count 3", image)
    if "lost" in damage:
        run("debugfs", "-w", "-R", "clri /dir", image)
    if "superblock" in damage:
        with image.open("r+b") as file:
            file.seek(1024)
            file.write(random.Random(1).randbytes(S))
    return image


CASES = ["", "journal", "counts", "journal counts", "links", "journal links", "lost", "superblock"]


@needs("mke2fs", "e2fsck", "debugfs")
@pytest.mark.parametrize("damage", CASES)
def test_one_run_of_e2fsck_says_what_a_mounts_own_steps_say(tree, tmp_path, damage):
    image = planted(tree, tmp_path, damage)
    said = []
    for recover in (lambda export: export.recover(), lambda export: export._preen()):
        with disk_of(image) as disk, Ext4Image(disk, 0, 24 * MIB) as export:
            clean, replayed, _, mended = recover(export)
            said.append((clean, replayed, mended, export.everything()[0] if clean else None))
    assert said[0] == said[1]
    assert said[0][0] == (damage not in ("lost", "superblock"))


@needs("mke2fs", "e2fsck", "debugfs")
@pytest.mark.parametrize("damage", CASES)
def test_a_device_that_mends_has_a_clean_file_system_after_any_of_these(tree, tmp_path, damage):
    image = planted(tree, tmp_path, damage)
    with disk_of(image) as disk:
        found = check_ext4(disk, 0, 24 * MIB, repair=MENDS)
    assert found.clean, found.output
    assert found.replayed == ("journal" in damage)
    assert found.mended == (damage.removeprefix("journal ") in ("links", "lost", "superblock"))


@needs("mke2fs", "e2fsck", "debugfs")
def test_a_check_that_takes_every_mend_for_a_replay_is_told_from_the_device(
    tree, tmp_path, monkeypatch
):
    """Planted: whatever e2fsck puts right counts as nothing."""
    image = planted(tree, tmp_path, "lost")
    monkeypatch.setattr(ext4check, "_USUAL", re.compile(".*"))
    with disk_of(image) as disk:
        assert check_ext4(disk, 0, 24 * MIB).clean, "and so the tests above have something to find"


@needs("mke2fs", "e2fsck")
def test_all_that_a_file_system_holds_is_listed(tree, tmp_path):
    image = make_ext(tree, tmp_path / "fs.img", EXT["ext4"])
    with disk_of(image) as disk:
        found = check_ext4(disk, 0, 24 * MIB, everything=True).tree
    wanted = {
        f"/{path.relative_to(tree)}" + ("/" if path.is_dir() else ""): path
        for path in tree.rglob("*")
    }
    assert found is not None
    assert set(found) - {"/lost+found/"} == set(wanted)
    for name, path in wanted.items():
        assert found[name] == (b"" if path.is_dir() else path.read_bytes())
