"""Depth two: cut again during the recovery from a cut.

A crash state is booted, and what the recovery writes is recorded in a journal that begins with that
state: the bootloader's and the updater's own recovery, and then, as an operator would have it, the
same update tried again, with its restart and its commit. All cuts of that journal are crash states
of depth two: the engine finds them as those of the first depth, the static oracle and the data
judge judge them, and they owe what was owed at the first cut plus what the recovery itself
promised. A recovery that wrote nothing has no cuts of its own.

One class stands for all that a device recovers from in the same way (`framework.explore.recovery`),
and is judged in all their phases. The update is tried again once from each distinct end of a
recovery: what it writes depends on where it begins.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import zstandard
from attrs import evolve, field, frozen

from framework.disk import CacheModel, Decision, JournalReader, PrefixCache, VolatileCache
from framework.explore.bulk import BulkOracle, phases_of
from framework.explore.ears import Ears
from framework.explore.engine import explore
from framework.explore.judges.boots import BOOT_TIMEOUT_S, MAX_STARTS, Booted, ColdBootJudge
from framework.explore.judges.context import Context
from framework.explore.judges.data import DataJudge
from framework.explore.recovery import NOTHING, Ends, Trace, trace_of
from framework.explore.serve import Heard, StateMachine, Workplace
from framework.explore.states import CrashClass, CrashState, Exploration
from framework.explore.timeline import (
    SOURCE,
    Promise,
    Restarted,
    Step,
    Timeline,
    read_timeline,
    to_mark,
)
from framework.verdict import InstallEnded, InstallStarted
from framework.verdict.invariants import EXIT_OK, EXIT_REBOOT_NEEDED

DATA_LIMIT: Final = 400
"""Most distinct data partitions of a recovery that are checked, unless asked for more."""
RETRY_TIMEOUT_S: Final = 300.0
_OF_DATA: Final = (5, 6)
"""Invariants that a lost data partition breaks: it is sound, and updates succeed on it."""
_ENDED: Final = re.compile(r"BROWNOUT-RETRY (?P<code>\d+)\s*\n")


@frozen
class Retry:
    """An update to be tried again after a recovery, as the shell of the device takes it.

    Attributes:
        artifact: its name.
        install: the command; exit codes 0 and 4 say that it is installed.
        restart: the command that restarts the device.
    """

    artifact: str
    install: str
    restart: str


@frozen
class Deeper:
    """How deep to look.

    Attributes:
        models: cache models of the second cut.
        apart: further ones, of devices that break their promises. They are explored apart: a class
            is reached by any of the models that it is explored under, and what breaks without a
            lie must not pass for a lie's.
        retries: by artifact, how to try its update again; empty: nothing is tried again.
        exhaustive_up_to, samples: as `engine.explore` takes them.
        data: most distinct data partitions of a recovery that are checked; the rest is counted.
    """

    models: tuple[CacheModel, ...] = (PrefixCache(), VolatileCache())
    apart: tuple[CacheModel, ...] = ()
    retries: Mapping[str, Retry] = field(factory=dict)
    exhaustive_up_to: int = 10
    samples: int = 300
    data: int = DATA_LIMIT


@frozen
class DeepViolation:
    """A broken invariant at depth two.

    Attributes:
        invariant, evidence: which, and what decided.
        phase: what was owed at the first cut.
        first, second: both crash states.
        recovery: the recovery's journal, compressed.
        promised: the newest promise at the second cut, in words.
        at_rest: whether the data partition was lost at the first cut already, and by the medium
            alone, which destroyed data at rest (`framework.explore.rest`).
    """

    invariant: int
    evidence: str
    phase: int
    first: CrashState
    second: CrashState
    recovery: bytes
    promised: str
    at_rest: bool = False


@frozen
class DeepResult:
    """What became of one class at depth two.

    Attributes:
        crash_class: the class at depth one.
        booted: its recovery.
        explorations: of the recovery's journal: as of devices that keep their promises, and of
            others if they were asked for.
        violations: what broke, over all phases of the class.
        retried: what came of the update tried again; empty: none was.
        unchecked: distinct data partitions that were not checked, for their number.
        trace: what the recovery did, for a control sample to be compared with.
        members: how many classes it stands for.
    """

    crash_class: CrashClass
    booted: Booted
    explorations: tuple[Exploration, ...]
    violations: tuple[DeepViolation, ...]
    retried: str = ""
    unchecked: int = 0
    trace: Trace = NOTHING
    members: int = 1


def cut_again(  # noqa: PLR0917 - who, what, when, where, how
    judge: ColdBootJudge,
    ears: Ears,
    classes: Sequence[CrashClass],
    phases: Sequence[int],
    place: Workplace,
    deeper: Deeper,
    ends: Ends,
) -> DeepResult:
    """Boot the first of classes that share a recovery, and judge every cut of what that writes.

    Where the recovery ends as none did before (`ends`), the update is tried again. `phases`: those
    of all the classes. Raises InfrastructureError if QEMU fails, DiskError if e2fsck does.
    """
    crash_class, context = classes[0], judge.context
    retry = _retry_of(context.timeline, phases, deeper.retries)
    with _recovering(judge, ears, crash_class, place, retry, ends) as (recovery, booted, journal):
        first = crash_class.representative
        explored, found, unchecked = judge_recovery(context, journal, first, phases, deeper)
        if broken := recovery.not_converged(context):
            found += _never_converged(context, journal, first, phases, broken)
        return DeepResult(
            crash_class,
            booted,
            explored,
            tuple(told_apart(context, found)),
            recovery.retried,
            unchecked,
            recovery.trace,
            len(classes),
        )


def follow(
    judge: ColdBootJudge, ears: Ears, crash_class: CrashClass, place: Workplace
) -> tuple[Booted, Trace]:
    """Only boot a class, as a control sample: what its recovery came to.

    Raises InfrastructureError if QEMU fails, DiskError if e2fsck does.
    """
    with _recovering(judge, ears, crash_class, place, None, Ends()) as (recovery, booted, _):
        return booted, recovery.trace


@contextlib.contextmanager
def _recovering(  # noqa: PLR0917 - who, what, where, how
    judge: ColdBootJudge,
    ears: Ears,
    crash_class: CrashClass,
    place: Workplace,
    retry: Retry | None,
    ends: Ends,
) -> Iterator[tuple[_Recovery, Booted, JournalReader]]:
    """A class's recovery after it ran, and its journal as long as this is entered."""
    context = judge.context
    first = crash_class.representative
    trial = judge.oracle.on_trial(crash_class)
    recovery = _Recovery(
        evolve(ears, artifact=trial or context.initial),
        retry,
        lambda journal, until: trace_of(context, journal, until),
        lambda end: ends.is_new((end, _standing(crash_class), retry and retry.artifact)),
    )
    with (
        first.disks(context.journal) as disks,
        StateMachine(judge.machine, disks, place) as running,
    ):
        heard = recovery.run(running)
        booted = judge.read(crash_class, first, recovery.until_ready(heard))
        yield recovery, booted, running.journal()


