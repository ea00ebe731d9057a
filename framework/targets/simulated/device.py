"""The simulated device: one drive, and everything that runs on it from power-on to power-off.

The client is the shipped one, with every port taken by this device: slots and environment are
ranges of the drive, the store is SQLite on the data partition, time passes only when someone waits.
An *image* is a few pages that say in their head what they are and how they behave: they start, or
panic, hang, fail their health check. What the device does is told as lines, like a console, and as
the events that `framework.verdict` judges; the disk is read behind the device's back.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from framework.disk.ubootenv import build_copy
from framework.targets.simulated.bootloader import (
    PARTS,
    Choice,
    Copies,
    EnvironmentArea,
    UbootCopies,
)
from framework.targets.simulated.database import Connection, DataVfs
from framework.targets.simulated.drive import Disk, Drive, DriveError, PowerLost
from framework.targets.simulated.filesystem import (
    PAGE,
    FileSystem,
    FileSystemError,
    format_region,
)
from framework.targets.simulated.grub import format_copies
from framework.targets.simulated.managed import (
    BROKE,
    CONTROL,
    FILES,
    Api,
    Restarting,
    Server,
    daemon_module,
)
from framework.targets.simulated.packages import PackageModule, read_package
from updater.device import console
from updater.device.client import (
    LOST_RECORD,
    STILL_ARMED,
    Client,
    LeaveToDaemon,
    NoObserver,
    Ports,
)
from updater.device.command import EXIT_OK, EXIT_REBOOT_NEEDED, last_word, operate
from updater.device.config import BootEnvConfig, Config, DownloadConfig, ServerConfig, Slot
from updater.device.errors import (
    HealthError,
    InterruptedBySignal,
    ScriptError,
    SlotError,
    StoreError,
    TransportError,
)
from updater.device.model import Outcome, Result
from updater.device.store import SqliteStore

CLIENT_FOLDER: Final = Path(console.__file__).parent
"""Where the client's modules are."""
ENVIRONMENT: Final = EnvironmentArea(0, 64 << 10, 4 << 10)
SLOT_BYTES: Final = 104 << 10
IMAGE_BYTES: Final = 96 << 10
SLOT_OFFSETS: Final = {"a": 128 << 10, "b": (128 << 10) + SLOT_BYTES}
DATA_OFFSET: Final = SLOT_OFFSETS["b"] + SLOT_BYTES
DATA_BYTES: Final = 192 << 10
DRIVE_BYTES: Final = DATA_OFFSET + DATA_BYTES
DATABASE: Final = "state.db"
CANARY: Final = "canary"
CANARY_CONTENT: Final = bytes(range(256)) * 8
STARTS_LIMIT: Final = 6
"""Kernel starts that one start of the device may take; more is a reboot loop."""

_IMAGE_MAGIC: Final = b"SIMIMAGE"
# What the harness takes a slot's file system by: ext4's s_magic (framework.scenario.inspect).
_EXT4_MAGIC_AT: Final = 1024 + 56
_EXT4_MAGIC: Final = b"\x53\xef"
SICK: Final = {"unhealthy": "50-sick", "offline": "40-network"}
"""Behaviours that a health check finds, and which one."""
SCRIPT: Final = "script-"
DONE: Final = "done-"
"""What a state script's file is called, and the sign that it was done, on the data partition."""
TOO_LATE: Final = "ArtifactCommit_Leave"
"""The scripts that may fail, and whose update is committed all the same."""
SLOTS: Final = (Slot("a", "a", 2), Slot("b", "b", 3))
KILLED: Final = 137
"""The exit code of a command that was killed: 128 + SIGKILL."""
AT_BOOT: Final = "resume at boot"
"""The command that init runs, for `SimulatedDevice.begins`."""
DAEMON: Final = "daemon"
"""The daemon, for `SimulatedDevice.begins`; each of its cycles counts as a command."""


NO_OBSERVER: Final = NoObserver()


class ImageFile(NamedTuple):
    """What an image's head says."""

    name: str
    behaviour: str


@lru_cache(maxsize=64)
def make_image(name: str, behaviour: str = "well") -> bytes:
    """Make an image: a head that says what it is, and bytes of its own."""
    head = _IMAGE_MAGIC + json.dumps([name, behaviour]).encode()
    content = bytearray(head.ljust(512, b"\0"))
    content += random.Random(name).randbytes(IMAGE_BYTES - 512)  # noqa: S311 - not a secret
    content[_EXT4_MAGIC_AT : _EXT4_MAGIC_AT + 2] = _EXT4_MAGIC
    return bytes(content)


