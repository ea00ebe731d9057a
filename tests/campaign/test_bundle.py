"""A bundle says what was put into it, refuses damage, and its disks come out bit for bit."""

from __future__ import annotations

import json
import random
import sys
import zipfile
from pathlib import Path

import pytest
from attrs import evolve
from disk_nbd_client import Client

from framework.campaign import Bundle, BundleError, CutFacts, compare, read_bundle, write_bundle
from framework.campaign.bundle import FACTS, FORMAT, JOURNAL, read_console, unpack_journal
from framework.campaign.composition import Composition, Placed, Step
from framework.campaign.replay import check_disks, disk_sha256
from framework.campaign.steps import Divergence, steps_of
from framework.cli import main
from framework.disk import DeviceSpec, JournalReader, Recorder, TornSector, VolatileCache
from framework.faults import flush, power_cut
from framework.verdict import (
    BootEnvironment,
    BootSeen,
    DiskSeen,
    InstallEnded,
    PowerCut,
    SlotContent,
    SlotState,
)

MIB = 1 << 20
KEPT = Path(__file__).parent / "kept"
A_BUNDLE = Bundle(
    scenario="scenarios/test_power.py::test_x[50-torn]",
    title="Power cut",
    rig="qemu-arm64.yaml",
    rig_text="targets: {}\n",
    run_seed=7,
    faults=("power cut at flush 2 (cache: torn)",),
    steps=("installing v2", "power cut (torn)", "started v1 in slot a"),
    verdict="VIOLATION(5)",
    findings=((5, False, "file lost"), (6, None, "nothing seen")),
    timeline=((0.5, "boot", "power on"),),
    cuts=(CutFacts(0, 12, "torn", 9, {"vda": "ab" * 32}),),
    versions={"brownout": "0.1"},
    images={"v2": "cd" * 32},
    bases={"vda": ("/images/disk.img", "ef" * 32)},
)
A_COMPOSITION = Composition(
    "v1",
    (Step("install", "v2"), Step("restart")),
    (Placed(0, power_cut("torn").when(flush(2))),),
    seed=5,
)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Bundle]:
    """A bundle of a recorder's life: writes, cuts under harsh models, the digests of then."""
    base = tmp_path / "base.img"
    base.write_bytes(random.Random(3).randbytes(2 * MIB))
    cuts = []
    recorder = Recorder([DeviceSpec("vda", base)], tmp_path / "run").start()
    for number, model in enumerate((VolatileCache(), TornSector())):
        with Client(recorder.endpoint("vda").socket, "vda") as client:
            for at in range(20):
                client.write(at * 8192, bytes([number + 1, at]) * 2048)
                if at == 9:
                    client.flush()
        cut = recorder.cut(model, seed=number + 5)
        with recorder.disk("vda") as disk:
            digests = {"vda": disk_sha256(disk)}
        cuts.append(CutFacts(cut.index, cut.operation, cut.model, cut.seed, digests))
    recorder.close()
    header = JournalReader(recorder.journal_path).header.devices[0]
    bundle = evolve(
        A_BUNDLE,
        cuts=tuple(cuts),
        bases={"vda": (str(header.base.path), header.base.sha256)},
    )
    path = tmp_path / "run.bundle"
    return path, write_bundle(path, bundle, "the console\n", recorder.journal_path)


def test_what_is_put_in_comes_out(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.bundle"
    write_bundle(path, A_BUNDLE, "U-Boot\n")
    assert read_bundle(path) == A_BUNDLE
    assert read_console(path) == "U-Boot\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.bundle"], "no temporary file is left"


def test_the_disks_of_every_cut_come_out_bit_for_bit(recorded: tuple[Path, Bundle]) -> None:
    path, bundle = recorded
    assert read_bundle(path) == bundle
    assert check_disks(path, bundle) == ()


def test_a_disk_that_is_not_the_same_is_named(recorded: tuple[Path, Bundle]) -> None:
    path, bundle = recorded
    wrong = evolve(bundle.cuts[1], disks={"vda": "0" * 64})
    beyond = evolve(bundle.cuts[1], index=7)
    told = check_disks(path, evolve(bundle, cuts=(bundle.cuts[0], wrong, beyond)))
    assert told == (
        "vda after cut 1 (operation 42)",
        "cut 7 is not in the journal, which has 2",
    )


def test_another_base_image_is_refused(recorded: tuple[Path, Bundle], tmp_path: Path) -> None:
    path, bundle = recorded
    other = tmp_path / "other.img"
    other.write_bytes(bytes(2 * MIB))
    moved = evolve(bundle, bases={"vda": (str(other), "")})
    with pytest.raises(BundleError, match="build the images it was made of"):
        check_disks(path, moved)


def test_a_journal_that_was_exchanged_is_refused(
    recorded: tuple[Path, Bundle], tmp_path: Path
) -> None:
    path, bundle = recorded
    into = tmp_path / "journal"
    with pytest.raises(BundleError, match="not the one that was packed"):
        unpack_journal(path, evolve(bundle, journal_sha256="0" * 64), into)
    assert not into.exists()


def test_a_bundle_without_a_journal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.bundle"
    write_bundle(path, A_BUNDLE)
    with pytest.raises(BundleError, match="has no journal"):
        check_disks(path, A_BUNDLE)


def test_a_bundle_cut_off_anywhere_is_one_clear_line(
    recorded: tuple[Path, Bundle], tmp_path: Path
) -> None:
    path, _ = recorded
    whole = path.read_bytes()
    short = tmp_path / "short.bundle"
    for length in random.Random(1).sample(range(len(whole)), 60):
        short.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"bundle .*short\.bundle"):
            read_bundle(short)


