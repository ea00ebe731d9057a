"""`brownout campaign`: random compositions on all rigs, live and in tables, kept in a ledger.

What is drawn, decided and done is `framework.campaign`'s; here a session is held together: the
ledger is opened, workers get jobs, what they say is shown and kept, and the end is told. The same
command goes on where an earlier session stopped, whatever stopped it.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import define, field, frozen
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.campaign.composition import Composition
from framework.campaign.crew import WORKER, Crew, Said
from framework.campaign.errors import CampaignError
from framework.campaign.ledger import (
    Campaign,
    Ledger,
    Run,
    outcome_from_values,
    program,
)
from framework.campaign.perform import Performed, needs
from framework.campaign.plan import (
    INFRASTRUCTURE,
    PASS,
    Job,
    Planner,
    Rig,
    Wish,
    changed,
    flaky,
    repeat_command,
    summarise,
    violating,
)
from framework.campaign.space import Cell, draw, images_of, name_of, universe
from framework.database import utc_now
from framework.targets.errors import RigError
from framework.targets.rig import check_rig, rig_features
from images import ImageError, build_target, planted_bugs, recipe_names

LEDGER: Final = "campaign.db"
BUNDLES: Final = "bundles"
LOG: Final = "workers.log"
EXIT_PASSED: Final = 0
EXIT_NOT_HELD: Final = 1
_POLL_S: Final = 0.2
_SPEND_S: Final = 15.0
_LEAST_FREE_BYTES: Final = 64 << 20


@frozen
class Place:
    """Where a campaign runs and what it leaves.

    Attributes:
        rigs: the rig files.
        output: the folder of the ledger, the bundles and the log.
        workers: how many.
        program: what a worker is.
    """

    rigs: tuple[Path, ...]
    output: Path
    workers: int
    program: tuple[str, ...] = WORKER


def rigs_of(paths: Sequence[Path], plant: str, console: Console) -> tuple[Rig, ...]:
    """The rigs, checked, their images built.

    Raises:
        CampaignError: a rig is unknown or can't be used, or the bug is none.
    """
    if plant and plant not in (*planted_bugs(), "single-env"):
        raise CampaignError(
            f"nothing called {plant!r} can be planted; there are {', '.join(planted_bugs())}"
        )
    rigs: list[Rig] = []
    for path in paths:
        if not path.is_file():
            raise CampaignError(f"{path}: no such rig; `ls rigs/*.yaml` lists those there are")
        if path.name in {rig.name for rig in rigs}:
            raise CampaignError(f"{path}: there is a rig of this name already; use -j for more")
        try:
            features = rig_features(path)
            if path.stem in recipe_names():
                with console.status(f"images for {path.stem}"):
                    build_target(path.stem, images_of(plant, features), relock_if_gone=True)
            check_rig(path)
        except (RigError, ImageError) as error:
            raise CampaignError(str(error)) from error
        rigs.append(Rig(path.name, features))
    return tuple(rigs)


def run_campaign(wish: Wish, place: Place, console: Console) -> int:
    """Run, or go on with, a campaign; returns the exit code.

    Raises:
        CampaignError, CrewError, LedgerError: it can't go on; what was done is kept.
    """
    _check_room(place.output)
    with Ledger(place.output / LEDGER) as ledger:
        cells = frozenset[Cell]().union(*(universe(rig.features) for rig in wish.rigs))
        campaign, is_new = ledger.open_campaign(
            Campaign(
                number=0,
                seed=wish.seed,
                plant=wish.plant,
                rigs=tuple(rig.name for rig in wish.rigs),
                bound=wish.bound,
                program=program(),
                cells=len(cells),
                started=utc_now(),
            )
        )
        session = _Session(wish, place, ledger, campaign, console)
        session.planner = Planner(wish, ledger.forget_interrupted(campaign))
        if not is_new:
            done = len([run for run in ledger.runs(campaign) if run.outcome is not None])
            console.print(
                f"going on with campaign {campaign.number} of {campaign.started}: {done} runs"
                f" done, {len(session.planner.interrupted)} interrupted",
                highlight=False,
            )
        try:
            session.run()
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from here")
            raise
        runs = ledger.runs(campaign)
        ledger.end_campaign(campaign)
        finished = next(c for c in ledger.campaigns() if c.number == campaign.number)
        paths = {path.name: str(path) for path in place.rigs}
        for part in told(ledger, finished, cells, paths):
            console.print(part, highlight=False)
        return EXIT_NOT_HELD if violating(runs) or _broken(runs) else EXIT_PASSED


def run_only(names: Sequence[str], plant: str, place: Place, console: Console) -> int:
    """Do single runs again, by their names; returns the exit code.

    Raises:
        CampaignError: a name is none.
    """
    (rig_path, *others) = place.rigs
    if others:
        raise CampaignError("--only is about one run: give one --rig")
    runs = [(name, parse_name(name)) for name in names]
    (rig,) = rigs_of(place.rigs, plant, console)
    code = EXIT_PASSED
    with Crew(1, place.output / LOG, place.program) as crew:
        for name, (seed, index, candidate) in runs:
            composition = draw(rig.features, seed, index, candidate, plant)
            console.print(f"{name} on {rig.name}: {composition}", highlight=False, markup=False)
            command = repeat_command(str(rig_path), seed, (index, candidate), plant)
            outcome = perform_once(crew, rig_path, rig, composition, name, command, place.output)
            _tell_run(console, name, rig.name, outcome, "")
            if outcome.verdict != PASS:
                code = EXIT_NOT_HELD
    return code


def perform_once(  # noqa: PLR0917 - what, where, and how it is called
    crew: Crew,
    rig_path: Path,
    rig: Rig,
    composition: Composition,
    name: str,
    command: str,
    output: Path,
    *,
    always: bool = True,
) -> Performed:
    """Have the only worker perform a composition.

    Raises:
        CampaignError: the rig can't be used.
    """
    images = images_of(_plant(composition), rig.features)
    images = tuple(dict.fromkeys((*images, *needs(composition))))
    crew.give(
        0,
        {
            "rig": str(rig_path),
            "composition": composition.to_values(),
            "title": f"campaign {name} on {rig.name}",
            "repeat": command,
            "bundles": str(output / BUNDLES),
            "images": images,
            "always": always,
        },
    )
    while True:
        said = crew.hear(_POLL_S)
        if said is None or said.kind == "say":
            continue
        return _outcome(said)


def _plant(composition: Composition) -> str:
    return composition.base.partition("+")[2]


def parse_name(name: str) -> tuple[int, int, int]:
    """`7/42.3` as seed, index and candidate. Raises CampaignError."""
    try:
        seed, rest = name.split("/")
        index, candidate = rest.split(".")
        return int(seed), int(index), int(candidate)
    except ValueError as error:
        raise CampaignError(f"{name!r} is no run; they are called like 7/42.3") from error


def _check_room(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output).free
    except OSError as error:
        raise CampaignError(f"{output}: {error.strerror}") from error
    if free < _LEAST_FREE_BYTES:
        raise CampaignError(
            f"{output}: the disk is full ({free >> 20} MiB free, a campaign needs "
            f"{_LEAST_FREE_BYTES >> 20}); free some space or choose --output"
        )


def _outcome(said: Said) -> Performed:
    """The outcome of a message that ends a run. Raises CampaignError if it ends everything."""
    if said.kind == "unusable":
        raise CampaignError(str(said.value))
    if said.kind == "failed":
        return Performed(INFRASTRUCTURE, evidence=str(said.value))
    return outcome_from_values(said.value)


def _broken(runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.outcome is not None and r.outcome.verdict == "BROKEN"]


@define
class _Doing:
    """What a worker does, for the display."""

    name: str
    rig: str
    sentence: str
    now: str = ""
    since: float = field(factory=time.monotonic)


@define
class _Session:
    """One session of a campaign: from its start, or where the last one stopped, to its end."""

    wish: Wish
    place: Place
    ledger: Ledger
    campaign: Campaign
    console: Console
    planner: Planner = field(init=False)
    doing: dict[int, tuple[int, _Doing]] = field(factory=dict)
    struck: dict[Cell, int] = field(factory=dict)
    began: float = field(factory=time.monotonic)
    _told_spent: float = 0.0

    def run(self) -> None:
        """Give jobs to workers until all is done."""
        self.struck = dict(self.ledger.struck(self.campaign))
        with (
            Crew(self.place.workers, self.place.output / LOG, self.place.program) as crew,
            self._display() as show,
        ):
            try:
                while self._assign(crew) or self.doing:
                    said = crew.hear(_POLL_S)
                    if said is not None:
                        self._take(said)
                    self._spend()
                    show()
            finally:
                self._spend(final=True)

    def _assign(self, crew: Crew) -> bool:
        """Give a job to whoever is idle; whether there was any."""
        given = False
        for worker in crew.idle:
            runs = self.ledger.runs(self.campaign)
            job = self.planner.next(
                runs, self.struck, worker, crew.count, out_of_time=self._is_out_of_time()
            )
            if job is not None:
                self._give(crew, worker, job)
                given = True
        return given

    def _is_out_of_time(self) -> bool:
        spent = self.campaign.spent_s + time.monotonic() - self.began
        return self.wish.seconds is not None and spent >= self.wish.seconds

    def _give(self, crew: Crew, worker: int, job: Job) -> None:
        name = name_of(self.wish.seed, job.index, job.candidate)
        path = self._path_of(job.rig)
        key = self.ledger.begin(
            self.campaign,
            Run(
                0,
                job.index,
                job.candidate,
                job.rig.name,
                job.purpose,
                worker,
                job.composition.to_json(),
            ),
        )
        self.doing[worker] = (key, _Doing(name, job.rig.name, str(job.composition)))
        crew.give(
            worker,
            {
                "rig": str(path),
                "composition": job.composition.to_values(),
                "title": f"campaign {name} on {job.rig.name}",
                "repeat": self._repeat(job.rig.name, job.index, job.candidate),
                "bundles": str(self.place.output / BUNDLES),
                "images": images_of(self.wish.plant, job.rig.features),
            },
        )

    def _path_of(self, rig: Rig) -> Path:
        return next(path for path in self.place.rigs if path.name == rig.name)

    def _repeat(self, rig: str, index: int, candidate: int) -> str:
        path = next(path for path in self.place.rigs if path.name == rig)
        return repeat_command(str(path), self.wish.seed, (index, candidate), self.wish.plant)

    def _take(self, said: Said) -> None:
        """Take a worker's message."""
        key, doing = self.doing.get(said.worker, (0, None))
        if said.kind == "say":
            if doing is not None:
                doing.now = str(said.value)
            return
        outcome = _outcome(said)
        if doing is None:
            return
        del self.doing[said.worker]
        self.ledger.end(key, outcome)
        for cell in outcome.strikes:
            self.struck[cell] = self.struck.get(cell, 0) + 1
        index, candidate = parse_name(doing.name)[1:]
        _tell_run(
            self.console,
            doing.name,
            doing.rig,
            outcome,
            self._repeat(doing.rig, index, candidate),
            doing.sentence,
        )

    def _spend(self, *, final: bool = False) -> None:
        """Put on record how long the campaign has run, now and then."""
        spent = time.monotonic() - self.began
        if final or spent - self._told_spent > _SPEND_S:
            self.ledger.spend(self.campaign, spent - self._told_spent)
            self._told_spent = spent

    # -- the display -------------------------------------------------------------------------

    @contextlib.contextmanager
    def _display(self) -> Iterator[Any]:
        if not self.console.is_terminal:
            yield lambda: None
            return
        bar = Progress(TextColumn("campaign"), BarColumn(), TextColumn("{task.fields[said]}"),
                       TimeElapsedColumn())  # fmt: skip
        task = bar.add_task("", total=self.wish.runs, said="")
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:

            def show() -> None:
                runs = self.ledger.runs(self.campaign)
                bar.update(
                    task,
                    completed=len({run.index for run in runs if run.outcome is not None}),
                    said=_in_short(runs),
                )
                live.update(Group(self._now(), coverage_table(self.struck), bar))

            yield show

    def _now(self) -> RenderableType:
        table = Table("run", "rig", "faults", "now", "s", expand=True)
        for _, doing in self.doing.values():
            seconds = f"{time.monotonic() - doing.since:.0f}"
            table.add_row(doing.name, doing.rig, doing.sentence, doing.now, seconds)
        return table


