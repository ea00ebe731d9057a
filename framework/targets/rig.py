"""Rig files: labgrid environments, read strictly.

labgrid warns about a key that it does not know and goes on; a misspelt `watchdg:` would then
give a rig that never catches a hang. Here an unknown key, class, image or feature ends with one
line that names file and key. `load_rig` is the front door; `check_rig` is for whoever has
already been given a path (pytest's `--lg-env`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attr
import labgrid
from labgrid.exceptions import InvalidConfigError, NoConfigFoundError
from labgrid.factory import TargetFactory, target_factory

from framework.targets.errors import InfrastructureError, RigError
from framework.targets.machine import refuse_unknown

__all__ = [
    "board_recipe",
    "check_entry",
    "check_keys",
    "check_rig",
    "is_remote",
    "load_rig",
    "open_target",
    "remote_place",
    "rig_features",
]

_TOP = ("targets", "features", "imports", "images", "paths", "tools", "options")
_TARGET = ("resources", "drivers", "features", "options")
_COMMON = ("name", "cls", "bindings")
_NOT_FROM_YAML = ("target", "state")


def _entries(where: str, section: object) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each (place, class name, arguments) of a `resources:` or `drivers:` section."""
    if section is None:
        return
    if isinstance(section, Mapping):
        for name, arguments in section.items():
            if not isinstance(arguments, Mapping):
                raise RigError(f"{where}.{name}: must be a mapping ({{}} for no arguments)")
            yield f"{where}.{name}", str(arguments.get("cls", name)), arguments
    elif isinstance(section, list):
        try:
            converted = TargetFactory._convert_to_named_list(section)
        except InvalidConfigError as error:
            raise RigError(f"{where}: {error.msg}") from error
        for index, arguments in enumerate(converted):
            yield f"{where}[{index}].{arguments['cls']}", str(arguments["cls"]), arguments
    else:
        raise RigError(f"{where}: must be a mapping or a list")


def _check_section(where: str, section: object, classes: Mapping[str, type]) -> None:
    for place, name, arguments in _entries(where, section):
        if name not in classes:
            refuse_unknown(where, [name], classes)
        check_entry(place, classes[name], arguments)


def check_entry(where: str, cls: type, arguments: Mapping[str, Any]) -> None:
    """`RigError` for the first key that a resource or driver does not know, lacks or refuses."""
    fields = [field for field in attr.fields(cls) if field.name not in _NOT_FROM_YAML]
    known = [field.name for field in fields if not field.name.startswith("_")]
    refuse_unknown(where, arguments, (*known, *_COMMON))
    for field in fields:
        if field.name in arguments:
            _check_value(f"{where}.{field.name}", field, arguments[field.name])
        elif field.default is attr.NOTHING and field.name not in _COMMON:
            raise RigError(f"{where}: has no {field.name!r}, which {cls.__name__} needs")


def _check_value(where: str, field: attr.Attribute[Any], value: object) -> None:
    """As attrs will do it, but with the file's and the key's name."""
    try:
        converted = field.converter(value) if callable(field.converter) else value
        if field.validator is not None:
            field.validator(None, field, converted)
    except (TypeError, ValueError) as error:
        wanted = f"{error.args[0]}" if error.args else str(error)
        raise RigError(f"{where}: {value!r}: {wanted}") from error


def check_keys(filename: str, data: object) -> None:
    """`RigError` for the first key of a loaded rig file that nothing would read."""
    if not isinstance(data, Mapping):
        raise RigError(f"{filename}: must be a mapping with a 'targets:' key")
    refuse_unknown(f"{filename}: top level", data, _TOP)
    targets = data.get("targets")
    if not isinstance(targets, Mapping) or not targets:
        raise RigError(f"{filename}: has no 'targets:'")
    for name, target in targets.items():
        where = f"{filename}: targets.{name}"
        if not isinstance(target, Mapping):
            raise RigError(f"{where}: must be a mapping with 'drivers:'")
        refuse_unknown(where, target, _TARGET)
        _check_section(f"{where}.resources", target.get("resources"), target_factory.resources)
        _check_section(f"{where}.drivers", target.get("drivers"), target_factory.drivers)


