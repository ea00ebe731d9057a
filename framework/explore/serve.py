"""Runs a machine on a crash state: served lazily, recorded, until its console says what is asked.

The disks begin with the state (`StartState`), so nothing is copied: a boot reads about 150 KB and
writes a few sectors. What it writes is recorded in a journal of its own, which is what depth two
cuts again. There is no labgrid here and no console pump, for speed: one thread reads console and
monitor. A guest's reset ends this QEMU and starts another on the same disks, as the driver does
(framework/targets/qemu.py says why), within a bound.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import shlex
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from framework.disk import DeviceSpec, JournalReader, LazyDisk, Recorder, StartState
from framework.targets.errors import InfrastructureError
from framework.targets.machine import Machine, command_line
from framework.targets.process import MachineProcess
from framework.targets.rundir import RunDirectory, sweep

_READ = 65536
_CONSOLE_LIMIT = 1 << 20
_TURN_S = 0.5
_KEYS_S = 0.05
_LISTEN = b'{"execute":"qmp_capabilities"}\n'
_START = _LISTEN + b'{"execute":"cont"}\n'


@dataclass(frozen=True)
class Heard:
    """What a start on a crash state came to.

    `matches` are the patterns' matches in the order of the console; `ended` says why the run
    stopped: `matched`, `timed out`, `looped` or `switched itself off`. `starts` counts power-on
    and resets, `operations` what it wrote.
    """

    console: str
    matches: tuple[re.Match[str], ...]
    ended: str
    starts: int
    seconds: float
    operations: int

    @property
    def tail(self) -> str:
        """The console's last words."""
        return self.console[-400:].strip()


class Workplace:
    """Where machines run: a directory of this process. Leaving it ends all that still runs there.

    A context manager; machines in other threads end within half a second.
    """

    def __init__(self) -> None:
        self._run: RunDirectory | None = None
        self._leaving = threading.Event()

    def __enter__(self) -> Workplace:
        sweep()
        self._run = RunDirectory.create()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving.set()
        self.run.remove()

    @property
    def run(self) -> RunDirectory:
        """The directory."""
        if self._run is None:
            raise InfrastructureError("no workplace: enter it first")
        return self._run

    def stop(self) -> None:
        """Have all machines end."""
        self._leaving.set()

    @property
    def leaving(self) -> bool:
        """Whether machines have to end."""
        return self._leaving.is_set()


@dataclass(frozen=True)
class Snapshot:
    """A machine's memory and devices; `wake` is typed on its console when it goes on."""

    path: Path
    wake: bytes


