"""What a run's timeline tells: what the device was doing at each moment, and why a run failed.

Pure functions over a result. The words that they look for are those that `framework.scenario` and
the updater's console put on the timeline.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from attrs import frozen

from framework.report.results import Moment, ScenarioResult

OFF, STARTING, IDLE, INSTALLED = "off", "starting", "Idle", "Installed"
# In the order in which a device goes through them: the columns of the matrix.
STATES = (
    OFF,
    STARTING,
    IDLE,
    "Sync",
    "Download",
    "ArtifactInstall",
    INSTALLED,
    "ArtifactReboot",
    "ArtifactVerifyReboot",
    "ArtifactCommit",
    "ArtifactRollback",
    "ArtifactRollbackReboot",
    "ArtifactVerifyRollbackReboot",
    "ArtifactFailure",
    "Cleanup",
)
MOST_CHARACTERS = 400

_STARTS = re.compile(
    r"^(power on|power restored|rebooting|restarting by itself)$|BROWNOUT INIT|U-Boot 20|GNU GRUB"
)
_INSTALLED = re.compile(r"updater: installed ")
_ENDS = re.compile(
    r"updater: (committed|rolled back|error:|asking again)|BROWNOUT READY"
    r"|^install ended with exit code [^04]"
)


@frozen
class Span:
    """A stretch of time in which the device did one thing; seconds into the scenario."""

    name: str
    begin_s: float
    end_s: float


def spans_of(moments: Iterable[Moment], elapsed_s: float) -> tuple[Span, ...]:
    """What the device was doing from the beginning to the end, without gaps."""
    spans: list[Span] = []
    name, since = OFF, 0.0
    for moment in sorted(moments, key=lambda moment: moment.at_s):
        now = _doing(moment)
        if now is not None and now != name:
            if moment.at_s > since:
                spans.append(Span(name, since, moment.at_s))
            name, since = now, moment.at_s
    if elapsed_s > since or not spans:
        spans.append(Span(name, since, max(elapsed_s, since)))
    return tuple(spans)


def state_at(moments: Iterable[Moment], at_s: float) -> str:
    """What the device was doing just before a moment."""
    name = OFF
    for moment in sorted(moments, key=lambda moment: moment.at_s):
        if moment.at_s >= at_s:
            break
        name = _doing(moment) or name
    return name


def _doing(moment: Moment) -> str | None:
    """What the device does from this moment on; None: as before."""
    text = moment.text
    if moment.source == "power":
        return OFF
    if moment.source == "updater" and text.startswith("state "):
        return text.removeprefix("state ")
    if moment.source in ("boot", "console") and _STARTS.search(text):
        return STARTING
    if _INSTALLED.search(text):
        return INSTALLED
    return IDLE if _ENDS.search(text) else None


def cause_of(result: ScenarioResult) -> str:
    """Why a run failed, in one sentence; empty for one that passed."""
    if result.passed:
        return ""
    broken = [finding for finding in result.findings if finding.held is False]
    said = _first_line(result.error)
    match result.verdict:
        case "INFRASTRUCTURE":
            return _sentence(f"The rig lost contact, which says nothing of the device: {said}")
        case "BROKEN":
            return _sentence(f"The scenario could not be carried out: {said}")
        case "FAILED":
            text = said.removeprefix("AssertionError: ") or "what was expected did not happen"
            return _sentence(f"{_when(result)}not as expected: {text}")
        case _ if broken:
            found = broken[0]
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            return _sentence(
                f"{_when(result)}invariant {found.invariant} ({found.name}) broke{more}: "
                f"{found.evidence}"
            )
        case _:
            return _sentence(f"{_when(result)}{result.verdict}: {said or 'no evidence was kept'}")


def _when(result: ScenarioResult) -> str:
    """The faults that struck, and where: the beginning of the sentence."""
    if not result.strikes:
        return f"Before {result.fault} could strike, " if result.fault else "Without a fault, "
    told = " and then ".join(f"{strike.what} in {strike.state}" for strike in result.strikes)
    return f"After {told}: "


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    text = text[0].upper() + text[1:]
    if len(text) > MOST_CHARACTERS:
        text = text[: MOST_CHARACTERS - 1].rstrip() + "…"
    return text if text.endswith((".", "…", "!", "?")) else f"{text}."
