"""Reads the manifest that the image builder writes beside a target's images.

The manifest says which files a target has, where its partitions and boot-environment copies are,
and which root file system variants were built; `images/` documents the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from framework.disk import Repair
from framework.verdict import ImageFacts

MAIN_DISK = "vda"
FIRMWARE_ROLES = ("seed",)
SICK_VARIANTS = ("panics", "hangs", "unhealthy", "offline")


class ManifestError(Exception):
    """A manifest is missing or unusable; the message names it and says what to do."""


@frozen
class Extent:
    """A named byte range of one of the machine's disks."""

    name: str
    device: str
    offset: int
    length: int


@frozen
class TargetManifest:
    """What the harness knows of a target's images.

    Attributes:
        target: its name, which is the rig's name and the device type of artifacts.
        directory: where its files are.
        bootloader: `uboot` or `grub`.
        slots: the extents of slot a and slot b.
        slot_numbers: their partition numbers, as the boot environment names them.
        data: the extent of the data partition.
        environment: the extents of the boot environment, one a copy: its sectors (U-Boot), or the
            partition that holds it as a file (GRUB).
        environment_paths: for GRUB, the copies' paths on their partitions.
        data_repair: how the device mends its data partition before it mounts it; None: not at all.
        images: the variants built, by name.
        disks: the machine's disk images with this base in slot a, by device name.
        firmware: further files that this base needs instead of the rig's own, by their role.
    """

    target: str
    directory: Path
    bootloader: str
    slots: dict[str, Extent]
    slot_numbers: dict[str, int]
    data: Extent
    environment: tuple[Extent, ...]
    environment_paths: tuple[str, ...]
    data_repair: Repair | None
    images: dict[str, ImageFacts]
    disks: dict[str, Path]
    firmware: dict[str, Path]

    def extents(self) -> tuple[Extent, ...]:
        """Everything on the disks that a picture shows, from top to bottom."""
        return (*self.environment, *self.slots.values(), self.data)

    @classmethod
    def parse(cls, data: Mapping[str, Any], directory: Path, base: str) -> TargetManifest:
        """Read a manifest's content, for a disk whose slot a holds the variant `base`.

        Raises:
            ManifestError: it is damaged, or that base was not built.
        """
        try:
            return _parse(data, directory, base)
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(
                f"{directory / 'manifest.json'}: unusable for base {base} ({error!r}); "
                "remove the folder and build the images again"
            ) from error


def _parse(data: Mapping[str, Any], directory: Path, base: str) -> TargetManifest:
    layout = data["layout"]
    partitions = {
        part["name"]: Extent(
            part["name"], part.get("device", MAIN_DISK), part["offset"], part["size"]
        )
        for part in layout["partitions"]
    }
    environment, paths = _environment(layout["env"], partitions)
    files = data["disks"][base]
    return TargetManifest(
        target=data["target"],
        directory=directory,
        bootloader=data["bootloader"],
        slots={name: partitions[slot["partition"]] for name, slot in data["slots"].items()},
        slot_numbers={name: slot["number"] for name, slot in data["slots"].items()},
        data=partitions["data"],
        environment=environment,
        environment_paths=paths,
        data_repair=_repair(layout.get("data_repair")),
        images={
            name: ImageFacts(
                name=variant["artifact_name"],
                sha256=variant["sha256"],
                size_bytes=variant["size"],
                healthy=name.split("+")[0] not in SICK_VARIANTS,
            )
            for name, variant in data["variants"].items()
        },
        disks={MAIN_DISK: directory / files["file"]}
        | {name: directory / file for name, file in files.get("other_disks", {}).items()},
        firmware={role: directory / files[role] for role in FIRMWARE_ROLES if role in files},
    )


def _repair(values: Mapping[str, Any] | None) -> Repair | None:
    return None if values is None else Repair(int(values["block"]), tuple(values["backups"]))


def _environment(
    env: Mapping[str, Any], partitions: Mapping[str, Extent]
) -> tuple[tuple[Extent, ...], tuple[str, ...]]:
    """Where the boot environment lies: extents, and paths where it lies in files."""
    if env["kind"] == "grubenv":
        copies = env["copies"]
        extents = tuple(partitions[copy["partition"]] for copy in copies)
        return extents, tuple(copy["path"] for copy in copies)
    device = env.get("device", MAIN_DISK)
    return tuple(
        Extent(f"env {number}", device, copy["offset"], copy["size"])
        for number, copy in enumerate(env["copies"], 1)
    ), ()
