"""Exit code 3: a judge says one thing, a real boot or kernel does another: no verdict counts."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
from pathlib import Path

import pytest
from attrs import asdict, evolve
from disk_nbd_client import Client
from rich.console import Console

from framework.disk import (
    DeviceSpec,
    DiskError,
    JournalReader,
    Recorder,
    build_copy,
    open_file_system,
    read_environment,
)
from framework.explore import examine
from framework.explore.describe import layout_to_values
from framework.explore.examine import EVERY, Bounds
from framework.explore.judges import data, static
from framework.explore.recording import write_recording
from framework.explore.timeline import SOURCE, FileSynced, to_mark
from framework.explorer import EXIT_CLEAN, EXIT_DISAGREEMENT, Wish, parse_models, run_explore
from framework.scenario.layouts import SLOT_REGION, layout_of
from framework.scenario.manifest import TargetManifest
from framework.verdict.oracle import Decision
from images import build_target

pytestmark = pytest.mark.emulated

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"
NOTE = "/note"
BEFORE, AFTER = b"before the update\n" * 200, b"after the update!\n" * 200


@pytest.fixture(scope="module")
def target():
    images = build_target("qemu-arm64", relock_if_gone=True)
    return TargetManifest.parse(images.manifest, images.directory, "v1")


def recorded(manifest, folder, write):
    """The recording of what `write` (given recorder and client) does; no machine runs for it."""
    with Recorder([DeviceSpec("vda", manifest.disks["vda"])], folder / "run") as recorder:
        endpoint = recorder.endpoint("vda")
        with Client(endpoint.socket, endpoint.export) as client:
            write(recorder, client)
        journal = recorder.journal_path
    sizes = {d.name: d.size_bytes for d in JournalReader(journal).header.devices}
    seed = manifest.firmware.get("seed")
    repair = manifest.data_repair
    facts = {
        "rig": "qemu-arm64",
        "updater": "brownout",
        "bootloader": manifest.bootloader,
        "initial": manifest.images["v1"].name,
        "images": {"v1": asdict(manifest.images["v1"])},
        "layout": layout_to_values(layout_of(manifest, sizes, [manifest.images["v1"]])),
        "slots": {slot: SLOT_REGION + slot for slot in manifest.slots},
        "data_repair": {"block": repair.block_bytes, "backups": repair.backups},
        "pflash": None if seed is None else str(seed),
        "base_hints": {name: str(path) for name, path in manifest.disks.items()},
    }
    return write_recording(journal, folder / "x.recording", facts)


@pytest.fixture(scope="module")
def recording(target, tmp_path_factory):
    """The arm64 target's disk, on which somebody puts slot a on trial."""
    copies = [(copy.offset, copy.length) for copy in target.environment]

    def trial(recorder, client):
        with recorder.disk("vda") as disk:
            before = read_environment(disk, copies)
        assert before.current is not None
        variables = {**before.variables, "mender_boot_part": str(target.slot_numbers["a"])}
        variables |= {"upgrade_available": "1", "bootcount": "0"}
        at, length = copies[1 - before.current]
        flags = (before.copies[before.current].flags + 1) % 256
        client.write(at, build_copy(variables, length, flags=flags))
        client.flush()

    return recorded(target, tmp_path_factory.mktemp("trial"), trial)


@pytest.fixture(scope="module")
def journaled(target, tmp_path_factory):
    """The same disk; a synced file's new content stands in its file system's journal only."""
    folder = tmp_path_factory.mktemp("journaled")
    (folder / "tree").mkdir()
    (folder / f"tree{NOTE}").write_bytes(BEFORE)
    data, image = target.data, folder / "data.img"
    make = ("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", folder / "tree", image)
    run(*make, f"{data.length >> 10}k")
    (block,) = run("debugfs", "-R", f"blocks {NOTE}", image).split()
    new = folder / "new"
    new.write_bytes(AFTER.ljust(4096, b"\0"))
    script = f"journal_open\njournal_write -b {block} {new}\njournal_close\n"
    run("debugfs", "-w", "-f", "-", image, stdin=script)

    def put(recorder, client):
        content = image.read_bytes()
        zeros = bytes(65536)
        for at in range(0, data.length, 65536):
            if (piece := content[at : at + 65536]) != zeros:
                client.write(data.offset + at, piece)
        client.flush()
        recorder.mark(SOURCE, to_mark(FileSynced(NOTE, hashlib.sha256(AFTER).hexdigest())))

    return recorded(target, folder, put)


def run(*command, stdin=""):
    words = [str(word) for word in command]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


