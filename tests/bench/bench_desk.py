"""A desk without QEMU: a contact, a program behind it that plays a board, real servers in front."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from framework.report import ResultStore
from framework.targets.bench.http_heads import HttpHeads, serve_http
from framework.targets.bench.serial_port import Line, VirtualSerialPort
from framework.targets.bench.stack import find_peer
from framework.targets.places import Place, Places

BOARD = Path(__file__).with_name("little_board.py")


class LittleBoard:
    """A relay with a program behind it, whose console is a `VirtualSerialPort`; no QEMU."""

    def __init__(self, number: int, line: Line, variant: str = "") -> None:
        self.number = number
        self.name = f"little-{number}"
        self.variant = variant
        self.hangs = threading.Event()
        self.welded = False
        self.on = False
        self.restored = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.serial = VirtualSerialPort(
            Path(f"/dev/shm/brownout-test-{os.getpid()}-{number}"), line, self._typed
        )

    def relay(self) -> bool:
        while self.hangs.is_set():
            time.sleep(0.05)
        return self.on

    def switch(self, on: bool) -> None:
        self.relay()
        self.on = on
        if on and self.process is None:
            self.serial.power_rises()
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", str(BOARD), self.variant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            threading.Thread(target=self._carry, args=(self.process,), daemon=True).start()
        elif not on and not self.welded:
            self._end()

    def weld(self, stuck: bool) -> None:
        self.welded = stuck

    def recover(self) -> None:
        self.restored += 1

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "relay": self.on}

    def _typed(self, data: bytes) -> None:
        process = self.process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.write(data)
                process.stdin.flush()

    def _carry(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 4096):
            self.serial.send(data)

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None

    def close(self) -> None:
        self.hangs.clear()
        self._end()
        self.serial.close()


class Desk:
    """Little boards and their HTTP heads."""

    def __init__(self) -> None:
        self.boards: dict[int, LittleBoard] = {}
        self.http: HttpHeads = serve_http(self.boards)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def board(self, line: Line | None = None, variant: str = "") -> LittleBoard:
        number = len(self.boards) + 1
        self.boards[number] = LittleBoard(number, line or Line(baud=0), variant)
        return self.boards[number]

    def close(self) -> None:
        for board in self.boards.values():
            board.close()
        self.http.shutdown()
        self.http.server_close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, host: str = "127.0.0.1") -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on {port}")


class RunningBench:
    """`brownout bench up` as a user runs it, and what it told."""

    def __init__(self, folder: Path, *options: str) -> None:
        state = folder / "bench.json"
        self.output = folder / "bench.log"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "TERM", "--"),  # also where pytest is killed
                    *(str(Path(sys.executable).with_name("brownout")), "bench", "up"),
                    *("--port", "0", "--state", str(state), "--log", str(folder / "log"), *options),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 180
        while not state.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"no bench: {self.output.read_text()}")
            time.sleep(0.1)
        told = json.loads(state.read_text())
        self.coordinator: str = told["coordinator"]
        self.control: str = told["control"]
        self.places: list[dict[str, str]] = told["places"]

    def end(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


FARM_RIG = """
targets:
  main:
    features: [real-board, linux, power-switch, bootloader]
    resources:
      RemotePlace: {name: +}
    drivers:
      NetworkPowerDriver: {delay: 0.1}
      HttpDigitalOutputDriver: {}
      SerialDriver: {}
      ConsolePumpDriver: {}
      SwitchedBoardDriver: {recipe: qemu-arm64, switch_timeout_s: 5.0, min_off_s: 0.05}
      ShellDriver: {prompt: 'board# ', login_prompt: ' login: ', username: root}
      SlotStrategy:
        boot_budget_s: 8.0
        banner: 'Little board 1\\.0'
        bootloader_prompt: '=> '
        silence_s: 0.3
        quiet_kernel: false
