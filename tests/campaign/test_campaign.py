"""A campaign loses no run, tells flaky from broken, blames rigs for what is theirs, and goes on.

The workers here are scripted; `test_campaign_emulated.py` has the real one.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attrs import evolve
from rich.console import Console

from framework.campaign import CampaignError, CrewError, LedgerError
from framework.campaign.ledger import LEDGER_VERSION, Campaign, Ledger, Run, program
from framework.campaign.perform import Performed
from framework.campaign.plan import (
    MOST_ATTEMPTS,
    Planner,
    Rig,
    Wish,
    by_composition,
    flaky,
    repeat_command,
    summarise,
    violating,
)
from framework.campaign.space import Cell, draw
from framework.campaigner import LEDGER, Place, parse_name, run_campaign, show_history
from framework.cli import main

HERE = Path(__file__).parent
FEATURES = frozenset({"emulated", "power-cut", "network", "link", "rtc", "watchdog"})
ARM = Rig("arm.yaml", FEATURES)
X86 = Rig("x86.yaml", FEATURES)
BOARD = Rig("board.yaml", frozenset({"power-cut", "network"}))


class Bench:
    """A folder with a script, and a campaign on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = ""

    def script(self, **outcomes: list[str]) -> None:
        plan = {name.removeprefix("run_"): list(value) for name, value in outcomes.items()}
        (self.folder / "script.json").write_text(json.dumps({"else": ["PASS"], **plan}))

    def place(self, *rigs: Rig, workers: int = 2) -> Place:
        program = (
            sys.executable,
            str(HERE / "scripted_worker.py"),
            str(self.folder / "script.json"),
        )
        paths = tuple(self.folder / rig.name for rig in rigs)
        return Place(paths, self.folder / "out", workers, program)

    def run(self, wish: Wish, workers: int = 2, *, terminal: bool = False) -> int:
        console = Console(
            file=io.StringIO(), width=200, force_terminal=terminal, _environ={"TERM": "xterm"}
        )
        try:
            return run_campaign(wish, self.place(*wish.rigs, workers=workers), console)
        finally:
            self.text = console.file.getvalue()

    def runs(self, number: int = 0) -> list[Run]:
        with Ledger(self.folder / "out" / LEDGER) as ledger:
            return ledger.runs(ledger.campaigns()[number])

    def done(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "done").read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path)
    made.script()
    return made


def wish(runs: int = 6, rigs: tuple[Rig, ...] = (ARM, X86), **more) -> Wish:
    return Wish(7, rigs, runs, None, **{"again": 0, **more})


def test_every_index_runs_once_and_the_rigs_take_turns(bench: Bench) -> None:
    assert bench.run(wish(7)) == 0
    assert sorted(int(index) for index, _, _ in bench.done()) == list(range(7))
    for index, rig, _ in bench.done():
        assert Path(rig).name == ("arm.yaml", "x86.yaml")[int(index) % 2]
    assert len({worker for _, _, worker in bench.done()}) == 2
    assert "7 compositions in 7 runs" in bench.text
    assert "INFRASTRUCTURE: 0 of 7 runs (0.0 %)" in bench.text


def test_a_violation_is_told_with_the_line_that_repeats_it_and_is_done_again(bench: Bench) -> None:
    bench.script(run_3=["VIOLATION(2)"])
    assert bench.run(wish()) == 1
    (bad,) = violating(bench.runs())
    name = f"7/3.{bad.candidate}"
    assert f"VIOLATION(2) {name} on x86.yaml" in bench.text
    assert f"--only {name}" in bench.text
    assert parse_name(name) == (7, 3, bad.candidate)
    assert draw(X86.features, 7, 3, bad.candidate).to_json() == bad.composition
    attempts = by_composition(bench.runs())[3, bad.candidate]
    assert [run.purpose for run in attempts] == ["drawn", "again"]
    assert flaky(bench.runs()) == []


def test_a_flaky_run_is_told_as_such_and_stays_bad(bench: Bench) -> None:
    bench.script(run_2=["VIOLATION(4)", "PASS"], run_4=["PASS", "VIOLATION(3)"])
    assert bench.run(wish(again=5)) == 1
    told = {(one.index, one.verdicts) for one in flaky(bench.runs())}
    assert told == {(2, ("VIOLATION(4)", "PASS")), (4, ("PASS", "VIOLATION(3)"))}
    assert "flaky: 2 of 2 compositions that ran twice" in bench.text
    assert "VIOLATION(4), then PASS" in bench.text
    assert {run.index for run in violating(bench.runs())} == {2, 4}


def test_what_a_rig_failed_is_retried_on_another_rig_and_counted(bench: Bench) -> None:
    bench.script(run_2=["INFRASTRUCTURE", "PASS"])
    assert bench.run(wish()) == 0
    attempts = [run for run in bench.runs() if run.index == 2]
    assert [(run.rig, run.purpose) for run in attempts] == [
        ("arm.yaml", "drawn"),
        ("x86.yaml", "retry"),
    ]
    assert "INFRASTRUCTURE: 1 of 7 runs (14.3 %), given up: 0" in bench.text
    assert summarise(bench.runs()).flaky == 0, "a rig's failure is no verdict"


