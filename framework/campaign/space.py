"""The space that a campaign draws from: journeys, faults, and the spots where they may strike.

A *journey* is a sequence of steps (an update, an update of an update, a sick image…), a *kind* a
fault with its weight, a *spot* a trigger that makes sense in a kind of step, with the client's
state in which it is expected to strike. A composition is a journey with one to three faults, some
of them chained. What is drawn depends on the seed, the index and the rig's features alone:

    draw(features, seed, index, candidate)

Steering leaves that alone: of some candidates of an index, the one is taken that promises most of
what was struck least: cells (state x fault x trigger), places (state x family of faults), and kinds
of faults. So the three numbers name a composition, as long as `MAPPING` is the same.

A composition has no fault that another one prevents: what ends a step (the power goes, the client
gives up) comes last in it. Where that can't be told, the fault counts as prevented.

Only what an updater must survive is in here: a drive that forgets what it acknowledged, or a system
that loses the slot it runs from, is a fault of the hardware that no updater mends.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal

from attrs import field, frozen

from framework.campaign.composition import Composition, Placed, Step, is_sick
from framework.faults import (
    After,
    AfterSwitch,
    AtState,
    BadCertificate,
    BitFlip,
    BootEnvWrite,
    BrownOut,
    CacheModelName,
    ConsoleSays,
    DataFull,
    Downloaded,
    Fault,
    Hang,
    Interrupt,
    KernelPanic,
    LinkDown,
    MachineEvent,
    NameGone,
    NetworkDrop,
    NetworkSlow,
    NthFlush,
    OnRecord,
    Operation,
    PowerCut,
    ProcessKilled,
    ReadOnly,
    SecondCommand,
    ServerAnswers,
    SlotWrite,
    StorageError,
    StreamByte,
    Trigger,
    Writes,
    WrongContent,
    after,
    after_switch,
    bad_certificate,
    bit_flip,
    bit_rot,
    boot_env_write,
    brown_out,
    captive_portal,
    clock,
    clock_battery,
    connection,
    console,
    ctrl_c,
    data_full,
    downloaded,
    flush,
    hang,
    kernel_panic,
    link_down,
    memory_pressure,
    name_gone,
    now,
    on_record,
    operation,
    power_cut,
    process_killed,
    read_only,
    second_command,
    server_answers,
    slot_write,
    slow_disk,
    slow_network,
    state,
    storage_error,
    stream_byte,
    writes_to,
    wrong_content,
)
from framework.faults.network import DropKind
from framework.faults.storage import Access

MAPPING: Final = 2
"""Version of the way from numbers to a composition. A change means that a run's name, such as
`7/42.3`, is another composition's: campaigns of another mapping are not gone on with."""
CANDIDATES: Final = 24
"""Compositions of one index that steering chooses from."""
DRAWS: Final = 8
"""How often a further fault is drawn until there is one that nothing prevents."""
CHAINED: Final = 0.4
"""How often a further fault waits for the one before."""
SURROUNDED: Final = 0.6
"""How often a condition such as a slow network holds meanwhile: many bugs need one."""
MOST_DRAWN: Final = 3
MODELS: Final[Mapping[CacheModelName, int]] = {
    "kept": 1,
    "prefix": 2,
    "subset": 4,
    "reordered": 3,
    "torn": 4,
}
"""The models by how much they can lose: `kept` loses nothing that the drive has."""

Stage = Literal["install", "prove", "leave", "fall back", "roll back", "power is back"]
"""What a step is to a fault: what the client does in it. A sick image that still runs is left; one
that doesn't makes the bootloader fall back."""

Random = random.Random


@frozen(order=True)
class Cell:
    """Where a fault struck: the client's state, the fault's kind, the trigger's kind."""

    state: str
    fault: str
    trigger: str


@frozen
class Spot:
    """A trigger that makes sense in a stage.

    Attributes:
        expects: the state in which it is expected to strike; what is seen counts.
        make: draws the trigger.
        by_device: whether a fault that the device does to itself gets its order there.
    """

    expects: str
    make: Callable[[Random], Trigger] = field(eq=False)
    by_device: bool = False


