"""A layout as plain values and back: so that a recording says itself what its boot depends on.

A recording made on anybody's board, with anybody's updater, carries its layout in its facts, and
`brownout explore` needs nothing else to class its crash states. RECORDING.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.explore.layout import (
    GrubStore,
    KnownImage,
    Layout,
    LayoutMistakeError,
    MenderVariables,
    Range,
    RaucGrubVariables,
    RaucUbootVariables,
    Region,
    Role,
    Store,
    UbootStore,
    Vocabulary,
)


def layout_to_values(layout: Layout) -> dict[str, Any]:
    """The layout as JSON can hold it.

    Raises LayoutMistakeError for a store or vocabulary that is not one of this package's.
    """
    return {
        "regions": [
            {
                "name": region.name,
                "role": region.role.name,
                "ranges": [_range(part) for part in region.ranges],
                "images": [
                    {"name": i.name, "sha256": i.sha256, "size": i.size_bytes}
                    for i in region.images
                ],
                "probes": [list(probe) for probe in region.probes],
                "magic": None if region.magic is None else [region.magic[0], region.magic[1].hex()],
            }
            for region in layout.regions
        ],
        "store": _store(layout.store),
        "vocabulary": _vocabulary(layout.vocabulary),
    }


def layout_from_values(values: Mapping[str, Any]) -> Layout:
    """The layout that `layout_to_values` described.

    Raises LayoutMistakeError if it is malformed.
    """
    try:
        return Layout(
            tuple(_read_region(region) for region in values["regions"]),
            _read_store(values["store"]),
            _read_vocabulary(values["vocabulary"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LayoutMistakeError(f"the recording's layout is malformed: {error!r}") from error


def _range(part: Range) -> list[Any]:
    return [part.device, part.offset, part.length]


def _read_range(values: Any) -> Range:
    device, offset, length = values
    return Range(str(device), int(offset), int(length))


def _read_region(values: Mapping[str, Any]) -> Region:
    magic = values["magic"]
    return Region(
        name=str(values["name"]),
        role=Role[values["role"]],
        ranges=tuple(_read_range(part) for part in values["ranges"]),
        images=tuple(
            KnownImage(str(i["name"]), str(i["sha256"]), int(i["size"])) for i in values["images"]
        ),
        probes=tuple((int(offset), int(length)) for offset, length in values["probes"]),
        magic=None if magic is None else (int(magic[0]), bytes.fromhex(magic[1])),
    )


def _store(store: Store) -> dict[str, Any]:
    if isinstance(store, UbootStore):
        return {
            "kind": "uboot",
            "copies": [_range(copy) for copy in store.copies],
            "redundant": store.redundant,
        }
    if isinstance(store, GrubStore):
        return {
            "kind": "grub",
            "partitions": [_range(part) for part in store.partitions],
            "paths": list(store.paths),
        }
    raise LayoutMistakeError(f"a {type(store).__name__} can't be kept in a recording")


def _read_store(values: Mapping[str, Any]) -> Store:
    if values["kind"] == "uboot":
        copies = tuple(_read_range(copy) for copy in values["copies"])
        return UbootStore(copies, values["redundant"])
    if values["kind"] == "grub":
        paths = tuple(str(path) for path in values["paths"])
        parts = values["partitions"] if "partitions" in values else [values["partition"]]
        return GrubStore(tuple(_read_range(part) for part in parts), paths)
    raise ValueError(f"store {values['kind']!r}")


def _vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    if isinstance(vocabulary, MenderVariables):
        return {
            "kind": "mender",
            "slots": dict(vocabulary.slots),
            "bootlimit": vocabulary.bootlimit,
        }
    if isinstance(vocabulary, RaucUbootVariables):
        return {
            "kind": "rauc-uboot",
            "slots": dict(vocabulary.slots),
            "attempts": vocabulary.attempts,
        }
    if isinstance(vocabulary, RaucGrubVariables):
        return {"kind": "rauc-grub", "slots": dict(vocabulary.slots)}
    raise LayoutMistakeError(f"a {type(vocabulary).__name__} can't be kept in a recording")


def _read_vocabulary(values: Mapping[str, Any]) -> Vocabulary:
    slots = {str(name): str(slot) for name, slot in values["slots"].items()}
    if values["kind"] == "mender":
        return MenderVariables(slots, int(values["bootlimit"]))
    if values["kind"] == "rauc-uboot":
        return RaucUbootVariables(slots, int(values["attempts"]))
    if values["kind"] == "rauc-grub":
        return RaucGrubVariables(slots)
    raise ValueError(f"vocabulary {values['kind']!r}")
