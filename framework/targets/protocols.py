"""Protocols of ours beside labgrid's: what a machine can do that a power strip cannot."""

from __future__ import annotations

import abc
from typing import Any

__all__ = ["PowerCutProtocol"]


class PowerCutProtocol(abc.ABC):
    """A machine that can lose its power at an exact moment and get a worn disk back.

    `off()` of labgrid's PowerProtocol says nothing about what a disk's volatile cache loses;
    `cut()` does: under a named cache model, from a seed.
    """

    @abc.abstractmethod
    def cut(self, model: Any = "kept", seed: int | None = None) -> Any:
        """Stop the machine at once; its disks then hold what `model` lets survive.

        `model` is a name (`kept`, `prefix`, `subset`, `torn`, `lying`) or a cache model object;
        `seed` picks the survivors (None: a new one, recorded). Returns the record of the cut.
        """

    @abc.abstractmethod
    def restore(self) -> None:
        """Give power back: start the machine on the disks that the cut left."""
