"""Faults and triggers as values that read like a sentence.

A fault says what goes wrong, a trigger says when; together they are armed on a device. A trigger
is never a time: it is a place on the disk, a count of bytes, a line on the console, a state of the
updater. `str()` of a fault with its trigger is the sentence in the report.
"""

from __future__ import annotations

from typing import Literal

from attrs import evolve, field, frozen, validators

from framework.disk import MODELS, CacheModel, TornSector

CacheModelName = Literal[
    "kept",
    "prefix",
    "subset",
    "reordered",
    "torn",
    "lying",
    "torn-page",
    "sd",
    "emmc",
    "discard",
]


class FaultError(Exception):
    """A fault that this rig can't do, or that makes no sense; nothing has run yet."""


@frozen
class SlotWrite:
    """When this share of the image has been written into the passive slot."""

    percent: float = field(validator=[validators.ge(0), validators.le(100)])

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"when {self.percent:g} % of the image is written"


@frozen
class BootEnvWrite:
    """Inside a write to the boot environment, by the updater or the bootloader: the nth one.

    With `after`, writes count from when the updater entered that state.
    """

    nth: int = field(default=1, validator=validators.ge(1))
    after: str | None = None

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        since = "" if self.after is None else f" in {self.after}"
        return f"inside boot-environment write {self.nth}{since}"


@frozen
class AfterSwitch:
    """Some disk operations after the boot environment was first written, by whoever."""

    operations: int = field(validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"{self.operations} disk operations after the switch"


@frozen
class ConsoleSays:
    """When a line of the console contains this text."""

    text: str = field(validator=validators.min_len(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f'when the console says "{self.text}"'


@frozen
class AtState:
    """When the updater enters this state, for the nth time."""

    name: str = field(validator=validators.min_len(1))
    nth: int = field(default=1, validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        often = "" if self.nth == 1 else f" for time {self.nth}"
        return f"when the updater enters {self.name}{often}"


@frozen
class OnRecord:
    """Inside the write that puts this state on the updater's record: the one before has ended."""

    name: str = field(validator=validators.min_len(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"inside the write that records {self.name}"


@frozen
class DiskOperation:
    """Inside the nth disk operation after the updater entered this state (for that time)."""

    nth: int = field(validator=validators.ge(1))
    after: AtState

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        often = "" if self.after.nth == 1 else f", time {self.after.nth}"
        return f"inside disk operation {self.nth} in {self.after.name}{often}"


@frozen
class Downloaded:
    """When this share of the artifact has passed the proxy towards the device."""

    percent: float = field(validator=[validators.ge(0), validators.le(100)])

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"when {self.percent:g} % of the artifact is downloaded"


Trigger = (
    SlotWrite
    | BootEnvWrite
    | AfterSwitch
    | ConsoleSays
    | AtState
    | OnRecord
    | DiskOperation
    | Downloaded
)


def slot_write(*, percent: float) -> Trigger:
    """When `percent` of the image has been written into the passive slot."""
    return SlotWrite(percent)


def boot_env_write(nth: int = 1, *, after: str | None = None) -> Trigger:
    """Inside the nth write to the boot environment (since the updater entered state `after`)."""
    return BootEnvWrite(nth, after)


def after_switch(*, operations: int) -> Trigger:
    """`operations` disk operations after the boot environment was written."""
    return AfterSwitch(operations)


def console(text: str) -> Trigger:
    """When a console line contains `text`."""
    return ConsoleSays(text)


def state(name: str) -> Trigger:
    """When the updater enters the state `name`."""
    return AtState(name)


def on_record(name: str) -> Trigger:
    """Inside the write that puts the state `name` on the updater's record."""
    return OnRecord(name)


def disk_operation(nth: int, *, after: str, entry: int = 1) -> Trigger:
    """Inside the nth disk operation after the updater's `entry`th entry of the state `after`."""
    return DiskOperation(nth, AtState(after, entry))


def downloaded(*, percent: float) -> Trigger:
    """When `percent` of the artifact has been downloaded."""
    return Downloaded(percent)


def _check_model(_: object, __: object, model: object) -> None:
    if not isinstance(model, CacheModel) and model not in MODELS:
        raise FaultError(f"{model!r} is no cache model; known: {', '.join(MODELS)}")


@frozen
class PowerCut:
    """The power goes, and the disk keeps what `model` says of the writes not yet flushed.

    Attributes:
        model: the cache model, or the name of one (see `framework.disk.MODELS`).
        trigger: when.
    """

    model: CacheModelName | CacheModel = field(default="kept", validator=_check_model)
    trigger: Trigger | None = None

    def when(self, trigger: Trigger) -> PowerCut:
        """The same fault, at this trigger."""
        if isinstance(trigger, Downloaded):
            raise FaultError("a power cut is triggered by the disk or the console, not the proxy")
        return evolve(self, trigger=trigger)

    def __str__(self) -> str:
        """The fault as a sentence."""
        model = str(self.model)
        if isinstance(self.model, TornSector):
            model = f"torn, {' or '.join(self.model.kinds)}"
        return f"power cut {self.trigger} (cache: {model})"


@frozen
class NetworkDrop:
    """The connection to the server fails.

    Attributes:
        kind: `fin`, `reset`, `stall`, `refuse` or `corrupt`, as in `framework.network`.
        lasts_s: how long a stall or a refusal lasts; None: until the scenario restores it.
        times: how often.
        trigger: when.
    """

    kind: Literal["fin", "reset", "stall", "refuse", "corrupt"]
    lasts_s: float | None = None
    times: int = 1
    trigger: Downloaded | None = None

    def when(self, trigger: Trigger) -> NetworkDrop:
        """The same fault, at this trigger."""
        if not isinstance(trigger, Downloaded):
            raise FaultError(
                "a network fault is triggered by bytes through the proxy: downloaded()"
            )
        return evolve(self, trigger=trigger)

    def __str__(self) -> str:
        """The fault as a sentence."""
        names = {
            "fin": "connection closed",
            "reset": "connection reset",
            "stall": "network silent",
            "refuse": "server refusing",
            "corrupt": "a byte corrupted",
        }
        length = "" if self.lasts_s is None else f" for {self.lasts_s:g} s"
        often = "" if self.times == 1 else f", {self.times} times"
        return f"{names[self.kind]}{length} {self.trigger}{often}"


@frozen
class BitFlip:
    """The disk stores one bit wrong, without a word, in a write to the passive slot."""

    trigger: SlotWrite | None = None

    def when(self, trigger: Trigger) -> BitFlip:
        """The same fault, at this trigger."""
        if not isinstance(trigger, SlotWrite):
            raise FaultError("a bit flip strikes a place in the slot: slot_write()")
        return evolve(self, trigger=trigger)

    def __str__(self) -> str:
        """The fault as a sentence."""
        return f"disk flips a bit {self.trigger}"


Fault = PowerCut | NetworkDrop | BitFlip
