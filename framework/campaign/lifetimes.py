"""One lifetime of a simulated device: an update, its faults, what was seen, and the verdict.

A *schedule* is everything that a lifetime depends on: the images, what the operator does, and the
faults with the operation, byte or moment at which each strikes. The same schedule gives the same
lifetime, byte for byte; that is what is printed, shrunk and kept in a bundle. The events are those
of an emulated run, and the judge is the same (`framework.verdict`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from typing import Final

from framework.campaign.contract import Contract, Facts
from framework.disk.models import CacheModel, model_from
from framework.targets.simulated.bootloader import BOOTLIMIT, SLOTS
from framework.targets.simulated.device import (
    CANARY,
    CANARY_CONTENT,
    DATA_BYTES,
    DATA_OFFSET,
    DONE,
    IMAGE_BYTES,
    KILLED,
    SLOT_OFFSETS,
    Command,
    Recorded,
    Start,
    make_image,
    read_head,
)
from framework.targets.simulated.drive import Action, PowerLost, Step
from framework.targets.simulated.filesystem import FileSystem, FileSystemError
from framework.targets.simulated.laboratory import BOOTLOADERS, SCRIPTS, STRAY, Laboratory
from framework.targets.simulated.managed import URL, Job, Loss, Server
from framework.verdict import (
    BootEnvironment,
    BootSeen,
    CommitReached,
    Committed,
    ContractChecked,
    DataChecked,
    DiskSeen,
    Event,
    ImageFacts,
    InstallEnded,
    InstallStarted,
    PowerCut,
    RetryEnded,
    Run,
    ServerTold,
    SlotContent,
    SlotState,
    StatusRead,
    Verdict,
    judge,
)
from updater.device.command import EXIT_REBOOT_NEEDED
from updater.device.config import ServerConfig

RECOVERIES: Final = 40
"""Power cuts that one lifetime may have; a schedule has fewer."""

KERNELS: Final = 2
"""Kernels that one start may take: the trial, and after it the system that was there before."""

FORWARD: Final = ("ArtifactInstall", "ArtifactCommit")
"""The states whose scripts have to have been done when an update is committed."""
STOPPING: Final = ("ArtifactInstall_", "ArtifactCommit_Enter")
"""The scripts that stop an update when they fail."""
UNTOLD: Final = ("ArtifactInstall", "ArtifactReboot")
"""The last state told before a cut after which ArtifactReboot counts as done, failing or not.

