"""Recordings of runs on an emulated rig: of updates without a fault, or of any scenario.

The same façade as the scenarios' (`Device`): boot, leave a synced file, install, restart, let the
device commit or roll back by itself. What a run promises on the way goes into the journal as marks
(`framework.explore.timeline`), those of the console from its own thread, so that each stands
between the operations where it was heard. Only emulated rigs: their disks are recorded.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import Factory, asdict, define

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
from framework.verdict import Event, ImageFacts, InstallEnded, InstallStarted, PowerCut

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
    with (
        scribe_of(device) as scribe,
        contextlib.closing(device),
        FaultProxy((bench.server.host, bench.server.port), on_event=scribe.overheard) as proxy,
    ):
        updates = [bench.update(variant, proxy.port) for variant in variants]
        boot = device.boot()
        if not boot.ready:
            raise InfrastructureError("the device did not become ready", evidence=boot.evidence)
        scribe.synced()
        if flip_percent is not None:
            _flip_a_bit(device, updates[0], flip_percent)
        for update in updates:
            _update(device, update)
    say("keeping the recording")
    return scribe.keep(bench, destination)


def _flip_a_bit(device: Device, update: Update, percent: float) -> None:
    """Have the disk store one bit wrong in the slot that the update goes to."""
    slot = device.manifest.slots["b"]
    place = slot.offset + int(update.image.size_bytes * percent / 100)
    device.machine.recorder.arm(
        Trigger.block_range(slot.device, place, 1), Inject(Fault.bit_flip(slot.device, place))
    )


def _update(device: Device, update: Update) -> None:
    """One update, from the command to the next system that is ready."""
    device.install(update)
    boot = device.reboot()
    if boot is None or not boot.ready:
        raise InfrastructureError(
            "the device did not come back after its update",
            evidence="" if boot is None else boot.evidence,
        )
    device.read_status()


@define
class Scribe:
    """Writes what a device promises into its journal; `scribe_of` makes one.

    Attributes:
        device: whose promises.
        machine: its driver.
        updates: names of the artifacts whose installation began, in order, each once.
    """

    device: Device
    machine: RecordedQEMUDriver
    updates: list[str] = Factory(list)
    _artifact: str = ""

    def listen_to(self, proxy: FaultProxy) -> None:
        """Overhear a proxy that somebody else listens to already."""
        told = proxy.on_event

        def heard(event: ProxyEvent) -> None:
            if told is not None:
                told(event)
            self.overheard(event)

        proxy.on_event = heard

    def overheard(self, event: ProxyEvent) -> None:
        """A connection as the server's side sees it; from any thread."""
        self._mark("server", event.text)

    def synced(self) -> None:
        """The file that the first start leaves is written and synced."""
        if self.device.canary_sha256 is not None:
            self._promise(FileSynced(CANARY_PATH, self.device.canary_sha256))

    def keep(self, bench: Bench, destination: Path) -> Path:
        """End the journal, and write the recording; the machine is off.

        Raises DiskError if it can't be written.
        """
        device, recorder = self.device, self.machine.recorder
        self._mark("scenario", f"ended: {'; '.join(device.did)}")
        recorder.close()
        facts = _facts(bench, device, self.machine.accelerator_used.name)
        facts["interfaces"] = {d.name: d.interface for d in self.machine.description().disks}
        facts["base"] = self._variant(device.base)
        facts["updates"] = [self._variant(device.images[name]) for name in self.updates]
        facts["artifacts"] = self.updates
        return write_recording(recorder.journal_path, destination, facts)

    def _variant(self, image: ImageFacts) -> str:
        known = self.device.manifest.images.items()
        return next((variant for variant, facts in known if facts == image), image.name)

    def _witnessed(self, event: Event) -> None:
        """An event of a step. A start after a cut counts as one that the device was told to do."""
        match event:
            case InstallStarted(artifact=name):
                self._artifact = name
                self.updates += [] if name in self.updates else [name]
                self._mark("scenario", f"installing {name}")
                self._promise(event)
            case InstallEnded():
                self._promise(event)
            case PowerCut():
                self._promise(Restarted())
            case _:
                pass

    def _heard(self, line: Line) -> None:
        uut = self.device.uut
        ears = Ears(uut.boot_signs, uut.signs, uut.commit_state, self._artifact)
        if line.direction == "RX" and (event := ears.event_in(line.text)) is not None:
            self._promise(event)

    def _happened(self, event: QmpEvent) -> None:
        if event.name == "RESET":
            self._promise(Restarted())

    def _promise(self, event: Promise) -> None:
        self._mark(SOURCE, to_mark(event))

    def _mark(self, source: str, text: str) -> None:
        with contextlib.suppress(DiskError):  # `check` tells it where someone can act
            self.machine.recorder.mark(source, text)


@contextlib.contextmanager
def scribe_of(device: Device) -> Iterator[Scribe]:
    """A scribe that listens to a device, which is still off.

    Raises InfrastructureError if its machine's disks are not recorded.
    """
    machine = device.machine
    if not isinstance(machine, RecordedQEMUDriver):
        raise InfrastructureError("this rig's disks are not recorded, so it makes no recording")
    scribe = Scribe(device, machine)
    device.on_event = scribe._witnessed
    with contextlib.ExitStack() as stack:
        # On the threads that hear it.
        stack.callback(machine.pump.add_listener(scribe._heard))
        stack.callback(machine.add_event_listener(scribe._happened))
        yield scribe


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
