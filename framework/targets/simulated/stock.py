"""What the simulated target consists of on the host: images, disks, and their manifest.

The manifest has the form that the image builder gives its targets, so that whoever reads one
(`framework.scenario.manifest`) reads this one, too. Everything is made from constants: the same
bytes everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from framework.targets.errors import RigError
from framework.targets.simulated.device import (
    DATA_BYTES,
    DATA_OFFSET,
    ENVIRONMENT,
    IMAGE_BYTES,
    SICK,
    SLOT_BYTES,
    SLOT_OFFSETS,
    SLOTS,
    factory_content,
    make_image,
)
from framework.targets.simulated.recorded import DEVICE
from images.store import write_atomically

TARGET: Final = "simulated"
VARIANTS: Final = {"v1": "well", "v2": "well", "panics": "panics", "hangs": "hangs"} | {
    name: name for name in SICK
}
"""The images that there are, and how each behaves."""


def make_stock(folder: Path, variants: Iterable[str]) -> dict[str, Any]:
    """Make the images and disks of `variants` in `folder`; return the manifest.

    Raises:
        RigError: there is no such variant.
    """
    wanted = sorted({"v1", *variants})
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown:
        raise RigError(
            f"the simulated device has no image {unknown[0]!r}; there are {', '.join(VARIANTS)}"
        )
    made = {name: make_image(name, VARIANTS[name]) for name in wanted}
    for name, content in made.items():
        _write(folder / f"{name}.img", content)
        _write(folder / f"{name}.info", f"artifact_name={name}\n".encode())
        _write(folder / f"disk-{name}.img", factory_content(name, VARIANTS[name]))
    return {
        "target": TARGET,
        "bootloader": "uboot",
        "layout": {
            "partitions": [
                _partition(f"rootfs-{slot}", SLOT_OFFSETS[slot], SLOT_BYTES) for slot in "ab"
            ]
            + [_partition("data", DATA_OFFSET, DATA_BYTES)],
            "env": {
                "kind": "uboot",
                "device": DEVICE,
                "copies": [
                    {"offset": offset, "size": ENVIRONMENT.size} for offset in ENVIRONMENT.offsets
                ],
            },
        },
        "slots": {
            slot.name: {"partition": f"rootfs-{slot.name}", "number": slot.number} for slot in SLOTS
        },
        "variants": {
            name: {
                "artifact_name": name,
                "file": f"{name}.img",
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": IMAGE_BYTES,
            }
            for name, content in made.items()
        },
        "disks": {name: {"file": f"disk-{name}.img"} for name in wanted},
    }


def info_of(folder: Path, name: str) -> str:
    """Return the path of what an image says of itself."""
    return str(folder / f"{name}.info")


def _partition(name: str, offset: int, size: int) -> dict[str, Any]:
    return {"name": name, "device": DEVICE, "offset": offset, "size": size}


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
