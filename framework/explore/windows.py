"""Enumerates the models whose at-stake writes move along with time: SD card, newest-first cache.

Their spaces, exactly: at every moment n, the durable operations and

* `sd`: of the open ones all that are older than each device's newest `window`, and any subset of
  those;
* `reordered`: the newest share of the open ones.

For the card a state at a moment is new only if the newest operation survives (without it, it was
possible before). Where the operations come in the order of application, one device is concerned and
no sector is written twice within a window, losing an operation takes back its own contribution and
nothing else: then all moments are evaluated at once. The other moments are looked at one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import numpy as np

from framework.disk import ReorderedCache, SdCard
from framework.explore.chains import Chain, States, fact_hash, images_of
from framework.explore.collect import Batch, Opening
from framework.explore.index import I64, U64, Base, Bool
from framework.explore.stages import Stage
from framework.explore.states import CrashState
from framework.explore.subsets import Combiner, Limits, atoms_of, sample_bits, subset_batch

_STATES_AT_ONCE: Final = 1 << 18
MOMENTS: Final = 2048
"""Most moments of a stage at which a newest-first cache is looked at."""


def reordered(stage: Stage, durable_last: int, model: ReorderedCache) -> Iterator[Batch]:
    """At every moment the newest share of the open operations."""
    opening = Opening.of(stage, durable_last, model.name)
    combiner = Combiner(stage, atoms_of(stage))
    ops = stage.cycle.op[stage.rows]
    moments = np.unique(np.concatenate(([stage.first], ops[ops >= stage.first])))
    every = moments
    if len(moments) > MOMENTS:
        moments = moments[np.linspace(0, len(moments) - 1, MOMENTS).astype(np.int64)]
    for part in np.array_split(moments, max(1, len(moments) * len(ops) // (1 << 22))):
        bits = np.zeros((len(part), len(ops)), dtype=bool)
        for line, moment in enumerate(part.tolist()):
            present = np.flatnonzero(ops <= moment)
            kept = int(np.ceil(len(present) * model.keep))
            bits[line, present[len(present) - kept :]] = True
        batch = subset_batch(combiner, opening, bits, exhaustive=True)
        batch.first_sequence, batch.last_sequence = _around(stage, every, part)
        yield batch


def _around(stage: Stage, moments: I64, part: I64) -> tuple[I64, I64]:
    """When some of a stage's moments begin, and when the moment after each does.

    `moments` but for the first are the arrivals of open operations.
    """
    arrived = stage.cycle.index.journal.operations.arrived
    begins = np.concatenate(([stage.first_sequence], arrived[moments[1:] - 1]))
    ends = np.append(begins[1:], stage.last_sequence)
    at = np.searchsorted(moments, part)
    return np.maximum(begins[at], stage.first_sequence), ends[at]


def card(
    stage: Stage, durable_last: int, model: SdCard, limits: Limits, rng: np.random.Generator
) -> Iterator[Batch]:
    """At every moment any subset of the newest operations of each device."""
    window = _Window(stage, durable_last, model.window)
    slow = window.slow(limits)
    places = np.arange(window.first_place, len(slow))
    hard = slow[places] if window.first_place >= 0 else np.append(True, slow)
    mixed = not bool(hard.all())
    if mixed:
        yield from window.fast(places[~hard])
    for batch, place, bits in window.one_by_one(places[hard], limits, rng):
        if mixed:  # at the places after it only what is new is looked at
            batch.last_sequence = window.until(place, bits)
        yield batch


class _Window:
    """A card's stage: places (of the stage's rows) stand for the moments after them."""

    def __init__(self, stage: Stage, durable_last: int, width: int) -> None:
        self.stage = stage
        self.cycle = stage.cycle
        self.width = width
        self.opening = Opening.of(stage, durable_last, "sd")
        self.ops = self.cycle.op[stage.rows]
        self.arrived = self.cycle.arrived[stage.rows]
        self.first_place = int((self.ops <= stage.first).sum()) - 1
        """The place of the stage's first moment; -1 if nothing is open then."""

    def slow(self, limits: Limits) -> Bool:
        """Which places need to be looked at one by one.

        At the stage's first moment the newest may be lost as well: there is nothing before it in
        the stage that would show it.
        """
        size = len(self.ops)
        everything = np.ones(size, dtype=bool)
        devices = np.unique(self.cycle.device[self.stage.rows])
        in_order = bool((np.diff(self.ops) > 0).all())
        if not in_order or len(devices) > 1 or self.width > limits.exhaustive_up_to:
            return everything
        found = np.zeros(size, dtype=bool)
        found[max(self.first_place, 0) : self.first_place + 1] = True
        events = self.cycle.events_of(self.stage.rows)
        counts = self.cycle.first_event[self.stage.rows + 1]
        counts = counts - self.cycle.first_event[self.stage.rows]
        place = np.repeat(np.arange(size), counts)
        sector = self.cycle.sector[events]
        order = np.argsort(sector, kind="stable")
        again = sector[order][1:] == sector[order][:-1]
        later, earlier = place[order][1:][again], place[order][:-1][again]
        close = later - earlier < self.width
        for a, b in zip(earlier[close].tolist(), later[close].tolist(), strict=True):
            found[b : a + self.width] = True
        return found

    # ------------------------------------------------------------ all at once

    def fast(self, places: I64) -> Iterator[Batch]:
        """The places at which every lost operation only takes back its own contribution."""
        chain = Chain(self.cycle, self.stage.base, self.cycle.events_of(self.stage.rows))
        course = _Course(chain, self.stage)
        masks = 1 << (self.width - 1)
        for part in np.array_split(places, max(1, len(places) * masks // _STATES_AT_ONCE)):
            if len(part):
                yield self._fast(course, part)

    def _fast(self, course: _Course, places: I64) -> Batch:
        steps = [places - back for back in range(1, self.width)]
        total = _doubled(course.total[places + 1], course.change, steps)
        key = np.repeat(course.key[places + 1][:, None], total.shape[1], axis=1)
        for region, part in course.regions.items():
            if not _concerns(part.concerned, places, self.width):
                continue
            identity, distances = part.with_losses(places, steps)
            size = identity.shape
            flat = {bit: d.ravel() for bit, d in distances.items()}
            image = images_of(self.cycle.index, region, flat, identity.size).reshape(size)
            fact = fact_hash(self.cycle.index, region, identity, image)
            key ^= fact ^ fact[:, :1]
        # Bit k of a mask: the operation k + 1 places back is lost.
        mask = np.arange(total.shape[1], dtype=np.int64)
        depth = np.zeros(len(mask), dtype=np.int64)
        for bit in range(self.width - 1):
            depth[(mask >> bit) & 1 == 1] = bit + 1
        valid = depth[None, :] <= places[:, None]
        oldest = np.where(depth > 0, places[:, None] - depth, places[:, None] + 1)
        until = oldest + self.width
        last = np.where(
            until < len(self.arrived),
            self.arrived[np.minimum(until, len(self.arrived) - 1)],
            self.stage.last_sequence,
        )
        at, which = np.nonzero(valid)
        first = np.maximum(self.arrived[places[at]], self.stage.first_sequence)

        def locate(where: int) -> CrashState:
            place = int(places[at[where]])
            back = [k + 1 for k in range(self.width - 1) if int(which[where]) >> k & 1]
            gone = np.array([place - b for b in back], dtype=np.int64)
            gone_ops = np.concatenate((self.ops[gone], self.ops[place + 1 :]))
            return self.opening.state(int(self.ops[place]), gone_ops)

        def facts(where: I64) -> list[tuple[I64, U64]]:
            return course.facts(places[at[where]], which[where], self.width)

        return Batch(
            key[valid],
            total[valid],
            first,
            last[valid],
            facts,
            locate,
            "sd",
            self.cycle.number,
            True,
        )

    # ------------------------------------------------------------ one by one

    def one_by_one(
        self, places: I64, limits: Limits, rng: np.random.Generator
    ) -> Iterator[tuple[Batch, int, Bool]]:
        """Places where the order, the devices or a sector written twice make it harder.

        With each batch its place, and which of the operations in the window each state keeps.
        """
        if not len(places):
            return
        size = len(self.ops)
        by_arrival = np.argsort(self.ops, kind="stable")
        base = self.stage.base
        passed = np.zeros(size, dtype=bool)
        for place in places.tolist():
            present = np.zeros(size, dtype=bool)
            present[by_arrival[: place + 1]] = True
            at_stake = self._at_stake(present)
            older = np.flatnonzero(present & ~at_stake & ~passed)
            if len(older):
                base = base if base is not self.stage.base else base.copy()
                self.cycle.advance(base, self.stage.rows[older])
            passed[older] = True
            rows = np.flatnonzero(at_stake)
            batch, bits = self._one(base, rows, place, passed, limits=limits, rng=rng)
            yield batch, place, bits

    def until(self, place: int, bits: Bool) -> I64:
        """Where all is in order: when the states of a place are no longer possible.

        That is when the oldest operation that is lost leaves the window.
        """
        first = place + 1 - bits.shape[1]
        lost = np.concatenate((~bits, np.ones((len(bits), 1), dtype=bool)), axis=1)
        leaves = first + lost.argmax(axis=1) + self.width
        ends = np.append(self.arrived, self.stage.last_sequence)
        return np.asarray(ends[np.minimum(leaves, len(self.arrived))])

    def _at_stake(self, present: Bool) -> Bool:
        found = np.zeros(len(present), dtype=bool)
        devices = self.cycle.device[self.stage.rows]
        for device in np.unique(devices).tolist():
            found[np.flatnonzero(present & (devices == device))[-self.width :]] = True
        return found

    def _one(
        self,
        base: Base,
        rows: I64,
        place: int,
        passed: Bool,
        *,
        limits: Limits,
        rng: np.random.Generator,
    ) -> tuple[Batch, Bool]:
        until = place + 1
        last = (
            int(np.sort(self.arrived)[until]) if until < len(self.ops) else self.stage.last_sequence
        )
        begin = int(np.sort(self.arrived)[place]) if place >= 0 else self.stage.first_sequence
        stage = dataclasses.replace(
            self.stage,
            base=base,
            rows=self.stage.rows[rows],
            first_sequence=max(begin, self.stage.first_sequence),
            last_sequence=max(last, begin + 1, self.stage.first_sequence + 1),
        )
        newest = int(self.ops[passed].max(initial=0))
        absent = ~passed
        absent[rows] = False
        opening = dataclasses.replace(
            self.opening,
            ops=self.cycle.op[stage.rows],
            absent=self.ops[absent],
            durable_last=max(self.opening.durable_last, newest),
        )
        count = len(rows)
        exhaustive = count <= max(limits.exhaustive_up_to, 2)
        if exhaustive:
            numbers = np.arange(1 << count, dtype=np.int64)
            bits = ((numbers[:, None] >> np.arange(count)) & 1).astype(bool)
        else:
            bits = sample_bits(count, limits.samples, rng)
        combiner = Combiner(stage, atoms_of(stage))
        return subset_batch(combiner, opening, bits, exhaustive=exhaustive), bits


# ---------------------------------------------------------------- contributions by operation


def _doubled(start: U64, change: U64, steps: list[I64]) -> U64:
    """(places, masks): `start` with the changes of the operations of every mask taken back."""
    found = start[:, None]
    for step in steps:
        found = np.concatenate((found, found ^ change[np.maximum(step, 0)][:, None]), axis=1)
    return found


def _concerns(concerned: Bool, places: I64, width: int) -> bool:
    first, last = max(0, int(places.min()) - width), int(places.max())
    return bool(concerned[first : last + 1].any())


@dataclasses.dataclass(slots=True)
class _RegionCourse:
    """A region along a chain, by operation: values after each, and what each one changed."""

    identity: U64
    change: U64
    distances: dict[int, I64]
    steps: dict[int, I64]
    concerned: Bool

    def with_losses(self, places: I64, steps: list[I64]) -> tuple[U64, dict[int, I64]]:
        """Identity and distances for every mask of lost operations."""
        identity = _doubled(self.identity[places + 1], self.change, steps)
        distances = {}
        for bit, values in self.distances.items():
            found = values[places + 1][:, None]
            for step in steps:
                lost = self.steps[bit][np.maximum(step, 0)][:, None]
                found = np.concatenate((found, found - lost), axis=1)
            distances[bit] = found
        return identity, distances


class _Course:
    """A chain, by operation instead of by sector."""

    def __init__(self, chain: Chain, stage: Stage) -> None:
        cycle = stage.cycle
        self.cycle = cycle
        self.chain = chain
        counts = cycle.first_event[stage.rows + 1] - cycle.first_event[stage.rows]
        self.ends = np.concatenate(([0], np.cumsum(counts)))
        self.key = chain.key[self.ends]
        self.total = chain.total[self.ends]
        self.change = self.total[1:] ^ self.total[:-1]
        self.regions: dict[int, _RegionCourse] = {}
        for region, part in chain.parts.items():
            if not len(part.at):
                continue
            at = part.before(self.ends)
            identity = part.identity[at]
            distances = {bit: values[at] for bit, values in part.distances.items()}
            self.regions[region] = _RegionCourse(
                identity,
                identity[1:] ^ identity[:-1],
                distances,
                {bit: np.diff(values) for bit, values in distances.items()},
                np.diff(at) > 0,
            )

    def facts(self, place: I64, mask: I64, width: int) -> list[tuple[I64, U64]]:
        """Describe states: their places and masks of lost operations."""
        found = self.chain.facts(States(self.ends[place + 1]))
        for region, part in self.regions.items():
            identity = part.identity[place + 1]
            distances = {bit: values[place + 1] for bit, values in part.distances.items()}
            for back in range(1, width):
                lost = (mask >> (back - 1)) & 1 == 1
                one = np.maximum(place - back, 0)
                identity = np.where(lost, identity ^ part.change[one], identity)
                for bit, steps in part.steps.items():
                    distances[bit] = distances[bit] - np.where(lost, steps[one], 0)
            found[region] = (images_of(self.cycle.index, region, distances, len(place)), identity)
        return found
