"""A medium that destroys data at rest is told apart from a writer that endangers its own data.

The file system is a real ext4 with a synced file; the device's own data partition is its model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess

import pytest
import tiny_ab
from attrs import evolve
from disk_nbd_client import Client

from framework.disk import DeviceSpec, Emmc, JournalReader, Recorder, TornPage, TornSector
from framework.explore.deep import DeepViolation, told_apart
from framework.explore.ears import Ears
from framework.explore.examine import Bounds, Examiner
from framework.explore.layout import Range, Region, Role
from framework.explore.rest import spared
from framework.explore.timeline import SOURCE, FileSynced, to_mark
from framework.explorer import Run, Wish, excuse, most_telling
from framework.targets.uut import BrownoutUpdater

MIB = 1 << 20
DATA = Range("vda", 4 * MIB, 8 * MIB)
BLOCK = 4096
CANARY = b"c" * BLOCK
WISH = Wish((), 10, 100, 0, ("static", "data"), Bounds())


@pytest.fixture
def disk(tmp_path):
    """A tiny device with a data partition, and the block in which its file ends."""
    path = tiny_ab.base_image(tmp_path / "base.img")
    with path.open("r+b") as file:
        file.truncate(DATA.offset + DATA.length)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "canary").write_bytes(CANARY)
    part = tmp_path / "data.img"
    made = ("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-d", str(tree), str(part))
    subprocess.run([*made, f"{DATA.length >> 10}k"], check=True)
    told = subprocess.run(
        ["debugfs", "-R", "blocks /canary", str(part)], check=True, capture_output=True, text=True
    )
    with path.open("r+b") as file:
        file.seek(DATA.offset)
        file.write(part.read_bytes())
    last = int(told.stdout.split()[-1])
    assert last % 4 < 3, "the block behind it lies in the same page"
    return path, last


def examined(disk, tmp_path, model, *, onto_itself):
    """Write, without a flush, the block behind the synced file's last one, or that one itself."""
    path, last = disk
    block = last if onto_itself else last + 1
    with Recorder([DeviceSpec("vda", path)], tmp_path / "run", prepare_bytes=0) as recorder:
        endpoint = recorder.endpoint("vda")
        recorder.mark(SOURCE, to_mark(FileSynced("/canary", hashlib.sha256(CANARY).hexdigest())))
        with Client(endpoint.socket, endpoint.export) as client:
            content = CANARY[-BLOCK:] if onto_itself else b"n" * BLOCK
            client.write(DATA.offset + block * BLOCK, content)
        journal = JournalReader(recorder.journal_path)
    layout = tiny_ab.layout()
    regions = (*layout.regions, Region("data", Role.DATA, (DATA,)))
    layout = dataclasses.replace(layout, regions=regions)
    context = evolve(tiny_ab.context(journal), layout=layout)
    uut = BrownoutUpdater
    examiner = Examiner(context, None, Ears(uut.boot_signs, uut.signs, uut.commit_state, ""))
    found = examiner.explore((model,), exhaustive_up_to=10, samples=100)
    return context, examiner.examine(found, ["static", "data"], Bounds())


MEDIA = [TornPage(), Emmc()]


@pytest.mark.parametrize("model", MEDIA, ids=lambda model: model.name)
def test_a_file_that_a_torn_neighbour_took_with_it_is_the_mediums_doing(disk, tmp_path, model):
    _, found = examined(disk, tmp_path, model, onto_itself=False)
    assert {v.invariant for v in found.violations} == {5}
    assert all(v.at_rest for v in found.violations)
    run = Run(True, found, "tiny")
    assert {excuse(run, v, WISH) for v in found.violations} == {
        "with a medium that destroys data at rest "
    }


@pytest.mark.parametrize("model", [*MEDIA, TornSector()], ids=lambda model: model.name)
def test_a_synced_file_that_is_overwritten_in_place_is_the_writers_doing(disk, tmp_path, model):
    """Planted: the content is the same, but a cut in the middle of writing it destroys it."""
    _, found = examined(disk, tmp_path, model, onto_itself=True)
    assert {v.invariant for v in found.violations} == {5}
    run = Run(True, found, "tiny")
    assert "" in {excuse(run, v, WISH) for v in found.violations}


def deep(first, phase, invariant=5):
    return DeepViolation(invariant, "", phase, first, first, b"", "")


def test_what_the_medium_took_at_the_first_cut_is_not_held_against_the_second(disk, tmp_path):
    context, found = examined(disk, tmp_path, TornPage(), onto_itself=False)
    lost = {(v.state, v.phase) for v in found.violations}
    assert lost
    told = list(told_apart(context, [deep(*cut, n) for cut in lost for n in range(1, 9)]))
    assert {v.invariant for v in told if v.at_rest} == {5, 6}, "the rest does not live on it"
    assert len([v for v in told if v.at_rest]) == 2 * len(lost)
    run = Run(True, found, "tiny")
    assert {excuse(run, v, WISH) for v in told if not v.at_rest} == {""}
    assert {excuse(run, v, WISH) for v in told if v.at_rest} == {
        "with a medium that destroys data at rest "
    }


def test_what_only_the_second_cut_took_is_held_against_it(disk, tmp_path):
    context, found = examined(disk, tmp_path, TornPage(), onto_itself=False)
    broken = {v.crash_class.key for v in found.violations}
    sound = [c.representative for c in found.exploration.classes if c.key not in broken]
    assert sound
    assert not any(v.at_rest for v in told_apart(context, [deep(state, 1) for state in sound]))


def test_what_the_writer_took_at_the_first_cut_is_held_against_the_second(disk, tmp_path):
    context, found = examined(disk, tmp_path, TornSector(), onto_itself=True)
    assert found.violations
    told = told_apart(context, [deep(v.state, v.phase) for v in found.violations])
    assert not any(v.at_rest for v in told)


def test_a_state_without_damage_beside_what_was_written_has_no_gentler_one(disk, tmp_path):
    context, found = examined(disk, tmp_path, TornSector(), onto_itself=False)
    states = [c.representative for c in found.exploration.classes]
    assert any(state.decision.garbage for state in states)
    assert all(spared(context.journal, state) is None for state in states)


def test_what_counts_is_never_crowded_out_by_what_does_not(disk, tmp_path):
    _, found = examined(disk, tmp_path, TornPage(), onto_itself=False)
    counts = evolve(found.violations[0], at_rest=False, invariant=8)
    found.violations.append(counts)
    assert most_telling([Run(True, found, "tiny")], WISH)[0][1] is counts