@frozen
class Kind:
    """A fault and where it may strike.

    Attributes:
        weight: how often it is drawn.
        make: draws the fault.
        where: the stages.
        triggers: the kinds of triggers it may have; empty: all.
        feature: what a rig must have besides what the fault itself needs.
        by_device: whether the device does it to itself, on order.
        lasts: whether it may also strike at once, before the step.
        surrounds: how often it is drawn as a condition that holds while another fault strikes.
    """

    weight: int
    make: Callable[[Random], Fault] = field(eq=False)
    where: tuple[Stage, ...]
    triggers: tuple[str, ...] = ()
    feature: str = ""
    by_device: bool = False
    lasts: bool = False
    surrounds: int = 0


def fault_name(fault: Fault) -> str:
    """A fault's kind, for the coverage."""
    match fault:
        case BrownOut():
            return "brown-out"
        case PowerCut(model=model):
            return f"cut {model}"
        case NetworkDrop(kind=kind):
            return f"connection {kind}"
        case ServerAnswers():
            return "server error"
        case StorageError(on=on, area=area):
            return f"EIO {'/'.join(on)} {area}".strip()
        case SecondCommand(command=command):
            return f"second {command}"
        case WrongContent(kind=kind) | BadCertificate(kind=kind):
            return kind
        case NetworkSlow():
            return "slow network"
        case LinkDown():
            return "cable pulled"
        case _:
            return "".join(
                f" {c.lower()}" if c.isupper() else c for c in type(fault).__name__
            ).strip()


_TRIGGER_NAMES: Final[Mapping[type[Trigger], str]] = {
    After: "after a fault",
    AfterSwitch: "after the switch",
    BootEnvWrite: "boot environment",
    ConsoleSays: "console",
    Downloaded: "downloaded",
    MachineEvent: "machine event",
    NthFlush: "flush",
    OnRecord: "record",
    Operation: "operation",
    SlotWrite: "image written",
    StreamByte: "stream byte",
    Writes: "data written",
}


def trigger_name(trigger: Trigger | None) -> str:
    """A trigger's kind, for the coverage."""
    if isinstance(trigger, AtState):
        return "within a state" if trigger.within else "state"
    return "at once" if trigger is None else _TRIGGER_NAMES.get(type(trigger), "at once")


def _percent(rng: Random) -> int:
    shares: tuple[int, ...] = (1, 5, *range(10, 100, 10), 97, 100)
    return rng.choice(shares)


def _spot(expects: str, make: Callable[[Random], Trigger], *, by_device: bool = False) -> Spot:
    return Spot(expects, make, by_device)


def _entered(*names: str) -> tuple[Spot, ...]:
    return tuple(_spot(name, lambda _, name=name: state(name)) for name in names)  # type: ignore[misc]


def _within(most: int, *names: str) -> tuple[Spot, ...]:
    """Up to so many disk operations after each of the states was entered."""
    return tuple(
        _spot(name, lambda rng, name=name: state(name).at(operations=rng.randint(1, most)))  # type: ignore[misc]
        for name in names
    )


def since(place: str, last: str) -> str:
    """A place in a start, and the client's last state before it: what the start is for."""
    return f"{place} after {last}" if last else place


def _starting(last: str) -> tuple[Spot, ...]:
    return (
        _spot(since("bootloader", last), lambda _: boot_env_write(1)),
        _spot(since("start", last), lambda _: console("BROWNOUT INIT slot=")),
        _spot(since("start", last), lambda rng: operation(rng.randint(1, 40))),
        _spot(since("start", last), lambda rng: flush(rng.randint(1, 8))),
    )


_RESTARTS: Final = ("ArtifactReboot", "ArtifactRollbackReboot")
_TRIAL: Final = _starting("ArtifactReboot")

