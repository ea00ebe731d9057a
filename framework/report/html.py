"""The offline report: one HTML file that fetches nothing, for one run or for thousands.

What a reader needs first is plain HTML and there without a script: the matrix (fault by the state
in which it struck), and the list of runs with the cause of each failure. What makes a run's own
page (its timeline, its console) is packed into the file, and unpacked by the file's own script
when that page is opened; so a report of a thousand runs opens as fast as one of ten.

The size is bounded (`PAYLOAD_BYTES`): the more runs, the less detail each has, and the page says
what was left out. Runs that failed are never left out. The script is our own: what it draws
(states, bytes, writes by place, faults, over one time axis) no chart library has as a chart.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from attrs import evolve, frozen
from markupsafe import Markup

from framework.report.boards import BoardStatistics
from framework.report.results import ResultError, ScenarioResult
from framework.report.story import STATES, cause_of, spans_of

TEMPLATE = "report.html.j2"
PAYLOAD_BYTES = 48 << 20
"""Most bytes that the runs' own pages take, all together."""
RUN_BYTES = 256 << 10
"""Most bytes that one run's page takes."""
MOST_RUNS = 5000
"""Most runs that are listed; the matrix counts all."""
MOST_MOMENTS = 2000
_SHORTEST = 20
_COMPRESSION = 6


def grade_of(verdict: str) -> str:
    """`held`, `broken`, or `rig` for what says nothing of the device."""
    if verdict == "PASS":
        return "held"
    return "rig" if verdict in ("INFRASTRUCTURE", "BROKEN") else "broken"


@frozen
class Cell:
    """Some runs, counted: those that held, broke, and say nothing."""

    held: int = 0
    broken: int = 0
    rig: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.held + self.broken + self.rig

    @property
    def grade(self) -> str:
        """The worst of them."""
        return "broken" if self.broken else "rig" if self.rig else "held" if self.held else ""

    def plus(self, grade: str) -> Cell:
        """With one more run of this grade."""
        return evolve(self, **{grade: getattr(self, grade) + 1})


@frozen
class MatrixRow:
    """One kind of fault: its family, its words, and a cell for each column."""

    family: str
    what: str
    cells: tuple[Cell, ...]


@frozen
class Matrix:
    """Faults by the states in which they struck.

    Attributes:
        columns: the states.
        rows: the faults, by family.
        places: of each run, the cells that it is in, as row and column.
    """

    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


def matrix_of(runs: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]) -> Matrix:
    """The matrix of runs, each its verdict and its strikes (family, fault, state).

    A run is in the cell of each fault that struck; one without a fault is in a row of its own.
    """
    used = {state for _, strikes in runs for _, _, state in strikes}
    columns = (
        *(state for state in STATES if state in used),
        *sorted(used - set(STATES)),
        *(["no fault"] if any(not strikes for _, strikes in runs) else []),
    )
    keys = sorted({(family, what) for _, strikes in runs for family, what, _ in strikes})
    if any(not strikes for _, strikes in runs):
        keys.append(("", "no fault"))
    rows = {key: [Cell()] * len(columns) for key in keys}
    places = []
    for verdict, strikes in runs:
        inside = []
        for family, what, state in dict.fromkeys(strikes) or [("", "no fault", "no fault")]:
            column = columns.index(state)
            cells = rows[family, what]
            cells[column] = cells[column].plus(grade_of(verdict))
            inside.append((keys.index((family, what)), column))
        places.append(tuple(inside))
    return Matrix(
        columns,
        tuple(MatrixRow(family, what, tuple(rows[family, what])) for family, what in keys),
        tuple(places),
    )


@frozen
class _Listed:
    """What the list says of one run, and its packed page."""

    result: ScenarioResult
    """Without what only its own page shows."""
    cause: str
    payload: str


