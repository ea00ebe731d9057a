"""`SwitchedBoardDriver`: a board behind a power head and a serial line, as scenarios want it.

It stands on labgrid's own drivers (any PowerProtocol as the switch, `ConsolePumpDriver` over a
SerialDriver, a digital output as the recovery line) and adds what they leave open:

* A switch that does not answer is an InfrastructureError within `switch_timeout_s` (labgrid's HTTP
  backends wait for ever), and nothing more is asked of it until it has answered.
* Power can go at a line of the console (`trip`): the switch is told on a thread of its own, past
  labgrid's `@step`, which is not thread-safe; then the console must fall silent; only then is it a
  power cut. A console that talks on (a relay that sticks), or a head that fails, is `failure`.
* When the power went is known only as far as can be seen: after the last byte of the console, and
  before the head answered (`last_cut_between_s`, in seconds after the trigger).
* A serial line that was lost (an adapter that vanished) is opened again before power comes back.

What a board's drive keeps of its cache is its own affair: no cache model, no recorder.

    switched off  --on()-->  on  --trip()-->  cutting  --silent-->  power_lost is set
         ^------off()--------'                    '--talks on, or no answer--> `failure`
"""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import attr
from labgrid.binding import BindingState
from labgrid.driver.common import Driver
from labgrid.factory import target_factory
from labgrid.protocol import DigitalOutputProtocol, PowerProtocol

from framework.console import ConsoleError, ConsolePump
from framework.console.driver import ConsolePumpDriver
from framework.disk import DiskError
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.qemu import PowerLoss

__all__ = ["SwitchedBoardDriver"]

_SILENT_S = 0.5  # a UART's buffers and ser2net's are empty long before
_DRAIN_S = 5.0
_DEVICE_NODE = re.compile(r"/dev/[A-Za-z0-9/_.-]+")


