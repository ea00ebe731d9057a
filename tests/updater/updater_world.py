"""A small world in which the real client runs: two slots, a boot loader, a power switch.

The client, its state machine, the slot writer and the SQLite store are the shipped ones; the
block device, the boot loader and the power are simulated. Every effect is one numbered event.
`cut_at` removes the power in the middle of an event: from then on nothing has any effect, and
the drive's volatile cache (writes since the last sync) is lost, kept, or half kept.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from updater_artifacts import DEVICE_TYPE, image_bytes

import updater
from updater.artifact import ArtifactReader, PayloadFile, write_artifact
from updater.device.client import Client, Ports, no_limit
from updater.device.config import (
    BootEnvConfig,
    Config,
    DownloadConfig,
    ModulesConfig,
    ScriptsConfig,
    Slot,
)
from updater.device.errors import BootEnvError, SlotError, TransportError
from updater.device.files import free_bytes
from updater.device.health import HealthRunner
from updater.device.model import Outcome, State, Update
from updater.device.modules import ModuleRunner
from updater.device.scripts import ScriptRunner
from updater.device.slot_writer import CHUNK_BYTES
from updater.device.store import SqliteStore, database_path

SLOTS = (Slot("a", "/dev/a", 2), Slot("b", "/dev/b", 3))
SLOT_BYTES = 4 << 20
SHIPPED_MODULES = Path(updater.__file__).parent / "modules" / "v3"
IMAGE_BYTES = (2 << 20) + 300_000
CACHE_MODELS = ("lost", "kept", "half")


class PowerCutError(BaseException):
    """The power went away; nothing after this has an effect."""


class Power:
    """Counts effects and goes off in the middle of one."""

    def __init__(self) -> None:
        self.events = 0
        self.cut_at = 0
        self.trip_on = ""
        self.off = False
        self.trace: list[str] = []

    @contextmanager
    def event(self, name: str) -> Iterator[bool]:
        """Yield whether the effect still takes place completely; raise after a cut."""
        if self.off:
            raise PowerCutError
        self.events += 1
        self.trace.append(name)
        cut = self.events == self.cut_at or name == self.trip_on
        if cut:
            self.off = True
        yield not cut
        if cut:
            raise PowerCutError


class Disk:
    """One slot's device: what is durable, and what is only in the drive's cache."""

    size_bytes = SLOT_BYTES
    block_bytes = 4096

    def __init__(self, power: Power, name: str, content: bytes) -> None:
        self._power = power
        self._name = name
        self.durable = bytearray(content.ljust(SLOT_BYTES, b"\0"))
        self.pending: list[tuple[int, bytes]] = []
        self.flips: set[int] = set()

    def write(self, offset: int, data: memoryview) -> None:
        assert offset % self.block_bytes == 0
        assert len(data) % self.block_bytes == 0
        assert offset + len(data) <= SLOT_BYTES
        with self._power.event(f"write {self._name} {offset}") as whole:
            content = bytearray(data if whole else data[: len(data) // 2])
            for position in list(self.flips):
                if offset <= position < offset + len(content):
                    content[position - offset] ^= 1
                    self.flips.discard(position)
            self.pending.append((offset, bytes(content)))

    def sync(self) -> None:
        with self._power.event(f"sync {self._name}") as whole:
            if whole:
                self.settle(lambda _: True)

    def read_medium(self, offset: int, into: memoryview) -> None:
        if self._power.off:
            raise PowerCutError
        content = bytearray(self.durable)
        for start, data in self.pending:
            content[start : start + len(data)] = data
        into[:] = content[offset : offset + len(into)]

    def close(self) -> None:
        return

    def settle(self, survives: Callable[[int], bool]) -> None:
        """Make the surviving 4 KiB blocks of the cache durable, in order, and empty it."""
        for offset, data in self.pending:
            for start in range(0, len(data), 4096):
                if survives(offset + start):
                    piece = data[start : start + 4096]
                    self.durable[offset + start : offset + start + len(piece)] = piece
        self.pending.clear()


class Environment:
    """A boot environment whose write is atomic; a cut in it leaves old or new values."""

    def __init__(self, power: Power, seed: int) -> None:
        self._power = power
        self._random = random.Random(seed)
        self.values = {
            "mender_boot_part": "2",
            "mender_boot_part_hex": "2",
            "upgrade_available": "0",
            "bootcount": "0",
        }
        self.broken = False

    def read(self) -> dict[str, str]:
        if self._power.off:
            raise PowerCutError
        return dict(self.values)

    def write(self, values: Mapping[str, str]) -> None:
        if self.broken:
            raise BootEnvError("boot environment: write failed: Input/output error")
        with self._power.event("environment") as whole:
            if whole or self._random.random() < 0.5:
                self.values.update(values)


class Store:
    """The real store behind the power switch; a cut in a transaction leaves old or new state."""

    def __init__(self, power: Power, path: str, seed: int) -> None:
        self._power = power
        self._random = random.Random(seed)
        self._real = SqliteStore(path)

    def update(self) -> Update | None:
        return self._real.update()

    def provides(self) -> dict[str, str] | None:
        return self._real.provides()

    def last_outcome(self) -> Outcome | None:
        return self._real.last_outcome()

    def unreported(self) -> list[Outcome]:
        return self._real.unreported()

    def attempts(self, deployment: str) -> int:
        return self._real.attempts(deployment)

    def mark_reported(self, outcome: Outcome) -> None:
        with self._power.event("store reported") as whole:
            if whole:
                self._real.mark_reported(outcome)

    def save(self, update: Update) -> None:
        with self._power.event(f"store {update.state}") as whole:
            if whole or self._random.random() < 0.5:
                self._real.save(update)

    def finish(self, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
        with self._power.event(f"store {outcome.result}") as whole:
            if whole or self._random.random() < 0.5:
                self._real.finish(outcome, provides)

    def close(self) -> None:
        self._real.close()


class FakeClock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def utc_seconds(self) -> int:
        return 1_700_000_000 + int(self.now - 1000.0)

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class PoweredScripts(ScriptRunner):
    """The real runner and real scripts; a cut strikes before or after a script's work."""

    power: Power
    random: random.Random

    def take(self, scripts: Mapping[str, bytes]) -> None:
        if not scripts:
            super().take(scripts)
            return
        with self.power.event("take scripts") as whole:
            half = dict(list(scripts.items())[: len(scripts) // 2])
            super().take(scripts if whole else half)

    def _run_one(self, path: str, name: str) -> None:
        with self.power.event(f"script {name}") as whole:
            if whole or self.random.random() < 0.5:
                super()._run_one(path, name)


class PoweredModules(ModuleRunner):
    """The real runner and real modules; a cut strikes before or after a call's work."""

    power: Power
    random: random.Random

    def prepare(self, reader: ArtifactReader, provides: Mapping[str, str]) -> None:
        with self.power.event("module tree") as whole:
            if whole or self.random.random() < 0.5:
                super().prepare(reader, provides)

    def download(self, payload: Iterator[PayloadFile]) -> None:
        with self.power.event("module Download") as whole:
            if whole or self.random.random() < 0.5:
                super().download(payload)

    def call(self, state: State) -> None:
        with self.power.event(f"module {state}") as whole:
            if whole or self.random.random() < 0.5:
                super().call(state)


class World:
    """One device over many boots. `healthy` decides what the new system's checks say."""

    def __init__(self, directory: Path, artifact: Path, seed: int = 0, model: str = "lost") -> None:
        self.v1 = image_bytes(IMAGE_BYTES, 1)
        self.v2 = image_bytes(IMAGE_BYTES, 2)
        self.artifact = artifact
        self.healthy = True
        self.always_sick = False
        self.power = Power()
        self.random = random.Random(seed)
        self.model = model
        self.disks = {
            "a": Disk(self.power, "a", self.v1),
            "b": Disk(self.power, "b", b""),
        }
        self.environment = Environment(self.power, seed)
        self.seed = seed
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "artifact_info").write_text("artifact_name=v1\n")
        self.running = "a"
        self.boots = 0
        self.lines: list[str] = []
        self.config = Config(
            path="test",
            device_type=DEVICE_TYPE,
            data_dir=str(directory),
            artifact_info=str(directory / "artifact_info"),
            slots=SLOTS,
            bootenv=BootEnvConfig("uboot", "/etc/fw_env.config", ()),
            ca_file=None,
            artifact_keys=(),
            health_directory=None,
            health_timeout_s=1.0,
            download=DownloadConfig(),
            scripts=ScriptsConfig(str(directory / "rootfs-scripts")),
            modules=ModulesConfig((str(artifact.parent / "modules"), str(SHIPPED_MODULES))),
        )
        self.clock = FakeClock()
        self.limit: Callable[[str, float], AbstractContextManager[None]] = no_limit

    # The ports.

    identity = ""
    refresh: Callable[[], str] | None = None

    def running_slot(self, slots: tuple[Slot, Slot]) -> Slot:
        return next(slot for slot in slots if slot.name == self.running)

    def user_of(self, slot: Slot) -> str | None:
        return None

    def open_slot(self, slot: Slot) -> Disk:
        if slot.name == self.running:
            raise SlotError("the running slot was opened for writing")
        return self.disks[slot.name]

    def boot_id(self) -> str:
        return str(self.boots)

    def free_bytes(self, path: str) -> int:
        return free_bytes(path)

    def sync_all(self) -> None:
        os.sync()

    @contextmanager
    def open(self, location: str) -> Iterator[World]:
        if location != "v2.mender":
            raise TransportError(f"{location}: no such file")
        with self.artifact.open("rb", buffering=0) as file:
            self._file = file
            yield self

    def log(self) -> list[str]:
        """Return what scripts and modules have written to $WORLD/log."""
        path = self.directory / "log"
        return path.read_text().split() if path.exists() else []

    def readinto(self, buffer: memoryview, /) -> int:
        if self.power.off:
            raise PowerCutError
        return self._file.readinto(buffer) or 0

    def run(self) -> None:
        with self.power.event("health"):
            sick = self.always_sick or (self.running_image() == "v2" and not self.healthy)
            HealthRunner(str(self.artifact.parent / ("sick.d" if sick else "well.d")), 5.0).run()

    def request(self) -> None:
        return

    # The device.

    def client(self) -> Client:
        self.store = Store(self.power, database_path(str(self.directory)), self.seed)
        data_dir = str(self.directory)
        scripts = PoweredScripts(self.config.scripts, data_dir, self.clock)
        modules = PoweredModules(self.config.modules, data_dir, DEVICE_TYPE)
        for powered in (scripts, modules):
            powered.power, powered.random = self.power, self.random  # type: ignore[attr-defined]
        os.environ["WORLD"] = data_dir
        return Client(
            self.config,
            Ports(
                machine=self,
                bootenv=self.environment,
                store=self.store,
                clock=self.clock,
                transport=self,
                reboot=self,
                health=self,
                scripts=scripts,
                modules=modules,
                limit=self.limit,
            ),
        )

    def running_image(self) -> str:
        """Name the image in the running slot; anything else breaks invariant 2."""
        content = bytes(self.disks[self.running].durable[:IMAGE_BYTES])
        if content == self.v1:
            return "v1"
        if content == self.v2:
            return "v2"
        raise AssertionError("invariant 2: the running slot holds neither image")

    def restart(self) -> None:
        """Lose the power if it was not lost yet, then let the boot loader choose a slot."""
        half = {"lost": 0.0, "kept": 1.0, "half": 0.5}[self.model]
        for disk in self.disks.values():
            disk.settle(lambda _: self.random.random() < half)
        self.store.close()
        self.power.off = False
        self.power.cut_at = 0
        self.boots += 1
        self.running = self._boot_loader()

    def _boot_loader(self) -> str:
        """Choose as the boot contract says (bootlimit 1)."""
        values = self.environment.values

        def flip() -> None:
            values["mender_boot_part"] = str(5 - int(values["mender_boot_part"]))
            values["upgrade_available"] = values["bootcount"] = "0"

        def loads() -> bool:
            return any(self.disks[chosen()].durable[:65536])

        def chosen() -> str:
            return "a" if values["mender_boot_part"] == "2" else "b"

        if values["upgrade_available"] == "1":
            if int(values["bootcount"]) >= 1:
                flip()
            else:
                values["bootcount"] = str(int(values["bootcount"]) + 1)
                if not loads():
                    flip()
        if loads():
            return chosen()
        other = "b" if chosen() == "a" else "a"
        assert any(self.disks[other].durable[:65536]), "invariant 1: no slot can be started"
        return other


def world_artifact(directory: Path) -> Path:
    """Write the artifact that every world installs, and health checks that pass and fail."""
    for name, code in (("well.d/10-well", 0), ("sick.d/50-sick", 1)):
        check = directory / name
        check.parent.mkdir()
        check.write_text(f"#!/bin/sh\necho checked >&2\nexit {code}\n")
        check.chmod(0o755)
    image = directory / "rootfs.img"
    image.write_bytes(image_bytes(IMAGE_BYTES, 2))
    output = directory / "v2.mender"
    write_artifact(output, image, name="v2", device_types=[DEVICE_TYPE], compression="none")
    return output


assert IMAGE_BYTES > 2 * CHUNK_BYTES