def _standing(crash_class: CrashClass) -> tuple[tuple[str | None, bool], ...]:
    """What stands in the slots, as far as an update tried again could depend on it."""
    return tuple((f.image, f.loadable) for f in crash_class.slots.values())


def _retry_of(
    timeline: Timeline, phases: Sequence[int], retries: Mapping[str, Retry]
) -> Retry | None:
    """The update that was under way at the latest of these phases, or else the first one."""
    for event in reversed(timeline.events(max(phases, default=0))):
        if isinstance(event, InstallStarted) and event.artifact in retries:
            return retries[event.artifact]
    return next(iter(retries.values()), None)


class _Recovery:
    """What is heard of a recovery, and typed in it."""

    def __init__(
        self,
        ears: Ears,
        retry: Retry | None,
        trace: Callable[[JournalReader, int], Trace],
        is_new: Callable[[Hashable], bool],
    ) -> None:
        """`is_new`: whether the update has to be tried again from such an end."""
        self.ears = ears
        self.retry = retry
        self.retried = ""
        self.trace = NOTHING
        self._trace = trace
        self._is_new = is_new
        self._ready: list[int] = []
        """How many matches there were at each ready line."""
        self._code: int | None = None
        self._last_version = ""

    def run(self, machine: StateMachine) -> Heard:
        """Run it, with its promises in the machine's journal."""
        signs = self.ears.boot
        count = 0

        def mark(event: Promise) -> None:
            machine.recorder.mark(SOURCE, to_mark(event))

        def heard(match: re.Match[str]) -> bool:
            nonlocal count
            count += 1
            event = self.ears.event_of(match)
            if event is not None:
                mark(event)
            if match.re is _ENDED and self.retry is not None:
                self._code = int(match["code"])
                mark(InstallEnded(self.retry.artifact, self._code))
                if self._code not in (EXIT_OK, EXIT_REBOOT_NEEDED):
                    return True
                self.ears = evolve(self.ears, artifact=self.retry.artifact)
                machine.type(f"{self.retry.restart}\n")
            elif match.re is signs.ready:
                self._ready.append(count)
                self._last_version = match["version"]
                if self._code is not None:
                    return True
                self.trace = self._trace(machine.journal(), machine.recorder.operations)
                end = (match["version"], match["slot"], self.trace.environments[-1:])
                if self.retry is None or not self._is_new((*end, self.trace.data)):
                    self.retry = None
                    return True
                mark(InstallStarted(self.retry.artifact))
                machine.type(f"{self.retry.install}; echo BROWNOUT-RETRY $?\n")
            return False

        patterns = (signs.booting, signs.nothing, signs.ready, signs.data_lost, _ENDED)
        ended = machine.run(
            list(dict.fromkeys((*patterns, *self.ears.patterns))),
            BOOT_TIMEOUT_S if self.retry is None else BOOT_TIMEOUT_S + RETRY_TIMEOUT_S,
            stop_on=heard,
            on_reset=lambda: mark(Restarted()),
            max_starts=MAX_STARTS if self.retry is None else 2 * MAX_STARTS,
        )
        if not self._ready:
            self.trace = self._trace(machine.journal(), machine.recorder.operations)
        return ended

    def until_ready(self, heard: Heard) -> Heard:
        """The recovery without the update that was tried again."""
        if not self._ready:
            return heard
        return replace(heard, matches=heard.matches[: self._ready[0]], ended="matched")

    def not_converged(self, context: Context) -> str:
        """How the update tried again failed; empty if it did not, or none was tried."""
        if self.retry is None or not self._ready:
            return ""
        name = self.retry.artifact
        image = context.images.get(name)
        if self._code is None:
            self.retried = f"{name} did not end"
        elif self._code not in (EXIT_OK, EXIT_REBOOT_NEEDED):
            self.retried = f"{name} ended with {self._code}"
        elif len(self._ready) < 2:
            self.retried = f"{name} was installed, and nothing got ready after the restart"
        elif image is not None and image.healthy and self._last_version != name:
            self.retried = f"{name} was installed, and {self._last_version} runs"
        else:
            self.retried = f"{name} was installed, {self._last_version} runs"
            return ""
        return f"the update tried again: {self.retried}"