SPOTS: Final[Mapping[Stage, tuple[Spot, ...]]] = {
    "install": (
        _spot("Download", lambda _: state("Download"), by_device=True),
        _spot("Download", lambda rng: slot_write(percent=_percent(rng)), by_device=True),
        _spot("Download", lambda rng: downloaded(percent=_percent(rng)), by_device=True),
        _spot("Download", lambda rng: stream_byte(rng.choice((0, 500, 3000, 9000)))),
        _spot("Download", lambda rng: stream_byte(rng.choice((200, 700, 2000)), "up")),
        _spot("Download", lambda rng: operation(rng.randint(1, 150))),
        _spot("Download", lambda rng: flush(rng.randint(1, 6))),
        _spot("Download", lambda rng: writes_to("data", nth=rng.randint(1, 10))),
        _spot("Download", lambda _: on_record("ArtifactInstall")),
        *_entered("ArtifactInstall", "ArtifactReboot"),
        *_within(12, "ArtifactInstall"),
        *_within(6, "ArtifactReboot"),
        _spot("ArtifactInstall", lambda _: boot_env_write(1, after="ArtifactInstall")),
        _spot("ArtifactInstall", lambda rng: after_switch(operations=rng.randint(1, 24))),
        _spot("ArtifactInstall", lambda _: on_record("ArtifactReboot")),
        _spot("ArtifactReboot", lambda _: console("updater: installed")),
    ),
    "prove": (
        *_TRIAL,
        *_entered("ArtifactVerifyReboot", "ArtifactCommit", "Cleanup"),
        *_within(6, "ArtifactVerifyReboot", "Cleanup"),
        *_within(12, "ArtifactCommit"),
        _spot("ArtifactVerifyReboot", lambda _: on_record("ArtifactCommit")),
        _spot("ArtifactCommit", lambda _: boot_env_write(1, after="ArtifactCommit")),
        _spot("ArtifactCommit", lambda _: on_record("Cleanup")),
        _spot("Cleanup", lambda _: console("updater: committed")),
    ),
    "leave": (
        *_TRIAL,
        *_entered("ArtifactVerifyReboot", "ArtifactRollback", "ArtifactRollbackReboot"),
        _spot(
            since("bootloader", "ArtifactRollbackReboot"),
            lambda _: boot_env_write(1, after="ArtifactRollbackReboot"),
        ),
        # The old system's start: what the bootloader counted may not be settled yet.
        _spot(since("start", "ArtifactRollbackReboot"), lambda _: console("BROWNOUT INIT slot=a")),
        *_entered("ArtifactVerifyRollbackReboot", "ArtifactFailure", "Cleanup"),
        *_within(12, "ArtifactRollback"),
        *_within(40, "ArtifactRollbackReboot"),
        *_within(6, "ArtifactVerifyReboot", "ArtifactVerifyRollbackReboot"),
        *_within(6, "ArtifactFailure", "Cleanup"),
        _spot("ArtifactRollback", lambda _: boot_env_write(1, after="ArtifactRollback")),
        _spot("ArtifactRollback", lambda _: on_record("ArtifactRollbackReboot")),
        _spot("ArtifactRollbackReboot", lambda _: console("BROWNOUT REBOOT")),
        _spot("ArtifactVerifyRollbackReboot", lambda _: on_record("ArtifactFailure")),
        _spot("Cleanup", lambda _: console("updater: rolled back")),
    ),
    "fall back": (
        *_TRIAL,
        _spot(since("bootloader", "ArtifactReboot"), lambda _: boot_env_write(2)),
        _spot(since("start", "ArtifactReboot"), lambda _: console("BROWNOUT INIT slot=a")),
        *_entered("ArtifactRollback", "Cleanup"),
        *_within(6, "ArtifactRollback", "Cleanup"),
        _spot("Cleanup", lambda _: console("updater: rolled back")),
    ),
    "roll back": (
        *_entered("ArtifactRollback", "ArtifactFailure", "Cleanup"),
        _spot("ArtifactRollback", lambda _: boot_env_write(1, after="ArtifactRollback")),
        *_within(12, "ArtifactRollback"),
        *_within(6, "ArtifactFailure", "Cleanup"),
        _spot("ArtifactRollback", lambda rng: operation(rng.randint(1, 25))),
        _spot("Cleanup", lambda _: console("updater: rolled back")),
    ),
    "power is back": _starting(""),
}

_STREAM: Final = ("downloaded", "stream byte", "image written", "state")
_ANYWHERE: Final[tuple[Stage, ...]] = (
    "install",
    "prove",
    "leave",
    "fall back",
    "roll back",
    "power is back",
)


def _cut(rng: Random) -> Fault:
    return power_cut(_model(rng))


def _model(rng: Random) -> CacheModelName:
    return rng.choices(list(MODELS), list(MODELS.values()))[0]


def _drop(rng: Random) -> Fault:
    kinds: tuple[DropKind, ...] = (
        *("fin", "reset", "stall", "refuse", "black-hole", "corrupt", "duplicate"),
    )
    kind = rng.choice(kinds)
    lasts = rng.choice((2, 4, 6)) if kind in ("stall", "refuse", "black-hole") else None
    times = rng.choice((1, 1, 2, 4)) if kind in ("fin", "reset") else 1
    return connection(kind, lasts_s=lasts, times=times)


