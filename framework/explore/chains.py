"""In-order crash states, and tears: a sequence of sectors, and what may go wrong at its end.

A *chain* lets events (sectors of operations) take effect on a durable base one by one and knows
the key of every state on the way, by cumulative sums. Torn states are a chain's states with one
more thing changed: a unit at the tear that is garbage, unreadable or wiped. Of a write torn from
its end the sectors from a point on have survived: as the sectors of one operation differ, that is
the state before it, that after it and that at the point, added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from framework.explore.index import (
    I32,
    I64,
    U64,
    Base,
    Bool,
    CycleIndex,
    Index,
    scramble,
    xor_all,
)

_NO_IMAGE = 255


_WHICH = scramble(np.arange(_NO_IMAGE + 2, dtype=np.uint64))


def fact_hash(index: Index, region: int, identity: U64, image: I64) -> U64:
    """One number for what a boot can tell of a region."""
    return scramble(identity ^ index.salts[region] ^ _WHICH[image + 1])


def images_of(index: Index, region: int, distances: dict[int, I64], size: int) -> I64:
    """Which image (its place among the slot's) has distance 0; 255 for none. Smallest first."""
    found = np.full(size, _NO_IMAGE, dtype=np.int64)
    for slot in index.slots:
        if slot.region == region:
            for place in reversed(range(len(slot.names))):
                found[distances[slot.first_bit + place] == 0] = place
    return found


def base_facts(index: Index, base: Base) -> np.uint64:
    """The class key of a durable state."""
    key = np.uint64(0)
    for region in range(len(index.regions)):
        distances = {b: base.distance[b : b + 1] for b in range(len(base.distance))}
        image = images_of(index, region, distances, 1)
        key ^= fact_hash(index, region, base.identity[region : region + 1], image)[0]
    return np.uint64(key)


@dataclasses.dataclass(slots=True)
class States:
    """States of a chain: those after `begin` events, or with an operation torn from its end.

    With `end` and `tear`, `begin` is the state before an operation and `end` the one after it; of
    it the sectors from `tear` on have survived.
    """

    begin: I64
    end: I64 | None = None
    tear: I64 | None = None

    def __len__(self) -> int:
        return len(self.begin)

    def at(self, places: I64) -> States:
        """Those at some places."""
        if self.end is None or self.tear is None:
            return States(self.begin[places])
        return States(self.begin[places], self.end[places], self.tear[places])


@dataclasses.dataclass(slots=True)
class Part:
    """A region's course along a chain: values after each event that concerns it.

    `at`: the positions (0 = the first event) of those events, `passed`: how many of them lie
    before each position (None if there are none at all). `identity`, `distances` (by image bit)
    and `fact` begin with the value before any of them, so they are one longer than `at`.
    """

    at: I64
    passed: I32 | None
    identity: U64
    distances: dict[int, I64]
    image: I64
    fact: U64

    def before(self, position: I64) -> I64:
        """Indices into the values that hold when `position` events have taken effect."""
        if self.passed is None:
            return np.zeros(len(position), dtype=np.int64)
        return self.passed[position].astype(np.int64)

    def values(self, states: States) -> tuple[U64, dict[int, I64]]:
        """Identity and distances in states."""
        at = self.before(states.begin)
        identity = self.identity[at]
        distances = {bit: values[at] for bit, values in self.distances.items()}
        if states.end is not None and states.tear is not None and self.passed is not None:
            end, tear = self.before(states.end), self.before(states.tear)
            identity = identity ^ self.identity[end] ^ self.identity[tear]
            distances = {
                bit: distances[bit] + values[end] - values[tear]
                for bit, values in self.distances.items()
            }
        return identity, distances


class Chain:
    """Events taking effect one by one on a durable base.

    State i (0 to `len(events)`) is the one after i events. `key` and `total` have a value for
    each: class key and identity of the disk.
    """

    def __init__(self, cycle: CycleIndex, base: Base, events: I64) -> None:
        self.cycle = cycle
        self.events = events
        index = cycle.index
        sector = cycle.sector[events]
        rank = cycle.row[events]
        effective, previous = _history(sector, rank, base.rank[sector])
        old_mix = base.mix[sector]
        old_differs = base.differs[sector]
        again = np.flatnonzero(previous >= 0)
        if len(again):
            old_mix[again] = cycle.mix[events[previous[again]]]
            old_differs[again] = cycle.differs[events[previous[again]]]
        self.delta = old_mix ^ cycle.mix[events]
        new_differs = cycle.differs[events]
        if not bool(effective.all()):
            self.delta[~effective] = 0
            new_differs = np.where(effective, new_differs, old_differs)
        self.total = accumulate(base.total, self.delta)
        self.region = cycle.region[events]
        self.counts_for_identity = cycle.identity[events]
        steps: list[I64] = [
            ((new_differs >> np.uint64(bit)) & np.uint64(1)).astype(np.int64)
            - ((old_differs >> np.uint64(bit)) & np.uint64(1)).astype(np.int64)
            for bit in range(len(base.distance))
        ]
        self.distance_steps = steps
        """For every image, by how much each event changes the distance to it."""
        change = np.zeros(len(events), dtype=np.uint64)
        self.parts: dict[int, Part] = {}
        for number in range(len(index.regions)):
            part = self._part(number, base)
            self.parts[number] = part
            if len(part.at):
                change[part.at] = part.fact[1:] ^ part.fact[:-1]
        self.key = accumulate(base_facts(index, base), change)

    def _part(self, number: int, base: Base) -> Part:
        index = self.cycle.index
        mine = self.region == number
        at = np.flatnonzero(mine)
        passed: I32 | None = None
        if len(at):
            passed = np.zeros(len(mine) + 1, dtype=np.int32)
            np.cumsum(mine, out=passed[1:])
        counts = self.counts_for_identity[at]
        identity = accumulate(base.identity[number], np.where(counts, self.delta[at], np.uint64(0)))
        distances: dict[int, I64] = {}
        for slot in index.slots:
            if slot.region != number:
                continue
            for bit in range(slot.first_bit, slot.first_bit + len(slot.names)):
                steps = np.cumsum(self.distance_steps[bit][at])
                distances[bit] = np.concatenate(([0], steps)) + base.distance[bit]
        image = images_of(index, number, distances, len(at) + 1)
        fact = fact_hash(index, number, identity, image)
        return Part(at, passed, identity, distances, image, fact)

    # ---------------------------------------------------------------- states

    def keys(self, states: States) -> tuple[U64, U64]:
        """Class keys and identities of states."""
        key, total = self.key[states.begin], self.total[states.begin]
        if states.end is None or states.tear is None:
            return key, total
        total = total ^ self.total[states.end] ^ self.total[states.tear]
        for region, part in self.parts.items():
            if part.passed is None:
                continue
            mine = np.flatnonzero(part.passed[states.begin] != part.passed[states.end])
            if not len(mine):
                continue
            some = states.at(mine)
            identity, distances = part.values(some)
            image = images_of(self.cycle.index, region, distances, len(mine))
            after = fact_hash(self.cycle.index, region, identity, image)
            key[mine] ^= part.fact[part.before(some.begin)] ^ after
        return key, total

    def facts(self, states: States) -> list[tuple[I64, U64]]:
        """For every region (places of the image, identities) in states, to describe them."""
        found = []
        for region, part in self.parts.items():
            identity, distances = part.values(states)
            image = images_of(self.cycle.index, region, distances, len(states))
            found.append((image, identity))
        return found

    def scattered(self, begin: Sequence[int], events: Sequence[I64]) -> Scattered:
        """The states after `begin` events each, and then some events (positions) of one more.

        These must all concern different sectors, and follow the `begin` ones.
        """
        index = self.cycle.index
        at = np.array(begin, dtype=np.int64)
        total = self.total[at]
        facts = self.facts(States(at))
        distances = {r: part.values(States(at))[1] for r, part in self.parts.items()}
        for line, chosen in enumerate(events):
            delta = self.delta[chosen]
            total[line] ^= xor_all(delta)
            regions = self.region[chosen]
            for region in present(regions):
                if region < 0:
                    continue
                mine = regions == region
                facts[region][1][line] ^= xor_all(delta[mine & self.counts_for_identity[chosen]])
                for bit, values in distances[region].items():
                    values[line] += int(self.distance_steps[bit][chosen[mine]].sum())
        key = np.zeros(len(at), dtype=np.uint64)
        for region in self.parts:
            identity = facts[region][1]
            image = images_of(index, region, distances[region], len(at))
            facts[region] = (image, identity)
            key ^= fact_hash(index, region, identity, image)
        return Scattered(key, total, facts)


@dataclasses.dataclass(slots=True)
class Scattered:
    """Class keys, identities and facts of states with scattered tears."""

    key: U64
    total: U64
    facts: list[tuple[I64, U64]]


def present(regions: npt.NDArray[np.integer[Any]]) -> list[int]:
    """The numbers (from -1 on) that occur in an array of regions, ascending."""
    return (np.flatnonzero(np.bincount(regions + 1)) - 1).tolist()


def accumulate(start: np.uint64, steps: U64) -> U64:
    """Cumulative XOR, the start included."""
    whole = np.empty(len(steps) + 1, dtype=np.uint64)
    whole[0] = start
    whole[1:] = steps
    return np.bitwise_xor.accumulate(whole, out=whole)


def _history(sector: I64, rank: np.ndarray, standing: np.ndarray) -> tuple[Bool, I64]:
    """Which events take effect, and the last effective event before each on its sector (or -1).

    An event takes effect unless something of a higher rank stands on its sector already: in the
    base (`standing`), or from an event before it.
    """
    size = len(sector)
    if not size:
        return np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int64)
    order = np.argsort(sector, kind="stable")
    grouped = sector[order]
    starts = np.concatenate(([True], grouped[1:] != grouped[:-1]))
    if bool(starts.all()):
        return np.asarray(rank > standing), np.full(size, -1, dtype=np.int64)
    group = np.cumsum(starts) - 1
    width = np.int64(max(int(rank.max()), int(standing.max())) + 2)
    height = np.maximum(rank[order], standing[order]).astype(np.int64) + 1
    highest = np.maximum.accumulate(group * width + height)
    before = np.concatenate(([0], highest[:-1]))
    before[starts] = group[starts] * width + standing[order][starts] + 1
    good = group * width + rank[order] + 1 > before
    place = np.arange(size, dtype=np.int64)
    latest = np.maximum.accumulate(np.where(good, place, -1))
    previous = np.concatenate(([-1], latest[:-1]))
    first_place = place[starts][group]
    inside = previous >= first_place
    effective = np.empty(size, dtype=bool)
    effective[order] = good
    found = np.full(size, -1, dtype=np.int64)
    found[order] = np.where(inside, order[np.where(inside, previous, 0)], -1)
    return effective, found


