r"""`SlotStrategy`: bring an A/B device to a state, from wherever a cut left it.

::

                 power on, keys sent until the prompt
        .--------------------------------------------> bootloader
        |
      off  (root: switched off, and verified: `get()` and a silent console)
        |
        '--------------------------------------------> ready
                 power on, READY line with a boot id never seen before, shell

Nothing is taken for granted between two calls: before a transition the strategy asks whether the
state it believes in still holds (power is on, no new boot since). If not, it starts again from
`off`. A failed transition leaves no trace either: the next one starts from `off`.

Two ways to start a device. `transition("ready")` is for a test that needs a working device: it
raises `BootFailure` (an AssertionError: the product did not come up) or `InfrastructureError`
(the rig lost contact: nothing is known about the product). `boot()` and `await_boot()` are for a
test that asks what the device does: the answer is a `BootOutcome`, whatever it is.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import attr
from labgrid.binding import BindingState
from labgrid.driver.exception import ExecutionError
from labgrid.driver.shelldriver import ShellDriver
from labgrid.factory import target_factory
from labgrid.protocol import ConsoleProtocol, PowerProtocol
from labgrid.strategy import GraphStrategy
from pexpect import TIMEOUT

from framework.console import (
    ConsoleDeath,
    ConsoleError,
    ConsoleLost,
    ConsoleMatch,
    ConsolePump,
    ConsoleTimeout,
    Death,
    Marker,
    PatternError,
)
from framework.targets.errors import InfrastructureError, RigError

__all__ = [
    "READY",
    "Boot",
    "BootFailure",
    "BootOutcome",
    "CommandResult",
    "Fate",
    "SlotStrategy",
]

#: The one line that the device prints when its system is up; see images/.
READY = Marker(
    "READY line",
    r"BROWNOUT READY version=(\S{1,128}) slot=([ab]) boot_id=([0-9a-fA-F-]{36})\r{0,2}\n",
)
_KEY_INTERVAL_S = 0.1
_QMP_TIMEOUT_S = 5.0
#: By how much of itself a busy host may lengthen a budget; beyond that nothing is known.
_MOST_EXTENSION = 2.0


class Fate(enum.Enum):
    """What became of a boot."""

    READY = "ready"
    PANIC = "panic"
    SILENT = "silent"
    REBOOT_LOOP = "reboot loop"
    BOOTLOADER = "stuck in the bootloader"
    NOT_READY = "alive, but never ready"
    POWERED_OFF = "switched itself off"
    POWER_LOST = "power was cut"


@dataclass(frozen=True)
class Boot:
    """Who came up: artifact `version`, `slot` (a or b) and the kernel's `boot_id`."""

    version: str
    slot: str
    boot_id: str


@dataclass(frozen=True)
class BootOutcome:
    """What a device did within its boot budget; data, not an exception.

    `boot` is set if `fate` is READY. `starts` counts how often it started (1: at once);
    `deaths` are the death strings on the way (a panic that was rolled back has READY and one
    death). [`start`, `end`) is the stretch of the console, `seconds` how long it took,
    `evidence` its last output.
    """

    fate: Fate
    boot: Boot | None
    starts: int
    deaths: tuple[Death, ...]
    start: int
    end: int
    seconds: float
    evidence: str

    @property
    def ready(self) -> bool:
        """Whether the device came up by itself within its budget."""
        return self.fate is Fate.READY

    def __str__(self) -> str:
        if self.boot is not None:
            who = f"{self.boot.version} in slot {self.boot.slot}"
            return f"ready: {who} after {self.seconds:.1f} s, {self.starts} start(s)"
        deaths = "; ".join(death.text for death in self.deaths[-2:])
        told = f", deaths: {deaths}" if deaths else ""
        return (
            f"{self.fate.value} after {self.seconds:.1f} s, {self.starts} start(s){told}; "
            f"last output: {self.evidence!r}"
        )


class BootFailure(AssertionError):  # noqa: N818 - a verdict on the product, not a program error
    """The product did not come up; `outcome` says what it did instead."""

    def __init__(self, outcome: BootOutcome) -> None:
        super().__init__(f"the device did not boot: {outcome}")
        self.outcome = outcome


@dataclass(frozen=True)
class CommandResult:
    """What a shell command printed (lines of output and errors together) and its exit code."""

    lines: tuple[str, ...]
    code: int

    @property
    def text(self) -> str:
        """The output as one string."""
        return "\n".join(self.lines)