imports: [framework.console.driver, framework.targets.switched, framework.targets.strategy]
"""
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCENARIOS = "tests/bench/little_scenarios.py"
FAILING = "tests/bench/failing_scenarios.py"


class FarmDesk:
    """Little boards behind labgrid's own coordinator and exporter, with its ser2net."""

    def __init__(self, folder: Path, variants: Sequence[str]) -> None:
        self.folder = folder
        self.desk = Desk()
        self.boards = {f"little{n}": self.desk.board(variant=v) for n, v in enumerate(variants, 1)}
        self.rig = folder / "little.yaml"
        self.rig.write_text(FARM_RIG)
        self.history = folder / "history.db"
        self.coordinator = f"127.0.0.1:{free_port()}"
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "coordinator"
        home.mkdir()
        (home / "places.yaml").write_text(yaml.safe_dump(dict(map(self._place, self.boards))))
        self._exports = folder / "exporter.yaml"
        self._exports.write_text(
            yaml.safe_dump({name: self._group(board) for name, board in self.boards.items()})
        )
        self.start_coordinator()
        self.start_exporter()
        self.places = Places(self.coordinator)

    @staticmethod
    def _place(name: str) -> tuple[str, dict[str, Any]]:
        now = time.time()
        match = {"exporter": "desk", "group": name, "cls": "*", "name": None}
        tags = {"board": "little", "health": "ok"}
        told = {"aliases": [], "comment": "", "tags": tags, "matches": [match]}
        return name, {**told, "created": now, "changed": now}

    def _group(self, board: LittleBoard) -> dict[str, Any]:
        return {
            "RawSerialPort": {"port": str(board.serial.path), "speed": 115200},
            "NetworkPowerPort": {
                "model": "rest",
                "host": self.desk.url + '/rest/{{ "{index}" }}',
                "index": board.number,
            },
            "HttpDigitalOutput": {
                "url": f"{self.desk.url}/recovery/{board.number}",
                "body_asserted": "restore",
                "body_deasserted": "ready",
            },
        }

    def start_coordinator(self) -> None:
        self._start(
            "labgrid-coordinator", ["-l", self.coordinator], cwd=self.folder / "coordinator"
        )
        wait_for_port(int(self.coordinator.rpartition(":")[2]))

    def start_exporter(self) -> None:
        options = ["-c", self.coordinator, "--name", "desk", "--hostname", "127.0.0.1"]
        # As systemd does: the coordinator may still hold its predecessor's name, and it ends then.
        again = 'while :; do "$0" "$@"; sleep 0.3; done'
        log = self._start(
            "labgrid-exporter", [*options, str(self._exports)], ["/bin/sh", "-c", again]
        )
        deadline = time.monotonic() + 30
        while log.read_text(errors="replace").count("add resource ") < 3 * len(self.boards):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)

    def _start(
        self,
        program: str,
        options: list[str],
        through: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> Path:
        log = self.folder / f"{program}.log"
        ser2net = Path(find_peer("ser2net")).parent
        with log.open("wb") as output:
            self._programs[program] = subprocess.Popen(
                [*("setpriv", "--pdeathsig", "KILL", "--"), *through, BIN / program, *options],
                cwd=cwd,
                env={
                    **os.environ,
                    "PATH": f"{ser2net}{os.pathsep}{os.environ['PATH']}",
                    "PYTHONUNBUFFERED": "1",
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return log

    def kill(self, program: str) -> None:
        """As when its host goes down: with all that it started."""
        process = self._programs.pop(program)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart_coordinator(self) -> None:
        self.kill("labgrid-coordinator")
        self.start_coordinator()
        self.kill("labgrid-exporter")  # it ends by itself then, and systemd starts it again
        self.start_exporter()

    @property
    def environment(self) -> dict[str, str]:
        told = {**os.environ, "LG_COORDINATOR": self.coordinator}
        told.pop("LG_TOKEN", None)
        return {
            **told,
            "FARM_MARK": str(self.folder / "mark"),
            "COLUMNS": "200",
            # Of no use here, and slow to import in every worker.
            "PYTEST_ADDOPTS": "-p no:schemathesis -p no:hypothesispytest",
        }

    def command(self, *options: str, scenarios: str = SCENARIOS) -> list[str]:
        return [
            *(str(BIN / "brownout"), "farm", "run", scenarios, "--tags", "board=little"),
            *("--lg-env", str(self.rig), "--report", str(self.folder / "report")),
            *("--history", str(self.history), *options),
        ]

    def start(self, *options: str, scenarios: str = SCENARIOS) -> subprocess.Popen[str]:
        command = self.command(*options, scenarios=scenarios)
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *options: str, timeout_s: float = 400, scenarios: str = SCENARIOS
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*options, scenarios=scenarios)
        try:
            told, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            told, _ = process.communicate()
            raise AssertionError(f"the run hung:\n{told}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, told, "")

    def farm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "brownout", "farm", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def mark(self, timeout_s: float = 200) -> dict[str, Any]:
        """What the first scenario that marks itself has written: its process and its place."""
        path, deadline = self.folder / "mark", time.monotonic() + timeout_s
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < deadline, "no scenario has begun"
            time.sleep(0.02)
        told: dict[str, Any] = json.loads(path.read_text())
        token = told.pop("token")
        told["place"] = next(p.name for p in self.places.all() if p.reservation == token)
        return told

    def held(self) -> list[Place]:
        """Places that are not free: locked, or with something of a lease."""
        return [
            place
            for place in self.places.all()
            if place.acquired or any(tag.startswith("lease_") for tag in place.tags)
        ]

    def verdicts(self) -> dict[str, str]:
        """Of the last run, by the scenarios' names."""
        store = ResultStore(self.folder / "report" / "results")
        return {r.scenario.rpartition("::")[2]: r.verdict for r in store.read_all()}

    def close(self) -> None:
        self.places.close()
        for program in list(self._programs):
            self.kill(program)
        self.desk.close()


RIG = """
targets:
  main:
    features: [real-board, linux, power-switch, bootloader]
    resources:
      NetworkPowerPort: {{model: rest, host: '{url}/rest/{{index}}', index: {number}}}
      NetworkSerialPort: {{host: 127.0.0.1, port: {port}, speed: 115200}}
      HttpDigitalOutput:
        {{url: '{url}/recovery/{number}', body_asserted: restore, body_deasserted: ready}}
    drivers:
      NetworkPowerDriver: {{delay: 0.1}}
      HttpDigitalOutputDriver: {{}}
      SerialDriver: {{}}
      ConsolePumpDriver: {{}}
      SwitchedBoardDriver:
        {{recipe: qemu-arm64, switch_timeout_s: {switch_timeout_s}, min_off_s: 0.05}}
      ShellDriver: {{prompt: 'board# ', login_prompt: ' login: ', username: root}}
      SlotStrategy:
        boot_budget_s: {budget_s}
        banner: 'Little board 1\\.0'
        bootloader_prompt: '=> '
        silence_s: 0.3
        quiet_kernel: false
imports: [framework.console.driver, framework.targets.switched, framework.targets.strategy]
"""
