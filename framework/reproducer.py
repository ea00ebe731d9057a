"""`brownout reproduce`: ranked candidates for a failure in the field, with their replay commands.

A support bundle's symptoms are compared with the crash states of recordings and with the runs of
campaigns; on request compositions that strike in the state where the device failed are performed
on a rig, too. What is compared, and how, is `framework.campaign.field`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen
from rich.console import Console
from rich.table import Table

from framework.campaign.crew import Crew
from framework.campaign.errors import CampaignError
from framework.campaign.field import (
    Failure,
    InRecording,
    name_slots,
    rank_runs,
    rank_states,
    read_failure,
)
from framework.campaign.ledger import Campaign, Ledger, Run, program
from framework.campaign.plan import Rig, repeat_command
from framework.campaign.space import candidates, expected, name_of
from framework.campaign.symptoms import match
from framework.campaigner import LOG, perform_once, rigs_of
from framework.disk import CacheModel
from framework.explore.bundle import write_bundle
from framework.explore.engine import explore
from framework.explore.judges.context import Context
from framework.explore.judges.static import StaticOracle
from framework.explore.recording import Recording

EXHAUSTIVE: Final = 8
SAMPLES: Final = 200
ENOUGH: Final = 0.7
"""The score of a candidate that contradicts nothing and knows most of it."""


@frozen
class Search:
    """Where to look.

    Attributes:
        recordings: their files; `bases` their base images, if not where they say.
        ledgers: of campaigns.
        models: cache models under which recordings are cut.
        rig: where compositions are performed; None: nowhere.
        runs: how many.
        seed: of them.
        top: how many candidates are shown of each.
    """

    recordings: tuple[Path, ...] = ()
    bases: Mapping[str, Path] = field(factory=dict)
    ledgers: tuple[Path, ...] = ()
    models: tuple[CacheModel, ...] = ()
    rig: Path | None = None
    runs: int = 0
    seed: int = 1
    top: int = 5


@frozen
class Candidate:
    """One line of the result.

    Attributes:
        score: how well the symptoms agree, 0 to 1.
        what: what happened, in words.
        agrees, differs: the symptoms' names.
        command: does it again.
    """

    score: float
    what: str
    agrees: tuple[str, ...]
    differs: tuple[str, ...]
    command: str


def run_reproduce(path: Path, search: Search, output: Path, console: Console) -> bool:
    """Search, and print ranked candidates; False if each contradicts a symptom.

    Raises:
        CampaignError, DiskError: the support bundle, a recording or a ledger can't be used.
    """
    failure = read_failure(path)
    if not (search.recordings or search.ledgers or search.rig):
        raise CampaignError(
            "nothing to search: give --recording (`brownout record` makes one), --ledger or --rig"
        )
    console.print(f"the device: {_words(failure.symptoms)}", highlight=False, markup=False)
    if failure.cause:
        console.print(f"it says: {failure.cause}", highlight=False, markup=False)
    found: list[Candidate] = []
    symptoms = dict(failure.symptoms)
    for recording in search.recordings:
        more, named = _in_recording(failure, recording, search, output, console)
        found += more
        symptoms |= named
    for ledger in search.ledgers:
        found += _in_ledger(symptoms, ledger, search)
    if search.rig is not None:
        found += _on_rig(symptoms, search.rig, search, output, console)
    # The sort is stable: within a source the order stands.
    found.sort(key=lambda candidate: -candidate.score)
    _show(found, console)
    return any(candidate.score >= ENOUGH and not candidate.differs for candidate in found)


def _in_recording(
    failure: Failure, path: Path, search: Search, output: Path, console: Console
) -> tuple[list[Candidate], dict[str, str]]:
    """The best crash states of a recording, each left as a bundle; and the symptoms with slots."""
    with Recording(path, search.bases) as recording, console.status(f"cutting {path.name}"):
        context = Context.of(recording.reader, recording.facts)
        oracle = StaticOracle(context)
        found = explore(
            recording.reader,
            context.layout,
            search.models,
            exhaustive_up_to=EXHAUSTIVE,
            samples=SAMPLES,
            seed=search.seed,
        )
        symptoms = name_slots(failure, oracle, found.classes)
        ranked = rank_states(symptoms, oracle, found.classes)[: search.top]
        made = []
        for number, state in enumerate(ranked, 1):
            folder = write_bundle(
                output / f"{path.stem}-{number}",
                recording,
                (state.span.latest,),
                _why(state),
            )
            made.append(
                Candidate(
                    score=state.match.score,
                    what=_sentence(path, state),
                    agrees=state.match.same,
                    differs=state.match.different,
                    command=f"brownout boot-state {folder}",
                )
            )
    return made, symptoms


def _why(state: InRecording) -> dict[str, Any]:
    return {
        "reason": "its symptoms agree with a failure in the field",
        "score": state.match.score,
        "symptoms": state.symptoms,
        "promised": state.promised,
        "violated": list(state.violated),
    }


def _sentence(path: Path, state: InRecording) -> str:
    span = state.span
    when = f"operations {span.first_operation} to {span.last_operation}"
    broken = f", violates {', '.join(map(str, state.violated))}" if state.violated else ""
    after = "settled after the next start" if state.recovered else "at the next start"
    return (
        f"{path.name}: power cut at {when} ({span.latest.model}), {state.promised}{broken}; "
        f"{after}: {_words(state.symptoms)}"
    )


def _in_ledger(symptoms: Mapping[str, str], path: Path, search: Search) -> list[Candidate]:
    made = []
    with Ledger(path, create=False) as ledger:
        for campaign in ledger.campaigns():
            for one in rank_runs(symptoms, ledger.runs(campaign))[: search.top]:
                assert one.run.outcome is not None
                key = (one.run.index, one.run.candidate)
                rig = f"rigs/{one.run.rig}"
                outcome = one.run.outcome
                made.append(
                    Candidate(
                        score=one.match.score,
                        what=(
                            f"campaign {campaign.number}, run {name_of(campaign.seed, *key)} on"
                            f" {one.run.rig}: {outcome.verdict}; {_words(outcome.symptoms)}"
                        ),
                        agrees=one.match.same,
                        differs=one.match.different,
                        command=_repeat(campaign, one.run, rig),
                    )
                )
    return sorted(made, key=lambda candidate: -candidate.score)[: search.top]


def _repeat(campaign: Campaign, run: Run, rig: str) -> str:
    """The command that does a ledger's run again.

    Of another program's numbers something else would be drawn here; its bundle holds.
    """
    if campaign.program == program():
        return repeat_command(rig, campaign.seed, (run.index, run.candidate), campaign.plant)
    if run.outcome is not None and run.outcome.bundle:
        return f"brownout replay {run.outcome.bundle}"
    return f"# drawn by brownout {campaign.program}, and by no other version"


def _on_rig(
    symptoms: Mapping[str, str], path: Path, search: Search, output: Path, console: Console
) -> list[Candidate]:
    """Perform compositions that are expected to strike where the device failed."""
    (rig,) = rigs_of((path,), "", console)
    made = []
    with Crew(1, output / LOG) as crew:
        for index, candidate in _aimed(rig, symptoms.get("state", ""), search):
            composition = candidates(rig.features, search.seed, index)[candidate]
            name = name_of(search.seed, index, candidate)
            command = repeat_command(str(path), search.seed, (index, candidate), "")
            outcome = perform_once(crew, path, rig, composition, name, command, output)
            agreement = match(symptoms, outcome.symptoms)
            console.print(
                f"{agreement.score:.0%} {name}: {outcome.verdict}, {composition}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            what = f"run {name} on {rig.name}: {composition}; {_words(outcome.symptoms)}"
            made.append(
                Candidate(agreement.score, what, agreement.same, agreement.different, command)
            )
    return sorted(made, key=lambda candidate: -candidate.score)[: search.top]


def _aimed(rig: Rig, state: str, search: Search) -> Sequence[tuple[int, int]]:
    """Compositions that strike in a state, as index and candidate; without one, any."""
    chosen: list[tuple[int, int]] = []
    for index in range(40 * search.runs):
        for number, composition in enumerate(candidates(rig.features, search.seed, index)):
            if not state or any(cell.state == state for cell in expected(composition)):
                chosen.append((index, number))
                break
        if len(chosen) >= search.runs:
            break
    return chosen


def _show(found: Sequence[Candidate], console: Console) -> None:
    table = Table("", "agrees", "differs in", "what happened", title="candidates", expand=True)
    for number, candidate in enumerate(found, 1):
        table.add_row(
            str(number),
            f"{candidate.score:.0%}",
            ", ".join(candidate.differs) or "nothing",
            re.sub(r"\[", r"\\[", candidate.what),
        )
    console.print(table)
    for number, candidate in enumerate(found, 1):
        console.print(
            f"{number}: {candidate.command}", highlight=False, markup=False, soft_wrap=True
        )


def _words(symptoms: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in symptoms.items()) or "nothing known"
