"""Depth two: cut again during the recovery from a cut.

A crash state is booted (`ColdBootJudge`), and what the recovery writes is recorded in a journal
that begins with that state. All cuts of that journal are crash states of depth two: they are
classed and judged as those of the first depth, by the static oracle and the data judge, and owe
what was owed at the first cut plus what the recovery itself promised. A recovery that wrote
nothing has no cuts of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import zstandard
from attrs import evolve, frozen

from framework.disk import JournalReader
from framework.explore.ears import Ears
from framework.explore.judges.boots import Booted, ColdBootJudge
from framework.explore.judges.context import Context
from framework.explore.judges.data import DataJudge
from framework.explore.judges.static import StaticOracle
from framework.explore.plain import explore_plainly
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import CrashClass, CrashState, Exploration
from framework.explore.timeline import SOURCE, Restarted, Step, Timeline, read_timeline, to_mark


@frozen
class DeepViolation:
    """A broken invariant at depth two.

    Attributes:
        invariant, evidence: which, and what decided.
        phase: what was owed at the first cut.
        first, second: both crash states.
        recovery: the recovery's journal, compressed.
        promised: the newest promise at the second cut, in words.
    """

    invariant: int
    evidence: str
    phase: int
    first: CrashState
    second: CrashState
    recovery: bytes
    promised: str


@frozen
class DeepResult:
    """What became of one class at depth two.

    Attributes:
        crash_class: the class at depth one.
        booted: its recovery.
        exploration: of the recovery's journal.
        violations: what broke, over all phases of the class.
    """

    crash_class: CrashClass
    booted: Booted
    exploration: Exploration
    violations: tuple[DeepViolation, ...]


def cut_again(
    judge: ColdBootJudge,
    ears: Ears,
    crash_class: CrashClass,
    phases: Sequence[int],
    place: Workplace,
) -> DeepResult:
    """Boot a class's representative, and judge every cut of what that writes.

    Raises InfrastructureError if QEMU fails, DiskError if e2fsck does.
    """
    context = judge.context
    first = crash_class.representative
    trial = judge.oracle.on_trial(crash_class)
    ears = evolve(ears, artifact=trial or context.initial)
    with (
        first.disks(context.journal) as disks,
        StateMachine(judge.machine, disks, place) as running,
    ):

        def heard(match: re.Match[str]) -> bool:
            event = ears.event_of(match)
            if event is not None:
                running.recorder.mark(SOURCE, to_mark(event))
            return match.re is ears.boot.ready

        def reset() -> None:
            running.recorder.mark(SOURCE, to_mark(Restarted()))

        heard_all = judge.start(running, ears.patterns, heard, reset)
        booted = judge.read(crash_class, first, heard_all)
        journal = running.journal()
        exploration = explore_plainly(journal, context.layout)
        return DeepResult(
            crash_class,
            booted,
            exploration,
            tuple(_judge(context, journal, exploration, first, phases)),
        )


def _judge(
    context: Context,
    journal: JournalReader,
    exploration: Exploration,
    first: CrashState,
    phases: Sequence[int],
) -> Iterator[DeepViolation]:
    """Every class of the recovery, in every phase of both journals."""
    recovery = read_timeline(journal.marks)
    inner = evolve(context, journal=journal)
    data = DataJudge(inner)
    for deeper in exploration.classes:
        data.check(deeper)
    packed = b""
    for phase in phases:
        timeline = _owed(context.timeline, phase, recovery)
        then = evolve(inner, timeline=timeline)
        oracle, then_data = StaticOracle(then), DataJudge(then, data.checked)
        for deeper in exploration.classes:
            told: set[int] = set()
            for span in deeper.spans:
                for later in timeline.phases_within(span.first_sequence, span.last_sequence):
                    checked = then_data.seen(deeper, later)
                    verdict = oracle.judge(deeper, later, *(() if checked is None else (checked,)))
                    for finding in verdict.findings:
                        if finding.held is not False or finding.invariant in told:
                            continue
                        told.add(finding.invariant)
                        packed = packed or _packed(journal)
                        yield DeepViolation(
                            finding.invariant,
                            finding.evidence,
                            phase,
                            first,
                            span.latest,
                            packed,
                            timeline.describe(later),
                        )


def _owed(before: Timeline, phase: int, recovery: Timeline) -> Timeline:
    """What was owed at the first cut, then a restart, then what the recovery promised."""
    steps = [Step(-1, 0, step.event) for step in before.steps[:phase]]
    return Timeline((*steps, Step(-1, 0, Restarted()), *recovery.steps))


def _packed(journal: JournalReader) -> bytes:
    return zstandard.ZstdCompressor(level=9).compress(journal.path.read_bytes())
