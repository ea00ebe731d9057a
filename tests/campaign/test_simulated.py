"""Simulated lifetimes: deterministic, honest about what a cut may do, and able to find bugs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import evolve
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_bugs import BUGS, NARROW

from framework.campaign import search
from framework.campaign.bundle import read_bundle
from framework.campaign.kept import keep, live_again
from framework.campaign.lifetimes import Fault, Lifetime, Schedule, live, trace
from framework.campaign.models import CACHE_MODELS
from framework.campaign.promote import faults_of
from framework.campaign.search import MODULES, SCRIPTED, TOO_LATE, batch, draw, shrink, singles
from framework.cli import cli
from framework.disk.models import model_from
from framework.targets.simulated.drive import Action, Drive, DriveError, PowerLost, Step
from framework.targets.simulated.filesystem import FileSystem, FileSystemError, format_region
from framework.targets.simulated.laboratory import Laboratory

SLOW = {"store-never-synced": 2500, "no-read-back": 800}
"""Lifetimes within which the bugs that need luck are found; the others are within 300."""


@pytest.fixture
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


# Determinism.


def test_the_same_schedule_gives_the_same_lifetime(laboratory: Laboratory) -> None:
    for number in range(20):
        schedule = draw(random.Random(number))
        first, second = live(laboratory, schedule), live(laboratory, schedule)
        assert first == second


def test_another_process_with_another_hash_seed_sees_the_same_lifetimes() -> None:
    program = (
        "import hashlib\n"
        "from framework.campaign.search import batch\n"
        "from framework.targets.simulated.laboratory import Laboratory\n"
        "laboratory = Laboratory()\n"
        "tally = batch(laboratory, 5, 0, 30)\n"
        "print(tally.operations, sorted(tally.struck.items()), sorted(tally.positions))\n"
        "laboratory.close()\n"
    )

    def run(hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert run("1") == run("2")


@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_a_schedule_survives_its_text(seed: int) -> None:
    schedule = draw(random.Random(seed))
    assert Schedule.from_json(schedule.to_json()) == schedule


# The honest client.


def test_an_update_without_faults_is_committed(laboratory: Laboratory) -> None:
    lifetime = live(laboratory, Schedule(fresh=True))
    assert str(lifetime.verdict) == "PASS"
    assert "updater: committed v2 (slot b)" in lifetime.lines


@pytest.mark.parametrize("behaviour", ["panics", "hangs", "unhealthy"])
def test_a_sick_image_is_left_and_its_cause_is_told(laboratory: Laboratory, behaviour: str) -> None:
    lifetime = live(laboratory, Schedule(behaviour=behaviour))
    assert str(lifetime.verdict) == "PASS"
    assert any("rolled back to v1" in line for line in lifetime.lines)


@pytest.mark.parametrize("scripts", sorted(set(SCRIPTED) - {""}))
def test_state_scripts_run_and_their_failure_is_no_commit(
    laboratory: Laboratory, scripts: str
) -> None:
    lifetime = live(laboratory, Schedule(scripts=scripts))
    assert str(lifetime.verdict) == "PASS"
    ran = [line for line in lifetime.lines if line.startswith("updater: state script")]
    assert "updater: state script ArtifactInstall_Enter_00" in ran
    rolled_back = "updater: state script ArtifactRollback_Enter_00" in ran
    assert rolled_back == scripts.startswith("fail")


@pytest.mark.parametrize("reboot", ["No", "Automatic", "Yes"])
def test_a_package_is_installed_or_its_module_undoes_it(
    laboratory: Laboratory, reboot: str
) -> None:
    states = ("", "ArtifactInstall", "ArtifactReboot", "ArtifactVerifyReboot", "ArtifactCommit")
    for reverts in ("Yes", "No"):
        for fails in (*states, "ArtifactRollback", "ArtifactFailure"):
            for behaviour in ("well", "unhealthy"):
                module = f"reboot={reboot} reverts={reverts} fails={fails}"
                schedule = Schedule(behaviour=behaviour, module=module)
                lifetime = live(laboratory, schedule)
                assert str(lifetime.verdict) == "PASS", schedule.to_json()
                committed = any(line.startswith("updater: committed v2") for line in lifetime.lines)
                assert committed != schedule.sick


@pytest.mark.parametrize("kind", ["cut", "error"])
@pytest.mark.parametrize("module", ["reboot=Automatic reverts=Yes fails=", MODULES[3]])
def test_every_cut_and_error_of_a_package_is_survived(
    laboratory: Laboratory, module: str, kind: str
) -> None:
    for at in range(1, live(laboratory, Schedule(module=module)).exposed + 1):
        fault = Fault(at, kind, "torn" if kind == "cut" else "kept", at)
        lifetime = live(laboratory, Schedule((fault,), module=module))
        assert lifetime.struck
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()


@pytest.mark.parametrize("model", CACHE_MODELS)
def test_every_single_cut_of_an_update_is_survived(laboratory: Laboratory, model: str) -> None:
    operations = live(laboratory, Schedule()).exposed
    for schedule in singles(operations, (model,)):
        lifetime = live(laboratory, schedule)
        assert [strike.at for strike in lifetime.struck] == [schedule.faults[0].at]
        assert str(lifetime.verdict) == "PASS", schedule.to_json()


@pytest.mark.parametrize("then", ["resume", "commit", "rollback", "install"])
@pytest.mark.parametrize("behaviour", ["well", "unhealthy"])
def test_a_client_that_is_killed_anywhere_is_survived(
    laboratory: Laboratory, behaviour: str, then: str
) -> None:
    """The device runs on, and the next command finds what the last one left, in the same boot."""
    base = Schedule(behaviour=behaviour, actions=("install", then))
    killed = 0
    for at in range(1, live(laboratory, base).exposed + 1, 3):
        lifetime = live(laboratory, dataclasses.replace(base, faults=(Fault(at, "kill"),)))
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
        killed += bool(lifetime.struck)
    assert killed > 40


@pytest.mark.parametrize("kind", ["cut", "kill", "error"])
def test_a_status_that_finds_a_killed_clients_transaction_is_survived(
    laboratory: Laboratory, kind: str
) -> None:
    """Who opens the store next undoes it, with writes of its own, in which anything may strike."""
    told = []
    for ahead in range(1, 5):
        # In the record of ArtifactInstall's end: the journal is there, the pages are half written.
        lifetime = live(laboratory, Schedule((Fault(65, "kill"), Fault(65 + ahead, kind))))
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
        assert [strike.kind for strike in lifetime.struck] == ["kill", kind]
        assert {strike.state for strike in lifetime.struck} == {"ArtifactInstall"}
        told.append(lifetime.lines[lifetime.lines.index("updater: state ArtifactInstall") + 1])
    if kind == "cut":
        # Nothing else ran between the kill and the cut.
        assert all(line.startswith("BROWNOUT: booting") for line in told), told


def test_a_commit_that_rolls_a_package_back_does_not_say_that_all_is_well(
    laboratory: Laboratory,
) -> None:
    base = Schedule(module="reboot=Automatic reverts=Yes fails=", actions=("install", "commit"))
    first = next(o.number for o in trace(laboratory, base) if o.state == "ArtifactInstall")
    lifetime = live(laboratory, dataclasses.replace(base, faults=(Fault(first + 3, "kill"),)))
    assert str(lifetime.verdict) == "PASS"
    assert any("nothing to commit: the update is not running" in line for line in lifetime.lines)


def test_random_faults_are_survived(laboratory: Laboratory) -> None:
    for number in range(2):
        tally = batch(laboratory, 1, number)
        assert not tally.found, tally.found[0].schedule.to_json()
        assert len({state for state, _ in tally.struck}) >= 8


# Found by the first searches, and mended.


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(
            Schedule((Fault(68, "cut", "torn", 68),), fresh=True), id="unreadable-journal"
        ),
        pytest.param(Schedule((Fault(84, "cut", "torn", 84),), fresh=True), id="unreadable-page"),
        pytest.param(
            Schedule((Fault(10, "flip", "kept", 0),), actions=("stage", "rollback"), fresh=True),
            id="damaged-page",
        ),
        pytest.param(
            Schedule((Fault(80, "flip", "kept", 64659), Fault(88)), early=64, seed=27135),
            id="damaged-json",
        ),
        pytest.param(
            Schedule(
                (Fault(123, "flip", "kept", 360215),),
                behaviour="unhealthy",
                early=64,
                seed=54435,
            ),
            id="damaged-text",
        ),
        pytest.param(
            Schedule((Fault(82, "flip", "kept", 523431), Fault(88)), seed=25452),
            id="damaged-schema",
        ),
        pytest.param(Schedule((Fault(95), Fault(98, "cut", "torn"))), id="unreadable-later"),
    ],
)
def test_a_store_that_cannot_be_read_does_not_end_all_updates(
    laboratory: Laboratory, schedule: Schedule
) -> None:
    lifetime = live(laboratory, schedule)
    assert lifetime.struck
    assert str(lifetime.verdict) == "PASS"


@pytest.mark.parametrize("times", [1, 2])
def test_a_rollback_points_back_although_the_environment_takes_it_only_later(
    laboratory: Laboratory, times: int
) -> None:
    lifetime = live(laboratory, _with_failing_rollback(laboratory, times))
    assert str(lifetime.verdict) == "PASS"
    assert len(lifetime.struck) == times
    assert "updater: state ArtifactFailure" in lifetime.lines
    assert not any("still armed" in line for line in lifetime.lines)


def test_a_slot_that_stays_armed_is_told_and_left_at_the_next_start(laboratory: Laboratory) -> None:
    lifetime = live(laboratory, _with_failing_rollback(laboratory, 3))
    assert str(lifetime.verdict) == "PASS"
    [told] = [line for line in lifetime.lines if line.startswith("updater: error:")]
    assert "slot b is still armed" in told
    at = lifetime.lines.index(told)
    assert "BROWNOUT: booting slot b upgrade_available=1 " in lifetime.lines[at:]
    assert any("rolled back to v1" in line for line in lifetime.lines[at:])


def _with_failing_rollback(laboratory: Laboratory, times: int) -> Schedule:
    schedule = Schedule(scripts="fail ArtifactInstall_Leave_00")
    wanted = ("ArtifactRollback", "environment")
    first = next(o.number for o in trace(laboratory, schedule) if (o.state, o.area) == wanted)
    faults = tuple(Fault(first + number, "error") for number in range(times))
    return dataclasses.replace(schedule, faults=faults)


@pytest.mark.parametrize("seed", range(3))
def test_no_torn_write_of_the_store_loses_the_record_of_a_commit(
    laboratory: Laboratory, seed: int
) -> None:
    """Blocks that a cut made unreadable are put back from the journal; the scripts are run."""
    schedule = Schedule(scripts="ok")
    for step in trace(laboratory, schedule):
        if step.state in ("ArtifactCommit", "Cleanup") and step.area == "data":
            cut = dataclasses.replace(schedule, faults=(Fault(step.number, "cut", "torn", seed),))
            lifetime = live(laboratory, cut)
            assert str(lifetime.verdict) == "PASS", cut.to_json()
            assert not any("record of an update is lost" in line for line in lifetime.lines)


def test_an_error_while_the_store_is_undone_does_not_end_it(laboratory: Laboratory) -> None:
    schedule = Schedule(scripts="ok")
    steps = trace(laboratory, schedule)
    for step in steps:
        if (step.state, step.area) == ("ArtifactCommit", "data"):
            faults = (Fault(step.number), Fault(step.number + 1, "error"))
            lifetime = live(laboratory, dataclasses.replace(schedule, faults=faults))
            assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
            assert not any("record of an update is lost" in line for line in lifetime.lines)


def test_an_ignored_failure_is_told_although_the_store_failed_twice(laboratory: Laboratory) -> None:
    schedule = Schedule(scripts="fail ArtifactCommit_Leave_00")
    wanted = ("ArtifactCommit", "Cleanup")
    steps = [o.number for o in trace(laboratory, schedule) if o.state in wanted]
    for one in steps:
        for two in (2, 5, 7, 9):
            faults = (Fault(one, "error"), Fault(one + two, "error"))
            lifetime = live(laboratory, dataclasses.replace(schedule, faults=faults))
            assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()


def test_a_record_that_is_damaged_beyond_repair_is_told(laboratory: Laboratory) -> None:
    """One bit of the store is wrong, and the power is cut before the scripts behind the commit."""
    schedule = Schedule(scripts="ok")
    at = [
        o.number
        for o in trace(laboratory, schedule)
        if (o.state, o.area) == ("ArtifactCommit", "environment")
    ]
    cut = Fault(at[0] + 2)
    told = 0
    for number in range(at[0] - 14, at[0]):
        faults = (Fault(number, "flip"), cut)
        lifetime = live(laboratory, dataclasses.replace(schedule, faults=faults))
        assert str(lifetime.verdict) == "PASS", lifetime.schedule.to_json()
        told += any("v2_INCONSISTENT is recorded" in line for line in lifetime.lines)
    assert told


# It can fail.


def _flips() -> Iterator[Schedule]:
    for at in range(20, 110):
        yield Schedule((Fault(at, "flip"),), behaviour="panics")


def _cuts() -> Iterator[Schedule]:
    return singles(170, ("kept",))


def _errors() -> Iterator[Schedule]:
    for at in range(100, 200):
        yield Schedule((Fault(at, "error"),), scripts="fail ArtifactInstall_Leave_00")


def _too_late() -> Iterator[Schedule]:
    for scripts in TOO_LATE:
        for behaviour in ("well", "unhealthy"):
            yield Schedule(behaviour=behaviour, scripts=scripts)


def _packages() -> Iterator[Schedule]:
    for behaviour in ("well", "unhealthy"):
        for module in MODULES:
            yield Schedule(behaviour=behaviour, module=module)


def _torn() -> Iterator[Schedule]:
    for at in range(150, 230):
        yield Schedule((Fault(at, "cut", "torn"),), scripts="ok")


@pytest.mark.parametrize(
    ("name", "schedules"),
    [
        ("acknowledges-too-early", _cuts),
        ("rollback-keeps-trial", _flips),
        ("points-back-once", _errors),
        ("ignored-errors-hidden", _too_late),
        ("unreadable-store-given-up", _torn),
        ("module-not-rolled-back", _packages),
        ("package-not-checked", _packages),
    ],
)
def test_a_narrow_planted_bug_is_found_and_shrunk(
    name: str, schedules: Callable[[], Iterator[Schedule]]
) -> None:
    bug = NARROW[name]
    with contextlib.closing(bug.laboratory()) as broken:
        for schedule in schedules():
            found = bug.invariants & set(live(broken, schedule).verdict.violated)
            if found:
                smallest, _ = shrink(broken, schedule, min(found))
                assert len(smallest.faults) <= 1
                break
        else:
            pytest.fail(f"{name} was not found")
    with contextlib.closing(Laboratory()) as shipped:
        assert str(live(shipped, schedule).verdict) == "PASS"


@pytest.mark.parametrize("name", [name for name in BUGS if name not in SLOW])
def test_a_planted_bug_is_found_and_shrunk(name: str) -> None:
    _find(name, 300)


@pytest.mark.night
@pytest.mark.parametrize("name", SLOW)
def test_a_planted_bug_that_needs_luck_is_found_and_shrunk(name: str) -> None:
    _find(name, SLOW[name])


def _find(name: str, limit: int) -> None:
    bug = BUGS[name]
    laboratory = bug.laboratory()
    try:
        for number in range(-(-limit // 100)):
            for found in batch(laboratory, 1, number, 100).found:
                broken = bug.invariants & set(found.violated)
                if broken:
                    invariant = min(broken)
                    smallest, _ = shrink(laboratory, found.schedule, invariant)
                    assert len(smallest.faults) <= 2
                    assert invariant in live(laboratory, smallest).verdict.violated
                    return
    finally:
        laboratory.close()
    pytest.fail(f"{name} was not found within {limit} lifetimes")


# What is found is kept, lived through again, and taken to other rigs.


def test_a_bundle_of_a_lifetime_is_reproduced_bit_for_bit(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    first = Fault(40, "cut", "torn", 3)
    last = live(laboratory, Schedule((first,), fresh=True)).exposed
    schedule = Schedule((first, Fault(last, "cut", "subset", 5)), fresh=True)
    path = tmp_path / "one.bundle"
    keep(path, live(laboratory, schedule, hash_drives=True))
    bundle = read_bundle(path)
    assert len(bundle.cuts) == 2
    result = CliRunner().invoke(cli, ["replay", str(path)])
    assert result.exit_code == 0, result.output
    assert "reproduced" in result.output
    other = evolve(bundle.cuts[1], disks={"drive": "0" * 64})
    done = live_again(laboratory, evolve(bundle, cuts=(bundle.cuts[0], other)))
    assert done.disks == (f"the drive after cut 1 (operation {other.operation})",)
    done = live_again(laboratory, evolve(bundle, steps=bundle.steps[:-1]))
    assert done.divergence is not None


def test_a_violation_is_kept_as_a_bundle(tmp_path: Path) -> None:
    bug = BUGS["no-trial"]
    laboratory = bug.laboratory()
    try:
        lifetime = live(laboratory, Schedule(behaviour="panics"), hash_drives=True)
        assert lifetime.verdict.violated
        keep(tmp_path / "bug.bundle", lifetime)
    finally:
        laboratory.close()
    # The shipped client does not do that.
    result = CliRunner().invoke(cli, ["replay", str(tmp_path / "bug.bundle")])
    assert result.exit_code == 1
    assert "diverged at event" in result.output


def test_a_schedule_is_said_again_in_the_vocabulary(laboratory: Laboratory) -> None:
    steps = trace(laboratory, Schedule())
    live_at = {(o.state, o.area): o.number for o in reversed(steps)}
    cut = Fault(live_at["Download", "slot b"], "cut", "subset")
    chosen = list(map(str, faults_of(laboratory, Schedule((cut,)))))
    assert chosen[0].startswith("power cut when 17 % of the image is written (cache: subset")
    commit = Fault(live_at["ArtifactCommit", "environment"], "cut", "torn")
    [said] = map(str, faults_of(laboratory, Schedule((commit,))))
    assert "ArtifactCommit" in said


def test_a_schedule_is_promoted_to_another_rig(laboratory: Laboratory) -> None:
    steps = trace(laboratory, Schedule())
    at = next(o.number for o in steps if (o.state, o.area) == ("ArtifactCommit", "environment"))
    schedule = Schedule((Fault(at, "cut", "torn", 7),))
    arguments = ["--promote", schedule.to_json(), "--rig", "rigs/simulated.yaml"]
    result = CliRunner().invoke(cli, ["simulate", *arguments])
    assert result.exit_code == 0, result.output
    assert "PASS on simulated.yaml" in result.output
    assert "never struck" not in result.output


# The drive and the file system keep their promises, and no others.


class _CutAt:
    def __init__(self, at: int, model: str, seed: int) -> None:
        self.due = at
        self.cut = (model_from(model), seed)

    def at(self, step: Step) -> Action:
        return "cut"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from(["kept", "prefix", "subset", "reordered", "torn"]))
def test_a_cut_takes_nothing_that_was_flushed(seed: int, model: str) -> None:
    rng = random.Random(seed)
    drive = Drive(bytes(64 * 512), _CutAt(rng.randrange(1, 30), model, seed))
    flushed: dict[int, int] = {}
    since: dict[int, set[int]] = {}
    with pytest.raises(PowerLost):
        for value in range(1, 256):
            if rng.random() < 0.2:
                drive.flush()
                flushed.update({at: max(values) for at, values in since.items()})
                since.clear()
                continue
            first, count = rng.randrange(60), rng.randrange(1, 4)
            for sector in range(first, first + count):
                since.setdefault(sector, set()).add(value)
            drive.write(first * 512, bytes([value]) * 512 * count)
    drive.power_on()
    for sector in range(64):
        allowed = {flushed.get(sector, 0), *since.get(sector, ())}
        try:
            content = drive.read(sector * 512, 512)
        except DriveError:
            assert sector in since
            continue
        if model != "torn" or sector not in since:
            assert len(set(content)) == 1
            assert content[0] in allowed


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from(["kept", "prefix", "subset", "torn"]))
def test_a_synced_file_survives_a_cut_unless_it_was_being_overwritten(
    seed: int, model: str
) -> None:
    rng = random.Random(seed)
    content = bytearray(64 * 4096)
    format_region(content, 0, len(content))
    drive = Drive(bytes(content), _CutAt(rng.randrange(1, 60), model, seed))
    data = FileSystem(drive, 0, len(content), lambda: rng.random() < 0.3)
    synced: dict[str, bytes | None] = {}
    touched: set[str] = set()
    with pytest.raises(PowerLost):
        for value in range(200):
            name = rng.choice("abc")
            choice = rng.random()
            if choice < 0.6:
                body = bytes([value]) * rng.randrange(1, 9000)
                touched.add(name)
                if data.exists(name):
                    data.remove(name)
                data.create(name)
                data.write(name, 0, body)
                data.sync(name)
                synced[name] = body
                touched.discard(name)
            elif data.exists(name):
                touched.add(name)
                data.remove(name)
                data.sync_directory()
                synced[name] = None
                touched.discard(name)
    drive.power_on()
    again = FileSystem(drive, 0, len(content))
    for name, body in synced.items():
        if name in touched:
            continue
        if body is None:
            assert not again.exists(name)
        else:
            assert again.read(name, 0, len(body) + 1) == body


def test_a_full_partition_is_told() -> None:
    content = bytearray(8 * 4096)
    format_region(content, 0, len(content))
    data = FileSystem(Drive(bytes(content)), 0, len(content))
    data.create("a")
    with pytest.raises(FileSystemError, match="no space left"):
        data.write("a", 0, bytes(9 * 4096))


# The command.


def test_a_search_says_what_it_did(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["simulate", "--lifetimes", "100", "--workers", "1", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "250 lifetimes" in result.output
    assert "PASS: 250" in result.output


def test_a_failure_of_the_simulation_ends_no_search_and_is_no_verdict(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = live, []

    def sometimes(laboratory: Laboratory, schedule: Schedule) -> Lifetime:
        calls.append(schedule)
        if len(calls) == 3:
            raise AssertionError("more power cuts than any schedule has")
        return real(laboratory, schedule)

    monkeypatch.setattr(search, "live", sometimes)
    tally = batch(laboratory, 1, 0, 10)
    assert tally.lifetimes == 9
    [broken] = tally.broken
    assert broken == f"{calls[2].to_json()}: AssertionError: more power cuts than any schedule has"


def test_a_schedule_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    schedule = json.loads(Schedule((Fault(40, "cut", "kept", 1),)).to_json())
    path.write_text(json.dumps({"version": 1, "schedule": schedule}))
    result = CliRunner().invoke(cli, ["simulate", "--replay", str(path)])
    assert result.exit_code == 0, result.output
    assert "power cut at operation 40" in result.output


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"version": 9, "schedule": {}}', "version 9"),
        ('{"faults": 1}', "no schedule"),
        ("not json", "no schedule"),
    ],
)
def test_a_file_that_is_no_violation_is_one_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "framework.cli", "simulate", "--replay", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_ends_the_search_and_its_processes(tmp_path: Path) -> None:
    search = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "framework.cli",
            "simulate",
            "--lifetimes",
            "1000000",
            "--workers",
            "2",
            "--output",
            str(tmp_path),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(_children(search.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    children = _children(search.pid)
    assert children
    search.send_signal(signal.SIGINT)
    _, errors = search.communicate(timeout=60)
    assert search.returncode == 130
    assert "interrupted" in errors
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_a_search_that_is_killed_leaves_no_worker_behind(tmp_path):
    program = [sys.executable, "-m", "framework.cli", "simulate", "--lifetimes", "100000"]
    search = subprocess.Popen(
        [*program, "--workers", "2", "--output", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = Path(f"/proc/{search.pid}/task/{search.pid}/children")
    deadline = time.monotonic() + 60
    workers: list[str] = []
    while len(workers) < 2 and time.monotonic() < deadline:
        workers = children.read_text(encoding="ascii").split()
        time.sleep(0.1)
    assert len(workers) >= 2
    time.sleep(3)
    search.kill()
    search.wait()
    left = {pid for pid in workers if Path(f"/proc/{pid}").exists()}
    while left and time.monotonic() < deadline + 30:
        time.sleep(0.1)
        left = {pid for pid in left if Path(f"/proc/{pid}").exists()}
    assert left == set()
