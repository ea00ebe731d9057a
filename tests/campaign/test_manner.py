"""A run without network is repeated in a machine whose time is its own, and compared to the disk.

The last test does it with a real machine; it takes minutes, so it is for the night.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from attrs import evolve
from disk_nbd_client import Client
from scenario_of_writes import PLANTED
from targets_rigs import write_rig
from test_bundle import A_BUNDLE

from framework.campaign import Bundle, BundleError, read_bundle, write_bundle
from framework.campaign.bundle import FACTS
from framework.campaign.manner import (
    OPTION,
    RESTED,
    Operations,
    compare_operations,
    manner_of,
    operations_of,
    used_network,
)
from framework.campaign.replay import Ran, compare_runs, operations_in, replay
from framework.cli import main
from framework.disk import DeviceSpec, Recorder, VolatileCache
from framework.faults import MissingFeatureError
from framework.scenario.device import Device
from framework.targets.errors import RigError
from framework.targets.machine import Machine, command_line
from framework.targets.qemu import RecordedQEMUDriver
from framework.targets.rig import check_rig, load_rig

RIG = Path("rigs/qemu-arm64.yaml")
SCENARIO = "tests/campaign/scenario_of_writes.py::test_applications_write"
EMULATED = frozenset({"emulated", "power-cut", "network"})
QUIET = evolve(A_BUNDLE, network=False)
MIB = 1 << 20


# -- how ---------------------------------------------------------------------------------------


def test_a_run_without_network_is_repeated_deterministically() -> None:
    manner = manner_of(QUIET, EMULATED)
    assert manner.deterministic
    assert not manner.exact, "the run itself was in real time: its operations say nothing"
    assert manner.options == (OPTION,)
    assert str(manner) == "deterministic: the run had no network"
    exact = manner_of(evolve(QUIET, deterministic=True), EMULATED)
    assert exact.exact
    assert str(exact).endswith("every disk operation is compared")


@pytest.mark.parametrize(
    ("bundle", "features", "why"),
    [
        (evolve(QUIET, network=True), EMULATED, "the run used the network"),
        (QUIET, EMULATED - {"emulated"}, "the rig is not emulated"),
    ],
)
def test_what_can_not_be_deterministic_is_repeated_in_real_time_and_told(
    bundle: Bundle, features: frozenset[str], why: str
) -> None:
    manner = manner_of(bundle, features)
    assert (manner.deterministic, manner.options) == (False, ())
    assert str(manner) == f"in real time: {why}"
    with pytest.raises(BundleError, match=f"can't be deterministic: {why}"):
        manner_of(bundle, features, wanted=True)


def test_real_time_can_be_asked_for() -> None:
    assert str(manner_of(QUIET, EMULATED, wanted=False)) == "in real time: as wanted"


def test_older_bundles_show_whether_there_was_a_network() -> None:
    """They don't say it, but what is installed comes over it, and the proxy's doing is told."""
    silent = evolve(A_BUNDLE, steps=("power cut (torn)",))
    assert used_network(A_BUNDLE), "something was installed"
    assert not used_network(silent)
    assert used_network(evolve(silent, timeline=((1.0, "network", "connection 1"),)))


@pytest.mark.parametrize("facts", [{"network": "no"}, {"deterministic": 1}])
def test_a_bundle_that_says_nonsense_of_its_machine_is_damaged(
    tmp_path: Path, facts: dict[str, object]
) -> None:
    path = tmp_path / "a.bundle"
    write_bundle(path, evolve(QUIET, deterministic=True))
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries[FACTS] = json.dumps({**json.loads(entries[FACTS]), **facts}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(BundleError, match="damaged"):
        read_bundle(path)


def test_the_command_refuses_what_can_not_be_deterministic_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bundle"
    write_bundle(path, evolve(QUIET, network=True, cuts=()))
    command = ["brownout", "replay", str(path), "--deterministic", "--rig", str(RIG)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("can't be deterministic: the run used the network")


# -- the machine -------------------------------------------------------------------------------


def a_machine(**changes: object) -> Machine:
    values = {"program": "qemu-system-aarch64", "machine": "virt", "cpu": "cortex-a57"}
    return Machine(**values, memory="128M", accelerator="tcg", watchdog="i6300esb", **changes)  # type: ignore[arg-type]


def test_a_deterministic_machine_counts_instructions() -> None:
    line = command_line(a_machine(deterministic=True), console_fd=3, qmp_fd=4, exports={})
    text = " ".join(line)
    assert "-icount shift=0,sleep=off" in text
    assert "-rtc clock=vm" in text
    assert "-seed 1" in text
    assert "i6300esb" not in text, "time leaps while it waits: a watchdog would end it"
    at = command_line(
        a_machine(deterministic=True, clock="2003-01-01T00:00:00"),
        console_fd=3,
        qmp_fd=4,
        exports={},
    )
    assert "-rtc base=2003-01-01T00:00:00,clock=vm" in " ".join(at)
    plain = " ".join(command_line(a_machine(), console_fd=3, qmp_fd=4, exports={}))
    assert "-icount" not in plain
    assert "-rtc" not in plain
    assert "i6300esb" in plain


@pytest.mark.parametrize(
    ("more", "network", "says"),
    [
        ("deterministic: true", "user", "runs ahead of any network: write 'network: none'"),
        ("deterministic: true\n        accelerator: kvm", "none", "under tcg, not kvm"),
        ("deterministic: often", "none", "deterministic"),
    ],
)
def test_a_rig_that_can_not_be_deterministic_is_refused(
    tmp_path: Path, more: str, network: str, says: str
) -> None:
    rig = write_rig(tmp_path, network=network)
    rig.write_text(rig.read_text().replace("memory: 128M", f"memory: 128M\n        {more}"))
    with pytest.raises(RigError, match=says):
        check_rig(rig)


def test_a_rig_may_be_deterministic_by_its_file(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(
        rig.read_text().replace("memory: 128M", "memory: 128M\n        deterministic: true")
    )
    driver = load_rig(rig).get_target().get_driver("RecordedQEMUDriver", activate=False)
    driver.preflight()
    assert driver.description().deterministic
    assert driver.description().accelerator == "tcg"


class Offline:
    """A machine whose time is its own."""

    deterministic = True


def test_a_device_whose_time_is_its_own_does_not_go_online() -> None:
    device = Device.__new__(Device)
    device.machine = Offline()  # type: ignore[assignment]
    with pytest.raises(MissingFeatureError, match="installing v2 needs a network"):
        device.goes_online("installing v2")


class Disk:
    """Counts operations, one a look while there are any left."""

    def __init__(self, left: float) -> None:
        self.left = left
        self.done = 0
        self.marks: list[str] = []

    def mark(self, source: str, text: str) -> None:
        self.marks.append(source)

    @property
    def operations(self) -> int:
        if self.left > 0:
            self.left -= 1
            self.done += 1
        return self.done


@pytest.mark.parametrize(
    ("left", "lost", "at_least_s", "at_most_s"),
    [(12, False, 0.5, 5), (0, False, 0.2, 5), (float("inf"), False, 0.9, 5), (50, True, 0, 0.2)],
    ids=["busy at first", "quiet", "never quiet", "power is lost"],
)
def test_a_machine_rests_until_its_disk_is_quiet(
    left: float, lost: bool, at_least_s: float, at_most_s: float
) -> None:
    disk, power_lost = Disk(left), threading.Event()
    if lost:
        power_lost.set()
    machine = SimpleNamespace(recorder=disk, power_lost=power_lost)
    began = time.monotonic()
    RecordedQEMUDriver.rest(machine, quiet_s=0.2, most_s=1.0)  # type: ignore[arg-type]
    assert at_least_s <= time.monotonic() - began < at_most_s
    assert lost or disk.left in (0, float("inf"))
    assert disk.marks == ([] if lost else [RESTED])


# -- what is compared --------------------------------------------------------------------------


def test_between_two_flushes_no_order_is_compared_and_across_one_it_is_told(
    tmp_path: Path,
) -> None:
    def journal(name: str, *order: int) -> Operations:
        (tmp_path / name).mkdir()
        base = tmp_path / name / "base.img"
        base.write_bytes(bytes(MIB))
        recorder = Recorder([DeviceSpec("vda", base)], tmp_path / name / "run").start()
        with Client(recorder.endpoint("vda").socket, "vda") as client:
            for number, at in enumerate(order):
                client.write(at * 4096, bytes(4096))
                if number == 1:
                    client.flush()
        recorder.close()
        return operations_of(recorder.journal_path)

    was = journal("a", 1, 2, 3)
    assert compare_operations(was, journal("b", 2, 1, 3)) == (None, "")
    told = (None, "in another order from disk operation 2 on, within a step")
    assert compare_operations(was, journal("c", 1, 3, 2)) == told


def test_across_a_rest_or_a_cut_an_order_is_a_divergence(tmp_path: Path) -> None:
    def journal(name: str, end: str, *order: int) -> Operations:
        (tmp_path / name).mkdir()
        base = tmp_path / name / "base.img"
        base.write_bytes(bytes(MIB))
        recorder = Recorder([DeviceSpec("vda", base)], tmp_path / name / "run").start()
        for at in order:
            with Client(recorder.endpoint("vda").socket, "vda") as client:
                client.write(at * 4096, bytes(4096))
                client.flush()
            if end == "cut":
                recorder.cut(VolatileCache(), seed=1)
            elif end:
                recorder.mark(RESTED, "nothing more to do")
        recorder.close()
        return operations_of(recorder.journal_path)

    for end in ("cut", "rest"):
        parted, _ = compare_operations(
            journal(f"{end} a", end, 1, 2), journal(f"{end} b", end, 2, 1)
        )
        assert str(parted).startswith("diverged at disk operation 1: "), end
        late, _ = compare_operations(journal(f"{end} c", end, 1, 2), journal(f"{end} d", end, 1, 3))
        assert str(late).startswith("diverged at disk operation 3: "), end
        short, _ = compare_operations(journal(f"{end} e", end, 1, 2), journal(f"{end} f", end, 1))
        assert str(short).endswith("it is [the run ended]"), end
    same = compare_operations(journal("none a", "", 1, 2), journal("none b", "", 2, 1))
    assert same[0] is None


def recorded(folder: Path, *, wrong_at: int | None = None, flushes: int = 1) -> Path:
    """A journal of ten writes, each flushed; one may go to another place."""
    base = folder / "base.img"
    folder.mkdir()
    base.write_bytes(bytes(MIB))
    recorder = Recorder([DeviceSpec("vda", base)], folder / "run").start()
    with Client(recorder.endpoint("vda").socket, "vda") as client:
        for at in range(10):
            client.write((at + (20 if at == wrong_at else 0)) * 4096, bytes([at]) * 4096)
            for _ in range(flushes):
                client.flush()
    recorder.close()
    return Path(recorder.journal_path)


def test_the_operations_of_a_disk_are_compared_one_by_one(tmp_path: Path) -> None:
    was = operations_of(recorded(tmp_path / "was"))
    assert len(was[0]) == 20
    assert was[0][:2] == ("write of 4096 bytes at 0 of vda", "flush of vda")
    assert compare_operations(was, operations_of(recorded(tmp_path / "now"))) == (None, "")
    planted = operations_of(recorded(tmp_path / "planted", wrong_at=3))
    assert str(compare_operations(was, planted)[0]) == (
        "diverged at disk operation 7: it was [write of 4096 bytes at 12288 of vda], "
        "it is [write of 4096 bytes at 94208 of vda]"
    )


def test_flushes_with_nothing_between_them_are_one(tmp_path: Path) -> None:
    """How many Linux makes of those asked for at the same time is the host's doing."""
    assert operations_of(recorded(tmp_path / "a")) == operations_of(
        recorded(tmp_path / "b", flushes=3)
    )


