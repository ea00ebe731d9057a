"""In-order crash states, and tears: a sequence of sectors, and what may go wrong at its end.

A *chain* lets events (sectors of operations) take effect on a durable base one by one and knows
the key of every state on the way, by cumulative sums. Torn states are a chain's states with one
more thing changed: a unit at the tear that is garbage, unreadable or wiped. A write torn from its
end is a point of another chain, in which the sectors of each operation come in reverse.
"""

from __future__ import annotations

import dataclasses

import numpy as np

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


def fact_hash(index: Index, region: int, identity: U64, image: I64 | int) -> U64:
    """One number for what a boot can tell of a region."""
    which = np.asarray(image, dtype=np.uint64) + np.uint64(1)
    return scramble(identity ^ index.salts[region] ^ scramble(which))


def images_of(index: Index, region: int, distances: dict[int, I64], size: int) -> I64:
    """Which image (its place among the slot's) has distance 0; 255 for none. Smallest first."""
    found = np.full(size, _NO_IMAGE, dtype=np.int64)
    for slot in index.slots:
        if slot.region == region:
            for place in reversed(range(len(slot.names))):
                found[distances[slot.first_bit + place] == 0] = place
    return found


def base_facts(index: Index, base: Base) -> tuple[U64, U64]:
    """The fact hash of every region in a durable state, and its class key (one element)."""
    facts = np.zeros(len(index.regions), dtype=np.uint64)
    for region in range(len(index.regions)):
        distances = {b: base.distance[b : b + 1] for b in range(len(base.distance))}
        image = images_of(index, region, distances, 1)
        facts[region] = fact_hash(index, region, base.identity[region : region + 1], image)[0]
    return facts, np.array([xor_all(facts)], dtype=np.uint64)


@dataclasses.dataclass(slots=True)
class Part:
    """A region's course along a chain: values after each event that concerns it.

    `at`: the positions (0 = the first event) of those events. `identity`, `distances` (by image
    bit) and `fact` begin with the value before any of them, so they are one longer.
    """

    at: I64
    identity: U64
    distances: dict[int, I64]
    image: I64
    fact: U64

    def before(self, position: I64) -> I64:
        """Indices into the values that hold when `position` events have taken effect."""
        return np.asarray(np.searchsorted(self.at, position, side="left"), dtype=np.int64)


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
        first = previous < 0
        old_mix = np.where(first, base.mix[sector], cycle.mix[events[previous]])
        old_differs = np.where(first, base.differs[sector], cycle.differs[events[previous]])
        self.old_mix = old_mix
        self.effective = effective
        self.delta = np.where(effective, old_mix ^ cycle.mix[events], np.uint64(0))
        new_differs = np.where(effective, cycle.differs[events], old_differs)
        self.total = _accumulate(base.total, self.delta)
        self.distance_steps = [
            ((new_differs >> np.uint64(bit)) & np.uint64(1)).astype(np.int64)
            - ((old_differs >> np.uint64(bit)) & np.uint64(1)).astype(np.int64)
            for bit in range(len(base.distance))
        ]
        """For every image, by how much each event changes the distance to it."""
        facts, key = base_facts(index, base)
        self.base_fact = facts
        change = np.zeros(len(events), dtype=np.uint64)
        region = cycle.region[events]
        self.parts: dict[int, Part] = {}
        for number in range(len(index.regions)):
            at = np.flatnonzero(region == number)
            part = self._part(number, at, base)
            self.parts[number] = part
            if len(at):
                change[at] = part.fact[1:] ^ part.fact[:-1]
        self.key = _accumulate(key[0], change)

    def _part(self, number: int, at: I64, base: Base) -> Part:
        index = self.cycle.index
        counts = self.cycle.identity[self.events[at]]
        identity = _accumulate(
            base.identity[number], np.where(counts, self.delta[at], np.uint64(0))
        )
        distances: dict[int, I64] = {}
        for slot in index.slots:
            if slot.region != number:
                continue
            for bit in range(slot.first_bit, slot.first_bit + len(slot.names)):
                steps = np.cumsum(self.distance_steps[bit][at])
                distances[bit] = np.concatenate(([0], steps)) + base.distance[bit]
        image = images_of(index, number, distances, len(at) + 1)
        return Part(at, identity, distances, image, fact_hash(index, number, identity, image))

    def image_and_identity(self, position: int) -> list[tuple[int, int]]:
        """For every region, (place of the image, identity) of a state, to describe it."""
        found = []
        for number in range(len(self.cycle.index.regions)):
            part = self.parts[number]
            at = int(part.at.searchsorted(position))
            found.append((int(part.image[at]), int(part.identity[at])))
        return found


