"""The device as a scenario sees it: install, reboot, restore, retry; every step is witnessed.

A `Device` drives one machine through its driver and console and keeps what console and disk show
as events (`framework.verdict`), by which the scenario is judged at its end. A power cut that
strikes in the middle of a step ends the step; the scenario then calls `restore()`.

What it waits for is a line on the console or the loss of power, always with a deadline. It never
sleeps, and it never asks the device what only the disk can tell.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from attrs import Factory, define, evolve, frozen

from framework.console import ConsoleDeath, ConsoleLost, ConsolePump, ConsoleTimeout, Line
from framework.disk import Armed, CacheModel, CutRecord, Recorder, Trigger
from framework.faults import MissingFeatureError
from framework.report import Moment
from framework.scenario.inspect import DataReader, check_data, check_other_data, look
from framework.scenario.manifest import TargetManifest
from framework.targets.errors import InfrastructureError
from framework.targets.qemu import PowerLoss, QmpEvent
from framework.targets.strategy import BootOutcome, CommandResult, Fate
from framework.targets.uut import UpdaterUnderTest
from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    DiskSeen,
    Event,
    ImageFacts,
    InstallEnded,
    InstallStarted,
    PowerCut,
    RetryEnded,
    Run,
    StatusRead,
    Verdict,
    judge,
)

NOTEWORTHY = re.compile(r"updater: |BROWNOUT |AB: |Kernel panic|U-Boot 20|GNU GRUB")
CANARY_PATH = "/canary"
CANARY_COMMAND = (
    "dd if=/dev/urandom of=/data/canary bs=4096 count=16 conv=fsync 2>/dev/null"
    " && sync && sha256sum /data/canary"
)
INSTALL_TIMEOUT_S = 300.0
COMMAND_TIMEOUT_S = 60.0
INSTALLED_EXIT_CODES = (0, 4)
# A shell takes a command that died of SIGINT for its own interruption, and then tells nothing of
# it; with a trap it waits, and its exit code is the command's.
INTERRUPTIBLE = "trap : INT; {}; exit $?"


class Machine(Protocol):
    """What a `Device` asks of the machine's driver."""

    last_cut: CutRecord | None
    power_loss: PowerLoss | None
    failure: str | None

    @property
    def recorder(self) -> Recorder:
        """What serves and records its disks."""

    @property
    def pump(self) -> ConsolePump:
        """What drains its console."""

    def fresh(
        self, images: Mapping[str, Path] | None = None, pflash: Path | None = None
    ) -> Recorder:
        """Pristine disks, and another boot script."""

    def arm_cut(
        self, trigger: Trigger, model: CacheModel, seed: int, *, inside: bool = False
    ) -> Armed:
        """Cut the power before the operation that fires `trigger`, or inside it."""

    def trip(self, cause: str, model: CacheModel, seed: int) -> None:
        """Cut the power now, from any thread, without blocking."""

    def get(self) -> bool:
        """Whether it has power."""

    def settle(self) -> None:
        """Wait until an end that has begun is told: `power_loss` and `last_cut` say why."""

    def send(self, data: bytes) -> None:
        """Type something on the console, from any thread, without blocking."""

    def set_link(self, up: bool) -> None:
        """Plug the network cable in or out."""

    def set_clock(self, base: str) -> None:
        """What the hardware clock says at each power-on; empty: the right time."""

    def add_event_listener(self, listener: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Call `listener` for every event of the machine's monitor; returns its removal."""


class Strategy(Protocol):
    """What a `Device` asks of the strategy that starts it."""

    def transition(self, state: str) -> Any:
        """Bring it to `off` or `ready`."""

    def boot(self, budget_s: float | None = None, *, adopt: bool = True) -> BootOutcome:
        """Power it up and see what it does."""

    def await_boot(
        self, since: int | None = None, budget_s: float | None = None, *, adopt: bool = True
    ) -> BootOutcome:
        """See what a device that is starting does."""

    def run(self, command: str, timeout_s: float = 30.0) -> CommandResult:
        """Run a command in its shell."""

    def require_host(self, since: float, most_s: float) -> None:
        """Raise InfrastructureError if a busy host kept the device from running for longer."""


@frozen
class Update:
    """An update that a scenario may install.

    Attributes:
        name: its artifact name.
        image: the facts of the image in it.
        path: the artifact on the host.
        url: where the device finds it.
        authority: certificate and key of the authority that devices trust a server by.
    """

    name: str
    image: ImageFacts
    path: Path
    url: str
    authority: tuple[Path, Path]


@define
class Device:
    """One device under test; see the module text.

    Attributes:
        machine: its driver.
        strategy: starts it and runs commands on it.
        uut: the updater under test.
        manifest: the target's images and layout.
        base: facts of the image that slot a held at the beginning.
        say: called with each step, for the live display.
        step: opens a step of the report.
        before_retry: called before an update is tried again: the faults are over.
        before_power: called before power is given back after a cut.
        after_cut: called after a power cut, before power is given back.
        on_event: called with each event of a step, when it is witnessed.
        data_reader: reads a data partition that is not ext4; None where it is.
        restart_expected: whether a fault makes the device restart, so that its doing so in the
            middle of a step is no failure of the rig.
        used_network: whether it has used the network so far.
    """

    machine: Machine
    strategy: Strategy
    uut: UpdaterUnderTest
    manifest: TargetManifest
    base: ImageFacts
    say: Callable[[str], None] = lambda text: None
    step: Callable[[str], AbstractContextManager[Any]] = nullcontext
    before_retry: Callable[[], None] = lambda: None
    before_power: Callable[[], None] = lambda: None
    after_cut: Callable[[CutRecord], None] = lambda cut: None
    on_event: Callable[[Event], None] = lambda event: None
    restart_expected: Callable[[], bool] = lambda: False
    data_reader: DataReader | None = None
    used_network: bool = False
    events: list[Event] = Factory(list)
    moments: list[Moment] = Factory(list)
    did: list[str] = Factory(list)
    images: dict[str, ImageFacts] = Factory(dict)
    started_ns: int = Factory(time.monotonic_ns)
    running: BootSeen | None = None
    canary_sha256: str | None = None
    _harvested: int = 0
    _begun_at: int = 0
    _step_began: int = 0
    _forget: Callable[[], None] = lambda: None

    def __attrs_post_init__(self) -> None:
        self.images[self.base.name] = self.base
        self._forget = self.machine.pump.add_listener(self._show)
        self._harvested = self._begun_at = self.machine.pump.position

    def close(self) -> None:
        """Stop listening and switch the machine off."""
        self._forget()
        self.strategy.transition("off")

    # -- steps of a scenario -----------------------------------------------------------------

    def boot(self) -> BootSeen:
        """Power on and wait until the device is ready; leaves a synced file to look for later."""
        with self._step("power on", "boot"):
            boot = self._seen(self.strategy.boot(adopt=False))
            if boot is None:
                raise InfrastructureError("the power went during the first start")
            if boot.ready:
                self._leave_canary()
            return boot

    @property
    def deterministic(self) -> bool:
        """Whether the machine's time is its own, counted in instructions."""
        return bool(getattr(self.machine, "deterministic", False))

    def goes_online(self, why: str) -> None:
        """The device is about to use the network.

        Raises:
            MissingFeatureError: it is deterministic: its time would run ahead of any answer.
        """
        if self.deterministic:
            raise MissingFeatureError(f"{why} needs a network, and a deterministic run has none")
        self.used_network = True

    def install(self, update: Update, timeout_s: float = INSTALL_TIMEOUT_S) -> InstallEnded:
        """Install `update`; ends with its exit code, or with none if the power went first."""
        self.goes_online(f"installing {update.name}")
        with self._step(f"installing {update.name}", "updater"):
            self.images[update.name] = update.image
            self._event(InstallStarted(update.name))
            ended = self._install(update, timeout_s)
            self._event(ended)
            if ended.exit_code is not None:
                self.look("after the install")
            return ended

    def reboot(self) -> BootSeen | None:
        """Restart the device and wait until it is ready; None if the power went meanwhile."""
        with self._step("rebooting", "boot"):
            since = self.machine.pump.position
            # The console goes with the machine: what counts is the next start.
            with contextlib.suppress(ConsoleLost):
                self.strategy.run("sync; reboot -f", COMMAND_TIMEOUT_S)
            return self._seen(self.strategy.await_boot(since, adopt=False))

    def boot_after_cut(self) -> BootSeen:
        """Give power back after a cut and wait until the device is ready."""
        boot: BootSeen | None = None
        while boot is None:
            self.before_power()
            with self._step("power restored", "boot"):
                boot = self._seen(self.strategy.boot(adopt=False))
        return boot

    def await_restart(self) -> BootSeen:
        """Wait until a device that died in the last step has restarted by itself and is ready."""
        with self._step("restarting by itself", "boot"):
            boot = self._seen(self.strategy.await_boot(self._step_began, adopt=False))
        if boot is None:
            return self.boot_after_cut()
        if boot.ready:
            self.read_status()
        self.check_data()
        self.look("after the restart")
        return boot

    def restore(self) -> BootSeen:
        """Give power back after a cut, wait until the device is ready, and look at everything."""
        boot = self.boot_after_cut()
        if boot.ready:
            self.read_status()
        self.check_data()
        self.look("after the start")
        return boot

    def retry(self, update: Update) -> None:
        """Try the same update again, with all faults gone, up to its commit."""
        self.before_retry()
        with self._step(f"trying {update.name} again", "updater"):
            if self.running is not None and self.running.version != update.name:
                self.update(update)
            there = self.running is not None and self.running.version == update.name
            committed = there and not self.look("at the end").environment.upgrade_available
            self._event(RetryEnded(update.name, committed, self._running_text()))
            self.did.append(f"{update.name} {'' if committed else 'not '}committed in the end")
            self.check_data()

    def command(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> CommandResult:
        """Run something in the device's shell, as an operator would; it is in the report."""
        with self._step(f"running {command}", "operator"):
            result = self.strategy.run(command, timeout_s)
            self.note("operator", f"exit code {result.code}: {result.text[-400:]}")
            self.did.append(f"`{command}` ended with {result.code}")
            return result

    def operate(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> CommandResult | None:
        """As `command`; None if power went meanwhile, or the device died as a fault makes it."""
        self._step_began = self.machine.pump.position
        try:
            return self.command(command, timeout_s)
        except (ConsoleLost, ConsoleDeath) as error:
            self._cut_short(error)
            self.did.append(f"`{command}` cut short")
            return None

    def heard(self, text: str) -> str:
        """The last line of the console since the scenario began that has this text, or nothing."""
        for line in reversed(self.machine.pump.slice(self._begun_at).lines):
            if line.direction == "RX" and text in line.text:
                return line.text
        return ""

    def update(self, update: Update) -> InstallEnded:
        """Install, restart, and let the device commit or roll back by itself."""
        ended = self.install(update)
        if ended.exit_code in INSTALLED_EXIT_CODES:
            boot = self.reboot()
            if boot is not None and boot.ready:
                self.read_status()
                self.look("after the restart")
        return ended

    # -- witnesses ---------------------------------------------------------------------------

    @property
    def last_look(self) -> DiskSeen:
        """The newest look at the disk; looks now if there was none."""
        for event in reversed(self.events):
            if isinstance(event, DiskSeen):
                return event
        return self.look("now")

    def power_went(self) -> None:
        """Witness a power cut: which operation, and what it left on the disk."""
        self._require_cut()
        cut = self.machine.last_cut
        assert cut is not None
        self._event(PowerCut(cut.operation, cut.model, cut.seed))
        self.after_cut(cut)
        self.note("power", f"{cut}")
        self.look("after the cut")
        self.check_data()

    def look(self, moment: str) -> DiskSeen:
        """Read slots and boot environment from the disk."""
        seen = look(moment, self.machine.recorder.disk, self.manifest, self.images.values())
        self._event(seen)
        self._note_look(seen)
        return seen

    def check_data(self) -> None:
        """Check the data partition on the disk, and the file that was synced at the start."""
        if self.canary_sha256 is None:
            return
        disk, data = self.machine.recorder.disk, self.manifest.data
        if self.data_reader is None:
            repair = self.manifest.data_repair
            checked = check_data(disk, data, repair, CANARY_PATH, self.canary_sha256)
        else:
            checked = check_other_data(
                disk, data, self.data_reader, CANARY_PATH, self.canary_sha256
            )
        self._event(checked)
        self.note("disk", f"data partition: {checked.detail}")

    def read_status(self) -> StatusRead:
        """Ask the device what it thinks it runs, and how the last update ended."""
        result = self.strategy.run(self.uut.status(), COMMAND_TIMEOUT_S)
        told = self.uut.parse_status(list(result.lines))
        status = StatusRead(told.artifact, told.outcome, told.cause)
        self._event(status)
        self.note("updater", f"status: {told.artifact} {told.outcome} {told.cause}".strip())
        return status

    def verdict(self) -> Verdict:
        """Judge everything seen so far."""
        return judge(Run(self.images, self.base.name, tuple(self.events)))

    # -- for the report ----------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Seconds since the scenario began."""
        return (time.monotonic_ns() - self.started_ns) / 1e9

    def console_text(self) -> str:
        """The console since the scenario began."""
        return self.machine.pump.slice(self._begun_at).text

    def console_lines(self) -> tuple[Line, ...]:
        """The console's lines since the scenario began, with their times."""
        return self.machine.pump.slice(self._begun_at).lines

    def note(self, source: str, text: str) -> None:
        """Add a moment to the timeline; safe from any thread."""
        self.moments.append(Moment(self.elapsed_s, source, text))

    # -- inside ------------------------------------------------------------------------------

    def _require_cut(self) -> PowerLoss:
        """Wait for the end that has begun; it must be a power cut."""
        self.machine.settle()
        loss = self.machine.power_loss
        if loss is None:
            raise InfrastructureError(
                self.machine.failure or "the console is gone and nobody cut the power",
                evidence=self.machine.pump.tail(400),
            )
        return loss

    def _note_look(self, seen: DiskSeen) -> None:
        slots = ", ".join(f"{name}: {state}" for name, state in seen.slots.items())
        env = seen.environment
        trial = f", on trial {env.bootcount}/{env.bootlimit}" if env.upgrade_available else ""
        self.note(
            "disk",
            f"{seen.moment}: {slots}; boots {env.boot_slot}{trial} "
            f"({env.valid_copies} valid copies)",
        )

    def _install(self, update: Update, timeout_s: float) -> InstallEnded:
        self._step_began = self.machine.pump.position
        try:
            command = INTERRUPTIBLE.format(self.uut.install(update.url))
            result = self.strategy.run(command, timeout_s)
        except (ConsoleLost, ConsoleDeath) as error:
            self._cut_short(error)
            self.did.append(f"install of {update.name} cut short")
            return InstallEnded(update.name, None)
        except ConsoleTimeout:
            self.did.append(f"install of {update.name} had not ended after {timeout_s:g} s")
            return InstallEnded(update.name, None, timed_out=True)
        causes = [match["cause"].strip() for match in self.uut.signs.error.finditer(result.text)]
        cause = causes[-1] if causes else ""
        if result.code in INSTALLED_EXIT_CODES:
            self.did.append(f"{update.name} installed")
        else:
            # A killed updater says nothing.
            why = f"refused: {cause}" if cause else f"not installed, exit code {result.code}"
            self.did.append(f"{update.name} {why}")
        self.note("updater", f"install ended with exit code {result.code} {cause}".strip())
        armed = self.uut.signs.armed.search(cause) is not None
        return InstallEnded(update.name, result.code, cause, armed=armed)

    def _cut_short(self, error: ConsoleLost | ConsoleDeath) -> None:
        """A command was cut short: by a fault that makes the device restart, or by a power cut."""
        if self.machine.power_loss is None and self.restart_expected():
            self.note("boot", f"the system died: {error}".splitlines()[0])
        elif isinstance(error, ConsoleDeath):
            raise error
        else:
            self.power_went()

    def _leave_canary(self) -> None:
        result = self.strategy.run(CANARY_COMMAND, COMMAND_TIMEOUT_S)
        if result.code != 0 or not result.lines:
            raise InfrastructureError(f"no file can be written to /data: {result.text}")
        self.canary_sha256 = result.lines[-1].split()[0]

    def _seen(self, outcome: BootOutcome) -> BootSeen | None:
        """Take a start's outcome into the events; None if the power went meanwhile."""
        if outcome.fate is Fate.POWER_LOST:
            self.power_went()
            return None
        boot = BootSeen(
            ready=outcome.ready,
            elapsed_s=outcome.seconds,
            attempts=outcome.starts,
            evidence="" if outcome.ready else str(outcome),
        )
        if outcome.boot is not None:
            boot = evolve(
                boot,
                version=outcome.boot.version,
                slot=outcome.boot.slot,
                boot_id=outcome.boot.boot_id,
            )
        first, self.running = self.running is None, boot
        self._event(boot)
        self.note("boot", self._running_text())
        if not first or not boot.ready:
            self.did.append(self._running_text())
        return boot

    def _running_text(self) -> str:
        boot = self.running
        if boot is None or not boot.ready:
            return "not ready" if boot is None else boot.evidence
        return f"runs {boot.version} in slot {boot.slot} after {boot.elapsed_s:.1f} s"

    def _show(self, line: Line) -> None:
        """Show the updater's state as it changes. On the pump's thread: nothing is judged here."""
        if line.direction == "RX" and (match := self.uut.signs.state.search(line.text)):
            self.say(match["name"])

    def _harvest(self) -> None:
        """Take the console's new lines into the events, before any event of our own."""
        pump = self.machine.pump
        lines = pump.slice(self._harvested).lines
        for line in lines:
            if line.direction == "RX":
                self._heard(line)
        if lines:
            self._harvested = lines[-1].position + 1

    def _heard(self, line: Line) -> None:
        at_s = (line.monotonic_ns - self.started_ns) / 1e9
        signs = self.uut.signs
        if match := signs.state.search(line.text):
            self.moments.append(Moment(at_s, "updater", f"state {match['name']}"))
            if match["name"] == self.uut.commit_state and (artifact := self._on_trial()):
                self.events.append(CommitReached(artifact))
        elif match := signs.committed.search(line.text):
            self.moments.append(Moment(at_s, "updater", line.text.strip()))
            self.events.append(Committed(match["name"], match["slot"]))
        elif NOTEWORTHY.search(line.text):
            self.moments.append(Moment(at_s, "console", line.text.strip()))

    def _on_trial(self) -> str | None:
        """The artifact whose update is under way."""
        for event in reversed(self.events):
            if isinstance(event, InstallStarted):
                return event.artifact
        return None

    def _event(self, event: Event) -> None:
        self._harvest()
        self.events.append(event)
        self.on_event(event)

    @contextlib.contextmanager
    def _step(self, text: str, source: str) -> Iterator[None]:
        """A step: shown live, in the timeline, and in the report."""
        self.say(text)
        self.note(source, text)
        with self.step(text):
            yield
