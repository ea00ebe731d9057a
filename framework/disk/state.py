"""What the journal's records mean for a disk: operations, epochs, decisions and their effect.

Pure functions over plain arrays, used alike by the live recorder, the journal's reader and
whoever enumerates crash states. The rules:

* mutating operations (write, flush, discard, write-zeroes) are numbered from 1 over all devices,
  in the order of arrival; the device applies them in the order of completion;
* a flush makes durable what had *completed* on its device when the flush *arrived*;
* a write with FUA is durable when it completes; an operation that failed changed nothing;
* the *open* operations at a cut are all others of the power cycle: the cache model decides on
  them. The state "at operation n" is a power failure after 1..n were carried out and before
  n + 1 was, which is what a freeze at n + 1 makes on the live machine.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from framework.disk.journal import SECTOR, Flag, Kind, as_json
from framework.disk.lazy import (
    UNREADABLE,
    ZERO,
    SectorMap,
    place,
    place_kind,
    place_repeated,
)

Column = npt.NDArray[np.int64]

_COLUMNS: Final = (
    "kind",
    "device",
    "offset",
    "length",
    "flags",
    "position",
    "arrived",
    "arrived_ns",
    "completed",
    "completed_ns",
    "error",
    "cycle",
)
_WIDTH: Final = len(_COLUMNS)
_FLAGS: Final = _COLUMNS.index("flags")
_COMPLETED: Final = _COLUMNS.index("completed")
_COMPLETED_NS: Final = _COLUMNS.index("completed_ns")
_ERROR: Final = _COLUMNS.index("error")
_NEVER: Final = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, slots=True)
class Operations:
    """A run of mutating operations as columns; row i is operation number `first` + i.

    `position` is the payload's offset in the journal file, -1 without payload; `arrived` and
    `completed` are record sequence numbers (one total order), `completed` is -1 if the journal
    ends before; times are nanoseconds of the monotonic clock; `error` is an NBD error, 0 for
    none; `cycle` counts power cycles from 0.
    """

    first: int
    kind: Column
    device: Column
    offset: Column
    length: Column
    flags: Column
    position: Column
    arrived: Column
    arrived_ns: Column
    completed: Column
    completed_ns: Column
    error: Column
    cycle: Column

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def number(self) -> Column:
        """The operations' numbers."""
        return np.arange(self.first, self.first + len(self), dtype=np.int64)

    @property
    def fua(self) -> npt.NDArray[np.bool_]:
        """Which operations carried FUA."""
        return np.asarray((self.flags & Flag.FUA) != 0)

    @property
    def lying(self) -> npt.NDArray[np.bool_]:
        """Which flushes were acknowledged without an effect (an injected fault)."""
        return np.asarray((self.flags & Flag.LYING) != 0)

    def part(self, first: int, last: int) -> Operations:
        """The operations numbered `first` to `last`, both included."""
        a, b = first - self.first, last - self.first + 1
        if a < 0 or b > len(self):
            raise IndexError(
                f"operations {first}..{last} of {self.first}..{self.first + len(self) - 1}"
            )
        return Operations(first, *(getattr(self, name)[a:b] for name in _COLUMNS))


class OperationLog:
    """Grows by one row for every arrival; not thread-safe."""

    def __init__(self) -> None:
        self._cells = array("q")

    def __len__(self) -> int:
        return len(self._cells) // _WIDTH

    def arrive(
        self,
        what: tuple[int, int, int, int, int, int],
        *,
        sequence: int,
        time_ns: int,
        cycle: int,
    ) -> int:
        """Add an operation (kind, device, offset, length, flags, position); return its number."""
        self._cells.extend((*what, sequence, time_ns, -1, -1, 0, cycle))
        return len(self)

    def complete(self, number: int, sequence: int, time_ns: int, error: int, flags: int) -> None:
        """Note that operation `number` completed; `flags` are added to its own."""
        row = (number - 1) * _WIDTH
        self._cells[row + _COMPLETED] = sequence
        self._cells[row + _COMPLETED_NS] = time_ns
        self._cells[row + _ERROR] = error
        self._cells[row + _FLAGS] |= flags

    def table(self, first: int, last: int) -> Operations:
        """A copy of the operations numbered `first` to `last`, both included."""
        cells = self._cells[(first - 1) * _WIDTH : last * _WIDTH]
        matrix = np.array(cells, dtype=np.int64).reshape(-1, _WIDTH)
        return Operations(first, *(matrix[:, i].copy() for i in range(_WIDTH)))


