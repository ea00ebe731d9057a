"""Makes a failing composition smaller, for as long as it violates the same invariant.

Whoever gets a bundle wants to know what matters in it. A composition is made simpler in the order
in which that pays: faults are dropped (and what waited for them waits no more), steps are dropped,
a chain becomes a trigger of its own, a brown-out becomes one cut, a cache model becomes a kinder
one, an image becomes an ordinary one, a trigger comes earlier and becomes round. Each candidate is
strictly smaller by `size`, so the search ends; the first candidate that still violates is kept and
the search begins again with it (greedy descent, as delta debugging's: Zeller and Hildebrandt,
"Simplifying and Isolating Failure-Inducing Input", 2002).

Hypothesis' shrinker is not used. It makes the sequence of random choices smaller that led to a
value, and needs thousands of cheap runs for that; here a run takes most of a minute on a rig, and
what is simpler is known of the value itself. Nothing here touches a rig: the caller runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
from attrs import evolve, field, frozen

from framework.campaign.composition import Composition, Placed, Step, is_sick
from framework.campaign.errors import CompositionError
from framework.campaign.space import MODELS, stages_of
from framework.faults import (
    After,
    AfterSwitch,
    AtState,
    BootEnvWrite,
    BrownOut,
    Downloaded,
    Fault,
    FaultError,
    NetworkDrop,
    NthFlush,
    Operation,
    PowerCut,
    SlotWrite,
    StorageError,
    StreamByte,
    Trigger,
    Writes,
)

MOST_RUNS: Final = 60
KINDER: Final = tuple(MODELS)
"""Cache models, the kindest first."""
_ROUND: Final = (0, 1, 10, 20, 50)

Violates = Callable[[Composition], bool]
Say = Callable[[str], None]


@frozen
class Shrunk:
    """What became of a composition.

    Attributes:
        composition: the smallest that was found.
        runs: how many were tried.
        steps: the sentences of those that were kept, from the first on.
        complete: whether every simpler neighbour was tried; False if the runs were used up.
    """

    composition: Composition
    runs: int
    steps: tuple[str, ...] = field(factory=tuple)
    complete: bool = True


def shrink(
    composition: Composition,
    violates: Violates,
    say: Say = lambda text: None,
    most_runs: int = MOST_RUNS,
) -> Shrunk:
    """Make `composition` smaller while `violates` says that it still does.

    It is taken for granted that the composition itself violates. No composition is tried twice.
    """
    tried = {composition.to_json()}
    kept: list[str] = []
    runs = 0
    smaller: Composition | None = composition
    while smaller is not None:
        composition, smaller = smaller, None
        for candidate in simpler(composition):
            text = candidate.to_json()
            if text in tried:
                continue
            if runs >= most_runs:
                return Shrunk(composition, runs, tuple(kept), complete=False)
            tried.add(text)
            runs += 1
            say(f"{runs}: {candidate}")
            if violates(candidate):
                say("   still violates")
                kept.append(str(candidate))
                smaller = candidate
                break
    return Shrunk(composition, runs, tuple(kept))


def size(composition: Composition) -> tuple[float, ...]:
    """How large a composition is: faults, steps, then the details of both."""
    faults = [placed.fault for placed in composition.faults]
    return (
        len(faults),
        len(composition.steps),
        sum(isinstance(fault.trigger, After) for fault in faults),
        sum(_weight_of_images(composition)),
        sum(_weight(fault) for fault in faults),
        sum(_lateness(_own(fault.trigger)) for fault in faults),
    )


def simpler(composition: Composition) -> Iterator[Composition]:
    """All compositions that are one simplification away, what saves most first."""
    here = size(composition)
    for make in (_without_faults, _without_steps, _unchained, _plainer_images, _milder, _earlier):
        for candidate in make(composition):
            if size(candidate) < here:
                yield candidate


# -- the simplifications -------------------------------------------------------------------------


def _made(composition: Composition, **changes: Any) -> Iterator[Composition]:
    """The composition with changes, if that makes sense."""
    try:
        yield evolve(composition, **changes)
    except (CompositionError, FaultError, ValueError):
        return


def _without_faults(composition: Composition) -> Iterator[Composition]:
    """Without any fault, without each single one, without all but one."""
    faults = composition.faults
    yield from _made(composition, faults=())
    if len(faults) > 2:
        for lone in faults:
            alone = Placed(lone.step, _free(lone.fault))
            yield from _made(composition, faults=(alone,))
    for gone in range(len(faults)):
        left = list(faults[:gone])
        for placed in faults[gone + 1 :]:
            trigger = placed.fault.trigger
            waits = isinstance(trigger, After) and trigger.first == faults[gone].fault
            left.append(Placed(placed.step, _free(placed.fault)) if waits else placed)
        yield from _made(composition, faults=_chained_anew(faults, left))


def _chained_anew(before: tuple[Placed, ...], left: list[Placed]) -> tuple[Placed, ...]:
    """Chains that name a fault which has changed name what it has become."""
    became: dict[str, Fault] = {}
    made: list[Placed] = []
    armed: list[Fault] = []
    old = {str(placed.fault) for placed in before}
    for placed in left:
        fault = placed.fault
        trigger = fault.trigger
        if isinstance(trigger, After) and trigger.first not in armed:
            first = became.get(str(trigger.first))
            fault = _with(fault, evolve(trigger, first=first)) if first else _free(fault)
        if str(placed.fault) in old:
            became[str(placed.fault)] = fault
        armed.append(fault)
        made.append(Placed(placed.step, fault))
    return tuple(made)


def _without_steps(composition: Composition) -> Iterator[Composition]:
    """Without the last steps, without a whole update, without each single step."""
    steps = composition.steps
    cuts = [(number, len(steps)) for number in range(1, len(steps))]
    cuts += [(number, number + 2) for number in range(len(steps) - 1)]
    cuts += [(number, number + 1) for number in range(len(steps))]
    for begin, end in cuts:
        faults = [
            Placed(placed.step - (end - begin if placed.step >= end else 0), placed.fault)
            for placed in composition.faults
            if not begin <= placed.step < end
        ]
        if len(faults) == len(composition.faults):
            left = (*steps[:begin], *steps[end:])
            yield from _made(composition, steps=left, faults=tuple(faults))


def _unchained(composition: Composition) -> Iterator[Composition]:
    """A fault that waits for another one waits for its own trigger only."""
    for number, placed in enumerate(composition.faults):
        if isinstance(placed.fault.trigger, After):
            yield from _replaced(composition, number, _free(placed.fault))


def _plainer_images(composition: Composition) -> Iterator[Composition]:
    """A sick image that still runs instead of one that doesn't, a healthy one instead of that."""
    for number, step in enumerate(composition.steps):
        for name in _plainer(step.image):
            steps = list(composition.steps)
            steps[number] = Step("install", name)
            yield from _made(composition, steps=tuple(steps))


