"""What differs between bootloaders: their files, their state on the disk, their entries.

A `Bootloader` knows how to make its own files beside the disk image, what to put into the disk's
first partition and first sectors, and how Linux reaches the boot variables.
"""

from __future__ import annotations

import io
import os
import platform
import struct
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from images import uboot
from images.bootenv import COPY_DISTANCE, encode_environment, encode_grubenv, parse_script
from images.errors import RecipeError
from images.ext4 import MIB, make_ext4
from images.gpt import BIOS_BOOT, SECTOR, Partition
from images.host import run
from images.progress import Reporter
from images.recipe import HERE, Recipe
from images.store import copy_sparse, temporary_directory
from images.tree import normalise
from images.uboot_sd import CARD_NAME, SdUBoot, card_partition, is_separate, locked_inputs

BOOT_DIR = HERE / "boot"
_CORE_END = MIB
_END = MIB  # room for the backup partition table

_GRUB_MODULES = Path("usr/lib/grub/i386-pc")
_BOOT_KERNEL_SECTOR = 0x5C  # in boot.img: 64-bit sector of core.img
_CORE_SEGMENT = 0x820  # real-mode segment that core.img's second sector is loaded to

INITIAL_VARIABLES: Mapping[str, str] = {
    "bootcount": "0",
    "mender_boot_part": "2",
    "mender_boot_part_hex": "2",
    "upgrade_available": "0",
}


@dataclass(frozen=True)
class Layout:
    """A disk's partitions, in their order on the disk."""

    partitions: tuple[Partition, ...]


@dataclass(frozen=True)
class Context:
    """What a bootloader's files are made from.

    Attributes:
        recipe: the target's.
        single_env: only one copy of the boot variables is to be used (a planted flaw).
        bootloader_tree: unpacks the bootloader's packages below a scratch directory.
        scratch: a directory on the output's file system.
        cache: where things are kept from build to build.
        reporter: takes reports of long work.
    """

    recipe: Recipe
    single_env: bool
    bootloader_tree: Callable[[Path], Path]
    scratch: Path
    cache: Path
    reporter: Reporter


class Bootloader(Protocol):
    """A kind of bootloader."""

    def files(self, context: Context) -> Mapping[str, Callable[[Path], None]]:
        """Files beside the disk: name, and what makes each at a given path."""

    def disk_files(self, context: Context) -> Mapping[str, Any]:
        """Which of the files a disk is to be started with, by role."""

    def boot_code(self, context: Context) -> bytes:
        """Code for the first 440 bytes of the disk."""

    def install(
        self, context: Context, descriptor: int, partitions: Mapping[str, Partition]
    ) -> None:
        """Put the bootloader and its variables onto the disk."""

    def template_values(self, recipe: Recipe, single_env: bool) -> Mapping[str, str]:
        """Values for the overlays' templates."""

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """The manifest's description of where the variables are."""


def layout(recipe: Recipe) -> Layout:
    """The partitions of a target: the boot variables' two copies, two slots, data.

    The copies lie `COPY_DISTANCE` apart and from everything else: in one partition (U-Boot) or in
    one each (GRUB).
    """
    grub = recipe.bootloader == "grub"
    first = ("boot", COPY_DISTANCE) if grub else ("bootenv", 2 * COPY_DISTANCE)
    sizes = (
        first,
        ("rootfs-a", recipe.slot_mib * MIB),
        ("rootfs-b", recipe.slot_mib * MIB),
        ("data", recipe.data_mib * MIB),
    )
    partitions = []
    offset = COPY_DISTANCE
    for number, (name, size) in enumerate(sizes, 1):
        partitions.append(Partition(name, number, offset, size))
        offset += size
        if grub and number == 1:
            partitions.append(Partition("boot-2", 6, offset, COPY_DISTANCE))
            offset += COPY_DISTANCE
    if grub:
        start = Grub.CORE_SECTOR * SECTOR
        partitions.append(Partition("grub-core", 5, start, _CORE_END - start, BIOS_BOOT))
    if _on_card(recipe) and is_separate(recipe):
        partitions = partitions[1:]
    return Layout(tuple(partitions))


def other_partitions(recipe: Recipe) -> tuple[tuple[str, Partition], ...]:
    """Partitions of the machine's other disks: (the disk's name, partition)."""
    separate = _on_card(recipe) and is_separate(recipe)
    return ((CARD_NAME, card_partition()),) if separate else ()


