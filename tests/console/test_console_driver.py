"""`ConsolePumpDriver` over labgrid's own SerialDriver, on a real pty with a real shell."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from labgrid import Environment
from labgrid.step import steps

from framework.console import ConsoleLost, ConsolePump, SerialTransport
from framework.targets.rig import load_rig

RIG = """
targets:
  main:
    resources:
      RawSerialPort: {{port: {port}}}
    drivers:
      SerialDriver: {{}}
      ConsolePumpDriver: {{log_dir: logs}}
      ShellDriver: {{prompt: 'board# ', login_prompt: 'login: ', username: root}}
imports: [framework.console.driver]
"""


class Board:
    """A shell on its own pty, joined to a second pty that plays the board's serial port."""

    def __init__(self) -> None:
        self.bench_master, self.bench_slave = pty.openpty()
        os.set_blocking(self.bench_master, True)
        shell_master, shell_slave = pty.openpty()
        environment = {**os.environ, "PS1": "board# ", "ENV": ""}
        self.shell = subprocess.Popen(
            ["/bin/sh", "-i"],
            stdin=shell_slave,
            stdout=shell_slave,
            stderr=shell_slave,
            env=environment,
            start_new_session=True,
        )
        os.close(shell_slave)
        self.port = os.ttyname(self.bench_slave)
        subprocess.run(["stty", "-F", self.port, "raw", "-echo"], check=True)
        self.shell_master = shell_master
        for source, sink in (
            (shell_master, self.bench_master),
            (self.bench_master, shell_master),
        ):
            threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: int, sink: int) -> None:
        try:
            while data := os.read(source, 4096):
                os.write(sink, data)
        except OSError:
            pass

    def close(self) -> None:
        self.shell.kill()
        self.shell.wait()
        for fd in (self.shell_master, self.bench_master, self.bench_slave):
            os.close(fd)


@pytest.fixture
def board() -> Iterator[Board]:
    board = Board()
    yield board
    board.close()


@pytest.fixture
def rig(tmp_path: Path, board: Board) -> Iterator[Environment]:
    path = tmp_path / "board.yaml"
    path.write_text(RIG.format(port=board.port))
    environment = load_rig(path)
    yield environment
    environment.cleanup()


def test_a_shell_driver_binds_to_the_pump_and_works(rig: Environment) -> None:
    target = rig.get_target()
    shell = target.get_driver("ShellDriver")
    assert type(shell.console).__name__ == "ConsolePumpDriver"
    assert shell.run("echo $((6 * 7))") == (["42"], [], 0)
    assert shell.run("exit 3")[2] == 3
    console = target.get_driver("ConsolePumpDriver")
    assert "42" in console.pump.slice(0).text
    assert console.pump.log_path.is_file()


def test_background_output_does_not_disturb_labgrids_steps(rig: Environment) -> None:
    shell = rig.get_target().get_driver("ShellDriver")
    seen: list[object] = []
    steps.subscribe(seen.append)
    try:
        for number in range(20):
            assert shell.run(f"echo {number}")[0] == [str(number)]
    finally:
        steps.unsubscribe(seen.append)
    assert steps.get_current() is None  # nobody else pushed or popped
    console = rig.get_target().get_driver("ConsolePumpDriver")
    assert not [event for event in seen if getattr(event, "step", None).source is console.port]


def test_deactivation_ends_waits_and_positions_stay_true_after_it(rig: Environment) -> None:
    target = rig.get_target()
    shell = target.get_driver("ShellDriver")
    console = target.get_driver("ConsolePumpDriver")
    shell.run("echo before")
    position = console.pump.position
    target.deactivate(console)
    with pytest.raises(ConsoleLost, match="deactivated"):
        console.pump.wait_for("anything", 30)
    shell = target.get_driver("ShellDriver")
    assert shell.run("echo after")[0] == ["after"]
    assert "after" in console.pump.slice(position).text
    assert "before" not in console.pump.slice(position).text


def test_pyserial_ports_are_a_transport(board: Board) -> None:
    import serial

    with ConsolePump("serial") as pump:
        pump.attach(SerialTransport(serial.Serial(board.port, 115200)))
        start = pump.sendline("echo $((40 + 2))")
        pump.wait_for("\n42\r?\n", 10, since=start)


def test_the_serial_fork_that_labgrid_needs_is_the_one_installed() -> None:
    # pyserial and pyserial-labgrid share one folder; with plain pyserial every `run` over
    # ser2net is six times slower, and `pip check` says nothing.
    from importlib.metadata import PackageNotFoundError, version

    assert version("pyserial-labgrid")
    with pytest.raises(PackageNotFoundError):
        version("pyserial")
    assert "serial" in sys.modules