def _plainer(image: str) -> Iterator[str]:
    base, plus, plant = image.partition("+")
    if not base or not is_sick(image):
        return
    plant = plant or ""
    yield f"v2{plus}{plant}"
    if base != "unhealthy":
        yield f"unhealthy{plus}{plant}"


def _milder(composition: Composition) -> Iterator[Composition]:
    """A plainer fault at the same trigger."""
    for number, placed in enumerate(composition.faults):
        for fault in _milder_faults(placed.fault):
            yield from _replaced(composition, number, fault)


def _milder_faults(fault: Fault) -> Iterator[Fault]:
    match fault:
        case BrownOut(cuts=cuts, model=model, trigger=trigger):
            yield PowerCut(model, trigger=trigger)
            if cuts > 2:
                yield evolve(fault, cuts=2)
        case PowerCut(model=str() as model) if model in KINDER:
            for kinder in KINDER[: KINDER.index(model)]:
                yield evolve(fault, model=kinder)
        case NetworkDrop(times=times) if times > 1:
            yield evolve(fault, times=1)
        case StorageError(count=count) if count is not None and count > 1:
            yield evolve(fault, count=1)
        case _:
            return


def _earlier(composition: Composition) -> Iterator[Composition]:
    """The same trigger, earlier or at a rounder place; a state's beginning instead of a place."""
    stages = stages_of(composition)
    for number, placed in enumerate(composition.faults):
        trigger = placed.fault.trigger
        if stages[placed.step] is None:
            continue
        for there in _earlier_triggers(_own(trigger)):
            if isinstance(trigger, After):
                moved: Trigger = evolve(trigger, then=there)
            else:
                moved = there
            yield from _replaced(composition, number, _with(placed.fault, moved))