def read_head(content: bytes) -> ImageFile | None:
    """Read what an image's first sector says; None if there is no image."""
    if not content.startswith(_IMAGE_MAGIC):
        return None
    try:
        name, behaviour = json.loads(content[len(_IMAGE_MAGIC) : 512].rstrip(b"\0"))
    except ValueError:
        return None
    return ImageFile(name, behaviour)


@lru_cache(maxsize=16)
def factory_content(
    name: str, behaviour: str = "well", bootloader: str = "uboot", slot: str = "a"
) -> bytes:
    """Return the drive of a new device that runs image `name` in `slot`."""
    content = bytearray(DRIVE_BYTES)
    variables = {
        "mender_boot_part": PARTS[slot],
        "mender_boot_part_hex": PARTS[slot],
        "upgrade_available": "0",
        "bootcount": "0",
    }
    if bootloader == "grub":
        format_copies(content, variables)
    else:
        for flags, offset in enumerate(ENVIRONMENT.offsets, 1):
            content[offset : offset + ENVIRONMENT.size] = build_copy(
                variables, ENVIRONMENT.size, flags=flags
            )
    content[SLOT_OFFSETS[slot] : SLOT_OFFSETS[slot] + IMAGE_BYTES] = make_image(name, behaviour)
    format_region(content, DATA_OFFSET, DATA_BYTES)
    drive = Drive(content)
    data = FileSystem(drive, DATA_OFFSET, DATA_BYTES)
    data.create(CANARY)
    data.write(CANARY, 0, CANARY_CONTENT)
    data.unmount()
    return drive.read(0, DRIVE_BYTES)


class Command(NamedTuple):
    """How a command of the client ended.

    `cause` is the last error that it told; `armed`: with the words that its slot is still armed.
    """

    exit_code: int
    cause: str
    armed: bool = False


class Recorded(NamedTuple):
    """What the store holds, besides what a status says of it.

    Attributes:
        updating: an update is in progress.
        cause: why that will not end well, if it is known.
        outcome: of the last update: its artifact, how it ended, and the cause; None before any.
    """

    updating: bool
    cause: str
    outcome: tuple[str, str, str] | None


class Start(NamedTuple):
    """How a start of the device ended; `kernels` counts the kernels started on the way."""

    ready: bool
    image: ImageFile | None
    slot: str
    kernels: int
    evidence: str


class Surroundings(NamedTuple):
    """What is outside the device: the artifacts by location, and the client's configuration.

    `network` may take the bytes of a download away or change them: it gets location and content
    and returns the content and whether the connection breaks at its end.
    """

    artifacts: Mapping[str, bytes]
    keys: tuple[str, ...]
    artifact_info: Mapping[str, str]
    network: Callable[[str, bytes], tuple[bytes, bool]] = lambda location, content: (content, False)


