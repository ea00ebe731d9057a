"""What the client needs from its surroundings, as narrow protocols, injected once.

The device's implementations are in the modules named below; a simulated rig or a test supplies
its own. This module is imported for type checking only, never on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from updater.device.config import Slot
from updater.device.model import Outcome, State, Update

TYPE_CHECKING = False
if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator

    from updater.artifact import ArtifactReader, PayloadFile


class BlockDevice(Protocol):
    """A slot opened for exclusive writing (`blockdev.py`).

    Offsets and lengths are multiples of `block_bytes`; buffers are page-aligned. Every method
    raises SlotError, naming device and offset.
    """

    @property
    def size_bytes(self) -> int:
        """The device's size."""
        ...

    @property
    def block_bytes(self) -> int:
        """The alignment that reads and writes must have."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`; durable only after `sync`."""
        ...

    def sync(self) -> None:
        """Make everything written durable, through every cache."""
        ...

    def read_medium(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the medium itself, not from a cache of what was written."""
        ...

    def close(self) -> None:
        """Close; a failing close is an error."""
        ...


class Machine(Protocol):
    """The device as a whole: which slot runs, and access to the others (`blockdev.py`)."""

    def running_slot(self, slots: tuple[Slot, Slot]) -> Slot:
        """Return the slot that the root file system is on; SlotError when it is neither."""
        ...

    def user_of(self, slot: Slot) -> str | None:
        """Say what uses the slot ("mounted at /mnt"), or None."""
        ...

    def open_slot(self, slot: Slot) -> BlockDevice:
        """Open for exclusive writing."""
        ...

    def boot_id(self) -> str:
        """Return a text that is different after every restart."""
        ...

    def free_bytes(self, path: str) -> int:
        """Return how much may still be written to the file system of `path`; or OSError."""
        ...

    def sync_all(self) -> None:
        """Make durable what was written to any file, by whatever process; it never fails."""
        ...


class BootEnvironment(Protocol):
    """The boot loader's variables (`bootenv_uboot.py`, `bootenv_grub.py`)."""

    def read(self) -> dict[str, str]:
        """Return all variables; BootEnvError when no copy is valid."""
        ...

    def write(self, values: Mapping[str, str]) -> None:
        """Set the variables, all or nothing, durable on return."""
        ...


class DatabaseFiles(Protocol):
    """Where the state store's files are (`store.py`); errors are sqlite3's, or OSErrors."""

    def connect(self, path: str) -> sqlite3.Connection:
        """Open the database, making it if there is none."""
        ...

    def exists(self, path: str) -> bool:
        """Say whether there is such a file."""
        ...

    def set_aside(self, path: str, to: str) -> None:
        """Rename a database to `to`, and remove what SQLite keeps beside it."""
        ...

    def mend(self, path: str) -> int:
        """Overwrite blocks that can't be read with zeroes, durably; return how many there were."""
        ...


class StateStore(Protocol):
    """What must survive a power cut (`store.py`); every method is one durable transaction."""

    def update(self) -> Update | None:
        """Return the update in progress."""
        ...

    def save(self, update: Update) -> None:
        """Remember `update` as the one in progress."""
        ...

    def finish(self, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
        """Forget the update in progress, record how it ended and, if given, the new provides."""
        ...

    def provides(self) -> dict[str, str] | None:
        """Return what the committed system provides; None before the first commit."""
        ...

    def last_outcome(self) -> Outcome | None:
        """Return how the last update ended."""
        ...

    def unreported(self) -> list[Outcome]:
        """Return the outcomes of deployments that the server does not know yet, oldest first."""
        ...

    def attempts(self, deployment: str) -> int:
        """Return how often this deployment has ended before."""
        ...

    def mark_reported(self, outcome: Outcome) -> None:
        """Note that the server knows this outcome."""
        ...


class Clock(Protocol):
    """Time (`clock.py`)."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start, never backwards."""
        ...

    def utc_seconds(self) -> int:
        """Seconds since 1970, for people."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass (the backoff between two attempts)."""
        ...


class Download(Protocol):
    """The bytes of an artifact."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill at least one byte; 0 only at the end."""
        ...


class Transport(Protocol):
    """Fetches artifacts (`transport.py`).

    `identity` is what the next location stands for, if not for itself (a deployment); `refresh`
    returns a new location for it when a link has expired.
    """

    identity: str
    refresh: Callable[[], str] | None

    def open(self, location: str) -> AbstractContextManager[Download]:
        """Open a path or an https URL; TransportError when that is impossible."""
        ...


class Health(Protocol):
    """The health checks (`health.py`)."""

    def run(self) -> None:
        """Return when all passed; HealthError names the first that did not."""
        ...


class Reboot(Protocol):
    """Asks for a restart (`client.py`); init does it when the process exits with code 4."""

    def request(self) -> None:
        """Note that the device must restart now."""
        ...


class Scripts(Protocol):
    """State scripts (`scripts.py`); state and action are spelt as in their names."""

    def take(self, scripts: Mapping[str, bytes]) -> None:
        """Replace the artifact's scripts by these, durably."""
        ...

    def has(self, state: str, action: str) -> bool:
        """Say whether any script would run."""
        ...

    def run(self, state: str, action: str, *, ignore_errors: bool) -> str:
        """Run them in order; ScriptError at the first failure.

        With `ignore_errors` all of them run, and the first failure is returned ("" for none).
        """
        ...

    def drop(self) -> None:
        """Forget the artifact's scripts."""
        ...

    def left_over(self) -> bool:
        """Say whether there are scripts of an artifact."""
        ...


class Modules(Protocol):
    """The update module of the artifact in progress (`modules.py`); errors are ModuleErrors."""

    def prepare(self, reader: ArtifactReader, provides: Mapping[str, str]) -> None:
        """Lay out the module's file tree, durably; refuse when there is no such module."""
        ...

    def download(self, files: Iterator[PayloadFile]) -> None:
        """Stream the payload to the module, or store it durably where it will look."""
        ...

    def reverts(self) -> bool:
        """Ask whether the module can roll back."""
        ...

    def needs_reboot(self) -> str:
        """Ask for "No", "Yes" (the module restarts something) or "Automatic" (the device)."""
        ...

    def call(self, state: State) -> None:
        """Let the module do `state`."""
        ...

    def drop(self) -> None:
        """Remove the file tree."""
        ...


class Observer(Protocol):
    """Who follows an update from outside, and may hold or stop it (`managed.py`).

    `manages`: restarts are this process's business, not those of a person or of init.
    """

    @property
    def manages(self) -> bool:
        """Whether this process restarts the device."""
        ...

    def proves(self, update: Update) -> bool:
        """Whether the new system may be proved here and now, at a start of the client."""
        ...

    def entering(self, update: Update, state: State, hold: Callable[[], None]) -> None:
        """`state` was persisted and begins; an UpdaterError makes it fail.

        `hold` is called before a wait, so that a restart in it finds that nothing had begun.
        """
        ...

    def proving(self, update: Update) -> None:
        """The new system is healthy; an UpdaterError keeps it from being committed."""
        ...

    def finished(self, update: Update, outcome: Outcome) -> None:
        """The outcome is recorded; nothing may be raised."""
        ...
