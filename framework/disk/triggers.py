"""When something happens to a disk, and what: triggers, and the actions that they fire.

Values only; the recorder evaluates them, under its lock, at the arrival of every mutating
operation, so a trigger is exact: it fires *before* the operation that meets it is carried out.
"""

from __future__ import annotations

import abc
import dataclasses
import errno
import math
import re
import threading
from collections.abc import Callable
from typing import Final

from framework.disk.errors import RecorderError
from framework.disk.journal import SECTOR, Kind

NBD_EIO: Final = 5
NBD_ENOSPC: Final = 28
_ERRORS: Final = {errno.EIO: NBD_EIO, errno.ENOSPC: NBD_ENOSPC}
_TARGETS: Final = frozenset({"read", "write", "flush", "discard"})
_NOTHING: Final = memoryview(b"")
_CHANGES: Final = frozenset({Kind.WRITE, Kind.DISCARD, Kind.ZEROES})


@dataclasses.dataclass(frozen=True, slots=True)
class Arriving:
    """An operation at its arrival; `operation` is the number that it gets if it isn't refused."""

    operation: int
    kind: Kind
    device: str
    offset: int
    length: int
    fua: bool = False
    content: memoryview = dataclasses.field(default=_NOTHING, repr=False, compare=False)
    """What a write carries. Valid only while a counter is fed with it."""

    def __str__(self) -> str:
        where = "" if self.kind is Kind.FLUSH else f" {self.length} bytes at {self.offset}"
        return f"operation {self.operation} ({self.kind.name.lower()} {self.device}{where})"


def _overlap(a: int, a_length: int, b: int, b_length: int) -> int:
    return max(0, min(a + a_length, b + b_length) - max(a, b))


