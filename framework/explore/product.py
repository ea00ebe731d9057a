"""The product of regions: every reachable class of a stage with too many subsets to visit.

See `subsets` for why it holds. `tests/explore` compares it with full enumeration.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from framework.explore.collect import Batch, Opening
from framework.explore.index import I64, U64, Bool
from framework.explore.states import CrashState
from framework.explore.subsets import (
    CONTROL_SAMPLES,
    OUTCOME_LIMIT,
    PRODUCT_LIMIT,
    Atom,
    Combiner,
    Found,
    Limits,
    sample_bits,
    subset_batch,
)

_Number = TypeVar("_Number", np.uint16, np.uint64)


@dataclasses.dataclass(slots=True)
class Group:
    """Writes that depend on each other, and the distinct outcomes that they have together.

    Attributes:
        rows: places of its writes in the stage's rows.
        identity: (outcomes, regions): what each outcome adds to the identities.
        matches: the images that each outcome leaves possible.
        bits: (outcomes, writes): a subset that leads to it, the earliest possible one.
        states: how many distinct contents its sectors can have.
        complete: whether these are all outcomes.
    """

    rows: I64
    identity: npt.NDArray[np.uint64]
    matches: U64
    bits: Bool
    states: int
    complete: bool


def explore_product(
    combiner: Combiner, opening: Opening, limits: Limits, rng: np.random.Generator
) -> Found:
    """The classes of a stage by the product of its groups, and a few random subsets visited."""
    count = len(combiner.stage.rows)
    groups = [
        _outcomes(combiner, rows, atoms, limits, rng)
        for rows, atoms in _groups(combiner.atoms, count)
    ]
    groups = _fold(combiner, groups)
    finished = [len(g.matches) for g in groups if g.complete]
    complete = len(finished) == len(groups)
    states = math.prod(g.states for g in groups)
    sizes = math.prod(finished)
    if sizes <= PRODUCT_LIMIT:
        choices = _all_choices(groups, rng)
    else:
        choices = _some_choices([len(g.matches) for g in groups], limits.samples, rng)
    exhaustive = complete and sizes <= PRODUCT_LIMIT
    product = _batch(combiner, opening, groups, choices, exhaustive=exhaustive)
    wanted = min(CONTROL_SAMPLES, limits.samples) if exhaustive else limits.samples
    drawn = subset_batch(combiner, opening, sample_bits(count, wanted, rng), exhaustive=exhaustive)
    if exhaustive:
        note = f"{len(groups)} independent groups of writes, {len(choices)} combinations"
        return Found([product, drawn], "classes", states, note)
    if sizes > PRODUCT_LIMIT:
        note = f"every outcome of {len(groups)} groups, but only some of {sizes} combinations"
    else:
        sampled = sorted(_regions_of(combiner, [g for g in groups if not g.complete]))
        note = f"contents of {', '.join(sampled)} are a sample, the others are all there"
    return Found([product, drawn], "sampled", None, note)


def _regions_of(combiner: Combiner, groups: list[Group]) -> set[str]:
    """The names of the regions whose identity these groups decide."""
    regions = combiner.index.regions
    return {
        regions[number].name
        for group in groups
        for number in np.flatnonzero(group.identity.any(axis=0)).tolist()
    }


def _groups(atoms: list[Atom], count: int) -> list[tuple[I64, list[Atom]]]:
    """Connected sets of writes: they share an atom, or touch the same region's identity."""
    parent = list(range(count))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    def join(a: int, b: int) -> None:
        a, b = root(a), root(b)
        if a != b:
            parent[max(a, b)] = min(a, b)

    anchor: dict[int, int] = {}
    for atom in atoms:
        writers = atom.writers.tolist()
        for other in writers[1:]:
            join(writers[0], other)
        if atom.identity and atom.region >= 0:
            join(anchor.setdefault(atom.region, writers[0]), writers[0])
    members: dict[int, list[int]] = {}
    for row in range(count):
        members.setdefault(root(row), []).append(row)
    of_root: dict[int, list[Atom]] = {}
    for atom in atoms:
        of_root.setdefault(root(int(atom.writers[0])), []).append(atom)
    return [
        (np.array(rows, dtype=np.int64), of_root.get(head, [])) for head, rows in members.items()
    ]


