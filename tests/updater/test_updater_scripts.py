"""State scripts: names, order, exit codes, limits, and a power cut at every event around them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from updater_artifacts import DEVICE_TYPE, image_bytes
from updater_judge import judge, operate, settle
from updater_world import CACHE_MODELS, IMAGE_BYTES, FakeClock, World, world_artifact

from updater.artifact import write_artifact
from updater.device.config import ScriptsConfig
from updater.device.errors import ScriptError
from updater.device.scripts import ScriptRunner

STATES = (
    "ArtifactInstall",
    "ArtifactReboot",
    "ArtifactCommit",
    "ArtifactRollback",
    "ArtifactRollbackReboot",
    "ArtifactFailure",
)


def script(directory: Path, name: str, body: str = "", mode: int = 0o755) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text(f'#!/bin/sh\necho {name} >> "$WORLD/log"\n{body}\n')
    path.chmod(mode)
    return path


# The runner alone


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptRunner:
    monkeypatch.setenv("WORLD", str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "version").write_text("3\n")
    return ScriptRunner(
        ScriptsConfig(str(tmp_path / "d"), timeout_s=20), str(tmp_path), FakeClock()
    )


def logged(directory: Path) -> list[str]:
    path = directory / "log"
    return path.read_text().split() if path.exists() else []


def test_scripts_run_in_the_order_of_their_names_and_only_those(
    tmp_path: Path, runner: ScriptRunner
) -> None:
    wanted = ["Download_Enter_00", "Download_Enter_05_wifi", "Download_Enter_10_ask-user"]
    for name in reversed(wanted):
        script(tmp_path / "d", name)
    for name in (
        "Download_Enter_1",
        "Download_Enter_100",
        "Download_Enter_aa",
        "Download_Enter_05_",
        "Download_Enter_05wifi",
        "Download_Leave_00",
        "Download_Enter",
        "Sync_Enter_00",
        "Download_Enter_05_a b",
    ):
        script(tmp_path / "d", name)
    assert runner.run("Download", "Enter", ignore_errors=False) == ""
    assert logged(tmp_path) == wanted


def test_scripts_get_no_arguments(tmp_path: Path, runner: ScriptRunner) -> None:
    script(tmp_path / "d", "Sync_Enter_00", "test $# = 0")
    assert runner.run("Sync", "Enter", ignore_errors=False) == ""


@pytest.mark.parametrize("code", [1, 2, 20, 255])
def test_any_other_exit_code_is_an_error_and_ends_the_row(
    tmp_path: Path, runner: ScriptRunner, code: int
) -> None:
    script(tmp_path / "d", "Download_Leave_00", f"echo no space >&2; exit {code}")
    script(tmp_path / "d", "Download_Leave_01")
    message = f"state script Download_Leave_00 exited with {code}: no space"
    with pytest.raises(ScriptError, match=message):
        runner.run("Download", "Leave", ignore_errors=False)
    assert logged(tmp_path) == ["Download_Leave_00"]
    assert runner.run("Download", "Leave", ignore_errors=True) == message
    assert logged(tmp_path)[1:] == ["Download_Leave_00", "Download_Leave_01"]


def test_code_21_is_tried_again_a_minute_apart(tmp_path: Path, runner: ScriptRunner) -> None:
    script(tmp_path / "d", "Sync_Enter_00", 'test $(wc -l < "$WORLD/log") -ge 4 || exit 21')
    script(tmp_path / "d", "Sync_Enter_01")
    runner.run("Sync", "Enter", ignore_errors=False)
    assert logged(tmp_path) == ["Sync_Enter_00"] * 4 + ["Sync_Enter_01"]
    assert runner._clock.waits == [60.0] * 3  # type: ignore[attr-defined]


def test_code_21_for_half_an_hour_is_an_error(tmp_path: Path, runner: ScriptRunner) -> None:
    script(tmp_path / "d", "Sync_Enter_00", "exit 21")
    with pytest.raises(ScriptError, match=r"asked for a later try \(exit code 21\) for 1800 s"):
        runner.run("Sync", "Enter", ignore_errors=False)
    assert sum(runner._clock.waits) == 1800  # type: ignore[attr-defined]
    assert len(logged(tmp_path)) == 31


def test_a_script_that_overruns_is_killed_with_its_group(
    tmp_path: Path, runner: ScriptRunner
) -> None:
    runner._config = runner._config._replace(timeout_s=1.0)
    script(tmp_path / "d", "Sync_Enter_00", 'sleep 300 & echo $! > "$WORLD/pid"; wait')
    with pytest.raises(ScriptError, match="did not finish in time"):
        runner.run("Sync", "Enter", ignore_errors=False)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            os.kill(pid, 0)
        raise ProcessLookupError


def test_standard_error_is_capped(
    tmp_path: Path, runner: ScriptRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    script(tmp_path / "d", "Sync_Enter_00", "yes 0123456789 | head -c 200000 >&2")
    runner.run("Sync", "Enter", ignore_errors=False)
    assert capfd.readouterr().err.count("0123456789") == 10240 // 11


@pytest.mark.parametrize("version", [None, "1", "4", "x"])
def test_a_missing_or_foreign_version_file_is_an_error(
    tmp_path: Path, runner: ScriptRunner, version: str | None
) -> None:
    script(tmp_path / "d", "Sync_Enter_00")
    (tmp_path / "d" / "version").unlink()
    if version is not None:
        (tmp_path / "d" / "version").write_text(version)
    with pytest.raises(ScriptError, match="version"):
        runner.run("Sync", "Enter", ignore_errors=False)
    assert logged(tmp_path) == []


def test_a_script_that_cannot_run_is_an_error(tmp_path: Path, runner: ScriptRunner) -> None:
    script(tmp_path / "d", "Sync_Enter_00", mode=0o644)
    with pytest.raises(ScriptError, match="Sync_Enter_00 is not executable"):
        runner.run("Sync", "Enter", ignore_errors=False)
    (tmp_path / "d" / "Sync_Enter_00").chmod(0o755)
    (tmp_path / "d" / "Sync_Enter_00").write_text("#!/nonexistent\n")
    with pytest.raises(ScriptError, match="Sync_Enter_00"):
        runner.run("Sync", "Enter", ignore_errors=False)


def test_an_artifact_cannot_bring_scripts_of_the_root_file_system(runner: ScriptRunner) -> None:
    with pytest.raises(ScriptError, match="an artifact cannot bring that one"):
        runner.take({"Download_Enter_00": b""})


# In an update


FAILING = 'test ! -e "$WORLD/fail-$(basename "$0")"'


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with one script for every state and action."""
    directory = tmp_path_factory.mktemp("scripted")
    world_artifact(directory)
    paths = [
        script(directory / "scripts", f"{state}_{action}_50", FAILING)
        for state in STATES
        for action in ("Enter", "Leave", "Error")
        if not (action == "Error" and ("Rollback" in state or "Failure" in state))
    ]
    output = directory / "v2.mender"
    write_artifact(
        output,
        directory / "rootfs.img",
        name="v2",
        device_types=[DEVICE_TYPE],
        compression="none",
        scripts=paths,
    )
    assert (directory / "rootfs.img").read_bytes() == image_bytes(IMAGE_BYTES, 2)
    return output


