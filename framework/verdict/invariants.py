"""The eight invariants, each a pure function over what a run showed.

A function returns a `Finding`: held, broken, or not judged (None) because the run showed nothing
that bears on it. "Not judged" is never counted as held.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import frozen

from framework.verdict.events import (
    BootSeen,
    CommitReached,
    Committed,
    ContractChecked,
    DataChecked,
    DiskSeen,
    InstallEnded,
    InstallStarted,
    RetryEnded,
    Run,
    ServerTold,
    SlotContent,
    StatusRead,
)
from framework.verdict.oracle import next_boot

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_REBOOT_NEEDED = 4
TOLD_GOOD = ("success", "already-installed")
TOLD_BAD = "failure"


@frozen
class Finding:
    """One invariant's part of a verdict.

    Attributes:
        invariant: its number, 1 to 8.
        held: True, False, or None where the run showed nothing that bears on it.
        evidence: the fact that decided, for people.
    """

    invariant: int
    held: bool | None
    evidence: str


@frozen
class Invariant:
    """An invariant: its number, name, one sentence, and the reader that judges a run."""

    number: int
    name: str
    sentence: str
    read: Callable[[Run], Finding]


def _broken_or_held(number: int, broken: list[str], seen: int, held: str) -> Finding:
    """A finding from the list of what broke it, and how much was looked at."""
    if broken:
        return Finding(number, False, "; ".join(broken))
    return Finding(number, True if seen else None, held if seen else "nothing seen")


def boots(run: Run) -> Finding:
    """1: every start ends at the ready marker, within the boot budget, without help."""
    starts = [event for event in run.events if isinstance(event, BootSeen)]
    broken = [
        f"start {i} not ready after {s.elapsed_s:.1f} s: {s.evidence or 'console silent'}"
        for i, s in enumerate(starts, 1)
        if not s.ready
    ]
    slowest = max((s.elapsed_s for s in starts), default=0.0)
    return _broken_or_held(
        1, broken, len(starts), f"{len(starts)} starts ready, slowest {slowest:.1f} s"
    )


def all_or_nothing(run: Run) -> Finding:
    """2: what runs, and what would run next, is bit for bit one of the images."""
    broken: list[str] = []
    looked_at = 0
    disk: DiskSeen | None = None
    for event in run.events:
        if isinstance(event, DiskSeen):
            disk = event
            looked_at += 1
            slot = next_boot(event.environment, event.slots).slot
            if slot is not None and event.slots[slot].content is SlotContent.MIXED:
                broken.append(f"{event.moment}: slot {slot} would be booted and is no known image")
        elif isinstance(event, BootSeen) and event.ready and disk is not None:
            state = disk.slots.get(event.slot or "")
            if state is None or state.content is not SlotContent.IMAGE:
                broken.append(f"runs slot {event.slot}, which is {state}")
            elif state.image != event.version:
                broken.append(f"says it runs {event.version}, slot holds {state.image}")
    return _broken_or_held(2, broken, looked_at, f"{looked_at} looks at the disk, all whole")


def commit_is_durable(run: Run) -> Finding:
    """3: after an acknowledged commit, only that system or a later update's is ever started."""
    broken: list[str] = []
    looked_at = 0
    acknowledged = False
    allowed = {run.initial}
    for event in run.events:
        if isinstance(event, Committed):
            allowed = {event.artifact}
            acknowledged = True
        elif isinstance(event, InstallStarted):
            allowed = allowed | {event.artifact}
        elif isinstance(event, BootSeen) and event.ready:
            looked_at += acknowledged
            if event.version not in allowed:
                broken.append(f"{event.version} runs, committed: {', '.join(sorted(allowed))}")
        elif isinstance(event, DiskSeen):
            slot = next_boot(event.environment, event.slots).slot
            image = None if slot is None else event.slots[slot].image
            looked_at += acknowledged and image is not None
            if image is not None and image not in allowed:
                broken.append(
                    f"{event.moment}: {image} would be started, "
                    f"committed: {', '.join(sorted(allowed))}"
                )
    return _broken_or_held(
        3, broken, looked_at, f"{looked_at} looks after a commit, all at it or later"
    )


def no_commit_unproven(run: Run) -> Finding:
    """4: a system that did not prove itself is never committed, and never runs off trial."""
    broken: list[str] = []
    looked_at = 0
    proven = {run.initial}
    for event in run.events:
        if isinstance(event, Committed):
            looked_at += 1
            image = run.images.get(event.artifact)
            if image is not None and not image.healthy:
                broken.append(f"{event.artifact} was committed, and it is sick")
            else:
                proven.add(event.artifact)
        elif isinstance(event, DiskSeen):
            decision = next_boot(event.environment, event.slots)
            image_name = None if decision.slot is None else event.slots[decision.slot].image
            if image_name is None:
                continue
            looked_at += 1
            if not decision.on_trial and image_name not in proven:
                broken.append(
                    f"{event.moment}: {image_name} would be started as if committed, unproven"
                )
        elif isinstance(event, CommitReached):
            # A commit is on the disk a moment before it is acknowledged, so what counts as
            # proven from here on is a healthy image that reached the commit.
            image = run.images.get(event.artifact)
            if image is None or image.healthy:
                proven.add(event.artifact)
    return _broken_or_held(4, broken, looked_at, f"{looked_at} looks, nothing unproven")


