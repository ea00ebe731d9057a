"""Every decision about a rollout, as pure functions over plain values.

    scheduled ──start──▶ running ──all settled──▶ finished
        │                   │ ├── failures over the threshold ──▶ stopped
        └──────abort────────┴─┴── operator ──▶ aborted

One device:  pending ─▶ downloading ─▶ installing ─▶ rebooting ─▶ success | failure
with pauses in between where a control map asks for them; `stalled` when a started device said
nothing for too long, `expired` when the deployment ended before it finished, `aborted` when the
deployment was aborted or stopped. A failure with retries left goes back to `pending`.
"""

from __future__ import annotations

import datetime
import math
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """An assignment's status; the device API's words where it has one."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    INSTALLING = "installing"
    REBOOTING = "rebooting"
    PAUSE_BEFORE_INSTALLING = "pause_before_installing"
    PAUSE_BEFORE_REBOOTING = "pause_before_rebooting"
    PAUSE_BEFORE_COMMITTING = "pause_before_committing"
    SUCCESS = "success"
    FAILURE = "failure"
    ALREADY_INSTALLED = "already-installed"
    NO_ARTIFACT = "noartifact"
    STALLED = "stalled"
    EXPIRED = "expired"
    ABORTED = "aborted"
    DECOMMISSIONED = "decommissioned"


STARTED = frozenset(
    {
        Status.DOWNLOADING,
        Status.INSTALLING,
        Status.REBOOTING,
        Status.PAUSE_BEFORE_INSTALLING,
        Status.PAUSE_BEFORE_REBOOTING,
        Status.PAUSE_BEFORE_COMMITTING,
    }
)
UNSETTLED = STARTED | {Status.PENDING}
SUCCEEDED = frozenset({Status.SUCCESS, Status.ALREADY_INSTALLED})
FAILED = frozenset({Status.FAILURE, Status.STALLED})
# What a device may report.
REPORTABLE = STARTED | {Status.SUCCESS, Status.FAILURE, Status.ALREADY_INSTALLED}
# A device's later word corrects what the server concluded from its silence.
_CONCLUDED = frozenset({Status.STALLED, Status.EXPIRED})


@dataclass(frozen=True)
class Tally:
    """How the devices of one phase stand."""

    total: int = 0
    succeeded: int = 0
    failed: int = 0
    unsettled: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.total + other.total,
            self.succeeded + other.succeeded,
            self.failed + other.failed,
            self.unsettled + other.unsettled,
        )


@dataclass(frozen=True)
class Phase:
    """One step: its share of the devices, and what must hold before the next one opens.

    `share` is a percentage, `count` a number; the last phase takes what is left.
    """

    share: float | None = None
    count: int | None = None
    success_percent: float = 90.0
    delay_s: float = 0.0


@dataclass(frozen=True)
class Window:
    """When devices may start: week days (0 is Monday), from and to as minutes of the local day."""

    days: tuple[int, ...]
    start_minute: int
    end_minute: int
    timezone: str


@dataclass(frozen=True)
class Wait:
    """Nothing to do now."""


@dataclass(frozen=True)
class Open:
    """Let the next phase go."""

    phase: int


@dataclass(frozen=True)
class Stop:
    """Too many failures: nobody else may start."""

    reason: str


@dataclass(frozen=True)
class Finish:
    """Every device is settled."""


Decision = Wait | Open | Stop | Finish


def phase_sizes(phases: Sequence[Phase], total: int) -> list[int]:
    """Divide `total` devices; every phase gets at least one while any are left."""
    sizes: list[int] = []
    left = total
    for phase in phases[:-1]:
        wanted = (
            phase.count
            if phase.count is not None
            else math.ceil(total * (phase.share or 0.0) / 100.0)
        )
        size = min(left, max(wanted, 1))
        sizes.append(size)
        left -= size
    sizes.append(left)
    return sizes


def decide(
    phases: Sequence[Phase],
    tallies: Sequence[Tally],
    open_phase: int,
    phase_opened_at: float,
    max_failure_percent: float,
    now: float,
) -> Decision:
    """Say what becomes of a running rollout. `tallies` has one entry a phase.

    The threshold is judged over all devices let go so far, so a late failure in an early phase
    counts, and one failure in a phase of one stops at any threshold below 100.
    """
    released = tallies[: open_phase + 1]
    sum_released = sum(released, Tally())
    if sum_released.failed:
        percent = 100.0 * sum_released.failed / sum_released.total
        if percent > max_failure_percent:
            return Stop(
                f"{sum_released.failed} of {sum_released.total} devices failed "
                f"({percent:.0f} %), more than {max_failure_percent:g} % are not allowed"
            )
    if open_phase + 1 >= len(phases):
        return Wait() if sum_released.unsettled else Finish()
    if open_phase < 0:
        return Open(0)
    present, rule = tallies[open_phase], phases[open_phase]
    # Devices that are neither well nor failed (expired, aborted, gone) don't count.
    counted = present.succeeded + present.failed + present.unsettled
    enough = counted == 0 or 100.0 * present.succeeded / counted >= rule.success_percent
    if present.unsettled == 0 and not enough:
        return Stop(
            f"phase {open_phase + 1} is over with {present.succeeded} of {counted} successes, "
            f"{rule.success_percent:g} % are needed"
        )
    if enough and now >= phase_opened_at + rule.delay_s:
        return Open(open_phase + 1)
    return Wait()


def in_window(window: Window | None, now: float) -> bool:
    """Return whether a device may start at `now`; a window over midnight belongs to its start."""
    if window is None:
        return True
    local = datetime.datetime.fromtimestamp(now, zoneinfo.ZoneInfo(window.timezone))
    minute = local.hour * 60 + local.minute
    today, yesterday = local.weekday(), (local.weekday() - 1) % 7
    if window.start_minute < window.end_minute:
        return today in window.days and window.start_minute <= minute < window.end_minute
    return (today in window.days and minute >= window.start_minute) or (
        yesterday in window.days and minute < window.end_minute
    )


@dataclass(frozen=True)
class Change:
    """What a device's report makes of its assignment; `open` says whether it may be offered."""

    status: Status
    open: bool
    attempts: int


def report(
    current: Status, reported: Status, attempts: int, retries: int, *, offered: bool
) -> Change | None:
    """Apply a device's report; None when it changes nothing (a duplicate, or too late).

    `attempts` counts failed attempts; `offered` says whether the present attempt was handed out,
    so that a repeated word about the attempt before is not taken for a word about this one. The
    caller has refused reports for aborted assignments.
    """
    assert reported in REPORTABLE
    if reported == current or (current not in UNSETTLED and current not in _CONCLUDED):
        return None
    if current == Status.PENDING and not offered:
        return None
    if reported in STARTED:
        return Change(reported, True, attempts)
    if reported == Status.FAILURE:
        return failed_attempt(Status.FAILURE, attempts, retries)
    return Change(reported, False, attempts)


def failed_attempt(status: Status, attempts: int, retries: int) -> Change:
    """Return what follows a failed or stalled attempt: another one, or the end."""
    if attempts < retries:
        return Change(Status.PENDING, True, attempts + 1)
    return Change(status, False, attempts + 1)


def retry_delay_s(attempts: int, base_s: float) -> float:
    """Return how long to wait before attempt number `attempts` + 1: doubling, at most a day."""
    return float(min(base_s * 2.0 ** max(attempts - 1, 0), 86_400.0))