def sources(recipe: Recipe) -> list[dict[str, str]]:
    """Name, version and SHA-256 of what the bootloader is compiled from, if we compile it."""
    return locked_inputs() if _on_card(recipe) else []


def source_key(recipe: Recipe) -> str:
    """Hash of everything that goes into the compiled bootloader; empty if it is a package."""
    return uboot.build_key() if _on_card(recipe) else ""


def modules(recipe: Recipe) -> tuple[str, ...]:
    """The builder's modules that shape this target's files only."""
    return ("uboot_sd.py",) if _on_card(recipe) else ()


def _on_card(recipe: Recipe) -> bool:
    return "environment_device" in recipe.options


def disk_size(partitions: Sequence[Partition]) -> int:
    """Bytes of a disk that ends right behind its last partition and the backup table."""
    return max(p.offset + p.size for p in partitions) + _END


class UBoot:
    """Debian's prebuilt U-Boot with our boot script in a read-only flash."""

    SEED_SIZE = 64 * MIB
    SEED_ENVIRONMENT = 0x40000
    COPY_SIZE = 0x4000
    COPIES = (COPY_DISTANCE, 2 * COPY_DISTANCE)

    def _copies(self, single_env: bool) -> tuple[int, int]:
        return (self.COPIES[0],) * 2 if single_env else self.COPIES

    def files(self, context: Context) -> Mapping[str, Callable[[Path], None]]:
        """`u-boot.bin` and the seed."""
        recipe = context.recipe

        def binary(path: Path) -> None:
            tree = context.bootloader_tree(path.parent / "bootloader")
            source = tree / recipe.options["uboot_binary"]
            if not source.is_file():
                raise RecipeError(f"the U-Boot package has no {recipe.options['uboot_binary']}")
            path.write_bytes(source.read_bytes())

        def seed(path: Path) -> None:
            variables = parse_script(
                (BOOT_DIR / "uboot-virtio.env").read_text(encoding="utf-8"),
                self._script_values(context),
            )
            data = encode_environment(variables, self.SEED_ENVIRONMENT)
            with path.open("wb") as file:
                file.write(data)
                file.truncate(self.SEED_SIZE)

        return {"u-boot.bin": binary, self._seed_name(context): seed}

    @staticmethod
    def _seed_name(context: Context) -> str:
        return "seed-single-env.img" if context.single_env else "seed.img"

    def _script_values(self, context: Context) -> Mapping[str, str]:
        recipe = context.recipe
        sectors = [f"{offset // 512:x}" for offset in self._copies(context.single_env)]
        return {
            "KERNEL_ADDRESS": recipe.options["kernel_address"],
            "INITRD_ADDRESS": recipe.options["initrd_address"],
            "ENV_SECTOR_1": sectors[0],
            "ENV_SECTOR_2": sectors[1],
            "CONSOLE": recipe.console,
            "DEVICE": recipe.device,
            "KERNEL_ARGUMENTS": recipe.kernel_arguments,
        }

    def disk_files(self, context: Context) -> Mapping[str, Any]:
        """The firmware and the seed of a disk."""
        return {"firmware": "u-boot.bin", "seed": self._seed_name(context)}

    def boot_code(self, context: Context) -> bytes:
        """None: U-Boot comes from the flash."""
        return b""

    def install(
        self, context: Context, descriptor: int, partitions: Mapping[str, Partition]
    ) -> None:
        """Both copies of the variables, the second one older."""
        first, second = self._copies(context.single_env)
        for offset, flags in ((second, 0), (first, 1)):
            data = encode_environment(INITIAL_VARIABLES, self.COPY_SIZE, flags)
            os.pwrite(descriptor, data, offset)

    def template_values(self, recipe: Recipe, single_env: bool) -> Mapping[str, str]:
        """The client's and fw_setenv's way to the variables."""
        lines = [
            f"{recipe.device} 0x{offset:x} 0x{self.COPY_SIZE:x}"
            for offset in self._copies(single_env)
        ]
        return {
            "BOOTENV": 'kind = "uboot"\nfw_env_config = "/etc/fw_env.config"',
            "FW_ENV_LINES": "\n".join(lines),
            "MOUNT_BOOT": (
                "# What fw_setenv starts from if both copies of the environment are lost.\n"
                "printf 'bootcount=0\\nmender_boot_part=%s\\nmender_boot_part_hex=%s\\n"
                "upgrade_available=0\\n' $part $part > /run/u-boot-initial-env\n"
                'if [ "$environment" = 0 ]; then\n'
                '    echo "BROWNOUT ENV-RESTORED"\n'
                "    fw_setenv mender_boot_part $part\n"
                "    fw_setenv mender_boot_part_hex $part\n"
                "fi"
            ),
        }

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """Two raw copies."""
        copies = [{"offset": offset, "size": self.COPY_SIZE} for offset in self.COPIES]
        return {"kind": "uboot", "copies": copies}