def _slow(rng: Random) -> Fault:
    # Slow enough to be kept over a restart, as the client keeps slow downloads.
    rate = rng.choice((256, 384)) * 1024
    return slow_network(bytes_per_s=rate, lasts_s=rng.choice((20, 30)))


def _server(rng: Random) -> Fault:
    status = rng.choice((404, 403, 429, 500, 503))
    return server_answers(status, times=rng.choice((1, 2)))


def _content(rng: Random) -> Fault:
    return rng.choice((wrong_content("garbage"), wrong_content("truncated"), captive_portal()))


def _certificate(rng: Random) -> Fault:
    return bad_certificate(
        rng.choice(("expired", "not-yet-valid", "wrong-name", "unknown-authority"))
    )


def _slot_error(rng: Random) -> Fault:
    how: Access = rng.choice(("write", "write", "read"))
    return storage_error(how, area="passive slot", count=rng.randint(1, 3))


def _slow_disk(rng: Random) -> Fault:
    on: Access = rng.choice(("write", "flush"))
    return slow_disk(rng.choice((0.05, 0.5)), on, count=20)


def _clock(rng: Random) -> Fault:
    return clock(rng.choice(("1970-01-01T00:00:10", "2003-01-01", "2037-06-01")))


def _killed(rng: Random) -> Fault:
    return process_killed(rng.choice(("KILL", "KILL", "TERM", "INT")))


def _second(rng: Random) -> Fault:
    return second_command(rng.choice(("install", "commit", "rollback", "status", "resume")))


KINDS: Final = (
    Kind(60, _cut, _ANYWHERE),
    Kind(8, lambda rng: brown_out(rng.randint(2, 4), _model(rng)), _ANYWHERE),
    Kind(14, _drop, ("install",), _STREAM),
    Kind(7, _slow, ("install",), ("downloaded", "state"), lasts=True, surrounds=5),
    Kind(4, lambda rng: link_down(lasts_s=rng.choice((1, 3))), ("install",), _STREAM),
    Kind(2, lambda _: link_down(), ("prove", "power is back"), ("console",), lasts=True),
    Kind(2, lambda _: connection("refuse"), ("prove", "power is back"), ("console",), lasts=True),
    Kind(4, _server, ("install",), ("downloaded",), lasts=True),
    Kind(3, _content, ("install",), ("downloaded",), lasts=True),
    Kind(3, _certificate, ("install",), ("downloaded",), lasts=True),
    Kind(1, lambda _: name_gone(), ("install",), ("none",), by_device=True, lasts=True),
    Kind(6, _slot_error, ("install",), ("image written", "operation")),
    Kind(4, lambda rng: storage_error("flush", count=rng.randint(1, 2)), ("install",),
         ("image written", "flush", "record", "state")),
    Kind(3, lambda rng: storage_error("write", area="boot environment", count=rng.randint(1, 2)),
         ("install",), ("image written",), lasts=True),
    Kind(2, lambda _: read_only("passive slot"), ("install",), ("image written",)),
    Kind(5, lambda _: bit_flip(), ("install",), ("image written",)),
    Kind(2, lambda _: bit_rot("boot environment", percent=0), ("prove",), ("none",),
         feature="uboot", lasts=True),
    Kind(3, _slow_disk,
         ("install",), ("image written", "state"), lasts=True, surrounds=2),
    Kind(2, lambda rng: data_full(rng.choice((0, 2 << 20))), ("install",),
         ("image written", "state"), by_device=True, lasts=True),
    Kind(4, _clock, ("install",), ("image written", "downloaded", "state"),
         by_device=True, lasts=True),
    Kind(2, lambda _: clock_battery(), ("install", "prove", "leave"), ("none",),
         lasts=True, surrounds=2),
    Kind(6, _killed, ("install",), ("image written", "downloaded", "state"), by_device=True),
    Kind(3, lambda _: kernel_panic(), ("install",), ("image written", "state"), by_device=True),
    Kind(2, lambda _: hang(), ("install",), ("image written",), by_device=True),
    Kind(1, lambda rng: memory_pressure(rng.choice((64, 24))), ("install",), ("none",),
         by_device=True, lasts=True, surrounds=1),
    Kind(4, lambda rng: ctrl_c(rng.choice((1, 1, 3))), ("install",),
         ("image written", "downloaded", "state", "boot environment")),
    Kind(4, _second, ("install",), ("image written",), by_device=True),
)  # fmt: skip


