"""`brownout record`, `explore` and `boot-state`: the explorer's commands, with their live displays.

What is judged and how is `framework.explore`'s; here are the rig that a recording came from, the
progress on a terminal, the tables, the bundles of violations, and the exit codes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import asdict, define, evolve, field, frozen
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.disk import MODELS, CacheModel, DiskError, JournalReader, Kind, model_from
from framework.disk.dmlogwrites import export_log, import_log
from framework.explore.bundle import BundleError, open_state, read_bundle, write_bundle
from framework.explore.deep import DATA_LIMIT, Deeper, DeepResult, DeepViolation, Retry
from framework.explore.ears import Ears
from framework.explore.examine import Bounds, Examination, Examiner, Violation
from framework.explore.judges.context import Context, ContextError
from framework.explore.recording import SUFFIX, Recording, RecordingError, write_recording
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import Coverage
from framework.explore.timeline import SOURCE
from framework.report import (
    CutPoint,
    ExplorationSection,
    Moment,
    OperationRecord,
    RegionRecord,
    write_exploration_report,
)
from framework.scenario.bench import open_bench_on
from framework.scenario.capture import record_updates
from framework.scenario.record import KINDS, PICTURE_OPERATIONS
from framework.targets.errors import RigError
from framework.targets.machine import Machine
from framework.targets.qemu import RecordedQEMUDriver
from framework.targets.rig import load_rig
from framework.targets.uut import BrownoutUpdater
from framework.terminal import keys, raw_terminal, show

JUDGES: Final = ("static", "data", "mount", "uboot", "coldboot")
DISHONEST: Final = ("lying", "sd")
"""Models of devices that have less on the medium than they say, whatever a system does: what they
do is told, and held against nobody."""

ALL: Final = ("kept", "prefix", "subset", "torn", "torn-page", "emmc", "discard", "lying")
"""What `--model all` means; `coverage_table` says which others there are."""

ALL_ON_CARD: Final = ("kept", "sd")
"""The same where an SD card takes part: it is sent no flush, so to all other models nothing on it
would ever be durable."""

EXIT_CLEAN: Final = 0
EXIT_VIOLATIONS: Final = 1
EXIT_DISAGREEMENT: Final = 3
MAX_BUNDLES: Final = 20
MAX_LEFT: Final = 5
ALL_MODELS: Final = "all"
RESTART: Final = "sync; reboot -f"


@frozen
class Wish:
    """What to explore, and how much of it.

    `accepted`: findings (model, invariant, rig or "" for any) that are known, and told apart.
    """

    models: tuple[CacheModel, ...]
    exhaustive_up_to: int
    samples: int
    seed: int
    judges: tuple[str, ...]
    bounds: Bounds
    accepted: frozenset[tuple[str, int, str]] = frozenset()


@frozen
class Run:
    """One exploration and what was found: of devices that keep their promises, or of others."""

    honest: bool
    found: Examination
    rig: str


def run_record(
    rig: Path,
    base: str,
    variants: Sequence[str],
    output: Path,
    console: Console,
    *,
    flip_percent: float | None = None,
) -> Path:
    """Record updates, one after the other.

    Raises BenchError, RigError, InfrastructureError or DiskError.
    """
    began = time.monotonic()
    with _spinner(console) as progress:
        task = progress.add_task(f"{rig.stem}: {base} to {', '.join(variants)}")
        path = record_updates(
            rig,
            base,
            variants,
            output,
            lambda text: progress.update(task, description=f"{rig.stem}: {text}"),
            flip_percent=flip_percent,
        )
    with Recording(path) as recording:
        operations = len(recording.reader.operations)
        console.print(
            f"{path}: {operations} operations, {path.stat().st_size / (1 << 20):.1f} MiB "
            f"({recording.header.journal_bytes / (1 << 20):.0f} MiB unpacked), "
            f"{recording.facts.get('outcome', '')}; {time.monotonic() - began:.0f} s"
        )
    return path


def run_record_scenario(rig: Path, scenario: str, output: Path, console: Console) -> bool:
    """Run a scenario with pytest, and record it; returns whether it passed.

    Raises DiskError if nothing was recorded: pytest has said why.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=output.parent) as folder:
        command = [*(sys.executable, "-m", "pytest"), scenario, "--lg-env", str(rig)]
        code = subprocess.run([*command, "--brownout-recordings", folder], check=False).returncode
        made = sorted(Path(folder).glob(f"*{SUFFIX}"))
        if len(made) != 1:
            raise DiskError(f"{scenario}: {len(made)} scenarios were recorded, not one (see above)")
        made[0].replace(output)
    console.print(f"{output}: {'recorded' if not code else 'the scenario failed; recorded'}")
    return code == 0