# ---------------------------------------------------------------- units that are destroyed


class Blocks:
    """The universe's aligned units, each split by region: what is lost when a unit is destroyed.

    Attributes:
        unit: of every sector, its unit's number.
        block: of every sector, its block's number; a block is a unit's part in one region.
    """

    def __init__(self, index: Index, unit_sectors: int) -> None:
        universe = index.universe
        self.index = index
        self.unit_sectors = unit_sectors
        sectors = universe.sectors
        devices = np.searchsorted(universe.device_base, sectors, side="right") - 1
        local = sectors - universe.device_base[devices]
        per_device = int(universe.device_sectors.max(initial=1)) // unit_sectors + 2
        unit = devices * per_device + local // unit_sectors
        # Sectors are in order, so units are; regions are mostly, too: `unique` sees runs only.
        begins = _begins(unit)
        self.unit = np.cumsum(begins) - 1
        starts = np.flatnonzero(begins)
        self.unit_ids = unit[starts]
        regions = len(index.regions) + 1
        combined = self.unit * regions + (index.region.astype(np.int64) + 1)
        heads = np.flatnonzero(_begins(combined))
        ids, of_head = np.unique(combined[heads], return_inverse=True)
        self.block = np.repeat(of_head, np.diff(np.append(heads, len(combined))))
        self.block_unit = ids // regions
        self.block_region = ids % regions - 1
        self.first_block = np.searchsorted(self.block_unit, np.arange(len(self.unit_ids)))
        self.blocks_in = np.diff(np.append(self.first_block, len(ids)))
        self.unit_device = devices[starts]
        self.unit_first = (self.unit_ids % per_device) * unit_sectors
        self.unit_count = np.minimum(
            unit_sectors, universe.device_sectors[self.unit_device] - self.unit_first
        )
        if bool((self.block[1:] >= self.block[:-1]).all()):
            self._order = np.arange(len(self.block), dtype=np.int64)
        else:
            self._order = np.argsort(self.block, kind="stable")
        self._starts = np.searchsorted(self.block[self._order], np.arange(len(ids) + 1))

    def damaged(self, content: np.uint64) -> Sums:
        """What every block contributes when all its sectors hold a content (its hash)."""
        everything = slice(0, self.index.universe.size)
        same = np.full(self.index.universe.size, content, dtype=np.uint64)
        return self.sums(
            np.arange(len(self.block_unit)),
            self.index.mix(everything, same),
            self.index.differs(everything, same),
        )

    def sums(self, blocks: I64, mix: U64, differs: U64) -> Sums:
        """The contributions of the sectors of some blocks (ascending), given all sectors'."""
        at, starts = self._sectors(blocks)
        found = Sums.empty(len(self.block_unit), len(self.index.image_content))
        if not len(at):
            return found
        mine = mix[at]
        found.total[blocks] = np.bitwise_xor.reduceat(mine, starts)
        counted = np.where(self.index.identity[at], mine, np.uint64(0))
        found.identity[blocks] = np.bitwise_xor.reduceat(counted, starts)
        wrong = differs[at]
        for bit, distance in enumerate(found.distance):
            steps = ((wrong >> np.uint64(bit)) & np.uint64(1)).astype(np.int64)
            distance[blocks] = np.add.reduceat(steps, starts)
        return found

    def highest(self, blocks: I64, rank: I32) -> I64:
        """The highest rank that stands in each unit of some blocks; -1 for the other units."""
        found = np.full(len(self.unit_ids), -1, dtype=np.int64)
        at, starts = self._sectors(blocks)
        if len(at):
            top = np.maximum.reduceat(rank[at].astype(np.int64), starts)
            units = self.block_unit[blocks]
            first = np.flatnonzero(np.concatenate(([True], units[1:] != units[:-1])))
            found[units[first]] = np.maximum.reduceat(top, first)
        return found

    def blocks_of(self, units: I64) -> I64:
        """All blocks of some units (ascending)."""
        counts = self.blocks_in[units]
        ends = np.cumsum(counts)
        steps = np.repeat(self.first_block[units] - (ends - counts), counts)
        return np.asarray(np.arange(int(counts.sum()), dtype=np.int64) + steps)

    def _sectors(self, blocks: I64) -> tuple[I64, I64]:
        """The sectors of some blocks, block by block, and where each block's begin."""
        first = self._starts[blocks]
        counts = self._starts[blocks + 1] - first
        ends = np.cumsum(counts)
        starts = ends - counts
        place = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(first - starts, counts)
        return self._order[place], starts


