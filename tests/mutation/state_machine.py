"""The mutation score of the client's state machine, with simulated lifetimes as the killer.

    python tests/mutation/state_machine.py [--seconds N] [--seed N] [--only TEXT]

The mutations are cosmic-ray's (its operators; its runner rewrites the checkout's files, which
other programs use meanwhile), and one of ours for the state table: each transition leads elsewhere.
A mutant is loaded in a process of its own, in the place of the real module, and lives through
updates until an invariant is violated or a command ends with an internal error: killed. Mutants
are tried in an order drawn from the seed, so that a run that was bounded is a fair sample.

A survivor is *seen* if any lifetime differs from the shipped client's in its console or its events
and yet violates nothing: there the invariants say too little. Else it is *unseen*: equivalent, or
in what lifetimes do not have (update modules, the daemon).

What lifetimes can't see at all is not counted: deadlines (time limits are a port that is not
simulated), messages, and names in annotations. Prints the score and the survivors' changed lines.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[2]
MODULES: Final = ("updater.device.states", "updater.device.model", "updater.device.client")
OPERATORS: Final = (
    "core/AddNot",
    "core/ReplaceTrueWithFalse",
    "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr",
    "core/ReplaceOrWithAnd",
    "core/ReplaceUnaryOperator_Delete_Not",
    "core/ReplaceComparisonOperator_Eq_NotEq",
    "core/ReplaceComparisonOperator_NotEq_Eq",
    "core/ReplaceComparisonOperator_Is_IsNot",
    "core/ReplaceComparisonOperator_IsNot_Is",
    "core/ReplaceComparisonOperator_Gt_LtE",
    "core/ReplaceComparisonOperator_Lt_GtE",
    "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Sub_Add",
    "core/NumberReplacer",
    "core/ExceptionReplacer",
    "core/ZeroIterationForLoop",
)
PRELOADED: Final = (
    "apsw",
    "cryptography.hazmat.primitives.serialization",
    "framework.disk.models",
    "framework.verdict",
    "updater.artifact.signature",
)
"""What nothing of a mutant is in; the processes start with it."""
LIMIT_S: Final = 120
KILLED, SURVIVED, HARNESS = 1, 0, 3
DIGEST = hashlib.sha256()
UNSEEN: Final = re.compile(
    r"_HOUR|TABLE\.items|rows|^\s*(?:say\(|\"|f\"|#)|_KEEP|TYPE_CHECKING|noqa: PLC0415"
)


class Mutant(NamedTuple):
    """A changed module: its name, how it was changed, its source, and the changed lines."""

    module: str
    operator: str
    source: str
    change: str


def mutants() -> list[Mutant]:
    """All mutants that lifetimes may see."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found: list[Mutant] = []
    for module in MODULES:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for operator in OPERATORS:
            number = 0
            while (changed := mutate_code(source, get_operator(operator)(), number)) is not None:
                number += 1
                _add(found, module, operator, source, changed)
    states = MODULES[0]
    source = (ROOT / (states.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    for match in re.finditer(r"Event\.\w+: (State\.\w+|None)", source):
        for other in ("State.CLEANUP", "State.FAILURE"):
            if match[1] != other:
                changed = source[: match.start(1)] + other + source[match.end(1) :]
                _add(found, states, "transition", source, changed)
    return found


def _add(found: list[Mutant], module: str, operator: str, source: str, changed: str) -> None:
    lines = [
        line
        for line in difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    if lines and not any(UNSEEN.search(line[1:]) for line in lines):
        found.append(Mutant(module, operator, changed, "\n".join(lines)))


class _Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads a mutant where the module is asked for."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Say that the module comes from here."""
        if name != self._mutant.module:
            return None
        return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutant's source."""
        exec(compile(self._mutant.source, self._mutant.module, "exec"), module.__dict__)


def try_it(mutant: Mutant | None) -> tuple[int, str]:
    """In a process of its own: whether an invariant saw the mutant, and what its lifetimes were."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        with open(reading, encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            digest = file.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return KILLED, ""  # it went round in circles, or crashed the interpreter
        return os.WEXITSTATUS(status), digest
    code = HARNESS
    try:
        signal.alarm(LIMIT_S)
        if mutant is not None:
            sys.meta_path.insert(0, _Instead(mutant))
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        code = KILLED if any(_violations()) else SURVIVED
        os.write(writing, DIGEST.hexdigest().encode())
    except BaseException:  # noqa: BLE001 - a mutant may fail in any way
        code = KILLED
    finally:
        os._exit(code)


def _violations() -> Iterator[bool]:
    """Live through more and more; yield whether something was violated."""
    lifetimes = importlib.import_module("framework.campaign.lifetimes")
    search = importlib.import_module("framework.campaign.search")
    laboratory = importlib.import_module("framework.targets.simulated.laboratory").Laboratory()

    def bad(schedule: object) -> bool:
        lifetime = lifetimes.live(laboratory, schedule)
        DIGEST.update(repr((lifetime.lines, lifetime.events)).encode())
        internal = any("error: internal:" in line for line in lifetime.lines)
        return internal or bool(lifetime.verdict.violated)

    for behaviour in ("well", "panics", "unhealthy"):
        for actions in sorted(set(search.ACTIONS)):
            yield bad(lifetimes.Schedule(behaviour=behaviour, actions=actions))
    yield bad(lifetimes.Schedule(fresh=True))
    for scripts in sorted(set(search.SCRIPTED) - {""}):
        yield bad(lifetimes.Schedule(scripts=scripts))
    for behaviour in ("well", "unhealthy"):
        schedule = lifetimes.Schedule(behaviour=behaviour)
        count = lifetimes.live(laboratory, schedule).exposed
        for at in range(1, count + 1):
            cut = lifetimes.Fault(at, "cut", "kept", at)
            yield bad(lifetimes.Schedule((cut,), behaviour=behaviour))
    yield bool(search.batch(laboratory, 1, 0, 150).found)


def main() -> None:
    """Try the mutants, print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3600.0, help="when to stop")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument("--skip", type=int, default=0, help="how many of that order to leave out")
    parser.add_argument("--only", default="", help="only changes that contain this text")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    code, reference = try_it(None)
    if code != SURVIVED:
        sys.exit("the client itself does not survive the lifetimes")
    found = [mutant for mutant in mutants() if chosen.only in mutant.change]
    random.Random(chosen.seed).shuffle(found)
    begun = time.monotonic()
    tried: list[tuple[Mutant, str]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for mutant in found[chosen.skip :]:
            if time.monotonic() - begun > chosen.seconds:
                break
            code, digest = try_it(mutant)
            alive = "seen" if digest != reference else "unseen"
            tried.append((mutant, "killed" if code == KILLED else alive))
            killed = _count(tried, "killed")
            print(f"{len(tried)} of {len(found)}: {killed} killed", end="\r", flush=True)
            _write(chosen.output, found, tried)
    print()
    for module in MODULES:
        of = [(mutant, fate) for mutant, fate in tried if mutant.module == module]
        killed, unseen = _count(of, "killed"), _count(of, "unseen")
        if of:
            print(
                f"{module}: {killed} of {len(of)} killed ({killed / len(of):.0%}), {unseen} unseen;"
                f" of what lifetimes see {killed} of {len(of) - unseen}"
            )
    for mutant, fate in tried:
        if fate != "killed":
            print(f"{fate}: {mutant.module} {mutant.operator}\n{mutant.change}")


def _count(tried: list[tuple[Mutant, str]], wanted: str) -> int:
    return sum(fate == wanted for _, fate in tried)


def _write(path: Path, found: list[Mutant], tried: list[tuple[Mutant, str]]) -> None:
    survivors = [
        {
            "fate": fate,
            "module": mutant.module,
            "operator": mutant.operator,
            "change": mutant.change,
        }
        for mutant, fate in tried
        if fate != "killed"
    ]
    values = {
        "mutants": len(found),
        "tried": len(tried),
        "killed": _count(tried, "killed"),
        "survivors": survivors,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