class StateMachine:
    """A machine whose disks are a crash state; a context manager.

    `disks` are all its disks; they must stay open. Its journal begins with that state.
    """

    def __init__(self, machine: Machine, disks: Mapping[str, LazyDisk], place: Workplace) -> None:
        self._machine = replace(
            machine, disks=tuple(disk for disk in machine.disks if disk.name in disks)
        )
        self._place = place
        self._running: _Qemu | None = None
        self.begin = StartState.of(disks)
        self._directory = Path(tempfile.mkdtemp(prefix="state-", dir=place.run.path))
        # The base's digest isn't needed: the recording's was checked when it was opened.
        specs = [
            DeviceSpec(disk.name, disks[disk.name].base_path, disks[disk.name].size_bytes, "-")
            for disk in self._machine.disks
        ]
        self.recorder = Recorder(specs, self._directory, prepare_bytes=0, begin=self.begin)

    def __enter__(self) -> StateMachine:
        self.recorder.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.recorder.close()
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def type(self, keys: str) -> None:
        """Send keys to the console of the machine that runs: from a `stop_on` of `run`."""
        if self._running is None:
            raise InfrastructureError("nothing runs that keys could be sent to")
        self._running.type(keys)

    def journal(self) -> JournalReader:
        """What the machine did so far, read back; valid as long as this is open."""
        self.recorder.check()
        return JournalReader(self.recorder.journal_path, begin=self.begin)

    def run(
        self,
        until: Sequence[re.Pattern[str]],
        timeout_s: float,
        *,
        stop_on: Callable[[re.Match[str]], bool] = lambda match: True,
        on_reset: Callable[[], None] = lambda: None,
        max_starts: int = 4,
        snapshot: Snapshot | None = None,
    ) -> Heard:
        """Power on, and read the console until a match on which to stop, or the time is over.

        `on_reset` is called at each reset of the guest, before it starts again. At the end the
        power is cut; the disks keep what they hold. `snapshot`: begin there, not with a power-on.
        Raises InfrastructureError if QEMU does not run.
        """
        began = time.monotonic()
        deadline = began + timeout_s
        text = ""
        matches: list[re.Match[str]] = []
        starts = 0
        before = self.recorder.operations
        ended = "reset"
        while ended == "reset":
            if starts:
                on_reset()
            if starts == max_starts:
                ended = "looped"
                break
            starts += 1
            with self._qemu(snapshot) as qemu:
                self._running = qemu
                ended = "timed out"
                for chunk, event in qemu.listen(deadline):
                    if event == "reset":
                        ended = "reset"
                    elif event is not None:
                        ended = event
                    if event is not None:
                        break
                    if len(text) < _CONSOLE_LIMIT:
                        text += chunk
                    for match in _complete(text, until, matches):
                        self.recorder.mark("console", match.group(0).strip())
                        matches.append(match)
                        if stop_on(match):
                            ended = "matched"
                            break
                    if ended == "matched":
                        break
        return Heard(
            text,
            tuple(matches),
            ended,
            starts,
            time.monotonic() - began,
            self.recorder.operations - before,
        )

    def converse(
        self,
        keys: Callable[[], bytes | None],
        show: Callable[[bytes], None],
        *,
        paused: bool = False,
    ) -> None:
        """Let a person talk to the machine until `keys` gives None or it switches itself off.

        `keys` is asked often and must not block. `paused`: each start waits for a debugger to let
        it go on. Raises InfrastructureError if QEMU ends.
        """
        ended: str | None = "reset"
        while ended == "reset":
            with self._qemu(paused=paused) as qemu:
                ended = qemu.converse(keys, show)

    def snapshot(
        self, ready: re.Pattern[str], wake: bytes, path: Path, timeout_s: float
    ) -> Snapshot:
        """Power on, and keep the machine as it is when the console says `ready`.

        Sound only as long as the guest has not looked at its disks. Raises InfrastructureError.
        """
        deadline = time.monotonic() + timeout_s
        text = ""
        with self._qemu() as qemu:
            for chunk, event in qemu.listen(deadline):
                text += chunk
                if event is not None:
                    break
                if ready.search(text):
                    qemu.save(path, deadline)
                    return Snapshot(path, wake)
        raise InfrastructureError("the guest did not get as far as its snapshot", evidence=text)

    def _qemu(self, snapshot: Snapshot | None = None, *, paused: bool = False) -> _Qemu:
        return _Qemu(
            self._machine, self.recorder, self._place, self._directory, snapshot, paused=paused
        )


def _complete(
    text: str, until: Sequence[re.Pattern[str]], known: Sequence[re.Match[str]]
) -> list[re.Match[str]]:
    """New matches within complete lines, in their order."""
    end = text.rfind("\n") + 1
    start = known[-1].end() if known else 0
    found = [match for pattern in until for match in pattern.finditer(text, start, end)]
    return sorted(found, key=lambda match: match.start())