An update module may restart the device from within ArtifactReboot ("Update modules v3 protocol":
it is not repeated then), so to a client that finds itself restarted in it the call has done its
work, and ArtifactVerifyReboot decides. Mender's client does the same: a stored ArtifactReboot is
followed by ArtifactVerifyReboot, and its test "Killed in ArtifactReboot" ends with a commit. That
the call had failed is known only once the next state is on record, and then told. The record of
ArtifactReboot itself may be there a moment before it is told.
"""
PROVING: Final = ("ArtifactVerifyReboot", "ArtifactCommit", "Cleanup", "Idle")
"""The states of an update that goes well behind ArtifactReboot."""
INCONSISTENT: Final = "_INCONSISTENT"
"""What follows an artifact's name on a device where an error had to be ignored (Mender's word)."""
DRIVE_FAULTS: Final = ("cut", "error", "flip", "kill")
NETWORK_FAULTS: Final = ("break", "corrupt")
"""A download that ends at a byte, or has one byte changed."""
SERVER_FAULTS: Final[Mapping[str, Loss]] = {"unsent": "request", "unanswered": "answer"}
"""A request to the management server is lost, or its answer is."""
MANAGED: Final = ("", "plain", "pauses", "contact", "holds")
"""Whether there is a management server, and if, what is special about it."""
PAUSED: Final = ("ArtifactInstall", "ArtifactReboot", "ArtifactCommit")
"""The states that a server's update control map may have wait."""
CYCLES: Final = 40
"""Cycles of the daemon within which a deployment must be over, whatever happens."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One fault.

    Attributes:
        at: drive operation, counted over the whole lifetime from 1; for a network fault the byte
            of the artifact, for one of the server's the request, from 1.
        kind: one of DRIVE_FAULTS, NETWORK_FAULTS or SERVER_FAULTS.
        model: the cache model of a cut, by name; "torn:4096" is torn with that granularity.
        seed: of the model's choice.
    """

    at: int
    kind: str = "cut"
    model: str = "kept"
    seed: int = 0

    def __str__(self) -> str:
        """The fault as a sentence's part."""
        if self.kind == "cut":
            return f"power cut at operation {self.at}, {self.model} (seed {self.seed})"
        what = {
            "error": "I/O error at operation",
            "flip": "bit flip in operation",
            "kill": "client killed behind operation",
            "break": "connection broken at byte",
            "corrupt": "byte changed at",
            "unsent": "lost request",
            "unanswered": "lost the answer to request",
        }[self.kind]
        return f"{what} {self.at}"


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that a lifetime depends on.

    Attributes:
        faults: in no particular order.
        behaviour: of the new image: well, panics, hangs, unhealthy.
        actions: what the operator does after the first start: "stage" (install), "restart",
            "install" (both, the second if the first went well), "rollback", "commit", "resume",
            "stray" (on a device without update modules, to install what needs one), "deploy" (at
            the server; the daemon does it, and restarts the device), "cycle" (the daemon again).
        early: how often of 256 times the kernel writes a page back unasked.
        seed: of `early`.
        fresh: the client has never run on the device, so that it has no state store.
        scripts: the artifact's state scripts, as `Laboratory.artifact` takes them.
        module: "" for images; else the updates are packages, and this is what their update module
            is like, as `Laboratory.device` takes it.
        bootloader: one of BOOTLOADERS.
        managed: one of MANAGED: by no server; by one; by one whose update control map pauses the
            update before PAUSED for a while, or before ArtifactInstall for long; and only committed
            once the server was reached.
        slot: where v1 is: "a", or "b", so that what a boot loader falls back to without any
            variables is the slot that is updated.
    """

    faults: tuple[Fault, ...] = ()
    behaviour: str = "well"
    actions: tuple[str, ...] = ("install",)
    early: int = 0
    seed: int = 0
    fresh: bool = False
    scripts: str = ""
    module: str = ""
    bootloader: str = "uboot"
    slot: str = "a"
    managed: str = ""

    @property
    def sick(self) -> bool:
        """Whether the update must not be committed."""
        return self.behaviour != "well" or self._script_stops or self._module_stops

    @property
    def failure(self) -> str:
        """What the cause of the update's failure must name; "" where that depends on more."""
        if self.faults or self.module or self.actions != ("install",):
            return ""
        what, _, script = self.scripts.partition(" ")
        if what == "fail" and script.startswith(STOPPING[0]):
            return script
        if self.behaviour == "well":
            return script if what == "fail" and script.startswith(STOPPING) else ""
        return {"unhealthy": "50-sick", "offline": "40-network"}.get(
            self.behaviour, "the boot loader fell back"
        )

    @property
    def fails_in_reboot(self) -> bool:
        """Whether nothing is wrong with the update but a call of its module in ArtifactReboot."""
        calls = "reboot=Yes" in self.module and self.module.endswith("fails=ArtifactReboot")
        return calls and self.behaviour == "well" and not self._script_stops

    @property
    def _script_stops(self) -> bool:
        return self.scripts.startswith("fail") and self.scripts[5:].startswith(STOPPING)

    @property
    def _module_stops(self) -> bool:
        """Whether a call of the update module fails, and the update with it."""
        if not self.module:
            return False
        told = dict(word.split("=") for word in self.module.split())
        return (
            told["fails"]
            in {
                "No": ("ArtifactInstall", "ArtifactCommit"),
                "Automatic": ("ArtifactInstall", "ArtifactVerifyReboot", "ArtifactCommit"),
                "Yes": (
                    "ArtifactInstall",
                    "ArtifactReboot",
                    "ArtifactVerifyReboot",
                    "ArtifactCommit",
                ),
            }[told["reboot"]]
        )

    def to_json(self) -> str:
        """The schedule in one line, for a command line or a bundle."""
        values = dataclasses.asdict(self)
        values["faults"] = [list(dataclasses.astuple(fault)) for fault in self.faults]
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Read what `to_json` wrote. ValueError if it is not that."""
        try:
            values = json.loads(text)
            faults = tuple(Fault(*fault) for fault in values.pop("faults"))
            actions = tuple(values.pop("actions"))
            if values.get("bootloader", "uboot") not in BOOTLOADERS:
                raise ValueError(f"there is no boot loader {values['bootloader']!r}")
            if values.get("slot", "a") not in SLOT_OFFSETS:
                raise ValueError(f"there is no slot {values['slot']!r}")
            if values.get("managed", "") not in MANAGED:
                raise ValueError(f"there is no managing {values['managed']!r}")
            return cls(faults=faults, actions=actions, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no schedule: {error}") from error

    def __str__(self) -> str:
        """The schedule for people."""
        faults = "; ".join(map(str, sorted(self.faults))) or "no fault"
        scripts = f" with scripts ({self.scripts})" if self.scripts else ""
        what = f"a package ({self.module})" if self.module else "an image"
        where = " under GRUB" if self.bootloader == "grub" else ""
        where += " from slot b" if self.slot == "b" else ""
        where += f" with a server ({self.managed})" if self.managed else ""
        did = ", ".join(self.actions)
        return f"{did} {what} that is {self.behaviour}{scripts}{where}: {faults}"


@dataclasses.dataclass(frozen=True, slots=True)
class Strike:
    """A fault that struck: its kind, for people `what` (a cut's model), where, in which state."""

    kind: str
    what: str
    at: int
    state: str


@dataclasses.dataclass(frozen=True, slots=True)
class Lifetime:
    """What became of a schedule: the verdict, and what it is made of."""

    schedule: Schedule
    verdict: Verdict
    events: tuple[Event, ...]
    lines: tuple[str, ...]
    operations: int
    """Drive operations of the whole lifetime."""
    exposed: int
    """How many of them faults could strike: the last retry is spared."""
    struck: tuple[Strike, ...]
    drives: tuple[str, ...] = ()
    """The SHA-256 of the whole drive after each power cut, if that was asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A drive operation of a lifetime, in the terms of the updater.

    Attributes:
        number: counted over the lifetime from 1.
        state: the client's last state when it was carried out, Idle before the first.
        kind: "write" or "flush".
        area: "environment", "slot a", "slot b", "data"; "" for a flush.
        length: bytes written.
        starts: how often the device has been started.
    """

    number: int
    state: str
    kind: str
    area: str
    length: int
    starts: int


def live(laboratory: Laboratory, schedule: Schedule, *, hash_drives: bool = False) -> Lifetime:
    """Run one lifetime and judge it."""
    return Life(laboratory, schedule, hash_drives=hash_drives).run()


def trace(laboratory: Laboratory, schedule: Schedule) -> list[Operation]:
    """Run one lifetime and return its drive's operations."""
    life = Life(laboratory, schedule, traced=True)
    life.run()
    return life.operations


class _Plan:
    """Turns a schedule's drive faults into actions, and tells `strike` what struck."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        strike: Callable[[Fault, str], None],
        alive: Callable[[], bool],
        *,
        grub: bool,
    ) -> None:
        self._strike = strike
        self._alive = alive
        self._grub = grub
        self._faults = {fault.at: fault for fault in faults if fault.kind in DRIVE_FAULTS}
        self.due = min(self._faults, default=0)
        self.cut = (_model("kept"), 0)
        self.last = 0

    def at(self, step: Step) -> Action:
        fault = self._faults.pop(step.number)
        self.due = min(self._faults, default=0)
        if self._grub and fault.kind == "flip" and area_of(step.offset) == "environment":
            return ""  # GRUB's blocks have no checksum: nobody could see it
        if fault.kind == "kill" and not self._alive():
            return ""  # the boot loader, init or an orderly restart wrote: there is no process
        # A flush is everyone's.
        self._strike(fault, area_of(step.offset) if step.length else "")
        self.last = step.number
        self.cut = (_model(fault.model), fault.seed)
        if fault.kind == "cut":
            self.model, self.seed = fault.model, fault.seed
            return "cut"
        return fault.kind  # type: ignore[return-value]

    model = ""
    seed = 0

    def arm(self, fault: Fault) -> None:
        """Add a fault that lies ahead."""
        self._faults[fault.at] = fault
        self.due = min(self._faults)

    def disarm(self) -> None:
        """From here on nothing goes wrong."""
        self._faults.clear()
        self.due = 0


class _TracingPlan(_Plan):
    """Sees every operation, and has the schedule's faults happen."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        strike: Callable[[Fault, str], None],
        alive: Callable[[], bool],
        see: Callable[[Step], None],
        *,
        grub: bool,
    ) -> None:
        super().__init__(faults, strike, alive, grub=grub)
        self._see = see
        self.due = 1

    def at(self, step: Step) -> Action:
        self._see(step)
        action = super().at(step) if step.number in self._faults else ""
        self.due = step.number + 1
        return action

    def disarm(self) -> None:
        due = self.due
        super().disarm()
        self.due = due


