"""What the timeline tells: what the device was doing, and why a run failed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from attrs import evolve

from framework.report import (
    FindingRecord,
    Moment,
    ScenarioResult,
    Span,
    Strike,
    cause_of,
    spans_of,
    state_at,
)
from framework.report.story import MOST_CHARACTERS

# As a scenario on the arm64 rig left it.
MOMENTS = (
    Moment(0.5, "boot", "power on"),
    Moment(1.0, "console", "U-Boot 2023.01+dfsg-2+deb12u3 (Jun 22 2026 - 08:38:07 +0000)"),
    Moment(4.2, "console", "BROWNOUT INIT slot=a"),
    Moment(7.4, "console", "BROWNOUT READY version=v1 slot=a boot_id=49955146"),
    Moment(7.8, "updater", "installing v2"),
    Moment(7.9, "updater", "state Download"),
    Moment(12.2, "network", "connection opened"),
    Moment(19.1, "power", "cut 0 after operation 145, model subset(keep=0.5), seed 1"),
    Moment(19.3, "boot", "power restored"),
    Moment(26.3, "updater", "state Cleanup"),
    Moment(26.4, "updater", "state Idle"),
    Moment(28.6, "updater", "state Download"),
    Moment(50.8, "updater", "state ArtifactInstall"),
    Moment(51.2, "console", "updater: installed v2 into slot b; reboot to start it"),
    Moment(51.6, "boot", "rebooting"),
    Moment(59.1, "updater", "state ArtifactCommit"),
    Moment(59.4, "updater", "updater: committed v2 (slot b)"),
)
FAILED = ScenarioResult(
    scenario="s",
    title="t",
    rig="r",
    fault="power cut at flush 2",
    did=(),
    verdict="VIOLATION(2,5)",
    findings=(
        FindingRecord(1, "boots", True, "all"),
        FindingRecord(2, "all or nothing", False, "slot b would be booted and is no known image"),
        FindingRecord(5, "data lives", False, "file lost"),
    ),
    strikes=(Strike(19.1, "power", "power cut", "Download"),),
)


def test_the_device_is_doing_one_thing_at_any_time() -> None:
    spans = spans_of(MOMENTS, 61.0)
    assert [span.name for span in spans] == [
        *("off", "starting", "Idle", "Download", "off", "starting", "Cleanup", "Idle"),
        *("Download", "ArtifactInstall", "Installed", "starting", "ArtifactCommit", "Idle"),
    ]
    assert spans[3] == Span("Download", 7.9, 19.1)
    assert spans[0].begin_s == 0
    assert spans[-1].end_s == 61.0
    assert all(one.end_s == two.begin_s for one, two in pairwise(spans))


def test_a_run_without_moments_is_one_span() -> None:
    assert spans_of((), 3.0) == (Span("off", 0.0, 3.0),)


@pytest.mark.parametrize(
    ("at_s", "state"),
    [(0.1, "off"), (5, "starting"), (19.1, "Download"), (19.2, "off"), (51.5, "Installed")],
)
def test_what_it_was_doing_just_before_a_moment(at_s: float, state: str) -> None:
    assert state_at(MOMENTS, at_s) == state


def test_a_run_that_passed_has_no_cause() -> None:
    assert cause_of(evolve(FAILED, verdict="PASS")) == ""


def test_a_broken_invariant_is_told_with_fault_state_and_evidence() -> None:
    assert cause_of(FAILED) == (
        "After power cut in Download: invariant 2 (all or nothing) broke (and 1 more): "
        "slot b would be booted and is no known image."
    )


@pytest.mark.parametrize(
    ("verdict", "error", "cause"),
    [
        (
            "INFRASTRUCTURE",
            "InfrastructureError: QEMU ended by itself\nconsole: ...",
            "The rig lost contact, which says nothing of the device: "
            "InfrastructureError: QEMU ended by itself.",
        ),
        (
            "BROKEN",
            "UnfiredError: the fault never happened: power cut",
            "The scenario could not be carried out: "
            "UnfiredError: the fault never happened: power cut.",
        ),
        (
            "FAILED",
            "AssertionError: exit code 4\nassert 4 == 1",
            "After power cut in Download: not as expected: exit code 4.",
        ),
        ("FAILED", "", "After power cut in Download: not as expected: "
         "what was expected did not happen."),
    ],
)  # fmt: skip
def test_a_failure_that_is_no_verdict_says_whose_it_is(
    verdict: str, error: str, cause: str
) -> None:
    assert cause_of(evolve(FAILED, verdict=verdict, error=error, findings=())) == cause


def test_a_fault_that_never_struck_is_told() -> None:
    told = cause_of(evolve(FAILED, strikes=(), verdict="FAILED", error="AssertionError: no"))
    assert told == "Before power cut at flush 2 could strike, not as expected: no."
    told = cause_of(evolve(FAILED, strikes=(), fault=""))
    assert told.startswith("Without a fault, invariant 2")


def test_a_cause_is_one_bounded_sentence() -> None:
    evidence = FindingRecord(1, "boots", False, "start 1 not ready:\n" + "words " * 500)
    told = cause_of(evolve(FAILED, findings=(evidence,)))
    assert len(told) <= MOST_CHARACTERS
    assert "\n" not in told
    assert told.endswith("…")
