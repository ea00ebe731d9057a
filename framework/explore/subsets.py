"""Enumerates the models under which any subset survives: subset, lying.

Their space, exactly: at every moment n, the durable operations and any subset of the open ones (for
`lying`, with flushes taken for lies as the model says), all taking effect in the order of
application.

With at most N writes at stake every subset is visited. Beyond that, the *product of regions*: two
writes can only interact where they share a sector, or where they touch the same region, whose
content is one fact. So the open writes fall into groups that are independent of each other, a
state is one outcome of each group, and the reachable classes are the product of the groups'
reachable outcomes. A slot's body doesn't tie its writes together: an image stands there if *every*
sector agrees with it, so the outcomes of its writes combine by AND, of which few results exist
however many writes there are. Within a group, the outcomes are found write by write, keeping each
distinct "who wrote each part last" once: of forty rewrites of the same sectors there are forty-one
outcomes, not 2^40.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from framework.explore.chains import fact_hash
from framework.explore.collect import Batch, Opening
from framework.explore.index import I64, U64, Bool, Index, scramble, xor_all
from framework.explore.stages import Stage
from framework.explore.states import CrashState

PRODUCT_LIMIT: Final = 1 << 16
"""Most combinations of groups' outcomes that are written out as classes."""
OUTCOME_LIMIT: Final = 1 << 12
"""Most distinct outcomes that are followed up of writes that depend on each other."""
CONTROL_SAMPLES: Final = 64
"""Random subsets visited of a stage whose classes were found by the product."""
_BITS_AT_ONCE: Final = 1 << 22
_NO_IMAGE: Final = 255


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What is exhaustive, and how much is drawn of what is not."""

    exhaustive_up_to: int
    samples: int


@dataclasses.dataclass(slots=True)
class Found:
    """A stage's batches, and how they were found; `space`: the distinct states of a product."""

    batches: Iterable[Batch]
    how: str
    space: int | None = None
    note: str = ""


# ---------------------------------------------------------------- atoms


@dataclasses.dataclass(slots=True)
class Atom:
    """Sectors of one region that the same open writes cover: they are rewritten together.

    Option 0 of the arrays is the durable content, option i the content of writer i.

    Attributes:
        region: its region, -1 outside of all.
        identity: whether it counts for its region's identity.
        writers: places (in the stage's rows) of the writes that cover it, in order of application.
        total: XOR of the sectors' contributions for every option.
        matches: bit k of an option: no sector differs from image k.
    """

    region: int
    identity: bool
    writers: I64
    total: U64
    matches: U64


def atoms_of(stage: Stage) -> list[Atom]:
    """Split what a stage's open writes cover into atoms."""
    cycle, base = stage.cycle, stage.base
    events = cycle.events_of(stage.rows)
    counts = cycle.first_event[stage.rows + 1] - cycle.first_event[stage.rows]
    place = np.repeat(np.arange(len(stage.rows)), counts)
    sector = cycle.sector[events]
    alive = cycle.row[events] > base.rank[sector]
    events, place, sector = events[alive], place[alive], sector[alive]
    if not len(events):
        return []
    order = np.argsort(sector, kind="stable")
    events, place, sector = events[order], place[order], sector[order]
    new = np.concatenate(([True], sector[1:] != sector[:-1]))
    starts = np.flatnonzero(new)
    signature = np.bitwise_xor.reduceat(scramble(place.astype(np.uint64)), starts)
    first = sector[starts]
    region = cycle.index.region[first].astype(np.uint64)
    place_in_layout = (region << np.uint64(1)) | cycle.index.identity[first].astype(np.uint64)
    signature ^= scramble(~place_in_layout)  # a domain of its own: never a writer's number
    _, representative, of_sector = np.unique(signature, return_index=True, return_inverse=True)
    by_atom = np.argsort(of_sector, kind="stable")
    bounds = np.searchsorted(of_sector[by_atom], np.arange(len(representative) + 1))
    lengths = np.diff(np.append(starts, len(events)))
    found = []
    for atom, head in enumerate(representative.tolist()):
        sectors = by_atom[bounds[atom] : bounds[atom + 1]]
        width = int(lengths[head])
        writers = place[starts[head] : starts[head] + width]
        at = first[sectors]
        total = [xor_all(base.mix[at])]
        matches = [~np.bitwise_or.reduce(base.differs[at])]
        for writer in range(width):
            mine = events[starts[sectors] + writer]
            total.append(xor_all(cycle.mix[mine]))
            matches.append(~np.bitwise_or.reduce(cycle.differs[mine]))
        found.append(
            Atom(
                int(cycle.index.region[first[head]]),
                bool(cycle.index.identity[first[head]]),
                writers,
                np.array(total, dtype=np.uint64),
                np.array(matches, dtype=np.uint64),
            )
        )
    return found


# ---------------------------------------------------------------- from outcomes to keys