class Counter(abc.ABC):
    """A trigger's state since it was armed."""

    @abc.abstractmethod
    def feed(self, arriving: Arriving) -> bool:
        """Take the next operation; True if the trigger fires on it."""


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A condition on the stream of mutating operations. Make one with a class method.

    Mutating operations are writes, flushes, discards and write-zeroes over all devices.
    """

    text: str
    new_counter: Callable[[], Counter] = dataclasses.field(repr=False, compare=False)
    devices: frozenset[str] = frozenset()
    """The devices that it names, so that arming can refuse an unknown one."""

    def __str__(self) -> str:
        return self.text

    @classmethod
    def operation(cls, number: int) -> Trigger:
        """The `number`th mutating operation (from 1)."""
        _positive("operation", number)
        return cls(f"operation {number}", lambda: _Matches(number, lambda _: True))

    @classmethod
    def nth_flush(cls, number: int, device: str | None = None) -> Trigger:
        """The `number`th flush (from 1), of one device or of any."""
        _positive("flush", number)

        def match(op: Arriving) -> bool:
            return op.kind is Kind.FLUSH and device in (None, op.device)

        return cls(f"flush {number}" + _of(device), lambda: _Matches(number, match), _named(device))

    @classmethod
    def block_range(cls, device: str, offset: int, length: int, skip: int = 0) -> Trigger:
        """A write, discard or write-zeroes that touches a range, after `skip` others did."""
        _positive("length", length)

        def match(op: Arriving) -> bool:
            return (
                op.kind in _CHANGES
                and op.device == device
                and _overlap(op.offset, op.length, offset, length) > 0
            )

        text = f"write {skip + 1} to {device} {offset}+{length}"
        return cls(text, lambda: _Matches(skip + 1, match), _named(device))

    @classmethod
    def bytes_written(
        cls, count: int, device: str | None = None, offset: int = 0, length: int | None = None
    ) -> Trigger:
        """The write with which at least `count` bytes will have been written into a range."""
        _positive("byte count", count)
        text = f"{count} bytes written" + _of(device)
        if offset or length is not None:
            text += f" {offset}+{'' if length is None else length}"
        return cls(text, lambda: _Bytes(count, device, offset, length), _named(device))

    @classmethod
    def percent_written(cls, percent: float, device: str, offset: int, length: int) -> Trigger:
        """The write with which at least `percent` of a range's size will have been written.

        Bytes written twice count twice.
        """
        if not 0 < percent <= 100:
            raise RecorderError(f"trigger: {percent} % is not within 0 (exclusive) to 100")
        count = max(1, math.ceil(length * percent / 100))
        made = cls.bytes_written(count, device, offset, length)
        return dataclasses.replace(made, text=f"{percent:g} % of {device} {offset}+{length}")

    @classmethod
    def content(cls, what: str, pattern: re.Pattern[bytes], device: str | None = None) -> Trigger:
        """A write that carries `pattern`, which `what` puts into words.

        It is looked for in each write alone: it must not lie across a block's end.
        """

        def match(op: Arriving) -> bool:
            return (
                op.kind is Kind.WRITE
                and device in (None, op.device)
                and pattern.search(op.content) is not None
            )

        text = f"the write of {what}" + _of(device)
        return cls(text, lambda: _Matches(1, match), _named(device))

    @classmethod
    def any_of(cls, *triggers: Trigger) -> Trigger:
        """Whichever of these comes first."""
        if not triggers:
            raise RecorderError("trigger: any_of needs at least one trigger")
        return cls(
            " or ".join(t.text for t in triggers),
            lambda: _Any([t.new_counter() for t in triggers]),
            frozenset().union(*(t.devices for t in triggers)),
        )


@dataclasses.dataclass
class _Matches(Counter):
    due: int
    match: Callable[[Arriving], bool]

    def feed(self, arriving: Arriving) -> bool:
        if self.match(arriving):
            self.due -= 1
            return self.due == 0
        return False


@dataclasses.dataclass
class _Bytes(Counter):
    due: int
    device: str | None
    offset: int
    length: int | None

    def feed(self, arriving: Arriving) -> bool:
        if arriving.kind is not Kind.WRITE or self.device not in (None, arriving.device):
            return False
        length = arriving.offset + arriving.length if self.length is None else self.length
        inside = _overlap(arriving.offset, arriving.length, self.offset, length)
        before = self.due
        self.due -= inside
        return before > 0 >= self.due


@dataclasses.dataclass
class _Any(Counter):
    counters: list[Counter]

    def feed(self, arriving: Arriving) -> bool:
        return any([c.feed(arriving) for c in self.counters])  # noqa: C419 - feed every one


@dataclasses.dataclass(frozen=True, slots=True)
class Freeze:
    """Answer nothing any more, reads too, until the power is cut; the operation is refused.

    With `inside` it is not refused but left in flight: it arrived, its data are in the journal,
    it is never completed. A cache model then decides what of it reached the medium, so that power
    goes *inside* this very write, also where it carries FUA.
    """

    inside: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """A misbehaviour of a device. Make one with a class method.

    `count` limits how many operations it hits (None: all until disarmed).
    """

    text: str
    targets: frozenset[str]
    device: str | None = None
    offset: int = 0
    length: int | None = None
    count: int | None = None
    error_code: int = 0
    latency_s: float = 0.0
    lies: bool = False
    flip: tuple[int, int] | None = None
    """(offset on the device, bit 0..7)."""
    rot: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.text

    def hits(self, target: str, device: str, offset: int, length: int) -> bool:
        """Whether it concerns an operation on `target` (read, write, flush, discard)."""
        if target not in self.targets or self.device not in (None, device):
            return False
        if target == "flush" or (self.offset == 0 and self.length is None):
            return True
        size = offset + length if self.length is None else self.length
        return _overlap(offset, length, self.offset, size) > 0

    @classmethod
    def error(
        cls,
        code: int = errno.EIO,
        on: tuple[str, ...] = ("write",),
        *,
        device: str | None = None,
        offset: int = 0,
        length: int | None = None,
        count: int | None = None,
    ) -> Fault:
        """Fail operations with errno.EIO or errno.ENOSPC; `on`: read, write, flush, discard."""
        if code not in _ERRORS:
            raise RecorderError(f"fault: error {code} is not EIO or ENOSPC")
        text = f"{errno.errorcode[code]} on {'/'.join(on)}" + _of(device)
        return cls(text, _targets(on), device, offset, length, count, error_code=_ERRORS[code])

    @classmethod
    def latency(
        cls,
        seconds: float,
        on: tuple[str, ...] = ("write",),
        *,
        device: str | None = None,
        offset: int = 0,
        length: int | None = None,
        count: int | None = None,
    ) -> Fault:
        """Delay operations by `seconds`; later ones overtake them."""
        if not 0 < seconds <= 3600:
            raise RecorderError(f"fault: a latency of {seconds} s is not within 0 to 3600")
        text = f"{seconds} s latency on {'/'.join(on)}" + _of(device)
        return cls(text, _targets(on), device, offset, length, count, latency_s=seconds)

    @classmethod
    def lying_flush(cls, device: str | None = None, count: int | None = None) -> Fault:
        """Acknowledge flushes that make nothing durable."""
        text = "lying flush" + _of(device)
        return cls(text, frozenset({"flush"}), device, count=count, lies=True)

    @classmethod
    def bit_flip(cls, device: str, offset: int, bit: int = 0, count: int | None = 1) -> Fault:
        """Store a wrong bit: of the next `count` writes that cover the byte at `offset`."""
        _bit(bit)
        text = f"bit flip at {device} {offset} bit {bit}"
        return cls(text, frozenset({"write"}), device, offset, 1, count, flip=(offset, bit))

    @classmethod
    def bit_rot(cls, device: str, offset: int, bit: int = 0) -> Fault:
        """Flip a bit of what is stored, now: reads are wrong until the sector is rewritten."""
        _bit(bit)
        text = f"bit rot at {device} {offset} bit {bit}"
        return cls(text, frozenset(), device, offset, 1, 1, rot=(offset, bit))


@dataclasses.dataclass(frozen=True, slots=True)
class Inject:
    """Start a fault with the operation that fired the trigger: that one is hit already."""

    fault: Fault


Action = Freeze | Inject


class Armed:
    """A trigger that was armed. `fired` is set once its action took effect."""

    def __init__(self, trigger: Trigger, action: Action, disarm: Callable[[Armed], None]) -> None:
        self.trigger = trigger
        self.action = action
        self.fired = threading.Event()
        """Set when the freeze is complete (earlier operations done), or the fault is active."""
        self.operation: int | None = None
        """The number of the operation that fired it."""
        self.at: Arriving | None = None
        """That operation."""
        self.counter = trigger.new_counter()
        self._disarm = disarm

    def disarm(self) -> None:
        """Take it back; a fault that it started stops. No effect on a freeze that happened."""
        self._disarm(self)

    def __repr__(self) -> str:
        state = f"fired at operation {self.operation}" if self.operation else "armed"
        return f"<Armed {self.trigger.text}: {state}>"


def _positive(what: str, number: int) -> None:
    if number < 1:
        raise RecorderError(f"trigger: {what} {number} is not positive")


def _of(device: str | None) -> str:
    return f" of {device}" if device else ""


def _named(device: str | None) -> frozenset[str]:
    return frozenset({device}) if device else frozenset()


def _targets(on: tuple[str, ...]) -> frozenset[str]:
    unknown = set(on) - _TARGETS
    if unknown or not on:
        raise RecorderError(f"fault: on={on!r} must be some of {', '.join(sorted(_TARGETS))}")
    return frozenset(on)


def _bit(bit: int) -> None:
    if not 0 <= bit <= 7:
        raise RecorderError(f"fault: bit {bit} is not within 0 to 7")


def sector_of(offset: int) -> int:
    """The offset of the sector that holds a byte."""
    return offset - offset % SECTOR
