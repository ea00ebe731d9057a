"""Finds every crash state of a recording under a cache model, and groups them into classes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

from framework.disk import (
    SECTOR,
    CacheModel,
    DiskError,
    Emmc,
    JournalReader,
    LooseDiscard,
    LyingFlush,
    PrefixCache,
    ReorderedCache,
    SdCard,
    TornSector,
    VolatileCache,
    WriteThrough,
)
from framework.explore import discards, ordered, subsets, windows
from framework.explore.collect import (
    Batch,
    Collector,
    Known,
    cycle_operation_at,
    merge_spans,
)
from framework.explore.index import CycleIndex, Index
from framework.explore.layout import Layout, Role
from framework.explore.stages import Stage, stages
from framework.explore.states import (
    Counts,
    Coverage,
    CrashClass,
    CrashState,
    Exploration,
    Outside,
    RegionFact,
)

Progress = Callable[[str, int, int], None]
"""Called now and then with what is being done (a model and an epoch, for people), the states
visited so far and the classes found so far. May raise (KeyboardInterrupt): nothing is left open."""

MAX_CLASSES: Final = 20_000
"""Most classes kept as such; what is beyond is counted, and the coverage says so."""


def explore(
    journal: JournalReader,
    layout: Layout,
    models: CacheModel | Sequence[CacheModel],
    *,
    exhaustive_up_to: int = 12,
    samples: int = 1000,
    seed: int = 0,
    max_classes: int = MAX_CLASSES,
    progress: Progress | None = None,
) -> Exploration:
    """Explore a recording under one model or several (one index, classes merged over models).

    Args:
        journal: the recording; every power cycle in it is explored.
        layout: what a boot can depend on. Its devices must be the recording's.
        models: cache models; what space each one has is said in `ordered` and `subsets`.
        exhaustive_up_to: every subset of an epoch with at most so many writes at stake. Beyond,
            reachable classes are still found exhaustively where the regions' contents allow it
            (row `classes`), else `samples` random subsets are drawn.
        samples: how many states to draw of an epoch that is too large, and of every class at most
            two are kept as control samples.
        seed: of the samples and of the garbage in torn sectors.
        max_classes: most classes to keep as such; further ones are counted in a coverage row.
        progress: see `Progress`.

    Raises:
        LayoutMistakeError: a region lies on a device that the recording doesn't have, or beyond it.
        JournalError, BaseImageError: the recording's files can't be read.
    """
    chosen = (models,) if isinstance(models, CacheModel) else tuple(models)
    started = time.perf_counter()
    index = Index(journal, layout, unit=largest_unit(chosen))
    indexed = time.perf_counter()
    limits = subsets.Limits(exhaustive_up_to, samples)
    search = _Search(index, limits, seed=seed, max_classes=max_classes, progress=progress)
    for cycle in range(index.cycles):
        for model in chosen:
            search.run(index.cycle(cycle), model)
    return search.result(indexed - started, time.perf_counter() - indexed)


def largest_unit(models: Sequence[CacheModel]) -> int:
    """The largest unit that one of these models destroys at once, in bytes."""
    units = [SECTOR]
    for model in models:
        if isinstance(model, TornSector):
            units.append(model.granularity)
        elif isinstance(model, Emmc):
            units.append(model.erase_unit)
    return max(units)


class _Search:
    """One exploration while it runs."""

    def __init__(
        self,
        index: Index,
        limits: subsets.Limits,
        *,
        seed: int,
        max_classes: int,
        progress: Progress | None,
    ) -> None:
        self.index = index
        self.limits = limits
        self.seed = seed
        self.progress = progress
        self.collector = Collector(seed, max_classes)
        self.coverage: list[Coverage] = []
        self.product_states = 0
        self._tears: dict[CacheModel, ordered.Tears] = {}

    def run(self, cycle: CycleIndex, model: CacheModel) -> None:
        """Explore one power cycle under one model."""
        if cycle.number and cycle.last < cycle.first:
            return  # nothing happened in it, and its power-on state is the cut's
        lies: int | None = 0
        if isinstance(model, WriteThrough | LooseDiscard):
            lies = None
        elif isinstance(model, LyingFlush):
            lies = model.flushes
        rng = np.random.default_rng([self.seed, cycle.number])
        for stage in stages(cycle, lies=lies):
            if self.progress is not None:
                self.progress(
                    f"{model.name}, operations {stage.first} to {stage.last}",
                    self.collector.points,
                    len(self.collector.classes),
                )
            open_rows = np.zeros(len(cycle.op), dtype=bool)
            open_rows[stage.rows] = True
            durable = ~open_rows & (cycle.op <= stage.last)
            durable_last = max(int(cycle.op[durable].max(initial=0)), cycle.first - 1)
            self._stage(stage, model, durable_last, rng)

    def _stage(
        self, stage: Stage, model: CacheModel, durable_last: int, rng: np.random.Generator
    ) -> None:
        if isinstance(model, VolatileCache | LyingFlush):
            found = subsets.explore_stage(stage, durable_last, model.name, self.limits, rng)
            self._row(stage, model, found)
            return
        batches = self._ordered(stage, model, durable_last, rng)
        self._row(stage, model, subsets.Found(batches, "exhaustive"))

    def _ordered(
        self, stage: Stage, model: CacheModel, durable_last: int, rng: np.random.Generator
    ) -> Iterator[Batch]:
        if isinstance(model, WriteThrough):
            return ordered.kept(stage, durable_last, model.name)
        if isinstance(model, PrefixCache):
            return ordered.prefixes(stage, durable_last, model.name)
        if isinstance(model, TornSector | Emmc):
            if model not in self._tears:
                self._tears[model] = ordered.Tears(self.index, model, self.seed)
            return ordered.tears(stage, durable_last, self._tears[model], rng)
        if isinstance(model, ReorderedCache):
            return windows.reordered(stage, durable_last, model)
        if isinstance(model, SdCard):
            return windows.card(stage, durable_last, model, self.limits, rng)
        if isinstance(model, LooseDiscard):
            return discards.discards(stage, durable_last, model, self.seed, rng)
        raise DiskError(f"cache model {model.name} can't be explored")

    def _row(self, stage: Stage, model: CacheModel, found: subsets.Found) -> None:
        """Collect a stage's batches into its row of the coverage table."""
        points = states = sampled = 0
        before = len(self.collector.classes) + self.collector.unkept
        for batch in found.batches:
            here, _ = self.collector.add(batch)
            states += here
            points += len(batch.key)
            sampled += 0 if batch.exhaustive else len(batch.key)
        note, how = found.note, found.how
        if sampled and isinstance(model, TornSector):
            note = f"{sampled} scattered tears are a sample"
        elif sampled and how == "exhaustive":
            how, note = "sampled", f"{sampled} of {points} states are a sample"
        if isinstance(model, ReorderedCache) and len(stage.rows) > windows.MOMENTS:
            how, note = "sampled", f"{windows.MOMENTS} moments"
        if len(stage.insertions) > ordered.MAX_INSERTIONS:
            note = f"overtaken orders of the first {ordered.MAX_INSERTIONS} moments only"
        if found.space is not None:
            self.product_states += found.space
        self.coverage.append(
            Coverage(
                model.name,
                stage.cycle.number,
                stage.first,
                stage.last,
                how,
                len(stage.rows),
                points,
                states if found.space is None else found.space,
                len(self.collector.classes) + self.collector.unkept - before,
                note,
            )
        )

    # ---------------------------------------------------------------- the result

    def result(self, index_seconds: float, seconds: float) -> Exploration:
        """Everything as values."""
        states, per_class = self.collector.counts()
        arrivals = np.sort(self.index.journal.operations.arrived)
        operation_at = cycle_operation_at(arrivals)
        loadable: dict[tuple[int, int], bool] = {}
        classes = []
        for key, known in self.collector.classes.items():
            spans = merge_spans(known.spans, operation_at)
            state = spans[-1].latest
            classes.append(
                CrashClass(
                    f"{key:016x}",
                    self._facts(known, state, loadable),
                    per_class.get(key, 0),
                    state,
                    tuple(known.samples),
                    known.exhaustive,
                    spans,
                    tuple(sorted(known.models)),
                )
            )
        classes.sort(key=lambda c: (c.first_operation, c.last_operation, c.key))
        operations, sectors = self.index.outside()
        return Exploration(
            tuple(classes),
            tuple(self.coverage),
            Counts(
                self.collector.points,
                states,
                self.product_states,
                len(classes) + self.collector.unkept,
                index_seconds,
                seconds,
            ),
            Outside(operations, sectors),
        )

    def _facts(
        self, known: Known, state: CrashState, loadable: dict[tuple[int, int], bool]
    ) -> tuple[RegionFact, ...]:
        found = []
        for number, region in enumerate(self.index.regions):
            image, identity = known.facts[number]
            name = None
            loads = True
            if region.role is Role.SLOT:
                slot = next(s for s in self.index.slots if s.region == number)
                name = slot.names[image] if image < len(slot.names) else None
                if (number, identity) not in loadable:
                    loadable[number, identity] = self._loadable(number, state)
                loads = loadable[number, identity]
            found.append(
                RegionFact(
                    region.name,
                    region.role,
                    name,
                    f"{identity:016x}",
                    loads,
                    self._damaged(number, state),
                )
            )
        return tuple(found)

    def _loadable(self, number: int, state: CrashState) -> bool:
        region = self.index.regions[number]
        if region.magic is None:
            return True
        part = region.ranges[0]
        with state.disks(self.index.journal) as disks:
            try:
                offset, magic = region.magic
                return disks[part.device].read(part.offset + offset, len(magic)) == magic
            except DiskError:
                return False

    def _damaged(self, number: int, state: CrashState) -> bool:
        decision = state.decision
        if not decision.garbage and not decision.unreadable:
            return False
        region = self.index.regions[number]
        devices = self.index.journal.devices
        harmed = [(devices[g.device], g.offset, g.offset + g.length) for g in decision.garbage]
        harmed += [(devices[u.device], u.offset, u.offset + u.length) for u in decision.unreadable]
        for part in region.ranges:
            looked_at = [(part.offset, part.end)]
            if region.role is Role.SLOT:
                looked_at = [(part.offset + a, part.offset + a + n) for a, n in region.probes]
            for device, start, end in harmed:
                if device == part.device and any(a < end and start < b for a, b in looked_at):
                    return True
        return False
