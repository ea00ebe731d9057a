"""The ledger of campaigns: one SQLite file with every run, durable run by run.

A run is entered when it begins and completed when it ends, each in a transaction that is synced, so
whatever ends the harness leaves at most the runs under way incomplete; they are done again. Several
campaigns share a file: their trends are what it is kept for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from attrs import asdict, field, frozen

from framework.campaign.errors import LedgerError
from framework.campaign.perform import Performed
from framework.campaign.space import MAPPING, Cell
from framework.database import Database, Form, utc_now

LEDGER_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE campaign (
    id INTEGER PRIMARY KEY,
    seed INTEGER NOT NULL,
    plant TEXT NOT NULL,
    rigs TEXT NOT NULL,
    bound TEXT NOT NULL,
    program TEXT NOT NULL,
    cells INTEGER NOT NULL,
    started TEXT NOT NULL,
    spent_s REAL NOT NULL DEFAULT 0,
    ended TEXT
) STRICT;
CREATE TABLE run (
    id INTEGER PRIMARY KEY,
    campaign INTEGER NOT NULL REFERENCES campaign(id),
    number INTEGER NOT NULL,
    candidate INTEGER NOT NULL,
    rig TEXT NOT NULL,
    purpose TEXT NOT NULL,
    worker INTEGER NOT NULL,
    composition TEXT NOT NULL,
    begun TEXT NOT NULL,
    ended TEXT,
    verdict TEXT,
    outcome TEXT
) STRICT;
CREATE INDEX run_of_campaign ON run (campaign, number);
CREATE TABLE strike (
    run INTEGER NOT NULL REFERENCES run(id),
    state TEXT NOT NULL,
    fault TEXT NOT NULL,
    "trigger" TEXT NOT NULL
) STRICT;
"""
_FORM: Final = Form(
    "ledger", "ledger of campaigns", 0x42524F4C, LEDGER_VERSION, _SCHEMA, LedgerError
)


@frozen
class Campaign:
    """One campaign.

    Attributes:
        number: in this ledger.
        seed: of all compositions.
        plant: the bug planted into the images; empty for none.
        rigs: the rig files' names.
        bound: such as `300 runs` or `45 minutes`.
        program: the program's version, and that of the way from numbers to compositions.
        cells: how many cells there are to cover.
        started, ended: when, UTC; ended is None while it goes on, or was interrupted.
        spent_s: seconds that it ran, over all its sessions.
    """

    number: int
    seed: int
    plant: str
    rigs: tuple[str, ...]
    bound: str
    program: str
    cells: int
    started: str
    spent_s: float = 0.0
    ended: str | None = None


@frozen
class Run:
    """One run.

    Attributes:
        key: in this ledger.
        index, candidate: name its composition, with the campaign's seed.
        rig: the rig file's name.
        purpose: `drawn`, `retry` (the rig had failed), `again` (to see whether it is flaky).
        worker: who did it.
        composition: as JSON.
        outcome: how it ended; None while it is under way, or was interrupted.
    """

    key: int
    index: int
    candidate: int
    rig: str
    purpose: str
    worker: int
    composition: str
    outcome: Performed | None = field(default=None)


