"""The mutation score of the client's state machine, with simulated lifetimes as the killer.

    python tests/mutation/state_machine.py [--seconds N] [--seed N] [--only TEXT] [--survivors]

The mutations are cosmic-ray's (its operators; its runner rewrites the checkout's files, which
other programs use meanwhile), and one of ours for the state table: each transition leads elsewhere.
A mutant is loaded in a process of its own, in the place of the real module, and lives through a
fixed list of lifetimes (`schedules`): every action and image, every script that fails, cuts and
errors where the client writes from ArtifactInstall on, cuts in a row, and a few random ones. What
became of it:

    killed    an invariant was violated, or a command ended with an internal error
    differs   no invariant, but the console or the events are not the shipped client's
    survived  nothing of that

A mutant that differs is noticed, too (that is how a changed message is), but not by what must hold
whatever the client looks like. Survivors are to be explained: `survivors.json`, beside this
program, says for each why it can't be seen. Exit code 1 where one is not explained there.

What lifetimes can't see at all is not counted: deadlines (time limits are a port that is not
simulated), messages, and names in annotations. Mutants are tried in an order drawn from the seed,
so that a run that was bounded is a fair sample.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

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
CPU_LIMIT_S: Final = 40
"""What a mutant may use; the shipped client uses a tenth. One that goes round needs more."""
FATES: Final = {0: "survived", 1: "killed", 2: "differs"}
SURVIVED, KILLED, DIFFERS, HARNESS = 0, 1, 2, 3
ENOUGH: Final = 40
"""Lifetimes that differ, and violate nothing, before a mutant is given up."""
EXPLAINED: Final = Path(__file__).with_name("survivors.json")
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
    """All mutants that lifetimes may see; making them takes a while, so they are kept."""
    sources = [(ROOT / (module.replace(".", "/") + ".py")).read_bytes() for module in MODULES]
    made_by = repr((OPERATORS, UNSEEN.pattern)).encode()
    state = hashlib.sha256(b"\0".join([made_by, *sources])).hexdigest()
    kept = ROOT / "build" / f"mutants-{state[:16]}.json"
    if not kept.exists():
        made = _make_mutants()
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(made), encoding="utf-8")
        temporary.replace(kept)
    return [Mutant(*values) for values in json.loads(kept.read_text(encoding="utf-8"))]


def _make_mutants() -> list[Mutant]:
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


def try_it(mutant: Mutant | None, given: list[str], reference: list[str]) -> tuple[int, list[str]]:
    """In a process of its own: a mutant's fate, and a digest of each lifetime it lived through."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        with open(reading, encoding="ascii") as file:  # noqa: PTH123 - a descriptor
            digests = file.read().split()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return KILLED, []  # it went round in circles, or crashed the interpreter
        return os.WEXITSTATUS(status), digests
    code = HARNESS
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
        if mutant is not None:
            sys.meta_path.insert(0, _Instead(mutant))
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        code = _live_through(given, reference, writing)
    except BaseException:  # noqa: BLE001 - a mutant may fail in any way
        code = KILLED
    finally:
        os._exit(code)


def _live_through(given: list[str], reference: list[str], writing: int) -> int:
    lifetimes = importlib.import_module("framework.campaign.lifetimes")
    laboratory = importlib.import_module("framework.targets.simulated.laboratory").Laboratory()
    code, differing = SURVIVED, 0
    for number, text in enumerate(given):
        lifetime = lifetimes.live(laboratory, lifetimes.Schedule.from_json(text))
        digest = hashlib.sha256(repr((lifetime.lines, lifetime.events)).encode()).hexdigest()
        os.write(writing, f"{digest}\n".encode())
        internal = any("error: internal:" in line for line in lifetime.lines)
        if internal or lifetime.verdict.violated:
            return KILLED
        if reference and digest != reference[number]:
            code = DIFFERS
            differing += 1
        if differing >= ENOUGH:
            break
    return code


