"""`brownout rig check`: one line that names file and key, for environments and exporter files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from framework.rig_cli import rig
from framework.targets.errors import RigError
from framework.targets.exports import check_exporter, is_exporter
from framework.targets.rig import check_rig, load_rig, rig_features

RIGS = Path(__file__).parents[2] / "rigs"
EXPORTERS = sorted(RIGS.glob("boards/*/exporter.yaml"))
BOARDS = [*sorted(RIGS.glob("boards/*/environment.yaml")), *sorted(RIGS.glob("bench*.yaml"))]

GOOD = """
rack1:
  location: shelf 2
  RawSerialPort: {port: /dev/ttyUSB0, speed: 115200}
  NetworkPowerPort: {model: shelly_gen2, host: 'http://192.168.0.7', index: 0}
"""


def refusal(check: Callable[[Path], object], path: Path, good: str, old: str, new: str) -> str:
    """What is said of a good file with one mistake: one line that names the file."""
    assert old in good
    path.write_text(good.replace(old, new, 1))
    with pytest.raises(RigError) as caught:
        check(path)
    said = str(caught.value)
    assert str(path) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("path", EXPORTERS, ids=lambda path: path.parent.name)
def test_our_exporter_files_are_good(path: Path) -> None:
    assert is_exporter(path)
    assert check_exporter(path) >= 2


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_our_environments_of_lent_boards_are_good(path: Path) -> None:
    assert not is_exporter(path)
    check_rig(path)
    assert {"real-board", "power-switch"} <= rig_features(path)


def test_a_good_exporter_file_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "exporter.yaml"
    path.write_text(GOOD)
    assert check_exporter(path) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("speed:", "sped:", "rack1.RawSerialPort: unknown key 'sped' (did you mean 'speed'?)"),
        ("RawSerialPort:", "RawSerialPrt:", "unknown key 'RawSerialPrt' (did you mean 'RawSerial"),
        ("shelly_gen2", "shelly_gen9", "rack1.NetworkPowerPort.model: 'shelly_gen9'; labgrid has"),
        ("/dev/ttyUSB0", "/home/tty", "rack1.RawSerialPort.port: labgrid's exporter takes only"),
        (", index: 0", "", "rack1.NetworkPowerPort: has no 'index', which NetworkPowerPort needs"),
        ("index: 0", "index: one", "rack1.NetworkPowerPort.index: 'one'"),
        ("model: shelly_gen2", "model: 7", "rack1.NetworkPowerPort.model: 7"),
        ("location: shelf 2", "location: 7", "rack1.location: must be a text"),
        ("  location", "# a comment\n  location", "a comment line begins with '##'"),
        ("rack1:", "rack1: [", "exporter.yaml: "),
    ],
)
def test_a_mistake_in_an_exporter_file_is_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert message in refusal(check_exporter, tmp_path / "exporter.yaml", GOOD, old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("golden: v1", "goldn: v1", "SwitchedBoardDriver: unknown key 'goldn'"),
        ("recipe: qemu-arm64 ", "recipe: 7 ", "SwitchedBoardDriver.recipe: 7"),
        (
            "recipe: qemu-arm64 ",
            "min_off_s: 1 ",
            "has no 'recipe', which SwitchedBoardDriver needs",
        ),
        ("boot_budget_s: 90.0", "boot_budget_s: soon", "SlotStrategy.boot_budget_s: 'soon'"),
        ("RemotePlace:", "RemotePlac:", "unknown key 'RemotePlac' (did you mean 'RemotePlace'?)"),
        ("delay: 1.0", "delay: 1", "NetworkPowerDriver.delay: 1"),
    ],
)
def test_a_mistake_in_an_environment_is_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    good = (RIGS / "bench.yaml").read_text()
    assert message in refusal(load_rig, tmp_path / "rig.yaml", good, old, new)


def test_the_command_says_good_and_refuses_with_code_two(tmp_path: Path) -> None:
    path = tmp_path / "exporter.yaml"
    path.write_text(GOOD)
    runner = CliRunner()
    ended = runner.invoke(rig, ["check", str(path), str(RIGS / "bench.yaml")])
    assert ended.exit_code == 0, ended.output
    assert ended.output.splitlines() == [
        f"{path}: good, exports 2 resources",
        f"{RIGS / 'bench.yaml'}: good, its board is lent by a coordinator",
    ]
    path.write_text(GOOD.replace("speed", "sped"))
    ended = runner.invoke(rig, ["check", str(path)])
    assert isinstance(ended.exception, RigError)
    ended = runner.invoke(rig, ["check", str(path), "--live"])
    assert isinstance(ended.exception, RigError)
    ended = runner.invoke(rig, ["check", str(RIGS / "bench.yaml"), "--quarantine"])
    assert "--quarantine needs --live" in str(ended.exception)