def _in_short(runs: Sequence[Run]) -> str:
    found = summarise(runs)
    return ", ".join(f"{count} {verdict}" for verdict, count in sorted(found.verdicts.items()))


def _tell_run(  # noqa: PLR0917 - a run and its names
    console: Console, name: str, rig: str, outcome: Performed, command: str, sentence: str = ""
) -> None:
    """One line for a run that passed; what there is to know of one that did not."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(f"{outcome.verdict} {name} on {rig} in {outcome.seconds:.0f} s")
    if outcome.verdict == PASS:
        return
    if sentence:
        say(f"  {sentence}")
    say(f"  {outcome.evidence.splitlines()[0] if outcome.evidence else ''}")
    if command:
        say(f"  repeat: {command}")
    if outcome.bundle:
        say(f"  bundle: {outcome.bundle}")


# -- tables --------------------------------------------------------------------------------------


def coverage_table(struck: Mapping[Cell, int]) -> Table:
    """States x faults: how many strikes, and by how many kinds of triggers."""
    families = sorted({cell.fault.split(" ")[0] for cell in struck})
    table = Table("state", *families, title="strikes / kinds of triggers", expand=False)
    for state in sorted({cell.state for cell in struck}):
        row = []
        for family in families:
            cells = [c for c in struck if c.state == state and c.fault.split(" ")[0] == family]
            strikes = sum(struck[cell] for cell in cells)
            row.append(f"{strikes}/{len({c.trigger for c in cells})}" if strikes else "")
        table.add_row(state, *row)
    return table


def told(
    ledger: Ledger, campaign: Campaign, cells: frozenset[Cell], paths: Mapping[str, str]
) -> Iterator[RenderableType]:
    """All that is to be said of a campaign that ended; `paths` are its rigs' files by name."""
    runs = ledger.runs(campaign)
    struck = ledger.struck(campaign)
    found = summarise(runs)
    covered = len(cells & set(struck))
    yield coverage_table(struck)
    yield (
        f"{covered} of {campaign.cells} cells (state x fault x trigger) struck, and"
        f" {len(set(struck) - cells)} that were not planned"
    )
    hours = max(campaign.spent_s, 1e-9) / 3600
    yield (
        f"{found.compositions} compositions in {found.runs} runs, {found.runs / hours:.0f} runs/h,"
        f" seed {campaign.seed}: {_in_short(runs)}"
    )
    yield f"{found.faults} faults armed, {found.faults - found.unfired} struck"
    yield (
        f"INFRASTRUCTURE: {found.infrastructure} of {found.runs} runs"
        f" ({share(found.infrastructure, found.runs)}), given up: {found.given_up}"
    )
    yield (
        f"flaky: {found.flaky} of {found.repeated} compositions that ran twice"
        f" ({share(found.flaky, found.repeated)})"
    )
    for one in flaky(runs):
        yield f"  {campaign.seed}/{one}"
    if found.boots_s:
        yield (
            f"{found.boots} starts took {found.boots_s:.0f} s, the client's commands"
            f" {found.work_s:.0f} s, all runs {found.seconds:.0f} s:"
            f" {found.seconds / found.boots_s:.2f} times the bare starts,"
            f" {found.seconds / (found.boots_s + found.work_s):.2f} times starts and commands"
        )
    bad = violating(runs)
    yield f"violations: {len(bad)}"
    for run in bad:
        assert run.outcome is not None
        name = name_of(campaign.seed, run.index, run.candidate)
        yield f"  {run.outcome.verdict} {name} on {run.rig}: {run.outcome.evidence}"
        rig = paths[run.rig]
        command = repeat_command(rig, campaign.seed, (run.index, run.candidate), campaign.plant)
        yield f"    {command}"
        if run.outcome.bundle:
            yield f"    brownout shrink {run.outcome.bundle}"