class SimulatedDevice:
    """One device over many starts.

    `early` is the kernel's habit of writing pages back when it likes. `client` makes the client,
    the shipped one unless a bug is planted; `copies` are the boot variables, and the boot loader
    that reads them (None: U-Boot as it should be). `print` gets the console's lines, `listener` the
    client's without their prefix; `begins` gets a command's verb before it runs, `ends` its exit
    code behind it; `ignored_script` the name of a state script whose failure comes too late to stop
    anything; `module_called` the state for which the update module is called; `lost_record` is
    called when the client says that it has lost an update's record. `modular`: there is an update
    module. `managed` is the configuration's [server]. `commanding`: a command of the client is
    running.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        *,
        vfs: DataVfs,
        drive: Disk,
        early: Callable[[], bool] | None = None,
        client: Callable[[Config, Ports], Client] = Client,
        copies: Copies | None = None,
    ) -> None:
        self.surroundings = surroundings
        self.drive = drive
        self.copies: Copies = copies or UbootCopies(drive, ENVIRONMENT)
        self.print: Callable[[str], None] = lambda line: None
        self.lines: list[str] = []
        self.modular = False
        self.managed = ServerConfig()
        self.listener: Callable[[str], None] = lambda line: None
        self.begins: Callable[[str], None] = lambda verb: None
        self.ends: Callable[[int], None] = lambda code: None
        self.now = 1000.0
        self.starts = 0
        self.lost_record: Callable[[], None] = lambda: None
        self.ignored_script: Callable[[str], None] = lambda name: None
        self.module_called: Callable[[str], None] = lambda state: None
        self.slot = ""
        self.image: ImageFile | None = None
        self.data: FileSystem | None = None
        self._vfs = vfs
        self._early = early
        self._client = client
        self.commanding = False
        # The daemon's process: what it has in memory and open, and who in it gets its lines.
        self._daemon: Any = None
        self._handles: dict[int, Any] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._stores: list[SqliteStore] = []
        vfs.restart()

    # What a person or the harness does.

    def start(self) -> Start:
        """Give the device power, or reset it; return when it is ready or has used up its starts.

        PowerLost goes through.
        """
        self.drive.power_on()
        self.image, self.slot = None, ""
        self._bury_daemon()
        evidence = "no slot can be booted"
        for kernels in range(1, STARTS_LIMIT + 1):
            self.starts += 1
            self.data = self._vfs.disk = None
            choice = self._boot_loader()
            if choice.slot is None:
                continue
            image = read_head(self._read_slot(choice.slot, 512))
            if image is None or image.behaviour in ("panics", "hangs"):
                evidence = f"slot {choice.slot}: {image.behaviour if image else 'panics'}"
                if image is None or image.behaviour == "panics":
                    self.say("Kernel panic - not syncing: this image panics")
                continue
            evidence = self._initialise(image, choice)
            if not evidence:
                self.image, self.slot = image, choice.slot
                self.say(
                    f"BROWNOUT READY version={image.name} slot={self.slot} boot_id={self.boot_id}"
                )
                return Start(True, image, choice.slot, kernels, "")
        return Start(False, None, "", STARTS_LIMIT, evidence)

    def restart(self) -> Start:
        """Restart in good order: everything is written first."""
        self._bury_daemon()
        self._unmount()
        return self.start()

    def run(self, verb: str, source: str = "", *, at_boot: bool = False) -> Command:
        """Run a command of the client in the running system; PowerLost goes through.

        `at_boot`: it is init that does. A command that is killed ends with KILLED.
        """
        store = self._store()
        return self._supervise(
            AT_BOOT if at_boot else verb,
            lambda: operate(self._make_client(store, self._observer()), verb, source),
            store.close,
        )

    def manage(self, server: Server) -> Command:
        """Let the daemon go through one cycle, and time pass until the next.

        It is started where it does not run. PowerLost goes through. It ends with
        EXIT_REBOOT_NEEDED where it has the device restarted, with KILLED where it is killed.
        """

        def cycle() -> int:
            if self._daemon is None:
                self._daemon = self._make_daemon(server)
            try:
                self.now += self._daemon.cycle()
            except Restarting:
                return EXIT_REBOOT_NEEDED
            return EXIT_OK

        FILES.data, FILES.handles = self.data, self._handles
        console.listeners[:] = self._listeners
        try:
            command = self._supervise(DAEMON, cycle, self._close_stores)
            self._listeners = console.listeners[:]
        finally:
            console.listeners.clear()
        if command.exit_code == KILLED:
            self._bury_daemon()
        return command

    def _bury_daemon(self) -> None:
        self._daemon = None
        self._listeners = []
        self._handles = {}

    def _close_stores(self) -> None:
        for store in self._stores:
            store.close()
        self._stores.clear()

    def _supervise(self, verb: str, work: Callable[[], int], close: Callable[[], None]) -> Command:
        causes: list[str] = []
        self.begins(verb)

        def listen(line: str) -> None:
            self._line(line)
            if line.startswith("error: "):
                causes.append(line[7:])

        with console.captured(listen):
            try:
                self.commanding = True
                code = work()
            except (InterruptedBySignal, Exception) as error:  # noqa: BLE001 - as `updater` does
                code = last_word(error)
            except PowerLost:
                if not self.drive.killed:
                    raise
                code = KILLED
            finally:
                self.commanding = False
                close()
        if self.drive.killed:
            self.drive.power_on()
            code = KILLED
        self.ends(code)
        cause = causes[-1] if causes else ""
        return Command(code, cause, armed=STILL_ARMED in cause)

    def status(
        self, see: Callable[[list[str], Recorded], None] = lambda lines, recorded: None
    ) -> tuple[str, str, str] | None:
        """Return what the client says: the artifact it runs, the last outcome and its cause.

        None when it says nothing but an error, or is killed. `see` gets the lines that a person
        sees, and what the store holds. It may write: what a killed client left half done in the
        store is undone by whoever opens it next. PowerLost goes through.
        """
        store = self._store()
        self.commanding = True
        try:
            lines = self._make_client(store).status()
            name = next((line[9:] for line in lines if line.startswith("running: ")), "")
            last = store.last_outcome()
            update = store.update()
            ended = (last.artifact_name, str(last.result), last.cause) if last else None
            cause = update.cause if update is not None else ""
            see(lines, Recorded(update is not None, cause, ended))
        except StoreError as error:
            self.say(f"status: {error}")
            return None
        except PowerLost:
            if not self.drive.killed:
                raise
            self.drive.power_on()
            return None
        finally:
            self.commanding = False
            store.close()
        name = name.rpartition(" (slot ")[0]
        return (name, str(last.result), last.cause) if last else (name, "", "")

    def package(self) -> str:
        """Say which package is installed on a device that has an update module."""
        try:
            return read_package(self.data)[0] if self.data is not None else ""
        except FileSystemError:
            return "unreadable"

    def is_updating(self) -> bool:
        """Say whether an update is in progress, as the store has it."""
        store = self._store()
        try:
            return store.update() is not None
        except StoreError:
            return True
        finally:
            store.close()

    def forgotten(self) -> bool:
        """Say whether state scripts are left of an update that the store knows nothing of."""
        if self.data is None or not self.data.exists(SCRIPT + "version"):
            return False
        store = self._store()
        try:
            return store.update() is None and store.last_outcome() is None
        except StoreError:
            return False
        finally:
            store.close()

    def provision(self) -> None:
        """Make an empty state store, and write everything."""
        store = self._store()
        store.mark_reported(Outcome(Result.FAILED, "", "", "", 0))
        store.close()
        self._unmount()

    def status_lines(self) -> list[str]:
        """Return what `updater status` prints."""
        store = self._store()
        try:
            return self._make_client(store).status()
        finally:
            store.close()

    @property
    def boot_id(self) -> str:
        """A text in the kernel's form that is different after every start."""
        return f"{self.starts:08x}-0000-4000-8000-000000000000"

    # From the boot loader to the ready line.

    def _boot_loader(self) -> Choice:
        def loads(slot: str) -> bool:
            return read_head(self._read_slot(slot, 512)) is not None

        choice = self.copies.start(loads)
        self.say(
            f"BROWNOUT: booting slot {choice.slot} upgrade_available={int(choice.trial)} "
            if choice.slot
            else "BROWNOUT: no slot can be booted"
        )
        return choice

    def _initialise(self, image: ImageFile, choice: Choice) -> str:
        """What init does: mount, mend the environment, `updater resume`; "" once ready."""
        self.slot, self.image = str(choice.slot), image
        self.say(f"BROWNOUT INIT slot={self.slot}")
        try:
            self.data = FileSystem(self.drive, DATA_OFFSET, DATA_BYTES, self._early)
        except FileSystemError as error:
            self.say(f"data lost: {error.strerror}")
            self.data = _in_memory()
        self._vfs.disk = self.data
        for said in self.copies.restore(choice.environment, self.slot):
            self.say(f"init: {said}")
        command = self.run("resume", at_boot=True)
        if command.exit_code == EXIT_REBOOT_NEEDED:
            self._unmount()
            return f"slot {self.slot} asked for a restart: {command.cause}"
        return ""

    def _unmount(self) -> None:
        try:
            if self.data is not None:
                self.data.unmount()
        except FileSystemError as error:
            # init restarts all the same, as `reboot -f` does.
            self.say(f"init: /data: {error.strerror}")

    def _read_slot(self, slot: str, length: int) -> bytes:
        try:
            return self.drive.read(SLOT_OFFSETS[slot], length)
        except DriveError:
            return b""

    def say(self, line: str) -> None:
        """Print a line on the console."""
        self.lines.append(line)
        self.print(line)

    def _line(self, line: str) -> None:
        self.say(f"updater: {line}")
        self.listener(line)
        if LOST_RECORD in line:
            self.lost_record()

    # The ports.

    def _observer(self) -> NoObserver:
        """Who watches a command: the daemon's business is left to it, as `updater.cli` does."""
        assert self.data is not None
        url = self.managed.url
        left = self.managed.require_contact or (bool(url) and self.data.exists(CONTROL))
        return LeaveToDaemon() if left else NoObserver()

    def _make_daemon(self, server: Server) -> Any:
        module = daemon_module()
        config, clock = self._config(), _Clock(self)
        api = Api(self.managed, server)
        log = module.DeploymentLog(config.data_dir, clock)
        observer = module.ServerObserver(config, api, log, clock)

        def make_client() -> Client:
            store = self._store()
            self._stores.append(store)
            return self._make_client(store, observer)

        return module.Daemon(config, api, observer, log, make_client)

    def _config(self) -> Config:
        assert self.image is not None
        return Config(
            path="updater.toml",
            device_type="simulated",
            data_dir="/data",
            artifact_info=self.surroundings.artifact_info[self.image.name],
            slots=SLOTS,
            bootenv=BootEnvConfig("uboot", "fw_env.config", ()),
            ca_file=None,
            artifact_keys=self.surroundings.keys,
            health_directory=None,
            health_timeout_s=30.0,
            download=DownloadConfig(),
            server=self.managed,
        )

    def _make_client(self, store: SqliteStore, observer: Any = NO_OBSERVER) -> Client:
        ports = Ports(
            machine=_Machine(self),
            bootenv=self.copies,
            store=store,
            clock=_Clock(self),
            transport=_Transport(self),
            reboot=_Reboot(),
            health=_Health(self),
            scripts=_Scripts(self),
            modules=(
                PackageModule(self.data, self.ignored_script, self.module_called)
                if self.modular and self.data is not None
                else None
            ),
            observer=observer,
        )
        return self._client(self._config(), ports)

    def _store(self) -> SqliteStore:
        return SqliteStore(DATABASE, _Files(self))


