"""Failures of the rig, told apart from failures of the product.

`RigError`: the rig file, a program or an image is not what it must be; one line that says which
file and what to do. `InfrastructureError`: the rig lost its grip on the machine, so nothing is
known about the product. Neither is an `AssertionError`: in Allure they are *broken*, not
*failed*, and no verdict counts them.
"""

from __future__ import annotations

__all__ = ["InfrastructureError", "RigError"]


class RigError(Exception):
    """The rig cannot be set up as its file says; the message is one line for a person."""


class InfrastructureError(Exception):
    """The rig lost contact with the machine; `evidence` is what it last knew."""

    def __init__(self, message: str, *, evidence: str = "") -> None:
        super().__init__(
            f"INFRASTRUCTURE: {message}" + (f" [last: {evidence!r}]" if evidence else "")
        )
        self.evidence = evidence


class SimulationError(Exception):
    """A simulated lifetime's file can't be used or written; the message names it."""