def _earlier_triggers(trigger: Trigger | None) -> Iterator[Trigger]:
    match trigger:
        case SlotWrite(percent=percent) | Downloaded(percent=percent):
            yield from (evolve(trigger, percent=p) for p in _ROUND if p < percent)
        case AtState(operations=int() as operations):
            yield evolve(trigger, operations=None)
            yield from (evolve(trigger, operations=n) for n in _smaller(operations))
        case AtState(percent=percent) if percent is not None:
            yield evolve(trigger, percent=None)
        case Operation(number=number) | NthFlush(number=number):
            yield from (evolve(trigger, number=n) for n in _smaller(number))
        case StreamByte(number=number):
            yield from (evolve(trigger, number=n) for n in (0, *_smaller(number)) if n < number)
        case AfterSwitch(operations=operations):
            yield from (evolve(trigger, operations=n) for n in _smaller(operations))
        case Writes(nth=nth):
            yield from (evolve(trigger, nth=n) for n in _smaller(nth))
        case BootEnvWrite(nth=nth) if nth > 1:
            yield evolve(trigger, nth=nth - 1)
        case _:
            return


def _smaller(number: int) -> list[int]:
    """1, a half, and one less: few, because each costs a run."""
    return sorted({n for n in (1, number // 2, number - 1) if 1 <= n < number})


def _replaced(composition: Composition, number: int, fault: Fault) -> Iterator[Composition]:
    """One fault replaced; chains that wait for it name the new one."""
    old = composition.faults[number].fault
    faults = list(composition.faults)
    faults[number] = Placed(faults[number].step, fault)
    renamed = {old: fault}
    for later in range(number + 1, len(faults)):
        here = faults[later].fault
        trigger = here.trigger
        if isinstance(trigger, After) and trigger.first in renamed:
            moved = _with(here, evolve(trigger, first=renamed[trigger.first]))
            renamed[here] = moved
            faults[later] = Placed(faults[later].step, moved)
    yield from _made(composition, faults=tuple(faults))


# -- of single faults ----------------------------------------------------------------------------


def _own(trigger: Trigger | None) -> Trigger | None:
    """A trigger without the fault that it waits for."""
    return _own(trigger.then) if isinstance(trigger, After) else trigger


def _free(fault: Fault) -> Fault:
    """A fault that waits for nothing but its own trigger."""
    return evolve(fault, trigger=_own(fault.trigger))


def _with(fault: Fault, trigger: Trigger) -> Fault:
    return evolve(fault, trigger=trigger)


def _weight_of_images(composition: Composition) -> Iterator[int]:
    for step in composition.steps:
        base = step.image.partition("+")[0]
        yield 0 if not is_sick(step.image) else 1 if base == "unhealthy" else 2


def _weight(fault: Fault) -> float:
    """How much there is to a fault besides its trigger."""
    match fault:
        case BrownOut(cuts=cuts):
            return 100 + cuts
        case PowerCut(model=str() as model) if model in KINDER:
            return KINDER.index(model)
        case _:
            return float(
                sum(
                    value
                    for field_ in attrs.fields(type(fault))
                    if isinstance(value := getattr(fault, field_.name), int | float)
                )
            )


def _lateness(trigger: Trigger | None) -> float:
    """How late a trigger is, and how crooked."""
    match trigger:
        case AtState(operations=int() as operations):
            return 1 + operations
        case (
            SlotWrite(percent=percent)
            | Downloaded(percent=percent)
            | AtState(percent=float() | int() as percent)
        ):
            return 1 + percent
        case Operation(number=number) | NthFlush(number=number) | StreamByte(number=number):
            return number
        case AfterSwitch(operations=operations):
            return operations
        case Writes(nth=nth) | BootEnvWrite(nth=nth):
            return nth
        case _:
            return 0
