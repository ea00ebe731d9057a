"""The cache models of simulated power cuts, by the names that a command line takes."""

from __future__ import annotations

from typing import Final

CACHE_MODELS: Final = ("kept", "prefix", "subset", "reordered", "torn", "torn:4096")
"""What an updater must survive; a drive that lies is none of them."""
