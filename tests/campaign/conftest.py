"""The tests of this folder share helpers by their plain names, and those of its neighbours."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
NEIGHBOURS = [str(HERE.parent / name) for name in ("disk", "explore", "targets")]
sys.path[:0] = [str(HERE), *NEIGHBOURS]
