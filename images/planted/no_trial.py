"""Planted bug: an updater that switches for good at once, without a trial boot.

The bootloader then counts nothing and never falls back by itself: a system that can't start is
started for ever.
"""

from __future__ import annotations

from updater.cli import main
from updater.device import bootenv

bootenv.start_trial = bootenv.settle

if __name__ == "__main__":
    raise SystemExit(main())