def world_with_scripts(
    directory: Path, artifact: Path, seed: int = 0, model: str = "kept"
) -> World:
    world = World(directory, artifact, seed, model)
    rootfs = directory / "rootfs-scripts"
    for action in ("Enter", "Leave", "Error"):
        script(rootfs, f"Download_{action}_50", FAILING)
    (rootfs / "version").write_text("3")
    return world


def names(world: World) -> list[str]:
    return [name.removesuffix("_50") for name in world.log()]


BEFORE_RESTART = ["Download_Enter", "Download_Leave", "ArtifactInstall_Enter"]
REBOOT = ["ArtifactReboot_Enter"]
COMMIT = ["ArtifactCommit_Enter", "ArtifactCommit_Leave"]
BACK = ["ArtifactRollback_Enter", "ArtifactRollback_Leave"]
BACK_REBOOT = ["ArtifactRollbackReboot_Enter", "ArtifactRollbackReboot_Leave"]
FAILURE = ["ArtifactFailure_Enter", "ArtifactFailure_Leave"]


def update_with(world: World, deployment: str, *failing: str) -> str:
    for name in failing:
        (world.directory / f"fail-{name}_50").touch()
    _, said = operate(world, "install", "v2.mender", deployment)
    return said + settle(world)


def test_all_scripts_of_a_deployment_run_in_the_documented_order(
    tmp_path: Path, scripted: Path
) -> None:
    world = world_with_scripts(tmp_path, scripted)
    update_with(world, "d-1")
    assert names(world) == [
        *BEFORE_RESTART,
        "ArtifactInstall_Leave",
        *REBOOT,
        "ArtifactReboot_Leave",
        *COMMIT,
    ]
    assert not (tmp_path / "scripts").exists(), "the artifact's scripts are gone afterwards"
    assert world.client().artifact_name() == "v2"


