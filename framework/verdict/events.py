"""What was seen during one run, in order: the only input of a verdict.

Every event is a plain frozen value with its witness: the disk (read by the harness from the
recorder, never through the device), the console, or what the device says of itself. Nothing here
knows QEMU, labgrid or pytest.
"""

from __future__ import annotations

import enum

from attrs import frozen


@frozen
class ImageFacts:
    """A root file system image that may stand in a slot.

    Attributes:
        name: its artifact name.
        sha256: hash of the whole image.
        size_bytes: its size.
        healthy: whether it boots and deserves to be committed. Ground truth: the harness built it.
    """

    name: str
    sha256: str
    size_bytes: int
    healthy: bool = True


class SlotContent(enum.Enum):
    """What stands in a slot, as read from the disk."""

    IMAGE = "image"
    """Bit for bit one known image."""
    UNLOADABLE = "unloadable"
    """No file system in it: blank, or being written with its head held back."""
    MIXED = "mixed"
    """A file system that is none of the known images."""


@frozen
class SlotState:
    """One slot: its content and, if that is an image, which."""

    content: SlotContent
    image: str | None = None

    def __str__(self) -> str:
        """The slot's content in a word or two."""
        return f"image {self.image}" if self.image is not None else self.content.value


@frozen
class BootEnvironment:
    """The boot environment on the disk, already reduced to the copy that counts.

    Attributes:
        valid_copies: how many copies are valid; with none, the rest says nothing.
        boot_slot: the slot that `mender_boot_part` names.
        upgrade_available: whether that slot is on trial.
        bootcount: attempts counted so far.
        bootlimit: attempts allowed.
    """

    valid_copies: int
    boot_slot: str | None = None
    upgrade_available: bool = False
    bootcount: int = 0
    bootlimit: int = 1


@frozen
class DiskSeen:
    """Slots and boot environment, read from the disk; `moment` says when, for people."""

    moment: str
    slots: dict[str, SlotState]
    environment: BootEnvironment


@frozen
class PowerCut:
    """The power went, at this operation of the recorder's journal, under this cache model."""

    operation: int
    model: str
    seed: int


@frozen
class BootSeen:
    """How a start ended, by the console: ready, or why not.

    Attributes:
        ready: whether the ready marker came within the boot budget.
        version: artifact name in the ready marker.
        slot: slot in the ready marker.
        boot_id: the kernel's boot_id in the ready marker.
        elapsed_s: seconds from power-on or reset to the end of the wait.
        attempts: how often a kernel was started on the way.
        evidence: last words of the console where it did not become ready.
    """

    ready: bool
    version: str | None = None
    slot: str | None = None
    boot_id: str | None = None
    elapsed_s: float = 0.0
    attempts: int = 1
    evidence: str = ""


@frozen
class InstallStarted:
    """An update began: which artifact."""

    artifact: str


@frozen
class InstallEnded:
    """An update's command came back, or could not (None: the power was cut meanwhile).

    Attributes:
        artifact: its name.
        exit_code: of `updater install`; None when the power went first.
        cause: what the device said of a failure.
        timed_out: it was still running at its deadline.
        armed: it said itself that what failed is still what the next restart starts.
    """

    artifact: str
    exit_code: int | None
    cause: str = ""
    timed_out: bool = False
    armed: bool = False


@frozen
class CommitReached:
    """The device entered ArtifactCommit on its console: it says that the new system is proven."""

    artifact: str


@frozen
class Committed:
    """The device acknowledged a commit on its console."""

    artifact: str
    slot: str


@frozen
class DataChecked:
    """The data partition, checked on the disk: file system and the files synced before."""

    clean: bool
    intact: bool
    detail: str = ""


@frozen
class StatusRead:
    """What the device tells an operator: the artifact it runs, the last outcome and its cause.

    Attributes:
        artifact: the one that it says it runs.
        outcome: of the last update.
        cause: of that outcome.
        hidden: an error that was ignored and that it should tell, and doesn't.
    """

    artifact: str
    outcome: str = ""
    cause: str = ""
    hidden: str = ""


@frozen
class RetryEnded:
    """The same update was tried again after the fault; whether it was committed in the end."""

    artifact: str
    committed: bool
    detail: str = ""


@frozen
class ContractChecked:
    """A promise of the client's that does not show on the disk, and whether it was kept.

    Attributes:
        what: the promise, or how it was broken.
        kept: whether it was kept.
    """

    what: str
    kept: bool


@frozen
class ServerTold:
    """What the management server was told, once the device had nothing more to do.

    Attributes:
        artifact: the deployment's.
        status: the device's in that deployment.
        cause: of a failure.
    """

    artifact: str
    status: str
    cause: str = ""


Event = (
    DiskSeen
    | PowerCut
    | BootSeen
    | InstallStarted
    | InstallEnded
    | CommitReached
    | Committed
    | DataChecked
    | StatusRead
    | RetryEnded
    | ContractChecked
    | ServerTold
)


@frozen
class Run:
    """Everything that one run showed.

    Attributes:
        images: the images that may stand in a slot, by name.
        initial: the artifact that was committed when the run began.
        events: what was seen, oldest first.
        boot_limit: most kernel starts that one start of the device may take.
    """

    images: dict[str, ImageFacts]
    initial: str
    events: tuple[Event, ...]
    boot_limit: int = 4
