"""Examines a recording: explores it, judges every class, sends some to the judges that boot.

    recording -> engine (states, classes) -> static oracle: every class in every phase
                                          -> data judge: every distinct data partition
                                          -> mount judge: some of them, on a real kernel
                                          -> bootloader and cold boots: representatives and
                                             control samples, up to a bound
                                          -> depth two: what a recovery writes, cut again

What is done is bounded, and what was left out is counted and said. Progress goes to a callback;
an interrupt anywhere leaves no machine and no file behind.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, Protocol, TypeVar

from attrs import define, evolve, field, frozen

from framework.disk import CacheModel
from framework.explore.bulk import BulkOracle, phases_of
from framework.explore.deep import Deeper, DeepResult, cut_again, follow
from framework.explore.ears import Ears
from framework.explore.engine import explore
from framework.explore.judges.boots import Booted, BootloaderJudge, ColdBootJudge
from framework.explore.judges.context import Context
from framework.explore.judges.data import DataJudge
from framework.explore.judges.mount import Mounted, MountJudge
from framework.explore.judges.static import with_finding
from framework.explore.layout import Role
from framework.explore.recovery import Ends, Trace, recoveries
from framework.explore.serve import Workplace
from framework.explore.states import CrashClass, CrashState, Exploration, Span
from framework.targets.machine import Machine
from framework.verdict import DataChecked, Event, InstallEnded, Verdict
from framework.verdict.invariants import EXIT_OK, EXIT_REBOOT_NEEDED

WORKERS: Final = 2
DEPTH_TWO: Final = "depth two"
EVERY: Final = 1 << 62
"""As a bound: none."""

DATA_LIVES: Final = 5
"""The invariant of the data partition, of which there is one copy."""

T = TypeVar("T")
R = TypeVar("R")


@frozen
class Violation:
    """One broken invariant in one class and phase.

    Attributes:
        invariant: its number.
        evidence: what decided.
        judge: who found it.
        crash_class, phase: where.
        state: a crash state that shows it.
        span: when power has to fail.
        depth: 1, or 2 for a cut during the recovery from a cut.
        promised: the newest promise of the phase, in words.
        at_rest: of invariant 5, whether the medium alone broke it: it destroyed data at rest, and
            without that the data partition holds (`framework.explore.rest`).
    """

    invariant: int
    evidence: str
    judge: str
    crash_class: CrashClass
    phase: int
    state: CrashState
    span: Span
    promised: str
    depth: int = 1
    at_rest: bool = False


@frozen
class JudgeCount:
    """What one judge did.

    Attributes:
        judge: its name.
        looked_at: how many of what it looks at.
        of: how many there were.
        unit: what it looks at, for people.
        controls: control samples among them.
        violations, disagreements: what it found.
        seconds: wall time.
    """

    judge: str
    looked_at: int
    of: int
    unit: str
    seconds: float
    controls: int = 0
    violations: int = 0
    disagreements: int = 0


@frozen
class DepthTwo:
    """What was covered at depth two.

    Attributes:
        classes: all there are.
        unknown: those whose data partition was not checked, so that their recovery is not known.
        keys: distinct recoveries of the others.
        booted: of these, how many were booted and cut again.
        parts_shown, parts: how many of the distinct parts that keys consist of (what the
            bootloader, the repair and the system find) were in a key that was booted.
        covered: the classes that these stand for.
        controls: second classes of one of these keys that were booted.
        retried: distinct ends of a recovery from which the update was tried again.
        left: the keys that were not booted, in words, each with its number of classes.
    """

    classes: int
    unknown: int
    keys: int
    booted: int
    parts_shown: int
    parts: int
    covered: int
    controls: int
    retried: int
    left: tuple[tuple[str, int], ...]


@define
class Examination:
    """Everything that an examination found."""

    exploration: Exploration
    violations: list[Violation] = field(factory=list)
    disagreements: list[Booted | Mounted] = field(factory=list)
    boots: list[Booted] = field(factory=list)
    counts: list[JudgeCount] = field(factory=list)
    deep: list[DeepResult] = field(factory=list)
    depth_two: DepthTwo | None = None
    verdicts: dict[tuple[str, int], Verdict] = field(factory=dict)
    """By class key and phase."""


@frozen
class Bounds:
    """How much is sent to the judges that boot.

    Attributes:
        data: most data partitions.
        mounts: most of those that a real kernel mounts.
        decisions: most bootloader decisions.
        cold_boots: most cold boots.
        controls: share of each that are control samples inside classes, 0 to 1.
        deep: most recovery keys of which a class's recovery is cut again (`EVERY`: all of them).
        deep_controls: share of these of which a second class is booted, as a control sample.
        deep_seconds: no further recovery is begun when depth two has taken so long; None: no limit.
    """

    data: int = 2000
    mounts: int = 100
    decisions: int = 200
    cold_boots: int = 20
    controls: float = 0.25
    deep: int = 0
    deep_controls: float = 0.125
    deep_seconds: float | None = None


class Progress(Protocol):
    """What a live display is told."""

    def exploring(self, what: str, states: int, classes: int) -> None:
        """The engine goes on."""

    def judging(self, judge: str, done: int, of: int) -> None:
        """A judge goes on."""


class Silence:
    """A display that shows nothing."""

    def exploring(self, what: str, states: int, classes: int) -> None:
        """Ignored."""

    def judging(self, judge: str, done: int, of: int) -> None:
        """Ignored."""


@define
class Examiner:
    """Examines one recording.

    Attributes:
        context: what is known of it.
        machine: the machine to boot on; None: nothing is booted.
        ears: what its console says.
        progress: told what is done.
        seed: of the samples.
        deeper: how to cut again.
    """

    context: Context
    machine: Machine | None
    ears: Ears
    progress: Progress = field(factory=Silence)
    seed: int = 0
    workers: int = WORKERS
    deeper: Deeper = field(factory=Deeper)

    def explore(
        self,
        models: Sequence[CacheModel],
        *,
        exhaustive_up_to: int,
        samples: int,
    ) -> Exploration:
        """Find the classes."""
        return explore(
            self.context.journal,
            self.context.layout,
            models,
            exhaustive_up_to=exhaustive_up_to,
            samples=samples,
            seed=self.seed,
            progress=self.progress.exploring,
        )

    def examine(
        self, exploration: Exploration, judges: Iterable[str], bounds: Bounds
    ) -> Examination:
        """Judge what was found, by the judges named (`static` always)."""
        wanted = set(judges)
        context, machine = self.context, self.machine
        data = DataJudge(context, views=bounds.deep > 0)
        work = _Work(self, Examination(exploration), BulkOracle(context), data)
        if "data" in wanted or bounds.deep:  # a recovery depends on what is on it
            work.check_data(bounds.data)
        work.judge_statically()
        if machine is not None and "mount" in wanted:
            work.mount(MountJudge(context, work.data, machine), bounds.mounts)
        if machine is not None and "uboot" in wanted:
            decider = BootloaderJudge(context, work.oracle, machine, self.ears.boot)
            work.boot(decider, _by_decision(exploration.classes), bounds.decisions, bounds.controls)
        if machine is not None and "coldboot" in wanted:
            booter = ColdBootJudge(context, work.oracle, machine, self.ears.boot)
            groups = [[c] for c in work.spread(exploration.classes)]
            work.boot(booter, groups, bounds.cold_boots, bounds.controls)
        if machine is not None and bounds.deep:
            booter = ColdBootJudge(context, work.oracle, machine, self.ears.boot)
            work.cut_again(booter, bounds)
        return work.found


@define
class _Work:
    """One examination under way."""

    examiner: Examiner
    found: Examination
    oracle: BulkOracle
    data: DataJudge

    # -- the cheap judges --------------------------------------------------------------------

    def check_data(self, limit: int) -> None:
        """Every distinct data partition; of too many, whole and damaged ones in turn."""
        began = time.monotonic()
        judge = self.data
        distinct = {judge.key(c): c for c in self.found.exploration.classes}
        chosen = list(distinct.values())
        if len(chosen) > limit:
            random.Random(self.examiner.seed).shuffle(chosen)  # noqa: S311 - no secret
            damaged = [c for c in chosen if _damaged_data(c)]
            whole = [c for c in chosen if not _damaged_data(c)]
            pairs = itertools.zip_longest(whole, damaged)
            chosen = [c for pair in pairs for c in pair if c is not None][:limit]
        for done, _ in enumerate(_each(judge.check, chosen, self.examiner.workers), 1):
            self.examiner.progress.judging(judge.name, done, len(chosen))
        self.found.counts.append(
            JudgeCount(
                judge=judge.name,
                looked_at=len(judge.checked),
                of=len(distinct),
                unit="distinct data partitions",
                violations=sum(not content.clean for content in judge.checked.values()),
                seconds=time.monotonic() - began,
            )
        )

    def mount(self, judge: MountJudge, limit: int) -> None:
        """Data partitions that were checked: half of the bound for those that needed repair."""
        began = time.monotonic()
        distinct = {
            key: c
            for c in self.found.exploration.classes
            if (key := self.data.key(c)) in self.data.checked
        }
        chosen = list(distinct.items())
        random.Random(self.examiner.seed).shuffle(chosen)  # noqa: S311 - no secret
        plain = [c for key, c in chosen if self.data.checked[key].plain]
        others = [c for key, c in chosen if not self.data.checked[key].plain]
        jobs = others[: max(limit // 2, limit - len(plain))]
        jobs += plain[: limit - len(jobs)]
        differing = 0
        with Workplace() as place:
            results = _each(
                lambda c: judge.check(c, (*c.samples, c.representative)[0], place),
                jobs,
                self.examiner.workers,
                place.stop,
            )
            for done, mounted in enumerate(results, 1):
                if mounted.disagreement:
                    differing += 1
                    self.found.disagreements.append(mounted)
                self.examiner.progress.judging(judge.name, done, len(jobs))
        self.found.counts.append(
            JudgeCount(
                judge=judge.name,
                looked_at=len(jobs),
                of=len(distinct),
                unit="data partitions, on a real kernel",
                disagreements=differing,
                seconds=time.monotonic() - began,
            )
        )

    def judge_statically(self) -> None:
        """Every class in every phase."""
        began = time.monotonic()
        classes = self.found.exploration.classes
        for done, crash_class in enumerate(classes):
            for when in self._phases(crash_class):
                self._judge(self.oracle.name, crash_class, None, when)
            if done % 64 == 0:
                self.examiner.progress.judging(self.oracle.name, done, len(classes))
        self.examiner.progress.judging(self.oracle.name, len(classes), len(classes))
        self.found.counts.append(
            JudgeCount(
                judge=self.oracle.name,
                looked_at=len(classes),
                of=len(classes),
                unit="classes, in every phase",
                violations=len(self.found.violations),
                seconds=time.monotonic() - began,
            )
        )

    def _phases(self, crash_class: CrashClass) -> Iterator[tuple[Span, int]]:
        return phases_of(crash_class, self.examiner.context.timeline)

    def _judge(
        self, name: str, crash_class: CrashClass, booted: Booted | None, when: tuple[Span, int]
    ) -> None:
        """One class in one phase; of a boot only what no cheaper judge said already."""
        span, phase = when
        checked = self.data.seen(crash_class, phase)
        if booted is not None and booted.data_lost:
            checked = DataChecked(False, False, "the device could not mount its data partition")
        further: list[Event] = [] if checked is None else [checked]
        if booted is not None and booted.seen is not None:
            further.append(booted.seen)
        verdict = self.oracle.judge(crash_class, phase, *further)
        if booted is not None and (broken := self._promise_broken(booted, phase)):
            verdict = with_finding(verdict, 7, broken)
        known = self.found.verdicts.get((crash_class.key, phase))
        told = () if known is None else known.violated
        timeline = self.examiner.context.timeline
        if booted is not None:
            state = booted.state
        elif phase == timeline.phase_at(span.last_sequence - 1):
            state = span.latest
        else:
            state = span.earliest
        fresh = [
            Violation(
                invariant=f.invariant,
                evidence=f.evidence,
                judge=name,
                crash_class=crash_class,
                phase=phase,
                state=state,
                span=span,
                promised=timeline.describe(phase),
                at_rest=f.invariant == DATA_LIVES and self.data.holds_spared(state, phase),
            )
            for f in verdict.findings
            if f.held is False and f.invariant not in told
        ]
        self.found.violations.extend(fresh)
        if known is None or fresh:
            self.found.verdicts[crash_class.key, phase] = verdict

    def spread(self, classes: Sequence[CrashClass]) -> list[CrashClass]:
        """All classes, so ordered that a beginning of the list tells the most.

        First one class for every bootloader decision in every phase, then the others at random.
        """
        first: list[CrashClass] = []
        rest: list[CrashClass] = []
        told: set[tuple[object, ...]] = set()
        for crash_class in classes:
            decision = _decision_key(crash_class)
            pairs = {(decision, phase) for _, phase in self._phases(crash_class)}
            (rest if pairs <= told else first).append(crash_class)
            told |= pairs
        random.Random(self.examiner.seed).shuffle(rest)  # noqa: S311 - no secret
        return first + rest

    def _promise_broken(self, booted: Booted, phase: int) -> str:
        """How a start ended elsewhere than where an acknowledged installation had promised."""
        context = self.examiner.context
        ended = [e for e in context.timeline.events(phase) if isinstance(e, InstallEnded)]
        if not ended or ended[-1].exit_code not in (EXIT_OK, EXIT_REBOOT_NEEDED):
            return ""
        image = context.images.get(ended[-1].artifact)
        seen = booted.seen
        if image is None or not image.healthy or seen is None or not seen.ready:
            return ""
        if seen.version == image.name:
            return ""
        return f"said that {image.name} is installed, and the next start ended in {seen.version}"

    # -- the judges that boot ----------------------------------------------------------------

    def boot(
        self,
        judge: BootloaderJudge | ColdBootJudge,
        groups: Sequence[Sequence[CrashClass]],
        limit: int,
        control_share: float,
    ) -> None:
        """Boot one representative a group, then control samples, as far as `limit` goes."""
        began = time.monotonic()
        before = len(self.found.violations)
        firsts = [(group[0], group[0].representative) for group in groups]
        controls = [(c, state) for group in groups for c in group for state in c.samples]
        controls += [(c, c.representative) for group in groups for c in group[1:]]
        every = len(firsts) + len(controls)
        random.Random(self.examiner.seed).shuffle(controls)  # noqa: S311 - no secret
        room = max(limit - len(firsts), round(limit * control_share))
        controls = controls[: max(0, room)]
        jobs = firsts[: limit - len(controls)] + controls
        differing = 0
        with Workplace() as place:
            results = _each(
                lambda job: judge.boot(job[0], job[1], place),
                jobs,
                self.examiner.workers,
                place.stop,
            )
            for done, came in enumerate(results, 1):
                booted = self._compare_data(came)
                self.found.boots.append(booted)
                if booted.disagreement:
                    differing += 1
                    self.found.disagreements.append(booted)
                if booted.seen is not None:
                    for when in self._phases(booted.crash_class):
                        self._judge(judge.name, booted.crash_class, booted, when)
                self.examiner.progress.judging(judge.name, done, len(jobs))
        self.found.counts.append(
            JudgeCount(
                judge=judge.name,
                looked_at=len(jobs),
                of=every,
                unit="representatives and control samples",
                controls=len(controls),
                violations=len(self.found.violations) - before,
                disagreements=differing,
                seconds=time.monotonic() - began,
            )
        )

    def _compare_data(self, booted: Booted) -> Booted:
        """A system that came up without data that the data judge found sound disagrees with it."""
        known = self.data.checked.get(self.data.key(booted.crash_class))
        if not booted.data_lost or booted.disagreement or known is None or not known.clean:
            return booted
        return evolve(
            booted, disagreement="the data judge finds the data partition sound, the device lost it"
        )

    def cut_again(self, judge: ColdBootJudge, bounds: Bounds) -> None:
        """Depth two: a class of each recovery key, and control samples of some.

        A control sample follows its key, so that there are some wherever the time is over.
        """
        began = time.monotonic()
        until = math.inf if bounds.deep_seconds is None else began + bounds.deep_seconds
        classes = self.found.exploration.classes
        every = recoveries(classes, self.oracle, self.data)
        groups = every.groups[: bounds.deep]
        controls = dict(every.controls(len(groups), bounds.deep_controls, self.examiner.seed))
        ends = Ends()
        results: dict[int, DeepResult] = {}
        seen: list[tuple[int, Booted, Trace]] = []
        with Workplace() as place:

            def one(job: tuple[int, CrashClass | None]) -> None:
                number, control = job
                if control is not None:
                    seen.append((number, *follow(judge, self.examiner.ears, control, place)))
                    return
                members = groups[number][1]
                phases = sorted({phase for c in members for _, phase in self._phases(c)})
                results[number] = cut_again(
                    judge, self.examiner.ears, members, phases, place, self.examiner.deeper, ends
                )

            jobs = [
                (number, which)
                for number in range(len(groups))
                for which in ((None, controls[number]) if number in controls else (None,))
            ]
            in_time = itertools.takewhile(lambda _: time.monotonic() < until, jobs)
            for done, _ in enumerate(_each(one, in_time, self.examiner.workers, place.stop), 1):
                self.examiner.progress.judging(DEPTH_TWO, done, len(jobs))
            compared = [self._compare(judge, place, results[n], b, t) for n, b, t in seen]
        self.found.deep += [results[number] for number in sorted(results)]
        boots = [*(result.booted for result in self.found.deep), *compared]
        differing = [booted for booted in boots if booted.disagreement]
        self.found.disagreements += differing
        shown, parts = every.parts(results)
        self.found.depth_two = DepthTwo(
            classes=len(classes),
            unknown=every.unknown,
            keys=len(every.groups),
            booted=len(results),
            parts_shown=shown,
            parts=parts,
            covered=sum(len(groups[number][1]) for number in results),
            controls=len(seen),
            retried=len(ends),
            left=tuple(
                (k.describe(), len(c)) for n, (k, c) in enumerate(every.groups) if n not in results
            ),
        )
        self.found.counts.append(
            JudgeCount(
                judge=DEPTH_TWO,
                looked_at=len(results),
                of=len(every.groups),
                unit="distinct recoveries, all their cuts",
                controls=len(seen),
                violations=sum(len(result.violations) for result in self.found.deep),
                disagreements=len(differing),
                seconds=time.monotonic() - began,
            )
        )

    def _compare(
        self,
        judge: ColdBootJudge,
        place: Workplace,
        result: DeepResult,
        booted: Booted,
        trace: Trace,
    ) -> Booted:
        """A control sample disagrees if it did otherwise than the class that stands for it.

        Then both are booted once more: on a busy host a guest's watchdog can bite.
        """
        if booted.disagreement or not result.trace.differs(trace):
            return booted
        ears = self.examiner.ears
        _, first = follow(judge, ears, result.crash_class, place)
        booted, second = follow(judge, ears, booted.crash_class, place)
        differs = first.differs(second)
        if not differs or booted.disagreement:
            return booted
        text = f"two classes of one recovery key recover differently: {differs}"
        return evolve(booted, disagreement=f"{text} ({result.crash_class.representative})")


def _damaged_data(crash_class: CrashClass) -> bool:
    return any(f.damaged for f in crash_class.facts if f.role is Role.DATA)


def _by_decision(classes: Sequence[CrashClass]) -> list[list[CrashClass]]:
    """Classes grouped by all that a bootloader's decision depends on: all but the data."""
    groups: dict[tuple[object, ...], list[CrashClass]] = {}
    for crash_class in classes:
        groups.setdefault(_decision_key(crash_class), []).append(crash_class)
    return list(groups.values())


def _decision_key(crash_class: CrashClass) -> tuple[object, ...]:
    return tuple(f for f in crash_class.facts if f.role is not Role.DATA)


def _each(
    work: Callable[[T], R],
    items: Iterable[T],
    workers: int,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[R]:
    """Results as they come, from `workers` threads.

    At an error or an interrupt `stop` is called, so that what runs ends, and the rest is dropped.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    waiting: set[Future[R]] = set()
    rest = iter(items)
    try:
        while True:
            for item in rest:
                waiting.add(pool.submit(work, item))
                if len(waiting) >= 2 * workers:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
