r"""The simulated device behind labgrid: a driver with a recorder and a console, and its strategy.

`SimulatedMachine` is to a scenario what `RecordedQEMUDriver` is: it has the power switch, the
recorder of the disk, the console's pump, and cuts the power at an exact operation. All of it runs
in the caller's thread: what a trigger or a typed key does takes effect behind the operation or the
line that caused it. `SimulatedStrategy` starts the device and runs commands on it::

    off  --boot()-->  the device starts by itself  -->  ready
     ^                                                    |
     '------ a power cut, at any operation or line -------'

There is no shell: the commands are the client's, a restart, and the one that leaves a file to look
for later. A scenario that needs another one needs the feature `linux`.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import attr
from labgrid.driver.common import Driver
from labgrid.driver.exception import ExecutionError
from labgrid.factory import target_factory
from labgrid.protocol import PowerProtocol
from labgrid.strategy import Strategy

from framework.console import ConsoleLost, ConsolePump
from framework.disk import (
    Armed,
    CacheModel,
    CutRecord,
    DeviceSpec,
    Freeze,
    LazyDisk,
    Recorder,
    Trigger,
    UnreadableSectorError,
    model_from,
)
from framework.targets.errors import InfrastructureError
from framework.targets.qemu import PowerLoss, QmpEvent
from framework.targets.rundir import RunDirectory
from framework.targets.simulated.database import DataVfs
from framework.targets.simulated.device import SimulatedDevice, Start, Surroundings
from framework.targets.simulated.drive import DriveError, PowerLost
from framework.targets.simulated.filesystem import FileSystem
from framework.targets.simulated.recorded import DEVICE, RecordedDrive
from framework.targets.simulated.stock import VARIANTS, info_of, make_stock
from framework.targets.strategy import Boot, BootOutcome, CommandResult, Fate
from updater.device import signals
from updater.device.client import Client, Ports
from updater.device.config import Config

_CTRL_C = b"\x03"
_NOT_FOUND = 127
_INTERRUPTIBLE = re.compile(r"trap : INT; (?P<command>.*); exit \$\?")
_RESTART = "sync; reboot -f"
_LEAVE_FILE = re.compile(
    r"dd if=/dev/urandom of=/data/(?P<name>\w+) bs=(?P<block>\d+) count=(?P<count>\d+) "
    r".*sha256sum /data/(?P=name)"
)


class _Trip(NamedTuple):
    cause: str
    model: CacheModel
    seed: int


class SimulatedConsole(ConsolePump):
    """A console whose lines come from the caller's own thread."""

    def __init__(self, name: str, typed: Callable[[bytes], None]) -> None:
        super().__init__(name, owned=True)
        self._typed = typed

    def begin(self) -> None:
        """The device has power: a new stretch of the console begins."""
        with self._changed:
            self._gone = None
            self._generation += 1
            self._generation_start = self._position()
            self._starts.append(self._generation_start)

    def print(self, line: str) -> None:
        """Take a line; its listeners are called before this returns."""
        self._receive(line.encode() + b"\r\n")

    def write(self, data: bytes) -> int:
        """Type on the console."""
        self._typed(data)
        return len(data)