@dataclasses.dataclass(frozen=True, slots=True)
class Rot:
    """The medium changed by itself: a sector's new content lies at `position` of the journal."""

    sequence: int
    time_ns: int
    after_operation: int
    device: int
    offset: int
    length: int
    position: int
    cycle: int


def application_order(operations: Operations) -> Column:
    """Row indices in the order in which the device carried the operations out.

    That is completion order; what never completed (the journal ends before) comes last.
    """
    key = np.where(operations.completed < 0, _NEVER, operations.completed)
    return np.lexsort((operations.arrived, key)).astype(np.int64)


def coverage(operations: Operations, devices: int, *, ignore_last: int | None = 0) -> Column:
    """Per device, the sequence number before which completed writes are durable (0: none).

    `ignore_last` flushes of each device, counted from the newest, are taken for lies (None: all).
    """
    threshold = np.zeros(devices, dtype=np.int64)
    if ignore_last is None:
        return threshold
    honest = (
        (operations.kind == Kind.FLUSH)
        & (operations.completed >= 0)
        & (operations.error == 0)
        & ~operations.lying
    )
    for device in range(devices):
        arrived = operations.arrived[honest & (operations.device == device)]
        if len(arrived) > ignore_last:
            threshold[device] = np.sort(arrived)[len(arrived) - 1 - ignore_last]
    return threshold


@dataclasses.dataclass(frozen=True, slots=True)
class PowerCycle:
    """The operations of one power cycle up to a cut, for a cache model to decide on."""

    operations: Operations
    devices: tuple[str, ...]
    sizes: tuple[int, ...]

    def changing(self) -> npt.NDArray[np.bool_]:
        """Rows that changed a device: no flushes, no failed operations."""
        return np.asarray((self.operations.kind != Kind.FLUSH) & (self.operations.error == 0))

    def open_rows(self, *, lies: int | None = 0) -> Column:
        """Rows of the operations at stake, in the order of application.

        `lies`: how many flushes of each device, from the newest, made nothing durable (None: all,
        and FUA meant nothing either).
        """
        operations = self.operations
        threshold = coverage(operations, len(self.devices), ignore_last=lies)
        done = operations.completed >= 0
        durable = done & (operations.completed < threshold[operations.device])
        if lies == 0:
            durable |= done & operations.fua
        open_mask = self.changing() & ~durable
        order = application_order(operations)
        return order[open_mask[order]]


@dataclasses.dataclass(frozen=True, slots=True)
class Partial:
    """An operation of which only some sectors reached the medium: (first, count) within it."""

    operation: int
    sectors: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Garbage:
    """A range that holds bytes nobody wrote: `content`, `repeat` times in a row.

    Repeating serves ranges that are too large to be kept as bytes: an erased unit, a discarded
    slot.
    """

    device: int
    offset: int
    content: bytes
    repeat: int = 1

    @property
    def length(self) -> int:
        """The range's length in bytes."""
        return len(self.content) * self.repeat


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """A range that gives EIO until it is rewritten."""

    device: int
    offset: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What a power cut did to the open operations: complete, so that it replays bit for bit."""

    dropped: tuple[int, ...] = ()
    """Numbers of the operations that are lost."""
    open_operations: int = 0
    """How many operations were at stake."""
    partial: tuple[Partial, ...] = ()
    garbage: tuple[Garbage, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()

    def describe(self) -> str:
        """One line for people."""
        text = f"{len(self.dropped)} of {self.open_operations} open operations lost"
        for torn in self.partial:
            kept = sum(count for _, count in torn.sectors)
            text += f", operation {torn.operation} torn ({kept} sectors kept)"
        for garbage in self.garbage:
            zeros = not any(garbage.content)
            what = "erased" if zeros and garbage.repeat > 1 else "of garbage"
            text += f", {garbage.length} bytes {what} at {garbage.offset}"
        for hole in self.unreadable:
            text += f", {hole.length} bytes unreadable at {hole.offset}"
        return text

    def to_payload(self, meta: dict[str, Any]) -> tuple[bytes, int]:
        """Serialise as a CUT record's payload; also return where the garbage begins in it.

        u32 length of the JSON, JSON, the dropped numbers as u64, the garbage's bytes.
        """
        fields = dict(meta)
        fields["dropped"] = len(self.dropped)
        fields["open"] = self.open_operations
        fields["partial"] = [[p.operation, [list(s) for s in p.sectors]] for p in self.partial]
        fields["garbage"] = [
            [g.device, g.offset, len(g.content), *([g.repeat] if g.repeat != 1 else [])]
            for g in self.garbage
        ]
        fields["unreadable"] = [[u.device, u.offset, u.length] for u in self.unreadable]
        text = as_json(fields)
        text += b" " * (-(len(text) + 4) % 8)
        dropped = np.asarray(self.dropped, dtype="<u8").tobytes()
        head = struct.pack("<I", len(text)) + text + dropped
        return head + b"".join(g.content for g in self.garbage), len(head)


def parse_cut(payload: bytes) -> tuple[dict[str, Any], Decision, int]:
    """Return a CUT payload's fields, its decision and where its garbage begins.

    Raises ValueError if it is malformed.
    """
    try:
        (length,) = struct.unpack_from("<I", payload)
        fields = json.loads(payload[4 : 4 + length])
        at = 4 + length
        count = int(fields["dropped"])
        dropped = tuple(np.frombuffer(payload, dtype="<u8", count=count, offset=at).tolist())
        at += 8 * count
        start = at
        garbage = []
        for device, offset, size, *repeat in fields["garbage"]:
            garbage.append(Garbage(device, offset, payload[at : at + size], *repeat))
            at += size
        decision = Decision(
            dropped=dropped,
            open_operations=int(fields["open"]),
            partial=tuple(
                Partial(number, tuple((a, b) for a, b in sectors))
                for number, sectors in fields["partial"]
            ),
            garbage=tuple(garbage),
            unreadable=tuple(Unreadable(*u) for u in fields["unreadable"]),
        )
    except (struct.error, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"malformed cut record: {error}") from error
    return fields, decision, start


def apply_operation(sectors: SectorMap, kind: int, offset: int, length: int, position: int) -> None:
    """Let one completed operation take effect on its device's map."""
    if kind == Kind.WRITE:
        place(sectors, offset, length, position)
    elif kind in (Kind.DISCARD, Kind.ZEROES):
        place_kind(sectors, offset, length, ZERO)