def schedules() -> list[str]:
    """The lifetimes, as text: they are made once, by the shipped client, in another process."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        with open(writing, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            file.writelines(f"{text}\n" for text in _schedules())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:  # noqa: PTH123
        made = file.read().splitlines()
    os.waitpid(pid, 0)
    return made


def _schedules() -> Iterator[str]:
    """First what shows most: the order decides how soon a mutant is killed."""
    lifetimes = importlib.import_module("framework.campaign.lifetimes")
    search = importlib.import_module("framework.campaign.search")
    laboratory = importlib.import_module("framework.targets.simulated.laboratory").Laboratory()
    fault, schedule = lifetimes.Fault, lifetimes.Schedule

    failing = sorted({*search.SCRIPTED, *search.TOO_LATE} - {""})
    plain = [
        schedule(behaviour=image, scripts=scripts)
        for scripts in ("", *failing)
        for image in ("well", "unhealthy")
    ]
    plain += [schedule(behaviour="panics"), schedule(fresh=True)]
    plain += [
        schedule(behaviour=image, actions=actions)
        for image in ("well", "panics", "unhealthy")
        for actions in sorted(set(search.ACTIONS))
    ]
    plain += [
        schedule(behaviour=behaviour, module=module)
        for module in search.MODULES
        for behaviour in search.PACKAGED
    ]
    yield from (one.to_json() for one in plain)
    bases = [
        schedule(),
        schedule(scripts="ok"),
        schedule(behaviour="unhealthy", scripts="ok"),
        schedule(scripts="fail ArtifactInstall_Leave_00"),
        schedule(scripts="fail ArtifactCommit_Leave_00"),
        schedule(actions=("stage", "restart", "rollback"), scripts="ok"),
        schedule(actions=("stage", "rollback")),
        schedule(module=search.MODULES[1]),
        schedule(module=search.MODULES[3]),
    ]
    struck = [(base, _places(lifetimes, laboratory, base)) for base in bases]
    for number, kind in enumerate(("cut", "error")):
        for base, places in struck:
            # Alternately, so that neighbouring places get different faults.
            for at in places[number::2]:
                yield dataclasses.replace(base, faults=(fault(at, kind),)).to_json()
    # Cuts in a row: what must end although it begins again and again.
    for base, places in struck[:3]:
        for step in (7, 11):
            faults = tuple(fault(places[0] + step * number) for number in range(36))
            yield dataclasses.replace(base, faults=faults).to_json()
    rng = random.Random(1)
    for _ in range(30):
        yield search.draw(rng).to_json()


def _places(lifetimes: Any, laboratory: Any, base: Any) -> list[int]:
    """The operations from ArtifactInstall on at which something was just made durable, or is."""
    last = lifetimes.live(laboratory, base).exposed
    return [
        step.number
        for step in lifetimes.trace(laboratory, base)
        if step.number <= last
        and step.state not in ("Idle", "Download")
        and (step.kind == "flush" or step.area == "environment")
    ][::2]


def main() -> None:
    """Try the mutants, print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3600.0, help="when to stop")
    parser.add_argument("--seed", type=int, default=1, help="of the order")
    parser.add_argument("--skip", type=int, default=0, help="how many of that order to leave out")
    parser.add_argument("--only", default="", help="only changes that contain this text")
    parser.add_argument("--survivors", action="store_true", help="only those in survivors.json")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    given = schedules()
    code, reference = try_it(None, given, [])
    if code != SURVIVED:
        sys.exit("the client itself does not survive the lifetimes")
    print(f"{len(given)} lifetimes a mutant")
    explained = _explained()
    found = [mutant for mutant in mutants() if chosen.only in mutant.change]
    if chosen.survivors:
        found = [mutant for mutant in found if _key(mutant) in explained]
    random.Random(chosen.seed).shuffle(found)
    begun = time.monotonic()
    tried: list[tuple[Mutant, str]] = []
    with contextlib.suppress(KeyboardInterrupt):
        for mutant in found[chosen.skip :]:
            if time.monotonic() - begun > chosen.seconds:
                break
            code, _ = try_it(mutant, given, reference)
            tried.append((mutant, FATES.get(code, "killed")))
            print(
                f"{len(tried)} of {len(found)}: {_count(tried, 'killed')} killed,"
                f" {_count(tried, 'survived')} survived",
                end="\r",
                flush=True,
            )
            _write(chosen.output, found, tried)
    print()
    for module in MODULES:
        _show(module, [(mutant, fate) for mutant, fate in tried if mutant.module == module])
    _show("all", tried)
    unexplained = 0
    for mutant, fate in tried:
        if fate == "survived":
            why = explained.get(_key(mutant), "")
            unexplained += not why
            print(f"{fate}: {mutant.module} {mutant.operator}\n{mutant.change}")
            print(f"  {why or 'not explained'}")
    sys.exit(1 if unexplained else 0)


def _show(name: str, of: list[tuple[Mutant, str]]) -> None:
    if of:
        killed, differs = _count(of, "killed"), _count(of, "differs")
        print(
            f"{name}: {len(of)} mutants, {killed} killed by an invariant ({killed / len(of):.0%}),"
            f" {differs} more seen to differ ({(killed + differs) / len(of):.0%}),"
            f" {_count(of, 'survived')} survived"
        )


def _key(mutant: Mutant) -> str:
    """What a survivor is known by, wherever the line moves."""
    return f"{mutant.module} {mutant.operator}\n{mutant.change}"


def _explained() -> dict[str, str]:
    """Why a survivor can't be seen, by `_key`."""
    entries = json.loads(EXPLAINED.read_text(encoding="utf-8"))
    return {
        f"{entry['module']} {entry['operator']}\n" + "\n".join(entry["change"]): entry["why"]
        for entry in entries
    }


def _count(tried: list[tuple[Mutant, str]], wanted: str) -> int:
    return sum(fate == wanted for _, fate in tried)


def _write(path: Path, found: list[Mutant], tried: list[tuple[Mutant, str]]) -> None:
    survivors = [
        {
            "fate": fate,
            "module": mutant.module,
            "operator": mutant.operator,
            "change": mutant.change.splitlines(),
        }
        for mutant, fate in tried
        if fate != "killed"
    ]
    values = {
        "mutants": len(found),
        "tried": len(tried),
        "killed": _count(tried, "killed"),
        "differ": _count(tried, "differs"),
        "survivors": survivors,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