class Ledger(Database):
    """An open ledger; use it as a context manager.

    Raises:
        LedgerError: the file is damaged, newer than this program, no ledger, or can't be written.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        if not create and not path.is_file():
            raise LedgerError(f"ledger {path}: no such file")
        super().__init__(path, _FORM)

    # -- campaigns ---------------------------------------------------------------------------

    def campaigns(self) -> list[Campaign]:
        """All campaigns, oldest first."""
        with self.told():
            rows = self.rows(
                "SELECT id, seed, plant, rigs, bound, program, cells, started, spent_s, ended "
                "FROM campaign ORDER BY id"
            )
            return [
                Campaign(row[0], row[1], row[2], tuple(json.loads(row[3])), *row[4:])
                for row in rows
            ]

    def open_campaign(self, wanted: Campaign) -> tuple[Campaign, bool]:
        """The unfinished campaign that is the same as `wanted`, or a new one; and whether it is.

        Another program draws other compositions of the same numbers: its campaigns are others.
        """
        for campaign in reversed(self.campaigns()):
            if campaign.ended is None and _sameness(campaign) == _sameness(wanted):
                return campaign, False
        self.execute(
            "INSERT INTO campaign (seed, plant, rigs, bound, program, cells, started) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                wanted.seed,
                wanted.plant,
                json.dumps(wanted.rigs),
                wanted.bound,
                wanted.program,
                wanted.cells,
                wanted.started,
            ),
        )
        return self.campaigns()[-1], True

    def end_campaign(self, campaign: Campaign) -> None:
        """It is complete."""
        self.execute("UPDATE campaign SET ended = ? WHERE id = ?", (utc_now(), campaign.number))

    def spend(self, campaign: Campaign, seconds: float) -> None:
        """It ran for so many more seconds."""
        self.execute(
            "UPDATE campaign SET spent_s = spent_s + ? WHERE id = ?",
            (seconds, campaign.number),
        )

    # -- runs --------------------------------------------------------------------------------

    def begin(self, campaign: Campaign, run: Run) -> int:
        """Enter a run that begins; its key."""
        added = self.execute(
            "INSERT INTO run (campaign, number, candidate, rig, purpose, worker, composition,"
            " begun) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                campaign.number,
                run.index,
                run.candidate,
                run.rig,
                run.purpose,
                run.worker,
                run.composition,
                utc_now(),
            ),
        )
        return int(added.lastrowid or 0)

    def end(self, key: int, outcome: Performed) -> None:
        """Complete a run, with the cells that it struck, in one transaction."""
        with self.transaction():
            self.execute(
                "UPDATE run SET ended = ?, verdict = ?, outcome = ? WHERE id = ?",
                (utc_now(), outcome.verdict, json.dumps(asdict(outcome)), key),
            )
            self.executemany(
                "INSERT INTO strike VALUES (?, ?, ?, ?)",
                [(key, cell.state, cell.fault, cell.trigger) for cell in outcome.strikes],
            )

    def forget_interrupted(self, campaign: Campaign) -> list[Run]:
        """Take out the runs that were begun and never ended; they are returned."""
        interrupted = [run for run in self.runs(campaign) if run.outcome is None]
        self.execute("DELETE FROM run WHERE campaign = ? AND ended IS NULL", (campaign.number,))
        return interrupted

    def runs(self, campaign: Campaign) -> list[Run]:
        """The campaign's runs, in the order of their beginning."""
        with self.told():
            rows = self.rows(
                "SELECT id, number, candidate, rig, purpose, worker, composition, outcome "
                "FROM run WHERE campaign = ? ORDER BY id",
                (campaign.number,),
            )
            return [_run(*row) for row in rows]

    def struck(self, campaign: Campaign) -> Counter[Cell]:
        """How often each cell was struck in a campaign."""
        rows = self.rows(
            'SELECT state, fault, "trigger", count(*) FROM strike JOIN run ON run.id = run '
            "WHERE campaign = ? GROUP BY 1, 2, 3",
            (campaign.number,),
        )
        return Counter({Cell(*row[:3]): int(row[3]) for row in rows})


def _sameness(campaign: Campaign) -> tuple[object, ...]:
    """What two sessions of one campaign have in common."""
    return (campaign.seed, campaign.plant, campaign.rigs, campaign.bound, campaign.program)


def program() -> str:
    """What draws compositions here: the program's version, and the mapping's."""
    return f"{metadata.version('brownout')}, compositions {MAPPING}"


def _run(key: int, *row: Any) -> Run:
    index, candidate, rig, purpose, worker, composition, outcome = row
    return Run(key, index, candidate, rig, purpose, worker, composition, outcome_of(outcome))


def outcome_of(text: str | None) -> Performed | None:
    """A run's outcome of its JSON. Raises ValueError, TypeError or KeyError."""
    if text is None:
        return None
    return outcome_from_values(json.loads(text))


def outcome_from_values(values: Mapping[str, Any]) -> Performed:
    """A run's outcome of plain values. Raises ValueError, TypeError or KeyError."""
    fields = dict(values)
    fields["strikes"] = tuple(Cell(**cell) for cell in fields["strikes"])
    for name in ("violated", "unfired", "steps"):
        fields[name] = tuple(fields[name])
    return Performed(**fields)