@frozen
class Journey:
    """A sequence of steps, each with the stage that it is to a fault."""

    weight: int
    steps: tuple[str, ...]
    stages: tuple[Stage | None, ...]


def _journey(weight: int, *steps: tuple[str, Stage | None]) -> Journey:
    return Journey(weight, tuple(step for step, _ in steps), tuple(stage for _, stage in steps))


def _install(image: str) -> tuple[str, Stage | None]:
    return f"install {image}", "install"


_PROVE: Final[tuple[str, Stage | None]] = ("restart", "prove")
_LEAVE: Final[tuple[str, Stage | None]] = ("restart", "leave")
_FALL_BACK: Final[tuple[str, Stage | None]] = ("restart", "fall back")

JOURNEYS: Final = (
    _journey(12, _install("v2"), _PROVE),
    _journey(3, _install("v2"), _PROVE, _install("v1"), _PROVE),
    _journey(3, _install("v2"), ("rollback", "roll back"), _install("v2"), _PROVE),
    _journey(1, _install("v2"), ("commit", None), _PROVE),
    _journey(1, _install("v2"), _PROVE, ("commit", None), ("rollback", None), ("restart", None)),
    _journey(5, _install("unhealthy"), _LEAVE),
    _journey(2, _install("offline"), _LEAVE),
    _journey(2, _install("panics"), _FALL_BACK),
    _journey(1, _install("hangs"), _FALL_BACK),
    _journey(2, _install("v2"), _PROVE, _install("unhealthy"), _LEAVE),
    _journey(2, _install("unhealthy"), _LEAVE, _install("v2"), _PROVE),
)
IMAGES: Final = ("v1", "v2", "unhealthy", "offline", "panics", "hangs")
_RUNS_THE_CLIENT: Final = ("v1", "v2", "unhealthy")
"""Images whose client matters: a planted bug is in these."""


def images_of(plant: str, features: frozenset[str]) -> tuple[str, ...]:
    """The images that compositions may need, those with a client that matters carry `plant`."""
    names = [name for name in IMAGES if name != "hangs" or "watchdog" in features]
    return tuple(planted(name, plant) for name in names)


def planted(image: str, plant: str) -> str:
    """An image's name with the planted bug, where it has one."""
    return f"{image}+{plant}" if plant and image in _RUNS_THE_CLIENT else image


def name_of(seed: int, index: int, candidate: int) -> str:
    """How a drawn composition is called: `7/42.3`."""
    return f"{seed}/{index}.{candidate}"


def draw(
    features: frozenset[str], seed: int, index: int, candidate: int, plant: str = ""
) -> Composition:
    """The composition of these numbers, on a rig with these features."""
    rng = random.Random(f"campaign {name_of(seed, index, candidate)}")  # noqa: S311 - to be repeatable
    journeys = [j for j in JOURNEYS if "watchdog" in features or "install hangs" not in j.steps]
    journey = rng.choices(journeys, [j.weight for j in journeys])[0]
    placed = [_placed(rng, features, journey)]
    for _ in range(rng.choices((0, 1, 2), (5, 3, 2))[0]):
        placed += _further(rng, features, journey, placed)
    if rng.random() < SURROUNDED:
        condition = _surrounding(rng, features, journey, placed[0])
        placed = [*([condition] if condition is not None else []), *placed][:MOST_DRAWN]
    steps = []
    for text in journey.steps:
        action, _, image = text.partition(" ")
        steps.append(Step(action, planted(image, plant) if image else ""))
    return Composition(
        base=planted("v1", plant),
        steps=tuple(steps),
        # In the order of arming; chains stand behind what they wait for in any case.
        faults=tuple(sorted(placed, key=lambda p: p.step)),
        seed=rng.getrandbits(31),
    )


def candidates(
    features: frozenset[str], seed: int, index: int, plant: str = ""
) -> list[Composition]:
    """All candidates of an index."""
    return [draw(features, seed, index, number, plant) for number in range(CANDIDATES)]


