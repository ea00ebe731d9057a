"""What was seen of each board and scenario, run after run: one SQLite file.

Every attempt is a row, written when it ended, with its boots in one transaction. Statistics are
computed from the rows when they are asked for, never kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from framework.database import Database, Form, utc_now
from framework.report import BoardStatistics
from framework.targets.errors import RigError

__all__ = ["Attempt", "History", "percentile"]

VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    board TEXT NOT NULL,
    place TEXT NOT NULL,
    scenario TEXT NOT NULL,
    verdict TEXT NOT NULL,
    reason TEXT NOT NULL,
    seconds REAL NOT NULL,
    cycles INTEGER NOT NULL,
    ended TEXT NOT NULL
) STRICT;
CREATE INDEX attempt_of_place ON attempt (place);
CREATE TABLE boot (
    attempt INTEGER NOT NULL REFERENCES attempt(id),
    seconds REAL NOT NULL,
    ready INTEGER NOT NULL
) STRICT;
CREATE INDEX boot_of_attempt ON boot (attempt);
"""
_FORM: Final = Form("history", "farm's history", 0x42524F46, VERSION, _SCHEMA, RigError)


@frozen
class Attempt:
    """One scenario on one place.

    Attributes:
        run: the farm run.
        board: the tags that were asked for, such as `board=rpi4`.
        place: where it ran; empty if no worker got that far.
        verdict: PASS, FAILED, BROKEN or INFRASTRUCTURE (skipped ones are no attempts).
        reason: why it did not pass.
        cycles: how often power was switched on.
        boots: seconds of each boot, and whether it got ready.
    """

    run: str
    board: str
    place: str
    scenario: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    cycles: int = 0
    boots: tuple[tuple[float, bool], ...] = ()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * round(share * 1000) // 1000)  # rounded up, in whole numbers
    return ordered[max(0, rank - 1)]


class History(Database):
    """The file. RigError, here and later, if it can't be used."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _FORM)

    def add(self, attempt: Attempt) -> None:
        """Enter an attempt that has ended."""
        with self.transaction():
            key = self.execute(
                "INSERT INTO attempt (run, board, place, scenario, verdict, reason, seconds, "
                "cycles, ended) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(attempt.run, attempt.board, attempt.place, attempt.scenario),
                    *(attempt.verdict, attempt.reason, attempt.seconds, attempt.cycles, utc_now()),
                ),
            ).lastrowid
            self.executemany(
                "INSERT INTO boot (attempt, seconds, ready) VALUES (?, ?, ?)",
                [(key, seconds, int(ready)) for seconds, ready in attempt.boots],
            )

    def seconds(self, board: str) -> dict[str, float]:
        """How long each scenario took on such boards, where it passed: the median."""
        taken: dict[str, list[float]] = {}
        for scenario, seconds in self.rows(
            "SELECT scenario, seconds FROM attempt WHERE verdict = 'PASS' AND board = ?", (board,)
        ):
            taken.setdefault(scenario, []).append(seconds)
        return {scenario: statistics.median(all_) for scenario, all_ in taken.items()}

    def boards(self, run: str = "") -> list[BoardStatistics]:
        """What was seen of each place (in one `run`, if it is named), by name."""
        given = (run, run)
        boots: dict[str, list[tuple[float, bool]]] = {}
        for place, seconds, ready in self.rows(
            "SELECT place, boot.seconds, ready FROM boot JOIN attempt ON attempt.id = boot.attempt "
            "WHERE place != '' AND (? = '' OR run = ?)",
            given,
        ):
            boots.setdefault(place, []).append((seconds, bool(ready)))
        found = []
        for place, attempts, failures, infrastructure, cycles, last in self.rows(
            "SELECT place, count(*), sum(verdict IN ('FAILED', 'BROKEN')), "
            "sum(verdict = 'INFRASTRUCTURE'), sum(cycles), max(ended) FROM attempt "
            "WHERE place != '' AND (? = '' OR run = ?) GROUP BY place ORDER BY place",
            given,
        ):
            seen = boots.get(place, [])
            good = [seconds for seconds, ready in seen if ready]
            found.append(
                BoardStatistics(
                    place=place,
                    attempts=attempts,
                    failures=failures,
                    infrastructure=infrastructure,
                    cycles=cycles,
                    boots=len(good),
                    boot_median_s=statistics.median(good) if good else None,
                    boot_p95_s=percentile(good, 0.95) if good else None,
                    unready=len(seen) - len(good),
                    last=last,
                )
            )
        return found
