"""A scenario without network, for tests of its replay; pytest collects it only by its name."""

from __future__ import annotations

import os

from framework.scenario.device import Device

PLANTED = "BROWNOUT_TEST_BLOCKS"
"""How many blocks each file has: another number is another run."""


def test_applications_write(device: Device) -> None:
    """Applications write files and sync them."""
    blocks = os.environ.get(PLANTED, "2")
    device.command(
        "for n in 1 2 3 4 5; do"
        f" dd if=/dev/zero of=/data/work-$n bs=4096 count={blocks} conv=fsync 2>/dev/null; sync;"
        " done"
    )
    device.look("in the end")
