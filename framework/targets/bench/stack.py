"""The whole bench: boards, their heads, and labgrid's exporter and coordinator in front of them.

`VirtualBench` is a context manager: it starts everything, and nothing of it is left afterwards, no
process, pty or socket. Programs of others are found in PATH, in Debian's places, or where
`.ci/bootstrap tests` unpacks them (`build/peers`). Everything listens on the loopback only.

The bench's programs carry its run directory in their environment, so that whatever a killed bench
left is ended by the next one (`framework.targets.rundir`); ser2net, which labgrid's exporter
starts, inherits it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from attrs import frozen

from framework.targets.bench.board import BenchBoard, BenchOptions
from framework.targets.bench.heads import HEADS, Addresses, Head
from framework.targets.bench.http_heads import HttpHeads, serve_http
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.process import MachineProcess
from framework.targets.rundir import RunDirectory, programs_of, start_time, sweep

__all__ = ["BenchPlace", "VirtualBench", "find_peer"]

EXPORTER = "bench"
MQTT_PORT = 1883  # labgrid's Tasmota driver knows no other
COORDINATOR_PORT = 20408
RESOURCES_PER_BOARD = 3
LINKS = Path("/dev/shm")  # noqa: S108 - see serial_port
_READY_S = 30.0
_GENTLE_S = 3.0


def find_peer(program: str) -> str:
    """The path of a program of others. RigError if it is nowhere."""
    peers = Path(__file__).resolve().parents[3] / "build" / "peers" / program
    places = [str(p) for p in (peers / "usr/sbin", peers / "usr/bin", "/usr/sbin", "/sbin")]
    found = shutil.which(program) or shutil.which(program, path=os.pathsep.join(places))
    if found is None:
        raise RigError(f"{program} is not installed: run .ci/bootstrap tests")
    return found


@frozen
class BenchPlace:
    """A place that the coordinator lends: its name, its board, and what kind of head it has."""

    name: str
    number: int
    head: Head


class VirtualBench:
    """The bench; see the module text.

    Args:
        kinds: the kind of head of each board, in order (`HEADS`).
        options: what the boards are.
        port: of the coordinator; 0: any free one.
        log: where the programs' output is kept; None: nowhere.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        options: BenchOptions | None = None,
        *,
        port: int = 0,
        log: Path | None = None,
    ) -> None:
        unknown = sorted(set(kinds) - set(HEADS))
        if unknown or not kinds:
            raise RigError(f"{', '.join(unknown) or 'nothing'}: known heads: {', '.join(HEADS)}")
        self._options = options or BenchOptions()
        self._log = log
        self._port = port
        self._stack = contextlib.ExitStack()
        self._programs: dict[str, MachineProcess] = {}
        self.places = tuple(
            BenchPlace(f"bench{number}", number, HEADS[kind])
            for number, kind in enumerate(kinds, 1)
        )
        self.boards: dict[int, BenchBoard] = {}
        self.coordinator = ""
        self.control = ""

    def __enter__(self) -> Self:
        with self._stack:
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    # -- starting -----------------------------------------------------------------------------

    def _start(self) -> None:
        sweep()
        _sweep_links()
        self._run = RunDirectory.create()
        self._stack.callback(self._run.remove)
        self._stack.callback(self._end_programs)
        for place in self.places:
            board = BenchBoard(place.number, self._options, EXPORTER)
            self.boards[place.number] = board
            self._stack.callback(board.close)
        http = serve_http(self.boards)
        self._stack.callback(_stop_http, http)
        self.control = f"http://127.0.0.1:{http.server_address[1]}"
        at = Addresses(
            http=http.server_address[1],
            modbus=_free_port(),
            snmp=_free_port(socket.SOCK_DGRAM),
            broker=f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}.1",
        )
        self._start_heads(at)
        self._start_labgrid(at)

    def _start_heads(self, at: Addresses) -> None:
        kinds = {place.head.name for place in self.places}
        if "modbus" in kinds:
            from framework.targets.bench.modbus_head import serve_modbus  # noqa: PLC0415 - optional

            self._stack.callback(serve_modbus(self.boards, at.modbus).stop)
        if "apc" in kinds:
            self._start_agent(at)
        if "tasmota" in kinds:
            self._start_plugs(at)

    def _start_agent(self, at: Addresses) -> None:
        """net-snmp's agent, with our program behind the APC's branch."""
        program = Path(__file__).with_name("snmp_pass.py")
        configuration = self._run.path / "snmpd.conf"
        configuration.write_text(
            f"agentaddress udp:127.0.0.1:{at.snmp}\n"
            "rwcommunity private 127.0.0.1\n"
            f"pass_persist .1.3.6.1.4.1.318 {sys.executable} -S -E {program} {self.control}\n"
        )
        self._run_program(
            "snmpd",
            [find_peer("snmpd"), "-f", "-Lo", "-C", "-c", str(configuration), "-I", "pass_persist"],
            ready=lambda: _udp_taken(at.snmp),
            SNMP_PERSISTENT_DIR=str(self._run.path),
            MIBS="",
        )

    def _start_plugs(self, at: Addresses) -> None:
        """A broker on an address of the loopback of its own, and a client for each plug."""
        from framework.targets.bench.tasmota_head import TasmotaPlug  # noqa: PLC0415 - optional

        configuration = self._run.path / "mosquitto.conf"
        configuration.write_text(f"listener {MQTT_PORT} {at.broker}\nallow_anonymous true\n")
        self._run_program(
            "mosquitto",
            [find_peer("mosquitto"), "-c", str(configuration)],
            ready=lambda: _tcp_answers(at.broker, MQTT_PORT),
        )
        for place in self.places:
            if place.head.name == "tasmota":
                plug = TasmotaPlug(self.boards[place.number], at.broker)
                self._stack.callback(plug.close)

    def _start_labgrid(self, at: Addresses) -> None:
        home = self._run.path / "coordinator"
        home.mkdir()
        (home / "places.yaml").write_text(yaml.safe_dump(self._places()))
        self._exporter_file = self._run.path / "exporter.yaml"
        self._exporter_file.write_text(self._exports(at))
        port = self._port or _free_port()
        self.coordinator = f"127.0.0.1:{port}"
        self._start_coordinator()
        self.start_exporter()

    def _start_coordinator(self) -> None:
        host, _, port = self.coordinator.partition(":")
        if _tcp_answers(host, int(port)):
            raise RigError(f"a program listens on {self.coordinator} already; name another --port")
        self._run_program(
            "labgrid-coordinator",
            [_labgrid("labgrid-coordinator"), "-l", self.coordinator],
            ready=lambda: _tcp_answers(host, int(port)),
            directory=self._run.path / "coordinator",
        )

    def start_exporter(self) -> None:
        """Start labgrid's exporter (again)."""
        ser2net = Path(find_peer("ser2net")).parent
        self._run_program(
            "labgrid-exporter",
            [
                *(_labgrid("labgrid-exporter"), "-c", self.coordinator),
                *("--name", EXPORTER, "--hostname", "127.0.0.1", str(self._exporter_file)),
            ],
            ready=self._exports_everything,
            PATH=f"{ser2net}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            PYTHONUNBUFFERED="1",
        )

    def _exports_everything(self) -> bool:
        printed = self._programs["labgrid-exporter"].output_path.read_text(errors="replace")
        return printed.count("add resource ") >= RESOURCES_PER_BOARD * len(self.places)

    def kill_exporter(self) -> None:
        """The exporter's host goes down: the exporter and its ser2net are gone at once."""
        self._programs.pop("labgrid-exporter").kill()
        for pid in programs_of(self._run.path):
            if "ser2net" in _command(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def restart_coordinator(self) -> None:
        """The coordinator restarts: it forgets who had what."""
        self._programs.pop("labgrid-coordinator").kill()
        self._start_coordinator()

    def _places(self) -> dict[str, Any]:
        """What the coordinator reads at its start."""
        now = time.time()
        return {
            place.name: {
                "aliases": [],
                "comment": f"virtual board, {place.head.sold_as}",
                "tags": {
                    "board": "bench",
                    "head": place.head.name,
                    "health": "ok",
                    "name": place.name,
                },
                "matches": [{"exporter": EXPORTER, "group": place.name, "cls": "*", "name": None}],
                "created": now,
                "changed": now,
            }
            for place in self.places
        }

    def _exports(self, at: Addresses) -> str:
        """The exporter's file: serial port, power head and recovery line of each board."""
        groups: dict[str, Any] = {}
        for place in self.places:
            board = self.boards[place.number]
            recovery = f"http://127.0.0.1:{at.http}/recovery/{place.number}"
            groups[place.name] = {
                "location": "virtual bench",
                "RawSerialPort": {
                    "port": str(board.serial.path),
                    "speed": board.serial.line.baud or 115200,
                },
                place.head.resource: dict(place.head.arguments(at, place.number)),
                "HttpDigitalOutput": {
                    "url": recovery,
                    "body_asserted": "restore",
                    "body_deasserted": "ready",
                },
            }
        return yaml.safe_dump(groups)

    def _run_program(
        self,
        name: str,
        command: Sequence[str],
        *,
        ready: Callable[[], bool],
        directory: Path | None = None,
        **environment: str,
    ) -> None:
        output = (self._log or self._run.path) / f"{name}.log"
        if directory is not None:
            command = ["env", "-C", str(directory), *command]
        process = MachineProcess(
            command, output_path=output, environment={**self._run.environment, **environment}
        )
        self._programs[name] = process
        deadline = time.monotonic() + _READY_S
        while not ready():
            if process.exited.wait(0.05):
                raise RigError(f"{name} ended at once: {process.output() or process.ended}")
            if time.monotonic() > deadline:
                raise RigError(f"{name} was not ready within {_READY_S:g} s: {process.output()}")

    # -- ending -------------------------------------------------------------------------------

    def check(self) -> None:
        """InfrastructureError if a program of the bench has ended."""
        for name, process in self._programs.items():
            if not process.alive:
                raise InfrastructureError(f"{name} ended: {process.ended}: {process.output()}")

    def _end_programs(self) -> None:
        for process in reversed(list(self._programs.values())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
            if not process.exited.wait(_GENTLE_S):
                process.kill()
        for pid in programs_of(self._run.path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def settings(self, place: BenchPlace) -> Mapping[str, str]:
        """The environment variables with which labgrid's clients find a place."""
        return {"LG_COORDINATOR": self.coordinator, "LG_PLACE": place.name}


def _sweep_links() -> None:
    """Remove the serial ports' links of benches that were killed."""
    for link in LINKS.glob("brownout-*-*"):
        owner = link.name.split("-")[1]
        if link.is_symlink() and owner.isdigit() and start_time(int(owner)) is None:
            link.unlink(missing_ok=True)


def _labgrid(program: str) -> str:
    """labgrid's programs of the environment that we run in."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise RigError(f"{program} is not installed in this Python's environment")
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _stop_http(server: HttpHeads) -> None:
    server.shutdown()
    server.server_close()


def _free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tcp_answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0


def _udp_taken(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
