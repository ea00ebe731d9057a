"""A simulated violation on another rig: its faults in the vocabulary's words, at the same places.

Operation 57 of a simulated drive is no operation of a real one; what it *was* is: the second write
of the boot environment in the state ArtifactCommit, or the write with which 60 % of the image were
in the slot. The lifetime is lived through once more to see what each fault struck (`trace`), and
said so again as triggers. Operations on the data partition are counted from the entry of their
state: a kernel does more of them than the model, so there the place is only near.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from framework.campaign.lifetimes import Fault as SimulatedFault
from framework.campaign.lifetimes import Operation, Schedule, trace
from framework.console import ConsoleLost
from framework.disk.models import CacheModel, model_from
from framework.faults import (
    Fault,
    FaultError,
    Trigger,
    after,
    bit_flip,
    boot_env_write,
    connection,
    console,
    downloaded,
    power_cut,
    slot_write,
    state,
    storage_error,
)
from framework.network import FaultProxy
from framework.scenario.arming import Faults
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update
from framework.targets.rig import rig_features
from framework.targets.simulated.laboratory import Laboratory
from framework.verdict import Verdict

VARIANTS: Final = {"well": "v2", "panics": "panics", "hangs": "hangs", "unhealthy": "unhealthy"}
AREAS: Final = {
    "environment": "boot environment",
    "slot a": "passive slot",
    "slot b": "passive slot",
    "data": "data",
}
RECOVERIES: Final = 40


def variants_of(schedule: Schedule) -> tuple[str, ...]:
    """The images that a rig needs for a schedule."""
    return tuple(sorted({"v1", "v2", VARIANTS[schedule.behaviour]}))


def faults_of(laboratory: Laboratory, schedule: Schedule) -> list[Fault]:
    """The faults of a schedule for any rig, in the order in which they strike.

    Raises:
        FaultError: one of them has no counterpart.
    """
    if schedule.managed:
        raise FaultError("a deployment is simulated only; an update by hand is promoted")
    if schedule.module:
        raise FaultError("a package for an update module is simulated only; an image is promoted")
    operations = {seen.number: seen for seen in trace(laboratory, schedule)}
    size = len(laboratory.artifact("v2", schedule.behaviour))
    made: list[Fault] = []
    for fault in sorted(schedule.faults):
        if fault.kind in ("break", "corrupt"):
            drop = connection("fin") if fault.kind == "break" else connection("corrupt")
            share = 100 * (fault.at % size) / size
            made.append(drop.when(downloaded(percent=max(1, round(share)))))
            continue
        struck = operations.get(fault.at)
        if struck is None:
            continue  # beyond the lifetime's end
        when = _trigger(list(operations.values()), struck)
        if made and made[-1].what().startswith("power cut"):
            # What is armed before a cut is lost with the power.
            when = after(made[-1], when)
        made.append(_fault(fault, struck).when(when))
    return made


def _fault(fault: SimulatedFault, struck: Operation) -> Fault:
    if fault.kind == "cut":
        return power_cut(_model(fault.model))
    if fault.kind == "flip":
        if not struck.area.startswith("slot"):
            raise FaultError(f"{fault}: only a bit of the image can be flipped elsewhere")
        return bit_flip()
    if fault.kind == "kill":
        raise FaultError(f"{fault}: a process is killed at an operation in the simulation only")
    if struck.kind == "flush":
        return storage_error("flush", count=1)
    return storage_error("write", area=AREAS[struck.area], count=1)


def _model(name: str) -> CacheModel:
    kind, _, unit = name.partition(":")
    return model_from(kind, {"granularity": int(unit)} if unit else None)


def _trigger(operations: list[Operation], struck: Operation) -> Trigger:
    same_state: list[Operation] = []
    for seen in operations:
        if seen.number > struck.number:
            break
        if not same_state or same_state[-1].state == seen.state:
            same_state.append(seen)
        else:
            same_state = [seen]
    if struck.area.startswith("slot"):
        slot = [seen for seen in operations if seen.area == struck.area]
        done = sum(seen.length for seen in slot if seen.number <= struck.number)
        return slot_write(percent=max(1, round(100 * done / sum(seen.length for seen in slot))))
    if struck.state == "Idle":
        return console("BROWNOUT INIT slot=")
    if struck.area == "environment":
        writes = [seen for seen in same_state if seen.area == "environment"]
        return boot_env_write(len(writes), after=struck.state)
    return state(struck.state).at(operations=len(same_state))


def promote(
    schedule: Schedule, chosen: list[Fault], bench: Bench, rig: Path, say: Callable[[str], None]
) -> Verdict:
    """Live through a schedule, whose faults are `chosen`, on a bench's device; the verdict.

    Raises:
        FaultError: the rig can't do one of the faults.
    """
    with FaultProxy((bench.server.host, bench.server.port)) as proxy:
        update = bench.update(VARIANTS[schedule.behaviour], proxy.port)
        device = bench.device("v1", say, lambda text: contextlib.nullcontext())
        with contextlib.closing(device):
            device.look("at the beginning")
            device.boot()
            faults = Faults(device, update, proxy, schedule.seed, rig_features(rig), rig.name)
            device.before_retry = faults.clear
            for fault in chosen:
                say(f"fault: {fault}")
                faults.arm(fault)
            for action in schedule.actions:
                _act(device, update, action)
            for fault in faults.unfired():
                say(f"never struck: {fault}")
            last = update if schedule.behaviour == "well" else bench.update("v2", proxy.port)
            _recover(device)
            if device.running is not None and device.running.ready:
                device.reboot()
            _recover(device)
            device.retry(last)
            faults.clear()
            return device.verdict()


def _act(device: Device, update: Update, action: str) -> None:
    _recover(device)
    if device.running is None or not device.running.ready:
        return
    if action == "install":
        device.update(update)
    elif action == "stage":
        device.install(update)
    elif action == "restart":
        device.reboot()
    else:
        order = device.uut.commit() if action == "commit" else device.uut.rollback()
        try:
            device.command(order)
        except ConsoleLost:
            device.power_went()


def _recover(device: Device) -> None:
    for _ in range(RECOVERIES):
        if device.machine.get():
            return
        device.restore()
