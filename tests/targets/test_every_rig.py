"""Every rig of ours boots its target, loses power in the middle, and boots it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.console import ConsoleLost
from framework.disk import Trigger
from framework.targets.rig import check_rig, load_rig

RIGS = Path(__file__).parents[2] / "rigs"

pytestmark = [pytest.mark.emulated, pytest.mark.slow]


@pytest.mark.parametrize(
    "name", ["qemu-arm64", "qemu-arm64-sd", "qemu-arm64-sd-all", "qemu-x86_64"]
)
def test_a_rig_boots_is_cut_at_an_operation_and_boots_again(name: str) -> None:
    from images import build_target

    build_target(name, ("v1",))
    rig = RIGS / f"{name}.yaml"
    check_rig(rig)
    target = load_rig(rig).get_target()
    assert target is not None
    strategy = target.get_strategy()
    driver = strategy.power
    try:
        strategy.transition("ready")
        before = driver.recorder.operations
        driver.arm_cut(Trigger.operation(5), "prefix", seed=1)
        with pytest.raises(ConsoleLost):
            strategy.run("while :; do date >> /data/file; sync; done", 60)
        assert driver.power_lost.wait(10)
        assert driver.last_cut.operation == before + 4
        outcome = strategy.boot()
        assert outcome.ready, str(outcome)
        assert outcome.starts == 1
        assert strategy.run("test -d /data").code == 0
    finally:
        driver.close()
