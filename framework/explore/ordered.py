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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from framework.disk import SECTOR, Emmc, TornSector
from framework.disk.models import garbage_bytes
from framework.disk.state import Garbage, Partial, Unreadable
from framework.explore.chains import Blocks, Chain, Destroyer, Standing
from framework.explore.collect import Batch, Facts, Opening
from framework.explore.index import (
    I64,
    UNREADABLE_HASH,
    ZERO_HASH,
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


def moments(stage: Stage) -> Iterator[tuple[I64, int]]:
    """The orders whose prefixes are all ordered states of a stage, each with its first new place.

    The stage's own order; and where something overtook what was open, the order without it, whose
    prefixes are new from the place on where it is missing.
    """
    yield stage.rows, 0
    for moment in stage.insertions[:MAX_INSERTIONS]:
        rows = stage.open_at(moment)
        following = stage.open_at(moment + 1)
        shared = int((rows == following[: len(rows)]).argmin()) if len(rows) else 0
        yield rows, shared


@dataclasses.dataclass(frozen=True, slots=True)
class Survivors:
    """The newest complete operation, the lost ones, and the one that survives in part."""

    newest: int
    lost: I64
    partial: tuple[Partial, ...]


class OrderedStage:
    """One order of one stage: its chain forward, and with each operation's sectors in reverse."""

    def __init__(self, stage: Stage, rows: I64, start: int, durable_last: int, model: str) -> None:
        self.stage = stage
        self.cycle = stage.cycle
        self.rows = rows
        self.opening = Opening.of(stage, durable_last, model)
        self.model = model
        self.missing = (
            np.setdiff1d(self.opening.ops, self.cycle.op[rows], assume_unique=True)
            if len(rows) < len(self.opening.ops)
            else rows[:0]
        )
        """Open operations that this order doesn't have: lost in all of its states."""
        self.ends = np.cumsum(self.cycle.length[rows] // SECTOR)
        """Of each row, the state in which it is complete."""
        self.first_state = int(self.ends[start - 1]) if start else 0
        arrived = np.maximum.accumulate(self.cycle.arrived[rows]) if len(rows) else rows
        first = np.concatenate(([stage.first_sequence], arrived))
        self.row_arrival = np.maximum(first, stage.first_sequence)
        """Of each count of rows, the earliest moment at which they can have survived."""

    def chain(self, *, reverse: bool = False) -> tuple[Chain, I64]:
        """The chain, and of every state the place of the row that its last event belongs to."""
        events = self.cycle.events_of(self.rows)
        counts = np.diff(np.concatenate(([0], self.ends)))
        place = np.repeat(np.arange(len(self.rows)), counts)
        if reverse:
            starts = self.ends - counts
            within = np.arange(len(events)) - np.repeat(starts, counts)
            events = events[np.repeat(self.ends - 1, counts) - within]
        return Chain(self.cycle, self.stage.base, events), place

    def rows_in(self, state: I64) -> I64:
        """How many rows have begun in a state."""
        return np.asarray(np.searchsorted(self.ends, state, side="left") + (state > 0))

    def first_sequence(self, state: I64) -> I64:
        """The earliest moment of states, given how many events took effect."""
        return np.asarray(self.row_arrival[np.where(state > 0, self.rows_in(state), 0)])

    def survivors(self, state: int, *, reverse: bool, begun: int | None = None) -> Survivors:
        """What survives in a chain's state, of which `begun` rows have begun."""
        ops = self.cycle.op[self.rows]
        if begun is None:
            begun = int(self.rows_in(np.array([state]))[0])
        whole = begun
        partial: tuple[Partial, ...] = ()
        if begun and state < int(self.ends[begun - 1]):
            count = int(self.cycle.length[self.rows[begun - 1]]) // SECTOR
            taken = state - (int(self.ends[begun - 1]) - count)
            sectors = ((count - taken, taken) if reverse else (0, taken),) if taken else ()
            whole, partial = begun - 1, (Partial(int(ops[begun - 1]), sectors),)
        lost = np.concatenate((ops[begun:], self.missing))
        return Survivors(int(ops[:whole].max(initial=0)), lost, partial)

    def locate(self, state: int, *, reverse: bool = False) -> CrashState:
        """The crash state of a chain's state."""
        found = self.survivors(state, reverse=reverse)
        return self.opening.state(found.newest, found.lost, partial=found.partial)

    def batch(
        self, chain: Chain, states: I64, *, reverse: bool = False, last: I64 | None = None
    ) -> Batch:
        """The chain's states as a batch."""

        def facts(place: int) -> Facts:
            return chain.image_and_identity(int(states[place]))

        def locate(place: int) -> CrashState:
            return self.locate(int(states[place]), reverse=reverse)

        return Batch(
            chain.key[states],
            chain.total[states],
            self.first_sequence(states),
            self.stage.last_sequence if last is None else last,
            facts,
            locate,
            self.model,
            self.cycle.number,
            True,
        )


def prefixes(stage: Stage, durable_last: int, model: str) -> Iterator[Batch]:
    """Every in-order cut at 512 bytes."""
    for rows, start in moments(stage):
        ordered = OrderedStage(stage, rows, start, durable_last, model)
        chain, _ = ordered.chain()
        states = np.arange(ordered.first_state, len(chain.events) + 1, dtype=np.int64)
        yield ordered.batch(chain, states)


def kept(stage: Stage, durable_last: int, model: str) -> Iterator[Batch]:
    """Every moment, with all that was carried out by then; `stage` has all rows open."""
    cycle = stage.cycle
    rows = stage.rows[cycle.completed[stage.rows] >= 0]
    rows = rows[np.argsort(cycle.op[rows], kind="stable")]
    ordered = OrderedStage(stage, rows, 0, durable_last, model)
    chain, _ = ordered.chain()
    states = np.concatenate(([0], ordered.ends)).astype(np.int64)
    last = np.concatenate((cycle.arrived[rows], [stage.last_sequence])).astype(np.int64)
    mine = last > stage.first_sequence
    yield ordered.batch(chain, states[mine], last=last[mine])


# ---------------------------------------------------------------- tears


class Tears:
    """What the units at a tear may become under a model: built once for an index."""

    def __init__(self, index: Index, model: TornSector | Emmc, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.kinds: list[tuple[str, Blocks]] = []
        self.boundary: Blocks | None = None
        if isinstance(model, Emmc):
            self.unit_bytes = model.erase_unit
            content = ZERO_HASH if model.erased == 0 else _sector_of(model.erased)
            if not model.reliable:
                self.kinds.append(("wiped", self._blocks(index, content)))
            return
        self.unit_bytes = model.granularity
        for kind in model.kinds:
            if kind == "garbage" and model.garbage:
                content = symbol(f"garbage {seed} {self.unit_bytes}")
                self.kinds.append((kind, self._blocks(index, content)))
            elif kind == "unreadable":
                self.kinds.append((kind, self._blocks(index, UNREADABLE_HASH)))

    def _blocks(self, index: Index, content: np.uint64) -> Blocks:
        blocks = Blocks(index, self.unit_bytes // SECTOR, content)
        self.boundary = blocks
        return blocks

    def damage(
        self, kind: str, blocks: Blocks, unit: int
    ) -> tuple[tuple[Garbage, ...], tuple[Unreadable, ...]]:
        """A decision's part that destroys a unit."""
        device = int(blocks.unit_device[unit])
        offset = int(blocks.unit_first[unit]) * SECTOR
        length = int(blocks.unit_count[unit]) * SECTOR
        if kind == "unreadable":
            return (), (Unreadable(device, offset, length),)
        if isinstance(self.model, Emmc):
            return (self.model.wipe(device, offset, length),), ()
        content = garbage_bytes(self.seed, device, offset, length)
        return (Garbage(device, offset, content),), ()


def _sector_of(value: int) -> np.uint64:
    return np.uint64(hash_sectors(bytes([value]) * SECTOR, 0, 1)[0])


def tears(
    stage: Stage, durable_last: int, made: Tears, rng: np.random.Generator
) -> Iterator[Batch]:
    """Every tear of every open write, with what may stand at the tear."""
    model = made.model
    torn = isinstance(model, TornSector)
    unit = (model.granularity if isinstance(model, TornSector) else SECTOR) // SECTOR
    sectors = stage.cycle.sector[stage.cycle.events_of(stage.rows)]
    standing = Standing(made.boundary, stage.base, sectors) if made.boundary else None
    for rows, start in moments(stage):
        ordered = OrderedStage(stage, rows, start, durable_last, model.name)
        for reverse in (False, True) if torn else (False,):
            chain, place = ordered.chain(reverse=reverse)
            cuts = _boundaries(ordered, chain, place, unit)
            cuts = cuts[cuts >= ordered.first_state]
            yield ordered.batch(chain, cuts, reverse=reverse)
            for kind, blocks in made.kinds:
                assert standing is not None
                damage = _Damage(made, kind, blocks, standing)
                yield from _destroyed(ordered, chain, place, damage, reverse=reverse)
        if torn and len(rows):
            yield from _scattered(ordered, unit, rng)


def _boundaries(ordered: OrderedStage, chain: Chain, place: I64, unit: int) -> I64:
    """The states between two units, or two operations."""
    if not len(chain.events):
        return np.zeros(1, dtype=np.int64)
    first = _unit_starts(ordered, chain, place, unit)
    return np.concatenate((first, [len(chain.events)]))


def _unit_starts(ordered: OrderedStage, chain: Chain, place: I64, unit: int) -> I64:
    cycle = ordered.cycle
    local = cycle.offset[ordered.rows[place]] // SECTOR + cycle.within[chain.events]
    number = local // unit
    new = np.concatenate(([True], (place[1:] != place[:-1]) | (number[1:] != number[:-1])))
    return np.flatnonzero(new)


@dataclasses.dataclass(frozen=True, slots=True)
class _Damage:
    made: Tears
    kind: str
    blocks: Blocks
    standing: Standing


def _destroyed(
    ordered: OrderedStage, chain: Chain, place: I64, damage: _Damage, *, reverse: bool
) -> Iterator[Batch]:
    """The unit at every tear destroyed."""
    made, kind, blocks = damage.made, damage.kind, damage.blocks
    if not len(chain.events):
        return
    cycle = ordered.cycle
    step = made.unit_bytes // SECTOR
    at = _unit_starts(ordered, chain, place, step)
    if kind == "wiped":
        # The tear lies at any sector of the write, the unit around it is lost: whatever of the
        # write lies in it is too, so one state a unit.
        at = at[~cycle.fua[ordered.rows[place[at]]]]
    at = at[at >= ordered.first_state]
    unit = blocks.unit[cycle.sector[chain.events[at]]]
    # A unit that a durable operation has rewritten since can't be destroyed.
    row = ordered.rows[place[at]]
    fine = (damage.standing.highest[unit] < row) | (cycle.completed[row] < 0)
    at, unit = at[fine], unit[fine]
    if not len(at):
        return
    destroyer = Destroyer(chain, blocks, damage.standing)
    key, total = destroyer.evaluate(at, unit)
    begun = place[at] + 1

    def locate(where: int) -> CrashState:
        found = ordered.survivors(int(at[where]), reverse=reverse, begun=int(begun[where]))
        garbage, unreadable = made.damage(kind, blocks, int(unit[where]))
        return ordered.opening.state(
            found.newest, found.lost, partial=found.partial, garbage=garbage, unreadable=unreadable
        )

    yield Batch(
        key,
        total,
        ordered.row_arrival[begun],
        ordered.stage.last_sequence,
        lambda where: destroyer.image_and_identity(int(at[where]), int(unit[where])),
        locate,
        ordered.model,
        cycle.number,
        True,
    )


def _scattered(ordered: OrderedStage, unit: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Random subsets of one write's units: a sample."""
    chain, place = ordered.chain()
    first = _unit_starts(ordered, chain, place, unit)
    begins = np.flatnonzero(np.concatenate(([True], place[first][1:] != place[first][:-1])))
    counts = np.diff(np.append(begins, len(first)))
    wide = np.flatnonzero(counts > 2)
    if not len(wide):
        return
    for chosen in rng.choice(wide, min(SCATTERED, len(wide)), replace=False).tolist():
        starts = first[begins[chosen] : begins[chosen] + counts[chosen]]
        ends = np.append(starts[1:], ordered.ends[place[starts[0]]])
        take = rng.random(len(starts)) < 0.5
        if int(ends[-1]) <= ordered.first_state or not bool(take.any()):
            continue
        yield _one_scattered(ordered, chain, int(place[starts[0]]), starts[take], ends[take])


def _one_scattered(ordered: OrderedStage, chain: Chain, row: int, starts: I64, ends: I64) -> Batch:
    cycle = ordered.cycle
    begin = int(ordered.ends[row - 1]) if row else 0
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    events = np.concatenate([chain.events[:begin], *(chain.events[a:b] for a, b in spans)])
    whole = Chain(cycle, ordered.stage.base, events)
    end = len(events)
    op = int(cycle.op[ordered.rows[row]])
    partial = Partial(op, tuple((a - begin, b - a) for a, b in spans))
    whole_ops = ordered.survivors(begin, reverse=False, begun=row)
    lost = whole_ops.lost[whole_ops.lost != op]
    return Batch(
        whole.key[end:],
        whole.total[end:],
        ordered.row_arrival[row + 1 : row + 2],
        ordered.stage.last_sequence,
        lambda _: whole.image_and_identity(end),
        lambda _: ordered.opening.state(whole_ops.newest, lost, partial=(partial,)),
        ordered.model,
        cycle.number,
        False,
    )
