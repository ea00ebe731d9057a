"""When a fault strikes: places on the disk, counts of bytes, console lines, states, other faults.

A trigger is never a time. `str()` of one is its part of the report's sentence, `needs` the labgrid
features that a rig must have for it. What a trigger means on a given device (which sectors, which
byte of which stream) is found out when it is armed; nothing here touches a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import evolve, field, frozen, validators

from framework.faults.errors import FaultError

if TYPE_CHECKING:
    from framework.faults.base import Fault

Edge = Literal["enter", "leave"]
Direction = Literal["up", "down"]

PERCENT = [validators.ge(0), validators.le(100)]


class Trigger:
    """Base of all triggers."""

    needs: ClassVar[frozenset[str]] = frozenset()


class DiskTrigger(Trigger):
    """Base of the triggers that the recorder sees: exact, before the operation is carried out."""

    needs: ClassVar[frozenset[str]] = frozenset({"power-cut"})


class StreamTrigger(Trigger):
    """Base of the triggers that the proxy sees: exact, before the byte is forwarded."""

    needs: ClassVar[frozenset[str]] = frozenset({"network"})


@frozen
class Now(Trigger):
    """At once, while the scenario waits."""

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return "at once"


@frozen
class SlotWrite(DiskTrigger):
    """When this share of the image has been written into the passive slot."""

    percent: float = field(validator=PERCENT)

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"when {self.percent:g} % of the image is written"


@frozen
class BootEnvWrite(DiskTrigger):
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
class AfterSwitch(DiskTrigger):
    """Some disk operations after the boot environment was first written, by whoever."""

    operations: int = field(validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"{self.operations} disk operations after the switch"


@frozen
class Operation(DiskTrigger):
    """The nth disk operation (write, flush, discard, write-zeroes) from the arming on."""

    number: int = field(validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"at disk operation {self.number}"


@frozen
class NthFlush(DiskTrigger):
    """The nth flush from the arming on."""

    number: int = field(validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"at flush {self.number}"


@frozen
class Writes(DiskTrigger):
    """The nth write that touches a range of an area of the disk.

    Attributes:
        area: `data`, `passive slot`, `slot a`, `slot b` or `boot environment`.
        offset: first byte of the range, from the area's start.
        length: bytes of the range; None: to the area's end.
        nth: which write that touches it.
    """

    area: str = field(validator=validators.min_len(1))
    offset: int = field(default=0, validator=validators.ge(0))
    length: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    nth: int = field(default=1, validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        whole = self.offset == 0 and self.length is None
        where = "" if whole else f" at byte {self.offset}"
        return f"at write {self.nth} to the {self.area}{where}"


@frozen
class OnRecord(DiskTrigger):
    """Inside the write that puts this state on the updater's record: the one before has ended."""

    name: str = field(validator=validators.min_len(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"inside the write that records {self.name}"


@frozen
class ConsoleSays(Trigger):
    """When a line of the console contains this text."""

    text: str = field(validator=validators.min_len(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f'when the console says "{self.text}"'


@frozen
class AtState(Trigger):
    """When the updater enters or leaves a state, or while it is in it.

    It leaves a state when it enters the next one, or says how the update ended.

    Attributes:
        name: the state.
        edge: `enter` or `leave`.
        percent: while in it, when this share of the image has been written since it was entered.
        operations: while in it, this many disk operations after it was entered.
        nth: of its entries, this one.
    """

    name: str = field(validator=validators.min_len(1))
    edge: Edge = field(default="enter", validator=validators.in_(("enter", "leave")))
    percent: float | None = field(default=None, validator=validators.optional(PERCENT))
    operations: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    nth: int = field(default=1, validator=validators.ge(1))

    def at(self, *, percent: float | None = None, operations: int | None = None) -> AtState:
        """While in this state: at a share of the image written, or after some disk operations."""
        if (percent is None) == (operations is None):
            raise FaultError("a place in a state is a percent or a number of operations")
        if self.edge == "leave":
            raise FaultError(f"{self.name} is over when it is left: at() makes no sense")
        return evolve(self, percent=percent, operations=operations)

    def leave(self) -> AtState:
        """When the updater leaves this state."""
        if self.within:
            raise FaultError(f"{self.name} is over when it is left: at() makes no sense")
        return evolve(self, edge="leave")

    @property
    def within(self) -> bool:
        """Whether it is a place inside the state, seen on the disk."""
        return self.percent is not None or self.operations is not None

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        often = "" if self.nth == 1 else f" for the {self.nth}. time"
        if self.percent is not None:
            return f"in {self.name}, when {self.percent:g} % of the image is written{often}"
        if self.operations is not None:
            return f"{self.operations} disk operations after the updater entered {self.name}{often}"
        return f"when the updater {self.edge}s {self.name}{often}"


@frozen
class Downloaded(StreamTrigger):
    """When this share of the artifact has passed the proxy towards the device."""

    percent: float = field(validator=PERCENT)

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        return f"when {self.percent:g} % of the artifact is downloaded"


@frozen
class StreamByte(StreamTrigger):
    """At a byte of the stream through the proxy, counted from the arming over all connections."""

    number: int = field(validator=validators.ge(0))
    direction: Direction = field(default="down", validator=validators.in_(("up", "down")))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        toward = "device" if self.direction == "down" else "server"
        return f"at byte {self.number} towards the {toward}"


@frozen
class MachineEvent(Trigger):
    """When QEMU reports an event, such as RESET or WATCHDOG."""

    needs: ClassVar[frozenset[str]] = frozenset({"emulated"})

    name: str = field(validator=validators.min_len(1))
    nth: int = field(default=1, validator=validators.ge(1))

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        often = "" if self.nth == 1 else f" for the {self.nth}. time"
        return f"when the machine reports {self.name}{often}"


@frozen
class After(Trigger):
    """After another fault has struck: at once, or at a trigger that is armed then.

    After a power cut, "then" is when power comes back.
    """

    first: Fault
    then: Trigger | None = None

    def __str__(self) -> str:
        """The trigger as part of a sentence."""
        place = "" if self.then is None else f"{self.then}, "
        return f"{place}after [{self.first}]"


def now() -> Trigger:
    """At once."""
    return Now()


def slot_write(*, percent: float) -> Trigger:
    """When `percent` of the image has been written into the passive slot."""
    return SlotWrite(percent)


def boot_env_write(nth: int = 1, *, after: str | None = None) -> Trigger:
    """Inside the nth write to the boot environment (since the updater entered state `after`)."""
    return BootEnvWrite(nth, after)


def after_switch(*, operations: int) -> Trigger:
    """`operations` disk operations after the boot environment was written."""
    return AfterSwitch(operations)


def operation(number: int) -> Trigger:
    """The `number`th disk operation from now on."""
    return Operation(number)


def flush(number: int = 1) -> Trigger:
    """The `number`th flush from now on."""
    return NthFlush(number)


def writes_to(area: str, offset: int = 0, length: int | None = None, *, nth: int = 1) -> Trigger:
    """The nth write to an area of the disk, or to a range of it."""
    return Writes(area, offset, length, nth)


def console(text: str) -> Trigger:
    """When a console line contains `text`."""
    return ConsoleSays(text)


def on_record(name: str) -> Trigger:
    """Inside the write that puts the state `name` on the updater's record."""
    return OnRecord(name)


def state(name: str, nth: int = 1) -> AtState:
    """When the updater enters the state `name`; `.leave()` and `.at()` say more."""
    return AtState(name, nth=nth)


def downloaded(*, percent: float) -> Trigger:
    """When `percent` of the artifact has been downloaded."""
    return Downloaded(percent)


def stream_byte(number: int, direction: Direction = "down") -> Trigger:
    """At byte `number` through the proxy, from now on: `down` is towards the device."""
    return StreamByte(number, direction)


def machine_event(name: str, nth: int = 1) -> Trigger:
    """When QEMU reports the event `name` for the nth time."""
    return MachineEvent(name, nth)


def after(first: Fault, then: Trigger | None = None) -> Trigger:
    """After the fault `first` has struck, at once or at `then`."""
    return After(first, then)
