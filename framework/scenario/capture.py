"""Runs updates on an emulated rig, without a fault, and keeps a recording of them.

The same façade as the scenarios' (`Device`): boot, leave a synced file, install, restart, let the
device commit or roll back by itself. What the run promises on the way goes into the journal as
marks (`framework.explore.timeline`), from the console's own thread, so that each stands between
the operations where it was heard. Only emulated rigs: their disks are recorded.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import asdict

from framework.console import Line
from framework.disk import DiskError, Fault, Inject, JournalReader, Repair, Trigger
from framework.explore.describe import layout_to_values
from framework.explore.ears import Ears
from framework.explore.recording import write_recording
from framework.explore.timeline import SOURCE, FileSynced, Promise, Restarted, to_mark
from framework.network import FaultProxy, ProxyEvent
from framework.scenario.bench import Bench, open_bench_on
from framework.scenario.device import CANARY_PATH, Device, Update
from framework.scenario.layouts import SLOT_REGION, layout_of
from framework.targets.errors import InfrastructureError
from framework.targets.qemu import QmpEvent, RecordedQEMUDriver
from framework.verdict import InstallStarted

Say = Callable[[str], None]


def record_updates(
    rig: Path,
    base: str,
    variants: Sequence[str],
    destination: Path,
    say: Say = lambda text: None,
    *,
    flip_percent: float | None = None,
) -> Path:
    """Install `variants` one after the other over `base` on `rig`; keep the recording.

    With `flip_percent` the disk stores one bit wrong, that far into the first update's image.

    Raises:
        BenchError, RigError: the rig or its images can't be used.
        InfrastructureError: the run did not get as far as it should have.
        DiskError: the recording can't be written.
    """
    say("images")
    bench = open_bench_on(rig, [base, *variants])
    with contextlib.closing(bench):
        return record_on(bench, base, variants, destination, say, flip_percent=flip_percent)


def record_on(
    bench: Bench,
    base: str,
    variants: Sequence[str],
    destination: Path,
    say: Say = lambda text: None,
    *,
    flip_percent: float | None = None,
) -> Path:
    """As `record_updates`, on a bench that is open."""
    say("starting")
    device = bench.device(base, say=say, step=contextlib.nullcontext)
    machine = device.machine
    if not isinstance(machine, RecordedQEMUDriver):
        raise InfrastructureError("this rig's disks are not recorded, so it makes no recording")
    recorder = machine.recorder

    def heard(event: ProxyEvent) -> None:
        with contextlib.suppress(DiskError):
            recorder.mark("server", event.text)

    with (
        contextlib.closing(device),
        FaultProxy((bench.server.host, bench.server.port), on_event=heard) as proxy,
    ):
        updates = [bench.update(variant, proxy.port) for variant in variants]
        _start(device)
        if flip_percent is not None:
            _flip_a_bit(device, updates[0], flip_percent)
        for update in updates:
            with _promises(device, machine, update.name):
                _update(device, update)
        recorder.mark("scenario", f"ended: {'; '.join(device.did)}")
        accelerator = machine.accelerator_used.name
    say("keeping the recording")
    recorder.close()
    facts = _facts(bench, device, accelerator)
    facts["interfaces"] = {disk.name: disk.interface for disk in machine.description().disks}
    facts |= {"base": base, "updates": list(variants), "artifacts": [u.name for u in updates]}
    return write_recording(recorder.journal_path, destination, facts)


def _start(device: Device) -> None:
    """Power on; leave a synced file."""
    boot = device.boot()
    if not boot.ready:
        raise InfrastructureError("the device did not become ready", evidence=boot.evidence)
    assert device.canary_sha256 is not None
    _promise(device, boot)
    _promise(device, FileSynced(CANARY_PATH, device.canary_sha256))


def _flip_a_bit(device: Device, update: Update, percent: float) -> None:
    """Have the disk store one bit wrong in the slot that the update goes to."""
    slot = device.manifest.slots["b"]
    place = slot.offset + int(update.image.size_bytes * percent / 100)
    device.machine.recorder.arm(
        Trigger.block_range(slot.device, place, 1), Inject(Fault.bit_flip(slot.device, place))
    )


def _update(device: Device, update: Update) -> None:
    """One update, from the command to the next system that is ready."""
    device.machine.recorder.mark("scenario", f"installing {update.name}")
    _promise(device, InstallStarted(update.name))
    _promise(device, device.install(update))
    boot = device.reboot()
    if boot is None or not boot.ready:
        raise InfrastructureError(
            "the device did not come back after its update",
            evidence="" if boot is None else boot.evidence,
        )
    device.read_status()


def _promise(device: Device, event: Promise) -> None:
    device.machine.recorder.mark(SOURCE, to_mark(event))


@contextlib.contextmanager
def _promises(device: Device, machine: RecordedQEMUDriver, artifact: str) -> Iterator[None]:
    """Put what console and monitor tell into the journal, on the threads that hear it."""
    uut = device.uut
    ears = Ears(uut.boot_signs, uut.signs, uut.commit_state, artifact)

    def heard(line: Line) -> None:
        if line.direction == "RX" and (event := ears.event_in(line.text)) is not None:
            with contextlib.suppress(DiskError):  # `check` tells it where someone can act
                _promise(device, event)

    def happened(event: QmpEvent) -> None:
        if event.name == "RESET":
            with contextlib.suppress(DiskError):
                _promise(device, Restarted())

    with contextlib.ExitStack() as stack:
        stack.callback(device.machine.pump.add_listener(heard))
        stack.callback(machine.add_event_listener(happened))
        yield


def _repair(repair: Repair | None) -> dict[str, Any] | None:
    return None if repair is None else {"block": repair.block_bytes, "backups": repair.backups}


def _facts(bench: Bench, device: Device, accelerator: str) -> dict[str, Any]:
    """Everything that explains the journal: RECORDING.md says what each is."""
    sizes = {
        d.name: d.size_bytes
        for d in JournalReader(device.machine.recorder.journal_path).header.devices
    }
    seed = device.manifest.firmware.get("seed")
    return {
        "accelerator": accelerator,
        "rig": bench.images.target,
        "outcome": "; ".join(device.did),
        "updater": device.uut.name,
        "bootloader": device.manifest.bootloader,
        "initial": device.base.name,
        "images": {name: asdict(image) for name, image in device.images.items()},
        "layout": layout_to_values(layout_of(device.manifest, sizes, device.images.values())),
        "slots": {slot: SLOT_REGION + slot for slot in device.manifest.slots},
        "data_repair": _repair(device.manifest.data_repair),
        "pflash": None if seed is None else str(seed),
        "base_hints": {name: str(path) for name, path in device.manifest.disks.items()},
        "versions": {
            "brownout": metadata.version("brownout"),
            "python": platform.python_version(),
        },
        "console": device.console_text(),
    }