def test_a_planted_operation_is_told_only_of_runs_that_were_deterministic(tmp_path: Path) -> None:
    bundle = evolve(QUIET, deterministic=True)
    path = tmp_path / "a.bundle"
    bundle = write_bundle(path, bundle, "", recorded(tmp_path / "was"))
    other = tmp_path / "b.bundle"
    write_bundle(other, bundle, "", recorded(tmp_path / "now", wrong_at=9))
    again = Ran.of(other, exact=True)
    told = str(compare_runs(path, bundle, again, exact=True)[0])
    assert told.startswith("diverged at disk operation 19: ")
    assert compare_runs(path, bundle, again, exact=False) == (None, "")
    assert compare_runs(path, bundle, Ran.of(path, exact=True), exact=True) == (None, "")


def test_an_event_is_told_before_an_operation(tmp_path: Path) -> None:
    path = tmp_path / "a.bundle"
    bundle = write_bundle(path, evolve(QUIET, deterministic=True), "", recorded(tmp_path / "was"))
    again = Ran(evolve(bundle, steps=(*bundle.steps[:2], "did not start")), ())
    assert str(compare_runs(path, bundle, again, exact=True)[0]) == (
        "diverged at event 3: it was [started v1 in slot a], it is [did not start]"
    )


# -- for real ----------------------------------------------------------------------------------


def made(folder: Path) -> Path:
    """The bundle of a deterministic run of the scenario."""
    arguments = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SCENARIO),
        *("--lg-env", str(RIG), "--brownout-bundles", str(folder), OPTION),
    ]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:]
    (path,) = folder.glob("*.bundle")
    return path


@pytest.mark.emulated
@pytest.mark.night
def test_two_replays_do_the_same_to_the_disk_and_a_planted_difference_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path)
    bundle = read_bundle(path)
    assert (bundle.network, bundle.deterministic) == (False, True)
    assert sum(len(step) for step in operations_in(path, bundle)) > 50
    said: list[str] = []
    for _ in range(2):
        done = replay(path, RIG, said.append)
        assert done.reproduced, done
    assert "deterministic: the run had no network; every disk operation is compared" in said
    monkeypatch.setenv(PLANTED, "3")
    parted = replay(path, RIG, said.append).divergence
    assert parted is not None
    assert str(parted).startswith("diverged at disk operation ")