class Combiner:
    """Turns what is known of a stage's states into class keys and disk identities."""

    def __init__(self, stage: Stage, atoms: list[Atom]) -> None:
        self.stage = stage
        self.index: Index = stage.cycle.index
        self.atoms = atoms
        base = stage.base
        self.start_identity = base.identity.copy()
        self.start_total = base.total
        standing = base.distance.copy()
        covered = _covered(stage)
        for bit in range(len(standing)):
            standing[bit] -= int(((base.differs[covered] >> np.uint64(bit)) & np.uint64(1)).sum())
        self.start_matches = np.uint64(0)
        """Bit k: no sector that is not at stake differs from image k."""
        for bit, distance in enumerate(standing.tolist()):
            if distance == 0:
                self.start_matches |= np.uint64(1 << bit)
        for atom in atoms:
            self.start_total ^= atom.total[0]
            if atom.identity and atom.region >= 0:
                self.start_identity[atom.region] ^= atom.total[0]
        self.touched = sorted({a.region for a in atoms if a.region >= 0})

    def images(self, region: int, matches: U64) -> I64:
        """Which image a region holds, given the mask of those that nothing contradicts."""
        found = np.full(len(matches), _NO_IMAGE, dtype=np.int64)
        for slot in self.index.slots:
            if slot.region == region:
                for place in reversed(range(len(slot.names))):
                    bit = np.uint64(slot.first_bit + place)
                    found[((matches >> bit) & np.uint64(1)) != 0] = place
        return found

    def keys(self, identity: npt.NDArray[np.uint64], matches: U64) -> U64:
        """Class keys of states. `identity`: (states, regions)."""
        key = np.zeros(len(matches), dtype=np.uint64)
        for region in range(len(self.index.regions)):
            column = identity[:, region]
            if region in self.touched:
                key ^= fact_hash(self.index, region, column, self.images(region, matches))
            elif len(column):
                one = fact_hash(self.index, region, column[:1], self.images(region, matches[:1]))
                key ^= one[0]
        return key

    def facts(self, identity: npt.NDArray[np.uint64], matches: U64) -> list[tuple[I64, U64]]:
        """Describe states, for `Batch.facts`. `identity`: (states, regions)."""
        return [
            (self.images(region, matches), identity[:, region])
            for region in range(len(self.index.regions))
        ]


def _covered(stage: Stage) -> I64:
    cycle = stage.cycle
    events = cycle.events_of(stage.rows)
    sector = cycle.sector[events]
    sector = np.sort(sector[cycle.row[events] > stage.base.rank[sector]])
    return sector[np.concatenate(([True], sector[1:] != sector[:-1]))[: len(sector)]]


@dataclasses.dataclass(slots=True)
class Outcomes:
    """What given subsets lead to. `identity`: (states, regions)."""

    identity: npt.NDArray[np.uint64]
    total: U64
    matches: U64


def evaluate(combiner: Combiner, bits: Bool) -> Outcomes:
    """The outcomes of explicit subsets; `bits`: (states, open writes)."""
    size = len(bits)
    identity = np.repeat(combiner.start_identity[None, :], size, axis=0)
    total = np.full(size, combiner.start_total, dtype=np.uint64)
    matches = np.full(size, combiner.start_matches, dtype=np.uint64)
    for atom in combiner.atoms:
        option = np.zeros(size, dtype=np.int64)
        for number, writer in enumerate(atom.writers.tolist(), 1):
            option[bits[:, writer]] = number
        contribution = atom.total[option]
        total ^= contribution
        if atom.region >= 0:
            matches &= atom.matches[option]
            if atom.identity:
                identity[:, atom.region] ^= contribution
    return Outcomes(identity, total, matches)


# ---------------------------------------------------------------- a stage


def explore_stage(
    stage: Stage, durable_last: int, model: str, limits: Limits, rng: np.random.Generator
) -> Found:
    """Every subset if there are few enough, else every class if possible, else a sample."""
    opening = Opening.of(stage, durable_last, model)
    combiner = Combiner(stage, atoms_of(stage))
    count = len(stage.rows)
    if count <= limits.exhaustive_up_to:
        numbers = np.arange(1 << count, dtype=np.int64)
        bits = ((numbers[:, None] >> np.arange(count)) & 1).astype(bool)
        return Found([subset_batch(combiner, opening, bits, exhaustive=True)], "exhaustive")
    from framework.explore.product import explore_product  # noqa: PLC0415 - a cycle otherwise

    return explore_product(combiner, opening, limits, rng)


def subset_batch(
    combiner: Combiner, opening: Opening, bits: Bool, *, exhaustive: bool, seed: int = 0
) -> Batch:
    """Explicit subsets as a batch."""
    stage = combiner.stage
    outcomes = evaluate(combiner, bits)
    arrived = stage.cycle.arrived[stage.rows]
    if len(arrived):
        first = np.where(bits, arrived, -1).max(axis=1, initial=-1)
    else:
        first = np.full(len(bits), -1, dtype=np.int64)
    ops = stage.cycle.op[stage.rows]
    packed = np.packbits(bits, axis=1)
    width = bits.shape[1]

    def locate(place: int) -> CrashState:
        mine = np.unpackbits(packed[place], count=width).astype(bool)
        return opening.state(int(ops[mine].max(initial=0)), ops[~mine], seed=seed)

    return Batch(
        combiner.keys(outcomes.identity, outcomes.matches),
        outcomes.total,
        np.maximum(first, stage.first_sequence),
        stage.last_sequence,
        lambda places: combiner.facts(outcomes.identity[places], outcomes.matches[places]),
        locate,
        opening.model,
        stage.cycle.number,
        exhaustive,
    )


def sample_bits(count: int, samples: int, rng: np.random.Generator) -> Bool:
    """Random subsets, as many as fit a bound on memory, and the two extremes."""
    size = max(2, min(samples, _BITS_AT_ONCE // max(1, count)))
    bits = rng.random((size, count)) < 0.5
    bits[0] = False
    bits[-1] = True
    return bits
