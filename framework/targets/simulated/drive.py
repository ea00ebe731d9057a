"""A drive with a volatile cache, in memory: what the simulated device stores everything on.

Every change is one numbered operation, over all power cycles of a lifetime: write, flush. A
*plan* may act on a number: cut the power there, fail the operation, flip a bit. A cut asks a cache
model of `framework.disk.models` (the recorder's and the explorer's own) what survives of the open
operations, and applies its decision: dropped, torn, garbage and unreadable units.

After a cut every operation raises `PowerLost` until `power_on`, so that nothing the interrupted
program still does has an effect. Time does not exist here; nothing is random but through seeds.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, Protocol

from framework.disk.journal import SECTOR, Flag, Kind
from framework.disk.models.base import CacheModel
from framework.disk.state import Decision, OperationLog, PowerCycle

Action = Literal["", "cut", "error", "flip", "kill"]
"""What a plan wants at an operation; one that the power is cut at is left in flight."""


class PowerLost(BaseException):
    """The power is gone. Not an Exception, so that no handler of the device's code takes it."""


class ProcessKilled(PowerLost):
    """The process that asked for the operation is gone, as after SIGKILL; the drive did it.

    The device goes on: whoever ran the process gives the drive back to the others (`power_on`).
    """


class DriveError(OSError):
    """The drive answered a request with an error (EIO)."""


class Step(NamedTuple):
    """One operation as carried out: its number, kind, where, and how long (bytes)."""

    number: int
    kind: Kind
    offset: int
    length: int


class Plan(Protocol):
    """Decides what goes wrong, and at which operation."""

    @property
    def due(self) -> int:
        """The number of the next operation that something goes wrong with; 0 for none."""
        ...

    def at(self, step: Step) -> Action:
        """Return the action for `step`, which is the one that was due."""
        ...

    @property
    def cut(self) -> tuple[CacheModel, int]:
        """The model and seed of the cut that `at` has just asked for; the seed places a flip."""
        ...


class NoPlan:
    """Nothing goes wrong."""

    due = 0
    cut: tuple[CacheModel, int]

    def at(self, step: Step) -> Action:
        """Return no action."""
        return ""


_KINDS_THAT_REMEMBER: Final = frozenset({"lying", "emmc", "sd", "discard"})
"""Models that look behind the newest flush: they get the whole power cycle to decide on."""


