"""Simulated devices with GRUB: every cut is survived, and what is broken on purpose is found."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import lru_cache

import pytest
from click.testing import CliRunner
from grub_bugs import GRUB_BUGS

from framework.campaign.lifetimes import Fault, Schedule, live, trace
from framework.campaign.search import batch, shrink, singles
from framework.cli import cli
from framework.disk.journal import SECTOR
from framework.targets.simulated.drive import Drive, NoPlan
from framework.targets.simulated.grub import (
    COPIES,
    LOCK,
    GrubCopies,
    format_block,
    read_environments,
    shipped_script,
)
from framework.targets.simulated.grubscript import Interpreter, Script, ScriptError
from framework.targets.simulated.laboratory import Laboratory

GRUB = Schedule(bootloader="grub")
MODELS = ("kept", "prefix", "reordered", "torn", "torn:4096", "subset")


@pytest.fixture
def laboratory() -> Iterator[Laboratory]:
    made = Laboratory()
    yield made
    made.close()


def _with(behaviour: str, slot: str) -> Schedule:
    return dataclasses.replace(GRUB, behaviour=behaviour, slot=slot)


# The honest device.


@pytest.mark.parametrize("slot", ["a", "b"])
@pytest.mark.parametrize("behaviour", ["well", "panics", "hangs", "unhealthy"])
def test_an_update_without_faults(laboratory: Laboratory, behaviour: str, slot: str) -> None:
    lifetime = live(laboratory, _with(behaviour, slot))
    assert str(lifetime.verdict) == "PASS"
    wanted = "committed v2" if behaviour == "well" else "rolled back to v1"
    assert any(wanted in line for line in lifetime.lines)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("behaviour", ["well", "hangs"])
def test_every_single_cut_is_survived(laboratory: Laboratory, behaviour: str, model: str) -> None:
    """From slot b: without variables GRUB starts slot a, which is then the one being updated."""
    base = _with(behaviour, "b")
    operations = live(laboratory, base).exposed
    assert operations > 150
    for schedule in singles(operations, (model,), base):
        lifetime = live(laboratory, schedule)
        assert str(lifetime.verdict) == "PASS", schedule.to_json()
        assert lifetime.struck


@pytest.mark.parametrize("behaviour", ["well", "hangs", "unhealthy", "panics"])
def test_any_part_of_what_the_boot_loader_wrote_may_be_missing(
    laboratory: Laboratory, behaviour: str
) -> None:
    """It can't flush: eight subsets at each moment from its start to where init has flushed."""
    base = _with(behaviour, "b")
    steps = [step for step in trace(laboratory, base) if step.area == "environment"]
    places = [step.number for step in steps if step.starts > 1 and step.length == SECTOR]
    assert len(places) >= 6
    for place in {near for at in places for near in (at, at + 1, at + 2)}:
        for seed in range(8):
            fault = Fault(place, "cut", "subset", 100 * place + seed)
            schedule = dataclasses.replace(base, faults=(fault,))
            assert str(live(laboratory, schedule).verdict) == "PASS", schedule.to_json()


def test_the_boot_loader_writes_sector_by_sector_and_does_not_flush(
    laboratory: Laboratory,
) -> None:
    steps = [step for step in trace(laboratory, GRUB) if step.starts == 2]
    first = next(i for i, step in enumerate(steps) if step.kind == "flush")
    written = steps[:first]
    # Lock, block, lock of copy 1; init flushes that before it writes.
    assert [(step.area, step.length) for step in written] == 2 * 3 * [("environment", 512)]


def test_a_device_without_any_valid_copy_gets_new_ones(laboratory: Laboratory) -> None:
    drive = laboratory.drive(NoPlan(), bootloader="grub", slot="b")
    device = laboratory.device("well", drive=drive, bootloader="grub")
    for copy in COPIES:
        drive.write(copy + LOCK, format_block({"editing": "1"}))
    assert read_environments(drive).valid_copies == 0
    start = device.start()
    assert (start.ready, start.slot) == (True, "b")
    seen = read_environments(drive)
    assert seen.valid_copies == 2
    assert seen.variables["mender_boot_part"] == "3"


def test_random_lifetimes_are_reproducible() -> None:
    def lived() -> list[str]:
        with contextlib.closing(Laboratory()) as laboratory:
            tally = batch(laboratory, 1, 0, 40, bootloader="mixed")
        return [f"{tally.operations} {tally.fired}", *map(str, sorted(tally.struck.items()))]

    assert lived() == lived()


def test_the_command_takes_a_boot_loader() -> None:
    result = CliRunner().invoke(cli, ["simulate", "--replay", GRUB.to_json()])
    assert result.exit_code == 0, result.output
    assert "under GRUB" in result.output
    result = CliRunner().invoke(
        cli, ["simulate", "--replay", GRUB.to_json().replace("grub", "lilo")]
    )
    assert "there is no boot loader 'lilo'" in str(result.exception)


