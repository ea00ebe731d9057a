"""The boot loader of ``qemu-arm64-sd*`` as the builder sees it: our own U-Boot and an SD card.

The card holds both copies of U-Boot's environment in raw sectors, inside a partition ``bootenv``
that nothing mounts. It is a disk of its own beside the one with the slots, or, where the recipe's
device is the card itself, the one disk. The copies hold the whole environment: U-Boot replaces
its built-in variables by the stored ones, scripts included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from images import uboot
from images.bootenv import COPY_DISTANCE, encode_environment
from images.errors import RecipeError
from images.ext4 import MIB, fixed_uuid
from images.gpt import Partition, write_gpt
from images.recipe import Recipe

if TYPE_CHECKING:
    from images.bootloaders import Context

COPY_SIZE = 0x4000
COPIES = (COPY_DISTANCE, 2 * COPY_DISTANCE)
"""Where the copies are; the same numbers stand in U-Boot's configuration and its script."""

CARD_SIZE = 64 * MIB
CARD_NAME = "mmc0"
"""The card's name among a machine's disks, where it is a disk of its own."""

_SINGLE_ENV = (f"CONFIG_ENV_OFFSET_REDUND={COPIES[0]:#x}",)


def is_separate(recipe: Recipe) -> bool:
    """Whether the card is a disk of its own, without the slots."""
    return not recipe.device.startswith(recipe.options["environment_device"])


def card_partition() -> Partition:
    """The partition around both copies."""
    return Partition("bootenv", 1, COPIES[0], 2 * COPY_DISTANCE)


class SdUBoot:
    """U-Boot built from source, its environment on an SD card."""

    def files(self, context: Context) -> Mapping[str, Callable[[Path], None]]:
        """`u-boot.bin`, and the card where it is a disk of its own."""

        def binary(path: Path) -> None:
            built = uboot.build(
                context.cache, inputs=_inputs(context.single_env), reporter=context.reporter
            )
            path.write_bytes(built.binary.read_bytes())

        def card(path: Path) -> None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.truncate(descriptor, CARD_SIZE)
                guid = fixed_uuid(f"{context.recipe.target}/card")
                write_gpt(descriptor, CARD_SIZE, [card_partition()], guid)
                self._write_copies(context, descriptor)
            finally:
                os.close(descriptor)

        files: dict[str, Callable[[Path], None]] = {_named("u-boot.bin", context): binary}
        if is_separate(context.recipe):
            files[_named("sd.img", context)] = card
        return files

    def disk_files(self, context: Context) -> Mapping[str, Any]:
        """The firmware, and the machine's other disk."""
        files: dict[str, Any] = {"firmware": _named("u-boot.bin", context)}
        if is_separate(context.recipe):
            files["other_disks"] = {CARD_NAME: _named("sd.img", context)}
        return files

    def boot_code(self, context: Context) -> bytes:
        """None: U-Boot comes from the flash."""
        return b""

    def install(
        self, context: Context, descriptor: int, partitions: Mapping[str, Partition]
    ) -> None:
        """Both copies, where the disk is the card."""
        if is_separate(context.recipe):
            return
        size = os.fstat(descriptor).st_size
        if size & (size - 1):
            raise RecipeError(
                f"recipe {context.recipe.target}: a card of {size // MIB} MiB is no power of two, "
                "which QEMU refuses: change data_mib"
            )
        self._write_copies(context, descriptor)

    def _write_copies(self, context: Context, descriptor: int) -> None:
        variables = uboot.stored_environment()
        first, second = _copies(context.single_env)
        for offset, flags in ((second, 0), (first, 1)):
            os.pwrite(descriptor, encode_environment(variables, COPY_SIZE, flags), offset)

    def template_values(self, recipe: Recipe, single_env: bool) -> Mapping[str, str]:
        """The client's and fw_setenv's way to the variables."""
        device = recipe.options["environment_device"]
        defaults = uboot.stored_environment()
        return {
            "BOOTENV": 'kind = "uboot"\nfw_env_config = "/etc/fw_env.config"',
            "FW_ENV_LINES": "\n".join(
                f"{device} {offset:#x} {COPY_SIZE:#x}" for offset in _copies(single_env)
            ),
            "UBOOT_DEFAULT_ENV": "\n".join(
                f"{name}={value}"
                for name, value in defaults.items()
                if not name.startswith("mender_boot_part")
            ),
            "MOUNT_BOOT": (
                "# The card is probed in the background, and the client needs it at once.\n"
                "tries=0\n"
                f"while [ ! -b {device} ] && [ $tries -lt 250 ]; do\n"
                "    usleep 20000\n"
                "    tries=$((tries + 1))\n"
                "done\n"
                f'[ -b {device} ] || echo "BROWNOUT NO-CARD"\n'
                "# What fw_setenv starts from if both copies of the environment are lost.\n"
                'part=2; [ "$slot" = b ] && part=3\n'
                "{\n"
                "    cat /etc/u-boot-default-env\n"
                '    echo "mender_boot_part=$part"\n'
                '    echo "mender_boot_part_hex=$part"\n'
                "} > /run/u-boot-initial-env\n"
                'if [ "$environment" = 0 ]; then\n'
                '    echo "BROWNOUT ENV-RESTORED"\n'
                "    # Twice, for both copies; fw_setenv writes nothing that is already so.\n"
                "    fw_setenv bo_env 2\n"
                "    fw_setenv bo_env 1\n"
                "fi"
            ),
        }

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """Two raw copies, on which disk."""
        copies = [{"offset": offset, "size": COPY_SIZE} for offset in COPIES]
        where = {"device": CARD_NAME} if is_separate(recipe) else {}
        return {"kind": "uboot", **where, "copies": copies}


def _inputs(single_env: bool) -> uboot.Inputs:
    return uboot.Inputs(extra=_SINGLE_ENV if single_env else ())


def _copies(single_env: bool) -> tuple[int, int]:
    return (COPIES[0], COPIES[0]) if single_env else COPIES


def _named(name: str, context: Context) -> str:
    stem, _, suffix = name.rpartition(".")
    return f"{stem}-single-env.{suffix}" if context.single_env else name


def locked_inputs() -> list[dict[str, str]]:
    """What U-Boot is built from, for the manifest."""
    return [
        {"name": entry.name, "version": entry.version, "sha256": entry.sha256}
        for entry in uboot.read_lock()
    ]