@dataclasses.dataclass(slots=True)
class Sums:
    """What the sectors of each block contribute: to the disk, to its region, to distances."""

    total: U64
    identity: U64
    distance: list[I64]

    @classmethod
    def empty(cls, blocks: int, images: int) -> Sums:
        """Of no sectors."""
        return cls(
            np.zeros(blocks, dtype=np.uint64),
            np.zeros(blocks, dtype=np.uint64),
            [np.zeros(blocks, dtype=np.int64) for _ in range(images)],
        )


class Standing:
    """What stands in the units that a stage's operations concern, before any takes effect."""

    def __init__(self, blocks: Blocks, base: Base, sectors: I64) -> None:
        touched = np.zeros(len(blocks.unit_ids), dtype=bool)
        touched[blocks.unit[sectors]] = True
        mine = blocks.blocks_of(np.flatnonzero(touched))
        self.sums = blocks.sums(mine, base.mix, base.differs)
        self.highest = blocks.highest(mine, base.rank)


def _begins(values: I64) -> Bool:
    """Whether each value differs from the one before it."""
    return np.concatenate(([True], values[1:] != values[:-1]))[: len(values)]


@dataclasses.dataclass(slots=True)
class Doomed:
    """Units to be destroyed, one a state, and what stands in each of their blocks until then.

    Attributes:
        unit: the unit's number of each.
        layers: the units' first blocks, second blocks and so on: which of the units have one,
            its number, and what it contributes to disk and region, and to distances.
    """

    unit: I64
    layers: list[tuple[I64, I64, U64, U64, dict[int, I64]]]

    def at(self, places: I64) -> Doomed:
        """Those at some places."""
        layers = []
        for mine, block, total, identity, distances in self.layers:
            where = np.searchsorted(mine, places)
            has = where < len(mine)
            has[has] = mine[where[has]] == places[has]
            some = where[has]
            picked = {bit: values[some] for bit, values in distances.items()}
            layers.append((np.flatnonzero(has), block[some], total[some], identity[some], picked))
        return Doomed(self.unit[places], layers)