def _outcomes(
    combiner: Combiner,
    rows: I64,
    atoms: list[Atom],
    limits: Limits,
    rng: np.random.Generator,
) -> Group:
    """The distinct outcomes of a group, write by write; a sample if they are too many."""
    limit = max(OUTCOME_LIMIT, 1 << limits.exhaustive_up_to)
    place = {row: i for i, row in enumerate(rows.tolist())}
    covers: list[list[tuple[int, int]]] = [[] for _ in rows]
    for number, atom in enumerate(atoms):
        for option, writer in enumerate(atom.writers.tolist(), 1):
            covers[place[writer]].append((number, option))
    options = np.zeros((1, len(atoms)), dtype=np.uint16)
    bits = np.zeros((1, len(rows)), dtype=bool)
    complete = True
    for number, cover in enumerate(covers):
        if not cover:
            continue  # overwritten by something durable: it changes nothing
        taken, taken_bits = options.copy(), bits.copy()
        for atom_number, option in cover:
            taken[:, atom_number] = option
        taken_bits[:, number] = True
        options = np.concatenate((options, taken))
        bits = np.concatenate((bits, taken_bits))
        options, where = _distinct(options)
        bits = bits[where]
        if len(options) > limit:
            complete = False
            break
    if not complete:
        bits = sample_bits(len(rows), min(limits.samples, limit), rng)
        options = np.zeros((len(bits), len(atoms)), dtype=np.uint16)
        for number, cover in enumerate(covers):
            for atom_number, option in cover:
                options[bits[:, number], atom_number] = option
    return _group(combiner, rows, atoms, options, bits, complete=complete)


def _group(
    combiner: Combiner,
    rows: I64,
    atoms: list[Atom],
    options: npt.NDArray[np.uint16],
    bits: Bool,
    *,
    complete: bool,
) -> Group:
    size = len(options)
    identity = np.zeros((size, len(combiner.start_identity)), dtype=np.uint64)
    total = np.zeros(size, dtype=np.uint64)
    matches = np.full(size, np.iinfo(np.uint64).max, dtype=np.uint64)
    for number, atom in enumerate(atoms):
        option = options[:, number]
        contribution = atom.total[option]
        total ^= contribution
        if atom.region >= 0:
            matches &= atom.matches[option]
            if atom.identity:
                identity[:, atom.region] ^= contribution
    states = len(np.unique(total))
    table = np.concatenate((identity, matches[:, None]), axis=1)
    _, where = _distinct(table)
    return Group(rows, identity[where], matches[where], bits[where], states, complete)


def _distinct(table: npt.NDArray[_Number]) -> tuple[npt.NDArray[_Number], I64]:
    """The distinct rows of a table in the order of their first place, and those places."""
    if table.shape[1] == 0:
        return table[:1], np.zeros(1, dtype=np.int64)
    packed = np.ascontiguousarray(table)
    view = packed.view(np.dtype((np.void, packed.dtype.itemsize * packed.shape[1]))).ravel()
    _, where = np.unique(view, return_index=True)
    where = np.sort(where)
    return table[where], where.astype(np.int64)