@frozen
class Struck:
    """How often what was struck, as steering sees it.

    Attributes:
        cells: each cell.
        places: each state, by each family of faults.
        faults: each kind of fault.
    """

    cells: Mapping[Cell, float]
    places: Mapping[tuple[str, str], float]
    faults: Mapping[str, float]

    @classmethod
    def of(cls, struck: Mapping[Cell, int], tried: Mapping[Cell, int] | None = None) -> Struck:
        """Of how often cells were struck, and how often it was tried.

        Only what struck is covered. But what was tried in vain is not tried for ever: it counts
        half.
        """
        tried = tried or {}
        cells = {
            cell: max(struck.get(cell, 0), (struck.get(cell, 0) + tried.get(cell, 0)) / 2)
            for cell in {**struck, **tried}
        }
        places: dict[tuple[str, str], float] = {}
        faults: dict[str, float] = {}
        for cell, count in cells.items():
            place = (cell.state, family_of(cell.fault))
            places[place] = places.get(place, 0) + count
            faults[cell.fault] = faults.get(cell.fault, 0) + count
        return cls(cells, places, faults)


def family_of(fault: str) -> str:
    """What faults by these names have in common: all cuts are one family, all EIOs are."""
    return fault.partition(" ")[0]


def choose(
    offered: Sequence[Composition],
    struck: Mapping[Cell, int],
    tried: Mapping[Cell, int] | None = None,
) -> int:
    """Which candidate to run: the one that promises most; a tie is the first."""
    so_far = Struck.of(struck, tried)
    return max(range(len(offered)), key=lambda n: (worth(offered[n], so_far), -n))


def worth(composition: Composition, struck: Struck) -> float:
    """How much a composition promises: what is new in each cell where it is expected to strike.

    A cell that was struck n times counts 1 / (1 + n), and so do its place and its kind of fault. So
    the many cells of power cuts don't keep the rare kinds of faults waiting, and the few cells of
    those are struck again while there are new ones elsewhere.
    """
    return sum(
        1 / (1 + struck.cells.get(cell, 0))
        + 1 / (1 + struck.places.get((cell.state, family_of(cell.fault)), 0))
        + 1 / (1 + struck.faults.get(cell.fault, 0))
        for cell in {cell for cell in expected(composition) if cell.state}
    )


def expected(composition: Composition) -> list[Cell]:
    """The cells where its faults are expected to strike, one a fault; state "" if unknown."""
    stages = stages_of(composition)
    return [
        Cell(
            _expected_state(placed.fault.trigger, stages[placed.step]),
            fault_name(placed.fault),
            trigger_name(placed.fault.trigger),
        )
        for placed in composition.faults
    ]


# -- what prevents what --------------------------------------------------------------------------

_SWITCH: Final = 1.0
"""Where the state that switches slots begins in an installation, as `_span` counts."""
_NEARLY_LOADED: Final = 0.9
_ENDING: Final = (
    *(PowerCut, KernelPanic, Hang, ProcessKilled, Interrupt, WrongContent, BadCertificate),
    *(ServerAnswers, StorageError, ReadOnly, NameGone, BitFlip, DataFull),
)


def ends(fault: Fault) -> bool:
    """Whether a client that is in order does not go on with a step in which this strikes."""
    if isinstance(fault, LinkDown):
        return fault.lasts_s is None
    if isinstance(fault, NetworkDrop):
        return fault.lasts_s is None and fault.kind in ("stall", "refuse", "black-hole")
    return isinstance(fault, _ENDING)


def lasts(fault: Fault) -> bool:
    """Whether it goes on until the scenario ends it, so that no later step works either."""
    if isinstance(fault, LinkDown | NetworkDrop):
        return ends(fault)
    full = isinstance(fault, DataFull) and fault.leave_bytes == 0
    return full or isinstance(fault, ReadOnly | NameGone | BadCertificate)


def prevented(composition: Composition) -> tuple[bool, ...]:
    """For each fault, whether another one is expected to keep it from striking."""
    return _prevented(stages_of(composition), composition.faults)


def _prevented(stages: Sequence[Stage | None], faults: Sequence[Placed]) -> tuple[bool, ...]:
    found: list[bool] = []
    for placed in faults:
        trigger = placed.fault.trigger
        first = trigger.first if isinstance(trigger, After) else None
        vain = any(was for was, one in zip(found, faults, strict=False) if one.fault == first)
        if isinstance(first, PowerCut):
            # When power is back, nothing else is armed; a brown-out's further cuts would be.
            found.append(vain or isinstance(first, BrownOut))
            continue
        if first is not None:
            vain = vain or ends(first) or not _follows(placed, stages[placed.step])
        found.append(
            vain
            or any(
                other is not placed
                and not _waits_for_power(other.fault)
                and _stands_before(other, placed, stages)
                for other in faults
            )
        )
    return tuple(found)