class Destroyer:
    """Evaluates a chain's states with one unit destroyed."""

    def __init__(self, chain: Chain, blocks: Blocks, standing: Standing) -> None:
        self.chain = chain
        self.blocks = blocks
        self.standing = standing.sums
        of_event = blocks.block[chain.cycle.sector[chain.events]]
        order = np.argsort(of_event, kind="stable")
        self._step = np.int64(len(chain.events) + 1)
        self._sorted = of_event[order] * self._step + order
        self._starts = np.searchsorted(of_event[order], np.arange(len(blocks.block_unit)))
        self._distance = [
            np.concatenate(([0], np.cumsum(steps[order]))) for steps in chain.distance_steps
        ]
        delta = chain.delta[order]
        mine = chain.counts_for_identity[order]
        self._total = accumulate(np.uint64(0), delta)
        self._identity = accumulate(np.uint64(0), np.where(mine, delta, np.uint64(0)))

    def doom(self, position: I64, unit: I64) -> Doomed:
        """What stands in units after `position` events."""
        layers = []
        counts = self.blocks.blocks_in[unit]
        for extra in range(int(counts.max(initial=0))):
            mine = np.flatnonzero(counts > extra)
            block = self.blocks.first_block[unit[mine]] + extra
            end = np.searchsorted(self._sorted, block * self._step + position[mine])
            start = self._starts[block]
            total = self.standing.total[block] ^ self._total[end] ^ self._total[start]
            identity = self.standing.identity[block] ^ self._identity[end] ^ self._identity[start]
            distances = {
                bit: self.standing.distance[bit][block] + sums[end] - sums[start]
                for bit, sums in enumerate(self._distance)
            }
            layers.append((mine, block, total, identity, distances))
        return Doomed(unit, layers)

    def evaluate(
        self, states: States, intact: tuple[U64, U64], doomed: Doomed, damaged: Sums
    ) -> tuple[U64, U64]:
        """Class keys and identities of states (`intact`) with their units destroyed."""
        key, total = intact[0].copy(), intact[1].copy()
        for mine, block, whole, identity, distances in doomed.layers:
            total[mine] ^= whole ^ damaged.total[block]
            region = self.blocks.block_region[block]
            for number in present(region):
                if number < 0:
                    continue
                some = slice(None) if bool((region == number).all()) else region == number
                part = self.chain.parts[number]
                before, standing = part.values(states.at(mine[some]))
                change = identity[some] ^ damaged.identity[block[some]]
                old = images_of(self.chain.cycle.index, number, standing, len(before))
                after = {
                    bit: values - distances[bit][some] + damaged.distance[bit][block[some]]
                    for bit, values in standing.items()
                }
                new = images_of(self.chain.cycle.index, number, after, len(before))
                index = self.chain.cycle.index
                key[mine[some]] ^= fact_hash(index, number, before, old) ^ fact_hash(
                    index, number, before ^ change, new
                )
        return key, total

    def facts(self, states: States, doomed: Doomed, damaged: Sums) -> list[tuple[I64, U64]]:
        """As `Chain.facts`, with the units destroyed."""
        found = self.chain.facts(states)
        for mine, block, _, identity, distances in doomed.layers:
            region = self.blocks.block_region[block]
            for number in present(region):
                if number < 0:
                    continue
                some = region == number
                where = mine[some]
                image, before = found[number]
                before[where] ^= identity[some] ^ damaged.identity[block[some]]
                _, standing = self.chain.parts[number].values(states.at(where))
                after = {
                    bit: values - distances[bit][some] + damaged.distance[bit][block[some]]
                    for bit, values in standing.items()
                }
                image[where] = images_of(self.chain.cycle.index, number, after, len(where))
        return found