class Grub:
    """GRUB on BIOS: boot.img in the MBR, core.img (with our script in it) before partition 1.

    GRUB's own installer needs a mounted disk and privileges, so the two places that it would patch
    are patched here, after grub-core/boot/i386/pc/boot.S and diskboot.S: where boot.img finds the
    first sector of core.img, and where that sector finds the rest. The script lives in a memory
    disk inside core.img, which nothing ever writes: however badly the partition with the variables
    is damaged, the script still runs and finds a slot.
    """

    CORE_SECTOR = 34
    COPIES = (("boot", 1), ("boot-2", 6))
    """The copies' partitions, by name and number: a file system for each of them."""
    BLOCK_SIZE = 1024
    COPY_SIZE = MIB
    MODULES = (
        "biosdisk",
        "part_gpt",
        "ext2",
        "memdisk",
        "tar",
        "normal",
        "echo",
        "test",
        "loadenv",
        "linux16",
        "serial",
        "terminal",
        "sleep",
        "reboot",
        "setpci",
        "memrw",
        "regexp",
    )

    def files(self, context: Context) -> Mapping[str, Callable[[Path], None]]:
        """`boot.img` and `core.img`, ready to be put on the disk."""

        def boot(path: Path) -> None:
            modules = context.bootloader_tree(path.parent / "bootloader") / _GRUB_MODULES
            image = bytearray((modules / "boot.img").read_bytes()[:440])
            struct.pack_into("<Q", image, _BOOT_KERNEL_SECTOR, self.CORE_SECTOR)
            path.write_bytes(image)

        def core(path: Path) -> None:
            tree = context.bootloader_tree(path.parent / "bootloader")
            script = (BOOT_DIR / "grub.cfg").read_text(encoding="utf-8")
            for name, value in self._script_values(context).items():
                script = script.replace(f"@{name}@", value)
            memdisk = path.parent / "memdisk.tar"
            memdisk.write_bytes(_tar_with("grub.cfg", script.encode()))
            early = path.parent / "early.cfg"
            early.write_text("normal (memdisk)/grub.cfg\n", encoding="utf-8")
            arguments: list[str | Path] = ["-O", "i386-pc", "-d", tree / _GRUB_MODULES]
            arguments += ["-m", memdisk, "-c", early, "-p", "(memdisk)/", "-o", path]
            self._mkimage(tree, context.recipe, [*arguments, *self.MODULES])
            image = bytearray(path.read_bytes())
            image += bytes(-len(image) % SECTOR)
            sectors = len(image) // SECTOR
            if self.CORE_SECTOR + sectors > _CORE_END // SECTOR:
                raise RecipeError(f"GRUB's core.img has {sectors} sectors, too many for its place")
            entry = (self.CORE_SECTOR + 1, sectors - 1, _CORE_SEGMENT)
            struct.pack_into("<QHH", image, SECTOR - 12, *entry)
            path.write_bytes(image)

        return {"boot.img": boot, self._core_name(context): core}

    @staticmethod
    def _mkimage(tree: Path, recipe: Recipe, arguments: Sequence[str | Path]) -> None:
        """Run grub-mkimage: the packaged one where the host can, else the host's own."""
        if platform.machine() == "x86_64":
            loader = tree / "lib" / recipe.multiarch / "ld-linux-x86-64.so.2"
            folders = [tree / f"{place}/{recipe.multiarch}" for place in ("lib", "usr/lib")]
            path = ":".join(map(str, folders))
            run([loader, "--library-path", path, tree / "usr/bin/grub-mkimage", *arguments])
        else:
            run(["grub-mkimage", *arguments])

    @staticmethod
    def _core_name(context: Context) -> str:
        return "core-single-env.img" if context.single_env else "core.img"

    def _script_values(self, context: Context) -> Mapping[str, str]:
        recipe = context.recipe
        return {
            "COPY_1": f"(hd0,gpt{self.COPIES[0][1]})",
            "COPY_2": f"(hd0,gpt{self.COPIES[0 if context.single_env else 1][1]})",
            "CONSOLE": recipe.console,
            "DEVICE": recipe.device,
            "KERNEL_ARGUMENTS": recipe.kernel_arguments,
        }

    def disk_files(self, context: Context) -> Mapping[str, Any]:
        """Nothing: the disk starts by itself."""
        return {}

    def boot_code(self, context: Context) -> bytes:
        """GRUB's first stage."""
        return (context.scratch / "boot.img").read_bytes()

    def install(
        self, context: Context, descriptor: int, partitions: Mapping[str, Partition]
    ) -> None:
        """core.img, and the variables' copies."""
        core = (context.scratch / self._core_name(context)).read_bytes()
        os.pwrite(descriptor, core, self.CORE_SECTOR * SECTOR)
        with temporary_directory(context.scratch) as scratch:
            image = self.copy_partition(context.recipe, scratch, settled=True)
            for name, _ in self.COPIES:
                copy_sparse(image, descriptor, partitions[name].offset)

    def copy_partition(self, recipe: Recipe, scratch: Path, *, settled: bool) -> Path:
        """Make the file system of a copy below `scratch`; `settled`: its lock is closed.

        Every file has a block of the inode table to itself. There is no journal, so that what
        fsync put into a file is where GRUB looks for it.
        """
        tree = scratch / "boot"
        tree.mkdir(parents=True)
        (tree / "env").write_bytes(encode_grubenv(INITIAL_VARIABLES))
        (tree / "lock").write_bytes(_lock(closed=settled))
        normalise(tree, recipe.timestamp)
        image = scratch / "boot.img"
        make_ext4(
            image,
            name=f"{recipe.target}/boot",
            label="boot",
            timestamp=recipe.timestamp,
            tree=tree,
            size=self.COPY_SIZE,
            block=self.BLOCK_SIZE,
            inode=self.BLOCK_SIZE,
        )
        return image

    def template_values(self, recipe: Recipe, single_env: bool) -> Mapping[str, str]:
        """The client's way to the variables."""
        copies = (1, 1) if single_env else (1, 2)
        paths = ", ".join(f'"/boot/grub/mender_grubenv{copy}/env"' for copy in copies)
        script = (BOOT_DIR / "mount-grubenv.sh").read_text(encoding="utf-8")
        for number, (_, partition) in enumerate(self.COPIES, 1):
            script = script.replace(f"@DEVICE_{number}@", f"{recipe.device}{partition}")
        return {"BOOTENV": f'kind = "grub"\ncopies = [{paths}]', "MOUNT_BOOT": script.rstrip()}

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """A file in each of two partitions."""
        copies = [{"partition": name, "path": "/env"} for name, _ in self.COPIES]
        return {"kind": "grubenv", "copies": copies}


def root_files(recipe: Recipe, scratch: Path) -> dict[str, bytes]:
    """What the bootloader needs in the root file system: path and content."""
    if recipe.bootloader != "grub":
        return {}
    image = Grub().copy_partition(recipe, scratch, settled=False)
    return {
        "usr/lib/brownout/grubenv.img": image.read_bytes(),
        "usr/lib/brownout/lock-open": _lock(closed=False),
        "usr/lib/brownout/lock-closed": _lock(closed=True),
    }


def _lock(*, closed: bool) -> bytes:
    """The block beside a copy that says whether it is being written."""
    return encode_grubenv({"editing": "0" if closed else "1"})


def _tar_with(name: str, content: bytes) -> bytes:
    """A tar archive of one file, the same at every time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def for_recipe(recipe: Recipe) -> Bootloader:
    """The bootloader that a recipe asks for.

    Raises:
        RecipeError: there is no such kind.
    """
    if recipe.bootloader == "uboot":
        return SdUBoot() if _on_card(recipe) else UBoot()
    if recipe.bootloader == "grub":
        return Grub()
    raise RecipeError(f"recipe {recipe.target}: there is no bootloader {recipe.bootloader!r}")