def _waited_for(fault: Fault) -> Iterator[Fault]:
    """The faults of a chain before this one."""
    while isinstance(fault.trigger, After):
        fault = fault.trigger.first
        yield fault


def _waits_for_power(fault: Fault) -> bool:
    return isinstance(fault.trigger, After) and isinstance(fault.trigger.first, PowerCut)


def _stands_before(other: Placed, placed: Placed, stages: Sequence[Stage | None]) -> bool:
    """Whether a fault ends what another one waits for; what strikes at once waits for nothing."""
    at_once = placed.fault.trigger is None
    if at_once or other.step > placed.step or not ends(other.fault):
        return False
    if placed.fault in _waited_for(other.fault):
        return False
    begins, _ = _span(other.fault.trigger, stages[other.step])
    if other.step == placed.step:
        return begins <= _span(placed.fault.trigger, stages[placed.step])[1]
    # A device that dies behind the switch starts the new system by itself.
    dies = isinstance(other.fault, PowerCut | KernelPanic | Hang)
    switched = stages[other.step] == "install" and begins >= _SWITCH
    return lasts(other.fault) or (dies and switched and other.step == placed.step - 1)


def _follows(placed: Placed, stage: Stage | None) -> bool:
    """Whether a chain's second trigger may still come when its first fault has struck."""
    trigger = placed.fault.trigger
    assert isinstance(trigger, After)
    begun = _span(trigger.first.trigger, stage)[0]
    match trigger.then:
        case AtState() | ConsoleSays() | OnRecord():
            return _span(trigger.then, stage)[0] > begun
        case SlotWrite() | Downloaded():
            # Counted from then on: so much must be left.
            return begun + _span(trigger.then, stage)[0] < _SWITCH
        case StreamByte():
            return begun < _NEARLY_LOADED
        case _:
            return True


def _span(trigger: Trigger | None, stage: Stage | None) -> tuple[float, float]:
    """From where to where in a step a trigger may fire: the states' numbers, and shares of them."""
    if isinstance(trigger, After):
        first, then = _span(trigger.first.trigger, stage), _span(trigger.then, stage)
        return max(first[0], then[0]), max(first[1], then[1])
    states = list(dict.fromkeys(spot.expects for spot in SPOTS[stage])) if stage else []
    name = _expected_state(trigger, stage)
    at = float(states.index(name)) if name in states else -1.0
    match trigger:
        case SlotWrite(percent=percent) | Downloaded(percent=percent):
            return at + percent / 101, at + percent / 101
        case AtState(percent=None, operations=None):
            return at, at
        case OnRecord():
            return at + 0.99, at + 0.99
        case None:
            return at, at
        case _:
            return at, at + 0.98


def stages_of(composition: Composition) -> tuple[Stage | None, ...]:
    """What each step of a composition is to a fault."""
    found: list[Stage | None] = []
    waiting = ""
    for step in composition.steps:
        if step.action == "install":
            waiting = step.image
            found.append("install")
        elif step.action == "restart" and waiting:
            sick = waiting.partition("+")[0] in ("panics", "hangs")
            found.append("fall back" if sick else "leave" if is_sick(waiting) else "prove")
            waiting = ""
        elif step.action == "rollback" and waiting:
            found.append("roll back")
            waiting = ""
        else:
            found.append(None)
    return tuple(found)


def universe(features: frozenset[str]) -> frozenset[Cell]:
    """All cells that are expected of single faults on a rig: what coverage is a share of."""
    cells: set[Cell] = set()
    rng = random.Random(1)  # noqa: S311 - only to draw each kind often enough
    for stage, options in _options(features).items():
        for kind, spots in options:
            for name in {fault_name(kind.make(rng)) for _ in range(60)}:
                if stage != "power is back":  # these depend on where the power went
                    cells.update(
                        Cell(spot.expects, name, trigger_name(spot.make(rng))) for spot in spots
                    )
                if kind.lasts:
                    cells.add(Cell("Idle", name, "at once"))
    return frozenset(cells)


# -- inside --------------------------------------------------------------------------------------


@functools.cache
def _options(features: frozenset[str]) -> dict[Stage, list[tuple[Kind, list[Spot]]]]:
    """By stage: the kinds that a rig can do there, each with its spots (maybe none)."""
    rng = random.Random(1)  # noqa: S311 - any fault of the kind says what it needs
    able = [
        kind
        for kind in KINDS
        if kind.make(rng).features() <= features and (not kind.feature or kind.feature in features)
    ]
    return {
        stage: [(kind, _spots(kind, stage)) for kind in able if stage in kind.where]
        for stage in SPOTS
    }


