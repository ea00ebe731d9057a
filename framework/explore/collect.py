"""Collects what was enumerated: distinct states, classes, their moments and their witnesses.

A batch is a run of states as arrays. Neighbours that look alike are seen as one, so that Python
runs once a class and not once a state: a class is described, and a state rebuilt as `CrashState`,
only where it is the first of its class and moment, or a sample.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from framework.disk import Decision
from framework.disk.state import Garbage, Partial, Unreadable
from framework.explore.index import I32, I64, U64, Bool
from framework.explore.stages import Stage
from framework.explore.states import CrashState, Span

SAMPLES_KEPT: Final = 2
"""Control samples kept of a class."""
_COMPACT_AT: Final = 4_000_000

Locator = Callable[[int], CrashState]
Facts = list[tuple[int, int]]
"""For every region (place of the image among the slot's or 255, identity)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Opening:
    """What a stage leaves open, as operation numbers: all that is needed to write a decision."""

    cycle_first: int
    ops: I64
    durable_last: int
    model: str
    absent: I64 | None = None
    """Operations that are lost in every state."""

    @classmethod
    def of(cls, stage: Stage, durable_last: int, model: str) -> Opening:
        """Of a stage; `durable_last`: the newest operation that is durable in it."""
        return cls(stage.cycle.first, stage.cycle.op[stage.rows], durable_last, model)

    def state(
        self,
        newest: int,
        lost: I64,
        *,
        partial: tuple[Partial, ...] = (),
        garbage: tuple[Garbage, ...] = (),
        unreadable: tuple[Unreadable, ...] = (),
        seed: int = 0,
    ) -> CrashState:
        """The state in which all open operations survive but `lost` and what is newer.

        `newest`: the newest that survives, 0 if none does. Those in `partial` are not in `lost`.
        """
        operation = max(self.durable_last, newest)
        for part in partial:
            operation = max(operation, part.operation)
        if operation < self.cycle_first and self.cycle_first > 1:
            operation = self.cycle_first
        dropped: tuple[int, ...] = ()
        if self.absent is not None:
            lost = np.concatenate((lost, self.absent))
        if len(lost):
            dropped = tuple(np.sort(lost[lost <= operation]).tolist())
        return CrashState(
            operation,
            Decision(dropped, len(self.ops), partial, garbage, unreadable),
            self.model,
            seed,
        )


Stretch = tuple[int, int, int, CrashState]
"""Power cycle, first and last sequence, and a state that is possible all the while."""


@dataclasses.dataclass(slots=True)
class Known:
    """A class while it is being collected; `number` is its place among all."""

    number: int
    facts: Facts
    spans: list[Stretch]
    samples: list[CrashState]
    exhaustive: bool
    models: set[str]


@dataclasses.dataclass(slots=True)
class Batch:
    """States as arrays: keys, identities, the moments of each, where they come from.

    Attributes:
        key, total: class key and disk identity of each state. Without `total` the states stand for
            classes only, and are not counted.
        first_sequence: right after which record power can fail so that it results.
        last_sequence: before which record at the latest.
        facts: describes the states at places of the batch: for every region an array of images
            (places among the slot's, 255 for none) and one of identities.
        locate: rebuilds the state at a place.
        exhaustive: whether it is part of an exhaustive enumeration.
        leg: of every state, the stage of the stretch that it belongs to, ascending; None: of the
            only one.
        again: of every state, whether its content is known to have been counted before; None:
            nothing is known of that.
    """

    key: U64
    total: U64
    first_sequence: I64
    last_sequence: int | I64
    facts: Callable[[I64], list[tuple[I64, U64]]]
    locate: Locator
    model: str
    cycle: int
    exhaustive: bool
    leg: I64 | None = None
    again: Bool | None = None


def distinct(values: U64) -> I64:
    """The places of one of each distinct value, in no order; `values` are random numbers.

    Faster than sorting: all values are put into a table at the place that their lowest bits name,
    where one of those that meet there stays. Its equals are done with it; the others go on with
    other bits.
    """
    left = np.arange(len(values), dtype=np.int32)
    found: list[I32] = []
    shift = 0
    while len(left):
        mine = values[left] if shift else values
        bits = max(4, (2 * len(mine) - 1).bit_length())
        if shift + bits > 64:  # equal bits all along: hardly random
            _, at = np.unique(mine, return_index=True)
            found.append(left[at])
            break
        slot = ((mine >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.int64)
        table = np.empty(1 << bits, dtype=np.int32)
        own = np.arange(len(mine), dtype=np.int32)
        table[slot] = own
        stayed = table[slot]
        found.append(left[stayed == own])
        left = left[mine[stayed] != mine]
        shift += 13
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, dtype=np.int64)


def heads_of(*columns: npt.NDArray[np.generic] | None) -> I64:
    """The places at which runs of equal neighbours begin; `columns` of one length, or None."""
    new: npt.NDArray[np.bool_] | None = None
    for column in columns:
        if column is not None:
            step = column[1:] != column[:-1]
            new = step if new is None else new | step
    assert new is not None
    return np.concatenate(([0], np.flatnonzero(new) + 1))


class Collector:
    """Everything found so far; `limit` bounds the classes that are kept as such."""

    def __init__(self, seed: int, limit: int) -> None:
        self.classes: dict[int, Known] = {}
        self.limit = limit
        self.points = 0
        self._unkept: set[int] = set()
        self._rng = np.random.default_rng(seed)
        self._states: list[tuple[U64, I32]] = []
        self._buffered = 0
        self._compact_at = _COMPACT_AT

    @property
    def unkept(self) -> int:
        """Classes found that were not kept because of the limit."""
        return len(self._unkept)

    def add(self, batch: Batch, legs: int = 1) -> I64:
        """Take a batch in; returns how many new classes it has, by leg."""
        fresh = np.zeros(legs, dtype=np.int64)
        size = len(batch.key)
        if not size:
            return fresh
        first = batch.first_sequence
        last = np.asarray(batch.last_sequence, dtype=np.int64)
        varying = None if last.ndim == 0 else last
        heads = heads_of(batch.key, batch.leg, varying)
        earlier = first[1:] < first[:-1]
        if bool(earlier.any()):  # of a run, the first state is then not the earliest
            heads = np.union1d(heads, np.flatnonzero(earlier) + 1)
        run_key, run_first = batch.key[heads], first[heads]
        run_last = np.broadcast_to(last, (size,))[heads]
        if bool((run_first[1:] < run_first[:-1]).any()):
            order = np.argsort(run_first, kind="stable")
        else:
            order = np.arange(len(heads))
        keys = run_key.tolist()
        self._meet(batch, keys, heads, order, fresh)
        witnesses: dict[int, int] = {}
        columns = (heads[order].tolist(), run_first[order].tolist(), run_last[order].tolist())
        for at, place, begin, end in zip(order.tolist(), *columns, strict=True):
            key = keys[at]
            known = self.classes.get(key)
            if known is None:
                continue
            witnesses.setdefault(key, place)
            for span in known.spans[-4:]:
                if span[0] == batch.cycle and span[1] <= begin and end <= span[2]:
                    break
            else:
                known.spans.append((batch.cycle, begin, end, batch.locate(place)))
            known.models.add(batch.model)
            known.exhaustive |= batch.exhaustive
        self._sample(batch, witnesses)
        self._count(batch, keys, heads)
        return fresh

    def _meet(self, batch: Batch, keys: list[int], heads: I64, order: I64, fresh: I64) -> None:
        """Make the acquaintance of the classes that are new."""
        new: dict[int, int] = {}
        for at in order.tolist():
            key = keys[at]
            if key in self.classes or key in new or key in self._unkept:
                continue
            if len(self.classes) + len(new) >= self.limit:
                self._unkept.add(key)
            else:
                new[key] = at
            fresh[0 if batch.leg is None else batch.leg[heads[at]]] += 1
        if not new:
            return
        described = batch.facts(heads[np.fromiter(new.values(), np.int64, len(new))])
        columns = [
            zip(image.tolist(), identity.tolist(), strict=True) for image, identity in described
        ]
        for key, facts in zip(new, zip(*columns, strict=True), strict=True):
            self.classes[key] = Known(len(self.classes), list(facts), [], [], False, set())

    def _sample(self, batch: Batch, witnesses: dict[int, int]) -> None:
        """Keep a few random states as samples, but for those that stand for their class anyway."""
        size = len(batch.key)
        if size <= len(witnesses):
            return  # every one of them stands for its class
        places = np.unique(self._rng.integers(0, size, min(size, len(witnesses) + 8)))
        for place, key in zip(places.tolist(), batch.key[places].tolist(), strict=True):
            known = self.classes.get(key)
            if known is not None and len(known.samples) < SAMPLES_KEPT and witnesses[key] != place:
                state = batch.locate(place)
                if state not in known.samples:
                    known.samples.append(state)

    # ---------------------------------------------------------------- counting

    def _count(self, batch: Batch, keys: list[int], heads: I64) -> None:
        """Remember the batch's states and their classes, to count the distinct ones."""
        if not len(batch.total):
            return
        self.points += len(batch.total)
        known = self.classes
        numbers = np.array([known[k].number if k in known else -1 for k in keys], dtype=np.int32)
        lengths = np.diff(np.append(heads, len(batch.key)))
        total, number = batch.total, np.repeat(numbers, lengths)
        if batch.again is not None:
            fresh = np.flatnonzero(~batch.again)
            total, number = total[fresh], number[fresh]
        self._states.append((total, number))
        self._buffered += len(total)
        if self._buffered > self._compact_at:
            self._compact()

    def _compact(self) -> None:
        total = np.concatenate([t for t, _ in self._states])
        number = np.concatenate([n for _, n in self._states])
        where = distinct(total)
        self._states = [(total[where], number[where])]
        self._buffered = len(where)
        self._compact_at = max(_COMPACT_AT, 2 * len(where))

    def counts(self) -> tuple[int, I64]:
        """Distinct states over everything, and of each class by its number."""
        if not self._states:
            return 0, np.zeros(len(self.classes), dtype=np.int64)
        self._compact()
        total, number = self._states[0]
        per_class = np.bincount(number[number >= 0], minlength=len(self.classes))
        return len(total), per_class.astype(np.int64)


def merge_spans(stretches: list[Stretch], operation_at: Callable[[int], int]) -> tuple[Span, ...]:
    """Unite stretches of a power cycle that touch.

    `operation_at`: how many operations had arrived by a record.
    """
    if len(stretches) == 1:
        ((_, first, last, state),) = stretches
        return (Span(first, last, operation_at(first), operation_at(last - 1), state, state),)
    groups: list[list[Stretch]] = []
    cycle, end = -1, -1
    for stretch in sorted(stretches, key=lambda s: s[:3]):
        if groups and stretch[0] == cycle and stretch[1] <= end:
            groups[-1].append(stretch)
            end = max(end, stretch[2])
        else:
            groups.append([stretch])
            cycle, end = stretch[0], stretch[2]
    found = []
    for group in groups:
        earliest, latest = group[0], max(group, key=lambda s: s[2])
        first, last = earliest[1], latest[2]
        operations = (operation_at(first), operation_at(last - 1))
        found.append(Span(first, last, *operations, earliest[3], latest[3]))
    return tuple(found)


def cycle_operation_at(cycle_arrivals: I64) -> Callable[[int], int]:
    """How many operations of a journal had arrived by a record, given all arrivals in order."""
    arrivals = cycle_arrivals.tolist()

    def operation_at(sequence: int) -> int:
        return bisect_right(arrivals, sequence)

    return operation_at
