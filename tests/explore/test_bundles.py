"""A bundle makes its state again, bit for bit; a board's log becomes a recording."""

from __future__ import annotations

import io
import json

import pytest
import tiny_ab
from rich.console import Console

from framework.disk import JournalReader, TornSector
from framework.disk.dmlogwrites import export_log, import_log
from framework.explore.bundle import BundleError, open_state, read_bundle, write_bundle
from framework.explore.examine import Bounds
from framework.explore.recording import Recording, RecordingError, write_recording
from framework.explore.states import CrashState
from framework.explorer import Wish, parse_models, run_boot_state, run_explore, run_import


@pytest.fixture
def recording(tmp_path):
    journal = tiny_ab.run(tmp_path)
    facts = tiny_ab.facts() | {
        "base_hints": {"vda": str(tmp_path / "base-.img")},
        "updater": "brownout",
    }
    with Recording(write_recording(journal, tmp_path / "x.recording", facts)) as opened:
        yield opened


def torn_state(recording) -> CrashState:
    point = len(recording.reader.operations) - 1
    _, cycle = recording.reader.power_cycle_at(point)
    model = TornSector(kinds=("garbage",), newest=True)
    return CrashState(point, model.decide(cycle, 7), model.name, 7)


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_bundle_makes_its_state_again(tmp_path, recording):
    state = torn_state(recording)
    folder = write_bundle(tmp_path / "bundle", recording, (state,), {"invariant": 2})
    bundle = read_bundle(folder)
    assert bundle.states == (state,)
    assert bundle.recording == recording.path
    with open_state(bundle, recording) as again, state.disks(recording.reader) as disks:
        assert again["vda"].sha256() == disks["vda"].sha256()


def test_an_exported_image_is_the_state(tmp_path, recording):
    state = torn_state(recording)
    folder = write_bundle(tmp_path / "bundle", recording, (state,), {})
    run_boot_state(folder, quiet(), export=tmp_path / "disk.img")
    with state.disks(recording.reader) as disks:
        whole = disks["vda"].read(0, disks["vda"].size_bytes)
    assert (tmp_path / "disk.img").read_bytes() == whole


def test_an_exported_log_makes_the_state_of_the_base_image(tmp_path, recording):
    state = torn_state(recording)
    folder = write_bundle(tmp_path / "bundle", recording, (state,), {})
    run_boot_state(folder, quiet(), export_as_log=tmp_path / "state.log")
    import_log(tmp_path / "state.log", recording.base_paths["vda"], tmp_path / "journal")
    with (
        JournalReader(tmp_path / "journal").final() as made,
        state.disks(recording.reader) as disks,
    ):
        assert made.sha256() == disks["vda"].sha256()


@pytest.mark.parametrize("content", ["", "{}", '{"format": 9}', "[]", '{"format": 1, "states": 3}'])
def test_a_bad_bundle_is_one_line(tmp_path, content):
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(BundleError) as caught:
        read_bundle(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bundle_of_another_recording_is_refused(tmp_path, recording):
    folder = write_bundle(tmp_path / "bundle", recording, (torn_state(recording),), {})
    other = tmp_path / "other"
    other.mkdir()
    journal = tiny_ab.run(other, ("v2",))
    facts = {"base_hints": {"vda": str(other / "base-.img")}}
    with (
        Recording(write_recording(journal, other / "y.recording", facts)) as wrong,
        pytest.raises(BundleError, match="another recording"),
        open_state(read_bundle(folder), wrong),
    ):
        pass


def test_a_boards_log_becomes_a_recording_that_is_explored(tmp_path, recording):
    log = tmp_path / "board.log"
    export_log(recording.reader, "vda", log)
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(tiny_ab.facts() | {"updater": "brownout"}))
    base = recording.base_paths["vda"]
    path = run_import(log, base, facts, "vda", tmp_path / "board.recording")
    wish = Wish(parse_models(["prefix"]), 8, 100, 1, ("static",), Bounds())
    out = io.StringIO()
    run_explore([path], wish, tmp_path / "b", Console(file=out, width=200), as_json=True)
    assert json.loads(out.getvalue())["recordings"][0]["states"] > 50


def test_facts_that_are_none_are_one_line(tmp_path, recording):
    facts = tmp_path / "facts.json"
    facts.write_text("{")
    with pytest.raises(RecordingError) as caught:
        run_import(tmp_path / "x", tmp_path / "y", facts, "vda", tmp_path / "z")
    assert "\n" not in str(caught.value)
