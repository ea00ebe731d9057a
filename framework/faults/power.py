"""Faults of power: one cut under a cache model, or a brown-out of several short ones.

What a cut is, and why killing a machine is none, stands in `framework.disk.models`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators

from framework.disk import MODELS, CacheModel, TornSector
from framework.faults.base import Fault, features_of
from framework.faults.errors import FaultError

CacheModelName = Literal[
    "kept",
    "prefix",
    "subset",
    "reordered",
    "torn",
    "lying",
    "torn-page",
    "sd",
    "emmc",
    "discard",
]


def _check_model(_: object, __: object, model: object) -> None:
    if not isinstance(model, CacheModel) and model not in MODELS:
        raise FaultError(f"{model!r} is no cache model; known: {', '.join(MODELS)}")


@frozen
class PowerCut(Fault):
    """The power goes, and the disk keeps what `model` says of the writes not yet flushed.

    Attributes:
        model: the cache model, or the name of one (see `framework.disk.MODELS`).
    """

    family: ClassVar[str] = "power"
    needs: ClassVar[frozenset[str]] = frozenset({"power-cut"})

    model: CacheModelName | CacheModel = field(default="kept", validator=_check_model)

    def what(self) -> str:
        """What goes wrong."""
        return "power cut"

    def lacks(self, features: frozenset[str]) -> frozenset[str]:
        """A power head is enough, where nobody asks what the drive kept or counts its operations.

        A board's drive keeps what it keeps: there `kept` names no model.
        """
        missing = super().lacks(features)
        exact = self.model != "kept" or not self.needs.isdisjoint(features_of(self.trigger))
        return missing if exact or "power-switch" not in features else missing - self.needs

    def details(self) -> str:
        """The cache model."""
        model = str(self.model)
        if isinstance(self.model, TornSector):
            model = f"torn, {' or '.join(self.model.kinds)}"
        return f" (cache: {model})"


@frozen
class BrownOut(PowerCut):
    """Several short cuts in a row: the device is cut again in each of its next starts.

    After the cut at the trigger, power comes back and goes again at the first line of the console,
    then when the bootloader starts the kernel, then at the first line again, and so on.

    Attributes:
        cuts: how many in all.
    """

    cuts: int = field(default=3, validator=[validators.ge(2), validators.le(50)])

    def what(self) -> str:
        """What goes wrong."""
        return f"brown-out of {self.cuts} cuts"


def power_cut(model: CacheModelName | CacheModel = "kept") -> PowerCut:
    """The power goes; the disk keeps what the cache model `model` (or its name) says."""
    return PowerCut(model)


def brown_out(cuts: int = 3, model: CacheModelName | CacheModel = "kept") -> BrownOut:
    """The power goes `cuts` times in a row, each time as soon as the device starts."""
    return BrownOut(model, cuts)
