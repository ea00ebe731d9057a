"""A real update, recorded and cut everywhere; the real bootloader and boots agree."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from framework.disk import Decision, DiskError
from framework.disk.state import Unreadable
from framework.explore.bundle import open_state, read_bundle
from framework.explore.examine import Bounds
from framework.explore.judges.context import Context
from framework.explore.judges.data import DataJudge
from framework.explore.layout import Role
from framework.explore.recording import Recording
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import CrashState
from framework.explorer import (
    Wish,
    ears_of,
    machine_of,
    parse_models,
    run_boot_state,
    run_explore,
    run_record,
    run_record_scenario,
)

pytestmark = pytest.mark.emulated

RIG = Path(__file__).parents[2] / "rigs" / "qemu-arm64.yaml"
MODELS = ("kept", "prefix", "subset")


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("honest"), "v1", "v2")


def record(tmp_path, base: str, update: str) -> Path:
    path = tmp_path / "x.recording"
    return run_record(RIG, base, [update], path, Console(file=io.StringIO()))


def explored(path, tmp_path, *, judges, bounds, models=MODELS):
    out = io.StringIO()
    wish = Wish(parse_models(models), 10, 200, 1, judges, bounds)
    code = run_explore(
        [path],
        wish,
        tmp_path / "bundles",
        Console(file=out, width=200),
        rig=RIG,
        report=tmp_path / "report.html",
        as_json=True,
    )
    return code, json.loads(out.getvalue())["recordings"][0]


def test_every_cut_of_an_honest_update_holds_and_real_boots_agree(honest, tmp_path):
    path = honest
    assert path.stat().st_size < 8 << 20
    code, result = explored(
        path,
        tmp_path,
        judges=("static", "data", "mount", "uboot", "coldboot"),
        bounds=Bounds(data=1500, mounts=6, decisions=8, cold_boots=2, deep=1),
    )
    assert result["disagreements"] == []
    assert code == 0, result["violations"]
    assert result["states"] > 50_000
    judged = {row["judge"]: row for row in result["judges"]}
    assert judged["mount"]["looked_at"] == 6
    assert judged["uboot"]["looked_at"] == 8
    assert judged["uboot"]["controls"] > 0
    assert judged["coldboot"]["looked_at"] == 2
    assert judged["depth two"]["looked_at"] == 1
    assert judged["depth two"]["controls"] == 1
    (depth,) = result["depth_two"]
    assert depth["booted"] == 1 < depth["keys"] == 1 + len(depth["left"])
    assert depth["retried"] == 1
    assert [row["data_unchecked"] for row in result["deep"]] == [0], "more than by default"
    assert depth["classes"] - depth["unknown"] == depth["covered"] + sum(
        n for _, n in depth["left"]
    )
    report = (tmp_path / "report.html").read_text()
    assert "<svg" in report
    assert not any(sign in report for sign in ("src=", "href=", "url(", "<script", "@import"))


def test_a_start_mends_a_data_partition_whose_first_page_of_flash_cannot_be_read(honest):
    """Superblock, descriptors and bitmaps at once: `e2fsck -n` ends with 8, as where nothing is."""
    with Recording(honest) as recording:
        context = Context.of(recording.reader, recording.facts)
        (data,) = (r for r in context.layout.all_regions() if r.role is Role.DATA)
        part = data.ranges[0]
        device = recording.reader.devices.index(part.device)
        lost = Decision(unreadable=(Unreadable(device, part.offset, 16384),))
        state = CrashState(len(recording.reader.operations), lost, "torn-page")
        assert DataJudge(context).look(state).clean
        signs = ears_of(recording.facts).boot
        with (
            Workplace() as place,
            state.disks(recording.reader) as disks,
            StateMachine(machine_of(recording.facts, RIG), disks, place) as machine,
        ):
            heard = machine.run([signs.ready, signs.data_lost], 90, stop_on=lambda match: True)
    assert [match.re for match in heard.matches] == [signs.ready]
    assert "BROWNOUT DATA-REPAIR" in heard.console


def test_a_commit_that_is_acknowledged_too_early_is_caught_and_its_state_can_be_made_again(
    tmp_path,
):
    path = record(tmp_path, "v1", "v2+early-acknowledgement")
    code, result = explored(path, tmp_path, judges=("static",), bounds=Bounds())
    assert code == 1
    assert 3 in {row["invariant"] for row in result["violations"]}
    folder = next(Path(b) for b in result["bundles"] if "invariant-3" in b)
    bundle = read_bundle(folder)
    assert bundle.why["invariant"] == 3
    exported = tmp_path / "disk.img"
    run_boot_state(folder, Console(file=io.StringIO()), export=exported)
    with Recording(bundle.recording) as recording, open_state(bundle, recording) as disks:
        disk = disks["vda"]
        assert exported.stat().st_size == disk.size_bytes
        with exported.open("rb") as file:
            assert all(file.read(len(chunk)) == chunk for chunk in disk.chunks())


EARLY = """
import pytest

@pytest.mark.update("v2+early-acknowledgement")
def test_an_update_without_a_fault(device, update):
    device.update(update)
"""


def test_a_scenario_is_recorded_with_its_cut_and_cut_again_everywhere(tmp_path):
    path = tmp_path / "cut.recording"
    scenario = "scenarios/test_power.py::test_cut_in_the_middle_of_the_image"
    assert run_record_scenario(RIG, scenario, path, Console(file=io.StringIO()))
    with Recording(path) as recording:
        cut = recording.reader.cuts[0]
        assert cut.operation < len(recording.reader.operations), "nothing of what came after"
        assert (recording.facts["base"], recording.facts["updates"]) == ("v1", ["v2"])
    models = ("prefix", "subset", "torn")
    judges = ("static", "data", "coldboot")
    code, result = explored(
        path, tmp_path, judges=judges, bounds=Bounds(data=300, cold_boots=3), models=models
    )
    assert (code, result["disagreements"]) == (0, [])
    assert result["states"] > 50_000


def test_a_bug_that_no_fault_of_the_scenario_shows_is_found_in_its_recording(tmp_path):
    (tmp_path / "test_early.py").write_text(EARLY, encoding="utf-8")
    path = tmp_path / "early.recording"
    scenario = f"{tmp_path / 'test_early.py'}::test_an_update_without_a_fault"
    assert run_record_scenario(RIG, scenario, path, Console(file=io.StringIO()))
    code, result = explored(path, tmp_path, judges=("static",), bounds=Bounds(), models=MODELS[:2])
    assert code == 1
    assert 3 in {row["invariant"] for row in result["violations"] if row["counts"]}


def test_a_scenario_that_there_is_not_is_no_recording(tmp_path):
    with pytest.raises(DiskError, match="0 scenarios were recorded, not one"):
        run_record_scenario(RIG, "scenarios/test_none.py::test_x", tmp_path / "x", Console())
    assert list(tmp_path.iterdir()) == []