def area_of(offset: int) -> str:
    """The area of the drive that a byte is in."""
    if offset < SLOT_OFFSETS["a"]:
        return "environment"
    if offset >= DATA_OFFSET:
        return "data"
    return "slot b" if offset >= SLOT_OFFSETS["b"] else "slot a"


class _Ignored:
    """Errors that a client had to ignore: `any` says that one may have to be told.

    `certain` names a script whose failure must be told, as the update it was ignored in has ended.
    """

    def __init__(self) -> None:
        self._now: list[str] = []
        self._before = False
        self.certain = ""

    @property
    def any(self) -> bool:
        return bool(self._now) or self._before

    def note(self, script: str) -> None:
        """A script's failure was ignored; "" for an error of the drive that may have been."""
        self._now.append(script)

    def begin(self) -> None:
        """An update begins. What the last one left is told until something is committed."""
        self._before = self.any
        self._now = []
        self.certain = ""

    def commit(self) -> None:
        self._before = False

    def end(self) -> None:
        self.certain = next(filter(None, self._now), "")


_MODELS: dict[str, CacheModel] = {}


def _model(name: str) -> CacheModel:
    if name not in _MODELS:
        kind, _, unit = name.partition(":")
        _MODELS[name] = model_from(kind, {"granularity": int(unit)} if unit else None)
    return _MODELS[name]


