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
    distinct,
    merge_spans,
)
from framework.explore.index import U64, Base, CycleIndex, Index
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

MAX_CLASSES: Final = 50_000
"""Most classes kept as such; what is beyond is counted (`Counts.unkept`), and judged by nobody."""


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
        max_classes: most classes to keep as such; further ones are counted (`Counts.unkept`).
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
        search.run(index.cycle(cycle), chosen)
    return search.result(indexed - started, lambda: time.perf_counter() - indexed)


def largest_unit(models: Sequence[CacheModel]) -> int:
    """The largest unit that one of these models destroys at once, in bytes."""
    units = [SECTOR]
    for model in models:
        if isinstance(model, TornSector):
            units.append(model.granularity)
        elif isinstance(model, Emmc):
            units.append(model.erase_unit)
    return max(units)


Ordered = PrefixCache | TornSector | Emmc
"""Models that are explored by stretches of stages (see `ordered`)."""


class _Row:
    """A row of the coverage table while its states come in."""

    def __init__(self, model: CacheModel, stage: Stage, found: subsets.Found) -> None:
        self.model = model
        self.cycle = stage.cycle.number
        self.moments = (stage.first, stage.last)
        self.open = len(stage.rows)
        self.insertions = len(stage.insertions)
        self.how, self.note, self.space = found.how, found.note, found.space
        self.points = self.sampled = self.classes = 0
        self.totals: list[U64] = []
        self.states = 0

    def seal(self) -> None:
        """No more states come: count the distinct ones."""
        self.states = len(distinct(np.concatenate(self.totals))) if self.totals else 0
        self.totals.clear()

    def coverage(self) -> Coverage:
        """The row."""
        note, how = self.note, self.how
        if self.sampled and isinstance(self.model, TornSector):
            note = f"{self.sampled} scattered tears are a sample"
        elif self.sampled and how == "exhaustive":
            how, note = "sampled", f"{self.sampled} of {self.points} states are a sample"
        if isinstance(self.model, ReorderedCache) and self.open > windows.MOMENTS:
            how, note = "sampled", f"{windows.MOMENTS} moments"
        if self.insertions > ordered.MAX_INSERTIONS:
            note = f"overtaken orders of the first {ordered.MAX_INSERTIONS} moments only"
        return Coverage(
            self.model.name,
            self.cycle,
            *self.moments,
            how,
            self.open,
            self.points,
            self.states if self.space is None else self.space,
            self.classes,
            note,
        )


