"""`RecordedQEMUDriver`: a labgrid driver for a QEMU machine whose power can really be cut.

Every disk is served by the block recorder (framework/disk), so *cut* means: QEMU is killed at
once, or after an exact operation at which the recorder froze, and the next power-on gets the
disks rebuilt under a cache model. The base images are never written; the journal is the overlay
and lives across power cycles until `fresh()`.

Power, as this driver knows it::

              on() / restore()                      guest resets: QEMU ends, a new one starts
      off ------------------------> on  <-----------------------------------------.
       ^ ^                          | |                                           |
       | '----off(), deactivate-----' '--QEMU ends--> (guest reset) --------------'
       |                              |            '-> (guest powers off) ---> off
       |                              |            '-> (killed from outside) -> off, `failure` set
       |        cut()                 | disks freeze at an armed trigger
       '------ cut pending <----------'  (QEMU is killed; `power_lost` is set)

A guest's reset is not a power cut: the disks keep what they hold, flushed or not. QEMU is killed
at its RESET event, before the firmware can run again, because a QEMU that exits by itself flushes
its disks (measured: two flushes that the guest never sent), and because a warm reset under TCG
can take 35 s in U-Boot.

`off()` is a switch-off under the model `kept`. `get()` asks the process, not a variable.
While the machine has no power, everything that reads its console fails at once (`ConsoleLost`).
A cut that was armed together with a model (`arm_cut`) rebuilds the disks by itself; a bare freeze
stays *pending* until `cut(model, seed)` names one (or `on()` takes `kept`).

Works as a plain labgrid driver from a YAML environment; rigs/*.yaml are examples. Not for
guests that need more than one serial port, or migration, or snapshots of a running machine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import secrets
import shlex
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import attr
from labgrid.binding import BindingState
from labgrid.driver.common import Driver
from labgrid.driver.exception import ExecutionError
from labgrid.factory import target_factory
from labgrid.protocol import ConsoleProtocol, PowerProtocol, ResetProtocol
from labgrid.step import step
from labgrid.strategy.common import Strategy

from framework.console import DEFAULT_DEATHS, ConsoleError, ConsolePump, Line, SocketTransport
from framework.console.driver import PumpedConsoleMixin, new_log
from framework.disk import (
    Armed,
    CacheModel,
    CutRecord,
    DeviceSpec,
    DiskError,
    Freeze,
    JournalReader,
    Recorder,
    Trigger,
    model_from,
)
from framework.targets import accel
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.machine import (
    WATCHDOGS,
    Disk,
    Machine,
    Network,
    architecture_of,
    command_line,
    parse_address,
)
from framework.targets.preflight import (
    Images,
    check_images,
    find_program,
    free_port,
    known_sha256,
)
from framework.targets.process import MachineProcess
from framework.targets.protocols import PowerCutProtocol
from framework.targets.qmp import QmpConnection, QmpFailure
from framework.targets.rundir import RunDirectory, sweep
from framework.targets.starvation import StarvationWatch

__all__ = ["PowerLoss", "QmpEvent", "RecordedQEMUDriver"]

_DRAIN_S = 2.0
#: From a broken connection to the reaped process: milliseconds, more on a busy host.
_REAP_S = 2.0
#: How far back a watchdog's firing is looked at; no watchdog of our targets is shorter.
_WATCHDOG_S = 15.0
_RESET_STALL_S = 0.1  # no firmware writes a disk so soon after a reset (U-Boot: 0.15 s)
_EVENTS_KEPT = 1000
#: How a deterministic machine rests: silent for so long, at most so long, looked at so often.
_QUIET_S = 2.0
_MOST_REST_S = 60.0
_LOOK_S = 0.1
_SEED_BITS = 32
_FORWARD = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)")


@dataclass(frozen=True)
class QmpEvent:
    """An event that QEMU sent: `name`, `data`, when it arrived and how long after it was sent."""

    name: str
    data: Mapping[str, Any]
    monotonic_ns: int
    delay_s: float


@dataclass(frozen=True)
class PowerLoss:
    """Why power went: `cause` for people, the recorder's `armed` trigger if one fired."""

    cause: str
    armed: Armed | None
    monotonic_ns: int


