"""The tests of this folder share helpers by their plain names, and those of disk and targets."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "disk"), str(HERE.parent / "targets")]
