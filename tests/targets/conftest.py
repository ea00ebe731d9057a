"""Fixtures: machines that are gone when the test is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from targets_rigs import UBOOT, write_rig

from framework.targets.rig import load_rig


@pytest.fixture
def uboot_machine(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make an activated RecordedQEMUDriver running Debian's U-Boot; keyword: rig values."""
    if not UBOOT.exists():
        pytest.skip("needs Debian's u-boot-qemu")
    made: list[Any] = []

    def make(**changes: Any) -> Any:
        path = write_rig(tmp_path / f"machine{len(made)}", **changes)
        target = load_rig(path).get_target()
        driver = target.get_driver("RecordedQEMUDriver")
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.close()
