"""Searching the space of schedules: every single and double cut, random ones, and shrinking.

Random schedules come in *batches*, each with a seed of its own made from the search's and its
number, so that what is found does not depend on how many processes look for it, or on which is
faster. Within a batch, schedules that reached something new are kept and varied (coverage-guided,
as fuzzers do; Zalewski's afl notes); *new* means a pair of a client's state and a fault in it, or a
change between two states, not seen in this batch before.

Every violation is shrunk to a smaller schedule that violates the same invariant: faults are
dropped, models and surroundings made simpler, moments earlier. Hypothesis is not used for that:
its shrinker orders byte strings, while here a smaller schedule is known outright.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from framework.campaign.lifetimes import (
    MANAGED,
    NETWORK_FAULTS,
    SERVER_FAULTS,
    Fault,
    Lifetime,
    Schedule,
    live,
)
from framework.campaign.models import CACHE_MODELS
from framework.targets.simulated.laboratory import BOOTLOADERS, Laboratory

BATCH: Final = 250
"""Lifetimes of one batch."""
BEHAVIOURS: Final = ("well", "well", "well", "panics", "hangs", "unhealthy")
PACKAGED: Final = ("well", "unhealthy")
"""How a package may behave: one that panics is none."""
ACTIONS: Final = (
    *(("install",),) * 6,
    ("stage", "rollback"),
    ("stage", "commit"),
    ("install", "rollback"),
    ("install", "commit"),
    ("stage", "stage"),
    ("stage", "restart", "rollback"),
    ("stage", "rollback", "install"),
    ("install", "install"),
    ("stage", "restart", "commit", "commit"),
    ("install", "resume"),
    ("stage", "resume", "restart"),
)
SCRIPTED: Final = (
    *("",) * 15,
    "ok",
    "later ArtifactInstall_Leave_00",
    "fail ArtifactInstall_Enter_00",
    "fail ArtifactInstall_Leave_00",
    "fail ArtifactCommit_Enter_00",
)
TOO_LATE: Final = (
    "ok",
    "fail ArtifactCommit_Leave_00",
    "fail ArtifactRollback_Enter_00",
    "fail ArtifactFailure_Enter_00",
)
"""Scripts whose failure stops nothing; they take turns with those that are well."""
MODULES: Final = (
    "reboot=No reverts=Yes fails=",
    "reboot=Automatic reverts=Yes fails=",
    "reboot=Yes reverts=Yes fails=",
    "reboot=No reverts=Yes fails=ArtifactCommit",
    "reboot=Automatic reverts=Yes fails=ArtifactInstall",
    "reboot=Automatic reverts=No fails=ArtifactVerifyReboot",
    "reboot=No reverts=Yes fails=ArtifactRollback",
    "reboot=Yes reverts=No fails=ArtifactReboot",
)
"""Update modules: how they answer, and where they fail."""
MODULE_SHARE: Final = 12
"""One in so many lifetimes is of a package, where its image could be one."""
MANAGED_SHARE: Final = 8
"""One in so many lifetimes is of a device with a management server."""
REQUESTS: Final = 24
"""Where the network loses requests to it; a deployment without a fault has 9, a paused one 24."""
KINDS: Final = ("cut", "cut", "cut", "cut", "error", "flip", "kill", *NETWORK_FAULTS)
OPERATIONS: Final = 260
"""Where random faults strike; a lifetime without a fault has about 160 operations."""
DOWNLOAD_BYTES: Final = 108_000
MIXED: Final = "mixed"
"""Either boot loader, as the schedule's seed says."""
_SHRINK_RUNS: Final = 400
_PLAIN: Final = Schedule()


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A violation: the schedule as drawn, and the invariants that it violates."""

    schedule: Schedule
    violated: tuple[int, ...]
    detail: str


@dataclasses.dataclass(slots=True)
class Tally:
    """What a number of lifetimes came to; tallies add up."""

    lifetimes: int = 0
    operations: int = 0
    fired: int = 0
    struck: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """How often a fault (by kind, for a cut by model) struck in a state of the client."""
    positions: set[int] = dataclasses.field(default_factory=set)
    """The operations at which power was cut."""
    verdicts: Counter[str] = dataclasses.field(default_factory=Counter)
    found: list[Found] = dataclasses.field(default_factory=list)
    broken: list[str] = dataclasses.field(default_factory=list)
    """Lifetimes in which the simulation itself failed: schedule and error. No verdict."""

    def live(self, laboratory: Laboratory, schedule: Schedule) -> Lifetime | None:
        """Live one lifetime and add it; None if the simulation failed."""
        try:
            lifetime = live(laboratory, schedule)
        except Exception as error:  # noqa: BLE001 - hours of searching must not be lost by it
            self.broken.append(f"{schedule.to_json()}: {type(error).__name__}: {error}")
            return None
        self.take(lifetime)
        return lifetime

    def take(self, lifetime: Lifetime) -> None:
        """Add one lifetime."""
        self.lifetimes += 1
        self.operations += lifetime.operations
        self.fired += len(lifetime.struck)
        for strike in lifetime.struck:
            self.struck[strike.state, strike.what] += 1
            if strike.kind == "cut":
                self.positions.add(strike.at)
        self.verdicts[str(lifetime.verdict)] += 1
        if lifetime.verdict.violated:
            self.found.append(Found(lifetime.schedule, lifetime.verdict.violated, _why(lifetime)))

    def add(self, other: Tally) -> None:
        """Add another tally."""
        self.lifetimes += other.lifetimes
        self.operations += other.operations
        self.fired += other.fired
        self.positions |= other.positions
        self.found += other.found
        self.broken += other.broken
        self.struck += other.struck
        self.verdicts += other.verdicts


def singles(
    operations: int, models: Sequence[str] = CACHE_MODELS, base: Schedule = _PLAIN
) -> Iterator[Schedule]:
    """Every cut of an update of `operations` operations, under every model."""
    for model in models:
        for at in range(1, operations + 1):
            yield dataclasses.replace(base, faults=(Fault(at, "cut", model, at),))


def doubles(laboratory: Laboratory, first: Fault, base: Schedule = _PLAIN) -> Iterator[Schedule]:
    """Every schedule with `first` and a second cut of the same model after it."""
    alone = live(laboratory, dataclasses.replace(base, faults=(first,)))
    for at in range(first.at + 1, alone.exposed + 1):
        yield dataclasses.replace(base, faults=(first, Fault(at, "cut", first.model, at)))


def batch(
    laboratory: Laboratory,
    seed: int,
    number: int,
    lifetimes: int = BATCH,
    bootloader: str = "uboot",
) -> Tally:
    """Live one batch of random and varied schedules; `bootloader` as `draw` takes it."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311 - has to be reproducible
    tally = Tally()
    seen: set[tuple[str, ...]] = set()
    corpus: list[Schedule] = []
    for _ in range(lifetimes):
        fresh = not corpus or rng.random() < 0.5
        schedule = draw(rng, bootloader) if fresh else vary(rng, rng.choice(corpus))
        lifetime = tally.live(laboratory, schedule)
        if lifetime is None:
            continue
        reached = signature(lifetime) - seen
        if reached:
            seen |= reached
            corpus.append(schedule)
    return tally


