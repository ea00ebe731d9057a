"""Faults of the disk: errors, slowness, lies, decay, and no room.

What the recorder does (`framework.disk`) strikes with the very operation of the trigger. `full` is
about the data partition's file system, which only the device itself can fill.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators

from framework.faults.base import Fault, require_place
from framework.faults.triggers import SlotWrite, Trigger

Access = Literal["read", "write", "flush", "discard"]
ACCESSES = ("read", "write", "flush", "discard")
COUNT = validators.optional(validators.ge(1))


def _on(value: str) -> str:
    return "the disk" if not value else f"the {value}"


def _check_accesses(_: object, __: object, on: tuple[str, ...]) -> None:
    if not on or set(on) - set(ACCESSES):
        raise ValueError(f"on={on!r} must be some of {', '.join(ACCESSES)}")


class StorageFamily(Fault):
    """Base of the faults that the recorder does."""

    family: ClassVar[str] = "storage"
    needs: ClassVar[frozenset[str]] = frozenset({"power-cut"})


@frozen
class StorageError(StorageFamily):
    """Operations fail with EIO.

    Attributes:
        on: which: read, write, flush, discard.
        area: where (see `writes_to`); empty: everywhere. Flushes have no place.
        count: how many; None: all until the scenario restores it.
    """

    on: tuple[Access, ...] = field(default=("write",), validator=_check_accesses)
    area: str = ""
    count: int | None = field(default=None, validator=COUNT)

    def what(self) -> str:
        """What goes wrong."""
        often = "" if self.count is None else f" {self.count} times"
        return f"EIO on {'/'.join(self.on)} of {_on(self.area)}{often}"


@frozen
class ReadOnly(StorageFamily):
    """The disk takes no writes any more, as a card at its end does; what is there can be read."""

    area: str = ""

    def what(self) -> str:
        """What goes wrong."""
        return f"{_on(self.area)} turning read-only"


@frozen
class SlowDisk(StorageFamily):
    """Operations take longer.

    Attributes:
        seconds: each by so much.
        on: which.
        count: how many; None: all until the scenario restores it.
    """

    seconds: float = field(validator=[validators.gt(0), validators.le(600)])
    on: tuple[Access, ...] = field(default=("write",), validator=_check_accesses)
    count: int | None = field(default=None, validator=COUNT)

    def what(self) -> str:
        """What goes wrong."""
        often = "" if self.count is None else f", {self.count} times"
        return f"{'/'.join(self.on)} slow by {self.seconds:g} s{often}"


@frozen
class LyingFlushes(StorageFamily):
    """The disk acknowledges flushes that make nothing durable; a later cut shows it."""

    def what(self) -> str:
        """What goes wrong."""
        return "disk lying about flushes"


@frozen
class BitFlip(StorageFamily):
    """The disk stores one bit wrong, without a word, in a write to the passive slot."""

    def check_trigger(self, trigger: Trigger) -> None:
        """A place in the slot."""
        require_place(self, trigger, SlotWrite, why="strikes a place in the slot: slot_write()")

    def what(self) -> str:
        """What goes wrong."""
        return "disk flips a bit"


@frozen
class BitRot(StorageFamily):
    """What is stored decays: one bit of a slot, of the boot environment, or of a file.

    Attributes:
        area: `active slot`, `passive slot`, `slot a`, `slot b`, `data`, or `boot environment`
            (one of its copies).
        file: a file of the data partition, by its path there, instead of a place.
        percent: the place in the area, or in the file.
    """

    area: str = field(default="passive slot", validator=validators.min_len(1))
    file: str = ""
    percent: float = field(default=50.0, validator=[validators.ge(0), validators.le(100)])

    def what(self) -> str:
        """What goes wrong."""
        where = f"file {self.file}" if self.file else f"the {self.area}"
        return f"a bit of {where} rots"


@frozen
class DataFull(Fault):
    """The data partition is full, but for some bytes.

    Attributes:
        leave_bytes: what is left.
    """

    family: ClassVar[str] = "storage"
    needs: ClassVar[frozenset[str]] = frozenset({"linux"})

    leave_bytes: int = field(default=0, validator=validators.ge(0))

    def what(self) -> str:
        """What goes wrong."""
        left = "" if not self.leave_bytes else f" but for {self.leave_bytes >> 10} KiB"
        return f"data partition full{left}"


def storage_error(*on: Access, area: str = "", count: int | None = None) -> StorageError:
    """Operations fail with EIO (writes, unless said otherwise)."""
    return StorageError(on or ("write",), area, count)


def read_only(area: str = "") -> ReadOnly:
    """The disk takes no writes any more."""
    return ReadOnly(area)


def slow_disk(seconds: float, *on: Access, count: int | None = None) -> SlowDisk:
    """Operations take longer (writes, unless said otherwise)."""
    return SlowDisk(seconds, on or ("write",), count)


def lying_flushes() -> LyingFlushes:
    """The disk lies about flushes."""
    return LyingFlushes()


def bit_flip() -> BitFlip:
    """One bit of the image is stored wrong."""
    return BitFlip()


def bit_rot(area: str = "passive slot", *, file: str = "", percent: float = 50.0) -> BitRot:
    """One stored bit decays."""
    return BitRot(area, file, percent)


def data_full(leave_bytes: int = 0) -> DataFull:
    """The data partition is full."""
    return DataFull(leave_bytes)
