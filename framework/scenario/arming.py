"""Arms the vocabulary's faults on a device: from a sentence to a trigger that is exact.

Disk triggers go to the recorder, which fires before the operation is carried out. Console triggers
stop the machine when the line arrives, some operations later. Network faults go to the proxy.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Literal

from attrs import define, field

from framework.console import Line
from framework.disk import SECTOR, Arriving, CacheModel, Inject, Kind, TornSector, model_from
from framework.disk import Armed as ArmedOnDisk
from framework.disk import Fault as DiskFault
from framework.disk import Trigger as DiskTrigger
from framework.disk.triggers import Counter
from framework.faults import (
    AfterSwitch,
    AtState,
    BitFlip,
    BootEnvWrite,
    ConsoleSays,
    DiskOperation,
    Fault,
    FaultError,
    NetworkDrop,
    OnRecord,
    PowerCut,
    SlotWrite,
)
from framework.faults.vocabulary import CacheModelName, Trigger
from framework.network import FaultProxy, NetworkFault
from framework.scenario.device import Device, Update
from framework.scenario.manifest import Extent
from framework.verdict.oracle import other

TORN_SECTOR = 2
"""The sector of an environment copy in whose write the power goes."""


@define
class ArmedFault:
    """A fault that waits or has struck.

    Attributes:
        fault: what it is; its `str()` is the sentence of the report.
        fired: whether it struck.
    """

    fault: Fault
    fired: Callable[[], bool]
    disarm: Callable[[], None] = field(repr=False)


@define
class Faults:
    """The faults of one scenario, by a fixture of that name.

    `faults.power_cut(model="torn").when(slot_write(percent=50))` arms at once.
    """

    device: Device
    update: Update
    proxy: FaultProxy
    seed: int
    armed: list[ArmedFault] = field(factory=list)
    on_armed: Callable[[], None] = lambda: None

    def power_cut(self, model: CacheModelName | CacheModel = "kept") -> Pending:
        """The power goes; the disk keeps what the cache model `model` (or its name) says."""
        return Pending(self, PowerCut(model))

    def network(
        self,
        kind: Literal["fin", "reset", "stall", "refuse", "corrupt"],
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
        for armed in self.armed:
            armed.disarm()
        self.proxy.restore()

    def unfired(self) -> list[Fault]:
        """Faults that were armed and never struck."""
        return [armed.fault for armed in self.armed if not armed.fired()]

    def sentence(self) -> str:
        """All faults as one sentence."""
        return "; ".join(str(armed.fault) for armed in self.armed)


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
        fault = self.fault.when(trigger)
        if isinstance(fault, NetworkDrop):
            armed = _arm_network(self.faults, fault)
        elif isinstance(fault, BitFlip):
            armed = _arm_bit_flip(self.faults, fault)
        else:
            armed = _arm_power_cut(self.faults, fault)
        self.faults.armed.append(armed)
        self.faults.on_armed()
        return armed


def _arm_network(faults: Faults, fault: NetworkDrop) -> ArmedFault:
    assert fault.trigger is not None
    size = faults.update.path.stat().st_size
    at_byte = math.floor(size * fault.trigger.percent / 100)
    fired = faults.proxy.arm(
        NetworkFault(fault.kind, at_byte, times=fault.times, lasts_s=fault.lasts_s)
    )
    return ArmedFault(fault, fired.is_set, lambda: None)


def _arm_bit_flip(faults: Faults, fault: BitFlip) -> ArmedFault:
    assert fault.trigger is not None
    extent = _passive_slot(faults.device)
    place = math.floor((faults.update.image.size_bytes - 1) * fault.trigger.percent / 100)
    armed = faults.device.machine.recorder.arm(
        DiskTrigger.block_range(extent.device, extent.offset + place, 1),
        Inject(DiskFault.bit_flip(extent.device, extent.offset + place, bit=faults.seed % 8)),
    )
    return ArmedFault(fault, armed.fired.is_set, armed.disarm)


def _arm_power_cut(faults: Faults, fault: PowerCut) -> ArmedFault:
    trigger = fault.trigger
    device = faults.device
    model = fault.model if isinstance(fault.model, CacheModel) else model_from(fault.model)
    if isinstance(trigger, SlotWrite):
        extent = _passive_slot(device)
        count = max(1, math.ceil(faults.update.image.size_bytes * trigger.percent / 100))
        where = DiskTrigger.bytes_written(count, extent.device, extent.offset, extent.length)
    elif isinstance(trigger, AfterSwitch):
        where = _later(_environment_write(device, 1), trigger.operations)
    elif isinstance(trigger, BootEnvWrite):
        return _inside_environment_write(faults, fault, trigger, model)
    elif isinstance(trigger, OnRecord):
        record = device.uut.record(trigger.name)
        where = DiskTrigger.content(f"the record of {trigger.name}", record)
        armed = device.machine.arm_cut(where, model, faults.seed, inside=True)
        return ArmedFault(fault, armed.fired.is_set, armed.disarm)
    elif isinstance(trigger, DiskOperation):
        return _inside_once_entered(
            faults, fault, trigger.after, _any_operation(trigger.nth), model
        )
    else:
        assert isinstance(trigger, AtState | ConsoleSays)
        said = str(fault)
        return _on_console(
            faults, fault, trigger, lambda: device.machine.trip(said, model, faults.seed)
        )
    armed = device.machine.arm_cut(where, model, faults.seed)
    return ArmedFault(fault, armed.fired.is_set, armed.disarm)


def _inside_environment_write(
    faults: Faults, fault: PowerCut, trigger: BootEnvWrite, model: CacheModel
) -> ArmedFault:
    """The write in flight is the newest, and the one that is torn."""
    if model == TornSector():
        model = TornSector(newest=True)
    machine = faults.device.machine
    where = _environment_write(faults.device, trigger.nth)
    if trigger.after is None:
        armed = machine.arm_cut(where, model, faults.seed, inside=True)
        return ArmedFault(fault, armed.fired.is_set, armed.disarm)
    return _inside_once_entered(faults, fault, AtState(trigger.after), where, model)


def _inside_once_entered(
    faults: Faults, fault: PowerCut, state: AtState, where: DiskTrigger, model: CacheModel
) -> ArmedFault:
    """Arm a cut inside the operation that meets `where`, counted from the entry of `state`."""
    on_disk: list[ArmedOnDisk] = []
    machine = faults.device.machine
    waiting = _on_console(
        faults,
        fault,
        state,
        lambda: on_disk.append(machine.arm_cut(where, model, faults.seed, inside=True)),
    )

    def disarm() -> None:
        waiting.disarm()
        for armed in on_disk:
            armed.disarm()

    return ArmedFault(fault, lambda: any(a.fired.is_set() for a in on_disk), disarm)


def _any_operation(nth: int) -> DiskTrigger:
    """The nth operation from now, whatever it is."""
    return DiskTrigger(f"operation {nth} from here", lambda: _Countdown(nth))


@dataclasses.dataclass
class _Countdown(Counter):
    """Fires on the nth operation."""

    nth: int

    def feed(self, arriving: Arriving) -> bool:
        """Take the next operation."""
        self.nth -= 1
        return self.nth == 0


@dataclasses.dataclass
class _Touches(Counter):
    """Fires on the nth operation that touches one of the ranges (device, offset, length)."""

    ranges: tuple[tuple[str, int, int], ...]
    nth: int

    def feed(self, arriving: Arriving) -> bool:
        """Take the next operation."""
        if any(
            arriving.device == device
            and arriving.kind is not Kind.FLUSH
            and arriving.offset < offset + length
            and offset < arriving.offset + arriving.length
            for device, offset, length in self.ranges
        ):
            self.nth -= 1
            return self.nth == 0
        return False


def _environment_write(device: Device, nth: int) -> DiskTrigger:
    """The nth write of the boot environment, whichever copy.

    In a raw copy the place is one sector near its start: an SD card gets a copy sector by sector,
    and each save counts once. Copies in files can lie anywhere on their partition.
    """
    manifest = device.manifest
    raw = not manifest.environment_paths
    ranges = tuple(
        (copy.device, copy.offset + TORN_SECTOR * SECTOR, SECTOR)
        if raw
        else (copy.device, copy.offset, copy.length)
        for copy in manifest.environment
    )
    return DiskTrigger(
        f"boot-environment write {nth}",
        lambda: _Touches(ranges, nth),
        frozenset(name for name, _, _ in ranges),
    )


@dataclasses.dataclass
class _Later(Counter):
    """Fires some operations after the one on which `first` fires."""

    first: Counter
    operations: int
    counting: bool = False

    def feed(self, arriving: Arriving) -> bool:
        """Take the next operation."""
        if self.counting:
            self.operations -= 1
            return self.operations == 0
        self.counting = self.first.feed(arriving)
        return False


def _later(trigger: DiskTrigger, operations: int) -> DiskTrigger:
    """The `operations`-th operation after the one that meets `trigger`."""
    return dataclasses.replace(
        trigger,
        text=f"{operations} operations after {trigger.text}",
        new_counter=lambda: _Later(trigger.new_counter(), operations),
    )


def _on_console(
    faults: Faults,
    fault: PowerCut,
    trigger: AtState | ConsoleSays,
    action: Callable[[], object],
) -> ArmedFault:
    """Act when the line comes. On the pump's thread, so the action must not block."""
    device = faults.device
    fired = threading.Event()

    left = trigger.nth if isinstance(trigger, AtState) else 1

    def heard(line: Line) -> None:
        nonlocal left
        if line.direction == "RX" and not fired.is_set() and _says(device, line.text, trigger):
            left -= 1
            if left == 0:
                fired.set()
                action()

    return ArmedFault(fault, fired.is_set, device.machine.pump.add_listener(heard))


def _says(device: Device, text: str, trigger: AtState | ConsoleSays) -> bool:
    if isinstance(trigger, ConsoleSays):
        return trigger.text in text
    match = device.uut.signs.state.search(text)
    return match is not None and match["name"] == trigger.name


def _passive_slot(device: Device) -> Extent:
    """The extent of the slot that the next update goes to."""
    active = device.last_look.environment.boot_slot
    if active is None:
        raise FaultError("the boot environment names no slot, so there is no passive one")
    return device.manifest.slots[other(active)]