def draw(rng: random.Random, bootloader: str = "uboot") -> Schedule:
    """Draw a schedule with one to four faults; a `mixed` boot loader is either of the two.

    Under GRUB one in two devices begins in slot b.
    """
    faults: dict[int, Fault] = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        fault = _draw_fault(rng)
        faults[fault.at] = fault
    schedule = Schedule(
        faults=tuple(faults.values()),
        behaviour=rng.choice(BEHAVIOURS),
        actions=rng.choice(ACTIONS),
        early=rng.choice((0, 0, 64)),
        seed=rng.randrange(1 << 16),
        fresh=rng.random() < 0.25,
    )
    # By the seed that is there already: one in four.
    turn, which = divmod(schedule.seed, len(SCRIPTED))
    scripts = SCRIPTED[which]
    if scripts == "ok":
        scripts = TOO_LATE[turn % len(TOO_LATE)]
    module, turn = "", turn // len(TOO_LATE)
    if turn % MODULE_SHARE == 0 and schedule.behaviour in PACKAGED:
        module = MODULES[turn // MODULE_SHARE % len(MODULES)]
    if bootloader == MIXED:
        bootloader = BOOTLOADERS[schedule.seed >> 9 & 1]
    slot = "ab"[schedule.seed >> 10 & 1] if bootloader == "grub" else "a"
    schedule = dataclasses.replace(
        schedule, scripts=scripts, module=module, bootloader=bootloader, slot=slot
    )
    return schedule if (schedule.seed >> 6) % MANAGED_SHARE else _managed(schedule)


def _managed(schedule: Schedule) -> Schedule:
    """The same with a management server: deployed there, and some of its requests are lost."""
    actions = ["deploy" if a in ("install", "stage") else a for a in schedule.actions]
    if schedule.seed & 32:
        actions.append("cycle")
    kinds = tuple(SERVER_FAULTS)
    faults = {
        fault.at: fault
        for fault in (
            Fault(one.at % REQUESTS + 1, kinds[one.seed & 1], "kept", one.seed)
            if one.kind == "corrupt" or (one.kind == "break" and one.seed & 2)
            else one
            for one in schedule.faults
        )
    }
    return dataclasses.replace(
        schedule,
        faults=tuple(faults.values()),
        actions=tuple(actions),
        managed=MANAGED[1 + (schedule.seed >> 3) % (len(MANAGED) - 1)],
    )


def vary(rng: random.Random, schedule: Schedule) -> Schedule:
    """Change one thing about a schedule."""
    faults = list(schedule.faults)
    choice = rng.randrange(5)
    if choice == 0 or not faults:
        faults.append(_draw_fault(rng))
    elif choice == 1 and len(faults) > 1:
        del faults[rng.randrange(len(faults))]
    elif choice == 2:
        return dataclasses.replace(
            schedule,
            behaviour=rng.choice(PACKAGED if schedule.module else BEHAVIOURS),
            actions=rng.choice(ACTIONS),
        )
    else:
        index = rng.randrange(len(faults))
        old = faults[index]
        if choice == 3:
            faults[index] = dataclasses.replace(old, at=max(1, old.at + rng.randint(-6, 6)))
        else:
            model = rng.choice(CACHE_MODELS) if old.kind == "cut" else old.model
            faults[index] = dataclasses.replace(old, model=model, seed=rng.randrange(1 << 20))
    unique = {fault.at: fault for fault in faults}
    return dataclasses.replace(schedule, faults=tuple(unique.values()))


def signature(lifetime: Lifetime) -> set[tuple[str, ...]]:
    """What a lifetime reached: faults in states, and changes between two lines of the console."""
    reached: set[tuple[str, ...]] = {(s.state, s.what) for s in lifetime.struck}
    before = ""
    for line in lifetime.lines:
        kind = line if line.startswith("updater: state") else line.partition(" ")[0]
        reached.add((before, kind, ""))
        before = kind
    return reached


def shrink(
    laboratory: Laboratory,
    schedule: Schedule,
    invariant: int,
    limit: int = _SHRINK_RUNS,
) -> tuple[Schedule, int]:
    """Return the smallest schedule found that still violates `invariant`, and the runs it took."""
    runs = 0

    def still(candidate: Schedule) -> bool:
        nonlocal runs
        if runs >= limit:
            return False
        runs += 1
        return invariant in live(laboratory, candidate).verdict.violated

    changed = True
    while changed and runs < limit:
        changed = False
        for candidate in _smaller(schedule):
            if still(candidate):
                schedule, changed = candidate, True
                break
    return schedule, runs


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Candidates that are simpler, the boldest first."""
    faults = sorted(schedule.faults)
    for index in range(len(faults)):
        yield dataclasses.replace(schedule, faults=tuple(faults[:index] + faults[index + 1 :]))
    if schedule.actions != ("install",):
        yield dataclasses.replace(schedule, actions=("install",))
        for index in range(len(schedule.actions)):
            rest = schedule.actions[:index] + schedule.actions[index + 1 :]
            if rest:
                yield dataclasses.replace(schedule, actions=rest)
    if schedule.behaviour != "well":
        yield dataclasses.replace(schedule, behaviour="well")
    if schedule.scripts:
        yield dataclasses.replace(schedule, scripts="")
    if schedule.module:
        yield dataclasses.replace(schedule, module="")
        plain = f"{schedule.module.partition('fails=')[0]}fails="
        if schedule.module != plain:
            yield dataclasses.replace(schedule, module=plain)
    if schedule.managed:
        by_hand = tuple("install" if a == "deploy" else a for a in schedule.actions)
        by_hand = tuple(action for action in by_hand if action != "cycle")
        yield dataclasses.replace(schedule, managed="", actions=by_hand or ("install",))
        if schedule.managed != "plain":
            yield dataclasses.replace(schedule, managed="plain")
    if schedule.slot != "a":
        yield dataclasses.replace(schedule, slot="a")
    if schedule.bootloader != "uboot":
        yield dataclasses.replace(schedule, bootloader="uboot")
    if schedule.fresh:
        yield dataclasses.replace(schedule, fresh=False)
    if schedule.early:
        yield dataclasses.replace(schedule, early=0, seed=0)
    for index, fault in enumerate(faults):
        others = faults[:index] + faults[index + 1 :]
        for simpler in _simpler(fault):
            yield dataclasses.replace(schedule, faults=(*others, simpler))


def _simpler(fault: Fault) -> Iterator[Fault]:
    order = ("kept", "prefix", "reordered", "subset", "torn", "torn:4096")
    if fault.kind == "cut" and fault.model in order:
        for model in order[: order.index(fault.model)]:
            yield dataclasses.replace(fault, model=model)
    if fault.seed:
        yield dataclasses.replace(fault, seed=0)
        yield dataclasses.replace(fault, seed=fault.seed // 2)
    step = fault.at // 2
    while step:
        yield dataclasses.replace(fault, at=fault.at - step)
        step //= 2


def _draw_fault(rng: random.Random) -> Fault:
    kind = rng.choice(KINDS)
    seed = rng.randrange(1 << 20)
    if kind in NETWORK_FAULTS:
        return Fault(rng.randrange(1, DOWNLOAD_BYTES), kind, "kept", seed)
    model = rng.choice(CACHE_MODELS) if kind == "cut" else "kept"
    return Fault(rng.randrange(1, OPERATIONS), kind, model, seed)


def _why(lifetime: Lifetime) -> str:
    return "; ".join(
        f"{f.invariant}: {f.evidence}" for f in lifetime.verdict.findings if f.held is False
    )
