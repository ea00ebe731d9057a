"""What a campaign does next, and what its runs say together: pure decisions over its runs.

The order is: what was interrupted, then what a rig failed (on another rig if one can, by another
worker if there is one), then what is to be seen again, then the next index. A verdict that differs
between runs of the same composition on the same rig is *flaky*: it is told as such, and the run
that was bad stays bad.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attrs import define, frozen

from framework.campaign.composition import Composition
from framework.campaign.ledger import Run
from framework.campaign.space import Cell, candidates, choose, expected, name_of

MOST_ATTEMPTS: Final = 3
"""How often one composition is tried before its rigs are to blame for good."""
INFRASTRUCTURE: Final = "INFRASTRUCTURE"
PASS: Final = "PASS"  # noqa: S105 - a verdict


@frozen
class Rig:
    """A rig of a campaign.

    Attributes:
        name: the file's name.
        features: what it can do.
    """

    name: str
    features: frozenset[str]

    @property
    def shared(self) -> bool:
        """Whether several workers may use it at once: an emulated one has no hardware to share."""
        return "emulated" in self.features


@frozen
class Wish:
    """What somebody wants of a campaign.

    Attributes:
        seed: of all compositions.
        rigs: where.
        runs: how many indices; None: until time is up.
        seconds: for how long; None: until all runs are done.
        plant: a bug planted into the images.
        again: every so many-th passed run is done again to see whether it is flaky; 0: none. What
            did not pass always is.
        stop_after: end after so many compositions that violate; 0: never.
    """

    seed: int
    rigs: tuple[Rig, ...]
    runs: int | None
    seconds: float | None
    plant: str = ""
    again: int = 10
    stop_after: int = 0

    @property
    def bound(self) -> str:
        """The bound in words; part of what makes two campaigns the same."""
        parts = [] if self.runs is None else [f"{self.runs} runs"]
        parts += [] if self.seconds is None else [f"{self.seconds / 60:g} minutes"]
        parts += [f"until {self.stop_after} violate"] if self.stop_after else []
        return ", ".join(parts)


@frozen
class Job:
    """A run to be done."""

    index: int
    candidate: int
    rig: Rig
    purpose: str
    composition: Composition


Key = tuple[int, int]
"""Index and candidate: a composition."""


@define
class Planner:
    """Chooses jobs.

    Attributes:
        wish: what is wanted.
        interrupted: runs of an earlier session that never ended.
    """

    wish: Wish
    interrupted: list[Run]

    def next(
        self,
        runs: Sequence[Run],
        struck: Mapping[Cell, int],
        worker: int,
        workers: int,
        *,
        out_of_time: bool = False,
    ) -> Job | None:
        """The next job for a worker; None: nothing now.

        Args:
            runs: of this campaign, those under way (without an outcome) included.
            struck: its coverage.
            worker: who asks.
            workers: how many there are.
            out_of_time: begin nothing new.
        """
        busy = {run.rig for run in runs if run.outcome is None}
        free = [rig for rig in self.wish.rigs if rig.shared or rig.name not in busy]
        enough = 0 < self.wish.stop_after <= len(violating(runs))
        if enough or not free:
            return None
        return (
            self._interrupted(free)
            or self._retry(runs, free, worker, workers)
            or self._again(runs, free)
            or (None if out_of_time else self._fresh(runs, struck, free))
        )

    def _interrupted(self, free: Sequence[Rig]) -> Job | None:
        for run in self.interrupted:
            rig = _named(free, run.rig)
            if rig is not None:
                self.interrupted.remove(run)
                return _job(run, rig, run.purpose)
        return None

    def _retry(
        self, runs: Sequence[Run], free: Sequence[Rig], worker: int, workers: int
    ) -> Job | None:
        for key, attempts in by_composition(runs).items():
            ended = [run for run in attempts if run.outcome is not None]
            if len(ended) != len(attempts) or len(ended) >= MOST_ATTEMPTS or not ended:
                continue
            if any(not failed_by_rig(run) for run in ended):
                continue
            last = ended[-1]
            composition = Composition.from_json(last.composition)
            can = [rig for rig in free if composition.features() <= rig.features]
            other = [rig for rig in can if rig.name not in {run.rig for run in ended}]
            if not other and workers > 1 and last.worker == worker:
                # Another worker, if not another rig.
                continue
            same = _named(can, last.rig)
            rig = other[0] if other else same
            if rig is not None:
                return Job(*key, rig, "retry", composition)
        return None

    def _again(self, runs: Sequence[Run], free: Sequence[Rig]) -> Job | None:
        for attempts in by_composition_and_rig(runs).values():
            judged = [run for run in attempts if run.outcome is None or not failed_by_rig(run)]
            if len(judged) != 1 or judged[0].outcome is None or len(attempts) >= MOST_ATTEMPTS:
                continue
            run = judged[0]
            assert run.outcome is not None
            passed = run.outcome.verdict == PASS
            chosen = self.wish.again and run.index % self.wish.again == self.wish.again - 1
            rig = _named(free, run.rig)
            if rig is not None and (not passed or chosen):
                return _job(run, rig, "again")
        return None

    def _fresh(
        self, runs: Sequence[Run], struck: Mapping[Cell, int], free: Sequence[Rig]
    ) -> Job | None:
        wish = self.wish
        begun = {run.index for run in runs} | {run.index for run in self.interrupted}
        first = next(n for n in range(len(begun) + 1) if n not in begun)
        for index in range(first, first + len(begun) + 2 * len(wish.rigs)):
            if index in begun or (wish.runs is not None and index >= wish.runs):
                continue
            rig = _named(free, rig_of(wish.rigs, index).name)
            if rig is None:
                continue
            offered = candidates(rig.features, wish.seed, index, wish.plant)
            number = choose(offered, struck, tried(runs))
            return Job(index, number, rig, "drawn", offered[number])
        return None

    def complete(self, runs: Sequence[Run]) -> bool:
        """Whether everything is done that was wished for."""
        wish = self.wish
        if 0 < wish.stop_after <= len(violating(runs)):
            return True
        indices = {run.index for run in runs if run.outcome is not None}
        return wish.runs is not None and len(indices) >= wish.runs


def tried(runs: Iterable[Run]) -> Counter[Cell]:
    """How often each cell was expected to be struck by what was drawn, whatever came of it."""
    found: Counter[Cell] = Counter()
    for run in runs:
        if run.purpose == "drawn" and run.composition:
            found.update(expected(Composition.from_json(run.composition)))
    return found


def rig_of(rigs: Sequence[Rig], index: int) -> Rig:
    """The rig that an index is drawn for: in turns, whoever is faster."""
    return rigs[index % len(rigs)]


def _named(rigs: Iterable[Rig], name: str) -> Rig | None:
    return next((rig for rig in rigs if rig.name == name), None)


def _job(run: Run, rig: Rig, purpose: str) -> Job:
    return Job(run.index, run.candidate, rig, purpose, Composition.from_json(run.composition))


def failed_by_rig(run: Run) -> bool:
    """Whether a run ended without a statement about the device."""
    return run.outcome is not None and run.outcome.verdict == INFRASTRUCTURE


def by_composition(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Runs by their composition, in their order."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        found.setdefault((run.index, run.candidate), []).append(run)
    return found


def by_composition_and_rig(runs: Iterable[Run]) -> dict[tuple[Key, str], list[Run]]:
    """Runs of the same composition on the same rig: their verdicts should agree."""
    found: dict[tuple[Key, str], list[Run]] = {}
    for run in runs:
        found.setdefault(((run.index, run.candidate), run.rig), []).append(run)
    return found


def violating(runs: Iterable[Run]) -> list[Run]:
    """The first run of each composition that violated an invariant."""
    found: dict[Key, Run] = {}
    for run in runs:
        if run.outcome is not None and run.outcome.violated:
            found.setdefault((run.index, run.candidate), run)
    return list(found.values())


@frozen
class Flaky:
    """One composition on one rig, and the verdicts that it had, in order."""

    index: int
    candidate: int
    rig: str
    verdicts: tuple[str, ...]

    def __str__(self) -> str:
        """In words."""
        return f"{self.index}.{self.candidate} on {self.rig}: {', then '.join(self.verdicts)}"


def flaky(runs: Iterable[Run]) -> list[Flaky]:
    """Compositions whose verdicts differ on the same rig; a rig's failure is no verdict."""
    found = []
    for ((index, candidate), rig), attempts in by_composition_and_rig(runs).items():
        verdicts = tuple(
            run.outcome.verdict
            for run in attempts
            if run.outcome is not None and not failed_by_rig(run)
        )
        if len(set(verdicts)) > 1:
            found.append(Flaky(index, candidate, rig, verdicts))
    return found


