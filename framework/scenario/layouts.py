"""From a target's manifest to the explorer's layout: what a boot of our images can depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from framework.explore.layout import (
    GrubStore,
    KnownImage,
    Layout,
    MenderVariables,
    Range,
    Region,
    Role,
    Store,
    UbootStore,
    gpt_region,
)
from framework.scenario.manifest import Extent, TargetManifest
from framework.verdict import ImageFacts

SLOT_REGION = "slot "
"""How a slot's region is called: this and the slot's name."""


def layout_of(
    manifest: TargetManifest, sizes: Mapping[str, int], images: Iterable[ImageFacts]
) -> Layout:
    """The layout of a target; `sizes` has every disk's bytes, `images` what may be in a slot."""
    known = tuple(KnownImage(i.name, i.sha256, i.size_bytes) for i in images)
    tables = tuple(gpt_region(device, size) for device, size in sizes.items())
    slots = tuple(
        Region(SLOT_REGION + name, Role.SLOT, (_range(extent),), known)
        for name, extent in manifest.slots.items()
    )
    data = Region("data", Role.DATA, (_range(manifest.data),))
    numbers = {str(number): slot for slot, number in manifest.slot_numbers.items()}
    return Layout((*tables, *slots, data), _store(manifest), MenderVariables(numbers))


def _store(manifest: TargetManifest) -> Store:
    if manifest.bootloader == "grub":
        partitions = tuple(_range(extent) for extent in manifest.environment)
        return GrubStore(partitions, manifest.environment_paths)
    return UbootStore(tuple(_range(copy) for copy in manifest.environment))


def _range(extent: Extent) -> Range:
    return Range(extent.device, extent.offset, extent.length)