class _Served(Mapping[str, bytes]):
    """The artifacts in a folder, by URL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, location: str) -> bytes:
        path = self._folder / Path(urlsplit(location).path).name
        if not path.is_file():
            raise KeyError(location)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return (path.name for path in self._folder.iterdir())

    def __len__(self) -> int:
        return sum(1 for _ in self)


@target_factory.reg_driver
@attr.s(eq=False)
class SimulatedMachine(Driver, PowerProtocol):  # type: ignore[misc]
    """A simulated device with a power switch; see the module text."""

    bindings: ClassVar[dict[str, Any]] = {}

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.power_loss: PowerLoss | None = None
        self.failure: str | None = None
        self.last_cut: CutRecord | None = None
        self.pump = SimulatedConsole("simulated", self.send)
        self.device: SimulatedDevice | None = None
        self.make_client: Callable[[Config, Ports], Client] = Client
        self._folder = Path()
        self._vfs: DataVfs | None = None
        self._run: RunDirectory | None = None
        self._recorder: Recorder | None = None
        self._drive: RecordedDrive | None = None
        self._on = False
        self._plans: dict[int, _Trip] = {}
        self._trip: _Trip | None = None
        self._busy = False
        self._interrupted = False

    # What the bench asks for.

    def make_stock(self, folder: Path, variants: Iterable[str]) -> dict[str, Any]:
        """Make images and disks in `folder`; return the target's manifest. Raises RigError."""
        self._folder = folder
        return make_stock(folder, variants)

    def read_data(self, disk: LazyDisk, offset: int, length: int, name: str) -> bytes | None:
        """A file on the data partition, read from outside; None: there is none.

        Raises:
            FileSystemError: the file system can't be mounted, or the file not be read.
        """
        files = FileSystem(_Outside(disk), offset, length)
        if not files.exists(name):
            return None
        return files.read(name, 0, files.size(name))

    # Power.

    def on(self) -> None:
        """Give power; `start` has the device start."""
        self._on = True

    def off(self) -> None:
        """Take the power away; a drive without power loses nothing that it was given."""
        if self._on and self._recorder is not None:
            self._recorder.cut(model_from("kept"), 0)
        self._on = False
        self.pump.lost("switched off")

    def cycle(self) -> None:
        """Off and on."""
        self.off()
        self.on()

    def get(self) -> bool:
        """Whether it has power."""
        return self._on

    def on_deactivate(self) -> None:
        """Leave nothing behind."""
        self.close()

    def close(self) -> None:
        """Switch off; remove what is on the host's disk."""
        self.off()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if self._run is not None:
            self._run.remove()
            self._run = None
        if self._vfs is not None:
            self._vfs.unregister()
            self._vfs = None

    def fresh(
        self, images: Mapping[str, Path] | None = None, pflash: Path | None = None
    ) -> Recorder:
        """A pristine device with the disk `images[DEVICE]`; the machine must be off."""
        if self._on:
            raise ExecutionError(f"{self}: switch the machine off before fresh()")
        if self._recorder is not None:
            self._recorder.close()
        if self._run is not None:
            self._run.remove()
        self._run = RunDirectory.create()
        base = (images or {}).get(DEVICE, self._folder / "disk-v1.img")
        self._recorder = Recorder([DeviceSpec(DEVICE, base)], self._run.path).start()
        self._drive = RecordedDrive(self._recorder, self._settle, self._wait)
        self._vfs = self._vfs or DataVfs()
        self.device = SimulatedDevice(
            Surroundings(
                _Served(self._folder / "artifacts"),
                (str(self._folder.parent / "keys" / "artifact.pem"),),
                {name: info_of(self._folder, name) for name in VARIANTS},
            ),
            vfs=self._vfs,
            drive=self._drive,
            client=self.make_client,
        )
        self.device.print = self._print
        self._plans.clear()
        self._forget()
        return self._recorder

    @property
    def recorder(self) -> Recorder:
        """What has the disk."""
        if self._recorder is None:
            raise ExecutionError(f"{self}: no disk yet: call fresh()")
        return self._recorder

    def arm_cut(
        self, trigger: Trigger, model: CacheModel, seed: int, *, inside: bool = False
    ) -> Armed:
        """Cut the power before the operation that fires `trigger`, or inside it."""
        armed = self.recorder.arm(trigger, Freeze(inside))
        where = "inside" if inside else "before"
        self._plans[id(armed)] = _Trip(f"power was cut {where} {trigger}", model, seed)
        return armed

    def trip(self, cause: str, model: CacheModel, seed: int) -> None:
        """Cut the power behind the operation or line that is under way."""
        if self._on and self._trip is None:
            self._trip = _Trip(cause, model, seed)

    def send(self, data: bytes) -> None:
        """Type something on the console; only Ctrl-C means anything, and only to a command."""
        self._interrupted = self._busy and _CTRL_C in data

    def settle(self) -> None:
        """Its ends take no time."""

    def set_link(self, up: bool) -> None:
        """There is no cable."""
        raise ExecutionError(f"{self}: has no network cable")

    def set_clock(self, base: str) -> None:
        """There is no hardware clock."""
        raise ExecutionError(f"{self}: has no hardware clock")

    def add_event_listener(self, listener: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """There is no monitor."""
        raise ExecutionError(f"{self}: has no monitor")

    # What the strategy does with it. ConsoleLost means that the power went.

    def start(self, *, restart: bool = False) -> Start:
        """Have the device start, or restart in good order."""
        assert self.device is not None
        device = self.device
        if not restart:
            self._on = True
            self._forget()
        self.pump.begin()
        with self._powered():
            return device.restart() if restart else device.start()

    def command(self, verb: str, source: str = "") -> CommandResult:
        """Have the device run one of the client's commands."""
        assert self.device is not None
        before = len(self.device.lines)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with self._powered():
            signals.install_handlers()
            self._busy = True
            try:
                code = self.device.run(verb, source).exit_code
            finally:
                self._busy = self._interrupted = False
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        return CommandResult(tuple(self.device.lines[before:]), code)

    def leave_file(self, name: str, content: bytes) -> None:
        """Write a file to the data partition, and sync it."""
        assert self.device is not None
        data = self.device.data
        assert data is not None
        with self._powered():
            if data.exists(name):
                data.remove(name)
            data.create(name)
            data.write(name, 0, content)
            data.sync(name)

    @contextmanager
    def _powered(self) -> Iterator[None]:
        """What is done while there is power; where it goes, it is taken for good."""
        try:
            yield
        except PowerLost:
            self._lose()
            assert self.power_loss is not None
            raise ConsoleLost(self.power_loss.cause, tail=self.pump.tail()) from None

    def _lose(self) -> None:
        recorder = self.recorder
        armed = recorder.frozen
        plan = self._trip if self._trip is not None else self._plans.get(id(armed))
        if plan is None:
            raise InfrastructureError("the power went, and nobody cut it")
        self.last_cut = recorder.cut(plan.model, plan.seed)
        self.power_loss = PowerLoss(plan.cause, armed, time.monotonic_ns())
        self._on = False
        self.pump.lost(plan.cause)

    def _forget(self) -> None:
        self.power_loss = None
        self._trip = None
        self._interrupted = False

    def _print(self, line: str) -> None:
        self.pump.print(line)
        self._settle()

    def _settle(self) -> None:
        """Let what was pulled or typed meanwhile take effect."""
        if self._trip is not None:
            assert self._drive is not None
            self._drive.off = True
            raise PowerLost
        if self._interrupted:
            self._interrupted = False
            signal.raise_signal(signal.SIGINT)

    def _wait(self, seconds: float) -> None:
        assert self.device is not None
        self.device.now += seconds


class _Outside:
    """A disk as it is read behind the device's back."""

    off = killed = False

    def __init__(self, disk: LazyDisk) -> None:
        self.size_bytes = disk.size_bytes
        self._disk = disk

    def read(self, offset: int, length: int) -> bytes:
        try:
            return self._disk.read(offset, length)
        except UnreadableSectorError as error:
            raise DriveError(5, str(error)) from error

    def write(self, offset: int, data: bytes | memoryview) -> None:
        raise DriveError(30, "read-only")

    def flush(self) -> None:
        raise DriveError(30, "read-only")

    def power_on(self) -> None:
        return


@target_factory.reg_driver
@attr.s(eq=False)
class SimulatedStrategy(Strategy):  # type: ignore[misc]
    """Starts the simulated device and runs commands on it; see the module text."""

    bindings: ClassVar[dict[str, Any]] = {"power": SimulatedMachine}

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self._restarted: BootOutcome | None = None
        self._files = 0

    def transition(self, state: str, via: Any = None) -> None:
        """Bring the device to `off` or `ready`."""
        self.target.activate(self.power)
        if state == "off":
            self.power.off()
        elif not self.boot().ready:
            raise AssertionError("the device did not boot")

    def boot(self, budget_s: float | None = None, *, adopt: bool = True) -> BootOutcome:
        """Power the device up and see what it does."""
        if self.power.get():
            self.transition("off")
        return self._see(restart=False)

    def await_boot(
        self, since: int | None = None, budget_s: float | None = None, *, adopt: bool = True
    ) -> BootOutcome:
        """What became of the restart that the last command asked for."""
        outcome, self._restarted = self._restarted, None
        if outcome is None:
            raise InfrastructureError("the device was to restart, and nothing made it")
        return outcome

    def require_host(self, since: float, most_s: float) -> None:
        """Nothing here takes real time."""

    def run(self, command: str, timeout_s: float = 30.0) -> CommandResult:
        """Run one of the commands that there are; ConsoleLost when the power goes."""
        if not self.power.get():
            raise ExecutionError(f"no shell: the device is off ({command!r})")
        if command == _RESTART:
            self._restarted = self._see(restart=True)
            return CommandResult((), 0)
        if (match := _LEAVE_FILE.fullmatch(command)) is not None:
            return self._leave_file(match)
        if (match := _INTERRUPTIBLE.fullmatch(command)) is not None:
            command = match["command"]
        words = shlex.split(command)
        if words[:1] == ["updater"] and len(words) > 1:
            if words[1:] == ["status"]:
                return CommandResult(tuple(self.power.device.status_lines()), 0)
            if words[1] == "install" and len(words) == 3:
                return self._command("install", words[2])
            if words[1] in ("commit", "rollback", "resume") and len(words) == 2:
                return self._command(words[1])
        return CommandResult((f"{words[0]}: the simulated device has no such command",), _NOT_FOUND)

    def _command(self, verb: str, source: str = "") -> CommandResult:
        machine: SimulatedMachine = self.power
        return machine.command(verb, source)

    def _leave_file(self, match: re.Match[str]) -> CommandResult:
        self._files += 1
        size = int(match["block"]) * int(match["count"])
        content = hashlib.shake_128(self._files.to_bytes(8, "little")).digest(size)
        self.power.leave_file(match["name"], content)
        line = f"{hashlib.sha256(content).hexdigest()}  /data/{match['name']}"
        return CommandResult((line,), 0)

    def _see(self, *, restart: bool) -> BootOutcome:
        machine: SimulatedMachine = self.power
        pump = machine.pump
        began, start = 0.0 if machine.device is None else machine.device.now, pump.position
        fate, boot, starts, evidence = Fate.POWER_LOST, None, 0, ""
        try:
            seen = machine.start(restart=restart)
        except ConsoleLost:
            pass
        else:
            starts, evidence = seen.kernels, seen.evidence
            fate = Fate.READY if seen.ready else Fate.NOT_READY
            if seen.image is not None and machine.device is not None:
                boot = Boot(seen.image.name, seen.slot, machine.device.boot_id)
        seconds = 0.0 if machine.device is None else machine.device.now - began
        return BootOutcome(
            fate,
            boot,
            starts,
            pump.deaths(start),
            start,
            pump.position,
            seconds,
            evidence or pump.tail(),
        )