def test_with_one_rig_another_worker_retries(bench: Bench) -> None:
    bench.script(run_1=["INFRASTRUCTURE", "PASS"])
    assert bench.run(wish(rigs=(ARM,))) == 0
    one, two = [run for run in bench.runs() if run.index == 1]
    assert one.worker != two.worker


def test_what_no_rig_can_do_is_given_up_after_some_attempts(bench: Bench) -> None:
    bench.script(run_0=["INFRASTRUCTURE"])
    assert bench.run(wish(3), workers=1) == 0
    assert len([run for run in bench.runs() if run.index == 0]) == MOST_ATTEMPTS
    assert "given up: 1" in bench.text


def test_a_worker_that_dies_has_failed_its_run_as_a_rig_does(bench: Bench) -> None:
    bench.script(run_1=["die", "PASS"])
    assert bench.run(wish()) == 0
    attempts = [run.outcome for run in bench.runs() if run.index == 1]
    assert [a.verdict for a in attempts if a] == ["INFRASTRUCTURE", "PASS"]
    assert "process ended with 3" in attempts[0].evidence


def test_workers_that_die_again_and_again_end_the_campaign(bench: Bench) -> None:
    (bench.folder / "script.json").write_text(json.dumps({"else": ["die"]}))
    with pytest.raises(CrewError, match="workers have died; the last words are in"):
        bench.run(wish())


def test_a_rig_that_is_unusable_is_one_clear_line(bench: Bench) -> None:
    bench.script(run_1=["unusable"])
    with pytest.raises(CampaignError, match=r"^the rig burnt down$"):
        bench.run(wish())


def test_on_a_terminal_the_runs_under_way_and_the_coverage_are_shown_live(bench: Bench) -> None:
    (bench.folder / "script.json").write_text(json.dumps({"else": ["slow 0.8"]}))
    assert bench.run(wish(4), terminal=True) == 0
    assert "strikes / kinds of triggers" in bench.text
    assert re.search(r"run 0", bench.text), "what a worker does was never shown"
    assert re.search(r"campaign.*1 PASS", bench.text), "the verdicts so far were never shown"


def test_it_stops_after_the_wanted_violations(bench: Bench) -> None:
    bench.script(run_2=["VIOLATION(1)"])
    assert bench.run(wish(500, stop_after=1)) == 1
    assert len(bench.runs()) < 8


# -- it goes on ----------------------------------------------------------------------------------

SESSION = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from rich.console import Console
from framework.campaign.plan import Rig, Wish
from framework.campaigner import Place, run_campaign
sys.path.insert(0, {here!r})
from test_campaign import Bench, wish
sys.exit(Bench(Path({folder!r})).run(wish(12)))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_the_same_command_goes_on_after(bench: Bench, number: signal.Signals) -> None:
    """Nothing that ended is lost or done twice; what was under way is done again."""
    (bench.folder / "script.json").write_text(json.dumps({"else": ["slow 0.3"]}))
    session = subprocess.Popen(
        [sys.executable, "-c", SESSION.format(here=str(HERE), folder=str(bench.folder))],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (bench.folder / "done").exists() and len(bench.done()) >= 4
    ):
        time.sleep(0.05)
    session.send_signal(number)
    session.wait(40)
    ended = {run.index for run in bench.runs() if run.outcome is not None}
    assert 2 <= len(ended) < 12
    assert all(_is_gone(int(pid)) for _, _, pid in bench.done()), "a worker is left"
    bench.script()
    assert bench.run(wish(12)) == 0
    assert "going on with campaign 1" in bench.text
    runs = bench.runs()
    assert sorted(run.index for run in runs) == list(range(12))
    assert all(run.outcome is not None for run in runs)


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_finished_campaign_is_not_gone_on_with_and_both_stand_in_the_history(
    bench: Bench,
) -> None:
    bench.run(wish())
    (bench.folder / "count-3").unlink()
    bench.script(run_3=["VIOLATION(2)"])
    bench.run(wish())
    console = Console(file=io.StringIO(), width=200)
    show_history(bench.folder / "out" / LEDGER, console)
    told = console.file.getvalue()
    assert "verdicts that changed from a campaign to the next: 1" in told
    assert "PASS in campaign 1, VIOLATION(2) in 2" in told


# -- decisions -----------------------------------------------------------------------------------


def test_a_rig_with_hardware_is_used_by_one_worker_at_a_time() -> None:
    planner = Planner(Wish(1, (BOARD,), 9, None), [])
    first = planner.next([], {}, 0, 2)
    assert first is not None
    under_way = Run(1, first.index, first.candidate, BOARD.name, "drawn", 0, "")
    assert planner.next([under_way], {}, 1, 2) is None
    shared = Planner(Wish(1, (ARM,), 9, None), [])
    busy = Run(1, 0, 0, ARM.name, "drawn", 0, "")
    assert shared.next([busy], {}, 1, 2) is not None