# It can fail.


@lru_cache(maxsize=1)
def _one_cut() -> list[Schedule]:
    """Cuts in what is written to the copies, which the shipped device survives."""
    base = _with("hangs", "b")
    with contextlib.closing(Laboratory()) as shipped:
        places = [step.number for step in trace(shipped, base) if step.area == "environment"]
        schedules = [
            dataclasses.replace(base, faults=(Fault(place, "cut", model, seed),))
            for model, seeds in (("kept", 1), ("subset", 1), ("torn", 8))  # also as garbage
            for place in places
            for seed in range(place, place + seeds)
        ]
        # GRUB doesn't flush: in what init writes behind it, anything of both may be missing.
        schedules += [
            dataclasses.replace(started, faults=(Fault(step.number, "cut", "subset", seed),))
            for started in (base, _with("well", "b"))
            for step in trace(shipped, started)
            if step.area == "environment" and step.starts > 1
            for seed in range(8)
        ]
        return [one for one in schedules if not live(shipped, one).verdict.violated]


@lru_cache(maxsize=1)
def _two_cuts() -> list[Schedule]:
    """A cut while the client arms the new slot, and one in what GRUB writes at the next start."""
    base = _with("hangs", "b")
    with contextlib.closing(Laboratory()) as shipped:
        first = [
            step.number
            for step in trace(shipped, base)
            if (step.state, step.area) == ("ArtifactInstall", "environment")
        ]
        schedules = [
            dataclasses.replace(base, faults=(Fault(at), Fault(at + ahead, "cut", "subset", seed)))
            for at in first
            for ahead in range(1, 10)
            for seed in range(4)
        ]
        for one in schedules:
            assert str(live(shipped, one).verdict) == "PASS", one.to_json()
        return schedules


@pytest.mark.parametrize("name", GRUB_BUGS)
def test_a_planted_bug_is_found_and_shrunk(name: str) -> None:
    bug = GRUB_BUGS[name]
    # One laboratory at a time: SQLite has one VFS of that name in a process.
    candidates = _one_cut() if bug.cuts == 1 else _two_cuts()
    with contextlib.closing(bug.laboratory()) as broken:
        for schedule in candidates:
            if seen := bug.invariants & set(live(broken, schedule).verdict.violated):
                smallest, _ = shrink(broken, schedule, min(seen), limit=60)
                assert len(smallest.faults) in (0, bug.cuts)
                assert smallest.bootloader == "grub"
                return
    pytest.fail(f"{name} was not found in {len(candidates)} lifetimes")


# The script's language.


def _run(text: str) -> tuple[list[str], dict[str, str]]:
    said: list[str] = []

    def echo(arguments: object) -> bool:
        said.append(" ".join(arguments))  # type: ignore[call-overload]
        return True

    shell = Interpreter({"echo": echo, "fail": lambda arguments: False})
    shell.run(Script(text))
    return said, shell.variables


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("set a=1\necho $a ${a}2 '$a' \"$a b\"", ["1 12 $a 1 b"]),
        ('echo $none x "$none"', ["x "]),
        ("set a='b  c'; echo $a; echo \"$a\"", ["b c", "b  c"]),
        ("if fail; then echo 1; elif [ 2 -ge 10 ]; then echo 2; else echo 3; fi", ["3"]),
        ("if [ a = b -o c = c -a d != e ]; then echo yes; fi", ["yes"]),
        ('if [ -z "$no" ]; then echo none; fi # why', ["none"]),
        ("function f { if [ $1 = 1 ]; then return; fi; echo $2; }\nf 1 2; f 2 3", ["3"]),
        ('function f { set r=$1; }\nf a; unset r; echo "[$r]"', ["[]"]),
    ],
)
def test_the_language(text: str, said: list[str]) -> None:
    assert _run(text)[0] == said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("insmod ext2", "the command 'insmod' is not known here"),
        ("if echo; then echo", "the script ends within"),
        ("fi", "'fi' is not expected"),
        ("echo 'a", "line 1 can't be read"),
        ("[ a = b c ]", "is not known here"),
        ("[ a = b", "a .* without its"),
        ("set a", "there is no ="),
        ("function f { f; }\nf", "without an end"),
    ],
)
def test_what_is_not_known_is_an_error(text: str, why: str) -> None:
    with pytest.raises(ScriptError, match=why):
        _run(text)


def test_a_script_that_starts_nothing_is_an_error() -> None:
    drive = Drive(bytes(128 << 10))
    with pytest.raises(ScriptError, match="without starting a kernel"):
        GrubCopies(drive, "echo nothing").start(lambda slot: True)
    with pytest.raises(ScriptError, match="there is no"):
        GrubCopies(drive, "save_env -f (hd1)/env a").start(lambda slot: True)


def test_the_script_is_the_one_of_the_images() -> None:
    assert "function bo_record" in shipped_script()
