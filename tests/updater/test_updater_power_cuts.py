"""Power cuts at every event, in a simulated world around the real client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from updater_judge import cut_everywhere, flip_a_bit, judge, operate, run_once, settle
from updater_world import CACHE_MODELS, World, world_artifact

PLANTS = {
    "never_fsync": {2, 6, 7},
    "switch_before_sync": {2},
    "skip_read_back": {2},
    "commit_before_health": {4},
    "always_healthy": {4},
}
MAIN = Path(__file__).with_name("updater_judge.py")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.mark.parametrize("healthy", [True, False])
def test_a_cut_at_any_event_leaves_a_working_device(
    tmp_path: Path, artifact: Path, healthy: bool
) -> None:
    assert cut_everywhere(tmp_path, artifact, healthy=healthy) >= 13


@pytest.mark.parametrize("healthy", [True, False])
def test_a_second_cut_while_recovering_changes_nothing(
    tmp_path: Path, artifact: Path, healthy: bool
) -> None:
    for first in range(14):
        for second in range(1, 11):
            model = CACHE_MODELS[(first + second) % 3]
            world = World(tmp_path / f"{first}-{second}", artifact, first * 100 + second, model)
            world.healthy = healthy
            run_once(world, first, second)


def test_a_bit_that_the_drive_flips_is_found_before_activation(
    tmp_path: Path, artifact: Path
) -> None:
    flip_a_bit(tmp_path, artifact)
    world = World(tmp_path / "said", artifact)
    world.disks["b"].flips.add(700_000)
    _, said = operate(world, "install", "v2.mender")
    assert "slot b (/dev/b) does not hold what was written: SHA-256" in said
    assert world.environment.values["mender_boot_part"] == "2"
    assert not any(world.disks["b"].durable[:65536]), "the bad image could still be loaded"


def test_a_commit_that_the_environment_refuses_is_never_reported(
    tmp_path: Path, artifact: Path
) -> None:
    """ "Mark good" may not lie: the environment breaks after the reboot."""
    world = World(tmp_path, artifact)
    operate(world, "install", "v2.mender")
    world.restart()
    world.environment.broken = True
    reboot, said = operate(world, "resume")
    assert "committed" not in said
    assert "boot environment: write failed: Input/output error" in said
    assert not reboot, "a reboot that cannot change anything would be a loop"
    world.environment.broken = False
    judge(world, settle(world))
    assert world.running == "a"


def test_a_lost_store_never_keeps_an_unproven_system(tmp_path: Path, artifact: Path) -> None:
    world = World(tmp_path, artifact)
    operate(world, "install", "v2.mender")
    world.restart()
    world.store.close()
    (tmp_path / "state.db").unlink()
    reboot, said = operate(world, "resume")
    assert reboot
    assert "the record of its update is lost" in said
    said = settle(world)
    judge(world, said)
    assert world.running == "a"


def test_an_old_slot_that_no_longer_starts_ends_in_a_message_not_a_loop(
    tmp_path: Path, artifact: Path
) -> None:
    world = World(tmp_path, artifact)
    world.healthy = False
    operate(world, "install", "v2.mender")
    world.restart()
    assert operate(world, "resume")[0], "the unhealthy system asks for a reboot"
    world.disks["a"].durable[:65536] = bytes(65536)
    world.restart()
    reboot, said = operate(world, "resume")
    assert not reboot
    assert "slot a may be damaged" in said
    assert operate(world, "resume") == (False, "")


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bugs_are_caught(tmp_path: Path, plant: str) -> None:
    done = subprocess.run(
        [sys.executable, str(MAIN), str(tmp_path), plant],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=MAIN.parents[2],
    )
    assert done.returncode == 1, done.stdout + done.stderr
    number = int(done.stdout.removeprefix("invariant ").split(":")[0])
    assert number in PLANTS[plant], done.stdout