class _Qemu:
    """One QEMU from power-on to its end."""

    def __init__(
        self,
        machine: Machine,
        recorder: Recorder,
        place: Workplace,
        directory: Path,
        snapshot: Snapshot | None,
        *,
        paused: bool = False,
    ) -> None:
        self._machine = machine
        self._snapshot = snapshot
        self._paused = paused
        self._recorder = recorder
        self._place = place
        self._output = directory / "qemu-output"
        self._rest = b""

    def __enter__(self) -> _Qemu:
        self._console, console = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        try:
            exports = {
                name: (Path(point.socket), point.export)
                for name in self._recorder.devices
                for point in [self._recorder.endpoint(name)]
            }
            incoming = []
            if self._snapshot is not None:
                incoming = ["-incoming", f"exec:cat {shlex.quote(str(self._snapshot.path))}"]
            self._process = MachineProcess(
                [
                    *command_line(
                        self._machine,
                        console_fd=console.fileno(),
                        qmp_fd=monitor.fileno(),
                        exports=exports,
                    ),
                    *incoming,
                ],
                output_path=self._output,
                pass_fds=(console.fileno(), monitor.fileno()),
                environment=self._place.run.environment,
            )
            self._monitor.sendall(_LISTEN if self._paused else _START)
        except BaseException:
            self._console.close()
            self._monitor.close()
            raise
        finally:
            console.close()
            monitor.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._console.close()
        self._monitor.close()

    def type(self, keys: str) -> None:
        """Send keys to the console."""
        with contextlib.suppress(OSError):  # a machine that just ended is noticed by `listen`
            self._console.sendall(keys.encode())

    def converse(self, keys: Callable[[], bytes | None], show: Callable[[bytes], None]) -> str:
        """Pass keys and output; why it ended."""
        while True:
            for text, event in self.listen(time.monotonic() + _KEYS_S, _KEYS_S):
                if event is not None:
                    return event
                show(text.encode())
                if (typed := keys()) is None:
                    return "left"
                self._console.sendall(typed)
            if (typed := keys()) is None:
                return "left"
            self._console.sendall(typed)

    def listen(self, deadline: float, turn_s: float = _TURN_S) -> Iterator[tuple[str, str | None]]:
        """Yield (console text, None) as it comes, at last ("", event): reset or switched off."""
        while (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._console, self._monitor], [], [], min(left, turn_s))
            if self._place.leaving:
                raise InfrastructureError("the machine was told to end")
            if self._monitor in ready:
                data = self._monitor.recv(_READ)
                *lines, self._rest = (self._rest + data).split(b"\n")
                if self._snapshot is not None and any(b'"RESUME"' in line for line in lines):
                    self._console.sendall(self._snapshot.wake)
                event = _event(lines)
                if event == "reset":
                    self._process.signal_kill()  # before the firmware can run again
                if event is not None:
                    yield "", event
                    return
                if not data:
                    self._process.exited.wait(1.0)
                    raise InfrastructureError(
                        f"QEMU ended by itself: {self._process.ended}",
                        evidence=self._process.output(),
                    )
            if self._console in ready:
                data = self._console.recv(_READ)
                if data:
                    yield data.decode(errors="replace"), None

    def save(self, path: Path, deadline: float) -> None:
        """Write memory and devices to a file, which ends with the machine stopped.

        It isn't stopped before: what goes on from a snapshot of a stopped machine is stopped.
        """
        uri = f"exec:cat > {shlex.quote(str(path))}"
        order = {"execute": "migrate", "arguments": {"uri": uri}}
        self._monitor.sendall(json.dumps(order).encode() + b"\n")
        while time.monotonic() < deadline:
            self._monitor.sendall(b'{"execute":"query-migrate"}\n')
            time.sleep(_KEYS_S)
            text = self._monitor.recv(_READ)
            if b'"status": "completed"' in text:
                return
            if not text or b'"status": "failed"' in text:
                break
        raise InfrastructureError("QEMU could not keep a snapshot", evidence=self._process.output())


def _event(lines: Sequence[bytes]) -> str | None:
    for line in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if message.get("event") == "RESET":
                return "reset"
            if message.get("event") == "SHUTDOWN":
                return "switched itself off"
    return None