def rebuild(
    start: Sequence[SectorMap],
    operations: Operations,
    rots: Sequence[Rot],
    decision: Decision,
    garbage_position: int,
) -> list[SectorMap]:
    """The maps after a cut: `start` (the power-on maps, not changed), then what survived.

    `garbage_position` is where the decision's garbage lies in the journal file.
    """
    maps = [m.copy() for m in start]
    lost = set(decision.dropped)
    torn = {p.operation: p for p in decision.partial}
    order = application_order(operations)
    alive = (operations.kind != Kind.FLUSH) & (operations.error == 0)
    order = order[alive[order]]
    columns = zip(
        (order + operations.first).tolist(),
        operations.kind[order].tolist(),
        operations.device[order].tolist(),
        operations.offset[order].tolist(),
        operations.length[order].tolist(),
        operations.position[order].tolist(),
        operations.completed[order].tolist(),
        strict=True,
    )
    waiting = sorted(rots, key=lambda r: r.sequence, reverse=True)
    for number, kind, device, offset, length, position, completed in columns:
        while waiting and 0 <= waiting[-1].sequence < (completed if completed >= 0 else _NEVER):
            rot = waiting.pop()
            place(maps[rot.device], rot.offset, rot.length, rot.position)
        if number in lost:
            continue
        if number in torn:
            for first, count in torn[number].sectors:
                skip = first * SECTOR
                apply_operation(maps[device], kind, offset + skip, count * SECTOR, position + skip)
            continue
        apply_operation(maps[device], kind, offset, length, position)
    for rot in reversed(waiting):
        place(maps[rot.device], rot.offset, rot.length, rot.position)
    for garbage in decision.garbage:
        size = len(garbage.content)
        if garbage.repeat == 1:
            place(maps[garbage.device], garbage.offset, size, garbage_position)
        else:
            place_repeated(
                maps[garbage.device], garbage.offset, garbage_position, size, garbage.repeat
            )
        garbage_position += size
    for hole in decision.unreadable:
        place_kind(maps[hole.device], hole.offset, hole.length, UNREADABLE)
    return maps


@dataclasses.dataclass(frozen=True, slots=True)
class CutRecord:
    """A power cut as the journal holds it. Power cycle `index` ended with it."""

    index: int
    operation: int
    """The last operation that was carried out before it."""
    model: str
    parameters: dict[str, Any]
    seed: int
    decision: Decision
    sequence: int
    time_ns: int
    garbage_position: int

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters.items())
        return (
            f"cut {self.index} after operation {self.operation}, model {self.model}"
            f"({inner}), seed {self.seed}: {self.decision.describe()}"
        )