def share(part: int, whole: int) -> str:
    """A share in percent."""
    return "0 %" if not whole else f"{100 * part / whole:.1f} %"


def show_history(path: Path, console: Console) -> None:
    """The campaigns of a ledger over time, and what changed from each to the next of its seed.

    Raises:
        LedgerError: the ledger can't be read.
    """
    with Ledger(path, create=False) as ledger:
        campaigns = ledger.campaigns()
        table = Table(
            *("campaign", "started", "seed", "plant", "program", "runs", "runs/h", "violate"),
            *("flaky", "INFRA", "cells"),
            title=f"campaigns in {path}",
        )
        changes: list[str] = []
        last: dict[tuple[int, str], Campaign] = {}
        for campaign in campaigns:
            runs = ledger.runs(campaign)
            found = summarise(runs)
            hours = max(campaign.spent_s, 1e-9) / 3600
            name = str(campaign.number) + ("" if campaign.ended else " (unfinished)")
            table.add_row(
                name,
                campaign.started,
                str(campaign.seed),
                campaign.plant or "-",
                campaign.program,
                str(found.runs),
                f"{found.runs / hours:.0f}" if campaign.spent_s else "-",
                str(found.violating),
                f"{found.flaky}/{found.repeated}",
                share(found.infrastructure, found.runs),
                str(len(ledger.struck(campaign))),
            )
            before = last.get((campaign.seed, campaign.plant))
            if before is not None:
                changes += [
                    f"  {name_of(campaign.seed, now.index, now.candidate)} on {now.rig}:"
                    f" {was.outcome.verdict if was.outcome else ''} in campaign {before.number},"
                    f" {now.outcome.verdict if now.outcome else ''} in {campaign.number}"
                    for was, now in changed(ledger.runs(before), runs)
                ]
            last[campaign.seed, campaign.plant] = campaign
    console.print(table)
    console.print(f"verdicts that changed from a campaign to the next: {len(changes)}")
    for change in changes:
        console.print(change, highlight=False, markup=False)