def told_apart(context: Context, found: Sequence[DeepViolation]) -> Iterator[DeepViolation]:
    """The violations, `at_rest` where the medium alone had lost the data partition before."""
    data = DataJudge(context)
    cuts = {(v.first, v.phase) for v in found if v.invariant in _OF_DATA}
    lost = {cut for cut in cuts if data.holds_spared(*cut) and not data.holds(*cut)}
    for violation in found:
        mediums = violation.invariant in _OF_DATA and (violation.first, violation.phase) in lost
        yield evolve(violation, at_rest=mediums)


def _never_converged(
    context: Context,
    journal: JournalReader,
    first: CrashState,
    phases: Sequence[int],
    evidence: str,
) -> list[DeepViolation]:
    """An update that can't be installed after a recovery breaks invariant 6."""
    phase = max(phases, default=0)
    end = CrashState(len(journal.operations), Decision(), "kept")
    promised = context.timeline.describe(phase)
    return [DeepViolation(6, evidence, phase, first, end, _packed(journal), promised)]


def judge_recovery(
    context: Context,
    journal: JournalReader,
    first: CrashState,
    phases: Sequence[int],
    deeper: Deeper,
) -> tuple[tuple[Exploration, ...], list[DeepViolation], int]:
    """All cuts of a recovery's journal, which begins with the state `first`.

    Judged in each of the phases in which the first cut is possible. Returns what was explored, what
    broke, and how many distinct data partitions were left out.
    """
    inner = evolve(context, journal=journal)
    data = DataJudge(inner)
    unchecked: set[tuple[str, ...]] = set()
    explored: list[Exploration] = []
    found: list[DeepViolation] = []
    for models in filter(None, (deeper.models, deeper.apart)):
        exploration = explore(
            journal,
            context.layout,
            models,
            exhaustive_up_to=deeper.exhaustive_up_to,
            samples=deeper.samples,
        )
        explored.append(exploration)
        for crash_class in exploration.classes:
            if len(data.checked) < deeper.data:
                data.check(crash_class)
            elif data.key(crash_class) not in data.checked:
                unchecked.add(data.key(crash_class))
        found += _broken(inner, exploration.classes, data, first, phases)
    return tuple(explored), found, len(unchecked)


def _broken(
    context: Context,
    classes: Sequence[CrashClass],
    data: DataJudge,
    first: CrashState,
    phases: Sequence[int],
) -> Iterator[DeepViolation]:
    """What breaks in classes of depth two. `context`: with the recovery's journal."""
    journal = context.journal
    recovery = read_timeline(journal.marks)
    asked_before = BulkOracle(context)
    packed = b""
    for phase in phases:
        timeline = _owed(context.timeline, phase, recovery)
        oracle = asked_before.owing(timeline)
        then_data = DataJudge(oracle.context, data.checked)
        for crash_class in classes:
            told: set[int] = set()
            for span, later in phases_of(crash_class, timeline):
                checked = then_data.seen(crash_class, later)
                verdict = oracle.judge(crash_class, later, *(() if checked is None else (checked,)))
                for finding in verdict.findings:
                    if finding.held is not False or finding.invariant in told:
                        continue
                    told.add(finding.invariant)
                    packed = packed or _packed(journal)
                    latest = later == timeline.phase_at(span.last_sequence - 1)
                    yield DeepViolation(
                        finding.invariant,
                        finding.evidence,
                        phase,
                        first,
                        span.latest if latest else span.earliest,
                        packed,
                        timeline.describe(later),
                    )


def _owed(before: Timeline, phase: int, recovery: Timeline) -> Timeline:
    """What was owed at the first cut, then a restart, then what the recovery promised."""
    steps = [Step(-1, 0, step.event) for step in before.steps[:phase]]
    return Timeline((*steps, Step(-1, 0, Restarted()), *recovery.steps))


def _packed(journal: JournalReader) -> bytes:
    return zstandard.ZstdCompressor().compress(journal.path.read_bytes())
