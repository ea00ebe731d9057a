"""Exporter files, read strictly: the other half of a rig, on the host that the board is wired to.

labgrid passes an exporter's file through Jinja before it is YAML, with `#` at a line's beginning
as a *statement*: a comment there has to begin with `##`. It takes an unknown class for a remote
resource, and tells of an unknown key with a traceback. Here each is one line.
"""

from __future__ import annotations

import contextlib
import io
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import labgrid.driver.power
import yaml
from labgrid.exceptions import NoConfigFoundError
from labgrid.factory import target_factory
from labgrid.remote import exporter
from labgrid.remote.config import ResourceConfig

from framework.targets.errors import RigError
from framework.targets.machine import refuse_unknown
from framework.targets.rig import check_entry

__all__ = ["check_exporter", "is_exporter"]

_ENVIRONMENT = {"env": {}, "isolated": False, "hostname": "host", "name": "exporter"}


def check_exporter(path: Path) -> int:
    """Check an exporter's file; how many resources it exports. Raises `RigError`."""
    groups = _load(path)
    exported = 0
    for group, resources in groups.items():
        where = f"{path}: {group}"
        if not isinstance(resources, Mapping):
            raise RigError(f"{where}: must be a mapping of resources")
        for name, arguments in resources.items():
            if name == "location":
                if not isinstance(arguments, str):
                    raise RigError(f"{where}.location: must be a text")
                continue
            if not isinstance(arguments, Mapping):
                raise RigError(f"{where}.{name}: must be a mapping ({{}} for no arguments)")
            check_resource(f"{where}.{name}", str(arguments.get("cls", name)), arguments)
            exported += 1
    if not exported:
        raise RigError(f"{path}: exports nothing")
    return exported


def check_resource(where: str, name: str, arguments: Mapping[str, Any]) -> None:
    """`RigError` for the first thing about a resource that its class would not take."""
    if name not in target_factory.resources:
        refuse_unknown(where, [name], {**target_factory.resources, **exporter.exports})
    check_entry(where, target_factory.resources[name], arguments)
    if name == "NetworkPowerPort":
        known = sorted(m.name for m in pkgutil.iter_modules(labgrid.driver.power.__path__))
        if arguments["model"] not in known:
            raise RigError(f"{where}.model: {arguments['model']!r}; labgrid has {', '.join(known)}")
    if name == "RawSerialPort" and not str(arguments["port"]).startswith("/dev/"):
        raise RigError(f"{where}.port: labgrid's exporter takes only paths in /dev")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it reads
            data = ResourceConfig(str(path.absolute()), dict(_ENVIRONMENT)).data
    except NoConfigFoundError as error:
        raise RigError(f"{path}: no such exporter file") from error
    except jinja2.TemplateSyntaxError as error:
        raise RigError(
            f"{path}: line {error.lineno}: {error.message} (Jinja: a comment line begins with '##')"
        ) from error
    except jinja2.TemplateError as error:
        raise RigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise RigError(f"{path}: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RigError(f"{path}: {error}") from error
    if not isinstance(data, Mapping):
        raise RigError(f"{path}: must be a mapping of groups")
    return data


def is_exporter(path: Path) -> bool:
    """Whether a file is an exporter's and not an environment: those have `targets:`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RigError(f"{path}: {error}") from error
    return not any(line.startswith("targets:") for line in lines)
