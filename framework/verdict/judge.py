"""From findings to a verdict: PASS, VIOLATION(n), BRICKED or INFRASTRUCTURE.

BRICKED takes two independent witnesses: the console (no ready marker) *and* the disk (no slot can
be started). One alone is VIOLATION(1). "The rig lost contact" never reaches this module: it is an
exception of the rig's, and no statement about the device.
"""

from __future__ import annotations

import enum

from attrs import frozen

from framework.verdict.events import BootSeen, DiskSeen, Run
from framework.verdict.invariants import INVARIANTS, Finding
from framework.verdict.oracle import next_boot


class Outcome(enum.Enum):
    """The kinds of verdict."""

    PASS = "PASS"  # noqa: S105 - a verdict, no password
    VIOLATION = "VIOLATION"
    BRICKED = "BRICKED"
    INFRASTRUCTURE = "INFRASTRUCTURE"


@frozen
class Verdict:
    """The judgement of one run.

    Attributes:
        outcome: its kind.
        findings: one per invariant, in their order.
    """

    outcome: Outcome
    findings: tuple[Finding, ...]

    @property
    def violated(self) -> tuple[int, ...]:
        """The numbers of the invariants that did not hold."""
        return tuple(f.invariant for f in self.findings if f.held is False)

    def __str__(self) -> str:
        """The verdict as the report prints it, such as `VIOLATION(2, 4)`."""
        if self.outcome is Outcome.PASS or not self.violated:
            return self.outcome.value
        return f"{self.outcome.value}({', '.join(map(str, self.violated))})"


class ViolationError(AssertionError):
    """An invariant did not hold. An AssertionError, so that Allure says *failed*, not *broken*.

    Attributes:
        verdict: the whole verdict.
    """

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        lines = [
            f"{i.number} {i.name}: {f.evidence}"
            for i, f in zip(INVARIANTS, verdict.findings, strict=True)
            if f.held is False
        ]
        super().__init__(f"{verdict}: " + "; ".join(lines))


def judge(run: Run) -> Verdict:
    """Judge a run by all invariants."""
    findings = tuple(invariant.read(run) for invariant in INVARIANTS)
    if all(finding.held is not False for finding in findings):
        return Verdict(Outcome.PASS, findings)
    return Verdict(Outcome.BRICKED if _bricked(run) else Outcome.VIOLATION, findings)


def _bricked(run: Run) -> bool:
    """Whether console and disk both say that the device can't come back."""
    starts = [event for event in run.events if isinstance(event, BootSeen)]
    disks = [event for event in run.events if isinstance(event, DiskSeen)]
    if not starts or starts[-1].ready or not disks:
        return False
    return next_boot(disks[-1].environment, disks[-1].slots).slot is None
