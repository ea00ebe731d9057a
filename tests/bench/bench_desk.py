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
from pathlib import Path
from typing import Any

from framework.targets.bench.http_heads import HttpHeads, serve_http
from framework.targets.bench.serial_port import Line, VirtualSerialPort

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