def data_lives(run: Run) -> Finding:
    """5: the data partition is clean and what was synced before the fault is there."""
    checks = [event for event in run.events if isinstance(event, DataChecked)]
    broken = [check.detail or "damaged" for check in checks if not (check.clean and check.intact)]
    return _broken_or_held(5, broken, len(checks), f"{len(checks)} checks clean and intact")


def converges(run: Run) -> Finding:
    """6: the same update, tried again after the fault, succeeds."""
    retries = [event for event in run.events if isinstance(event, RetryEnded)]
    broken = [
        f"{retry.artifact} again: {retry.detail or 'not committed'}"
        for retry in retries
        if not retry.committed
    ]
    return _broken_or_held(6, broken, len(retries), "tried again, committed")


def truthful(run: Run) -> Finding:
    """7: what the device says agrees with what the disk and the console show."""
    broken: list[str] = []
    looked_at = 0
    running: str | None = run.initial
    ended: InstallEnded | None = None
    waiting: str | None = None
    for event in run.events:
        if isinstance(event, InstallEnded):
            ended = event
            if event.exit_code == EXIT_ERROR:
                looked_at += 1
                if not event.cause:
                    broken.append(f"install of {event.artifact} failed without a cause")
        elif isinstance(event, DiskSeen) and ended is not None and ended.exit_code is None:
            # What was interrupted may wait for its restart all the same.
            decision = next_boot(event.environment, event.slots)
            armed = decision.slot is not None and decision.on_trial
            waiting = event.slots[decision.slot].image if armed else None  # type: ignore[index]
            ended = None
        elif isinstance(event, DiskSeen) and ended is not None:
            looked_at += 1
            decision = next_boot(event.environment, event.slots)
            image = None if decision.slot is None else event.slots[decision.slot].image
            said_done = ended.exit_code in (EXIT_OK, EXIT_REBOOT_NEEDED)
            if said_done and image != ended.artifact:
                broken.append(f"says {ended.artifact} is installed, would start {image}")
            # A second installation is refused while the first one waits for its restart.
            refused = not said_done and image == waiting
            waiting = image if said_done else waiting
            would_start = image == ended.artifact != running and not refused
            if not said_done and would_start and not ended.armed:
                broken.append(f"says {ended.artifact} failed, would start it")
            if ended.armed and not would_start:
                broken.append(f"says {ended.artifact} is still armed, would start {image}")
            ended = None
        elif isinstance(event, BootSeen) and event.ready:
            running = event.version
            ended = waiting = None
        elif isinstance(event, StatusRead):
            looked_at += 1
            if event.artifact != running:
                broken.append(f"says it runs {event.artifact}, runs {running}")
            if event.outcome in ("failed", "rolled-back") and not event.cause:
                broken.append(f"says the update was {event.outcome}, without a cause")
            if event.hidden:
                broken.append(f"does not tell that an error was ignored: {event.hidden}")
        elif isinstance(event, ContractChecked):
            looked_at += 1
            if not event.kept:
                broken.append(event.what)
        elif isinstance(event, ServerTold):
            looked_at += 1
            if event.status in TOLD_GOOD and event.artifact != running:
                broken.append(f"told the server {event.artifact}: {event.status}, runs {running}")
            if event.status == TOLD_BAD and event.artifact == running:
                broken.append(f"told the server that {event.artifact} failed, runs it")
            if event.status == TOLD_BAD and not event.cause:
                broken.append(f"told the server that {event.artifact} failed, without a cause")
    return _broken_or_held(7, broken, looked_at, f"{looked_at} statements, all true")


def bounded(run: Run) -> Finding:
    """8: no wait without an end, no reboot loop."""
    broken: list[str] = []
    looked_at = 0
    for event in run.events:
        if isinstance(event, InstallEnded):
            looked_at += 1
            if event.timed_out:
                broken.append(f"install of {event.artifact} had not ended at its deadline")
        elif isinstance(event, BootSeen):
            looked_at += 1
            if event.attempts > run.boot_limit:
                broken.append(f"{event.attempts} kernel starts, at most {run.boot_limit} allowed")
        elif isinstance(event, ServerTold):
            looked_at += 1
            if event.status not in (*TOLD_GOOD, TOLD_BAD):
                broken.append(f"left the server in the belief that it is {event.status}")
    return _broken_or_held(8, broken, looked_at, f"{looked_at} waits ended in time")


INVARIANTS: tuple[Invariant, ...] = (
    Invariant(1, "boots", "The device comes back by itself within its boot budget.", boots),
    Invariant(2, "all or nothing", "What runs is bit for bit one of the images.", all_or_nothing),
    Invariant(3, "commit is durable", "No cut brings back what was replaced.", commit_is_durable),
    Invariant(4, "no commit unproven", "Nothing unproven is committed.", no_commit_unproven),
    Invariant(5, "data lives", "The data partition is clean, synced files intact.", data_lives),
    Invariant(6, "converges", "The same update succeeds when tried again.", converges),
    Invariant(7, "truthful", "What the device says is what happened.", truthful),
    Invariant(8, "bounded", "Every wait ends, no reboot loop.", bounded),
)
