"""What differs between bootloaders: their files, their state on the disk, their entries.

A `Bootloader` knows how to make its own files beside the disk image, what to put into the disk's
first partition and first sectors, and how Linux reaches the boot variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from images.bootenv import encode_environment, parse_script
from images.errors import RecipeError
from images.ext4 import MIB
from images.gpt import Partition
from images.recipe import HERE, Recipe

BOOT_DIR = HERE / "boot"
_FIRST_OFFSET = MIB
_END = MIB  # room for the backup partition table

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
    """

    recipe: Recipe
    single_env: bool
    bootloader_tree: Callable[[Path], Path]
    scratch: Path


class Bootloader(Protocol):
    """A kind of bootloader."""

    def files(self, context: Context) -> Mapping[str, Callable[[Path], None]]:
        """Files beside the disk: name, and what makes each at a given path."""

    def disk_files(self, context: Context) -> Mapping[str, str]:
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
    """The partitions of a target: boot, two slots, data."""
    first = "boot" if recipe.bootloader == "grub" else "bootenv"
    sizes = (
        (first, recipe.boot_mib),
        ("rootfs-a", recipe.slot_mib),
        ("rootfs-b", recipe.slot_mib),
        ("data", recipe.data_mib),
    )
    partitions = []
    offset = _FIRST_OFFSET
    for number, (name, size_mib) in enumerate(sizes, 1):
        partitions.append(Partition(name, number, offset, size_mib * MIB))
        offset += size_mib * MIB
    return Layout(tuple(partitions))


def disk_size(partitions: Sequence[Partition]) -> int:
    """Bytes of a disk that ends right behind its last partition and the backup table."""
    return max(p.offset + p.size for p in partitions) + _END


class UBoot:
    """Debian's prebuilt U-Boot with our boot script in a read-only flash."""

    SEED_SIZE = 64 * MIB
    SEED_ENVIRONMENT = 0x40000
    COPY_SIZE = 0x4000
    COPIES = (MIB, MIB + 0x40000)

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

    def disk_files(self, context: Context) -> Mapping[str, str]:
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
                'part=2; [ "$slot" = b ] && part=3\n'
                "printf 'bootcount=0\\nmender_boot_part=%s\\nmender_boot_part_hex=%s\\n"
                "upgrade_available=0\\n' $part $part > /run/u-boot-initial-env"
            ),
        }

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """Two raw copies."""
        copies = [{"offset": offset, "size": self.COPY_SIZE} for offset in self.COPIES]
        return {"kind": "uboot", "copies": copies}


def for_recipe(recipe: Recipe) -> Bootloader:
    """The bootloader that a recipe asks for.

    Raises:
        RecipeError: there is no such kind.
    """
    if recipe.bootloader == "uboot":
        return UBoot()
    raise RecipeError(f"recipe {recipe.target}: there is no bootloader {recipe.bootloader!r}")