def _in_memory() -> FileSystem:
    """The tmpfs that stands in for a data partition that is lost."""
    content = bytearray(DATA_BYTES)
    format_region(content, 0, DATA_BYTES)
    return FileSystem(Drive(content), 0, DATA_BYTES)


class _Machine:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def running_slot(self, slots: tuple[Slot, Slot]) -> Slot:
        return next(slot for slot in slots if slot.name == self._device.slot)

    def user_of(self, slot: Slot) -> str | None:
        return None

    def open_slot(self, slot: Slot) -> _SlotDevice:
        if slot.name == self._device.slot:
            raise SlotError(f"slot {slot.name} runs")
        return _SlotDevice(self._device.drive, slot.name)

    def boot_id(self) -> str:
        return self._device.boot_id

    def free_bytes(self, path: str) -> int:
        data = self._device.data
        assert data is not None
        # The real one has gigabytes where this has pages, and the client wants a MiB.
        return 0 if data.full else 1 << 30

    def sync_all(self) -> None:
        data = self._device.data
        assert data is not None
        try:
            data.unmount()
        except FileSystemError:
            return


class _SlotDevice:
    """A slot opened by the client, past the page cache."""

    size_bytes = SLOT_BYTES
    block_bytes = PAGE

    def __init__(self, drive: Disk, name: str) -> None:
        self._drive = drive
        self._name = name
        self._offset = SLOT_OFFSETS[name]

    def write(self, offset: int, data: memoryview) -> None:
        self._check(offset, len(data))
        # The block layer cuts a large request into what the drive takes.
        for at in range(0, len(data), 32 << 10):
            try:
                self._drive.write(self._offset + offset + at, data[at : at + (32 << 10)])
            except DriveError as error:
                raise SlotError(f"{self._name}: {error.strerror}") from error

    def sync(self) -> None:
        try:
            self._drive.flush()
        except DriveError as error:
            raise SlotError(f"{self._name}: {error.strerror}") from error

    def read_medium(self, offset: int, into: memoryview) -> None:
        self._check(offset, len(into))
        try:
            into[:] = self._drive.read(self._offset + offset, len(into))
        except DriveError as error:
            raise SlotError(f"{self._name}: {error.strerror}") from error

    def close(self) -> None:
        return

    def _check(self, offset: int, length: int) -> None:
        if offset % PAGE or length % PAGE or offset + length > SLOT_BYTES:
            raise SlotError(f"{self._name}: {length} bytes at {offset} are not in whole blocks")