def write_report(
    results: Collection[ScenarioResult],
    path: Path,
    title: str,
    boards: Sequence[BoardStatistics] = (),
) -> Path:
    """Write the report of `results` to `path`, whole or not at all.

    `results` is gone through twice; it may read each result when it is asked for it. `boards` are
    those of a farm, for a table of their own.

    Raises:
        ResultError: the file can't be written, or a result can't be read.
    """
    runs = [(r.verdict, _strikes(r)) for r in results]
    shown = _shown([verdict for verdict, _ in runs])
    budget = min(RUN_BYTES, PAYLOAD_BYTES // max(1, len(shown)))
    matrix = matrix_of(runs)
    listed: list[tuple[int, _Listed]] = []
    names: list[tuple[int, str]] = []
    for index, result in enumerate(results):
        if index in shown:
            listed.append((index, _list(result, budget)))
            names = names or [(f.invariant, f.name) for f in result.findings]
    script = _text("report.js")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("framework.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    grades = [grade_of(verdict) for verdict, _ in runs]
    # A lone surrogate, from a console that sent nonsense, can't be written as UTF-8.
    text = environment.get_template(TEMPLATE).render(
        title=title,
        boards=boards,
        matrix=matrix,
        listed=listed,
        names=names,
        runs=len(runs),
        counts=Cell(*(grades.count(grade) for grade in ("held", "broken", "rig"))),
        operations=sum(each.result.operation_count for _, each in listed),
        grade_of=grade_of,
        # Our own files, which are in this package.
        style=Markup(_text("report.css")),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _text(name: str) -> str:
    return resources.files("framework.report").joinpath(name).read_text(encoding="utf-8")


def _strikes(result: ScenarioResult) -> tuple[tuple[str, str, str], ...]:
    return tuple((strike.family, strike.what, strike.state) for strike in result.strikes)


def _shown(verdicts: Sequence[str]) -> frozenset[int]:
    """Which runs are listed: all that failed, and of the rest as many as there is room for."""
    by_weight = sorted(range(len(verdicts)), key=lambda at: grade_of(verdicts[at]) == "held")
    failed = sum(grade_of(verdict) != "held" for verdict in verdicts)
    return frozenset(by_weight[: max(MOST_RUNS, failed)])


def _list(result: ScenarioResult, budget: int) -> _Listed:
    payload = pack(result, budget)
    bare = evolve(result, moments=(), operations=(), regions=(), traffic=(), lines=(), facts={})
    return _Listed(bare, cause_of(result), payload)


def pack(result: ScenarioResult, budget: int) -> str:
    """What a run's page shows, as JSON, deflated, in base64; thinned until it fits in `budget`.

    Until it fits, every second operation and sample goes, and the older half of the console.
    """
    thin = 1
    while True:
        page = json.dumps(_page(result, thin), separators=(",", ":"))
        deflate = zlib.compressobj(_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
        packed = base64.b64encode(deflate.compress(page.encode()) + deflate.flush()).decode()
        most = max(
            len(result.operations), len(result.lines), len(result.traffic), len(result.moments)
        )
        if len(packed) <= budget or most // thin < _SHORTEST:
            return packed
        # By halves, and at once as many as are missing.
        thin *= 2 ** max(1, (len(packed) // budget).bit_length() - 1)


def _page(result: ScenarioResult, thin: int) -> dict[str, Any]:
    """The values of a run's page; the script's `show` reads them."""
    operations = result.operations[::thin]
    lines = result.lines[-max(1, len(result.lines) // thin) :]
    moments = result.moments[: MOST_MOMENTS // thin]
    return {
        "scenario": result.scenario,
        "title": result.title,
        "rig": result.rig,
        "fault": result.fault,
        "did": result.did,
        "verdict": result.verdict,
        "grade": grade_of(result.verdict),
        "cause": cause_of(result),
        "error": result.error,
        "seed": result.seed,
        "elapsed": round(result.elapsed_s, 3),
        "findings": [[f.invariant, f.name, f.held, f.evidence] for f in result.findings],
        "spans": [
            [s.name, round(s.begin_s, 3), round(s.end_s, 3)]
            for s in spans_of(result.moments, result.elapsed_s)
        ],
        "strikes": [[round(s.at_s, 3), s.family, s.what, s.state] for s in result.strikes],
        "moments": [[round(m.at_s, 3), m.source, m.text] for m in moments],
        "regions": [[r.name, r.device, r.offset, r.length] for r in result.regions],
        "operations": [
            [round(o.at_s, 4), o.number, o.kind, o.device, o.offset, o.length] for o in operations
        ],
        "left_out": [
            [what, shown, of]
            for what, shown, of in (
                ("disk operations", len(operations), result.operation_count),
                ("console lines", len(lines), len(result.lines)),
                ("moments", len(moments), len(result.moments)),
            )
            if shown < of
        ],
        "traffic": [[round(t.at_s, 3), t.up_bytes, t.down_bytes] for t in _ends(result, thin)],
        "lines": [[round(line.at_s, 3), line.direction, line.text] for line in lines],
        "facts": list(result.facts.items()),
    }


def _ends(result: ScenarioResult, thin: int) -> Iterable[Any]:
    """The thinned samples, always with the last one: it is the sum."""
    taken = list(result.traffic[::thin])
    if result.traffic and taken[-1] is not result.traffic[-1]:
        taken.append(result.traffic[-1])
    return taken
