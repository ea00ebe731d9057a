"""Faults and triggers as plain values, for files and databases, and back again.

A fault is `{"fault": "PowerCut", "model": "torn", "trigger": {"trigger": "SlotWrite", …}}`: the
class's name and those of its fields that are not at their default. What is read is checked like
what is written in a scenario: by the classes' own validators, and by `Fault.when`. A cache model
must be given by name; a model made by hand has no place in a file.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Final

import attrs

from framework.faults import guest, network, operators, power, storage, triggers
from framework.faults.base import Fault
from framework.faults.errors import FaultError
from framework.faults.triggers import Trigger

FAULT: Final = "fault"
TRIGGER: Final = "trigger"
_DEEPEST: Final = 8
"""Chains longer than this are refused: nobody writes them, and a damaged file might."""


def _concrete(kind: type, modules: tuple[Any, ...]) -> dict[str, type]:
    """The attrs classes of some modules below `kind`, by name."""
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, kind)
        # Of the class itself, so that the families' bases are none.
        if value.__module__ == module.__name__ and "__attrs_attrs__" in vars(value)
    }


FAULTS: Final = _concrete(Fault, (guest, network, operators, power, storage))
TRIGGERS: Final = _concrete(Trigger, (triggers,))


def to_values(fault: Fault) -> dict[str, Any]:
    """A fault as plain values.

    Raises:
        FaultError: it holds something that has no plain value, such as a cache model's object.
    """
    return _to_values(FAULT, fault)


def from_values(values: object) -> Fault:
    """A fault of plain values.

    Raises:
        FaultError: there is no such fault, or it makes no sense; the message says which.
    """
    made = _from_values(values, 0)
    if not isinstance(made, Fault):
        raise FaultError(f"{values!r:.80}: a trigger, where a fault was expected")
    return made


def _to_values(kind: str, thing: Fault | Trigger) -> dict[str, Any]:
    values: dict[str, Any] = {kind: type(thing).__name__}
    fields: tuple[attrs.Attribute[Any], ...] = vars(type(thing))["__attrs_attrs__"]
    for field in fields:
        value = getattr(thing, field.name)
        if value != field.default:
            values[field.name] = _plain(thing, value)
    return values


def _plain(owner: object, value: object) -> Any:
    match value:
        case Fault():
            return _to_values(FAULT, value)
        case Trigger():
            return _to_values(TRIGGER, value)
        case datetime.datetime():
            return value.isoformat()
        case tuple():
            return list(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise FaultError(f"{owner}: {value!r} has no plain value")


def _from_values(values: object, depth: int) -> Fault | Trigger:
    if not isinstance(values, Mapping) or depth > _DEEPEST:
        raise FaultError(f"{values!r:.80}: not a fault or trigger")
    fields = dict(values)
    known, name = FAULTS, fields.pop(FAULT, None)
    if name is None:
        known, name = TRIGGERS, fields.pop(TRIGGER, None)
    kind = known.get(name) if isinstance(name, str) else None
    if kind is None:
        raise FaultError(f"{name!r:.80}: there is no such fault or trigger")
    given = {key: _rich(value, depth) for key, value in fields.items()}
    trigger = given.pop("trigger", None)
    try:
        made: Fault | Trigger = kind(**given)
    except (TypeError, ValueError) as error:
        raise FaultError(f"{name}: {error}") from error
    if trigger is None:
        return made
    if not isinstance(made, Fault) or not isinstance(trigger, Trigger):
        raise FaultError(f"{name}: has no such trigger")
    return made.when(trigger)


def _rich(value: object, depth: int) -> Any:
    if isinstance(value, Mapping):
        return _from_values(value, depth + 1)
    return tuple(value) if isinstance(value, list) else value
