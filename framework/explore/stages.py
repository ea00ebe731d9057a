"""The moments of a power cycle that matter, and what is at stake at each.

At a moment *n* (operations 1..n had arrived and were carried out) a cache model takes some
operations for durable and the others for open. Durability only grows, so a cycle falls into
*stages*, in each of which it doesn't change: one stage an epoch between flushes, and one for every
FUA write. The last moment of a stage has the most open operations, and every state that is possible
earlier in it is possible then (with an exception: see `Stage.insertions`).

An FUA write is durable once it completes, but power can fail inside it; so its own stage counts it
as open. The rules of durability are those of `framework.disk.state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from framework.disk import Kind
from framework.explore.index import I64, Base, Bool, CycleIndex


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of moments with the same durable operations.

    Attributes:
        cycle: the power cycle's index.
        base: the durable state; don't change it, and don't keep it (see `stages`).
        rows: the open rows at its last moment, in the order of application (ascending).
        first, last: its moments as operation numbers.
        first_sequence, last_sequence: power may fail right after any record from the first one
            on and before the last one.
        insertions: moments n of it at which an operation that had arrived later had overtaken
            one that was open: only there, the order of application is not that of arrival.
        durable: how many rows are durable if these are exactly the first ones in the order of
            application, and the open ones are exactly those that follow, in the order of arrival;
            else -1. Such stages are stretches of one sequence (`ordered`).
    """

    cycle: CycleIndex
    base: Base
    rows: I64
    first: int
    last: int
    first_sequence: int
    last_sequence: int
    insertions: tuple[int, ...]
    durable: int = -1

    def open_at(self, moment: int) -> I64:
        """The open rows at a moment, in the order of application."""
        return self.rows[self.cycle.op[self.rows] <= moment]


class _Flushes:
    """Per device, the honest flushes up to a moment, for the thresholds of durability."""

    def __init__(self, cycle: CycleIndex, lies: int | None) -> None:
        self.lies = lies
        self.arrived: list[list[int]] = [[] for _ in cycle.power_cycle.devices]
        self.threshold = np.zeros(len(self.arrived), dtype=np.int64)

    def take(self, change: _Change) -> bool:
        """Take a change into account; whether anything may be durable now that was not."""
        if change.row >= 0:
            return True
        mine = self.arrived[change.device]
        mine.append(change.arrived)
        mine.sort()
        if self.lies is None or len(mine) <= self.lies:
            return False
        self.threshold[change.device] = mine[len(mine) - 1 - self.lies]
        return True


def stages(cycle: CycleIndex, *, lies: int | None = 0) -> Iterator[Stage]:
    """The stages of a cycle, in order. `lies`: as in `PowerCycle.open_rows`.

    A stage's `base` is right until the next stage is asked for: it is the same object.
    """
    durable: Bool = np.zeros(len(cycle.op), dtype=bool)
    base = cycle.power_on.copy()
    flushes = _Flushes(cycle, lies)
    began, began_sequence = cycle.first - 1, _start_sequence(cycle)
    for change in _changes(cycle, lies):
        if not flushes.take(change):
            continue
        newly = _newly_durable(cycle, durable, flushes, change)
        if not len(newly):
            continue
        if change.last >= began:
            moments, sequences = (began, change.last), (began_sequence, change.sequence)
            yield _stage(cycle, base, durable, moments, sequences)
            began, began_sequence = change.number, change.sequence
        durable[newly] = True
        cycle.advance(base, newly)
    moments, sequences = (began, cycle.last), (began_sequence, cycle.end_sequence)
    yield _stage(cycle, base, durable, moments, sequences)


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    """Something after which more may be durable: an honest flush, an FUA write, rot.

    `last` is the last moment before it, `sequence` the record with which it takes effect.
    """

    number: int
    last: int
    sequence: int
    row: int = -1
    """The row that it makes durable, -1 for a flush."""
    device: int = 0
    arrived: int = 0


def _changes(cycle: CycleIndex, lies: int | None) -> list[_Change]:
    operations = cycle.power_cycle.operations
    found = [
        _Change(int(cycle.op[row]), int(cycle.op[row]) - 1, int(cycle.arrived[row]), row)
        for row in np.flatnonzero(cycle.rot).tolist()
    ]
    honest = (
        (operations.kind == Kind.FLUSH)
        & (operations.completed >= 0)
        & (operations.error == 0)
        & ~operations.lying
    )
    if lies is not None:
        for at in np.flatnonzero(honest).tolist():
            number = operations.first + at
            found.append(
                _Change(
                    number,
                    number - 1,
                    int(operations.completed[at]),
                    device=int(operations.device[at]),
                    arrived=int(operations.arrived[at]),
                )
            )
    if lies == 0:
        for row in np.flatnonzero(cycle.fua & (cycle.completed >= 0)).tolist():
            number = int(cycle.op[row])
            found.append(_Change(number, number, int(cycle.completed[row]), row))
    return sorted(found, key=lambda c: (c.number, c.last, c.sequence))


def _start_sequence(cycle: CycleIndex) -> int:
    journal = cycle.index.journal
    return journal.cuts[cycle.number - 1].sequence if cycle.number else -1


def _newly_durable(cycle: CycleIndex, durable: Bool, flushes: _Flushes, change: _Change) -> I64:
    """The rows that a change makes durable, in the order of application."""
    if change.row >= 0:
        return np.array([change.row], dtype=np.int64)
    covered = (
        (cycle.op <= change.number)
        & (cycle.completed >= 0)
        & (cycle.completed < flushes.threshold[cycle.device])
        & ~cycle.rot
    )
    return np.flatnonzero(covered & ~durable)


def _stage(
    cycle: CycleIndex,
    base: Base,
    durable: Bool,
    moments: tuple[int, int],
    sequences: tuple[int, int],
) -> Stage:
    rows = np.flatnonzero(~durable & ~cycle.rot & (cycle.op <= moments[1]))
    insertions = tuple(n for n in _insertions(cycle.op[rows]) if n >= moments[0])
    first = _in_order(cycle, durable, rows)
    return Stage(cycle, base, rows, *moments, *sequences, insertions=insertions, durable=first)


def _in_order(cycle: CycleIndex, durable: Bool, rows: I64) -> int:
    """See `Stage.durable`."""
    count = int(durable.sum())
    if not bool(durable[:count].all()):
        return -1
    if len(rows) and (rows[0] != count or rows[-1] != count + len(rows) - 1):
        return -1
    ops = cycle.op[rows]
    return count if bool((ops[1:] > ops[:-1]).all()) else -1


def _insertions(numbers: I64) -> tuple[int, ...]:
    """The moments right before the arrival of something that then overtook what was open.

    `numbers` are the open operations in the order of application. At such a moment the open ones
    are no prefix of that order: the one that overtakes is missing from its middle.
    """
    if len(numbers) < 2:
        return ()
    later = np.minimum.accumulate(numbers[::-1])[::-1][1:]
    overtakes = numbers[:-1][later < numbers[:-1]]
    return tuple(sorted({int(n) - 1 for n in overtakes}))