@frozen
class Summary:
    """What a campaign came to.

    Attributes:
        runs: that ended; `compositions` the different ones among them.
        verdicts: how many runs had each.
        violating: compositions that violated, at least once.
        repeated: compositions that were judged more than once on a rig; `flaky` those of them
            whose verdicts differ.
        infrastructure: runs that a rig failed; `given_up` compositions that no rig could do.
        faults, unfired: how many faults were armed, and never struck.
        seconds: of all runs; `boots_s` and `work_s` of it in starts and in the client's commands.
        boots: how many starts.
    """

    runs: int
    compositions: int
    verdicts: Mapping[str, int]
    violating: int
    repeated: int
    flaky: int
    infrastructure: int
    given_up: int
    faults: int
    unfired: int
    seconds: float
    boots: int
    boots_s: float
    work_s: float


def summarise(runs: Sequence[Run]) -> Summary:
    """Everything in numbers."""
    ended = [run.outcome for run in runs if run.outcome is not None]
    verdicts: dict[str, int] = {}
    for outcome in ended:
        verdicts[outcome.verdict] = verdicts.get(outcome.verdict, 0) + 1
    repeated = [
        attempts
        for attempts in by_composition_and_rig(runs).values()
        if sum(run.outcome is not None and not failed_by_rig(run) for run in attempts) > 1
    ]
    given_up = [
        attempts
        for attempts in by_composition(runs).values()
        if len(attempts) >= MOST_ATTEMPTS and all(failed_by_rig(run) for run in attempts)
    ]
    return Summary(
        runs=len(ended),
        compositions=len(by_composition(run for run in runs if run.outcome is not None)),
        verdicts=verdicts,
        violating=len(violating(runs)),
        repeated=len(repeated),
        flaky=len(flaky(runs)),
        infrastructure=verdicts.get(INFRASTRUCTURE, 0),
        given_up=len(given_up),
        faults=sum(len(outcome.strikes) + len(outcome.unfired) for outcome in ended),
        unfired=sum(len(outcome.unfired) for outcome in ended),
        seconds=sum(outcome.seconds for outcome in ended),
        boots=sum(outcome.boots for outcome in ended),
        boots_s=sum(outcome.boots_s for outcome in ended),
        work_s=sum(outcome.work_s for outcome in ended),
    )


def changed(before: Iterable[Run], now: Iterable[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same composition on the same rig whose verdicts differ between two campaigns."""
    old = {
        key: attempts[0]
        for key, attempts in by_composition_and_rig(
            run for run in before if run.outcome is not None and not failed_by_rig(run)
        ).items()
    }
    found = []
    for key, attempts in by_composition_and_rig(
        run for run in now if run.outcome is not None and not failed_by_rig(run)
    ).items():
        was, is_now = old.get(key), attempts[0]
        if was is None or was.composition != is_now.composition:
            continue
        assert was.outcome is not None
        assert is_now.outcome is not None
        if was.outcome.verdict != is_now.outcome.verdict:
            found.append((was, is_now))
    return found


def repeat_command(rig: str, seed: int, run: tuple[int, int], plant: str) -> str:
    """The line that does one run again."""
    planted = f" --plant {plant}" if plant else ""
    return f"brownout campaign --rig {rig} --only {name_of(seed, *run)}{planted}"