@dataclass(frozen=True)
class _Plan:
    """The model and seed that a cut will use."""

    model: CacheModel
    seed: int


def _model(model: str | CacheModel) -> CacheModel:
    return model if isinstance(model, CacheModel) else model_from(model)


def _plan(model: str | CacheModel, seed: int | None) -> _Plan:
    return _Plan(_model(model), secrets.randbits(_SEED_BITS) if seed is None else seed)


def _text(default: str | None = None) -> Any:
    validator = attr.validators.instance_of(str)
    return attr.ib(validator=validator) if default is None else attr.ib(default, validator)


@target_factory.reg_driver  # type: ignore[untyped-decorator, unused-ignore]
@attr.s(eq=False)
class RecordedQEMUDriver(
    PumpedConsoleMixin,
    Driver,  # type: ignore[misc]
    PowerProtocol,  # type: ignore[misc]
    ConsoleProtocol,  # type: ignore[misc]
    ResetProtocol,  # type: ignore[misc]
    PowerCutProtocol,
):
    """A QEMU machine on recorded disks; see the module text.

    Args (in YAML):
        qemu_bin: key in `tools:` of the QEMU program (or the program itself)
        machine, cpu, memory, cpus: as QEMU takes them
        firmware: key in `images:` for `-bios` (U-Boot, OVMF)
        pflash: key in `images:` for a read-only second pflash (U-Boot's seed environment)
        kernel, boot_args: key in `images:` for a directly started kernel, and its arguments
        disks: list of `{name, image, interface: virtio|sd|ide, size_bytes, address}`
        network: `user`, `none`, or `{device, address, forward: [{guest, host}]}` (host 0: any
            free port)
        watchdog: `i6300esb` or empty; watchdog_address: its PCI device number
        extra_args: list of further QEMU arguments, or one string
        accelerator: `auto` (probed), `tcg` or `kvm`
        deterministic: whether its time is counted in instructions (`-icount`), so that the same
            run does the same to its disks; then TCG runs it, it has no watchdog, and can have no
            network. May be set while the machine is off, on one whose network is left alone
        start_deadline_s: how long QEMU itself may take to start
        log_dir: where console logs are kept (relative to the rig file)
        deaths: further console texts (bounded patterns) that end any wait
        fail_fast: whether a death string ends `expect` and ShellDriver.run at once
    """

    bindings: ClassVar[dict[str, Any]] = {}

    qemu_bin: str = _text()
    machine: str = _text()
    cpu: str = _text()
    memory: str = _text()
    cpus: int = attr.ib(1, attr.validators.and_(attr.validators.instance_of(int)))
    firmware: str = _text("")
    pflash: str = _text("")
    kernel: str = _text("")
    boot_args: str = _text("")
    disks: Any = attr.ib(factory=list)
    network: Any = attr.ib("none")
    watchdog: str = _text("")
    watchdog_address: Any = attr.ib(None)
    extra_args: Any = attr.ib(factory=list)
    accelerator: str = _text("auto")
    deterministic: bool = attr.ib(False, attr.validators.instance_of(bool))
    start_deadline_s: float = attr.ib(15.0, converter=float)
    log_dir: str = _text("")
    deaths: Any = attr.ib(factory=list)
    fail_fast: bool = attr.ib(True, attr.validators.instance_of(bool))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.txdelay = 0.0
        self.txchunk = 1
        self._lock = threading.RLock()
        self._disks: tuple[Disk, ...] = ()
        self._network: Network | None = None
        self._parse()
        self._run: RunDirectory | None = None
        self._recorder: Recorder | None = None
        self._recorders = 0
        self._qmp: QmpConnection | None = None
        self._process: MachineProcess | None = None
        self._starvation: StarvationWatch | None = None
        self._program = ""
        self._accel: accel.Accelerator | None = None
        self._link_up = True
        self._clock = ""
        self._other_pflash: Path | None = None
        self._trip: PowerLoss | None = None
        self._trip_plan: _Plan | None = None
        self._plans: dict[int, _Plan] = {}
        self._shutdown_reason = ""
        self._reset: QmpEvent | None = None
        self._starved_watchdog = ""
        self._operations_at_reset = 0
        self._event_listeners: list[Callable[[QmpEvent], None]] = []
        self._cut_pending = False
        self._closed = False
        self.events: deque[QmpEvent] = deque(maxlen=_EVENTS_KEPT)
        self.boots = 0
        self.resets = 0
        self.failure: str | None = None
        self.power_lost = threading.Event()
        self.power_loss: PowerLoss | None = None
        self.last_cut: CutRecord | None = None
        atexit.register(self.close)

    # -- configuration ----------------------------------------------------------------------

    @property
    def _where(self) -> str:
        """This driver's place in the rig file, for messages."""
        config = self.target.env.config if self.target.env else None
        file = f"{config.filename}: " if config is not None else ""
        return f"{file}targets.{self.target.name}.drivers.{type(self).__name__}"

    def _parse(self) -> None:
        where = self._where
        if self.target.env is not None:
            # labgrid only warns about an unknown key; a rig that is misread must not start.
            from framework.targets.rig import check_keys  # noqa: PLC0415 - it knows all drivers

            check_keys(self.target.env.config.filename, self.target.env.config.data)
        self._disks = Disk.parse_all(f"{where}.disks", self.disks)
        self._network = Network.parse(f"{where}.network", self.network)
        if self.watchdog and self.watchdog not in WATCHDOGS:
            raise RigError(f"{where}.watchdog: {self.watchdog!r}; known: {', '.join(WATCHDOGS)}")
        parse_address(f"{where}.watchdog_address", self.watchdog_address)
        if self.accelerator not in ("auto", "tcg", "kvm"):
            raise RigError(f"{where}.accelerator: {self.accelerator!r}; known: auto, tcg, kvm")
        if self.deterministic and self.accelerator == "kvm":
            raise RigError(f"{where}.deterministic: instructions are counted under tcg, not kvm")
        if self.deterministic and self._network is not None:
            raise RigError(
                f"{where}.deterministic: the machine's time runs ahead of any network: write "
                "'network: none'"
            )
        if not re.fullmatch(r"[1-9]\d*[MG]", self.memory):
            raise RigError(f"{where}.memory: {self.memory!r} must be like 512M or 2G")
        if self.cpus < 1:
            raise RigError(f"{where}.cpus: {self.cpus!r} must be at least 1")
        if self.start_deadline_s <= 0:
            raise RigError(f"{where}.start_deadline_s: must be positive")
        if isinstance(self.extra_args, str):
            self.extra_args = shlex.split(self.extra_args)
        if not all(isinstance(argument, str) for argument in self.extra_args):
            raise RigError(f"{where}.extra_args: must be a list of strings (quote the numbers)")

    def images(self) -> Images:
        """The image files this machine needs, by what they are for; not yet checked."""
        return Images(
            firmware=self._image("firmware", self.firmware),
            pflash=self._image("pflash", self.pflash),
            kernel=self._image("kernel", self.kernel),
            disks={
                disk.name: self._require_image(f"disks.{disk.name}", disk.image)
                for disk in self._disks
            },
        )

    def _image(self, key: str, image: str) -> Path | None:
        return self._require_image(key, image) if image else None

    def _require_image(self, key: str, image: str) -> Path:
        if self.target.env is None:
            return Path(image)
        try:
            return Path(os.path.normpath(self.target.env.config.get_image_path(image)))
        except KeyError as error:
            raise RigError(f"{self._where}.{key}: no image {image!r} under 'images:'") from error

    def description(self, pflash: Path | None = None) -> Machine:
        """The machine as a value, as it would be started now; after `preflight`.

        `pflash` replaces the rig's own second pflash.
        """
        if self._accel is None:
            raise RigError(f"{self._where}: not checked yet: call preflight() first")
        images = self.images()
        return Machine(
            program=self._program,
            machine=self.machine,
            cpu=self.cpu,
            memory=self.memory,
            cpus=self.cpus,
            accelerator="tcg" if self.deterministic else self._accel.name,
            firmware=images.firmware,
            pflash=pflash or images.pflash,
            kernel=images.kernel,
            boot_args=self.boot_args,
            disks=self._disks,
            network=self._network,
            watchdog=self.watchdog,
            watchdog_address=self.watchdog_address,
            extra_args=tuple(self.extra_args),
            clock=self._clock,
            deterministic=self.deterministic,
        )

    def preflight(self) -> None:
        """Check program, images, ports and accelerator; `RigError` in one line if one is bad."""
        tool = self.qemu_bin
        if self.target.env is not None:
            tool = self.target.env.config.get_tool(self.qemu_bin)
        self._program = find_program(self._where, tool)
        check_images(
            self._where, self.images(), self._disks, architecture_of(self._program), self.machine
        )
        for forward in self._network.forward if self._network else ():
            if forward.host and not self.get():
                free_port(self._where, forward.host)
        try:
            self._accel = accel.choose(self.accelerator, self._program)
        except RigError as error:
            raise RigError(f"{self._where}.{error}") from None

    # -- labgrid's life cycle ---------------------------------------------------------------

    def on_activate(self) -> None:
        """Prepare disks and console; the machine stays off."""
        with self._lock:
            self._open()

    def on_deactivate(self) -> None:
        """Switch off. The disks stay: strategies deactivate everything between two states."""
        with self._lock:
            if self._process is not None:
                self._switch_off("the driver was deactivated")

    def _open(self) -> None:
        if self._closed:
            raise ExecutionError(f"{self}: was closed for good")
        self.preflight()
        if self._run is not None:
            return
        for path in sweep():
            self.logger.info("removed what a killed harness left: %s", path)
        self._run = RunDirectory.create()
        self._starvation = StarvationWatch(lambda: self.pid)
        self._pump = ConsolePump(
            self.target.name,
            log_path=self._new_log(),
            deaths=(*DEFAULT_DEATHS, *self.deaths),
            owned=True,
        )
        self._pump.add_listener(self._mark_line)
        self._pump.lost("the machine is switched off")
        self._open_recorder(self.images().disks)

    def _new_log(self) -> Path:
        directory = accel.cache_directory() / "logs"
        if self.log_dir:
            directory = Path(self.log_dir)
            if self.target.env is not None:
                directory = Path(self.target.env.config.resolve_path(self.log_dir))
        assert self._run is not None
        number = self._run.path.name.rpartition("-")[2]
        return new_log(Path(os.path.normpath(directory)), self.target.name, number)

    def _open_recorder(self, bases: Mapping[str, Path]) -> None:
        assert self._run is not None
        self._plans.clear()
        if not self._disks:
            self._recorder = None
            return
        self._recorders += 1
        specs = [
            DeviceSpec(d.name, bases[d.name], d.size_bytes, known_sha256(bases[d.name]))
            for d in self._disks
        ]
        recorder = Recorder(specs, self._run.path / f"disks-{self._recorders}")
        try:
            recorder.start()
        except DiskError as error:
            raise RigError(f"{self._where}.disks: {error}") from error
        recorder.on_freeze(self._frozen)
        self._recorder = recorder

    def close(self) -> None:
        """End everything for good: machine, recorder, console, run directory. Idempotent.

        Called at the end of the process, too; call it yourself to end earlier.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._process is not None:
                self._stop("the driver was closed")
            if self._recorder is not None:
                with contextlib.suppress(DiskError):
                    self._recorder.close()
            if self._pump is not None:
                self._pump.close()
            if self._starvation is not None:
                self._starvation.stop()
            if self._run is not None:
                self._run.remove()
        atexit.unregister(self.close)

    # -- what others look at -----------------------------------------------------------------

    @property
    def recorder(self) -> Recorder:
        """The recorder of all this machine's disks (of now: `fresh()` makes a new one)."""
        if self._recorder is None:
            raise ExecutionError(f"{self}: no recorder (no disks, or never activated)")
        return self._recorder

    @property
    def run_directory(self) -> Path:
        """Where sockets, journal and QEMU's own output are; removed by `close()`."""
        if self._run is None:
            raise ExecutionError(f"{self}: has not been activated")
        return self._run.path

    @property
    def accelerator_used(self) -> accel.Accelerator:
        """Which accelerator runs the guest, and how that was found out."""
        if self._accel is None:
            raise ExecutionError(f"{self}: has not been activated")
        return self._accel

    @property
    def pid(self) -> int | None:
        """QEMU's process id; None while the machine is off."""
        process = self._process
        return process.pid if process is not None else None

    def get(self) -> bool:
        """Whether the machine has power: whether its process runs."""
        process = self._process
        return process is not None and process.alive

    def settle(self) -> None:
        """Wait until an end of the machine that has already begun is told and its cause known.

        A console that breaks is noticed before the process is reaped; afterwards `failure`,
        `power_loss` and `last_cut` say why. Returns at once for a machine that is off, within
        seconds for one that runs on.
        """
        process = self._process
        if process is not None:
            process.told.wait(_REAP_S)
        with self._lock:  # held while an end is handled
            return

    def rest(self, quiet_s: float = _QUIET_S, most_s: float = _MOST_REST_S) -> None:
        """Wait until a deterministic machine has written nothing for so long.

        What it has to do in the next minutes is done then, since its time leaps while it waits. So
        a command finds the same, whenever the host comes to type it.
        """
        began = last = time.monotonic()
        seen = self.recorder.operations
        while not self.power_lost.wait(_LOOK_S):
            now = time.monotonic()
            if self.recorder.operations != seen:
                seen, last = self.recorder.operations, now
            if now - last >= quiet_s or now - began >= most_s:
                self.recorder.mark("rest", "the machine has nothing more to do")
                return

    def starved_s(self, since_monotonic_s: float) -> float:
        """How long since then the host kept the machine (or its disks) from running, in seconds."""
        return self._starvation.since(since_monotonic_s) if self._starvation is not None else 0.0

    def add_event_listener(self, listener: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call `listener` for every QMP event, in the monitor's thread; it must not block.

        Returns what makes it stop.
        """
        self._event_listeners.append(listener)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._event_listeners.remove(listener)

        return forget

    def monitor_command(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout_s: float = 5.0
    ) -> Any:
        """Run a QMP command; ExecutionError if it fails or QEMU does not answer in time."""
        qmp = self._qmp
        if qmp is None:
            raise ExecutionError(f"{self}: {command}: the machine is off")
        try:
            return qmp.execute(command, arguments, timeout_s)
        except QmpFailure as error:
            raise ExecutionError(f"{self}: {error}") from error

    def forwarded_port(self, guest_port: int) -> int:
        """The loopback port of this machine that leads to `guest_port` of the guest."""
        table = self.monitor_command("human-monitor-command", {"command-line": "info usernet"})
        for host, guest in _FORWARD.findall(table):
            if int(guest) == guest_port:
                return int(host)
        raise ExecutionError(f"{self}: guest port {guest_port} is not forwarded")

    # -- power -------------------------------------------------------------------------------

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step()  # type: ignore[untyped-decorator, unused-ignore]
    def on(self) -> None:
        """Switch on; returns once the guest runs. Nothing happens if it already does.

        Raises ExecutionError with QEMU's own words if it does not start.
        """
        with self._lock:
            if self.get():
                return
            if self._cut_pending:
                self._rebuild(self._trip_plan or _plan("kept", 0))
            self._check_recorder()
            self._drop_clients()
            self._forget_failure()
            assert self._pump is not None
            self.skip_to(self._pump.position)
            self._start("switched on")

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step()  # type: ignore[untyped-decorator, unused-ignore]
    def off(self) -> None:
        """Switch off under the cache model `kept`; verified. Nothing happens if it is off."""
        with self._lock:
            if self._process is not None:
                self._switch_off("switched off")
            self._drop_clients()
            if self.get():
                raise InfrastructureError(f"{self}: still runs after it was switched off")

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step()  # type: ignore[untyped-decorator, unused-ignore]
    def cycle(self) -> None:
        """Off and on again."""
        self.off()
        self.on()

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step()  # type: ignore[untyped-decorator, unused-ignore]
    def reset(self) -> None:
        """Press the reset button: the machine starts afresh, its disks keep their power."""
        with self._lock:
            if not self.get():
                raise ExecutionError(f"{self}: cannot reset, the machine is off")
            process, self._process = self._process, None
            assert process is not None
            process.kill()
            self._close_qmp()
            self.pump.detach(drain_s=_DRAIN_S)
            self._drop_clients()
            self.resets += 1
            self._start("reset button")

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step(args=["model", "seed"])  # type: ignore[untyped-decorator, unused-ignore]
    def cut(self, model: str | CacheModel = "kept", seed: int | None = None) -> CutRecord | None:
        """Cut the power now, or finish a cut whose trigger has fired; see PowerCutProtocol.

        ExecutionError if the machine is off and no cut is pending. Returns None for a machine
        without disks.
        """
        plan = _plan(model, seed)
        with self._lock:
            if self._process is not None:
                self._stop("power was cut")
            elif not self._cut_pending:
                raise ExecutionError(f"{self}: cannot cut, the machine has no power")
            record = self._rebuild(plan)
            self.power_lost.set()
            self._drop_clients()
            return record

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    @step()  # type: ignore[untyped-decorator, unused-ignore]
    def restore(self) -> None:
        """Give power back after a cut; the same as `on()`."""
        self.on()

    def arm_cut(
        self,
        trigger: Trigger,
        model: str | CacheModel = "kept",
        seed: int | None = None,
        *,
        inside: bool = False,
    ) -> Armed:
        """Cut the power exactly before the operation that fires `trigger`, under `model`.

        With `inside` the power goes in the middle of that operation: it is in flight, and the
        model decides what of it is on the medium.

        When that happens QEMU is killed, the disks are rebuilt, every wait on the console ends
        with `ConsoleLost`, and `power_lost` is set; `last_cut` then has the record.
        """
        plan = _plan(model, seed)
        with self._lock:
            armed = self.recorder.arm(trigger, Freeze(inside))
            self._plans[id(armed)] = plan
            return armed

    def trip(self, cause: str, model: str | CacheModel = "kept", seed: int | None = None) -> None:
        """Cut the power from a listener: does not block, and works from any thread.

        The rest happens as after `arm_cut`; wait for `power_lost`.
        """
        process = self._process
        if process is None or self._trip is not None:
            return
        self._trip_plan = _plan(model, seed)
        self._trip = PowerLoss(cause, None, time.monotonic_ns())
        process.signal_kill()

    def send(self, data: bytes) -> None:
        """Type something on the console, from any thread, without blocking."""

        def write() -> None:
            with contextlib.suppress(ConsoleError):
                self.pump.write(data)

        threading.Thread(target=write, name="typing", daemon=True).start()

    def fresh(
        self, images: Mapping[str, Path] | None = None, pflash: Path | None = None
    ) -> Recorder:
        """Pristine disks and a new journal, for the next test; the machine must be off.

        `images` replaces base images by disk name, e.g. `{"vda": Path("other.img")}`, `pflash` the
        second pflash, both until the next call.
        """
        with self._lock:
            if self.get():
                raise ExecutionError(f"{self}: switch the machine off before fresh()")
            bases = dict(self.images().disks)
            for name, path in (images or {}).items():
                if name not in bases:
                    raise ExecutionError(f"{self}: no disk {name!r}; there are {sorted(bases)}")
                bases[name] = path
            if self._recorder is not None:
                self._recorder.close()
            self._cut_pending = False
            self._forget_failure()
            self._other_pflash = pflash
            self._link_up = True
            self._clock = ""
            self._open_recorder(bases)
            return self.recorder

    def set_link(self, up: bool) -> None:
        """Plug the network cable in or out; stays so across resets and power cycles."""
        self._link_up = up
        if self.get():
            self.monitor_command("set_link", {"name": "nic0", "up": up})
            self._mark("network", f"link {'up' if up else 'down'}")

    def set_clock(self, base: str) -> None:
        """What the hardware clock says at each start from now on (UTC, ISO 8601; empty: now)."""
        self._clock = base

    # -- how a machine starts and ends (under the lock) ---------------------------------------

    def _start(self, why: str) -> None:
        assert self._run is not None and self._pump is not None
        machine = self.description(self._other_pflash)
        deadline = time.monotonic() + self.start_deadline_s
        console, console_theirs = socket.socketpair()
        monitor, monitor_theirs = socket.socketpair()
        self._shutdown_reason = ""
        self._reset = None
        self._starved_watchdog = ""
        self.power_lost.clear()
        process: MachineProcess | None = None
        try:
            endpoints = {d.name: self.recorder.endpoint(d.name) for d in self._disks}
            process = MachineProcess(
                command_line(
                    machine,
                    console_fd=console_theirs.fileno(),
                    qmp_fd=monitor_theirs.fileno(),
                    exports={n: (Path(e.socket), e.export) for n, e in endpoints.items()},
                ),
                output_path=self._run.path / "qemu-output",
                pass_fds=(console_theirs.fileno(), monitor_theirs.fileno()),
                environment=self._run.environment,
                on_exit=self._machine_ended,
            )
            console_theirs.close()
            monitor_theirs.close()
            self.logger.debug("QEMU: %s", shlex.join(process.arguments))
            self._mark("power", why)
            self._qmp = QmpConnection(
                monitor,
                name=self.target.name,
                timeout_s=max(0.1, deadline - time.monotonic()),
                on_event=self._take_event,
            )
            if not self._link_up and self._network is not None:
                self._qmp.execute("set_link", {"name": "nic0", "up": False})
            self._pump.attach(SocketTransport(console))
            self._process = process  # from here on its end is an event, not a failed start
            self.boots += 1
            self._qmp.execute("cont", timeout_s=max(0.1, deadline - time.monotonic()))
        except Exception as error:
            # A connection breaks a moment before the process is reaped: ask for its end, then
            # judge. One that ended after its start is told by `_machine_ended`.
            ended = process is not None and process.exited.wait(
                _REAP_S if isinstance(error, QmpFailure | OSError) else 0.0
            )
            if not ended or self._process is not process:
                self._abandon(process, console, monitor)
                raise self._start_error(process, error, ended) from error
        finally:
            console_theirs.close()
            monitor_theirs.close()

    def _abandon(
        self, process: MachineProcess | None, console: socket.socket, monitor: socket.socket
    ) -> None:
        """Clean up after a start that failed."""
        self._process = None
        if process is not None:
            process.kill()
        self._close_qmp()
        if self._pump is not None:
            self._pump.lost("QEMU did not start")
        console.close()
        monitor.close()

    def _start_error(
        self, process: MachineProcess | None, error: Exception, ended: bool
    ) -> ExecutionError:
        """What to say of a start that failed; `ended`: QEMU was gone before we killed it."""
        if process is None:
            return ExecutionError(f"{self}: QEMU could not be started: {error}")
        said = process.output() or str(error)
        if ended:
            return ExecutionError(f"{self}: QEMU did not start ({process.ended}): {said}")
        return ExecutionError(
            f"{self}: QEMU was not ready within {self.start_deadline_s:g} s: {said}"
        )

    def _stop(self, why: str) -> None:
        """End QEMU at once; the recorder still has to be told what that means."""
        process, self._process = self._process, None
        assert process is not None
        process.kill()
        self._close_qmp()
        self._trip = None
        self._trip_plan = None
        if self._pump is not None:
            self._pump.lost(why, drain_s=_DRAIN_S)

    def _switch_off(self, why: str) -> None:
        self._stop(why)
        self._rebuild(_plan("kept", 0))

    def _rebuild(self, plan: _Plan) -> CutRecord | None:
        """Have the recorder rebuild the disks; the power is gone."""
        self._cut_pending = False
        self._trip = None
        self._trip_plan = None
        self._plans.clear()
        if self._recorder is None:
            self.last_cut = None
            return None
        try:
            self.last_cut = self._recorder.cut(plan.model, plan.seed)
        except DiskError as error:
            raise InfrastructureError(f"{self}: the recorder failed: {error}") from error
        self._mark("power", str(self.last_cut))
        return self.last_cut

    def _close_qmp(self) -> None:
        qmp, self._qmp = self._qmp, None
        if qmp is not None:
            qmp.close()

    def _check_recorder(self) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.check()
        except DiskError as error:
            raise InfrastructureError(f"{self}: the recorder failed: {error}") from error

    def _forget_failure(self) -> None:
        self.failure = None
        self.power_loss = None
        self._trip = None
        self._trip_plan = None

    def _drop_clients(self) -> None:
        """Deactivate what is bound to this console: its view of the machine is stale."""
        for client in list(self.clients):
            if not isinstance(client, Strategy) and client.state is BindingState.active:
                self.target.deactivate(client)

    # -- events from other threads ------------------------------------------------------------

    def _frozen(self, armed: Armed) -> None:
        """The recorder stopped the disks (its thread): nothing may run on."""
        if self._trip is None:
            self._trip_plan = self._plans.get(id(armed))
            inside = isinstance(armed.action, Freeze) and armed.action.inside
            where = "inside" if inside else "before"
            cause = f"power was cut {where} operation {armed.operation} (trigger: {armed.trigger})"
            self._trip = PowerLoss(cause, armed, time.monotonic_ns())
        process = self._process
        if process is not None:
            process.signal_kill()

    def _machine_ended(self, process: MachineProcess) -> None:
        """QEMU ended (the process's own thread): by a trip, by the guest, or by someone else."""
        with self._lock:
            if process is not self._process:
                return  # we ended it ourselves, and said so
            self._process = None
            if self._qmp is not None:
                self._qmp.ended.wait(_DRAIN_S)  # its last event says why
            self._close_qmp()
            try:
                self._handle_end(process)
            except Exception as error:  # noqa: BLE001 - told to whoever waits, and at on()
                self._fail(f"{type(error).__name__}: {error}")

    def _handle_end(self, process: MachineProcess) -> None:
        pump = self.pump
        if self._trip is not None:
            loss = self.power_loss = self._trip
            self._mark("power", loss.cause)
            self._cut_pending = True
            try:
                if self._trip_plan is not None:
                    self._rebuild(self._trip_plan)
            finally:
                pump.lost(loss.cause, drain_s=_DRAIN_S)
                self.power_lost.set()
        elif self._starved_watchdog:
            self._fail(self._starved_watchdog)
        elif self._reset is not None:
            self._require_clean_reset(self._reset)
            self.resets += 1
            pump.detach(drain_s=_DRAIN_S)
            self._start(f"reset by the guest ({self._reset.data.get('reason')})")
        elif self._shutdown_reason == "guest-shutdown":
            self._mark("power", "the guest switched itself off")
            pump.lost("the guest switched itself off", drain_s=_DRAIN_S)
        else:
            said = process.output()
            self._fail(f"QEMU ended by itself: {process.ended}" + (f": {said}" if said else ""))

    def _require_clean_reset(self, reset: QmpEvent) -> None:
        """The old QEMU must not have booted on between its reset and its end.

        If this harness was stalled in that moment, the firmware may have counted a boot that
        never was: then nothing can be said about the product.
        """
        if self._recorder is None:
            return
        writes = self._recorder.operations - self._operations_at_reset
        if reset.delay_s > _RESET_STALL_S:
            arrived = JournalReader(self._recorder.journal_path).operations.arrived_ns
            since = reset.monotonic_ns - round(reset.delay_s * 1e9)
            writes = int((arrived > since).sum())
        if writes:
            raise InfrastructureError(
                f"the harness stalled {reset.delay_s:.3f} s while the guest reset, and "
                f"{writes} disk operations of a boot that should not have been were recorded"
            )

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.logger.error("%s", failure)
        self._mark("power", failure)
        if self._pump is not None:
            self._pump.lost(failure, drain_s=_DRAIN_S)

    def _take_event(self, name: str, data: Mapping[str, Any], sent_s: float) -> None:
        event = QmpEvent(name, data, time.monotonic_ns(), max(0.0, time.time() - sent_s))
        if name == "RESET":
            self._reset = event
            if self._recorder is not None:
                self._operations_at_reset = self._recorder.operations
            if self._process is not None:
                self._process.signal_kill()
        elif name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "WATCHDOG":
            starved = self.starved_s(time.monotonic() - _WATCHDOG_S)
            if starved > _WATCHDOG_S / 2:
                # The guest's clock runs on while it may not: this says nothing about the product.
                self._starved_watchdog = (
                    f"the watchdog fired, but of the {_WATCHDOG_S:g} s before it the host kept "
                    f"the machine from running for {starved:.1f} s"
                )
        self.events.append(event)
        self._mark("qmp", f"{name} {json.dumps(data)}" if data else name)
        for listener in tuple(self._event_listeners):
            listener(event)

    def _mark_line(self, line: Line) -> None:
        self._mark("console", line.text)

    def _mark(self, source: str, text: str) -> None:
        if source != "console" and self._pump is not None:
            self._pump.note(f"{source}: {text}")
        if self._recorder is not None:
            with contextlib.suppress(DiskError):  # `check` reports it where someone can act
                self._recorder.mark(source, text)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.target.name})"