class _Files:
    """The state store's files, on the data partition."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def connect(self, path: str) -> Any:
        data = self._device.data
        assert data is not None
        return Connection(path, data)

    def exists(self, path: str) -> bool:
        data = self._device.data
        assert data is not None
        return data.exists(path)

    def set_aside(self, path: str, to: str) -> None:
        data = self._device.data
        assert data is not None
        data.rename(path, to)
        if data.exists(f"{path}-journal"):
            data.remove(f"{path}-journal")

    def mend(self, path: str) -> int:
        data = self._device.data
        assert data is not None
        size, mended = data.size(path), 0
        for offset in range(0, size, PAGE):
            try:
                data.read(path, offset, PAGE)
            except FileSystemError:
                data.write(path, offset, bytes(PAGE))
                mended += 1
        if mended:
            data.truncate(path, size)
            data.sync(path)
        return mended


class _Clock:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def monotonic(self) -> float:
        return self._device.now

    def utc_seconds(self) -> int:
        return 1_700_000_000 + int(self._device.now)

    def wait(self, seconds: float) -> None:
        self._device.now += seconds


class _Transport:
    identity = ""
    refresh: Callable[[], str] | None = None

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    @contextmanager
    def open(self, location: str) -> Iterator[_Download]:
        outside = self._device.surroundings
        if location not in outside.artifacts:
            raise TransportError(f"{location}: no such artifact")
        yield _Download(location, *outside.network(location, outside.artifacts[location]))


class _Download:
    def __init__(self, location: str, content: bytes, breaks: bool) -> None:
        self._location = location
        self._file = io.BytesIO(content)
        self._breaks = breaks

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._file.readinto(buffer)
        if count == 0 and self._breaks:
            raise TransportError(f"{self._location}: {BROKE}")
        return count


class _Health:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def run(self) -> None:
        image = self._device.image
        if image is not None and image.behaviour in SICK:
            raise HealthError(f"health check {SICK[image.behaviour]} exited with status 1")
        data = self._device.data
        assert data is not None
        if self._device.modular and read_package(data)[1] in SICK:
            raise HealthError(f"health check {SICK[read_package(data)[1]]} exited with status 1")
        for name in ("ArtifactInstall_Enter_00", "ArtifactInstall_Leave_00"):
            if data.exists(SCRIPT + name) and not data.exists(DONE + name):
                raise HealthError(f"health check 60-migrated: {name} was not done")


class _Scripts:
    """State scripts as files on the data partition; what one does is in its content.

    `ok`: it leaves an empty file that says that it was done, which the health check of its image
    and the harness look for. `fail`: it ends with status 1. `later`: it asks twice to be run
    again, then it is done. The first script of an update takes the signs of earlier ones away.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    @property
    def _data(self) -> FileSystem:
        assert self._device.data is not None
        return self._device.data

    def take(self, scripts: Mapping[str, bytes]) -> None:
        self.drop()
        try:
            for name, content in scripts.items():
                self._data.create(SCRIPT + name)
                self._data.write(SCRIPT + name, 0, content)
                self._data.sync(SCRIPT + name)
            if scripts:
                self._data.create(SCRIPT + "version")
                self._data.sync(SCRIPT + "version")
        except FileSystemError as error:
            raise StoreError(f"scripts: {error.strerror}") from error

    def drop(self) -> None:
        try:
            for name in self._data.names():
                if name.startswith(SCRIPT):
                    self._data.remove(name)
            self._data.sync_directory()
        except FileSystemError as error:
            console.say(f"warning: scripts: {error.strerror}")

    def left_over(self) -> bool:
        return self._data.exists(SCRIPT + "version")

    def has(self, state: str, action: str) -> bool:
        return bool(self._found(state, action))

    def run(self, state: str, action: str, *, ignore_errors: bool) -> str:
        first = ""
        for name in self._found(state, action):
            try:
                self._run_one(name)
            except ScriptError as error:
                if ignore_errors or name.startswith(SCRIPT + TOO_LATE):
                    self._device.ignored_script(name.removeprefix(SCRIPT))
                if not ignore_errors:
                    raise
                first = first or str(error)
        return first

    def _found(self, state: str, action: str) -> list[str]:
        if not self._data.exists(SCRIPT + "version"):
            return []
        start = f"{SCRIPT}{state}_{action}_"
        return sorted(name for name in self._data.names() if name.startswith(start))

    def _run_one(self, path: str) -> None:
        name = path.removeprefix(SCRIPT)
        console.say(f"state script {name}")
        try:
            what = self._data.read(path, 0, 16)
            if what == b"fail":
                raise ScriptError(f"state script {name} exited with status 1")
            if what == b"later":
                self._device.now += 120.0
            if name.startswith("ArtifactInstall_Enter"):
                for old in self._data.names():
                    if old.startswith(DONE):
                        self._data.remove(old)
            self._data.create(DONE + name)
            self._data.sync(DONE + name)
        except FileSystemError as error:
            raise ScriptError(f"state script {name}: {error.strerror}") from error


class _Reboot:
    def request(self) -> None:
        return
