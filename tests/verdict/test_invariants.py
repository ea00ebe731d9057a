"""Each invariant holds for an honest run, breaks for the run that breaks it, and else is silent."""

import pytest

from framework.verdict import (
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
    Outcome,
    RetryEnded,
    Run,
    ServerTold,
    SlotContent,
    SlotState,
    StatusRead,
    Verdict,
    ViolationError,
    judge,
)

IMAGES = {
    "v1": ImageFacts("v1", "1" * 64, 1),
    "v2": ImageFacts("v2", "2" * 64, 1),
    "unhealthy": ImageFacts("unhealthy", "3" * 64, 1, healthy=False),
}
BLANK = SlotState(SlotContent.UNLOADABLE)
MIXED = SlotState(SlotContent.MIXED)


def image(name: str) -> SlotState:
    return SlotState(SlotContent.IMAGE, name)


def disk(
    a: SlotState, b: SlotState, slot: str = "a", trial: bool = False, count: int = 0
) -> DiskSeen:
    return DiskSeen("at the cut", {"a": a, "b": b}, BootEnvironment(2, slot, trial, count))


OLD = disk(image("v1"), BLANK)
ON_TRIAL = disk(image("v1"), image("v2"), "b", True)
NEW = disk(image("v1"), image("v2"), "b")
READY_OLD = BootSeen(True, "v1", "a", "id-1")
READY_NEW = BootSeen(True, "v2", "b", "id-2")

HONEST: list[Event] = [
    OLD,
    READY_OLD,
    InstallStarted("v2"),
    InstallEnded("v2", 0),
    ON_TRIAL,
    CommitReached("v2"),
    Committed("v2", "b"),
    NEW,
    READY_NEW,
    StatusRead("v2", "committed"),
    DataChecked(True, True),
    ServerTold("v2", "success"),
    RetryEnded("v2", True),
]


def verdict(*events: Event) -> Verdict:
    return judge(Run(IMAGES, "v1", events))


def test_an_honest_update_passes_and_every_invariant_was_judged() -> None:
    result = verdict(*HONEST)
    assert result.outcome is Outcome.PASS
    assert [finding.held for finding in result.findings] == [True] * 8


def test_nothing_seen_is_not_judged() -> None:
    assert {finding.held for finding in verdict().findings} == {None}


BROKEN: list[tuple[str, tuple[int, ...], list[Event]]] = [
    ("no ready marker", (1,), [OLD, BootSeen(False, evidence="Kernel panic")]),
    ("a mixed slot would be booted", (2,), [disk(image("v1"), MIXED, "b", True)]),
    ("a mixed slot runs", (2,), [disk(image("v1"), MIXED), BootSeen(True, "v1", "b")]),
    ("the wrong version runs", (2,), [OLD, BootSeen(True, "v1", "a"), BootSeen(True, "v1", "b")]),
    ("the old system after a commit", (3,), [Committed("v2", "b"), READY_OLD]),
    ("the old system would start after a commit", (3,), [Committed("v2", "b"), OLD]),
    ("a sick image committed", (4,), [Committed("unhealthy", "b")]),
    ("off trial before it was proven", (4,), [InstallStarted("v2"), NEW]),
    ("a sick image that reached the commit", (4,), [
        InstallStarted("unhealthy"),
        CommitReached("unhealthy"),
        disk(image("v1"), image("unhealthy"), "b"),
    ]),
    ("a damaged file system", (5,), [DataChecked(False, True, "fsck")]),
    ("a lost file", (5,), [DataChecked(True, False, "canary")]),
    ("no convergence", (6,), [RetryEnded("v2", False)]),
    ("failure without a cause", (7,), [InstallEnded("v2", 1)]),
    ("success that is none", (7,), [InstallEnded("v2", 0), OLD]),
    ("failure that is none", (7,), [
        InstallStarted("v2"), InstallEnded("v2", 1, "because"), ON_TRIAL,
    ]),
    ("failure that is none, although an earlier one was interrupted", (7,), [
        InstallStarted("v2"), InstallEnded("v2", None), OLD,
        InstallStarted("v2"), InstallEnded("v2", 1, "because"), ON_TRIAL,
    ]),
    ("a wrong version told", (7,), [READY_OLD, StatusRead("v2")]),
    ("a rollback without a cause", (7,), [READY_OLD, StatusRead("v1", "rolled-back")]),
    ("an ignored error hidden", (7,), [READY_OLD, StatusRead("v1", hidden="a script failed")]),
    ("told to be armed, and is not", (7,), [
        InstallStarted("v2"), InstallEnded("v2", 1, "because", armed=True), OLD,
    ]),
    ("success told of what does not run", (7,), [READY_OLD, ServerTold("v2", "success")]),
    ("failure told of what runs", (7,), [
        InstallStarted("v2"), READY_NEW, ServerTold("v2", "failure", "because"),
    ]),
    ("failure told without a cause", (7,), [READY_OLD, ServerTold("v2", "failure")]),
    ("a server left waiting", (8,), [READY_OLD, ServerTold("v2", "installing")]),
    ("an endless install", (8,), [InstallEnded("v2", None, timed_out=True)]),
    ("a reboot loop", (8,), [OLD, BootSeen(True, "v1", "a", attempts=9)]),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "events"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_broken_run_breaks_its_invariant(numbers: tuple[int, ...], events: list[Event]) -> None:
    result = verdict(*events)
    assert result.violated == numbers
    assert result.outcome is Outcome.VIOLATION
    assert str(result) == f"VIOLATION({', '.join(map(str, numbers))})"


def test_every_invariant_has_a_run_that_breaks_it() -> None:
    assert {number for _, numbers, _ in BROKEN for number in numbers} == set(range(1, 9))


def test_bricked_takes_two_witnesses() -> None:
    silent = BootSeen(False)
    assert verdict(OLD, silent).outcome is Outcome.VIOLATION
    assert verdict(disk(BLANK, BLANK), silent).outcome is Outcome.BRICKED
    assert verdict(disk(BLANK, BLANK), READY_OLD).outcome is not Outcome.BRICKED


def test_commit_on_disk_before_its_acknowledgement_is_no_violation() -> None:
    assert verdict(InstallStarted("v2"), ON_TRIAL, CommitReached("v2"), NEW).violated == ()


def test_a_second_installation_is_refused_while_an_interrupted_one_waits() -> None:
    events = [InstallStarted("v2"), InstallEnded("v2", None), ON_TRIAL]
    events += [InstallStarted("v2"), InstallEnded("v2", 1, "not finished"), ON_TRIAL]
    assert verdict(*events).violated == ()


def test_a_later_update_may_replace_a_committed_system() -> None:
    events = [Committed("v1", "a"), InstallStarted("v2"), ON_TRIAL, READY_NEW]
    assert verdict(*events).violated == ()


def test_the_error_names_invariant_and_evidence() -> None:
    error = ViolationError(verdict(Committed("unhealthy", "b")))
    assert "VIOLATION(4): 4 no commit unproven: unhealthy was committed" in str(error)
    assert isinstance(error, AssertionError)
