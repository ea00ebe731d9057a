"""Enumerates a device whose discarded blocks read as they like.

Its space, exactly: at every moment all that completed, and each discard independently did nothing,
left zeros, or left garbage, wherever nothing has been written since. One choice for each discard of
the power cycle is one variant of the recording, whose moments are a chain.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np

from framework.disk import Kind, LooseDiscard
from framework.explore.collect import Batch
from framework.explore.index import I64, CycleIndex, symbol
from framework.explore.ordered import Course, moments_of
from framework.explore.stages import Stage
from framework.explore.states import CrashState

VARIANTS: Final = 243
"""Most variants that are all explored; beyond, the extremes, single ones and a sample."""
_OLD, _ZEROS, _JUNK = range(3)


def variants(count: int, rng: np.random.Generator) -> tuple[list[tuple[int, ...]], bool]:
    """The choices to explore for so many discards, and whether these are all."""
    if 3**count <= VARIANTS:
        return list(itertools.product((_ZEROS, _OLD, _JUNK), repeat=count)), True
    found = {(which,) * count for which in (_ZEROS, _OLD, _JUNK)}
    for at in range(min(count, VARIANTS // 4)):
        for which in (_OLD, _JUNK):
            found.add(tuple(which if i == at else _ZEROS for i in range(count)))
    while len(found) < VARIANTS:
        found.add(tuple(rng.integers(0, 3, count).tolist()))
    return sorted(found), False


def discards(
    stage: Stage, durable_last: int, model: LooseDiscard, seed: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Every moment of every variant. `stage` has all rows open."""
    cycle = stage.cycle
    rows = stage.rows[cycle.completed[stage.rows] >= 0]
    rows = rows[np.argsort(cycle.op[rows], kind="stable")]
    mine = rows[cycle.kind[rows] == Kind.DISCARD]
    chosen, complete = variants(len(mine), rng)
    for choice in chosen:
        outcome = np.array(choice, dtype=np.int64)
        old, junk = mine[outcome == _OLD], mine[outcome == _JUNK]
        yield _variant(stage, durable_last, model, rows, (old, junk), seed, exhaustive=complete)


def _variant(  # noqa: PLR0917 - one recording, one choice
    stage: Stage,
    durable_last: int,
    model: LooseDiscard,
    rows: I64,
    choice: tuple[I64, I64],
    seed: int,
    *,
    exhaustive: bool,
) -> Batch:
    old, junk = choice
    cycle = _with_junk(stage.cycle, junk, seed)
    left = rows[~np.isin(rows, old)]
    course = Course.of(dataclasses.replace(stage, cycle=cycle), left, 0, durable_last)
    batch = moments_of(course, model.name)
    mine = np.append(cycle.arrived[left], stage.last_sequence) > stage.first_sequence
    newest = np.concatenate(([cycle.first - 1], cycle.op[left]))[mine]
    journal = cycle.index.journal

    def locate(where: int) -> CrashState:
        operation = int(newest[where])
        if operation < cycle.first and cycle.number:
            operation = cycle.first
        _, power_cycle = journal.power_cycle_at(operation)

        def numbers(of: I64) -> list[int]:
            found: list[int] = (cycle.op[of[cycle.op[of] <= operation]] - cycle.first).tolist()
            return found

        decision = model.outcome(power_cycle, numbers(old), numbers(junk), seed)
        return CrashState(operation, decision, model.name)

    batch.locate = locate
    batch.exhaustive = exhaustive
    return batch


def _with_junk(cycle: CycleIndex, junk: I64, seed: int) -> CycleIndex:
    """The cycle as if these discards had written garbage."""
    if not len(junk):
        return cycle
    events = cycle.events_of(junk)
    other = copy.copy(cycle)
    other.mix, other.differs = cycle.mix.copy(), cycle.differs.copy()
    content = np.full(len(events), symbol(f"junk {seed}"), dtype=np.uint64)
    other.mix[events] = cycle.index.mix(cycle.sector[events], content)
    other.differs[events] = cycle.index.differs(cycle.sector[events], content)
    return other