def explored(recording, folder, judges=("static", "uboot"), **bounds):
    out = io.StringIO()
    wish = Wish(parse_models(["kept"]), 4, 0, 1, judges, Bounds(**{"decisions": 2, **bounds}))
    console = Console(file=out, width=200)
    code = run_explore([recording], wish, folder / "bundles", console, rig=RIG, as_json=True)
    return code, json.loads(out.getvalue())["recordings"][0]


def test_the_oracle_and_the_bootloader_agree(recording, tmp_path):
    code, result = explored(recording, tmp_path)
    assert (code, result["disagreements"]) == (EXIT_CLEAN, [])
    assert {row["judge"]: row["looked_at"] for row in result["judges"]}["uboot"] == 2


def test_an_oracle_that_knows_of_no_trial_ends_the_exploration_with_3(
    recording, tmp_path, monkeypatch
):
    honest = static.next_boot

    def planted(environment, slots):
        return Decision(honest(environment, slots).slot)

    monkeypatch.setattr(static, "next_boot", planted)
    code, result = explored(recording, tmp_path)
    assert code == EXIT_DISAGREEMENT
    assert result["exit_code"] == EXIT_DISAGREEMENT
    assert any("on trial" in text for text in map(str, result["disagreements"]))


# ---------------------------------------------------------------- the data judge and a kernel


def mounted(recording, folder):
    """Explore, with the very last state among those that a kernel mounts."""
    code, result = explored(recording, folder, ("static", "data", "mount"), mounts=200)
    assert {row["judge"]: row["looked_at"] for row in result["judges"]}["mount"] > 0
    return code, list(map(str, result["disagreements"]))


def test_a_kernel_replays_the_journal_as_the_data_judge_says(journaled, tmp_path):
    code, disagreements = mounted(journaled, tmp_path)
    assert disagreements == []
    assert code != EXIT_DISAGREEMENT


def test_a_data_judge_that_replays_no_journal_is_given_away_by_a_kernel(
    journaled, tmp_path, monkeypatch
):
    """Planted: it reads files as they lie, so it takes one for old that a mount makes new."""
    honest = data.check_ext4

    def planted(disk, offset, length, *, read, **rest):
        found = honest(disk, offset, length, read=read, **rest)
        try:
            raw = open_file_system(disk, offset, length)
            files = {path: raw.read_file(path) for path in read}
        except DiskError:
            return found
        return dataclasses.replace(found, files=files)

    monkeypatch.setattr(data, "check_ext4", planted)
    code, disagreements = mounted(journaled, tmp_path)
    assert code == EXIT_DISAGREEMENT
    assert any(f"reads {NOTE} as" in text for text in disagreements)


def test_a_data_judge_that_gives_up_a_sound_partition_is_given_away_by_a_kernel(
    journaled, tmp_path, monkeypatch
):
    """Planted: whatever needs a replay is lost to it."""
    honest = data.check_ext4

    def planted(*arguments, **rest):
        found = honest(*arguments, **rest)
        return dataclasses.replace(found, clean=found.clean and not found.replayed)

    monkeypatch.setattr(data, "check_ext4", planted)
    code, disagreements = mounted(journaled, tmp_path)
    assert code == EXIT_DISAGREEMENT
    assert any("finds the data partition damaged, a kernel sound" in t for t in disagreements)


# ---------------------------------------------------------------- recovery keys


def test_two_classes_of_one_recovery_key_that_recover_differently_are_noticed(
    recording, tmp_path, monkeypatch
):
    """Planted: one key for everything, so that a trial stands for a committed system."""
    honest = examine.recoveries

    def planted(*arguments):
        found = honest(*arguments)
        key = found.groups[0][0]
        return evolve(found, groups=((key, tuple(c for _, m in found.groups for c in m)),))

    code, result = explored(recording, tmp_path, ("static", "data"), deep=EVERY)
    assert (code, result["disagreements"]) == (EXIT_CLEAN, [])
    (row,) = result["depth_two"]
    assert (row["keys"], row["booted"], row["left"]) == (2, 2, [])
    assert row["parts_shown"] == row["parts"] > 0
    monkeypatch.setattr(examine, "recoveries", planted)
    code, result = explored(recording, tmp_path, ("static", "data"), deep=EVERY)
    assert code == EXIT_DISAGREEMENT
    assert any("one recovery key" in text for text in map(str, result["disagreements"]))


def test_recoveries_that_were_not_begun_in_time_are_told(recording, tmp_path):
    _, result = explored(recording, tmp_path, ("static", "data"), deep=EVERY, deep_seconds=0.0)
    (row,) = result["depth_two"]
    assert (row["keys"], row["booted"], row["controls"], row["parts_shown"]) == (2, 0, 0, 0)
    assert len(row["left"]) == 2