def _import(filename: str, modules: object) -> None:
    if modules is None:
        return
    if not isinstance(modules, list):
        raise RigError(f"{filename}: imports: must be a list")
    for module in modules:
        if str(module).endswith(".py"):
            continue  # labgrid loads these itself, from beside the rig file
        try:
            importlib.import_module(str(module))
        except ImportError as error:
            raise RigError(f"{filename}: imports: {module}: {error}") from error


def load_rig(path: Path | str) -> labgrid.Environment:
    """The labgrid environment in `path`, all keys checked, its targets not yet made.

    Raises `RigError`: one line that names the file and the key.
    """
    try:
        config = labgrid.config.Config(str(path))
        _import(str(path), config.data.get("imports"))
        environment = labgrid.Environment(config_file=str(path))
        check_keys(str(path), environment.config.data)
    except NoConfigFoundError as error:
        raise RigError(f"{path}: no such rig file") from error
    except InvalidConfigError as error:
        raise RigError(f"{path}: {' '.join(error.msg.split())}") from error
    except OSError as error:
        raise RigError(f"{path}: {error.strerror}") from error
    return environment


def rig_features(path: Path | str) -> frozenset[str]:
    """The labgrid features that a rig says it has. Raises `RigError`."""
    environment = load_rig(path)
    return frozenset(environment.get_features() | environment.get_target_features())


def remote_place(environment: labgrid.Environment, role: str = "main") -> str:
    """The name of the place that a coordinator lends a target's board as; empty if none does."""
    place = _arguments(environment, role, "resources", "RemotePlace")
    return "" if place is None else str(place.get("name", "+"))


def board_recipe(environment: labgrid.Environment, role: str = "main") -> str:
    """The recipe whose images a target's switched board runs; empty if it has none."""
    board = _arguments(environment, role, "drivers", "SwitchedBoardDriver")
    return "" if board is None else str(board.get("recipe", ""))


def _arguments(
    environment: labgrid.Environment, role: str, section: str, wanted: str
) -> Mapping[str, Any] | None:
    """What the file gives a target's first such resource or driver; None if it has none."""
    target = environment.config.data["targets"].get(role, {})
    entries = _entries("", target.get(section))
    return next((arguments for _, name, arguments in entries if name == wanted), None)


def is_remote(environment: labgrid.Environment) -> bool:
    """Whether a rig's boards are lent by a coordinator: making its targets asks for them."""
    return any(remote_place(environment, role) for role in environment.config.data["targets"])


def open_target(path: Path | str, role: str = "main") -> labgrid.Target:
    """The target of a rig, lent by its coordinator if it is. Raises RigError, InfrastructureError.

    labgrid tells of a coordinator that is away, or a place that is not locked, in many ways.
    """
    environment = load_rig(path)
    try:
        target = environment.get_target(role)
    except InvalidConfigError as error:
        raise RigError(f"{path}: {error.msg}") from error
    except Exception as error:
        if not is_remote(environment):
            raise
        said = " ".join(str(getattr(error, "msg", error)).split()) or type(error).__name__
        raise InfrastructureError(f"{path}: the place can't be used: {said}") from error
    if target is None:
        raise RigError(f"{path}: has no target {role!r}")
    return target


def check_rig(path: Path | str, role: str = "main") -> None:
    """Check a rig as far as that goes without starting anything: keys, programs, images, ports.

    Of a place that a coordinator lends only the file is checked. Raises `RigError`.
    """
    environment = load_rig(path)
    if is_remote(environment):
        return
    target = open_target(path, role)
    for driver in target.drivers:
        preflight = getattr(driver, "preflight", None)
        if callable(preflight):
            preflight()
