"""Collects what was enumerated: distinct states, classes, their moments and their witnesses.

A batch is a run of states of one stage as arrays. Its classes are merged into those known; states
are rebuilt as `CrashState` only for the few that are kept, by a `Locator` that remembers where in
the enumeration a state came from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import numpy as np

from framework.disk import Decision
from framework.disk.state import Garbage, Partial, Unreadable
from framework.explore.index import I64, U64
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
        operation = max([self.durable_last, newest, *(p.operation for p in partial)])
        if operation < self.cycle_first and self.cycle_first > 1:
            operation = self.cycle_first
        if self.absent is not None:
            lost = np.concatenate((lost, self.absent))
        dropped = np.sort(lost[lost <= operation])
        return CrashState(
            operation,
            Decision(tuple(dropped.tolist()), len(self.ops), partial, garbage, unreadable),
            self.model,
            seed,
        )


Stretch = tuple[int, int, int, CrashState]
"""Power cycle, first and last sequence, and a state that is possible all the while."""


@dataclasses.dataclass(slots=True)
class Known:
    """A class while it is being collected."""

    facts: Facts
    spans: list[Stretch]
    samples: list[CrashState]
    exhaustive: bool
    models: set[str]


@dataclasses.dataclass(slots=True)
class Batch:
    """States of one stage: keys, identities, the earliest moment of each, where they come from.

    Attributes:
        key, total: class key and disk identity of each state. Without `total` the states stand for
            classes only, and are not counted.
        first_sequence: right after which record power can fail so that it results.
        last_sequence: before which record at the latest.
        facts: describes the state at a place of the batch.
        locate: rebuilds it.
        exhaustive: whether it is part of an exhaustive enumeration.
    """

    key: U64
    total: U64
    first_sequence: I64
    last_sequence: int | I64
    facts: Callable[[int], Facts]
    locate: Locator
    model: str
    cycle: int
    exhaustive: bool


class Collector:
    """Everything found so far; `limit` bounds the classes that are kept as such."""

    def __init__(self, seed: int, limit: int) -> None:
        self.classes: dict[int, Known] = {}
        self.limit = limit
        self.points = 0
        self.unkept = 0
        """Classes found that were not kept because of the limit."""
        self._rng = np.random.default_rng(seed)
        self._states: list[tuple[U64, U64]] = []
        self._buffered = 0

    def add(self, batch: Batch) -> tuple[int, int]:
        """Take a batch in; returns its distinct states and classes."""
        size = len(batch.key)
        if not size:
            return 0, 0
        self.points += len(batch.total)
        total, where = np.unique(batch.total, return_index=True)
        self._states.append((total, batch.key[where]))
        self._buffered += len(total)
        if self._buffered > _COMPACT_AT:
            self._compact()
        first = batch.first_sequence
        if bool((first[1:] < first[:-1]).any()):
            order = np.argsort(first, kind="stable")
            keys, at = np.unique(batch.key[order], return_index=True)
            at = order[at]
        else:
            keys, at = np.unique(batch.key, return_index=True)
        last = np.broadcast_to(np.asarray(batch.last_sequence, dtype=np.int64), (size,))
        for key, place in zip(keys.tolist(), at.tolist(), strict=True):
            self._see(key, place, batch, int(last[place]))
        self._sample(batch, dict(zip(keys.tolist(), at.tolist(), strict=True)))
        return len(total), len(keys)

    def _see(self, key: int, place: int, batch: Batch, last: int) -> None:
        known = self.classes.get(key)
        if known is None:
            if len(self.classes) >= self.limit:
                self.unkept += 1
                return
            known = Known(batch.facts(place), [], [], False, set())
            self.classes[key] = known
        known.models.add(batch.model)
        known.exhaustive |= batch.exhaustive
        first = int(batch.first_sequence[place])
        for span in known.spans[-4:]:
            if span[0] == batch.cycle and span[1] <= first and last <= span[2]:
                return
        known.spans.append((batch.cycle, first, last, batch.locate(place)))

    def _sample(self, batch: Batch, witnesses: dict[int, int]) -> None:
        """Keep a few random states as samples, but for those that stand for their class anyway."""
        size = len(batch.key)
        places = np.unique(self._rng.integers(0, size, min(size, len(witnesses) + 8)))
        for place, key in zip(places.tolist(), batch.key[places].tolist(), strict=True):
            known = self.classes.get(key)
            if known is not None and len(known.samples) < SAMPLES_KEPT and witnesses[key] != place:
                state = batch.locate(place)
                if state not in known.samples:
                    known.samples.append(state)

    def _compact(self) -> None:
        total = np.concatenate([t for t, _ in self._states])
        key = np.concatenate([k for _, k in self._states])
        total, where = np.unique(total, return_index=True)
        self._states = [(total, key[where])]
        self._buffered = len(total)

    def counts(self) -> tuple[int, dict[int, int]]:
        """Distinct states over everything, and of each class."""
        if not self._states:
            return 0, {}
        self._compact()
        total, key = self._states[0]
        keys, counts = np.unique(key, return_counts=True)
        return len(total), dict(zip(keys.tolist(), counts.tolist(), strict=True))


def merge_spans(stretches: list[Stretch], operation_at: Callable[[int], int]) -> tuple[Span, ...]:
    """Unite stretches of a power cycle that touch.

    `operation_at`: how many operations had arrived by a record.
    """
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

    def operation_at(sequence: int) -> int:
        return int(np.searchsorted(cycle_arrivals, sequence, side="right"))

    return operation_at