@target_factory.reg_driver
@attr.s(eq=False)
class SwitchedBoardDriver(Driver, PowerProtocol):  # type: ignore[misc]
    """A real board's power, console and recovery; see the module text.

    Args (in YAML):
        recipe: whose images it runs (images/recipes); their name is the artifacts' device type
        disks: the board's device node of each disk of the recipe, e.g. `{vda: /dev/mmcblk0}`
        golden: the variant that the recovery line puts into slot a, and that stands there else
        switch_timeout_s: how long the power head may take to answer
        min_off_s: how long power stays off at least (capacitors)
        recovery_attempts: how often a board that does not come up is recovered before giving up
        recovery_timeout_s: how long one recovery may take
        probe_off: whether a newline on the console, which nothing may echo, is part of "off"; turn
            it off for a serial adapter whose open input hears its own output
    """

    bindings: ClassVar[dict[str, Any]] = {
        "switch": PowerProtocol,
        "console": ConsolePumpDriver,
        "recovery": {DigitalOutputProtocol, None},
    }
    #: Above the switch it stands on, for everything that binds to "the power".
    priorities: ClassVar[dict[Any, int]] = {PowerProtocol: 10}

    recipe: str = attr.ib(validator=attr.validators.instance_of(str))
    disks: Any = attr.ib(factory=dict)
    golden: str = attr.ib("v1", attr.validators.instance_of(str))
    switch_timeout_s: float = attr.ib(15.0, converter=float)
    min_off_s: float = attr.ib(0.0, converter=float)
    recovery_attempts: int = attr.ib(2, attr.validators.instance_of(int))
    recovery_timeout_s: float = attr.ib(120.0, converter=float)
    probe_off: bool = attr.ib(True, attr.validators.instance_of(bool))

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_settings(f"targets.{self.target.name}.drivers.{type(self).__name__}", self.settings())
        self.failure: str | None = None
        self.power_loss: PowerLoss | None = None
        self.power_lost = threading.Event()
        self.last_cut = None
        self.cycles = 0
        self.last_cut_between_s: tuple[float, float] | None = None
        self._lock = threading.RLock()
        self._order = threading.Lock()
        self._off_since = time.monotonic()
        self._asked: threading.Thread | None = None
        self._cutting: threading.Thread | None = None

    def settings(self) -> dict[str, Any]:
        """What the rig file says of it."""
        names = ("disks", "switch_timeout_s", "min_off_s", "recovery_attempts")
        return {name: getattr(self, name) for name in (*names, "recovery_timeout_s")}

    def on_activate(self) -> None:
        """The console below drains already."""
        self.failure = None

    # -- what the strategy and a `Device` ask -------------------------------------------------

    @property
    def pump(self) -> ConsolePump:
        """What drains its console."""
        pump = self.console.pump
        assert isinstance(pump, ConsolePump)
        return pump

    @property
    def recorder(self) -> NoReturn:
        """There is none. DiskError."""
        raise DiskError("this board's disks are not recorded")

    def get(self) -> bool:
        """What the power head says. NotImplementedError where it can't say anything."""
        if not callable(getattr(self.switch, "get", None)):
            raise NotImplementedError(f"{self.switch} cannot tell whether the power is on")
        return bool(self._ask("get"))

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    def on(self) -> None:
        """Switch on, after the least time without power; the console drains by then."""
        with self._lock:
            self.settle()
            self._open_console()
            time.sleep(max(0.0, self.min_off_s - (time.monotonic() - self._off_since)))
            self.failure = self.power_loss = None
            self.power_lost.clear()
            self.cycles += 1
            self._ask("on")

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    def off(self) -> None:
        """Switch off; whoever wants to be sure waits for the console's silence, too."""
        with self._lock:
            self.settle()
            self._ask("off")  # first: a serial line that is gone must not keep the power on
            self._off_since = time.monotonic()
            self._open_console()

    def force_off(self) -> None:
        """Take the power from a board whose console can't be had; whether it worked is unknown."""
        with contextlib.suppress(Exception):
            if self.switch.state is not BindingState.active:
                self.target.activate(self.switch)
            self._ask("off")

    @Driver.check_active  # type: ignore[untyped-decorator, unused-ignore]
    def cycle(self) -> None:
        """Off and on again."""
        self.off()
        self.on()

    def trip(self, cause: str, model: object = "kept", seed: int = 0) -> None:
        """Cut the power now, from any thread, without blocking; wait for `power_lost`.

        `model` and `seed` say nothing here: the drive is the board's own.
        """
        del model, seed
        if self._cutting is not None and self._cutting.is_alive():
            return
        began_ns = time.monotonic_ns()
        self._cutting = threading.Thread(
            target=self._cut, args=(cause, began_ns), name="power cut", daemon=True
        )
        self._cutting.start()

    def require_dead(self) -> None:
        """InfrastructureError if something still answers on the console of a board without power.

        A relay that sticks is not seen on a board that waits at a prompt: it is silent anyway. A
        newline is echoed by everything that lives, and by nothing that does not.
        """
        if not self.probe_off:
            return
        since = self.pump.position
        try:
            self.pump.write(b"\n")
        except ConsoleError:
            return  # there is no line: whoever needs one finds out
        deadline = time.monotonic() + _SILENT_S
        while time.monotonic() < deadline:
            if self.pump.position > since:
                raise InfrastructureError("the console still answers after the power was cut")
            time.sleep(_SILENT_S / 20)

    def settle(self) -> None:
        """Wait until a cut that has begun has ended, however it does."""
        cutting = self._cutting
        if cutting is not None and cutting is not threading.current_thread():
            cutting.join(self.switch_timeout_s + 2 * _DRAIN_S)

    def fresh(self, images: Mapping[str, Path] | None = None, pflash: Path | None = None) -> None:
        """Put the golden image back, if the rig has a recovery line; the power must be off."""
        del images, pflash  # what is golden lies on the recovery's side
        if self.recovery is None:
            return

        def restore() -> bool:
            _plain(self.recovery, "set")(True)
            done = bool(_plain(self.recovery, "get")())
            _plain(self.recovery, "set")(False)
            return done

        if not self._within("the recovery", restore, self.recovery_timeout_s):
            raise InfrastructureError("the recovery line did not take the order to restore")

    def send(self, data: bytes) -> None:
        """Type something on the console, from any thread."""
        self.pump.write(data)

    # -- inside -------------------------------------------------------------------------------

    def _open_console(self) -> None:
        try:
            self.console.reconnect()
        except Exception as error:
            raise InfrastructureError(f"the serial line cannot be opened: {error}") from error

    def _ask(self, what: str) -> Any:
        return self._within("the power head", _plain(self.switch, what), self.switch_timeout_s)

    def _within(self, who: str, action: Callable[[], Any], timeout_s: float) -> Any:
        """The answer to `action`, or InfrastructureError if there is none in time.

        One order at a time: a cut's thread may want the head while it is being asked.
        """
        deadline = time.monotonic() + timeout_s
        if not self._order.acquire(timeout=timeout_s):
            raise InfrastructureError(f"{who} did not answer within {timeout_s:g} s")
        try:
            return self._answer(who, action, deadline, timeout_s)
        finally:
            self._order.release()

    def _answer(
        self, who: str, action: Callable[[], Any], deadline: float, timeout_s: float
    ) -> Any:
        if self._asked is not None and self._asked.is_alive():
            raise InfrastructureError(f"{who} still owes the answer to an earlier order")
        answer: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(action())
            except Exception as error:  # noqa: BLE001 - told to whoever asked
                failed.append(error)

        self._asked = asked = threading.Thread(target=run, name=who, daemon=True)
        asked.start()
        asked.join(max(0.0, deadline - time.monotonic()))
        if asked.is_alive():
            raise InfrastructureError(f"{who} did not answer within {timeout_s:g} s")
        if failed:
            said = f"{type(failed[0]).__name__}: {failed[0]}".splitlines()[0]
            raise InfrastructureError(f"{who} failed: {said}") from failed[0]
        return answer[0]

    def _cut(self, cause: str, began_ns: int) -> None:
        pump = self.pump
        try:
            self._ask("off")
            self._off_since = answered_s = time.monotonic()
            if not pump.wait_silence(_SILENT_S, _DRAIN_S):
                raise InfrastructureError("the console still talks after the power was cut")
            self.require_dead()
        except InfrastructureError as error:
            self.failure = str(error).removeprefix("INFRASTRUCTURE: ")
            pump.lost(self.failure)
            return
        began_s = began_ns / 1e9
        first_s = max(0.0, time.monotonic() - pump.silent_s - began_s)
        self.last_cut_between_s = (first_s, max(first_s, answered_s - began_s))
        self.power_loss = PowerLoss(
            f"{cause}; gone {first_s:.3f} to {self.last_cut_between_s[1]:.3f} s later",
            None,
            began_ns,
        )
        self.power_lost.set()
        pump.lost(self.power_loss.cause)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.target.name})"


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """`RigError` for the first setting of a switched board that makes no sense."""
    disks = settings.get("disks", {})
    if not isinstance(disks, Mapping) or not all(
        isinstance(node, str) and _DEVICE_NODE.fullmatch(node) for node in disks.values()
    ):
        raise RigError(f"{where}.disks: must be like {{vda: /dev/mmcblk0}}")
    for name in ("switch_timeout_s", "recovery_timeout_s", "recovery_attempts"):
        if settings.get(name, 1) <= 0:
            raise RigError(f"{where}.{name}: must be positive")
    if settings.get("min_off_s", 0) < 0:
        raise RigError(f"{where}.min_off_s: must not be negative")


def _plain(driver: Any, name: str) -> Callable[..., Any]:
    """A driver's method without labgrid's decorators: `@step` is not thread-safe (issue 1851)."""
    method = inspect.unwrap(getattr(type(driver), name))
    return lambda *arguments: method(driver, *arguments)