def _fold(combiner: Combiner, groups: list[Group]) -> list[Group]:
    """Combine the groups that touch no identity: only the AND of their images matters.

    Many such groups have the same pair of outcomes; of a set of them the AND is the same as of
    one, but for "some yes, some no".
    """
    plain = [g for g in groups if g.complete and not bool(g.identity.any())]
    others = [g for g in groups if not (g.complete and not bool(g.identity.any()))]
    if len(plain) < 2:
        return groups
    slots = np.uint64(0)
    for slot in combiner.index.slots:
        slots |= np.uint64(slot.bits)
    rows = np.concatenate([g.rows for g in plain])
    arrived = combiner.stage.cycle.arrived[combiner.stage.rows]
    # Of each mask that can be reached: the earliest moment, and the last step of a way to it.
    steps: list[tuple[int, int]] = [(-1, -1)]
    reached: dict[int, tuple[int, int]] = {int(slots): (-1, 0)}
    states = 1
    for group in plain:
        states *= group.states
        latest = np.where(group.bits, arrived[group.rows], -1).max(axis=1, initial=-1).tolist()
        choices: dict[int, tuple[int, int]] = {}
        for outcome, mask in enumerate((group.matches & slots).tolist()):
            choices[mask] = min(
                choices.get(mask, (latest[outcome], outcome)), (latest[outcome], outcome)
            )
        found: dict[int, tuple[int, int, int]] = {}
        for mask, (moment, step) in reached.items():
            for mine, (arrival, outcome) in choices.items():
                candidate = (max(moment, arrival), step, outcome)
                found[mask & mine] = min(found.get(mask & mine, candidate), candidate)
        reached = {}
        for mask, (moment, step, outcome) in found.items():
            steps.append((step, outcome))
            reached[mask] = (moment, len(steps) - 1)
    bits = np.zeros((len(reached), len(rows)), dtype=bool)
    starts = np.cumsum([0, *(len(g.rows) for g in plain)])
    for line, (_, last) in enumerate(reached.values()):
        step = last
        for number in reversed(range(len(plain))):
            step, outcome = steps[step]
            bits[line, starts[number] : starts[number + 1]] = plain[number].bits[outcome]
    regions = len(combiner.start_identity)
    folded = Group(
        rows,
        np.zeros((len(reached), regions), dtype=np.uint64),
        np.array(list(reached), dtype=np.uint64),
        bits,
        states,
        complete=True,
    )
    return [folded, *others]


def _all_choices(groups: list[Group], rng: np.random.Generator) -> I64:
    """Every combination of the complete groups' outcomes; of the others a random one each."""
    sizes = [len(g.matches) if g.complete else 1 for g in groups]
    grids = np.meshgrid(*[np.arange(s) for s in sizes], indexing="ij")
    if not grids:
        return np.zeros((1, 0), np.int64)
    choices = np.stack([g.ravel() for g in grids], axis=1)
    rest = [i for i, g in enumerate(groups) if not g.complete]
    if rest:
        most = max(len(groups[i].matches) for i in rest)
        choices = np.repeat(choices, max(1, min(16, most, PRODUCT_LIMIT // len(choices))), axis=0)
        for column in rest:
            choices[:, column] = rng.integers(0, len(groups[column].matches), len(choices))
    return choices


def _some_choices(sizes: list[int], samples: int, rng: np.random.Generator) -> I64:
    """Random combinations, and every outcome of each group at least once."""
    count = max(samples, *sizes)
    columns = []
    for size in sizes:
        column = rng.integers(0, size, count)
        column[: min(size, count)] = rng.permutation(size)[:count]
        columns.append(column)
    return np.stack(columns, axis=1)


def _batch(
    combiner: Combiner,
    opening: Opening,
    groups: list[Group],
    choices: I64,
    *,
    exhaustive: bool,
) -> Batch:
    stage = combiner.stage
    size = len(choices)
    identity = np.repeat(combiner.start_identity[None, :], size, axis=0)
    matches = np.full(size, combiner.start_matches, dtype=np.uint64)
    first = np.full(size, stage.first_sequence, dtype=np.int64)
    arrived = stage.cycle.arrived[stage.rows]
    for column, group in enumerate(groups):
        choice = choices[:, column]
        identity ^= group.identity[choice]
        matches &= group.matches[choice]
        latest = np.where(group.bits, arrived[group.rows], -1).max(axis=1, initial=-1)
        first = np.maximum(first, latest[choice])
    ops = stage.cycle.op[stage.rows]

    def locate(place: int) -> CrashState:
        mine = np.zeros(len(ops), dtype=bool)
        for column, group in enumerate(groups):
            mine[group.rows] = group.bits[choices[place, column]]
        return opening.state(int(ops[mine].max(initial=0)), ops[~mine])

    return Batch(
        combiner.keys(identity, matches),
        np.zeros(0, dtype=np.uint64),
        first,
        stage.last_sequence,
        lambda places: combiner.facts(identity[places], matches[places]),
        locate,
        opening.model,
        stage.cycle.number,
        exhaustive,
    )
