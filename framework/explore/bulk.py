"""The static oracle for thousands of classes: it asks each distinct question once.

What the oracle says depends on what had been promised (the phase), on what a bootloader makes of
the environment, and on what stands in the slots: of these there are few, however many classes there
are. So a verdict is made once for each; and to learn what a bootloader makes of a distinct
environment, only the sectors of its regions are looked up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from attrs import evolve

from framework.disk.glimpse import Glimpses
from framework.explore.judges.context import Context
from framework.explore.judges.static import StaticOracle
from framework.explore.layout import EnvironmentReading, Role
from framework.explore.states import CrashClass, Disks, Span
from framework.explore.timeline import Timeline
from framework.verdict import BootEnvironment, Event, SlotState, Verdict

Question = tuple[BootEnvironment, tuple[SlotState, ...]]


class BulkOracle(StaticOracle):
    """As `StaticOracle`, with the same verdicts."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._glimpses = Glimpses(context.journal, context.layout.hulls(Role.ENVIRONMENT))
        regions = context.layout.all_regions()
        self._environment_at = [i for i, r in enumerate(regions) if r.role is Role.ENVIRONMENT]
        self._slots_at = [i for i, r in enumerate(regions) if r.role is Role.SLOT]
        self._readings: dict[tuple[str, ...], EnvironmentReading] = {}
        self._questions: dict[tuple[object, ...], int] = {}
        self._numbers: dict[Question, int] = {}
        self._verdicts: dict[tuple[int, int, tuple[Event, ...]], Verdict] = {}

    def owing(self, timeline: Timeline) -> BulkOracle:
        """The same for other promises; what stands on the disks is not asked again."""
        other = copy.copy(self)
        other.context = evolve(self.context, timeline=timeline)
        other._verdicts = {}
        return other

    def reading(self, crash_class: CrashClass) -> EnvironmentReading:
        """The variables and copies that a class's bootloader finds."""
        key = tuple(f.content for f in crash_class.facts if f.role is Role.ENVIRONMENT)
        found = self._readings.get(key)
        if found is None:
            state = crash_class.representative
            with Disks(self._glimpses.disks(state.decision, state.operation)) as disks:
                found = self.context.layout.environment(disks)
            self._readings[key] = found
        return found

    def environment(self, crash_class: CrashClass) -> BootEnvironment:
        """The boot environment of a class, as its bootloader reads it."""
        return self.context.layout.vocabulary.reduce(self.reading(crash_class))

    def judge(self, crash_class: CrashClass, phase: int, *further: Event) -> Verdict:
        """The verdict on a class in a phase; `further` is what a dearer judge saw."""
        key = (self._question(crash_class), phase, further)
        found = self._verdicts.get(key)
        if found is None:
            found = self._verdicts[key] = super().judge(crash_class, phase, *further)
        return found

    def _question(self, crash_class: CrashClass) -> int:
        """The number of what the verdict depends on besides the phase."""
        told = crash_class.facts
        facts = (
            *[told[at].content for at in self._environment_at],
            *[(told[at].image, told[at].loadable) for at in self._slots_at],
        )
        number = self._questions.get(facts)
        if number is None:
            question = (self.environment(crash_class), tuple(self.slots(crash_class).values()))
            number = self._numbers.setdefault(question, len(self._numbers))
            self._questions[facts] = number
        return number


def phases_of(crash_class: CrashClass, timeline: Timeline) -> Iterator[tuple[Span, int]]:
    """The phases in which power can fail so that the class results, each once."""
    told: set[int] = set()
    for span in crash_class.spans:
        for phase in timeline.phases_within(span.first_sequence, span.last_sequence):
            if phase not in told:
                told.add(phase)
                yield span, phase


def judge_all(oracle: StaticOracle, classes: Sequence[CrashClass]) -> int:
    """Judge classes in all their phases; how many of them broke an invariant somewhere."""
    timeline = oracle.context.timeline
    broken = 0
    for crash_class in classes:
        verdicts = [oracle.judge(crash_class, p) for _, p in phases_of(crash_class, timeline)]
        broken += any(verdict.violated for verdict in verdicts)
    return broken
