"""A failure in the field is found again, from the support bundle alone; other things are not.

The field device is a tiny one with a planted bug (its image is not synced before the switch). Its
power fails for real, under a cache that loses writes, and the updater's own code packs the support
bundle of what is on its disk then. The recording that is searched is another run, without a cut.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_ab
import zstandard
from rich.console import Console

from framework.campaign.errors import CampaignError
from framework.campaign.field import read_failure
from framework.campaign.ledger import Campaign, Ledger, Run, program
from framework.campaign.perform import Performed
from framework.campaign.symptoms import match, symptoms_of_run
from framework.cli import main
from framework.disk import DeviceSpec, Recorder, VolatileCache
from framework.explore.bundle import open_state, read_bundle
from framework.explore.recording import Recording, write_recording
from framework.reproducer import Search, run_reproduce
from framework.verdict import (
    BootEnvironment,
    BootSeen,
    DiskSeen,
    InstallStarted,
    SlotContent,
    SlotState,
    StatusRead,
)
from updater.device import blockdev, support_bundle
from updater.device.config import Slot
from updater.device.model import Outcome, Result
from updater.device.store import SqliteStore, database_path

BUG = "no-sync-before-switch"
ENVIRONMENT_BYTES = slice(tiny_ab.ENVIRONMENT[0], tiny_ab.ENVIRONMENT[1] + tiny_ab.ENV)


class PowerFailsError(Exception):
    """The power fails here."""


def cut_in_the_switch(folder: Path, bug: str, seed: int) -> bytes:
    """The disk of a device whose power failed when the switch was written and not yet flushed."""
    base = tiny_ab.base_image(folder / f"field-{seed}.img")
    spec = [DeviceSpec("vda", base)]
    with Recorder(spec, folder / f"field-{seed}", prepare_bytes=0) as recorder:
        device = tiny_ab.TinyDevice(recorder, bug)
        honest_switch = device.switch

        def switch(slot: str, **how) -> None:
            def no_flush() -> None:
                raise PowerFailsError

            device.client.flush = no_flush
            honest_switch(slot, **how)

        device.switch = switch
        with pytest.raises(PowerFailsError):
            device.update("v2", "b")
        recorder.cut(VolatileCache(), seed)
        device.close()
        with recorder.disk("vda") as disk:
            return disk.read(0, disk.size_bytes)


def slot_of(disk: bytes, slot: str) -> bytes:
    return disk[tiny_ab.SLOTS[slot] : tiny_ab.SLOTS[slot] + tiny_ab.SLOT]


def state_of(disk: bytes) -> tuple[str, bool]:
    """Which slot the environment names, and whether slot b holds the whole image."""
    from framework.disk.ubootenv import parse_environment

    copies = [disk[at : at + tiny_ab.ENV] for at in tiny_ab.ENVIRONMENT]
    variables = parse_environment(copies).variables
    slot = {n: s for s, n in tiny_ab.NUMBERS.items()}[variables["mender_boot_part"]]
    image = tiny_ab.image("v2")
    return slot, slot_of(disk, "b")[: len(image)] == image


def pack(folder: Path, disk: bytes, monkeypatch, *, runs: str, outcome: Outcome | None) -> Path:
    """What `updater support-bundle --slot-hashes` packs on a device with this disk."""
    folder.mkdir()
    (folder / "disk").write_bytes(disk)
    for slot in ("a", "b"):
        (folder / f"slot-{slot}").write_bytes(slot_of(disk, slot))
    places = "".join(f"{folder}/disk {at:#x} {tiny_ab.ENV:#x}\n" for at in tiny_ab.ENVIRONMENT)
    (folder / "fw_env.config").write_text(places)
    name = {"a": "v1", "b": "v2"}[runs]
    (folder / "artifact_info").write_text(f"artifact_name={name}\n")
    slots = "".join(
        f'{slot} = {{device = "{folder}/slot-{slot}", number = {tiny_ab.NUMBERS[slot]}}}\n'
        for slot in ("a", "b")
    )
    (folder / "updater.toml").write_text(
        f'device_type = "tiny"\ndata_dir = "{folder}/data"\n'
        f'artifact_info = "{folder}/artifact_info"\n[slots]\n{slots}'
        f'[bootenv]\nkind = "uboot"\nfw_env_config = "{folder}/fw_env.config"\n'
    )
    (folder / "data").mkdir()
    if outcome is not None:
        store = SqliteStore(database_path(str(folder / "data")))
        store.finish(outcome, {})
        store.close()
    running = Slot(runs, f"{folder}/slot-{runs}", int(tiny_ab.NUMBERS[runs]))
    monkeypatch.setattr(blockdev.LinuxMachine, "running_slot", lambda self, slots: running)
    sources = support_bundle.Sources(
        proc=str(folder), kmsg="/dev/null", journal=("no-such-journalctl",), logs=()
    )
    made = folder / "support.tar.zst"
    support_bundle.write_bundle(
        str(made), str(folder / "updater.toml"), slot_hashes=True, sources=sources
    )
    return made


@pytest.fixture
def field_disk(tmp_path: Path) -> bytes:
    """A device that boots slot b, whose image is not all there: the planted bug's mark."""
    for seed in range(300):
        disk = cut_in_the_switch(tmp_path, BUG, seed)
        slot, whole = state_of(disk)
        magic = slot_of(disk, "b")[1024 + 56 : 1024 + 58]
        if slot == "b" and not whole and magic == b"\x53\xef":
            return disk
    raise AssertionError("no cut showed the planted bug")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """The same bug's run without a cut."""
    return a_recording(tmp_path, BUG)