def _accumulate(start: np.uint64, steps: U64) -> U64:
    """Cumulative XOR, the start included."""
    whole = np.empty(len(steps) + 1, dtype=np.uint64)
    whole[0] = start
    whole[1:] = steps
    return np.asarray(np.bitwise_xor.accumulate(whole))


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

    `damage` is the content hash that a destroyed sector has.

    Attributes:
        unit: of every sector, its unit's number.
        block: of every sector, its block's number; a block is a unit's part in one region.
    """

    def __init__(self, index: Index, unit_sectors: int, damage: np.uint64) -> None:
        universe = index.universe
        self.index = index
        sectors = universe.sectors
        devices = np.searchsorted(universe.device_base, sectors, side="right") - 1
        local = sectors - universe.device_base[devices]
        per_device = int(universe.device_sectors.max(initial=1)) // unit_sectors + 2
        unit = devices * per_device + local // unit_sectors
        self.unit_ids, self.unit = np.unique(unit, return_inverse=True)
        regions = len(index.regions) + 1
        combined = self.unit * regions + (index.region.astype(np.int64) + 1)
        ids, self.block = np.unique(combined, return_inverse=True)
        self.block_unit = ids // regions
        self.block_region = ids % regions - 1
        self.first_block = np.searchsorted(self.block_unit, np.arange(len(self.unit_ids)))
        self.blocks_in = np.diff(np.append(self.first_block, len(ids)))
        starts = np.searchsorted(self.unit, np.arange(len(self.unit_ids)))
        self.unit_device = devices[starts]
        self.unit_first = (self.unit_ids % per_device) * unit_sectors
        self.unit_count = np.minimum(
            unit_sectors, universe.device_sectors[self.unit_device] - self.unit_first
        )
        self._order = np.argsort(self.block, kind="stable")
        self._sorted_block = self.block[self._order]
        self._starts = np.searchsorted(self._sorted_block, np.arange(len(ids) + 1))
        everything = slice(0, universe.size)
        content = np.full(len(sectors), damage, dtype=np.uint64)
        self.damaged = self.sums(
            np.arange(len(ids)), index.mix(everything, content), index.differs(everything, content)
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
        mine = blocks.blocks_of(np.unique(blocks.unit[sectors]))
        self.sums = blocks.sums(mine, base.mix, base.differs)
        self.highest = blocks.highest(mine, base.rank)


class Destroyer:
    """Evaluates a chain's states with one unit destroyed."""

    def __init__(self, chain: Chain, blocks: Blocks, standing: Standing) -> None:
        self.chain = chain
        self.blocks = blocks
        self.standing = standing.sums
        cycle = chain.cycle
        of_event = blocks.block[cycle.sector[chain.events]]
        order = np.argsort(of_event, kind="stable")
        self._step = np.int64(len(chain.events) + 1)
        self._sorted = of_event[order] * self._step + order
        self._starts = np.searchsorted(of_event[order], np.arange(len(blocks.block_unit)))
        self._distance = [
            np.concatenate(([0], np.cumsum(steps[order]))) for steps in chain.distance_steps
        ]
        delta = chain.delta[order]
        mine = cycle.identity[chain.events[order]]
        self._total = _accumulate(np.uint64(0), delta)
        self._identity = _accumulate(np.uint64(0), np.where(mine, delta, np.uint64(0)))

    def _content(self, block: I64, position: I64) -> tuple[U64, U64]:
        """What a block contributes to (the disk's, its region's) identity at a position."""
        end = np.searchsorted(self._sorted, block * self._step + position)
        start = self._starts[block]
        total = self.standing.total[block] ^ self._total[end] ^ self._total[start]
        identity = self.standing.identity[block] ^ self._identity[end] ^ self._identity[start]
        return total, identity

    def evaluate(self, position: I64, unit: I64) -> tuple[U64, U64]:
        """Class keys and identities of the states after `position` events, `unit` destroyed."""
        key = self.chain.key[position].copy()
        total = self.chain.total[position].copy()
        counts = self.blocks.blocks_in[unit]
        for extra in range(int(counts.max(initial=0))):
            mine = np.flatnonzero(counts > extra)
            block = self.blocks.first_block[unit[mine]] + extra
            whole, identity = self._content(block, position[mine])
            total[mine] ^= whole ^ self.blocks.damaged.total[block]
            region = self.blocks.block_region[block]
            for number in np.unique(region).tolist():
                if number >= 0:
                    some = region == number
                    key[mine[some]] ^= self._swap(
                        number, position[mine[some]], block[some], identity[some]
                    )
        return key, total

    def _swap(self, region: int, position: I64, block: I64, identity: U64) -> U64:
        """What replaces a region's fact by the one with a block destroyed."""
        old, new, _ = self._facts(region, position, block, identity)
        return old ^ new

    def _facts(
        self, region: int, position: I64, block: I64, identity: U64
    ) -> tuple[U64, U64, tuple[I64, U64]]:
        index = self.chain.cycle.index
        part = self.chain.parts[region]
        at = part.before(position)
        after = part.identity[at] ^ identity ^ self.blocks.damaged.identity[block]
        distances = {}
        if part.distances:
            end = np.searchsorted(self._sorted, block * self._step + position)
            start = self._starts[block]
            for bit, values in part.distances.items():
                standing = self.standing.distance[bit][block]
                standing = standing + self._distance[bit][end] - self._distance[bit][start]
                damaged = self.blocks.damaged.distance[bit][block]
                distances[bit] = values[at] - standing + damaged
        image = images_of(index, region, distances, len(at))
        return part.fact[at], fact_hash(index, region, after, image), (image, after)

    def image_and_identity(self, position: int, unit: int) -> list[tuple[int, int]]:
        """As `Chain.image_and_identity`, with the unit destroyed."""
        found = self.chain.image_and_identity(position)
        at = np.array([position], dtype=np.int64)
        for extra in range(int(self.blocks.blocks_in[unit])):
            block = np.array([self.blocks.first_block[unit] + extra], dtype=np.int64)
            region = int(self.blocks.block_region[block[0]])
            if region >= 0:
                _, identity = self._content(block, at)
                _, _, (image, after) = self._facts(region, at, block, identity)
                found[region] = (int(image[0]), int(after[0]))
        return found
