"""Enumerates the models under which operations survive in order: kept, prefix, torn, eMMC.

Their spaces, exactly: at every moment n, the durable operations and

* `kept`: all others that completed;
* `prefix`: a prefix of the open ones in the order of application, and a prefix of the next one's
  sectors (a cut inside a write, at 512 bytes);
* `torn`, `torn-page`: a prefix of the open ones; of the next one a prefix or a suffix of its
  units (or a scattered subset: sampled); then, as the model's kinds allow, the unit at the tear as
  it is, garbage, or unreadable;
* `emmc`: as `prefix`; and unless that write is a reliable one, the erase unit at the tear wiped.

An FUA write is open while it is the newest.

Where operations are applied in the order in which they arrive, neighbouring stages are *legs* of
one stretch: one chain serves them all, and all its states are evaluated at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np

from framework.disk import SECTOR, Emmc, TornSector
from framework.disk.models import garbage_bytes
from framework.disk.state import Garbage, Partial, Unreadable
from framework.explore.chains import Blocks, Chain, Destroyer, Doomed, Standing, States, Sums
from framework.explore.collect import Batch, Opening
from framework.explore.index import (
    I64,
    U64,
    UNREADABLE_HASH,
    ZERO_HASH,
    Base,
    Bool,
    CycleIndex,
    Index,
    hash_sectors,
    symbol,
)
from framework.explore.stages import Stage
from framework.explore.states import CrashState

MAX_INSERTIONS: Final = 512
"""Most moments of a stage at which overtaken orders are followed up; beyond it is said so."""
SCATTERED: Final = 16
"""Scattered tears drawn of a stage."""
STRETCH_SECTORS: Final = 1 << 17
"""A stretch ends with the stage in which it got this long: memory is bounded by that."""
_NONE: Final = 1 << 62


@dataclasses.dataclass(frozen=True, slots=True)
class Leg:
    """A stage's part of a stretch.

    Attributes:
        opening: what is open in it.
        begin, end: its rows are those of the stretch from place `begin` to before `end`.
        start: the first of them whose states are new.
        first_sequence, last_sequence: of the stage.
        missing: open operations that the stretch doesn't have: lost in all states of the leg.
    """

    opening: Opening
    begin: int
    end: int
    start: int
    first_sequence: int
    last_sequence: int
    missing: I64


class Course:
    """Operations that take effect in order on a durable base, and the stages that they belong to.

    `rows`: the operations; `legs`: of the stages, in order.
    """

    def __init__(self, cycle: CycleIndex, base: Base, rows: I64, legs: Sequence[Leg]) -> None:
        self.cycle = cycle
        self.base = base
        self.rows = rows
        self.legs = legs
        counts = cycle.length[rows] // SECTOR
        self.bounds = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        """How many events lie before each row."""
        self.place = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
        """Of every event, the place of its row."""
        self.begin = np.array([leg.begin for leg in legs], dtype=np.int64)
        self.start = np.array([leg.start for leg in legs], dtype=np.int64)
        self.end = np.array([leg.end for leg in legs], dtype=np.int64)
        self.last = np.array([leg.last_sequence for leg in legs], dtype=np.int64)
        arrivals = []
        for leg in legs:
            mine = np.maximum.accumulate(cycle.arrived[rows[leg.begin : leg.end]])
            first = np.array([leg.first_sequence], dtype=np.int64)
            arrivals.append(np.concatenate((first, np.maximum(mine, leg.first_sequence))))
        sizes = [len(a) for a in arrivals]
        self._arrival_at = np.concatenate(([0], np.cumsum(sizes)))[: len(legs)] - self.begin
        self._arrivals = np.concatenate(arrivals) if arrivals else np.zeros(0, dtype=np.int64)
        self._ops: list[int] = cycle.op[rows].tolist()
        self._units: dict[int, Units] = {}
        self._counted: Bool | None = None
        self._known_openings: dict[tuple[int, str], tuple[Opening, list[int], list[int]]] = {}

    @classmethod
    def of(cls, stage: Stage, rows: I64, start: int, durable_last: int) -> Course:
        """One order of one stage's open rows; its states are new from place `start` on."""
        opening = Opening.of(stage, durable_last, "")
        missing = rows[:0]
        if len(rows) < len(opening.ops):
            missing = np.setdiff1d(opening.ops, stage.cycle.op[rows], assume_unique=True)
        leg = Leg(
            opening,
            0,
            len(rows),
            start,
            stage.first_sequence,
            stage.last_sequence,
            missing,
        )
        return cls(stage.cycle, stage.base, rows, [leg])

    @cached_property
    def chain(self) -> Chain:
        """Its chain."""
        return Chain(self.cycle, self.base, self.cycle.events_of(self.rows))

    def again(self, states: States) -> Bool:
        """Which of these states were asked for before, by this method, as positions of the chain.

        So what several models have in common is counted once, and cheaply.
        """
        if self._counted is None:
            self._counted = np.zeros(len(self.place) + 1, dtype=bool)
        if states.end is None or states.tear is None:
            found: Bool = self._counted[states.begin]
            self._counted[states.begin] = True
            return found
        nothing, everything = states.tear == states.end, states.tear == states.begin
        found = nothing & self._counted[states.begin]
        return np.asarray(found | (everything & self._counted[states.end]))

    def units(self, sectors: int) -> Units:
        """Its operations, each split into the aligned units that it touches."""
        if sectors not in self._units:
            self._units[sectors] = Units(self, sectors)
        return self._units[sectors]

    def arrival(self, leg: I64, begun: I64) -> I64:
        """The earliest moment of states of legs, given how many rows have begun."""
        return np.asarray(self._arrivals[self._arrival_at[leg] + begun])

    def by_leg(self, low: I64, high: I64) -> tuple[I64, I64]:
        """The numbers from low to before high of every leg, and the leg of each."""
        counts = np.maximum(high - low, 0)
        ends = np.cumsum(counts)
        numbers = np.arange(int(counts.sum()), dtype=np.int64)
        leg = np.repeat(np.arange(len(self.legs), dtype=np.int64), counts)
        return numbers + np.repeat(low - (ends - counts), counts), leg

    # ---------------------------------------------------------------- rebuilding states

    def state(  # noqa: PLR0917 - what survived, and what became of the rest
        self,
        leg: int,
        model: str,
        whole: int,
        partial: tuple[Partial, ...] = (),
        garbage: tuple[Garbage, ...] = (),
        unreadable: tuple[Unreadable, ...] = (),
    ) -> CrashState:
        """The state of a leg in which the rows before place `whole` survived as a whole.

        Of the row at that place `partial` has, if it is given, what survived.
        """
        opening, newest_before, oldest_from = self._openings(leg, model)
        here = self.legs[leg]
        at = whole - here.begin
        newest = newest_before[at]
        reach = max(newest, opening.durable_last, opening.cycle_first)
        if partial:
            reach, at = max(reach, partial[0].operation), at + 1
        gone = here.missing
        if oldest_from[at] <= reach:
            lost = self._ops[here.begin + at : here.end]
            gone = np.concatenate((np.array(lost, dtype=np.int64), gone))
        return opening.state(newest, gone, partial=partial, garbage=garbage, unreadable=unreadable)

    def _openings(self, leg: int, model: str) -> tuple[Opening, list[int], list[int]]:
        """A leg's opening, the newest operation before each place, and the oldest from it on."""
        key = (leg, model)
        if key not in self._known_openings:
            here = self.legs[leg]
            ops = self.cycle.op[self.rows[here.begin : here.end]]
            newest = np.concatenate(([0], np.maximum.accumulate(ops)))
            oldest = np.concatenate((np.minimum.accumulate(ops[::-1])[::-1], [_NONE]))
            opening = dataclasses.replace(here.opening, model=model)
            self._known_openings[key] = (opening, newest.tolist(), oldest.tolist())
        return self._known_openings[key]

    def partial(self, row: int, first: int, count: int) -> tuple[Partial, ...]:
        """The row at a place with only `count` of its sectors from the `first` one on."""
        return (Partial(self._ops[row], ((first, count),) if count else ()),)


