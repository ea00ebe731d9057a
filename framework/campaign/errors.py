"""What can stand in the way of a campaign, as opposed to what its runs come to."""

from __future__ import annotations


class CampaignError(Exception):
    """A campaign, or what works with one, can't go on; one line that says what to do."""


class CompositionError(CampaignError):
    """A composition can't be read or makes no sense."""


class LedgerError(CampaignError):
    """The ledger can't be used; the message names the file."""


class CrewError(CampaignError):
    """The workers can't be used."""
