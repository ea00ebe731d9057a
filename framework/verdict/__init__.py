"""What must always hold, and how a run is judged: invariants, witnesses, verdicts."""

from framework.verdict.events import (
    BootEnvironment,
    BootSeen,
    CommitReached,
    Committed,
    DataChecked,
    DiskSeen,
    Event,
    ImageFacts,
    InstallEnded,
    InstallStarted,
    PowerCut,
    RetryEnded,
    Run,
    ServerTold,
    SlotContent,
    SlotState,
    StatusRead,
)
from framework.verdict.invariants import INVARIANTS, Finding, Invariant
from framework.verdict.judge import Outcome, Verdict, ViolationError, judge
from framework.verdict.oracle import Decision, next_boot

__all__ = [
    "INVARIANTS",
    "BootEnvironment",
    "BootSeen",
    "CommitReached",
    "Committed",
    "DataChecked",
    "Decision",
    "DiskSeen",
    "Event",
    "Finding",
    "ImageFacts",
    "InstallEnded",
    "InstallStarted",
    "Invariant",
    "Outcome",
    "PowerCut",
    "RetryEnded",
    "Run",
    "ServerTold",
    "SlotContent",
    "SlotState",
    "StatusRead",
    "Verdict",
    "ViolationError",
    "judge",
    "next_boot",
]
