"""A composition: what is done to a device in one run, and what goes wrong meanwhile.

A *step* is what an operator does (install an image, restart, commit, roll back); a fault is
*placed* at the step before which it is armed, and strikes at its trigger. A composition holds
everything that a run depends on besides rig and images, so it can be kept in a file, done again,
and made smaller. Frozen values, read strictly; nothing here touches a device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from attrs import field, frozen, validators

from framework.campaign.errors import CompositionError
from framework.faults import After, Fault, FaultError
from framework.faults.values import from_values, to_values

ACTIONS: Final = ("install", "restart", "commit", "rollback")
SICK: Final = ("unhealthy", "panics", "hangs", "offline")
"""Images that must never be committed."""
MOST_STEPS: Final = 12
MOST_FAULTS: Final = 8


@frozen
class Step:
    """Something that an operator does.

    Attributes:
        action: what.
        image: the image that is installed; empty for the rest.
    """

    action: str = field(validator=validators.in_(ACTIONS))
    image: str = ""

    def __attrs_post_init__(self) -> None:
        if bool(self.image) != (self.action == "install"):
            raise CompositionError(f"{self.action} {self.image!r}: only `install` takes an image")

    def __str__(self) -> str:
        """The step in words."""
        return f"{self.action} {self.image}".strip()


@frozen
class Placed:
    """A fault, and the step (from 0) before which it is armed."""

    step: int = field(validator=validators.ge(0))
    fault: Fault


@frozen
class Composition:
    """One run, but for its rig.

    Attributes:
        base: the image in slot a at the beginning.
        steps: what is done, in order.
        faults: what goes wrong, in the order of arming.
        seed: of everything that a fault leaves open, such as what a cache loses.
    """

    base: str
    steps: tuple[Step, ...]
    faults: tuple[Placed, ...] = ()
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if not 1 <= len(self.steps) <= MOST_STEPS or len(self.faults) > MOST_FAULTS:
            raise CompositionError(
                f"{len(self.steps)} steps and {len(self.faults)} faults: 1 to {MOST_STEPS} steps "
                f"and at most {MOST_FAULTS} faults make a composition"
            )
        armed: list[Fault] = []
        for placed in self.faults:
            fault = placed.fault
            if placed.step >= len(self.steps):
                raise CompositionError(f"{fault}: armed at step {placed.step}, which is not there")
            if isinstance(fault.trigger, After) and fault.trigger.first not in armed:
                raise CompositionError(f"{fault}: the fault that it waits for is not armed before")
            armed.append(fault)
        if "install" not in {step.action for step in self.steps}:
            raise CompositionError("nothing is installed: there is no step `install`")

    @property
    def images(self) -> tuple[str, ...]:
        """All images that it needs, the base first, each once."""
        installed = (step.image for step in self.steps if step.image)
        return tuple(dict.fromkeys((self.base, *installed)))

    def at(self, step: int) -> Iterator[Fault]:
        """The faults that are armed before a step."""
        return (placed.fault for placed in self.faults if placed.step == step)

    def features(self) -> frozenset[str]:
        """The labgrid features that a rig must have for it."""
        needed = frozenset[str]().union(*(placed.fault.features() for placed in self.faults))
        hangs = any(image.startswith("hangs") for image in self.images)
        return needed | ({"watchdog"} if hangs else frozenset())

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(self.to_values(), sort_keys=True)

    def to_values(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "base": self.base,
            "steps": [str(step) for step in self.steps],
            "faults": [{"step": placed.step, **to_values(placed.fault)} for placed in self.faults],
            "seed": self.seed,
        }

    @classmethod
    def from_values(cls, values: object) -> Composition:
        """Of plain values. Raises CompositionError."""
        if not isinstance(values, Mapping):
            raise CompositionError(f"no composition: {values!r:.80}")
        try:
            return cls(
                base=_text(values["base"]),
                steps=tuple(_step(_text(step)) for step in values["steps"]),
                faults=tuple(_placed(placed) for placed in values["faults"]),
                seed=int(values["seed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, FaultError) as error:
            raise CompositionError(f"no composition: {error!r:.200}") from error

    @classmethod
    def from_json(cls, text: str) -> Composition:
        """Of a line of JSON. Raises CompositionError."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CompositionError(f"no composition: {error}") from error
        return cls.from_values(values)

    def __str__(self) -> str:
        """The composition as a sentence."""
        steps = ", ".join(map(str, self.steps))
        faults = "; ".join(
            f"{placed.fault}" + (f" [from `{self.steps[placed.step]}` on]" if placed.step else "")
            for placed in self.faults
        )
        return f"{self.base}: {steps}" + (f"; {faults}" if faults else "")


def is_sick(image: str) -> bool:
    """Whether an image must never be committed, whatever is planted in it."""
    return image.partition("+")[0] in SICK


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _step(text: str) -> Step:
    action, _, image = text.partition(" ")
    if action not in ACTIONS:
        raise ValueError(f"{action!r} is no step; there are {', '.join(ACTIONS)}")
    return Step(action, image)


def _placed(values: Mapping[str, Any]) -> Placed:
    fields = dict(values)
    return Placed(int(fields.pop("step")), from_values(fields))