def judge_silence(
    *,
    starts: int,
    loop_limit: int,
    deaths: tuple[Death, ...],
    received: int,
    at_prompt: bool,
    silent_s: float,
    quiet_s: float,
) -> Fate:
    """What a boot that never got ready was, from what was seen when its budget ended."""
    if starts >= loop_limit:
        return Fate.REBOOT_LOOP
    if deaths and "panic" in deaths[-1].marker.name:
        return Fate.PANIC
    if at_prompt:
        return Fate.BOOTLOADER
    if received == 0 or silent_s >= quiet_s:
        return Fate.SILENT
    return Fate.NOT_READY


@target_factory.reg_driver
@attr.s(eq=False)
class SlotStrategy(GraphStrategy):  # type: ignore[misc]
    """States of an A/B device: off, bootloader, ready; see the module text.

    Args (in YAML):
        boot_budget_s: how long the device may take to be ready, fallback included
        bootloader_prompt: pattern of the bootloader's prompt; empty: no such state
        interrupt: the key that stops its countdown
        banner: pattern of the first thing that every start prints; counts starts on boards
            whose console outlives a reset
        silence_s: how long the console must be quiet for the device to count as off
        loop_limit: how many starts within one budget are a reboot loop
        quiet_kernel: whether `ready` keeps kernel messages off the shell
    """

    bindings: ClassVar[dict[str, Any]] = {
        "power": PowerProtocol,
        "console": ConsoleProtocol,
        "shell": ShellDriver,
    }

    #: Called with `power on`, or with what became of a boot, and its seconds; for statistics.
    observers: ClassVar[list[Callable[[str, float], None]]] = []

    boot_budget_s: float = attr.ib(60.0, converter=float)
    bootloader_prompt: str = attr.ib("", attr.validators.instance_of(str))
    interrupt: str = attr.ib(" ", attr.validators.instance_of(str))
    banner: str = attr.ib(r"U-Boot 20\d\d\.\d\d", attr.validators.instance_of(str))
    silence_s: float = attr.ib(1.0, converter=float)
    loop_limit: int = attr.ib(6, attr.validators.instance_of(int))
    quiet_kernel: bool = attr.ib(True, attr.validators.instance_of(bool))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        where = f"targets.{self.target.name}.drivers.{type(self).__name__}"
        if self.boot_budget_s <= 0 or self.silence_s < 0 or self.loop_limit < 2:
            raise RigError(f"{where}: boot_budget_s, silence_s or loop_limit is out of range")
        try:
            self._prompt = (
                Marker("bootloader prompt", self.bootloader_prompt)
                if self.bootloader_prompt
                else None
            )
            self._banner = Marker("boot banner", self.banner)
        except PatternError as error:
            raise RigError(f"{where}: {error}") from error
        self.outcome: BootOutcome | None = None
        self._unadopted: BootOutcome | None = None
        self._seen_boots: set[str] = set()
        self._held: tuple[str, int] | None = None  # state reached, console generation

    # -- labgrid's side ----------------------------------------------------------------------

    def transition(self, state: str, via: Any = None) -> Any:
        """Bring the device to `state`; from `off` again if the present state no longer holds."""
        if self.path and not self.holds():
            self.invalidate()
        return super().transition(state, via)

    def invalidate(self) -> None:
        """Forget everything: the next transition starts from `off`."""
        self._held = None
        super().invalidate()

    def holds(self) -> bool:
        """Whether the state reached last is still true: asked, not remembered."""
        if not self.path or self._held is None:
            return False
        state, generation = self._held
        if state == "off":
            return self._power() is not True
        if self._power() is False or self.pump.gone is not None:
            return False
        return bool(self.pump.generation == generation and not self._rebooted())

    def state_off(self) -> None:
        """Without power, verified."""
        try:
            self._activate(self.power)
        except InfrastructureError:
            force_off = getattr(self.power, "force_off", None)
            if force_off is not None:
                force_off()
            raise
        self.power.off()
        if self._power() is True:
            raise InfrastructureError("the power switch says 'on' after it was switched off")
        self._activate(self.console)
        if not self.pump.wait_silence(self.silence_s, self.silence_s + 10.0):
            raise InfrastructureError(
                "the console still talks after power was switched off",
                evidence=self.pump.tail(),
            )
        require_dead = getattr(self.power, "require_dead", None)
        if require_dead is not None:
            require_dead()
        self._held = ("off", self.pump.generation)

    @GraphStrategy.depends("off")  # type: ignore[untyped-decorator, unused-ignore]
    def state_bootloader(self) -> None:
        """At the bootloader's prompt."""
        if self._prompt is None:
            raise RigError("this rig has no 'bootloader' state (no bootloader_prompt in its file)")
        start = self._switch_on()
        began = time.monotonic()
        while True:
            # The countdown may be zero: then only a key that is there already stops it, so
            # keys are sent all the time; a lost one costs nothing.
            self.pump.write(self.interrupt.encode())
            try:
                self.pump.wait_for(self._prompt, _KEY_INTERVAL_S, start)
                break
            except ConsoleTimeout:
                if time.monotonic() - began > self.boot_budget_s:
                    outcome = self._outcome(self._judge(start), None, start, began)
                    raise BootFailure(outcome) from None
            except ConsoleLost as error:
                raise self._lost(error) from error
        self._held = ("bootloader", self.pump.generation)

    @GraphStrategy.depends("off")  # type: ignore[untyped-decorator, unused-ignore]
    def state_ready(self) -> None:
        """Booted by itself, with a shell."""
        outcome = self.await_boot(self._switch_on(), adopt=False)
        if not outcome.ready:
            raise BootFailure(outcome)
        self._adopt(outcome)

    # -- booting -----------------------------------------------------------------------------

    @property
    def pump(self) -> ConsolePump:
        """The console's pump."""
        pump = getattr(self.console, "pump", None)
        if not isinstance(pump, ConsolePump):
            raise RigError(
                f"{self.console} has no console pump: put a ConsolePumpDriver over it in the rig"
            )
        return pump

    def leave_shell(self) -> None:
        """The device is about to restart behind the shell's back: the next command logs in anew."""
        self._drop_shell()

    @property
    def first_sign(self) -> Marker:
        """The first thing that every start prints."""
        return self._banner

    def boot(self, budget_s: float | None = None, *, adopt: bool = True) -> BootOutcome:
        """Power the device up from `off` (or after a cut) and see what it does.

        A device that is on is switched off first. If it gets ready the strategy is in `ready`, at
        once or (without `adopt`) with the first command.
        """
        if self._power() is not False:
            self.transition("off")
        self.path: list[str] = []
        self._held = None
        return self.await_boot(self._switch_on(), budget_s, adopt=adopt)

    def await_boot(
        self, since: int | None = None, budget_s: float | None = None, *, adopt: bool = True
    ) -> BootOutcome:
        """See what a device that is starting (or about to reset itself) does.

        `since` is the console position before what made it start; default: now. Returns as
        soon as it is READY with a boot id never seen before, is lost to a planned power cut or
        loops; else when the budget (`boot_budget_s`, and what a busy host took of it) ends. Raises
        `InfrastructureError` if the rig itself failed. With `adopt`, READY makes this the `ready`
        state, shell included; without, the first `run` does.
        """
        budget = self.boot_budget_s if budget_s is None else budget_s
        start = self.pump.position if since is None else since
        began = time.monotonic()
        position = start
        while True:
            # What a busy host took from the machine is given back, within bounds.
            granted = min(self._starved(began), _MOST_EXTENSION * budget)
            left = budget + granted - (time.monotonic() - began)
            try:
                # Short turns: a loop is noticed from the count of starts, which no line tells.
                match = self.pump.wait_for(READY, max(0.0, min(left, 1.0)), position, deaths=False)
            except ConsoleTimeout:
                if self._starts(start) >= self.loop_limit or left <= 0:
                    self.require_host(began, _MOST_EXTENSION * budget)
                    self._require_contact()
                    outcome = self._outcome(self._judge(start), None, start, began)
                    break
                continue
            except ConsoleLost as error:
                outcome = self._outcome(self._fate_of_loss(error), None, start, began)
                break
            boot = Boot(*match.groups)
            if boot.boot_id in self._seen_boots:
                position = match.end  # an old boot's line: power was never off
                continue
            self._seen_boots.add(boot.boot_id)
            outcome = self._outcome(Fate.READY, match, start, began)
            break
        self.outcome = outcome
        self._tell(outcome.fate.value, outcome.seconds)
        if outcome.ready:
            self._unadopted = outcome
            if adopt:
                self._adopt(outcome)
        return outcome

    # -- commands ----------------------------------------------------------------------------

    def run(self, command: str, timeout_s: float = 30.0) -> CommandResult:
        """Run `command` in the device's shell.

        Raises `ConsoleLost` at once when power goes, `ConsoleDeath` when the system dies,
        `ConsoleTimeout` when it takes longer; none of them leaves a shell that looks usable.
        """
        generation = self.pump.generation
        began = time.monotonic()
        try:
            if self.shell.state is not BindingState.active and self._unadopted is not None:
                self._adopt(self._unadopted)
            if self.shell.state is not BindingState.active:
                raise ExecutionError(f"no shell: the device is not in state 'ready' ({command!r})")
            if getattr(self.power, "deterministic", False):
                self.power.rest()
            lines, _, code = self.shell.run(command, timeout=timeout_s)
        except TIMEOUT as error:
            self._drop_shell()
            self.require_host(began, timeout_s / 2)
            raise ConsoleTimeout(
                f"end of {command!r}", timeout_s, tail=self.pump.tail(), log=self.pump.log_path
            ) from error
        except ConsoleError as error:
            self._drop_shell()
            if isinstance(error, ConsoleLost) and self.pump.generation == generation:
                self._settle()  # not a restart: find out what it was
            if getattr(self.power, "failure", None) is not None:
                raise InfrastructureError(self.power.failure, evidence=self.pump.tail()) from error
            raise
        return CommandResult(tuple(lines), code)

    def check(self, command: str, timeout_s: float = 30.0) -> str:
        """Run `command`, which must succeed, and return its output."""
        result = self.run(command, timeout_s)
        if result.code != 0:
            raise ExecutionError(
                f"{command!r} ended with exit code {result.code}: {result.text[-400:]}",
                stdout=list(result.lines),
            )
        return result.text

    def require_host(self, since: float, most_s: float) -> None:
        """Raise InfrastructureError if a busy host kept the device from running for too long.

        `since` (`time.monotonic`) is when the wait began; more than `most_s` seconds of it without
        a processor, and a device that was late says nothing about the product.
        """
        starved = self._starved(since)
        if starved > most_s:
            raise InfrastructureError(
                f"the host is too busy: of the last {time.monotonic() - since:.0f} s it kept the "
                f"machine from running for {starved:.0f} s; run fewer things beside it",
                evidence=self.pump.tail(),
            )

    # -- inside ------------------------------------------------------------------------------

    def _activate(self, driver: Any) -> None:
        if driver.state is BindingState.active:
            return
        try:
            self.target.activate(driver)
        except OSError as error:  # pyserial's and requests' errors are such, too
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InfrastructureError(f"{driver} cannot be used: {said}") from error
        except KeyError as error:
            raise self._exporter_gone(error) from error

    def _exporter_gone(self, error: KeyError) -> Exception:
        """What labgrid's KeyError means: it looks into a resource that its exporter took back."""
        gone = [
            type(resource).__name__
            for resource in self.target.resources
            if not getattr(getattr(resource, "_remote_entry", None), "data", True)
        ]
        if not gone:
            return error
        return InfrastructureError(f"the exporter has gone, and with it {', '.join(sorted(gone))}")

    def _power(self) -> bool | None:
        """What the power switch says; None if it cannot tell."""
        get = getattr(self.power, "get", None)
        if get is None or self.power.state is not BindingState.active:
            return None
        try:
            answer = get()
        except NotImplementedError:
            return None
        return None if answer is None else bool(answer)

    def _switch_on(self) -> int:
        """Power on; the console position from which to look at the boot."""
        self._activate(self.power)
        self._activate(self.console)
        self._drop_shell()
        self._unadopted = None
        start = self.pump.position
        self._tell("power on", 0.0)
        try:
            self.power.on()
        except ExecutionError as error:
            raise InfrastructureError(f"power-on failed: {error.msg}") from error
        if self._power() is False:
            self._settle()
            if self.pump.gone is None:
                raise InfrastructureError("the power switch says 'off' after it was switched on")
        return start

    def _tell(self, what: str, seconds: float) -> None:
        for observer in self.observers:
            observer(what, seconds)

    def _adopt(self, outcome: BootOutcome) -> None:
        """The device is ready: a shell on it, and this is state `ready`."""
        self._drop_shell()
        self._unadopted = None
        skip_to = getattr(self.console, "skip_to", None)
        if skip_to is not None:
            # The boot's output is of no interest to the shell, and a command must not wait for
            # its answer from the next boot.
            skip_to(outcome.end, one_boot=True)
        try:
            self.target.activate(self.shell)
            if self.quiet_kernel:
                self.shell.run("dmesg -n 1")
        except TIMEOUT as error:
            self._drop_shell()
            raise BootFailure(
                BootOutcome(
                    Fate.NOT_READY,
                    None,
                    outcome.starts,
                    outcome.deaths,
                    outcome.start,
                    self.pump.position,
                    outcome.seconds,
                    f"READY, but no shell: {self.pump.tail()}",
                )
            ) from error
        except KeyError as error:
            self._drop_shell()
            raise self._exporter_gone(error) from error
        except (ConsoleDeath, ConsoleLost):
            self._drop_shell()
            raise
        self.path = ["off", "ready"]
        self._held = ("ready", self.pump.generation)

    def _drop_shell(self) -> None:
        if self.shell.state is BindingState.active:
            self.target.deactivate(self.shell)
        else:
            # An activation that was cut short left it in the belief that it is logged in, and the
            # next one would not define its `run` in the new system's shell.
            self.shell.on_deactivate()

    def _rebooted(self) -> bool:
        """Whether a boot began since `ready`, on boards whose console outlives a reset."""
        if self.outcome is None:
            return False
        try:
            self.pump.wait_for([self._banner, READY], 0.0, self.outcome.end, deaths=False)
        except ConsoleError:
            return False
        return True

    def _starts(self, since: int) -> int:
        """How often the device started since a position: links attached, or banners seen."""
        data = self.pump.slice(since).data
        banners = sum(1 for _ in self._banner.compiled.finditer(data))
        return max(self.pump.links_since(since), banners, 1)

    def _judge(self, start: int) -> Fate:
        seen = self.pump.slice(start)
        tail = seen.data[-64:]
        return judge_silence(
            starts=self._starts(start),
            loop_limit=self.loop_limit,
            deaths=self.pump.deaths(start),
            received=seen.end - seen.start,
            at_prompt=self._prompt is not None
            and any(match.end() == len(tail) for match in self._prompt.compiled.finditer(tail)),
            silent_s=self.pump.silent_s,
            quiet_s=max(self.silence_s, 5.0),
        )

    def _outcome(
        self, fate: Fate, match: ConsoleMatch | None, start: int, began: float
    ) -> BootOutcome:
        end = match.end if match is not None else self.pump.position
        return BootOutcome(
            fate=fate,
            boot=Boot(*match.groups) if match is not None else None,
            starts=self._starts(start),
            deaths=tuple(death for death in self.pump.deaths(start) if death.start < end),
            start=start,
            end=end,
            seconds=time.monotonic() - began,
            evidence=self.pump.tail(),
        )

    def _fate_of_loss(self, error: ConsoleLost) -> Fate:
        """A lost console is a planned cut, the guest's own doing, or the rig's failure."""
        self._settle()
        if getattr(self.power, "power_loss", None) is not None or self._power_cut():
            return Fate.POWER_LOST
        if "switched itself off" in error.reason:
            return Fate.POWERED_OFF
        raise self._lost(error) from error

    def _power_cut(self) -> bool:
        event = getattr(self.power, "power_lost", None)
        return event is not None and event.is_set()

    def _settle(self) -> None:
        """The console is lost: have the power switch find out why, if it can."""
        settle = getattr(self.power, "settle", None)
        if settle is not None:
            settle()

    def _starved(self, since: float) -> float:
        """How long the host kept the machine from running since then; 0 where nobody knows."""
        starved_s = getattr(self.power, "starved_s", None)
        return float(starved_s(since)) if starved_s is not None else 0.0

    def _lost(self, error: ConsoleLost) -> Exception:
        self._settle()
        failure = getattr(self.power, "failure", None)
        return InfrastructureError(failure or error.reason, evidence=self.pump.tail())

    def _require_contact(self) -> None:
        """A silent device is the product's doing only if the rig itself still works."""
        failure = getattr(self.power, "failure", None)
        if failure is not None:
            raise InfrastructureError(failure, evidence=self.pump.tail())
        if self._power() is False:
            raise InfrastructureError(
                "the device has no power, and nothing was told to take it",
                evidence=self.pump.tail(),
            )
        monitor = getattr(self.power, "monitor_command", None)
        if monitor is not None:
            try:
                monitor("query-status", timeout_s=_QMP_TIMEOUT_S)
            except ExecutionError as error:
                raise InfrastructureError(f"QEMU does not answer: {error.msg}") from error