def a_recording(folder: Path, bug: str) -> Path:
    journal = tiny_ab.run(folder, ("v2",), bug)
    facts = {**tiny_ab.facts(bug), "base_hints": {"vda": str(folder / f"base-{bug}.img")}}
    return write_recording(journal, folder / f"tiny-{bug or 'honest'}.recording", facts)


def reproduce(bundle: Path, *recordings: Path, **more) -> tuple[bool, str, list[str]]:
    """Whether something has all the symptoms, what was printed, and the commands in order."""
    console = Console(file=io.StringIO(), width=250)
    search = Search(recordings, models=(VolatileCache(),), **more)
    found = run_reproduce(bundle, search, bundle.parent / "out", console)
    text = console.file.getvalue()
    return found, text, re.findall(r"^\d+: (brownout .*)$", text, re.MULTILINE)


def test_a_planted_field_failure_is_found_and_its_state_is_that_of_the_device(
    tmp_path: Path, field_disk: bytes, recording: Path, monkeypatch
) -> None:
    support = pack(tmp_path / "device", field_disk, monkeypatch, runs="b", outcome=None)
    found, text, commands = reproduce(support, recording)
    assert found, text
    assert re.search(r"│ 1 +│ \d\d% +│ nothing", text), text
    command = commands[0].split()
    assert command[:2] == ["brownout", "boot-state"]
    bundle = read_bundle(Path(command[2]))
    assert 2 in bundle.why["violated"], "the cause is what the planted bug breaks"
    with Recording(recording) as opened, open_state(bundle, opened) as disks:
        again = disks["vda"].read(0, disks["vda"].size_bytes)
    assert state_of(again) == state_of(field_disk) == ("b", False)
    assert again[ENVIRONMENT_BYTES] == field_disk[ENVIRONMENT_BYTES], "the same environment"


def test_the_honest_updaters_recording_explains_nothing_of_it(
    tmp_path: Path, field_disk: bytes, monkeypatch
) -> None:
    support = pack(tmp_path / "device", field_disk, monkeypatch, runs="b", outcome=None)
    found, text, _ = reproduce(support, a_recording(tmp_path, ""))
    assert not found, text


def test_a_device_that_was_interrupted_harmlessly_matches_states_that_break_nothing(
    tmp_path: Path, recording: Path, monkeypatch
) -> None:
    """It runs the old system, and says that it was interrupted."""
    for seed in range(300):
        disk = cut_in_the_switch(tmp_path, "", seed)
        if state_of(disk)[0] == "a":
            break
    outcome = Outcome(Result.INTERRUPTED, "v2", "a", "interrupted in ArtifactInstall", 1)
    support = pack(tmp_path / "device", disk, monkeypatch, runs="a", outcome=outcome)
    failure = read_failure(support)
    assert failure.symptoms["outcome"] == "interrupted"
    assert failure.symptoms["state"] == "ArtifactInstall"
    _, _, commands = reproduce(support, recording)
    best = read_bundle(Path(commands[0].split()[2]))
    assert best.why["violated"] == []
    assert best.why["symptoms"]["boot slot"] == "a"


def test_the_support_bundle_says_what_the_device_is_like(
    tmp_path: Path, field_disk: bytes, monkeypatch
) -> None:
    support = pack(tmp_path / "device", field_disk, monkeypatch, runs="b", outcome=None)
    failure = read_failure(support)
    assert failure.symptoms["runs"] == "v2"
    assert failure.symptoms["running slot"] == "b"
    assert failure.symptoms["boot slot"] == "b"
    assert failure.symptoms["on trial"] == "yes"
    assert failure.symptoms["valid copies"] in ("1", "2")
    assert set(failure.slots) == {"a", "b"}
    assert failure.device_type == "tiny"


