"""ext4 images that come out bit for bit the same from the same tree, made without privileges.

`mke2fs -d` copies a directory tree into a new file system. What it takes from the host besides
the contents (owner, inode change times, configuration, random UUID and hash seed) is fixed here:
an own mke2fs.conf, `E2FSPROGS_FAKE_TIME`, explicit `-U` and `hash_seed`, and a pass with debugfs
over all inodes that sets owner and times, so that neither fakeroot nor root is needed. `e2fsck -n`
proves the result. Facts: mke2fs(8), debugfs(8), ext4 disk layout (kernel documentation).
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

from images.errors import ImageTooLargeError, ToolFailedError
from images.host import run

BLOCK = 4096
MIB = 1 << 20

# Names not in this tuple are features that some bootloader of ours can't read, or that a read-only
# file system has no use for.
_EXTENT = "extent"
_FEATURES = (
    "none,dir_index,dir_nlink,ext_attr,extra_isize,filetype,flex_bg,huge_file,"
    "large_file,metadata_csum,sparse_super"
)
_NAMESPACE = uuid.UUID("8c0ff1a8-54a5-5d0c-9ad7-2f0c9a6be2b1")
_FIRST_INODE = 11
_SUPERBLOCK = 1024
_MKE2FS_CONF = "[defaults]\n\tblocksize = 4096\n\tinode_size = 256\n\tinode_ratio = 16384\n"


def fixed_uuid(name: str) -> uuid.UUID:
    """The UUID that always belongs to `name`."""
    return uuid.uuid5(_NAMESPACE, name)


def backup_superblocks(size: int, group_blocks: int, block: int = BLOCK) -> tuple[int, ...]:
    """Block numbers of the superblock's copies: in group 1 and the powers of 3, 5 and 7.

    That is the feature sparse_super (ext4 disk layout, "Super block"); for blocks over 1 KiB.
    """
    groups = -(-(size // block) // group_blocks)
    powers = {b**n for b in (3, 5, 7) for n in range(groups.bit_length())}
    return tuple(group * group_blocks for group in sorted(powers) if group < groups)


def _tree_demand(tree: Path, block: int) -> tuple[int, int]:
    """(blocks, inodes) that the content of `tree` takes."""
    blocks = inodes = 0
    for path in tree.rglob("*"):
        inodes += 1
        if path.is_symlink():
            blocks += len(str(path.readlink())) // 60 and 1
        elif path.is_dir():
            # Long directories take more than a block; 64 bytes cover an entry's usual length.
            blocks += 1 + sum(1 for _ in path.iterdir()) * 64 // block
        else:
            size = path.stat().st_size
            blocks += -(-size // block)
            blocks += 1 if size > 4 * 128 * MIB else 0
    return blocks, inodes


def make_ext4(
    image: Path,
    *,
    name: str,
    label: str,
    timestamp: int,
    tree: Path | None = None,
    size: int | None = None,
    spare: int = 2 * MIB,
    journal: bool = False,
    block: int = BLOCK,
    inode: int = 256,
    group_blocks: int | None = None,
) -> int:
    """Make an ext4 image.

    Args:
        image: where; must not exist.
        name: what its UUID and hash seed derive from.
        label: the volume's label, 16 bytes at most.
        timestamp: seconds since 1970, for every time in the file system.
        tree: what to fill it with; all becomes root's.
        size: bytes, a multiple of 4 KiB; without it the smallest that holds the tree and `spare`.
        spare: free bytes to leave where `size` isn't given.
        journal: a read-write file system wants one, a read-only one doesn't.
        block: bytes of a block.
        inode: bytes of an inode.
        group_blocks: blocks of a block group; by default as many as fit.

    Returns:
        The image's size in bytes.

    Raises:
        ImageTooLargeError: the tree doesn't fit into `size`.
        ToolFailedError: mke2fs, debugfs or e2fsck failed.
    """
    blocks, inodes = _tree_demand(tree, block) if tree is not None else (0, 0)
    inode_count = inodes + 64 if tree is not None else 4096
    if size is None:
        tables = inode_count * inode + 64 * block
        size = -(-(blocks * block + tables + spare) // MIB) * MIB
    if tree is not None and blocks * block > size:
        raise ImageTooLargeError(
            f"{name} needs {blocks * block / MIB:.0f} MiB, its file system has {size / MIB:.0f} MiB"
        )
    configuration = image.with_name(image.name + ".mke2fs.conf")
    configuration.write_text(_MKE2FS_CONF)
    features = f"{_FEATURES},{'has_journal' if journal else _EXTENT}"
    identity = fixed_uuid(name)
    command: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", features]
    command += ["-b", str(block), "-I", str(inode), "-m", "0", "-N", str(inode_count)]
    command += ["-U", str(identity), "-L", label]
    if group_blocks is not None:
        command += ["-g", str(group_blocks)]
    command += ["-E", f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,nodiscard"]
    if tree is not None:
        command += ["-d", tree]
    env = {"MKE2FS_CONFIG": str(configuration), "E2FSPROGS_FAKE_TIME": str(timestamp)}
    try:
        with image.open("xb") as file:
            file.truncate(size)
        run([*command, image, str(size // block)], env=env)
        if journal:
            # Only now: the journal of a file system with extents is lost with its inode, which a
            # torn write of the root directory's inode beside it can destroy. Of one that is mapped
            # block by block e2fsck (1.47) takes the map from the superblock's copy of it.
            run(["tune2fs", "-O", _EXTENT, image], env=env)
        _normalise_inodes(image, timestamp, env)
        run(["e2fsck", "-f", "-n", image], env=env)
    finally:
        configuration.unlink()
    return size


def _used_inodes(image: Path) -> int:
    """How many inodes of a fresh file system are in use; mke2fs hands them out without gaps."""
    with image.open("rb") as file:
        file.seek(_SUPERBLOCK)
        superblock = file.read(64)
    (count,) = struct.unpack_from("<I", superblock, 0)
    (free,) = struct.unpack_from("<I", superblock, 16)
    return int(count - free)


def _normalise_inodes(image: Path, timestamp: int, env: dict[str, str]) -> None:
    """Give every inode to root and set all of its times."""
    commands = []
    for inode in (2, *range(_FIRST_INODE, _used_inodes(image) + 1)):
        commands += [f"sif <{inode}> {field} 0" for field in ("uid", "gid")]
        commands += [
            f"sif <{inode}> {field} @{timestamp}" for field in ("atime", "ctime", "mtime", "crtime")
        ]
        commands += [
            f"sif <{inode}> {field}_extra 0" for field in ("atime", "ctime", "mtime", "crtime")
        ]
    result = run(["debugfs", "-w", "-f", "-", image], stdin="\n".join(commands) + "\n", env=env)
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("debugfs ")]
    if complaints:
        raise ToolFailedError(f"debugfs could not normalise {image.name}: {complaints[0]}")
