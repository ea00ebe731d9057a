"""What can be wrong with a fault, as opposed to what a fault does to the device."""

from __future__ import annotations


class FaultError(Exception):
    """A fault that this rig can't do, or that makes no sense; nothing has run yet."""


class MissingFeatureError(FaultError):
    """The rig lacks a feature that the fault needs: the scenario is not for this rig."""


class UnfiredError(FaultError):
    """A fault that was armed never struck: the scenario proved nothing, so it is wrong."""