class Units:
    """The operations of a course, each split into the aligned units of a size that it touches.

    Arrays by (operation, unit) in order: `row` is the operation's place, `first` and `after` the
    states before its part in the unit and after it, `begin` and `end` those before and after the
    whole operation.
    """

    def __init__(self, course: Course, sectors: int) -> None:
        cycle, place = course.cycle, course.place
        self.sectors = sectors
        if sectors == 1:
            self.first = np.arange(len(place), dtype=np.int64)
        else:
            events = cycle.events_of(course.rows)
            local = cycle.offset[course.rows[place]] // SECTOR + cycle.within[events]
            number = local // sectors
            new = (place[1:] != place[:-1]) | (number[1:] != number[:-1])
            begins = np.concatenate(([True], new))[: len(place)]
            self.first = np.flatnonzero(begins)
        self.after = np.append(self.first[1:], len(place))[: len(self.first)]
        self.row = place[self.first]
        self.begin = course.bounds[self.row]
        self.end = course.bounds[self.row + 1]
        self.of_row = np.searchsorted(self.row, np.arange(len(course.rows) + 1))
        """The first unit of every row, and how many there are."""


def courses(stage: Stage, durable_last: int) -> Iterator[Course]:
    """The orders whose prefixes are all ordered states of a stage.

    The stage's own order; and where something overtook what was open, the order without it, whose
    prefixes are new from the place on where it is missing.
    """
    yield Course.of(stage, stage.rows, 0, durable_last)
    for moment in stage.insertions[:MAX_INSERTIONS]:
        rows = stage.open_at(moment)
        following = stage.open_at(moment + 1)
        shared = int((rows == following[: len(rows)]).argmin()) if len(rows) else 0
        yield Course.of(stage, rows, shared, durable_last)


