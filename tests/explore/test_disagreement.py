"""Exit code 3: the oracle says one thing, the real bootloader does another: no verdict counts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from attrs import asdict
from disk_nbd_client import Client
from rich.console import Console

from framework.disk import DeviceSpec, JournalReader, Recorder, build_copy, read_environment
from framework.explore.describe import layout_to_values
from framework.explore.examine import Bounds
from framework.explore.judges import static
from framework.explore.recording import write_recording
from framework.explorer import EXIT_CLEAN, EXIT_DISAGREEMENT, Wish, parse_models, run_explore
from framework.scenario.layouts import SLOT_REGION, layout_of
from framework.scenario.manifest import TargetManifest
from framework.verdict.oracle import Decision
from images import build_target

pytestmark = pytest.mark.emulated

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The arm64 target's disk, on which somebody puts slot a on trial; no machine ran for it."""
    folder = tmp_path_factory.mktemp("trial")
    images = build_target("qemu-arm64", relock_if_gone=True)
    manifest = TargetManifest.parse(images.manifest, images.directory, "v1")
    copies = [(copy.offset, copy.length) for copy in manifest.environment]
    with Recorder([DeviceSpec("vda", manifest.disks["vda"])], folder / "run") as recorder:
        endpoint = recorder.endpoint("vda")
        with recorder.disk("vda") as disk:
            before = read_environment(disk, copies)
        assert before.current is not None
        variables = {**before.variables, "mender_boot_part": str(manifest.slot_numbers["a"])}
        variables |= {"upgrade_available": "1", "bootcount": "0"}
        at, length = copies[1 - before.current]
        flags = (before.copies[before.current].flags + 1) % 256
        with Client(endpoint.socket, endpoint.export) as client:
            client.write(at, build_copy(variables, length, flags=flags))
            client.flush()
        journal = recorder.journal_path
    sizes = {d.name: d.size_bytes for d in JournalReader(journal).header.devices}
    seed = manifest.firmware.get("seed")
    facts = {
        "rig": "qemu-arm64",
        "updater": "brownout",
        "bootloader": manifest.bootloader,
        "initial": manifest.images["v1"].name,
        "images": {"v1": asdict(manifest.images["v1"])},
        "layout": layout_to_values(layout_of(manifest, sizes, [manifest.images["v1"]])),
        "slots": {slot: SLOT_REGION + slot for slot in manifest.slots},
        "pflash": None if seed is None else str(seed),
        "base_hints": {name: str(path) for name, path in manifest.disks.items()},
    }
    return write_recording(journal, folder / "trial.recording", facts)


def explored(recording, folder):
    out = io.StringIO()
    wish = Wish(parse_models(["kept"]), 4, 0, 1, ("static", "uboot"), Bounds(decisions=2))
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
