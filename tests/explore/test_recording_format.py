"""A recording gives back its journal bit for bit; a bad file is one clear line."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest
import tiny_ab
from click.testing import CliRunner

from framework.cli import cli
from framework.disk import BaseImageError, JournalReader
from framework.explore.recording import Recording, RecordingError, read_header, write_recording


@pytest.fixture
def journal(tmp_path):
    return tiny_ab.run(tmp_path)


@pytest.fixture
def recording(tmp_path, journal):
    hints = {"vda": str(tmp_path / "base-.img")}
    return write_recording(journal, tmp_path / "x.recording", {"base_hints": hints, "a": [1]})


def test_the_journal_comes_back_bit_for_bit(journal, recording):
    with Recording(recording) as opened:
        assert opened.journal_path.read_bytes() == journal.read_bytes()
        assert opened.facts["a"] == [1]
        assert len(opened.reader.operations) == len(JournalReader(journal).operations)


def test_what_the_base_image_holds_is_not_stored_again(tmp_path):
    written_before = tiny_ab.base_image(tmp_path / "base-.img", slot_b="v2")
    plain, known = tmp_path / "plain", tmp_path / "known"
    plain.mkdir()
    known.mkdir()
    sizes = []
    for folder, slot_b in ((plain, ""), (known, "v2")):
        tiny_ab.base_image(folder / "base-.img", slot_b=slot_b)
        run = _run_over(folder, slot_b)
        sizes.append(write_recording(run, folder / "x.recording", {}).stat().st_size)
    assert written_before.exists()
    assert sizes[1] < sizes[0] - 20 * tiny_ab.KIB


def _run_over(folder, slot_b):
    base = tiny_ab.base_image(folder / "b.img", slot_b=slot_b)
    from framework.disk import DeviceSpec, Recorder

    with Recorder([DeviceSpec("vda", base)], folder / "run", prepare_bytes=0) as recorder:
        device = tiny_ab.TinyDevice(recorder)
        device.update("v2", "b")
        device.close()
        return recorder.journal_path


def test_every_truncation_is_one_clear_error(tmp_path, recording):
    whole = recording.read_bytes()
    cuts = {0, 1, 8, 20, 23, 24, len(whole) - 1}
    cuts |= {random.Random(1).randrange(len(whole)) for _ in range(40)}
    for length in sorted(cuts):
        short = tmp_path / "short.recording"
        short.write_bytes(whole[:length])
        with pytest.raises(RecordingError) as caught:
            Recording(short)
        assert "\n" not in str(caught.value)
        assert "cut short" in str(caught.value) or length < 8


def test_every_flipped_byte_is_noticed(tmp_path, recording):
    whole = recording.read_bytes()
    rng = random.Random(2)
    for _ in range(60):
        at = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path = tmp_path / "damaged.recording"
        path.write_bytes(damaged)
        with pytest.raises((RecordingError, BaseImageError)) as caught:
            Recording(path)
        assert "\n" not in str(caught.value)


def test_a_later_version_is_named(tmp_path, recording):
    data = bytearray(recording.read_bytes())
    struct.pack_into("<I", data, 8, 7)
    later = tmp_path / "later.recording"
    later.write_bytes(data)
    with pytest.raises(RecordingError, match="format version 7, this program knows 1"):
        read_header(later)


def test_a_base_image_that_changed_is_refused(tmp_path, recording):
    base = tmp_path / "base-.img"
    data = bytearray(base.read_bytes())
    data[100] ^= 1
    base.write_bytes(data)
    with pytest.raises(BaseImageError, match="another image than was recorded"):
        Recording(recording)


def test_a_base_image_that_moved_is_found_by_option(tmp_path, recording):
    base = tmp_path / "base-.img"
    moved = base.rename(tmp_path / "elsewhere.img")
    with pytest.raises(BaseImageError, match="--base vda=PATH"):
        Recording(recording)
    with Recording(recording, {"vda": moved}) as opened:
        assert opened.base_paths["vda"] == moved


def test_nothing_stays_after_reading(tmp_path, recording, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    before = set(Path("/proc/self/fd").iterdir())
    with Recording(recording):
        assert not list((tmp_path / "tmp").iterdir())
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"BRWN", b"root:x:0:0", bytes(100)])
def test_the_command_refuses_what_is_no_recording_with_exit_code_2(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    from framework.disk import DiskError

    result = CliRunner().invoke(cli, ["explore", str(path)])
    assert isinstance(result.exception, DiskError)
    assert "\n" not in str(result.exception)


def test_a_recording_that_can_not_be_written_leaves_nothing(tmp_path, journal):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(RecordingError, match="can't be written"):
        write_recording(journal, target, {})
    assert sorted(p.name for p in target.iterdir()) == []
    assert not list(tmp_path.glob(".*tmp"))


def test_the_journals_hash_is_kept(journal, recording):
    assert read_header(recording).journal_sha256 == hashlib.sha256(journal.read_bytes()).hexdigest()
