"""`brownout record`, `explore` and `boot-state`: the explorer's commands, with their live displays.

What is judged and how is `framework.explore`'s; here are the rig that a recording came from, the
progress on a terminal, the tables, the bundles of violations, and the exit codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import define, evolve, field, frozen
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from framework.disk import MODELS, CacheModel, model_from
from framework.explore.bundle import open_state, read_bundle, write_bundle
from framework.explore.deep import DeepViolation
from framework.explore.ears import Ears
from framework.explore.examine import Bounds, Examination, Examiner, Violation
from framework.explore.judges.context import Context, ContextError
from framework.explore.plain import explore_plainly
from framework.explore.recording import Recording
from framework.explore.serve import StateMachine, Workplace
from framework.explore.states import Coverage
from framework.scenario.capture import record_updates
from framework.targets.errors import RigError
from framework.targets.machine import Machine
from framework.targets.qemu import RecordedQEMUDriver
from framework.targets.rig import load_rig
from framework.targets.uut import BrownoutUpdater

JUDGES: Final = ("static", "data", "uboot", "coldboot")
DISHONEST: Final = ("lying",)
"""Models of devices that break their own promise: what they do is told, and held against nobody."""

ALL: Final = ("kept", "prefix", "subset", "torn", "torn-page", "emmc", "lying")
"""What `--model all` means; `coverage_table` says which others there are."""

EXIT_CLEAN: Final = 0
EXIT_VIOLATIONS: Final = 1
EXIT_DISAGREEMENT: Final = 3
MAX_BUNDLES: Final = 20
_ESCAPE: Final = b"\x1d"  # Ctrl-]


@frozen
class Wish:
    """What to explore, and how much of it."""

    models: tuple[CacheModel, ...]
    exhaustive_up_to: int
    samples: int
    seed: int
    judges: tuple[str, ...]
    bounds: Bounds
    plain: bool = False


@frozen
class Run:
    """One exploration and what was found: of devices that keep their promises, or of others."""

    honest: bool
    found: Examination


def run_record(
    rig: Path, base: str, variants: Sequence[str], output: Path, console: Console
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
        )
    with Recording(path) as recording:
        operations = len(recording.reader.operations)
        console.print(
            f"{path}: {operations} operations, {path.stat().st_size / (1 << 20):.1f} MiB "
            f"({recording.header.journal_bytes / (1 << 20):.0f} MiB unpacked), "
            f"{recording.facts.get('outcome', '')}; {time.monotonic() - began:.0f} s"
        )
    return path


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
    """Models as on a command line: `torn`, `torn:granularity=4096`, `all`.

    Raises DiskError for one that there is not.
    """
    models: list[CacheModel] = []
    for text in texts:
        name, _, rest = text.partition(":")
        if name == "all":
            models += [model_from(known) for known in ALL]
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


def machine_of(facts: Mapping[str, Any], rig: Path | None) -> Machine:
    """The machine to boot a recording's states on. Raises RigError."""
    path = rig or Path("rigs") / f"{facts.get('rig', '')}.yaml"
    target = load_rig(path).get_target("main")
    driver = None if target is None else target.get_driver("RecordedQEMUDriver", activate=False)
    if not isinstance(driver, RecordedQEMUDriver):
        raise RigError(f"{path}: has no RecordedQEMUDriver to boot a state on")
    driver.preflight()
    pflash = facts.get("pflash")
    return driver.description(None if pflash is None else Path(pflash))


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
    path: Path,
    wish: Wish,
    output: Path,
    console: Console,
    *,
    bases: Mapping[str, Path] | None = None,
    rig: Path | None = None,
    as_json: bool = False,
) -> int:
    """Explore a recording, judge, print, leave bundles; returns the exit code.

    Raises DiskError for the recording, RigError and InfrastructureError for the rig.
    """
    began = time.monotonic()
    with Recording(path, bases) as recording:
        context = Context.of(recording.reader, recording.facts)
        boots = {"uboot", "coldboot"} & set(wish.judges) or wish.bounds.deep
        machine = machine_of(recording.facts, rig) if boots else None
        judges = set(wish.judges)
        if recording.facts.get("bootloader") != "uboot":
            judges.discard("uboot")  # GRUB's decision is seen by a cold boot only
        runs: list[Run] = []
        with _spinner(console) as progress:
            examiner = Examiner(
                context, machine, ears_of(recording.facts), _Display(progress), wish.seed
            )
            for models in _by_honesty(wish.models):
                if wish.plain:
                    exploration = explore_plainly(
                        context.journal, context.layout, exhaustive_up_to=wish.exhaustive_up_to
                    )
                else:
                    exploration = examiner.explore(
                        models, exhaustive_up_to=wish.exhaustive_up_to, samples=wish.samples
                    )
                honest = models[0].name not in DISHONEST
                bounds = wish.bounds if honest else evolve(wish.bounds, cold_boots=0, deep=0)
                runs.append(Run(honest, examiner.examine(exploration, judges, bounds)))
        bundles = _leave_bundles(recording, runs, output)
        result = summary(path, recording, runs, bundles, time.monotonic() - began)
    if as_json:
        console.print_json(json.dumps(result))
    else:
        _print(console, result, runs)
    return int(result["exit_code"])