def _spots(kind: Kind, stage: Stage) -> list[Spot]:
    rng = random.Random(1)  # noqa: S311 - only the kinds of triggers are looked at
    return [
        spot
        for spot in SPOTS[stage]
        if (spot.by_device or not kind.by_device)
        and (not kind.triggers or trigger_name(spot.make(rng)) in kind.triggers)
    ]


def _drawn(rng: Random, options: Sequence[tuple[Kind, list[Spot]]]) -> tuple[Kind, list[Spot]]:
    return rng.choices(options, [kind.weight for kind, _ in options])[0]


def _placed(rng: Random, features: frozenset[str], journey: Journey) -> Placed:
    """A fault of its own, at some step."""
    places = [number for number, stage in enumerate(journey.stages) if stage is not None]
    step = rng.choice(places)
    stage = journey.stages[step]
    assert stage is not None
    kind, spots = _drawn(rng, [o for o in _options(features)[stage] if o[1] or o[0].lasts])
    there: list[Spot | None] = [*spots, *([None] if kind.lasts else [])]
    spot = rng.choice(there)
    fault = kind.make(rng)
    return Placed(step, fault if spot is None else fault.when(spot.make(rng)))


def _further(
    rng: Random, features: frozenset[str], journey: Journey, placed: Sequence[Placed]
) -> list[Placed]:
    """One more fault that nothing prevents and that prevents nothing; none if none is drawn."""
    for _ in range(DRAWS):
        # A brown-out's further cuts take with them what was armed when power came back.
        if rng.random() < CHAINED and not isinstance(placed[-1].fault, BrownOut):
            drawn = _chained(rng, features, journey, placed[-1])
        else:
            drawn = _placed(rng, features, journey)
        if not any(_prevented(journey.stages, [*placed, drawn])):
            return [drawn]
    return []


def _surrounding(
    rng: Random, features: frozenset[str], journey: Journey, first: Placed
) -> Placed | None:
    """A condition that holds from before the step of a fault on."""
    stage = journey.stages[first.step]
    assert stage is not None
    options = [o for o in _options(features)[stage] if o[0].surrounds]
    if not options:
        return None
    kind, _ = rng.choices(options, [kind.surrounds for kind, _ in options])[0]
    return Placed(first.step, kind.make(rng))


def _chained(rng: Random, features: frozenset[str], journey: Journey, last: Placed) -> Placed:
    """A fault that waits for the last one: in the same step, or when power is back."""
    cut = isinstance(last.fault, PowerCut)
    stage: Stage | None = "power is back" if cut else journey.stages[last.step]
    assert stage is not None
    kind, spots = _drawn(rng, [o for o in _options(features)[stage] if o[1] and not o[0].by_device])
    fault = kind.make(rng)
    then = rng.choice(spots).make(rng)
    if isinstance(fault, BitFlip):
        # It has its place in the slot, whoever went before.
        return Placed(last.step, fault.when(then))
    return Placed(last.step, fault.when(after(last.fault, then)))


def _expected_state(trigger: Trigger | None, stage: Stage | None) -> str:
    if isinstance(trigger, After):
        if not isinstance(trigger.first, PowerCut):
            return _expected_state(trigger.then, stage)
        place = _expected_state(trigger.then, "power is back")
        cut_in = _expected_state(trigger.first.trigger, stage).rpartition(" ")[2]
        return since(place, "" if cut_in == "Idle" else cut_in)
    if trigger is None or trigger == now():
        return "Idle"
    match trigger:
        case AtState(name=name):
            return name
        case BootEnvWrite(after=str() as name):
            # Behind a restart it is the bootloader that writes.
            return since("bootloader", name) if name in _RESTARTS else name
        case _:
            pass
    rng = random.Random(1)  # noqa: S311 - only the kinds are compared
    for spot in SPOTS[stage] if stage is not None else ():
        there = spot.make(rng)
        if type(there) is type(trigger) and _same_place(there, trigger):
            return spot.expects
    return ""


def _same_place(one: Trigger, other: Trigger) -> bool:
    if isinstance(one, ConsoleSays | OnRecord):
        return one == other
    return True