def test_by_hand_the_reboot_scripts_do_not_run(tmp_path: Path, scripted: Path) -> None:
    """As documented for the standalone mode."""
    world = world_with_scripts(tmp_path, scripted)
    update_with(world, "")
    assert names(world) == [*BEFORE_RESTART, "ArtifactInstall_Leave", *COMMIT]


@pytest.mark.parametrize(
    ("failing", "then"),
    [
        ("Download_Enter", ["Download_Error"]),
        ("Download_Leave", ["Download_Error"]),
        ("ArtifactInstall_Enter", ["ArtifactInstall_Error", *BACK, *FAILURE]),
        ("ArtifactInstall_Leave", ["ArtifactInstall_Error", *BACK, *FAILURE]),
        ("ArtifactReboot_Enter", ["ArtifactReboot_Error", *BACK, *FAILURE]),
        ("ArtifactReboot_Leave", ["ArtifactReboot_Error", *BACK, *BACK_REBOOT, *FAILURE]),
        ("ArtifactCommit_Enter", ["ArtifactCommit_Error", *BACK, *BACK_REBOOT, *FAILURE]),
    ],
)
def test_a_failing_script_takes_the_documented_way_back_and_is_the_cause(
    tmp_path: Path, scripted: Path, failing: str, then: list[str]
) -> None:
    world = world_with_scripts(tmp_path, scripted)
    said = update_with(world, "d-1", failing)
    judge(world, said)
    assert world.running_image() == "v1"
    assert names(world)[names(world).index(failing) + 1 :] == then
    outcome = world.store.last_outcome()
    assert outcome is not None
    assert outcome.cause == f"state script {failing}_50 exited with 1"
    assert f"error: state script {failing}_50 exited with 1" in said
    assert world.client().artifact_name() == "v1"


def test_a_commit_leave_script_that_fails_cannot_undo_the_commit(
    tmp_path: Path, scripted: Path
) -> None:
    world = world_with_scripts(tmp_path, scripted)
    said = update_with(world, "d-1", "ArtifactCommit_Leave")
    assert world.running_image() == "v2"
    assert names(world)[-2:] == ["ArtifactCommit_Leave", "ArtifactCommit_Error"]
    assert world.client().artifact_name() == "v2_INCONSISTENT"
    assert "error: state script ArtifactCommit_Leave_50 exited with 1" in said