def _by_honesty(models: Sequence[CacheModel]) -> list[list[CacheModel]]:
    """Devices that keep their promises, and those that don't: explored apart, told apart."""
    honest = [model for model in models if model.name not in DISHONEST]
    return [group for group in (honest, [m for m in models if m not in honest]) if group]


def _leave_bundles(recording: Recording, runs: Sequence[Run], output: Path) -> list[str]:
    """A bundle for each violation, the most telling first, up to a bound."""
    made: list[str] = []
    told: set[tuple[int, str, int]] = set()
    for run, violation in _violations(runs):
        key = (violation.invariant, violation.evidence, violation.phase)
        if key in told or len(made) >= MAX_BUNDLES:
            continue
        told.add(key)
        name = f"invariant-{violation.invariant}-{violation.crash_class.key[:8]}-{violation.phase}"
        folder = write_bundle(
            output / name, recording, (violation.state,), _why(violation, run.honest)
        )
        made.append(str(folder))
    for result in (result for run in runs for result in run.found.deep):
        for deeper in result.violations[: max(0, MAX_BUNDLES - len(made))]:
            name = f"deep-{deeper.invariant}-{result.crash_class.key[:8]}-{len(made)}"
            folder = write_bundle(
                output / name,
                recording,
                (deeper.first, deeper.second),
                _why_deep(deeper),
                deeper.recovery,
            )
            made.append(str(folder))
    return made


def _violations(runs: Sequence[Run]) -> list[tuple[Run, Violation]]:
    """All violations, the most telling first."""
    told = [(run, violation) for run in runs for violation in run.found.violations]
    return sorted(told, key=lambda t: (not t[0].honest, t[1].invariant, t[1].phase))


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
    path: Path, recording: Recording, runs: Sequence[Run], bundles: list[str], seconds: float
) -> dict[str, Any]:
    """Everything that a script may want of an exploration, as plain values."""
    violations: dict[tuple[int, bool], int] = {}
    for run in runs:
        numbers = [violation.invariant for violation in run.found.violations]
        numbers += [v.invariant for result in run.found.deep for v in result.violations]
        for number in numbers:
            key = (number, run.honest)
            violations[key] = violations.get(key, 0) + 1
    disagreements = [b for run in runs for b in run.found.disagreements]
    counts = [run.found.exploration.counts for run in runs]
    outside = [run.found.exploration.outside for run in runs]
    code = EXIT_CLEAN
    if any(is_honest for _, is_honest in violations):
        code = EXIT_VIOLATIONS
    if disagreements:
        code = EXIT_DISAGREEMENT
    return {
        "recording": str(path),
        "rig": recording.facts.get("rig"),
        "operations": len(recording.reader.operations),
        "points": sum(c.points for c in counts),
        "states": sum(c.states for c in counts),
        "product_states": sum(c.product_states for c in counts),
        "classes": sum(c.classes for c in counts),
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
            {"invariant": invariant, "honest_device": is_honest, "count": count}
            for (invariant, is_honest), count in sorted(violations.items())
        ],
        "disagreements": [b.disagreement for b in disagreements],
        "bundles": bundles,
        "exit_code": code,
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