def _spinner(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


# ---------------------------------------------------------------- exploring


def parse_models(texts: Sequence[str]) -> tuple[CacheModel, ...]:
    """Models as on a command line: `torn`, `torn:granularity=4096`.

    `all` gives none here: which those are depends on the recording (`models_for`).

    Raises DiskError for one that there is not.
    """
    models: list[CacheModel] = []
    for text in texts:
        name, _, rest = text.partition(":")
        if name == ALL_MODELS:
            continue
        parameters: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            try:
                parameters[key] = json.loads(value)
            except ValueError:
                parameters[key] = value
        models.append(model_from(name, parameters))
    return tuple(models)


def models_for(wish: Wish, facts: Mapping[str, Any]) -> tuple[CacheModel, ...]:
    """The models that were asked for; all that make sense of a recording if none were named."""
    if wish.models:
        return wish.models
    names = ALL_ON_CARD if _on_card(facts) else ALL
    return tuple(model_from(name) for name in names)


def _on_card(facts: Mapping[str, Any]) -> bool:
    return "sd" in facts.get("interfaces", {}).values()


def machine_of(facts: Mapping[str, Any], rig: Path | None) -> Machine:
    """The machine to boot a recording's states on. Raises RigError."""
    pflash = facts.get("pflash")
    path = rig or Path("rigs") / f"{facts.get('rig', '')}.yaml"
    return machine_on(path, None if pflash is None else Path(pflash))


def machine_on(path: Path, pflash: Path | None = None) -> Machine:
    """The machine of a rig file; `pflash` replaces its own. Raises RigError."""
    target = load_rig(path).get_target("main")
    driver = None if target is None else target.get_driver("RecordedQEMUDriver", activate=False)
    if not isinstance(driver, RecordedQEMUDriver):
        raise RigError(f"{path}: has no RecordedQEMUDriver to boot a state on")
    driver.preflight()
    return driver.description(pflash)


@contextlib.contextmanager
def serve_retries(facts: Mapping[str, Any], rig: Path | None) -> Iterator[dict[str, Retry]]:
    """The recorded updates, served, to be tried again after a recovery.

    Raises BenchError or RigError if the rig or its images can't be used.
    """
    variants = [str(variant) for variant in facts.get("updates", ())]
    path = rig or Path("rigs") / f"{facts.get('rig', '')}.yaml"
    bench = open_bench_on(path, [str(facts.get("base", "v1")), *variants])
    with contextlib.closing(bench):
        updates = [bench.update(variant, bench.server.port) for variant in variants]
        yield {
            update.name: Retry(update.name, bench.uut.install(update.url), RESTART)
            for update in updates
        }


def ears_of(facts: Mapping[str, Any]) -> Ears:
    """What the console of a recording's machine says; ContextError for an unknown updater."""
    uut = BrownoutUpdater
    if facts.get("updater") != uut.name:
        raise ContextError(f"no updater {facts.get('updater')!r} is known here")
    return Ears(uut.boot_signs, uut.signs, uut.commit_state, artifact="")


@define
class _Display:
    """Shows what goes on: states a second, classes, judges."""

    progress: Progress
    began: float = field(factory=time.monotonic)
    _task: TaskID = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._task = self.progress.add_task("reading the recording")

    def exploring(self, what: str, states: int, classes: int) -> None:
        """The engine goes on."""
        rate = states / max(1e-6, time.monotonic() - self.began)
        self.progress.update(
            self._task,
            description=f"{what}: {states:,} states, {rate:,.0f}/s, {classes:,} classes",
        )

    def judging(self, judge: str, done: int, of: int) -> None:
        """A judge goes on."""
        self.progress.update(self._task, description=f"judge {judge}: {done:,} of {of:,}")


def run_explore(
    paths: Sequence[Path],
    wish: Wish,
    output: Path | None,
    console: Console,
    *,
    bases: Mapping[str, Path] | None = None,
    rig: Path | None = None,
    report: Path | None = None,
    as_json: bool = False,
) -> int:
    """Explore recordings, judge, print, leave bundles and a report; returns the exit code.

    Raises DiskError for a recording, RigError and InfrastructureError for the rig.
    """
    results = []
    sections = []
    for path in paths:
        with Recording(path, bases) as recording:
            folder = output or path.parent / f"{path.stem}-bundles"
            runs, result = _explore_one(recording, wish, folder, console, rig)
            sections.append(_section(recording, runs, result, wish))
        results.append(result)
        if not as_json:
            _print(console, result, runs, wish)
    codes = [int(result["exit_code"]) for result in results]
    code = next((c for c in (EXIT_DISAGREEMENT, EXIT_VIOLATIONS) if c in codes), EXIT_CLEAN)
    if report is not None:
        write_exploration_report(sections, report, "Brownout: every cut of an update")
    if as_json:
        console.print_json(json.dumps({"recordings": results, "exit_code": code}))
    elif report is not None:
        console.print(f"report: {report}")
    return code


def _explore_one(
    recording: Recording, wish: Wish, folder: Path, console: Console, rig: Path | None
) -> tuple[list[Run], dict[str, Any]]:
    """One recording: explored, judged, summed up, its bundles written."""
    began = time.monotonic()
    facts = recording.facts
    context = Context.of(recording.reader, facts)
    boots = {"mount", "uboot", "coldboot"} & set(wish.judges) or wish.bounds.deep
    machine = machine_of(facts, rig) if boots else None
    judges = set(wish.judges)
    if facts.get("bootloader") != "uboot":
        judges.discard("uboot")  # GRUB's decision is seen by a cold boot only
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(_spinner(console))
        context = evolve(context, views=BrownoutUpdater.data_views)
        examiner = Examiner(context, machine, ears_of(facts), _Display(progress), wish.seed)
        if wish.bounds.deep:
            retries = stack.enter_context(serve_retries(facts, rig))
            examiner.deeper = evolve(
                deeper_for(facts, retries), data=max(DATA_LIMIT, wish.bounds.data)
            )
        for models in _by_honesty(models_for(wish, facts)):
            exploration = examiner.explore(
                models, exhaustive_up_to=wish.exhaustive_up_to, samples=wish.samples
            )
            honest = models[0].name not in DISHONEST
            bounds = wish.bounds if honest else evolve(wish.bounds, mounts=0, cold_boots=0, deep=0)
            found = examiner.examine(exploration, judges, bounds)
            runs.append(Run(honest, found, str(facts.get("rig", ""))))
    bundles = _leave_bundles(recording, runs, folder, wish)
    return runs, summary(recording, runs, bundles, wish, time.monotonic() - began)


def deeper_for(facts: Mapping[str, Any], retries: Mapping[str, Retry]) -> Deeper:
    """How a recording's recoveries are cut again."""
    if not _on_card(facts):
        return Deeper(retries=retries)
    models = [model_from(name) for name in ALL_ON_CARD]
    return Deeper(
        models=tuple(m for m in models if m.name not in DISHONEST),
        apart=tuple(m for m in models if m.name in DISHONEST),
        retries=retries,
    )


def excuse(run: Run, violation: Violation | DeepViolation, wish: Wish) -> str:
    """Why a violation doesn't count, to stand before its number; empty if it does."""
    if isinstance(violation, DeepViolation):
        model = violation.second.model
    else:
        model = violation.state.model
    if model in DISHONEST:
        return "with a lying device "
    if violation.at_rest:
        return "with a medium that destroys data at rest "
    finding = (model, violation.invariant)
    known = {(*finding, ""), (*finding, run.rig)} & wish.accepted
    return "accepted finding " if known else ""


def _by_honesty(models: Sequence[CacheModel]) -> list[list[CacheModel]]:
    """Devices that keep their promises, and those that don't: explored apart, told apart."""
    honest = [model for model in models if model.name not in DISHONEST]
    return [group for group in (honest, [m for m in models if m not in honest]) if group]


def _leave_bundles(
    recording: Recording, runs: Sequence[Run], output: Path, wish: Wish
) -> list[str]:
    """A bundle for each violation, the most telling first, up to a bound."""
    made: list[str] = []
    told: set[tuple[int, str, int, str]] = set()
    for run, violation in most_telling(runs, wish):
        why_not = excuse(run, violation, wish)
        key = (violation.invariant, violation.evidence, violation.phase, why_not)
        if key in told or len(made) >= MAX_BUNDLES:
            continue
        told.add(key)
        name = f"invariant-{violation.invariant}-{violation.crash_class.key[:8]}-{violation.phase}"
        folder = write_bundle(
            output / name, recording, (violation.state,), _why(violation, run.honest)
        )
        made.append(str(folder))
    for _, result, deeper in _violations_below(runs, wish)[: max(0, MAX_BUNDLES - len(made))]:
        name = f"deep-{deeper.invariant}-{result.crash_class.key[:8]}-{len(made)}"
        folder = write_bundle(
            output / name,
            recording,
            (deeper.first, deeper.second),
            _why_deep(deeper),
            deeper.recovery,
        )
        made.append(str(folder))
    for run in runs:
        for number, booted in enumerate(run.found.disagreements[:MAX_BUNDLES]):
            name = f"disagreement-{booted.crash_class.key[:8]}-{number}"
            why = {
                "disagreement": booted.disagreement,
                "class": str(booted.crash_class),
                "state": str(booted.state),
            }
            made.append(str(write_bundle(output / name, recording, (booted.state,), why)))
    return made


def most_telling(runs: Sequence[Run], wish: Wish) -> list[tuple[Run, Violation]]:
    """All violations, the most telling first: what counts is never crowded out by what doesn't."""
    told = [(run, violation) for run in runs for violation in run.found.violations]
    return sorted(told, key=lambda t: (excuse(t[0], t[1], wish) != "", t[1].invariant, t[1].phase))


def _violations_below(
    runs: Sequence[Run], wish: Wish
) -> list[tuple[Run, DeepResult, DeepViolation]]:
    """The same of depth two."""
    told = [(run, one, v) for run in runs for one in run.found.deep for v in one.violations]
    return sorted(told, key=lambda t: (excuse(t[0], t[2], wish) != "", t[2].invariant, t[2].phase))


def _why(violation: Violation, honest: bool) -> dict[str, Any]:
    return {
        "invariant": violation.invariant,
        "evidence": violation.evidence,
        "judge": violation.judge,
        "class": str(violation.crash_class),
        "models": list(violation.crash_class.models),
        "honest_device": honest,
        "power_fails": f"{violation.promised}; operations {violation.span.first_operation} to "
        f"{violation.span.last_operation}",
        "state": str(violation.state),
    }


def _why_deep(violation: DeepViolation) -> dict[str, Any]:
    return {
        "invariant": violation.invariant,
        "evidence": violation.evidence,
        "judge": "depth two",
        "power_fails": violation.promised,
        "state": f"{violation.first}; then {violation.second}",
    }


def summary(
    recording: Recording, runs: Sequence[Run], bundles: list[str], wish: Wish, seconds: float
) -> dict[str, Any]:
    """Everything that a script may want of an exploration, as plain values."""
    violations: dict[tuple[int, bool], int] = {}
    for run in runs:
        deep = (v for result in run.found.deep for v in result.violations)
        for violation in itertools.chain[Violation | DeepViolation](run.found.violations, deep):
            key = (violation.invariant, not excuse(run, violation, wish))
            violations[key] = violations.get(key, 0) + 1
    disagreements = [b for run in runs for b in run.found.disagreements]
    counts = [run.found.exploration.counts for run in runs]
    outside = [run.found.exploration.outside for run in runs]
    code = EXIT_CLEAN
    if any(counts_against for _, counts_against in violations):
        code = EXIT_VIOLATIONS
    if disagreements:
        code = EXIT_DISAGREEMENT
    depth_two = [asdict(run.found.depth_two) for run in runs if run.found.depth_two]
    return {
        "recording": str(recording.path),
        "rig": recording.facts.get("rig"),
        "operations": len(recording.reader.operations),
        "points": sum(c.points for c in counts),
        "states": sum(c.states for c in counts),
        "product_states": sum(c.product_states for c in counts),
        "classes": sum(c.classes for c in counts),
        "classes_not_judged": sum(c.unkept for c in counts),
        "index_seconds": round(sum(c.index_seconds for c in counts), 3),
        "explore_seconds": round(sum(c.seconds for c in counts), 3),
        "seconds": round(seconds, 3),
        "coverage": [_row(row) for run in runs for row in run.found.exploration.coverage],
        "outside": {
            "operations": outside[0].operations,
            "sectors": outside[0].sectors,
        },
        "judges": [
            {
                "judge": c.judge if run.honest else f"{c.judge}, lying device",
                "looked_at": c.looked_at,
                "of": c.of,
                "unit": c.unit,
                "controls": c.controls,
                "violations": c.violations,
                "disagreements": c.disagreements,
                "seconds": round(c.seconds, 3),
                "per_hour": round(3600 * c.looked_at / c.seconds) if c.seconds else None,
            }
            for run in runs
            for c in run.found.counts
        ],
        "violations": [
            {"invariant": invariant, "counts": counts_against, "count": count}
            for (invariant, counts_against), count in sorted(violations.items())
        ],
        "disagreements": [b.disagreement for b in disagreements],
        "deep": [_deep_row(one, run, wish) for run in runs for one in run.found.deep],
        "depth_two": depth_two,
        "depth_two_told": depth_two_texts(depth_two),
        "bundles": bundles,
        "exit_code": code,
    }


def _deep_row(one: DeepResult, run: Run, wish: Wish) -> dict[str, Any]:
    counts = [exploration.counts for exploration in one.explorations]
    blamed = [v for v in one.violations if not excuse(run, v, wish)]
    return {
        "class": one.crash_class.key[:8],
        "members": one.members,
        "recovery": one.booted.did,
        "retried": one.retried,
        "states": sum(c.states for c in counts),
        "product_states": sum(c.product_states for c in counts),
        "classes": sum(c.classes for c in counts),
        "violations": len(blamed),
        "excused": len(one.violations) - len(blamed),
        "data_unchecked": one.unchecked,
    }


def _row(row: Coverage) -> dict[str, Any]:
    return {
        "model": row.model,
        "cycle": row.cycle,
        "first_operation": row.first_operation,
        "last_operation": row.last_operation,
        "how": row.how,
        "open_operations": row.open_operations,
        "points": row.points,
        "states": row.states,
        "classes": row.classes,
        "note": row.note,
    }


def _print(console: Console, result: Mapping[str, Any], runs: Sequence[Run], wish: Wish) -> None:
    console.rule(str(result["recording"]))
    rows = [row for run in runs for row in run.found.exploration.coverage]
    console.print(coverage_table(rows))
    table = Table(title="Judges")
    for name in ("Judge", "Looked at", "Of", "Controls", "Violations", "Disagreements", "s", "/h"):
        table.add_column(name, justify="left" if name == "Judge" else "right")
    for row in result["judges"]:
        table.add_row(
            f"{row['judge']} ({row['unit']})",
            *(f"{row[key]:,}" for key in ("looked_at", "of", "controls")),
            *(f"{row[key]:,}" for key in ("violations", "disagreements")),
            f"{row['seconds']:.1f}",
            "" if row["per_hour"] is None else f"{row['per_hour']:,}",
        )
    console.print(table)
    if result["deep"]:
        console.print(_deep_table(result["deep"]))
    for told in result["depth_two_told"]:
        console.print(told, highlight=False)
    _print_lines(
        console,
        (
            (
                excuse(run, v, wish),
                v.invariant,
                f"{v.promised}: {v.evidence} ({v.state.model}, judge {v.judge})",
            )
            for run, v in most_telling(runs, wish)
        ),
    )
    _print_lines(
        console,
        (
            (
                excuse(run, v, wish),
                v.invariant,
                f"at depth two, {v.promised}: {v.evidence} ({v.second.model})",
            )
            for run, _, v in _violations_below(runs, wish)
        ),
    )
    for text in result["disagreements"][:MAX_BUNDLES]:
        console.print(f"[magenta]DISAGREEMENT[/] {text}")
    for bundle in result["bundles"]:
        console.print(f"bundle: {bundle}")
    if result["classes_not_judged"]:
        left = result["classes_not_judged"]
        console.print(f"[yellow]{left:,} classes were only counted, and judged by nobody[/]")
    total = sum(row["count"] for row in result["violations"] if row["counts"])
    console.print(
        f"{result['states']:,} distinct states visited"
        f" and {result['product_states']:,} more by product, {result['classes']:,} classes, "
        f"{total} violations, {len(result['disagreements'])} disagreements; "
        f"{result['seconds']:.1f} s"
    )


def _print_lines(console: Console, lines: Iterable[tuple[str, int, str]]) -> None:
    """Excuse, invariant and text of violations, each once, up to a bound."""
    for why_not, invariant, text in list(dict.fromkeys(lines))[:MAX_BUNDLES]:
        blame = f"[yellow]{why_not}" if why_not else "[red]VIOLATION"
        console.print(f"{blame}({invariant})[/] {text}")


def _deep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What each recovery came to that was cut again."""
    table = Table(title="Depth two: recoveries that were cut again")
    for name in ("Class", "For", "Recovery", "Tried again", "States", "By product", "Classes"):
        table.add_column(name, justify="left" if name in ("Recovery", "Tried again") else "right")
    for name in ("Violations", "Excused", "Data not checked"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["class"],
            f"{row['members']:,}",
            row["recovery"],
            row["retried"],
            f"{row['states']:,}",
            short(row["product_states"]),
            *(f"{row[key]:,}" for key in ("classes", "violations", "excused", "data_unchecked")),
        )
    return table


def depth_two_texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What depth two covered, and what it did not."""
    texts = []
    for row in rows:
        texts.append(
            f"depth two: {row['classes']:,} classes recover in {row['keys']:,} ways; of each of "
            f"{row['booted']:,}, which stand for {row['covered']:,} classes, one was booted and "
            f"cut again; {row['controls']:,} control samples; the update tried again from "
            f"{row['retried']:,} distinct ends. What the bootloader, the repair and the system "
            f"find one after the other: {row['parts_shown']:,} of {row['parts']:,} different "
            "parts seen"
        )
        if row["unknown"]:
            texts.append(
                f"depth two: not known how {row['unknown']:,} classes recover, "
                "as their data partitions were not checked"
            )
        left = row["left"]
        if left:
            texts.append(
                f"depth two: not booted: {len(left):,} ways, {sum(n for _, n in left):,} classes"
            )
        texts += [f"  {count:,} classes: {key}" for key, count in left[:MAX_LEFT]]
        if len(left) > MAX_LEFT:
            texts.append(f"  and {len(left) - MAX_LEFT:,} more (all with --json)")
    return texts


def coverage_table(rows: Sequence[Coverage]) -> Table:
    """What was exhaustive, what sampled, what not modelled: one line a model and kind."""
    table = Table(title="Coverage")
    for name in ("Model", "How", "Epochs", "Most at stake", "Points", "Distinct states", "Note"):
        table.add_column(name, justify="left" if name in ("Model", "How", "Note") else "right")
    for texts in coverage_texts(rows):
        table.add_row(*texts)
    return table


def coverage_texts(rows: Sequence[Coverage]) -> list[tuple[str, ...]]:
    """The coverage table's cells."""
    groups: dict[tuple[str, str], list[Coverage]] = {}
    for row in rows:
        groups.setdefault((row.model, row.how), []).append(row)
    texts: list[tuple[str, ...]] = []
    for (model, how), members in groups.items():
        notes = sorted({row.note for row in members if row.note})
        more = f"; and {len(notes) - 1} more notes" if len(notes) > 1 else ""
        texts.append(
            (
                model,
                how,
                f"{len(members):,}",
                f"{max(row.open_operations for row in members):,}",
                short(sum(row.points for row in members)),
                short(sum(row.states for row in members)),
                (notes[0] if notes else "") + more,
            )
        )
    seen = {row.model for row in rows}
    for name in MODELS:
        if name not in seen:
            note = "a corner of subset" if name == "reordered" else ""
            texts.append((name, "not modelled", "", "", "", "", note))
    return texts


def _section(
    recording: Recording, runs: Sequence[Run], result: Mapping[str, Any], wish: Wish
) -> ExplorationSection:
    """A recording's part of the report."""
    journal = recording.reader
    table = journal.operations
    start = journal.header.created_monotonic_ns
    last = int(table.arrived_ns[-1]) if len(table) else start
    rows = [row for run in runs for row in run.found.exploration.coverage]
    strong = {"power": "power", SOURCE: "event", "qmp": "boot"}
    layout = Context.of(journal, recording.facts).layout
    told: dict[tuple[str, ...], None] = {}
    for run, violation in most_telling(runs, wish):
        text = (violation.promised, violation.evidence, violation.state.model, violation.judge)
        told[(str(violation.invariant), *text, excuse(run, violation, wish))] = None
    thin = max(1, len(table) // PICTURE_OPERATIONS)
    return ExplorationSection(
        title=recording.path.stem,
        outcome=str(recording.facts.get("outcome", "")),
        result=result,
        coverage=coverage_texts(rows),
        violations=list(told)[:MAX_BUNDLES],
        operations=tuple(
            OperationRecord(
                at_s=(int(table.arrived_ns[row]) - start) / 1e9,
                number=int(table.number[row]),
                kind=KINDS[Kind(int(table.kind[row]))],
                device=journal.devices[int(table.device[row])],
                offset=int(table.offset[row]),
                length=int(table.length[row]),
            )
            for row in range(0, len(table), thin)
        ),
        operation_count=len(table),
        moments=tuple(
            Moment((mark.time_ns - start) / 1e9, strong[mark.source], mark.text)
            for mark in journal.marks
            if mark.source in strong
        ),
        regions=tuple(
            RegionRecord(region.name, part.device, part.offset, part.length)
            for region in layout.all_regions()
            for part in region.ranges[:1]
        ),
        elapsed_s=(last - start) / 1e9,
        cuts=_cut_points(journal, runs, wish),
    )


def _cut_points(journal: JournalReader, runs: Sequence[Run], wish: Wish) -> tuple[CutPoint, ...]:
    """The worst verdict of each cut point."""
    count = len(journal.operations)
    classes = [0] * (count + 2)
    worst: list[tuple[str, str]] = [("held", "")] * (count + 1)
    for run in runs:
        for crash_class in run.found.exploration.classes:
            for span in crash_class.spans:
                classes[span.first_operation] += 1
                classes[min(span.last_operation, count) + 1] -= 1
    for run, violation in reversed(most_telling(runs, wish)):
        verdict = "accepted" if excuse(run, violation, wish) else "broken"
        text = f"invariant {violation.invariant}, {violation.state.model}: {violation.evidence}"
        for number in range(
            violation.span.first_operation, min(violation.span.last_operation, count) + 1
        ):
            if verdict == "broken" or worst[number][0] == "held":
                worst[number] = (verdict, text)
    start = journal.header.created_monotonic_ns
    times = [start, *journal.operations.arrived_ns.tolist()]
    return tuple(
        CutPoint(
            (times[number] - start) / 1e9,
            number,
            worst[number][0],
            worst[number][1] or f"{total:,} classes of crash states, all held",
        )
        for number, total in enumerate(itertools.accumulate(classes[: count + 1]))
    )


def short(count: int) -> str:
    """A count that may be astronomic."""
    return f"{count:,}" if count < 10**12 else f"about 10^{len(str(count)) - 1}"


# ---------------------------------------------------------------- booting a state


def run_boot_state(
    folder: Path,
    console: Console,
    *,
    recording: Path | None = None,
    bases: Mapping[str, Path] | None = None,
    rig: Path | None = None,
    export: Path | None = None,
    export_as_log: Path | None = None,
) -> None:
    """Boot a bundle's state with the console attached, or export its disks.

    `export` gets raw images, `export_as_log` dm-log-writes logs that make the state of the base
    images. Raises DiskError, RigError or InfrastructureError.
    """
    bundle = read_bundle(folder)
    if export_as_log is not None and len(bundle.states) > 1:
        raise BundleError(f"bundle {folder}: a state at depth two has no single log; use --export")
    with (
        Recording(recording or bundle.recording, bases) as opened,
        open_state(bundle, opened) as disks,
    ):
        for key in ("invariant", "evidence", "disagreement", "power_fails", "state"):
            if key in bundle.why:
                console.print(f"{key.replace('_', ' ')}: {bundle.why[key]}", highlight=False)
        if export is not None:
            for name, disk in disks.items():
                target = _one_a_disk(export, name, disks)
                disk.export(target, zero_unreadable=True)
                holes = disk.unreadable()
                note = f" ({len(holes)} unreadable ranges became zeros)" if holes else ""
                console.print(f"{name}: {target}{note}")
        if export_as_log is not None:
            state = bundle.states[0]
            for name in disks:
                target = _one_a_disk(export_as_log, name, disks)
                entries = export_log(
                    opened.reader,
                    name,
                    target,
                    cycle=opened.reader.cycle_of(state.operation),
                    until=state.operation,
                    decision=state.decision,
                )
                console.print(f"{name}: {target}, {entries} entries")
        if export is not None or export_as_log is not None:
            return
        machine = machine_of(opened.facts, rig)
        with Workplace() as place, StateMachine(machine, disks, place) as running:
            console.print("console attached; Ctrl-] ends it")
            with raw_terminal():
                running.converse(keys, show)


def _one_a_disk(path: Path, name: str, disks: Mapping[str, object]) -> Path:
    return path if len(disks) == 1 else path.with_stem(f"{path.stem}-{name}")


def run_import(log: Path, base: Path, facts: Path, device: str, output: Path) -> Path:
    """Make a recording of a dm-log-writes log from a board; `facts`: JSON, see RECORDING.md.

    Raises DiskError for any of the files.
    """
    try:
        told = json.loads(facts.read_text(encoding="utf-8"))
        told.setdefault("base_hints", {device: str(base.resolve())})
    except (OSError, ValueError, AttributeError) as error:
        raise RecordingError(facts, f"not facts in JSON: {error}") from error
    with tempfile.TemporaryDirectory(prefix="brownout-import-") as folder:
        journal = Path(folder) / "disk.journal"
        import_log(log, base, journal, device=device)
        Context.of(JournalReader(journal), told)
        return write_recording(journal, output, told)
