"""From a trigger to the thing that is watched: the recorder, the proxy, the console, the monitor.

A disk trigger becomes one of the recorder's, which fires before the operation is carried out; a
stream trigger becomes a byte of the proxy's. A console line is heard some operations after it was
printed. Everything is called back on the thread that saw it, so callbacks must not block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from urllib.parse import urlsplit

from attrs import define

from framework.console import Line
from framework.disk import SECTOR, Notify
from framework.disk import Trigger as RecorderTrigger
from framework.faults import (
    AfterSwitch,
    AtState,
    BootEnvWrite,
    ConsoleSays,
    Downloaded,
    Fault,
    FaultError,
    MachineEvent,
    MissingFeatureError,
    Now,
    NthFlush,
    OnRecord,
    Operation,
    SlotWrite,
    StreamByte,
    Trigger,
    Writes,
)
from framework.faults.triggers import Direction, DiskTrigger, StreamTrigger
from framework.network import FaultProxy, NetworkFault
from framework.scenario.device import Device, Update
from framework.scenario.manifest import Extent
from framework.targets.qemu import QmpEvent
from framework.targets.uut import ConsoleSigns
from framework.verdict.oracle import other

TORN_SECTOR = 2
"""The sector of an environment copy in whose write the power goes."""

Callback = Callable[[], None]


@define
class Surroundings:
    """What faults and triggers act on.

    Attributes:
        device: the device.
        update: the update that the scenario installs.
        proxy: what its network goes through.
        seed: of every random choice.
        features: the labgrid features that the rig has.
    """

    device: Device
    update: Update
    proxy: FaultProxy
    seed: int
    features: frozenset[str]

    def server_name(self) -> str:
        """The name by which the device knows this machine."""
        return urlsplit(self.update.url).hostname or ""


def check_features(fault: Fault, features: frozenset[str], rig: str) -> None:
    """Refuse a fault that this rig can't do.

    Raises:
        MissingFeatureError: it names the features that the rig lacks.
    """
    missing = sorted(fault.lacks(features))
    if missing:
        raise MissingFeatureError(
            f"{fault}: needs the feature {', '.join(missing)}, which the rig {rig} does not have"
        )


def watch(around: Surroundings, trigger: Trigger, callback: Callback) -> Callback:
    """Have `callback` called at `trigger`, once; returns what stops that.

    Raises:
        FaultError: the trigger makes no sense on this device.
    """
    if isinstance(trigger, Now):
        callback()
        return lambda: None
    if isinstance(trigger, DiskTrigger):
        where = disk_trigger(around, trigger)
        return around.device.machine.recorder.arm(where, Notify(callback)).disarm
    if isinstance(trigger, StreamTrigger):
        at_byte, direction = stream_place(around, trigger)
        watched = around.proxy.arm(NetworkFault("watch", at_byte, direction), callback)
        return lambda: around.proxy.disarm(watched)
    if isinstance(trigger, ConsoleSays | AtState):
        return _listen(around.device, trigger, callback)
    if isinstance(trigger, MachineEvent):
        return _await_event(around.device, trigger, callback)
    raise FaultError(f"{trigger}: nothing watches this")


def later_on_disk(trigger: Trigger) -> tuple[AtState, Trigger] | None:
    """A trigger that begins with a state and then counts on the disk, as its two parts."""
    if isinstance(trigger, BootEnvWrite) and trigger.after is not None:
        return AtState(trigger.after), BootEnvWrite(trigger.nth)
    if isinstance(trigger, AtState) and trigger.percent is not None:
        return AtState(trigger.name, nth=trigger.nth), SlotWrite(trigger.percent)
    if isinstance(trigger, AtState) and trigger.operations is not None:
        return AtState(trigger.name, nth=trigger.nth), Operation(trigger.operations)
    return None


# -- the disk ------------------------------------------------------------------------------------


def disk_trigger(around: Surroundings, trigger: DiskTrigger) -> RecorderTrigger:
    """The recorder's trigger for one of the vocabulary's.

    Raises:
        FaultError: there is no such area.
    """
    device = around.device
    match trigger:
        case SlotWrite(percent=percent):
            slot = area_of(device, "passive slot")[0]
            count = max(1, math.ceil(around.update.image.size_bytes * percent / 100))
            return RecorderTrigger.bytes_written(count, slot.device, slot.offset, slot.length)
        case BootEnvWrite(nth=nth):
            return _environment_write(device, nth)
        case AfterSwitch(operations=operations):
            return RecorderTrigger.later(_environment_write(device, 1), operations)
        case Operation(number=number):
            return RecorderTrigger.operation(number)
        case OnRecord(name=name):
            record = device.uut.record(name)
            return RecorderTrigger.content(f"the record of {name}", record)
        case NthFlush(number=number):
            return RecorderTrigger.nth_flush(number)
        case Writes():
            return _area_write(device, trigger)
        case _:
            raise FaultError(f"{trigger}: no such place on a disk")


def area_of(device: Device, area: str) -> tuple[Extent, ...]:
    """The extents of an area of the disk, by the name that the vocabulary has for it.

    Raises:
        FaultError: there is no such area.
    """
    manifest = device.manifest
    if area == "boot environment":
        return manifest.environment
    if area == "data":
        return (manifest.data,)
    if area in ("passive slot", "active slot"):
        active = device.last_look.environment.boot_slot
        if active is None:
            raise FaultError("the boot environment names no slot, so there is no passive one")
        return (manifest.slots[other(active) if area == "passive slot" else active],)
    slot = manifest.slots.get(area.removeprefix("slot "))
    if slot is None:
        raise FaultError(
            f"{area!r} is no area of the disk; known: boot environment, data, passive slot, "
            "active slot, slot a, slot b"
        )
    return (slot,)


def _area_write(device: Device, trigger: Writes) -> RecorderTrigger:
    ranges = tuple(
        (
            extent.device,
            extent.offset + trigger.offset,
            extent.length - trigger.offset if trigger.length is None else trigger.length,
        )
        for extent in area_of(device, trigger.area)
        if trigger.offset < extent.length
    )
    if not ranges:
        raise FaultError(f"{trigger}: beyond the end of the {trigger.area}")
    return RecorderTrigger.touches(ranges, trigger.nth, str(trigger))


def _environment_write(device: Device, nth: int) -> RecorderTrigger:
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
    return RecorderTrigger.touches(ranges, nth, f"boot-environment write {nth}")


# -- the network ---------------------------------------------------------------------------------


def stream_place(around: Surroundings, trigger: StreamTrigger) -> tuple[int, Direction]:
    """The byte of the proxy's stream at which a trigger is, and the direction."""
    if isinstance(trigger, StreamByte):
        return trigger.number, trigger.direction
    assert isinstance(trigger, Downloaded)
    size = around.update.path.stat().st_size
    return math.floor(size * trigger.percent / 100), "down"