def _print(console: Console, result: Mapping[str, Any], runs: Sequence[Run]) -> None:
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
    shown: set[tuple[int, str, str]] = set()
    for run, violation in _violations(runs):
        line = (violation.invariant, violation.evidence, violation.promised)
        if line in shown or len(shown) >= MAX_BUNDLES:
            continue
        shown.add(line)
        blame = "[red]VIOLATION" if run.honest else "[yellow]with a lying device: "
        console.print(
            f"{blame}({violation.invariant})[/] {violation.promised}: {violation.evidence} "
            f"({violation.state.model}, judge {violation.judge})"
        )
    for text in result["disagreements"][:MAX_BUNDLES]:
        console.print(f"[magenta]DISAGREEMENT[/] {text}")
    for bundle in result["bundles"]:
        console.print(f"bundle: {bundle}")
    total = sum(row["count"] for row in result["violations"] if row["honest_device"])
    console.print(
        f"{result['states']:,} distinct states visited"
        f" and {result['product_states']:,} more by product, {result['classes']:,} classes, "
        f"{total} violations, {len(result['disagreements'])} disagreements; "
        f"{result['seconds']:.1f} s"
    )


def coverage_table(rows: Sequence[Coverage]) -> Table:
    """What was exhaustive, what sampled, what not modelled: one line a model and kind."""
    table = Table(title="Coverage")
    for name in ("Model", "How", "Epochs", "Most at stake", "Points", "Distinct states", "Note"):
        table.add_column(name, justify="left" if name in ("Model", "How", "Note") else "right")
    groups: dict[tuple[str, str], list[Coverage]] = {}
    for row in rows:
        groups.setdefault((row.model, row.how), []).append(row)
    for (model, how), members in groups.items():
        notes = "; ".join(dict.fromkeys(row.note for row in members if row.note))
        table.add_row(
            model,
            how,
            f"{len(members):,}",
            f"{max(row.open_operations for row in members):,}",
            short(sum(row.points for row in members)),
            short(sum(row.states for row in members)),
            notes,
        )
    seen = {row.model for row in rows}
    for name in MODELS:
        if name not in seen:
            note = "a corner of subset" if name == "reordered" else ""
            table.add_row(name, "not modelled", "", "", "", "", note)
    return table


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
) -> None:
    """Boot a bundle's state with the console attached, or export its disks.

    Raises DiskError, RigError or InfrastructureError.
    """
    bundle = read_bundle(folder)
    with (
        Recording(recording or bundle.recording, bases) as opened,
        open_state(bundle, opened) as disks,
    ):
        for key in ("invariant", "evidence", "power_fails", "state"):
            if key in bundle.why:
                console.print(f"{key.replace('_', ' ')}: {bundle.why[key]}", highlight=False)
        if export is not None:
            for name, disk in disks.items():
                target = export if len(disks) == 1 else export.with_stem(f"{export.stem}-{name}")
                disk.export(target, zero_unreadable=True)
                holes = disk.unreadable()
                note = f" ({len(holes)} unreadable ranges became zeros)" if holes else ""
                console.print(f"{name}: {target}{note}")
            return
        machine = machine_of(opened.facts, rig)
        with Workplace() as place, StateMachine(machine, disks, place) as running:
            console.print("console attached; Ctrl-] ends it")
            with _raw_terminal():
                running.converse(_keys, _show)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _keys() -> bytes | None:
    """What was typed since the last call; None: the end."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    if not ready:
        return b""
    data = os.read(sys.stdin.fileno(), 4096)
    return None if not data or _ESCAPE in data else data


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Keys go to the machine one by one, if this is a terminal; restored whatever happens."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
