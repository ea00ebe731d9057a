"""Many runs: bundles and their replay, simulated lifetimes, seeded searches, shrinking."""

from framework.campaign.bundle import (
    Bundle,
    BundleError,
    CutFacts,
    read_bundle,
    write_bundle,
)
from framework.campaign.errors import CampaignError, CompositionError, CrewError, LedgerError
from framework.campaign.steps import Divergence, compare, steps_of

__all__ = [
    "Bundle",
    "BundleError",
    "CampaignError",
    "CompositionError",
    "CrewError",
    "CutFacts",
    "Divergence",
    "LedgerError",
    "compare",
    "read_bundle",
    "steps_of",
    "write_bundle",
]
