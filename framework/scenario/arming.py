"""Arms the vocabulary's faults on a device: from a sentence to something that strikes exactly.

`watching` knows what a trigger is on this device, `striking` what a fault does to it; here the two
are brought together, so that every fault can have every trigger. Where the same recorder or proxy
sees both, the fault strikes with that very operation or byte; else it strikes when the trigger is
heard. Chains (`after`) are armed when their first fault has struck.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Literal

from attrs import define, field

from framework.disk import CacheModel
from framework.faults import (
    After,
    BitFlip,
    BootEnvWrite,
    CacheModelName,
    Fault,
    FaultError,
    NetworkDrop,
    Now,
    OnRecord,
    PowerCut,
    Trigger,
)
from framework.faults.base import features_of
from framework.faults.triggers import DiskTrigger, StreamTrigger
from framework.network import FaultProxy
from framework.report import Moment
from framework.scenario.device import Device, Update
from framework.scenario.striking import Action, action_of
from framework.scenario.watching import (
    Callback,
    Surroundings,
    check_features,
    disk_trigger,
    later_on_disk,
    stream_place,
    watch,
)


@define(eq=False)
class ArmedFault:
    """A fault that waits or has struck.

    Attributes:
        fault: what it is; its `str()` is the sentence of the report.
    """

    fault: Fault
    action: Action = field(repr=False)
    struck_s: float | None = None
    """When it first struck, in seconds into the scenario."""
    _struck: threading.Event = field(factory=threading.Event, repr=False)
    _exact: list[Callable[[], bool]] = field(factory=list, repr=False)
    _disarms: list[Callback] = field(factory=list, repr=False)
    _listeners: list[Callback] = field(factory=list, repr=False)

    def fired(self) -> bool:
        """Whether it struck."""
        return self._struck.is_set() or any(exact() for exact in self._exact)

    def disarm(self) -> None:
        """Take it back; what it did is over."""
        for disarm in self._disarms:
            disarm()
        self._disarms.clear()
        self.action.undo()

    def strike(self) -> None:
        """Let it happen now."""
        self.action.strike()
        self.struck()

    def struck(self) -> None:
        """It has happened: tell those that wait for it."""
        self._struck.set()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()

    def when_struck(self, listener: Callback) -> None:
        """Call `listener` when it strikes, on the thread that sees it; at once if it has."""
        if self.fired():
            listener()
        else:
            self._listeners.append(listener)

    def remember(self, disarm: Callback, exact: Callable[[], bool] | None = None) -> None:
        """How to take it back, and whether it struck where nobody tells us."""
        self._disarms.append(disarm)
        if exact is not None:
            self._exact.append(exact)


@define
class Faults:
    """The faults of one scenario, by a fixture of that name.

    `faults.arm(power_cut("torn").when(slot_write(percent=50)))` arms at once; without a trigger a
    fault strikes at once.
    """

    device: Device
    update: Update
    proxy: FaultProxy
    seed: int
    features: frozenset[str] = frozenset()
    rig: str = ""
    armed: list[ArmedFault] = field(factory=list)
    on_armed: Callable[[], None] = lambda: None
    _later: list[Callback] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.device.before_power = self.power_back
        self.device.restart_expected = self._restart_expected

    def arm(self, fault: Fault) -> ArmedFault:
        """Arm a fault, or let it strike at once if it has no trigger.

        Raises:
            FaultError: the rig lacks a feature for it, or it makes no sense on this device.
        """
        check_features(fault, self.features, self.rig)
        around = Surroundings(self.device, self.update, self.proxy, self.seed, self.features)
        first = self._first_of(fault.trigger)
        armed = ArmedFault(fault, action_of(around, fault))
        self.armed.append(armed)
        armed.when_struck(lambda: self._witness(armed))
        self.on_armed()
        if first is None:
            self._set(around, armed, fault.trigger or Now())
        else:
            assert isinstance(fault.trigger, After)
            then = fault.trigger.then or Now()
            self._chain(first, lambda: self._set(around, armed, then))
        return armed

    def power_cut(self, model: CacheModelName | CacheModel = "kept") -> Pending:
        """The power goes; the disk keeps what the cache model `model` (or its name) says."""
        return Pending(self, PowerCut(model))

    def network(
        self,
        kind: Literal["fin", "reset", "stall", "refuse", "black-hole", "corrupt", "duplicate"],
        lasts_s: float | None = None,
        times: int = 1,
    ) -> Pending:
        """The connection to the server fails."""
        return Pending(self, NetworkDrop(kind, lasts_s, times))

    def bit_flip(self) -> Pending:
        """The disk stores one bit wrong in the passive slot."""
        return Pending(self, BitFlip())

    def clear(self) -> None:
        """All faults gone: the disk, the network and the console are well again."""
        self._later.clear()
        for armed in self.armed:
            armed.disarm()
        self.proxy.restore()

    def power_back(self) -> None:
        """Power is about to be given back after a cut."""
        later, self._later = self._later, []
        for armed in self.armed:
            if armed.fired():
                if armed.action.cuts:
                    armed.struck()
                armed.action.power_back()
        for action in later:
            action()

    def unfired(self) -> list[Fault]:
        """Faults that were armed and never struck."""
        return [armed.fault for armed in self.armed if not armed.fired()]

    def sentence(self) -> str:
        """All faults as one sentence."""
        return "; ".join(str(armed.fault) for armed in self.armed)

    # -- inside ------------------------------------------------------------------------------

    def _witness(self, armed: ArmedFault) -> None:
        """Put a strike on the timeline, where it happened; on the thread that sees it."""
        armed.struck_s = self.device.elapsed_s
        loss = self.device.machine.power_loss
        if armed.action.cuts and loss is not None:
            # The machine had been gone for a while when power was given back.
            armed.struck_s = (loss.monotonic_ns - self.device.started_ns) / 1e9
        self.device.moments.append(Moment(armed.struck_s, "fault", str(armed.fault)))

    def _restart_expected(self) -> bool:
        return any(armed.action.restarts and armed.fired() for armed in self.armed)

    def _first_of(self, trigger: Trigger | None) -> ArmedFault | None:
        """The armed fault that a chain waits for."""
        if not isinstance(trigger, After):
            return None
        for armed in reversed(self.armed):
            if armed.fault == trigger.first:
                return armed
        raise FaultError(f"{trigger}: that fault is not armed")

    def _chain(self, first: ArmedFault, begin: Callback) -> None:
        if first.action.cuts:
            # What is armed while the power goes is lost with it.
            def wait() -> None:
                if first.fired():
                    begin()
                else:
                    self._later.append(wait)

            self._later.append(wait)
        else:
            first.when_struck(begin)

    def _set(self, around: Surroundings, armed: ArmedFault, trigger: Trigger) -> None:
        parts = later_on_disk(trigger)
        if parts is not None:
            state, inner = parts
            armed.remember(watch(around, state, lambda: self._set(around, armed, inner)))
            return
        action = armed.action
        if isinstance(trigger, DiskTrigger) and action.on_disk is not None:
            where = disk_trigger(around, trigger)
            inside = isinstance(trigger, BootEnvWrite | OnRecord)
            fired, disarm = action.on_disk(where, inside, armed.struck)
            armed.remember(disarm, fired)
        elif isinstance(trigger, StreamTrigger) and action.on_stream is not None:
            at_byte, direction = stream_place(around, trigger)
            armed.remember(action.on_stream(at_byte, direction, armed.struck))
        else:
            armed.remember(watch(around, trigger, armed.strike))


@define
class Pending:
    """A fault that has no trigger yet."""

    faults: Faults
    fault: Fault

    def when(self, trigger: Trigger) -> ArmedFault:
        """Arm the fault at `trigger`.

        Raises:
            FaultError: this fault can't have such a trigger.
        """
        return self.faults.arm(self.fault.when(trigger))


def missing_features(faults: Iterable[object], features: frozenset[str]) -> frozenset[str]:
    """What a rig lacks for the faults and triggers among the parameters of a scenario."""
    missing = frozenset[str]()
    for one in faults:
        if isinstance(one, Fault):
            missing |= one.lacks(features)
        elif isinstance(one, Trigger):
            missing |= features_of(one) - features
    return missing
