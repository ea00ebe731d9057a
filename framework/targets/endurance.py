"""Power cycles by the hundred: does the board come back each time, and does the rig keep its grip?

A cycle switches the power of a running board off, verified as in a check (what the head says, and a
console that is silent and echoes nothing), and on again until its READY line with a boot that was
never seen. Each is a row of an SQLite file, written when it has ended: the same command goes on
where it was interrupted. A cycle that the rig spoilt says nothing of the board; it is counted apart
and done again, a bounded number of times in a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import frozen

from framework.database import Database, Form, utc_now
from framework.targets.blame import infrastructure_in
from framework.targets.errors import RigError
from framework.targets.strategy import SlotStrategy

__all__ = ["Cycle", "CycleRecord", "Tally", "endure"]

SPOILT_IN_A_ROW = 3
READY, NOT_READY, INFRASTRUCTURE = "ready", "NOT READY", "INFRASTRUCTURE"
_SCHEMA: Final = """
CREATE TABLE cycle (
    id INTEGER PRIMARY KEY,
    board TEXT NOT NULL,
    verdict TEXT NOT NULL,
    fact TEXT NOT NULL,
    seconds REAL NOT NULL,
    boot_s REAL NOT NULL,
    ended TEXT NOT NULL
) STRICT;
CREATE INDEX cycle_of_board ON cycle (board);
"""
_FORM: Final = Form("record", "record of power cycles", 0x42524F43, 1, _SCHEMA, RigError)


@frozen
class Cycle:
    """One power cycle.

    Attributes:
        verdict: `ready`, `NOT READY` (the board's doing), or `INFRASTRUCTURE` (the rig's).
        fact: what came up, or what went wrong.
        seconds: how long all of it took.
        boot_s: from power on to the READY line; 0 if there was none.
    """

    verdict: str
    fact: str
    seconds: float
    boot_s: float = 0.0


@frozen
class Tally:
    """What became of a board's cycles so far.

    Attributes:
        board: the place, or the rig's name.
        ready, not_ready: cycles that say something of the board.
        spoilt: those that the rig spoilt.
        boots_s: how long each boot took.
    """

    board: str
    ready: int
    not_ready: int
    spoilt: int
    boots_s: tuple[float, ...]

    @property
    def done(self) -> int:
        """How many cycles count."""
        return self.ready + self.not_ready

    @property
    def spoilt_share(self) -> float:
        """The share of cycles that ended INFRASTRUCTURE, of all that were begun."""
        return self.spoilt / (self.done + self.spoilt) if self.spoilt else 0.0

    def __str__(self) -> str:
        """One line."""
        boots = ""
        if self.boots_s:
            boots = (
                f"; boots {statistics.median(self.boots_s):.1f} s "
                f"({min(self.boots_s):.1f} to {max(self.boots_s):.1f})"
            )
        return (
            f"{self.board}: {self.done} power cycles: {self.ready} ready, {self.not_ready} not; "
            f"{self.spoilt} INFRASTRUCTURE ({100 * self.spoilt_share:.1f} %){boots}"
        )


class CycleRecord(Database):
    """The file. RigError, here and later, if it can't be used."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _FORM)

    def add(self, board: str, cycle: Cycle) -> None:
        """Enter a cycle that has ended."""
        self.execute(
            "INSERT INTO cycle (board, verdict, fact, seconds, boot_s, ended) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (board, cycle.verdict, cycle.fact, cycle.seconds, cycle.boot_s, utc_now()),
        )

    def tally(self, board: str) -> Tally:
        """A board's cycles so far."""
        rows = self.rows("SELECT verdict, boot_s FROM cycle WHERE board = ?", (board,))
        verdicts = [verdict for verdict, _ in rows]
        return Tally(
            board,
            *(verdicts.count(READY), verdicts.count(NOT_READY), verdicts.count(INFRASTRUCTURE)),
            tuple(boot_s for verdict, boot_s in rows if verdict == READY),
        )


def endure(
    strategy: SlotStrategy,
    record: CycleRecord,
    board: str,
    cycles: int,
    *,
    seconds: float | None = None,
    say: Callable[[int, Cycle], None] = lambda number, cycle: None,
) -> Tally:
    """Cycle a board, which must be ours alone, until it has had `cycles` in all; it is off then.

    Ends early after `seconds`, and after the rig has spoilt `SPOILT_IN_A_ROW` one after another.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    spoilt = 0
    done = record.tally(board).done
    while done < cycles and spoilt < SPOILT_IN_A_ROW:
        if deadline is not None and time.monotonic() >= deadline:
            break
        cycle = _cycle(strategy)
        record.add(board, cycle)
        spoilt = spoilt + 1 if cycle.verdict == INFRASTRUCTURE else 0
        done += not spoilt
        say(done, cycle)
    _put_away(strategy)
    return record.tally(board)


def _cycle(strategy: SlotStrategy) -> Cycle:
    began = time.monotonic()
    try:
        strategy.invalidate()  # off is verified even where the last cycle left it off
        strategy.transition("off")
        outcome = strategy.boot(adopt=False)
    except Exception as error:
        fact = infrastructure_in(error)
        if not fact:
            raise
        return Cycle(INFRASTRUCTURE, fact, time.monotonic() - began)
    seconds = time.monotonic() - began
    if outcome.boot is None:
        return Cycle(NOT_READY, str(outcome).partition("; last output: ")[0], seconds)
    boot = outcome.boot
    return Cycle(READY, f"{boot.version} in slot {boot.slot}", seconds, outcome.seconds)


def _put_away(strategy: SlotStrategy) -> None:
    """Off; a rig that can't do even that has said so in its last cycle."""
    try:
        strategy.invalidate()
        strategy.transition("off")
    except Exception as error:
        if not infrastructure_in(error):
            raise
