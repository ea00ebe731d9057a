"""Cache models: what a power cut leaves of the operations that no flush covered.

Each model is a small frozen class whose `decide` is a pure function of the power cycle and a
seed; the decision it returns is complete, is recorded in the journal and replays bit for bit. The
live recorder and the explorer share them: the class's text says which states are possible, `decide`
draws one, `framework.explore` enumerates them. The vocabulary is DESIGN.md §3's; each module
names its sources.

Not modelled: tears inside a sector of 512 bytes other than as garbage, a device that dies, loss of
data at rest other than by `Emmc`'s erase units, loss after a flush other than by `LyingFlush`.
"""

from __future__ import annotations

from typing import Any, Final

from framework.disk.errors import DiskError
from framework.disk.models.base import CacheModel, garbage_bytes
from framework.disk.models.media import Emmc, LooseDiscard, SdCard
from framework.disk.models.ordering import (
    LyingFlush,
    PrefixCache,
    ReorderedCache,
    VolatileCache,
    WriteThrough,
)
from framework.disk.models.torn import Tear, TornPage, TornSector

MODELS: Final[dict[str, type[CacheModel]]] = {
    m.name: m
    for m in (
        WriteThrough,
        PrefixCache,
        VolatileCache,
        ReorderedCache,
        TornSector,
        LyingFlush,
        TornPage,
        SdCard,
        Emmc,
        LooseDiscard,
    )
}
"""The models by the names that DESIGN.md and the journal use."""


def model_from(name: str, parameters: dict[str, Any] | None = None) -> CacheModel:
    """Make a model from its name and parameters, as the journal or a command line has them.

    Raises DiskError for an unknown name or parameter.
    """
    if name not in MODELS:
        raise DiskError(f"no cache model {name!r}; there are {', '.join(MODELS)}")
    given = dict(parameters or {})
    if "kinds" in given:
        given["kinds"] = tuple(given["kinds"])
    try:
        return MODELS[name](**given)
    except TypeError as error:
        raise DiskError(f"cache model {name}: {error}") from error


__all__ = [
    "MODELS",
    "CacheModel",
    "Emmc",
    "LooseDiscard",
    "LyingFlush",
    "PrefixCache",
    "ReorderedCache",
    "SdCard",
    "Tear",
    "TornPage",
    "TornSector",
    "VolatileCache",
    "WriteThrough",
    "garbage_bytes",
    "model_from",
]