class Disk(Protocol):
    """What the device asks of its drive: `Drive`, or the recorder's disks (`recorded`)."""

    off: bool
    killed: bool
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """Return what the drive holds; DriveError where that can't be read."""
        ...

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole sectors into the cache; DriveError when that fails."""
        ...

    def flush(self) -> None:
        """Make durable all that was written; DriveError when that fails."""
        ...

    def power_on(self) -> None:
        """Give the power back."""
        ...


class Drive:
    """`content` is the medium at the start; its length is the drive's size, in whole sectors."""

    def __init__(self, content: bytes | bytearray, plan: Plan | None = None) -> None:
        if len(content) % SECTOR:
            raise ValueError(f"a drive of {len(content)} bytes is not of whole sectors")
        self.plan: Plan = plan or NoPlan()
        self.off = False
        self.killed = False
        self.operations = 0
        self.size_bytes = len(content)
        # What the device reads: medium and cache together.
        self._current = bytearray(content)
        # What a power cut leaves is made when it comes: the medium at the last power-on, and the
        # operations since, of which a flush has closed those before `_closed`. Some models look
        # behind the newest flush, so all of them are kept. A flush has no content.
        self._start = bytes(content)
        self._cycle: list[tuple[int, bytes | None]] = []
        self._closed = 0
        self._unreadable: set[int] = set()

    def read(self, offset: int, length: int) -> bytes:
        """Return what the drive holds; DriveError where a sector is unreadable."""
        if self.off:
            raise PowerLost
        if self._unreadable:
            first, last = offset // SECTOR, (offset + length - 1) // SECTOR
            bad = next((s for s in range(first, last + 1) if s in self._unreadable), None)
            if bad is not None:
                raise DriveError(5, f"unreadable sector at byte {bad * SECTOR}")
        return self.peek(offset, length)

    def peek(self, offset: int, length: int) -> bytes:
        """Return what the drive holds, readable or not, seen from outside the device."""
        return memoryview(self._current)[offset : offset + length].tobytes()

    def holds(self, offset: int, content: bytes) -> bool:
        """Say whether the drive holds `content`, readable or not, seen from outside the device."""
        return self._current.startswith(content, offset)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write whole sectors into the cache; DriveError when the plan makes it fail."""
        if self.off:
            raise PowerLost
        length = len(data)
        if offset % SECTOR or length % SECTOR or not 0 <= offset <= self.size_bytes - length:
            raise ValueError(f"a write of {length} bytes at {offset} is not of whole sectors")
        self.operations += 1
        content = bytes(data)
        action: Action = ""
        if self.operations == self.plan.due:
            action = self.plan.at(Step(self.operations, Kind.WRITE, offset, length))
            if action == "error":
                raise DriveError(5, f"write failed at byte {offset}")
            if action == "flip":
                at = self.plan.cut[1] % (8 * length)
                flipped = content[at // 8] ^ 1 << at % 8
                content = content[: at // 8] + bytes((flipped,)) + content[at // 8 + 1 :]
        self._cycle.append((offset, content))
        if action == "cut":
            self._lose_power(in_flight=True)
        self._current[offset : offset + length] = content
        if self._unreadable:
            first = offset // SECTOR
            self._unreadable.difference_update(range(first, first + length // SECTOR))
        if action == "kill":
            self._kill()

    def flush(self) -> None:
        """Make durable all that was written; DriveError when the plan makes it fail."""
        if self.off:
            raise PowerLost
        self.operations += 1
        action: Action = ""
        if self.operations == self.plan.due:
            action = self.plan.at(Step(self.operations, Kind.FLUSH, 0, 0))
            if action == "error":
                raise DriveError(5, "flush failed")
            if action == "cut":
                self._lose_power(in_flight=False)
        self._cycle.append((0, None))
        self._closed = len(self._cycle)
        if action == "kill":
            self._kill()

    def power_on(self) -> None:
        """Give the power back. Without a cut before it, the drive's cache lives on."""
        self.off = self.killed = False

    def _kill(self) -> None:
        # Until the process has been buried, nothing that it still does has an effect.
        self.off = self.killed = True
        raise ProcessKilled

    def _lose_power(self, *, in_flight: bool) -> None:
        """Keep what the model leaves; the newest write may be in flight, and a flush never was."""
        model, seed = self.plan.cut
        first = 0 if model.name in _KINDS_THAT_REMEMBER else self._closed
        given = self._cycle[first:]
        medium = bytearray(self._start)
        for offset, data in self._cycle[:first]:
            if data is not None:
                medium[offset : offset + len(data)] = data
        completed = len(given) - in_flight
        decision = self._decide(model, seed, given, completed) if given else Decision()
        self._apply(medium, given, decision)
        self._current = medium
        self._start = bytes(medium)
        self._cycle.clear()
        self._closed = 0
        self.off = True
        raise PowerLost

    def _decide(
        self, model: CacheModel, seed: int, given: list[tuple[int, bytes | None]], completed: int
    ) -> Decision:
        log = OperationLog()
        for index, (offset, data) in enumerate(given, 1):
            kind = Kind.FLUSH if data is None else Kind.WRITE
            what = (int(kind), 0, offset, len(data or b""), int(Flag.NONE), 0)
            log.arrive(what, sequence=2 * index, time_ns=index, cycle=0)
            if index <= completed:
                log.complete(index, 2 * index + 1, index, 0, 0)
        table = log.table(1, len(given))
        return model.decide(PowerCycle(table, ("disk",), (self.size_bytes,)), seed)

    def _apply(
        self, medium: bytearray, given: list[tuple[int, bytes | None]], decision: Decision
    ) -> None:
        lost = set(decision.dropped)
        torn = {p.operation: p for p in decision.partial}
        for number, (offset, data) in enumerate(given, 1):
            if data is None or number in lost:
                continue
            if number not in torn:
                medium[offset : offset + len(data)] = data
                continue
            for first, count in torn[number].sectors:
                a, b = first * SECTOR, (first + count) * SECTOR
                medium[offset + a : offset + b] = data[a:b]
        for garbage in decision.garbage:
            end = garbage.offset + garbage.length
            medium[garbage.offset : end] = garbage.content * garbage.repeat
        for hole in decision.unreadable:
            first = hole.offset // SECTOR
            self._unreadable.update(range(first, first + hole.length // SECTOR))