def together(base: Base, members: Sequence[tuple[Stage, int]]) -> Course:
    """One course of neighbouring stages (each with its newest durable operation).

    All have `Stage.durable` and it doesn't fall; `base` is the durable state of the first.
    """
    first, last = members[0][0], members[-1][0]
    cycle = first.cycle
    rows = np.arange(first.durable, last.durable + len(last.rows), dtype=np.int64)
    legs = [
        Leg(
            Opening.of(stage, durable_last, ""),
            stage.durable - first.durable,
            stage.durable - first.durable + len(stage.rows),
            stage.durable - first.durable,
            stage.first_sequence,
            stage.last_sequence,
            rows[:0],
        )
        for stage, durable_last in members
    ]
    return Course(cycle, base, rows, legs)


def prefixes(course: Course, model: str) -> Batch:
    """Every in-order cut at 512 bytes."""
    at, leg = course.by_leg(course.bounds[course.start], course.bounds[course.end] + 1)
    states = States(at)
    key, total = course.chain.keys(states)
    begun = course.begin[leg]
    inside = np.flatnonzero(at > course.bounds[begun])
    begun[inside] = course.place[at[inside] - 1] + 1

    def locate(where: int) -> CrashState:
        position, row = int(at[where]), int(begun[where])
        if row > course.begin[leg[where]] and position < course.bounds[row]:
            taken = position - int(course.bounds[row - 1])
            partial = course.partial(row - 1, 0, taken)
            return course.state(int(leg[where]), model, row - 1, partial)
        return course.state(int(leg[where]), model, row)

    return Batch(
        key,
        total,
        course.arrival(leg, begun),
        course.last[leg],
        lambda places: course.chain.facts(states.at(places)),
        locate,
        model,
        course.cycle.number,
        True,
        leg,
        course.again(states),
    )


def kept(stage: Stage, durable_last: int, model: str) -> Iterator[Batch]:
    """Every moment, with all that was carried out by then; `stage` has all rows open."""
    cycle = stage.cycle
    rows = stage.rows[cycle.completed[stage.rows] >= 0]
    rows = rows[np.argsort(cycle.op[rows], kind="stable")]
    yield moments_of(Course.of(stage, rows, 0, durable_last), model)


def moments_of(course: Course, model: str) -> Batch:
    """The states between the operations of a course of one leg, each until the next arrived."""
    leg = course.legs[0]
    last = np.concatenate((course.cycle.arrived[course.rows], [leg.last_sequence]))
    begun = np.flatnonzero(last > leg.first_sequence)
    states = States(course.bounds[begun])
    key, total = course.chain.keys(states)
    return Batch(
        key,
        total,
        course.arrival(np.zeros(len(begun), dtype=np.int64), begun),
        last[begun].astype(np.int64),
        lambda places: course.chain.facts(states.at(places)),
        lambda where: course.state(0, model, int(begun[where])),
        model,
        course.cycle.number,
        True,
    )


# ---------------------------------------------------------------- tears