def test_when_time_is_up_nothing_new_begins_and_bad_runs_are_still_seen_again() -> None:
    planner = Planner(Wish(1, (ARM,), None, 60.0), [])
    composition = draw(ARM.features, 1, 0, 0).to_json()
    bad = Run(1, 0, 0, ARM.name, "drawn", 0, composition, Performed("VIOLATION(2)", (2,)))
    again = planner.next([bad], {}, 0, 1, out_of_time=True)
    assert again is not None
    assert again.purpose == "again"
    good = Run(1, 0, 0, ARM.name, "drawn", 0, composition, Performed("PASS"))
    assert planner.next([good], {}, 0, 1, out_of_time=True) is None


def test_steering_uses_what_was_struck() -> None:
    planner = Planner(Wish(1, (ARM,), 50, None), [])
    unsteered = planner.next([], {}, 0, 1)
    assert unsteered is not None
    from framework.campaign.space import expected

    known = dict.fromkeys(expected(unsteered.composition), 50)
    steered = planner.next([], known, 0, 1)
    assert steered is not None
    assert steered.candidate != unsteered.candidate


def test_the_line_that_repeats_a_run_can_be_read_back() -> None:
    line = repeat_command("rigs/x.yaml", 7, (42, 3), "never-fsync")
    assert line == "brownout campaign --rig rigs/x.yaml --only 7/42.3 --plant never-fsync"


# -- the ledger ----------------------------------------------------------------------------------


def a_ledger(path: Path) -> Path:
    with Ledger(path) as ledger:
        wanted = Campaign(0, 1, "", ("arm.yaml",), "9 runs", "0.1", 5, "2030-01-01T00:00:00Z")
        campaign, is_new = ledger.open_campaign(wanted)
        assert is_new
        key = ledger.begin(campaign, Run(0, 0, 0, "arm.yaml", "drawn", 0, "{}"))
        cell = Cell("Download", "cut torn", "state")
        ledger.end(key, Performed("PASS", strikes=(cell,), unfired=("x",), symptoms={"a": "b"}))
        assert ledger.struck(campaign) == {cell: 1}
    return path


def test_what_is_put_into_the_ledger_comes_out(tmp_path: Path) -> None:
    with Ledger(a_ledger(tmp_path / "a.db")) as ledger:
        (run,) = ledger.runs(ledger.campaigns()[0])
        assert run.outcome == Performed(
            "PASS",
            strikes=(Cell("Download", "cut torn", "state"),),
            unfired=("x",),
            symptoms={"a": "b"},
        )


def test_a_campaign_of_another_program_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its numbers stand for other compositions."""
    wanted = Campaign(0, 1, "", ("arm.yaml",), "9 runs", "0.1", 5, "2030-01-01T00:00:00Z")
    with Ledger(tmp_path / "a.db") as ledger:
        first, _ = ledger.open_campaign(wanted)
        assert ledger.open_campaign(wanted) == (first, False)
        other, is_new = ledger.open_campaign(evolve(wanted, program=program()))
        assert is_new
        assert other.number != first.number
    assert re.search(r", compositions \d+$", program())


def test_a_newer_ledger_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = a_ledger(tmp_path / "a.db")
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {LEDGER_VERSION + 1}")
    with pytest.raises(LedgerError, match=rf"version {LEDGER_VERSION + 1}, .*: update it$"):
        Ledger(path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (thing)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="a database, but no ledger"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_corrupt_ledger_is_one_clear_line_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = a_ledger(tmp_path / "a.db").read_bytes()
    bad = tmp_path / "bad.db"
    refused = 0
    for at in range(0, len(whole), 509):
        spoilt = bytearray(whole)
        spoilt[at : at + 64] = b"\xa5" * 64
        bad.write_bytes(spoilt)
        try:
            with Ledger(bad) as ledger:
                for campaign in ledger.campaigns():
                    ledger.runs(campaign)
                    ledger.struck(campaign)
        except LedgerError as error:
            refused += 1
            assert "\n" not in str(error)
            assert "bad.db" in str(error)
    assert refused >= 5
    bad.write_bytes(b"this is no database at all, it is a text" * 30)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(bad)


def test_a_full_disk_is_one_clear_line_and_what_was_done_is_kept(tmp_path: Path) -> None:
    path = a_ledger(tmp_path / "a.db")
    with Ledger(path) as ledger:
        pages = int(ledger.rows("PRAGMA page_count")[0][0])
        ledger.execute(f"PRAGMA max_page_count = {pages + 1}")
        campaign = ledger.campaigns()[0]
        with pytest.raises(LedgerError, match="the disk is full; free some space"):
            for _ in range(100):
                key = ledger.begin(campaign, Run(0, 1, 0, "arm.yaml", "drawn", 0, "x" * 2000))
                ledger.end(key, Performed("PASS"))
    with Ledger(path) as ledger:
        assert ledger.runs(ledger.campaigns()[0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "3", "--rig", "rigs/moon.yaml"], "rigs/moon.yaml: no such rig"),
        (["--runs", "3", "--plant", "weeds"], "nothing called 'weeds' can be planted"),
        (["--only", "seven"], "'seven' is no run"),
        (["--history", "none.db"], "ledger none.db: no such file"),
    ],
)
def test_wrong_use_is_one_clear_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["brownout", "campaign", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert says in errors[0]