def test_runs_of_campaigns_are_ranked_by_what_they_ended_with(
    tmp_path: Path, field_disk: bytes, monkeypatch
) -> None:
    support = pack(tmp_path / "device", field_disk, monkeypatch, runs="b", outcome=None)
    ledger_path = tmp_path / "campaign.db"
    alike = {"runs": "v2", "running slot": "b", "boot slot": "b", "on trial": "yes"}
    alike["valid copies"] = read_failure(support).symptoms["valid copies"]
    with Ledger(ledger_path) as ledger:
        wanted = Campaign(0, 7, "", ("arm.yaml",), "9 runs", program(), 5, "2030-01-01T00:00:00Z")
        campaign, _ = ledger.open_campaign(wanted)
        for index, symptoms in enumerate(
            ({"runs": "v1", "running slot": "a", "boot slot": "a"}, alike, {**alike, "runs": "v1"})
        ):
            key = ledger.begin(campaign, Run(0, index, 3, "arm.yaml", "drawn", 0, "{}"))
            ledger.end(key, Performed("PASS", symptoms=symptoms))
    found, text, commands = reproduce(support, ledgers=(ledger_path,))
    assert found, text
    assert commands[0] == "brownout campaign --rig rigs/arm.yaml --only 7/1.3"
    assert commands[-1].endswith("--only 7/0.3")


def test_a_run_that_another_program_drew_is_done_again_by_its_bundle(
    tmp_path: Path, field_disk: bytes, monkeypatch
) -> None:
    """Its numbers name another composition here."""
    support = pack(tmp_path / "device", field_disk, monkeypatch, runs="b", outcome=None)
    alike = {"runs": "v2", "running slot": "b", "boot slot": "b", "on trial": "yes"}
    with Ledger(tmp_path / "campaign.db") as ledger:
        wanted = Campaign(0, 7, "", ("arm.yaml",), "9 runs", "0.0", 5, "2030-01-01T00:00:00Z")
        campaign, _ = ledger.open_campaign(wanted)
        for index, bundle in enumerate(("out/bundles/a.bundle", "")):
            key = ledger.begin(campaign, Run(0, index, 3, "arm.yaml", "drawn", 0, "{}"))
            ledger.end(key, Performed("VIOLATION(2)", (2,), symptoms=alike, bundle=bundle))
    _, text, commands = reproduce(support, ledgers=(tmp_path / "campaign.db",))
    assert commands == ["brownout replay out/bundles/a.bundle"]
    assert "drawn by brownout 0.0" in text


def test_symptoms_of_a_run_are_those_that_its_end_shows() -> None:
    slots = {
        "a": SlotState(SlotContent.IMAGE, "v1"),
        "b": SlotState(SlotContent.MIXED),
    }
    found = symptoms_of_run(
        [
            BootSeen(True, "v1", "a"),
            InstallStarted("v2"),
            DiskSeen("x", slots, BootEnvironment(2, "a")),
            BootSeen(False),
            StatusRead("v1", "interrupted", "interrupted in Download"),
        ]
    )
    assert found == {
        "runs": "nothing",
        "running slot": "none",
        "slot a": "v1",
        "slot b": "mixed",
        "valid copies": "2",
        "boot slot": "a",
        "on trial": "no",
        "outcome": "interrupted",
        "state": "Download",
    }


def test_what_is_unknown_is_neither_agreement_nor_contradiction() -> None:
    failure = {"runs": "v1", "slot a": "v1"}
    assert match(failure, failure).score == 1
    assert match(failure, {"runs": "v1"}).score == 0.75
    assert match(failure, {"runs": "v1", "slot a": "mixed"}).score == 0.5
    assert match(failure, {"runs": "v1", "slot a": "mixed"}).different == ("slot a",)


def archive(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def manifest(**values) -> bytes:
    return json.dumps({"format": "updater-support-bundle", "version": 1, **values}).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no support bundle"),
        (b"hello", "no support bundle"),
        (b"\x28\xb5\x2f\xfdbroken", "no support bundle"),
        (b"\x1f\x8bbroken", "no support bundle"),
        (archive({"x": b"y"}), "no support bundle of the updater"),
        (archive({"manifest.json": b"[" * 90_000}), "no support bundle of the updater"),
        (archive({"manifest.json": manifest(format="mender")}), "format 'mender'"),
        (archive({"manifest.json": manifest(version=2)}), "version 2, this program knows up to 1"),
        (zstandard.compress(bytes(80 << 20)), "more than is reasonable"),
    ],
    ids=["empty", "text", "zstd", "gzip", "tar", "deep", "other", "future", "huge"],
)
def test_a_bad_support_bundle_is_one_clear_line(
    tmp_path: Path, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "support.tar"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["brownout", "reproduce", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert says in errors[0]


def test_a_support_bundle_without_most_of_it_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "support.tar"
    path.write_bytes(
        archive({"manifest.json": manifest(), "status.json": b"7", "slots.json": b"{", "x": b""})
    )
    assert read_failure(path).symptoms == {}
    with pytest.raises(CampaignError, match="nothing to search"):
        run_reproduce(path, Search(), tmp_path, Console(file=io.StringIO()))