class Tears:
    """What the units at a tear may become under a model: built once for an index."""

    def __init__(self, index: Index, model: TornSector | Emmc, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.kinds: list[tuple[str, Sums]] = []
        self.unit_bytes = model.erase_unit if isinstance(model, Emmc) else model.granularity
        self.blocks = Blocks(index, self.unit_bytes // SECTOR)
        if isinstance(model, Emmc):
            content = ZERO_HASH if model.erased == 0 else _sector_of(model.erased)
            if not model.reliable:
                self.kinds.append(("wiped", self.blocks.damaged(content)))
            return
        for kind in model.kinds:
            if kind == "garbage" and model.garbage:
                content = symbol(f"garbage {seed} {self.unit_bytes}")
                self.kinds.append((kind, self.blocks.damaged(content)))
            elif kind == "unreadable":
                self.kinds.append((kind, self.blocks.damaged(UNREADABLE_HASH)))

    def damage(self, kind: str, unit: int) -> tuple[tuple[Garbage, ...], tuple[Unreadable, ...]]:
        """A decision's part that destroys a unit."""
        device = int(self.blocks.unit_device[unit])
        offset = int(self.blocks.unit_first[unit]) * SECTOR
        length = int(self.blocks.unit_count[unit]) * SECTOR
        if kind == "unreadable":
            return (), (Unreadable(device, offset, length),)
        if isinstance(self.model, Emmc):
            return (self.model.wipe(device, offset, length),), ()
        content = garbage_bytes(self.seed, device, offset, length)
        return (Garbage(device, offset, content),), ()


def _sector_of(value: int) -> np.uint64:
    return np.uint64(hash_sectors(bytes([value]) * SECTOR, 0, 1)[0])


def tears(course: Course, made: Tears, rng: np.random.Generator) -> Iterator[Batch]:
    """Every tear of every open write, with what may stand at the tear."""
    model = made.model
    torn = isinstance(model, TornSector)
    units = course.units(model.granularity // SECTOR if isinstance(model, TornSector) else 1)
    for reverse in (False, True) if torn else (False,):
        yield _mixes(course, units, model.name, reverse=reverse)
    if made.kinds and len(course.rows):
        yield from _destroyed(course, made)
    if torn:
        batch = _scattered(course, units, model.name, rng)
        if batch is not None:
            yield batch


def _mixes(course: Course, units: Units, model: str, *, reverse: bool) -> Batch:
    """The states between two units, of one operation or of two; of its first or its last units."""
    at, leg = course.by_leg(units.of_row[course.start], units.of_row[course.end] + 1)
    whole = at == units.of_row[course.end[leg]]  # the state in which nothing is torn
    final = course.bounds[course.end[leg]]
    first = np.append(units.first, len(course.place))[at]
    row = np.append(units.row, len(course.rows))[at]
    row[whole] = course.end[leg[whole]]
    if reverse:
        begin = np.where(whole, final, np.append(units.begin, 0)[at])
        end = np.where(whole, final, np.append(units.end, 0)[at])
        tear = np.where(whole, final, np.append(units.after, 0)[at])
        states = States(begin, end, tear)
        begun = np.where(tear == end, row, row + 1)
    else:
        begin = course.bounds[row]
        states = States(first)
        begun = np.where(first == begin, row, row + 1)
    key, total = course.chain.keys(states)

    def locate(where: int) -> CrashState:
        place, count = int(row[where]), int(begun[where])
        if count == place:
            return course.state(int(leg[where]), model, place)
        low, high = int(course.bounds[place]), int(course.bounds[place + 1])
        taken = (
            (int(states.tear[where]) - low, high - int(states.tear[where]))
            if states.tear is not None
            else (0, int(first[where]) - low)
        )
        if taken[1] == high - low:
            return course.state(int(leg[where]), model, count)
        return course.state(int(leg[where]), model, place, course.partial(place, *taken))

    return Batch(
        key,
        total,
        course.arrival(leg, begun),
        course.last[leg],
        lambda places: course.chain.facts(states.at(places)),
        locate,
        model,
        course.cycle.number,
        True,
        leg,
        course.again(states),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Fate:
    """States of a course in which the unit at the tear is destroyed."""

    course: Course
    made: Tears
    states: States
    taken: Callable[[int], tuple[int, int]]
    """Of a state, which sectors of the torn operation are new: the first, and how many."""


def _destroyed(course: Course, made: Tears) -> Iterator[Batch]:
    """The unit at every tear destroyed."""
    cycle = course.cycle
    units = course.units(made.unit_bytes // SECTOR)
    blocks = made.blocks
    at, leg = course.by_leg(units.of_row[course.start], units.of_row[course.end])
    unit = blocks.unit[cycle.sector[course.chain.events[units.first[at]]]]
    row = course.rows[units.row[at]]
    standing = Standing(blocks, course.base, cycle.sector[course.chain.events])
    # A unit that a durable operation has rewritten since can't be destroyed.
    fine = (standing.highest[unit] < row) | (cycle.completed[row] < 0)
    if isinstance(made.model, Emmc):
        # The tear lies at any sector of the write, the unit around it is lost: whatever of the
        # write lies in it is too, so one state a unit.
        fine &= ~cycle.fua[row]
    at, leg, unit = at[fine], leg[fine], unit[fine]
    if not len(at):
        return
    destroyer = Destroyer(course.chain, blocks, standing)
    doomed = destroyer.doom(units.begin[at], unit)
    place = units.row[at]
    low, high = units.begin[at], units.end[at]
    first, after = units.first[at], units.after[at]
    ways = [_Fate(course, made, States(first), lambda i: (0, int(first[i] - low[i])))]
    if isinstance(made.model, TornSector):
        ways.append(
            _Fate(
                course,
                made,
                States(low, high, after),
                lambda i: (int(after[i] - low[i]), int(high[i] - after[i])),
            )
        )
    for fate in ways:
        intact = course.chain.keys(fate.states)
        for kind, damaged in made.kinds:
            key, total = destroyer.evaluate(fate.states, intact, doomed, damaged)
            yield Batch(
                key,
                total,
                course.arrival(leg, place + 1),
                course.last[leg],
                _describer(destroyer, fate.states, doomed, damaged),
                _locator(fate, kind, leg, place, unit),
                made.model.name,
                cycle.number,
                True,
                leg,
            )


def _describer(
    destroyer: Destroyer, states: States, doomed: Doomed, damaged: Sums
) -> Callable[[I64], list[tuple[I64, U64]]]:
    return lambda places: destroyer.facts(states.at(places), doomed.at(places), damaged)


def _locator(
    fate: _Fate, kind: str, leg: I64, place: I64, unit: I64
) -> Callable[[int], CrashState]:
    def locate(where: int) -> CrashState:
        row = int(place[where])
        partial = fate.course.partial(row, *fate.taken(where))
        damage = fate.made.damage(kind, int(unit[where]))
        name = fate.made.model.name
        return fate.course.state(int(leg[where]), name, row, partial, *damage)

    return locate


def _scattered(course: Course, units: Units, model: str, rng: np.random.Generator) -> Batch | None:
    """Random subsets of the units of some operations of every leg: a sample."""
    counts = np.diff(units.of_row)
    legs: list[int] = []
    rows: list[int] = []
    taken: list[tuple[I64, I64]] = []
    events: list[I64] = []
    for number, leg in enumerate(course.legs):
        wide = np.flatnonzero(counts[leg.start : leg.end] > 2) + leg.start
        if not len(wide):
            continue
        for row in rng.choice(wide, min(SCATTERED, len(wide)), replace=False).tolist():
            mine = slice(int(units.of_row[row]), int(units.of_row[row + 1]))
            take = np.flatnonzero(rng.integers(0, 2, mine.stop - mine.start, dtype=np.bool_))
            if not len(take):
                continue
            starts = units.first[mine][take]
            lengths = units.after[mine][take] - starts
            legs.append(number)
            rows.append(row)
            taken.append((starts, lengths))
            if units.sectors == 1:
                events.append(starts)
                continue
            steps = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
            events.append(np.arange(int(lengths.sum()), dtype=np.int64) + steps)
    if not legs:
        return None
    leg_of = np.array(legs, dtype=np.int64)
    row_of = np.array(rows, dtype=np.int64)
    found = course.chain.scattered(course.bounds[row_of].tolist(), events)

    def locate(where: int) -> CrashState:
        row = rows[where]
        starts, lengths = taken[where]
        begins = (starts - course.bounds[row]).tolist()
        spans = tuple(zip(begins, lengths.tolist(), strict=True))
        partial = (Partial(int(course.cycle.op[course.rows[row]]), spans),)
        return course.state(legs[where], model, row, partial)

    return Batch(
        found.key,
        found.total,
        course.arrival(leg_of, row_of + 1),
        course.last[leg_of],
        lambda places: [(image[places], identity[places]) for image, identity in found.facts],
        locate,
        model,
        course.cycle.number,
        False,
        leg_of,
    )