class Life:
    """A lifetime while it is lived: `begin`, `act` as often as one likes, `end`.

    `run` does that for a schedule. Faults may also be armed on the way, from where it stands.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        schedule: Schedule,
        *,
        hash_drives: bool = False,
        traced: bool = False,
    ) -> None:
        self._schedule = schedule
        self.operations: list[Operation] = []
        grub = schedule.bootloader == "grub"
        self._plan = (
            _TracingPlan(schedule.faults, self._strike, self._alive, self._see, grub=grub)
            if traced
            else _Plan(schedule.faults, self._strike, self._alive, grub=grub)
        )
        self._hash_drives = hash_drives
        self._drives: list[str] = []
        self._network = [f for f in schedule.faults if f.kind in NETWORK_FAULTS]
        self.server = Server(self._lose, self._ended)
        self._told: list[Job] = []
        self._reached = 0
        self._requests = 0
        self._lost = {f.at: f for f in schedule.faults if f.kind in SERVER_FAULTS}
        early = None
        if schedule.early:
            chance, draw = schedule.early, random.Random(schedule.seed)  # noqa: S311 - replays
            early = lambda: draw.getrandbits(8) < chance  # noqa: E731
        self._images = {
            "v1": make_image("v1"),
            "v2": make_image("v2", schedule.behaviour),
            "v3": make_image("v3"),
        }
        self._drive = laboratory.drive(
            self._plan,
            fresh=schedule.fresh,
            bootloader=schedule.bootloader,
            slot=schedule.slot,
        )
        self._device = laboratory.device(
            schedule.behaviour,
            schedule.scripts,
            drive=self._drive,
            module=schedule.module,
            bootloader=schedule.bootloader,
            early=early,
            network=self._download,
        )
        if schedule.managed:
            self._device.managed = ServerConfig(
                url=URL, require_contact=schedule.managed == "contact"
            )
        self._device.listener = self._heard
        self._device.ignored_script = self._ignored_script
        self._device.lost_record = self._lose_record
        self._events: list[Event] = []
        self._contract = Contract(
            self._events.append,
            Facts(
                running=lambda: self._device.slot,
                next=self._next,
                struck=lambda: bool(self._struck),
                damaged=lambda: self._damaged,
                refused=lambda: self._refused,
                done=self._script_done,
                forgotten=self._device.forgotten,
                module=self._module_told,
            ),
            scripted=bool(schedule.scripts) and not schedule.scripts.startswith("later"),
            slots=not schedule.module,
            initial="v1",
        )
        self._device.begins = self._contract.begin
        self._device.ends = self._contract.end
        self._device.module_called = self._contract.called
        self._environment = self._drive.peek(0, SLOT_OFFSETS["a"])
        self._ignored = _Ignored()
        self._restarted_untold = False
        self._commits: list[bool] = []
        self._lost_record = False
        self._state = "Idle"
        self._struck: list[Strike] = []
        self._damaged = False
        self._refused = False
        self._went_well = True
        self._installing = "v2"
        self._running = ""

    def run(self) -> Lifetime:
        """Live through the schedule."""
        self.begin()
        for action in self._schedule.actions:
            self.act(action)
        return self.end()

    def begin(self) -> None:
        """Start the device for the first time."""
        self._start(self._device.start)

    def act(self, action: str) -> None:
        """Do one thing that an operator does; see `Schedule.actions`."""
        if action in ("install", "stage"):
            self._update("v2", restart=action == "install")
        elif action == "restart":
            self._start(self._device.restart)
        elif action == "stray":
            self._command("install", STRAY)
        elif action == "deploy":
            self._deploy("v2")
        elif action == "cycle":
            self._cycle()
            self._tell()
        else:
            self._command(action)

    def arm(self, ahead: int, kind: str, model: str, seed: int) -> None:
        """Have a drive fault strike `ahead` operations from here; it joins the schedule."""
        fault = Fault(self._drive.operations + ahead, kind, model, seed)
        faults = tuple(f for f in self._schedule.faults if f.at != fault.at)
        self._schedule = dataclasses.replace(self._schedule, faults=(*faults, fault))
        self._plan.arm(fault)

    def end(self) -> Lifetime:
        """Let nothing go wrong any more, try the update again, and judge all that was seen."""
        exposed = self._drive.operations
        self._plan.disarm()
        self._network.clear()
        self._lost.clear()
        if self._schedule.managed:
            self._start(self._device.restart)
            self._manage()
            # And once with nothing to do: what was told is not told again.
            self._cycle()
            self._tell(last=True)
        if self._schedule.module and self._drive.peek(0, SLOT_OFFSETS["a"]) != self._environment:
            self._events.append(
                ContractChecked("a package's update wrote to the boot environment", kept=False)
            )
        if not self._schedule.sick:
            self._retry("v2")
        else:
            if self._schedule.module:
                self._start(self._device.restart)
            self._status()
            self._retry("v3")
        sick = self._schedule.sick and not (self._commits and all(self._commits))
        facts = {
            name: ImageFacts(name, "", IMAGE_BYTES, healthy=name != "v2" or not sick)
            for name in self._images
        }
        run = Run(facts, "v1", tuple(self._events), boot_limit=KERNELS)
        return Lifetime(
            self._schedule,
            judge(run),
            run.events,
            tuple(self._device.lines),
            self._drive.operations,
            exposed,
            tuple(self._struck),
            tuple(self._drives),
        )

    # Steps, each of which a power cut may end.

    def _start(self, how: Callable[[], Start]) -> bool:
        """Start until no cut comes in between; say whether the device is ready."""
        for _ in range(RECOVERIES):
            try:
                start = how()
            except PowerLost:
                self._power_went()
                how = self._device.start
                continue
            self._running = start.image.name if start.image else ""
            if self._schedule.module and self._running:
                self._running = self._device.package()
            self._events.append(
                BootSeen(
                    ready=start.ready,
                    version=self._running or None,
                    slot=start.slot or None,
                    attempts=start.kernels,
                    evidence=start.evidence,
                )
            )
            return start.ready
        raise AssertionError("more power cuts than any schedule has")

    def _deploy(self, name: str) -> None:
        self._installing = name
        self._contract.deploy()
        self._events.append(InstallStarted(name))
        pauses = {"pauses": dict.fromkeys(PAUSED, 3), "holds": {PAUSED[0]: 40}}
        self.server.offer(name, pauses.get(self._schedule.managed, {}))
        self._manage()
        self._tell()
        self._status()

    def _manage(self) -> None:
        """Let the daemon work until there is nothing to do, or somebody kills it."""
        for _ in range(CYCLES):
            job = self.server.job
            if not self._running or job is None:
                break
            command = self._cycle()
            if command is not None and command.exit_code == KILLED:
                self._look("after the daemon was killed")
                break
        self._look("after the daemon")

    def _cycle(self) -> Command | None:
        """Have the daemon do one cycle; None when the power went."""
        if not self._running:
            return None
        command: Command | None = None
        try:
            command = self._device.manage(self.server)
        except PowerLost:
            self._power_went()
        if command is None:
            self._start(self._device.start)
        elif command.exit_code == EXIT_REBOOT_NEEDED:
            self._look("before the daemon's restart")
            self._start(self._device.restart)
        return command

    def _tell(self, *, last: bool = False) -> None:
        """Judge what the server was told of what is over; in the end everything must be."""
        told = [job for job in self.server.jobs if (last or job.over) and job not in self._told]
        for job in self.server.jobs if last else ():
            self._contract.told(job)
        self._told += told
        if told and self._schedule.module:
            # What a package's installation left is seen at the next start: the newest one's.
            self._start(self._device.restart)
            self._say_told(told[-1])
            return
        for job in told:
            if not job.over:
                self._say_told(job)

    def _ended(self, job: Job) -> None:
        if not self._schedule.module:
            self._say_told(job)

    def _say_told(self, job: Job) -> None:
        # What ended although errors had to be ignored has failed, whatever runs.
        failed = job.status == "failure"
        name = (self._contract.recorded if failed else "") or job.artifact
        self._events.append(ServerTold(name, job.status, job.cause))

    def _lose(self) -> Loss:
        """What the network loses of the request that is being made."""
        self._requests += 1
        fault = self._lost.pop(self._requests, None)
        if fault is None:
            return ""
        self._strike(fault, "network")
        return SERVER_FAULTS[fault.kind]

    def _update(self, name: str, *, restart: bool = True) -> None:
        self._installing = name
        self._contract.deployed = False
        self._events.append(InstallStarted(name))
        command = self._command("install", name)
        if command is None or command.exit_code == KILLED:
            self._events.append(InstallEnded(name, None))
            if command is not None:
                self._look("after the client was killed")
            self._status()
            return
        self._events.append(
            InstallEnded(name, command.exit_code, command.cause, armed=command.armed)
        )
        self._look("after the install")
        # What a package's failed installation left is seen at the next start.
        restarts = command.exit_code in (0, 4) or bool(self._schedule.module)
        if restart and restarts and self._start(self._device.restart):
            self._status()
            self._look("after the restart")

    def _command(self, verb: str, source: str = "") -> Command | None:
        """Run a command; None when the power went, after the device has been started again."""
        if not self._running:
            return None
        command: Command | None = None
        try:
            command = self._device.run(verb, source)
        except PowerLost:
            self._power_went()
        if command is None:
            self._start(self._device.start)
            return None
        if verb != "install" and command.exit_code == 4:
            self._start(self._device.restart)
        return command

    def _retry(self, name: str) -> None:
        # What waits for a restart gets it first, and may turn out to be the same.
        self._start(self._device.restart)
        if self._running != name:
            self._update(name)
        there = self._running == name
        seen = self._look("at the end")
        committed = there and not seen.environment.upgrade_available
        if self._schedule.module:
            committed = there and not self._device.is_updating()
        detail = f"runs {self._running or 'nothing'}"
        missing = self._undone_scripts(name) if committed else ""
        if missing:
            committed, detail = False, f"{detail}, and {missing} was never done"
        self._events.append(RetryEnded(name, committed, detail))
        self._check_data()
        self._status()

    def _undone_scripts(self, name: str) -> str:
        """A state script of the update that was committed and has left no sign; "" for none."""
        data = self._device.data
        if name != "v2" or not self._schedule.scripts or data is None or not self._went_well:
            return ""
        told = self._device.status()
        if told is not None and told[0] == name + INCONSISTENT:
            return ""  # it failed too late to go back, and that is told
        forward = [script for script in SCRIPTS if script.startswith(FORWARD)]
        return next((script for script in forward if not data.exists(DONE + script)), "")

    def _power_went(self) -> None:
        self._events.append(PowerCut(self._plan.last, self._plan.model, self._plan.seed))
        self._drive.power_on()
        if self._hash_drives:
            content = self._drive.peek(0, self._drive.size_bytes)
            self._drives.append(hashlib.sha256(content).hexdigest())
        self._look("after the cut")
        self._check_data()

    def _status(self) -> None:
        if not self._running:
            return
        updating = False

        def see(lines: list[str], recorded: Recorded) -> None:
            nonlocal updating
            updating = recorded.updating
            self._contract.status(lines, recorded)

        try:
            status = self._device.status(see)
        except PowerLost:
            # It may undo what a killed client began, and the power may go in that.
            self._power_went()
            self._start(self._device.start)
            return
        if updating and self._schedule.module:
            return  # what it runs is neither the one nor the other
        if status is not None:
            self._contract.inconsistent(status[0])
            if self._schedule.failure and status[1] in ("failed", "rolled-back"):
                self._contract.cause(status[2], self._schedule.failure)
            name, hidden = status[0], self._ignored.certain
            if name == "v2" + INCONSISTENT and self._ignored.any:
                # That an error had to be ignored is what is to be told, wherever it led.
                name, hidden = self._running, ""
            elif name == self._running + INCONSISTENT and self._lost_record:
                name, hidden = self._running, ""
            if any(strike.kind == "flip" for strike in self._struck):
                hidden = ""  # the record of it may be damaged
            self._events.append(StatusRead(name, *status[1:], hidden=hidden))

    def _see(self, step: Step) -> None:
        kind = step.kind.name.lower()
        area = area_of(step.offset) if kind == "write" else ""
        self.operations.append(
            Operation(step.number, self._state, kind, area, step.length, self._device.starts)
        )

    def _alive(self) -> bool:
        return self._device.commanding

    def _strike(self, fault: Fault, area: str) -> None:
        what = fault.model if fault.kind == "cut" else fault.kind
        self._struck.append(Strike(fault.kind, what, fault.at, self._state))
        if fault.kind in ("cut", "kill"):
            self._contract.interrupted()
            if self._schedule.fails_in_reboot and self._state in UNTOLD:
                self._restarted_untold = True
        elif fault.kind in ("error", "flip"):
            self._damaged = True
            self._refused |= area in ("environment", "")
        if fault.kind == "error" and self._state == "ArtifactCommit" and self._schedule.scripts:
            # Where the commit is behind it, the record of the scripts that follow it may fail.
            self._ignored.note("")

    def _lose_record(self) -> None:
        # Only where it could be damaged: a cut alone damages nothing that a client can't mend.
        self._lost_record = any(strike.kind in ("flip", "error") for strike in self._struck)

    def _ignored_script(self, name: str) -> None:
        self._ignored.note(name)

    # Witnesses.

    def _look(self, moment: str) -> DiskSeen:
        found = self._device.copies.seen()
        variables = found.variables
        count = variables.get("bootcount", "0")
        environment = BootEnvironment(
            valid_copies=found.valid_copies,
            boot_slot=SLOTS.get(variables.get("mender_boot_part", "")),
            upgrade_available=variables.get("upgrade_available") == "1",
            bootcount=int(count) if count.isdigit() else 0,
            bootlimit=BOOTLIMIT,
        )
        seen = DiskSeen(moment, {slot: self._slot(slot) for slot in ("a", "b")}, environment)
        if not self._schedule.module:
            # A package is in no slot.
            self._events.append(seen)
        return seen

    def _next(self) -> tuple[str, bool]:
        """The slot that the boot environment names, and whether it is on trial."""
        variables = self._device.copies.seen().variables
        named = SLOTS.get(variables.get("mender_boot_part", ""), "")
        return named, variables.get("upgrade_available") == "1"

    def _script_done(self, name: str) -> bool:
        data = self._device.data
        return data is not None and data.exists(DONE + name)

    def _module_told(self) -> dict[str, str] | None:
        """What the module of the package that is being installed is like; None for an image."""
        if not self._schedule.module:
            return None
        if self._installing != "v2":
            return {"reboot": "No", "reverts": "Yes", "fails": "", "healthy": "Yes"}
        told = dict(word.split("=") for word in self._schedule.module.split())
        return {**told, "healthy": "Yes" if self._schedule.behaviour == "well" else "No"}

    def _slot(self, slot: str) -> SlotState:
        for name, image in self._images.items():
            if self._drive.holds(SLOT_OFFSETS[slot], image):
                return SlotState(SlotContent.IMAGE, name)
        if read_head(self._drive.peek(SLOT_OFFSETS[slot], 512)) is None:
            return SlotState(SlotContent.UNLOADABLE)
        return SlotState(SlotContent.MIXED)

    def _check_data(self) -> None:
        try:
            data = FileSystem(self._drive, DATA_OFFSET, DATA_BYTES)
            intact = data.read(CANARY, 0, len(CANARY_CONTENT)) == CANARY_CONTENT
            detail = "" if intact else "the canary has changed"
        except (FileSystemError, KeyError) as error:
            self._events.append(DataChecked(False, False, str(error)))
            return
        self._events.append(DataChecked(True, intact, detail))

    def _heard(self, line: str) -> None:
        self._contract.heard(line)
        if line.startswith("state ") and not line.startswith("state script"):
            before, self._state = self._state, line[6:]
            self._check_contact(before)
            if self._state not in PROVING:
                self._restarted_untold = False
            if self._state == "Download":
                self._ignored.begin()
                # Its first script takes the signs of earlier updates away.
                self._went_well = False
            elif self._state == "Idle":
                self._ignored.end()
            if self._state == "ArtifactCommit":
                self._events.append(CommitReached(self._installing))
        elif line.startswith("update module") and "cannot roll back" in line:
            self._ignored.note("ArtifactRollback")
        elif self._schedule.module and "states without an end" in line:
            self._ignored.note("")
        elif line.startswith("committed "):
            name, _, rest = line[10:].partition(" (slot ")
            self._went_well = True
            if name == "v2":
                self._commits.append(self._restarted_untold)
            self._ignored.commit()
            self._events.append(Committed(name, rest[:1]))

    def _check_contact(self, before: str) -> None:
        """Whether a deployment is committed before the new system has reached the server."""
        if self._state == "ArtifactVerifyReboot":
            self._reached = self.server.reached
        proved = (before, self._state) == ("ArtifactVerifyReboot", "ArtifactCommit")
        wanted = self._schedule.managed == "contact" and self._contract.deployed
        # Who commits by hand takes it upon himself.
        if proved and wanted and not self._contract.helped and self.server.reached == self._reached:
            self._events.append(
                ContractChecked("commits, and the server was not reached before", kept=False)
            )

    def _download(self, location: str, content: bytes) -> tuple[bytes, bool]:
        """Let the network faults strike, each once, in order."""
        if location != "v2" or not self._network:
            return content, False
        fault = self._network.pop(0)
        at = fault.at % len(content)
        self._strike(fault, "network")
        if fault.kind == "break":
            return content[:at], True
        return content[:at] + bytes((content[at] ^ 0x40,)) + content[at + 1 :], False
