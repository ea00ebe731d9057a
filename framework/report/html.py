"""The offline report: one HTML file, no script, no font, no picture from anywhere else."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2
from markupsafe import Markup

from framework.report.picture import draw
from framework.report.results import ResultError, ScenarioResult

TEMPLATE = "report.html.j2"


def write_report(results: list[ScenarioResult], path: Path, title: str) -> Path:
    """Write the report of `results` to `path`, whole or not at all.

    Raises:
        ResultError: the file can't be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("framework.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {
        # The picture is made of our own markup; every text in it went through escape().
        result.scenario: Markup(  # noqa: S704
            draw(result.operations, result.moments, result.regions, result.elapsed_s)
        )
        for result in results
        if result.regions
    }
    text = environment.get_template(TEMPLATE).render(
        title=title,
        results=results,
        pictures=pictures,
        names=[(f.invariant, f.name) for f in results[0].findings] if results else [],
        passed=sum(result.passed for result in results),
        operations=sum(result.operation_count for result in results),
    )
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror}") from error
    return path