def test_a_damaged_bundle_is_an_error_or_what_it_was(
    recorded: tuple[Path, Bundle], tmp_path: Path
) -> None:
    path, bundle = recorded
    whole = path.read_bytes()
    spoiled_path = tmp_path / "spoiled.bundle"
    chance = random.Random(2)
    refused = 0
    for _ in range(150):
        spoiled = bytearray(whole)
        for _ in range(3):
            spoiled[chance.randrange(len(spoiled))] ^= 1 << chance.randrange(8)
        spoiled_path.write_bytes(spoiled)
        try:
            found = read_bundle(spoiled_path)
            assert found == bundle, "damage that nobody noticed"
            assert check_disks(spoiled_path, found) == ()
        except BundleError:
            refused += 1
    assert refused > 75


def test_a_newer_bundle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "new.bundle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(FACTS, json.dumps({"format": FORMAT + 1}))
    with pytest.raises(BundleError, match=rf"format {FORMAT + 1}, this program knows.*update it"):
        read_bundle(path)


@pytest.mark.parametrize("facts", ["", "[]", "{}", '{"format": "1"}', '{"format": 1}', "[" * 90000])
def test_nonsense_is_refused(tmp_path: Path, facts: str) -> None:
    path = tmp_path / "odd.bundle"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(FACTS, facts)
        archive.writestr("rig.yaml", "")
        archive.writestr(JOURNAL, b"")
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(path)


def test_a_missing_bundle_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        read_bundle(tmp_path / "none.bundle")


def test_a_bundle_of_every_version_stays_readable() -> None:
    """One of each version is kept; a new version adds one, and none is written anew."""
    kept = sorted(KEPT.glob("*.bundle"))
    assert [path.name for path in kept] == [f"version-{n}.bundle" for n in range(1, FORMAT + 1)]
    for path in kept:
        found = read_bundle(path)
        assert found.scenario == A_BUNDLE.scenario
        assert found.steps == A_BUNDLE.steps
        assert found.cuts == A_BUNDLE.cuts
        assert (found.composition is None) == (found.format != 2)
        assert (found.network, found.deterministic) == (
            (False, True) if found.format == 3 else (None, False)
        )
        if found.composition is not None:
            assert Composition.from_values(found.composition) == A_COMPOSITION


def test_a_campaigns_bundle_keeps_its_composition_and_a_scenarios_is_written_as_ever(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.bundle"
    write_bundle(path, evolve(A_BUNDLE, composition=A_COMPOSITION.to_values()))
    found = read_bundle(path)
    assert found.format == 2
    assert Composition.from_values(found.composition) == A_COMPOSITION
    write_bundle(path, A_BUNDLE)
    assert read_bundle(path).format == 1


@pytest.mark.parametrize(
    ("bundle", "says"),
    [
        (A_BUNDLE, "has no composition: it is of scenarios/test_power.py"),
        (evolve(A_BUNDLE, composition={"steps": 7}), "no composition"),
        (
            evolve(A_BUNDLE, verdict="PASS", findings=(), composition=A_COMPOSITION.to_values()),
            "PASS violates no invariant",
        ),
    ],
    ids=["a scenario's", "damaged", "passed"],
)
def test_what_can_not_be_shrunk_is_one_clear_line(
    tmp_path: Path, bundle: Bundle, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.bundle"
    write_bundle(path, bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["brownout", "shrink", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert says in errors[0]


SLOTS = {"a": SlotState(SlotContent.IMAGE, "v1"), "b": SlotState(SlotContent.UNLOADABLE)}


def test_runs_that_differ_in_time_and_place_only_have_the_same_steps() -> None:
    one = [
        InstallEnded("v2", None),
        PowerCut(100, "torn", 5),
        DiskSeen("after the cut", SLOTS, BootEnvironment(2, "a")),
        BootSeen(True, "v1", "a", "id-1", 2.0),
    ]
    two = [
        InstallEnded("v2", None),
        PowerCut(103, "torn", 5),
        DiskSeen("after the cut", SLOTS, BootEnvironment(1, "a")),
        BootSeen(True, "v1", "a", "id-2", 9.0, attempts=2),
    ]
    assert compare(steps_of(one), steps_of(two)) is None


def test_the_first_step_that_differs_is_named() -> None:
    was = ("installing v2", "started v1 in slot a", "data clean, intact")
    assert compare(was, (was[0], "did not start", was[2])) == Divergence(2, was[1], "did not start")
    assert str(compare(was, was[:2])) == (
        "diverged at event 3: it was [data clean, intact], it is [the run ended]"
    )
    assert compare(was, was) is None


def test_the_command_says_reproduced_or_what_is_wrong(
    recorded: tuple[Path, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bundle = recorded
    assert run_command(path) == 0
    assert "reproduced" in capsys.readouterr().out
    journal = unpack_journal(path, bundle, tmp_path / "journal")
    wrong = evolve(bundle, cuts=(evolve(bundle.cuts[0], disks={"vda": "0" * 64}),))
    write_bundle(tmp_path / "wrong.bundle", wrong, "", journal)
    assert run_command(tmp_path / "wrong.bundle") == 1
    assert "not the same: vda after cut 0" in capsys.readouterr().out
    write_bundle(tmp_path / "uncut.bundle", evolve(bundle, cuts=()))
    assert run_command(tmp_path / "uncut.bundle") == 2
    assert "no power cut" in capsys.readouterr().err
    (tmp_path / "bad.bundle").write_bytes(b"PK not really")
    assert run_command(tmp_path / "bad.bundle") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("brownout: bundle ")


def run_command(bundle: Path) -> int:
    """`brownout replay --disks-only`, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["brownout", "replay", "--disks-only", str(bundle)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0
