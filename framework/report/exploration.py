"""The report of explorations: for each recording a picture, what was covered, and what broke.

One offline HTML file like the scenarios' (`html.py`). The picture shows time from left to right and
the disk's regions from top to bottom; below them every cut point with its verdict: green where
every crash state of every model held, red where one did not, amber where only a device that
breaks its promises shows it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from attrs import frozen
from markupsafe import Markup

from framework.report.picture import CutPoint, draw
from framework.report.results import Moment, OperationRecord, RegionRecord, ResultError

TEMPLATE = "exploration.html.j2"


@frozen
class ExplorationSection:
    """One recording's part of the report.

    Attributes:
        title: the recording's name.
        outcome: what the recorded run did.
        result: the exploration's numbers, as `brownout explore --json` has them.
        coverage: rows of texts: model, how, epochs, most at stake, points, states, note.
        violations: rows of texts: invariant, when, evidence, model, judge, whose fault.
        operations, operation_count, moments, regions, elapsed_s: the picture, as a scenario's.
        cuts: every cut point with its verdict.
    """

    title: str
    outcome: str
    result: Mapping[str, Any]
    coverage: Sequence[Sequence[str]]
    violations: Sequence[Sequence[str]]
    operations: tuple[OperationRecord, ...]
    operation_count: int
    moments: tuple[Moment, ...]
    regions: tuple[RegionRecord, ...]
    elapsed_s: float
    cuts: tuple[CutPoint, ...]


def write_exploration_report(
    sections: Sequence[ExplorationSection], path: Path, title: str
) -> Path:
    """Write the report to `path`, whole or not at all. Raises ResultError."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("framework.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [
        # Our own markup; every text in it went through escape().
        Markup(draw(s.operations, s.moments, s.regions, s.elapsed_s, s.cuts))  # noqa: S704
        for s in sections
    ]
    text = environment.get_template(TEMPLATE).render(
        title=title, sections=list(zip(sections, pictures, strict=True))
    )
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror}") from error
    return path