@pytest.mark.parametrize(
    "ignored", [*BACK, *FAILURE, "ArtifactRollbackReboot_Enter", "ArtifactRollbackReboot_Leave"]
)
def test_an_error_that_has_to_be_ignored_makes_the_name_inconsistent(
    tmp_path: Path, scripted: Path, ignored: str
) -> None:
    world = world_with_scripts(tmp_path, scripted)
    update_with(world, "d-1", "ArtifactCommit_Enter", ignored)
    assert world.running_image() == "v1"
    assert names(world)[-6:] == [*BACK, *BACK_REBOOT, *FAILURE]
    assert world.client().artifact_name() == "v2_INCONSISTENT"
    outcome = world.store.last_outcome()
    assert outcome is not None
    assert outcome.cause == "state script ArtifactCommit_Enter_50 exited with 1"


@pytest.mark.parametrize("healthy", [True, False])
def test_a_cut_at_any_event_with_scripts_ends_with_whole_scripts(
    tmp_path: Path, scripted: Path, healthy: bool
) -> None:
    """Whatever began to change the system is followed by the scripts that settle it."""
    cuts = 0
    for cut_at in range(1, 100):
        for model in CACHE_MODELS[: 1 + cut_at % 2]:
            world = world_with_scripts(tmp_path / f"{cut_at}-{model}", scripted, cut_at, model)
            world.healthy = healthy
            world.power.cut_at = cut_at
            _, said = operate(world, "install", "v2.mender", "d-1")
            installed = not world.power.off
            # Once installed, the counting goes on over the first boot.
            second = cut_at - world.power.events if installed else 0
            said += settle(world, second)
            judge(world, said)
            seen = names(world)
            assert world.store.update() is None
            assert not (world.directory / "scripts").exists()
            if world.running_image() == "v2":
                assert seen[-1] == "ArtifactCommit_Leave", seen
                assert "ArtifactInstall_Leave" in seen, "committed without its migration"
                assert world.client().artifact_name() == "v2"
            elif any(name.startswith("Artifact") for name in seen):
                assert seen[-2:] == FAILURE, seen
                assert "ArtifactRollback_Leave" in seen
                assert world.client().artifact_name() == "v1"
        cuts += 1
        if installed and second > 12:
            break
    assert cuts >= 25


def test_a_script_that_restarts_the_device_every_time_ends_in_a_message_not_a_loop(
    tmp_path: Path, scripted: Path
) -> None:
    """ArtifactRollback_Enter never returns: the step counter stops it."""
    world = world_with_scripts(tmp_path, scripted)
    world.healthy = False
    operate(world, "install", "v2.mender", "d-1")
    said = endless(world)
    assert "entered 29 states without an end" in said
    assert world.running_image() == "v1"
    outcome = world.store.last_outcome()
    assert outcome is not None
    assert "without an end, the last was ArtifactRollback_Enter" in outcome.cause
    assert "50-sick" in outcome.cause, "what went wrong first is not forgotten"
    world.healthy = True
    assert "committed v2" in update_with(world, "d-2")


def endless(world: World, boots: int = 60) -> str:
    """Boot again and again while ArtifactRollback_Enter restarts the device."""
    said = ""
    for _ in range(boots):
        world.restart()
        client_events = world.power.events
        # Find the script's event by running until it: cut exactly there, every time.
        world.power.cut_at = 0
        world.power.trip_on = "script ArtifactRollback_Enter_50"
        _, text = operate(world, "resume")
        said += text
        world.power.trip_on = ""
        if not world.power.off and world.store.update() is None:
            return said
        assert world.power.events > client_events
    raise AssertionError(f"still going after {boots} boots: {said[-500:]}")


def test_without_the_step_counter_that_loop_is_endless(
    tmp_path: Path, scripted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: a counter that is never looked at."""
    monkeypatch.setattr("updater.device.model.MAX_STEPS", 1 << 30)
    monkeypatch.setattr("updater.device.client.MAX_STEPS", 1 << 30)
    world = world_with_scripts(tmp_path, scripted)
    world.healthy = False
    operate(world, "install", "v2.mender", "d-1")
    with pytest.raises(AssertionError, match="still going after 60 boots"):
        endless(world)
