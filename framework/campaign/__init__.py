"""Bundles of scenario runs, and their replay."""

from framework.campaign.bundle import (
    Bundle,
    BundleError,
    CutFacts,
    read_bundle,
    write_bundle,
)
from framework.campaign.steps import Divergence, compare, steps_of

__all__ = [
    "Bundle",
    "BundleError",
    "CutFacts",
    "Divergence",
    "compare",
    "read_bundle",
    "steps_of",
    "write_bundle",
]