class _Stretch:
    """Neighbouring stages that one chain serves (`ordered.together`), while they are gathered."""

    def __init__(self) -> None:
        self.members: list[tuple[Stage, int]] = []
        self.base: Base | None = None
        self.sectors = 0

    def takes(self, stage: Stage) -> bool:
        """Whether a stage is the next of it."""
        if not self.members:
            return True
        last = self.members[-1][0]
        return (
            last.durable <= stage.durable <= last.durable + len(last.rows)
            and self.sectors < ordered.STRETCH_SECTORS
        )

    def take(self, stage: Stage, durable_last: int) -> None:
        """Take it in."""
        if self.base is None:
            self.base = stage.base.copy()  # the stage's own moves on
        before = self.members[-1][0] if self.members else None
        begin = stage.durable if before is None else before.durable + len(before.rows)
        events = stage.cycle.first_event
        self.sectors += int(events[stage.durable + len(stage.rows)] - events[begin])
        self.members.append((stage, durable_last))


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
        self.rows: dict[CacheModel, list[_Row]] = {}
        self.product_states = 0
        self._tears: dict[CacheModel, ordered.Tears] = {}
        self._rng: dict[CacheModel, np.random.Generator] = {}

    def run(self, cycle: CycleIndex, models: Sequence[CacheModel]) -> None:
        """Explore one power cycle under models; those that agree on what is durable together."""
        if cycle.number and cycle.last < cycle.first:
            return  # nothing happened in it, and its power-on state is the cut's
        alike: dict[int | None, list[CacheModel]] = {}
        for model in models:
            lies: int | None = 0
            if isinstance(model, WriteThrough | LooseDiscard):
                lies = None
            elif isinstance(model, LyingFlush):
                lies = model.flushes
            alike.setdefault(lies, []).append(model)
            self._rng[model] = np.random.default_rng([self.seed, cycle.number])
        for believed, group in alike.items():
            self._stages(cycle, believed, group)

    def _stages(self, cycle: CycleIndex, lies: int | None, models: Sequence[CacheModel]) -> None:
        in_order = [m for m in models if isinstance(m, Ordered)]
        stretch = _Stretch()
        for stage in stages(cycle, lies=lies):
            open_rows = np.zeros(len(cycle.op), dtype=bool)
            open_rows[stage.rows] = True
            durable = ~open_rows & (cycle.op <= stage.last)
            durable_last = max(int(cycle.op[durable].max(initial=0)), cycle.first - 1)
            for model in models:
                if model not in in_order:
                    self._stage(stage, model, durable_last)
            if not in_order:
                continue
            if stage.durable >= 0:
                if not stretch.takes(stage):
                    self._ordered(stretch, in_order)
                    stretch = _Stretch()
                stretch.take(stage, durable_last)
                continue
            self._ordered(stretch, in_order)
            stretch = _Stretch()
            for model in in_order:
                row = self._row(stage, model, subsets.Found((), "exhaustive"))
                for course in ordered.courses(stage, durable_last):
                    self._collect(self._of_course(course, model), [row])
                row.seal()
        self._ordered(stretch, in_order)

    def _ordered(self, stretch: _Stretch, models: Sequence[Ordered]) -> None:
        """A stretch of stages under the models that keep the order."""
        if stretch.base is None:
            return
        course = ordered.together(stretch.base, stretch.members)
        for model in models:
            stage = stretch.members[0][0]
            self._tell(model, stage.first, stretch.members[-1][0].last)
            found = subsets.Found((), "exhaustive")
            rows = [self._row(stage, model, found) for stage, _ in stretch.members]
            self._collect(self._of_course(course, model), rows)
            for row in rows:
                row.seal()

    def _of_course(self, course: ordered.Course, model: Ordered) -> Iterator[Batch]:
        if isinstance(model, PrefixCache):
            return iter([ordered.prefixes(course, model.name)])
        if model not in self._tears:
            self._tears[model] = ordered.Tears(self.index, model, self.seed)
        return ordered.tears(course, self._tears[model], self._rng[model])

    def _stage(self, stage: Stage, model: CacheModel, durable_last: int) -> None:
        """One stage under a model that is explored stage by stage."""
        self._tell(model, stage.first, stage.last)
        found = self._found(stage, model, durable_last)
        row = self._row(stage, model, found)
        self._collect(iter(found.batches), [row])
        row.seal()

    def _found(self, stage: Stage, model: CacheModel, durable_last: int) -> subsets.Found:
        rng = self._rng[model]
        if isinstance(model, VolatileCache | LyingFlush):
            return subsets.explore_stage(stage, durable_last, model.name, self.limits, rng)
        if isinstance(model, WriteThrough):
            return subsets.Found(ordered.kept(stage, durable_last, model.name), "exhaustive")
        if isinstance(model, ReorderedCache):
            return subsets.Found(windows.reordered(stage, durable_last, model), "exhaustive")
        if isinstance(model, SdCard):
            batches = windows.card(stage, durable_last, model, self.limits, rng)
            return subsets.Found(batches, "exhaustive")
        if isinstance(model, LooseDiscard):
            batches = discards.discards(stage, durable_last, model, self.seed, rng)
            return subsets.Found(batches, "exhaustive")
        raise DiskError(f"cache model {model.name} can't be explored")

    def _row(self, stage: Stage, model: CacheModel, found: subsets.Found) -> _Row:
        row = _Row(model, stage, found)
        self.rows.setdefault(model, []).append(row)
        if found.space is not None:
            self.product_states += found.space
        return row

    def _collect(self, batches: Iterator[Batch], rows: Sequence[_Row]) -> None:
        """Collect batches into rows of the coverage table, a row a leg."""
        for batch in batches:
            fresh = self.collector.add(batch, len(rows))
            legs = np.zeros(len(batch.key), np.int64) if batch.leg is None else batch.leg
            bounds = np.searchsorted(legs, np.arange(len(rows) + 1)).tolist()
            for number, row in enumerate(rows):
                low, high = bounds[number], bounds[number + 1]
                row.points += high - low
                row.sampled += 0 if batch.exhaustive else high - low
                row.classes += int(fresh[number])
                if len(batch.total) and low < high:
                    row.totals.append(batch.total[low:high])

    def _tell(self, model: CacheModel, first: int, last: int) -> None:
        if self.progress is not None:
            self.progress(
                f"{model.name}, operations {first} to {last}",
                self.collector.points,
                len(self.collector.classes),
            )

    # ---------------------------------------------------------------- the result

    def result(self, index_seconds: float, clock: Callable[[], float]) -> Exploration:
        """Everything as values; `clock`: how long the enumeration has taken so far."""
        states, per_class = self.collector.counts()
        arrivals = np.sort(self.index.journal.operations.arrived)
        operation_at = cycle_operation_at(arrivals)
        describe = _Describe(self.index)
        classes = []
        for (key, known), count in zip(
            self.collector.classes.items(), per_class.tolist(), strict=True
        ):
            spans = merge_spans(known.spans, operation_at)
            state = spans[-1].latest
            classes.append(
                CrashClass(
                    f"{key:016x}",
                    describe.facts(known, state),
                    count,
                    state,
                    tuple(known.samples),
                    known.exhaustive,
                    spans,
                    tuple(sorted(known.models)),
                )
            )
        classes.sort(key=lambda c: (c.first_operation, c.last_operation, c.key))
        operations, sectors = self.index.outside()
        rows = [row.coverage() for of_model in self.rows.values() for row in of_model]
        return Exploration(
            tuple(classes),
            tuple(rows),
            Counts(
                self.collector.points,
                states,
                self.product_states,
                len(classes) + self.collector.unkept,
                index_seconds,
                clock(),
                self.collector.unkept,
            ),
            Outside(operations, sectors),
        )


class _Describe:
    """Describes classes; each distinct content of a region once."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._slots = {slot.region: slot for slot in index.slots}
        self._known: dict[tuple[int, int, int], RegionFact] = {}

    def facts(self, known: Known, state: CrashState) -> tuple[RegionFact, ...]:
        """What is said of every region; `state`: a state of the class."""
        found = []
        for number, (image, identity) in enumerate(known.facts):
            key = (number, image, identity)
            fact = self._known.get(key)
            if fact is None:
                fact = self._known[key] = self._fact(number, image, identity, state)
            found.append(fact)
        return tuple(found)

    def _fact(self, number: int, image: int, identity: int, state: CrashState) -> RegionFact:
        region = self.index.regions[number]
        name = None
        loads = True
        if region.role is Role.SLOT:
            names = self._slots[number].names
            name = names[image] if image < len(names) else None
            loads = self._loadable(number, state)
        return RegionFact(
            region.name, region.role, name, f"{identity:016x}", loads, self._damaged(number, state)
        )

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