# -- the console and the monitor -----------------------------------------------------------------


def _listen(device: Device, trigger: ConsoleSays | AtState, callback: Callback) -> Callback:
    hears = Ear(device.uut.signs, trigger).hears
    left = [trigger.nth if isinstance(trigger, AtState) else 1]

    def heard(line: Line) -> None:
        if line.direction == "RX" and left[0] and hears(line.text):
            left[0] -= 1
            if left[0] == 0:
                callback()

    return device.machine.pump.add_listener(heard)


class Ear:
    """Recognises the line of a console trigger; a state is left by the next one, or by an end.

    Args:
        signs: the updater's lines.
        trigger: what is listened for.
    """

    def __init__(self, signs: ConsoleSigns, trigger: ConsoleSays | AtState) -> None:
        self._signs = signs
        self._trigger = trigger
        self._inside = False

    def hears(self, text: str) -> bool:
        """Take the next line; whether it is the one."""
        trigger = self._trigger
        if isinstance(trigger, ConsoleSays):
            return trigger.text in text
        entered = self._signs.state.search(text)
        ends = entered is not None or any(sign.search(text) for sign in self._endings())
        if not ends:
            return False
        left = self._inside
        self._inside = entered is not None and entered["name"] == trigger.name
        return left if trigger.edge == "leave" else self._inside

    def _endings(self) -> tuple[re.Pattern[str], ...]:
        signs = self._signs
        return signs.installed, signs.committed, signs.rolled_back, signs.error


def _await_event(device: Device, trigger: MachineEvent, callback: Callback) -> Callback:
    left = [trigger.nth]

    def happened(event: QmpEvent) -> None:
        if event.name == trigger.name:
            left[0] -= 1
            if left[0] == 0:
                callback()

    return device.machine.add_event_listener(happened)
