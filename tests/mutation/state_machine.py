"""The mutation score of the client's state machine, with simulated lifetimes as the killer.

    python tests/mutation/state_machine.py [--only TEXT] [--fate FATE] [--again] [--seconds N]

The mutations are cosmic-ray's (its operators; its runner rewrites the checkout's files, which
other programs use meanwhile), and one of ours for the state table: each transition leads elsewhere.
A mutant is loaded in a process of its own, in the place of the real module, and lives through a
fixed list of lifetimes (`schedules`): every action and image, every script that fails, cuts and
errors where the client writes from ArtifactInstall on, the client killed in each state and another
command behind that, two faults where one is mended, cuts and kills in a row, and a few random ones.
What became of it:

    killed    an invariant was violated, or a command ended with an internal error
    differs   no invariant, but the console or the events are not the shipped client's
    survived  nothing of that

A mutant that differs is noticed, too (that is how a changed message is), but not by what must hold
whatever the client looks like. `survivors.json`, beside this program, explains those that survived
or differ: a mutant is *equivalent* (whatever a device does, it is the same) or *unreached* (no
lifetime comes to what it changes, a lack of the simulation). The score is of all that are not
equivalent. Exit code 1 where a survivor is not explained.

What lifetimes can't see at all is not counted: deadlines (time limits are a port that is not
simulated), messages, and names in annotations.

What makes it quick: the shipped client lives through the list once, traced, and a mutant gets only
the lifetimes that come to the statement that is changed, those first that killed most mutants of
the same module so far; the first that kills it ends it; one that goes round is ended after
`LIFETIME_S` of CPU. Results are kept beside each other in `--output`: a run that is ended goes on
where it was, and once the client or the list has changed, what killed a mutant before is tried
first.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, TextIO

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
LIFETIME_S: Final = 3.0
"""CPU time that one lifetime may take; the shipped client's longest takes 0.05 s."""
FIRST: Final = 100
"""Lifetimes that every mutant lives through before any lives through all of them."""
FATES: Final = {0: "survived", 1: "killed", 2: "differs"}
SURVIVED, KILLED, DIFFERS, HARNESS = 0, 1, 2, 3
EXPLAINED: Final = Path(__file__).with_name("survivors.json")
TEXTS: Final = frozenset(
    ("updater.device.states", name) for name in ("diagram", "table", "document")
)
"""What makes STATES.md, and nothing on a device; a test compares the file."""
UNSEEN: Final = re.compile(
    r"_HOUR|TABLE\.items|rows|^\s*(?:say\(|\"|f\"|#)|_KEEP|TYPE_CHECKING|noqa: PLC0415"
)


class Mutant(NamedTuple):
    """A changed module: its name, how it was changed, its source, and the changed lines.

    `place` is the function or class that the change is in, and which of several alike it is.
    """

    module: str
    operator: str
    source: str
    change: str
    place: str


def mutants() -> list[Mutant]:
    """All mutants that lifetimes may see; making them takes a while, so they are kept."""
    sources = [(ROOT / (module.replace(".", "/") + ".py")).read_bytes() for module in MODULES]
    made_by = repr((OPERATORS, UNSEEN.pattern, sorted(TEXTS), 2)).encode()
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
    if not lines or any(UNSEEN.search(line[1:]) for line in lines):
        return
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    at = next(n for n, (old, new) in enumerate(pairs, 1) if old != new)
    place = _place(ast.parse(source), at)
    if (module, place) in TEXTS:
        return
    mutant = Mutant(module, operator, changed, "\n".join(lines), place)
    alike = sum(_key(one).partition(" #")[0] == _key(mutant) for one in found)
    found.append(mutant._replace(place=f"{place} #{alike + 1}") if alike else mutant)


def _place(tree: ast.Module, line: int) -> str:
    """The functions and classes around a line, the outermost first; "" at the module's level."""
    names = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    return ".".join(names)


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


class Trial(NamedTuple):
    """What became of a mutant: its fate, what showed it, and the schedule (its number, or -1)."""

    fate: int
    why: str
    by: int


def try_it(mutant: Mutant, given: Sequence[tuple[int, str, str]]) -> Trial:
    """Let a mutant live, in a process of its own, through `given`: number, schedule, digest."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        with open(reading, encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            told = file.read().splitlines()
        _, status = os.waitpid(pid, 0)
        number, _, why = (told[-1] if told else "-1 ").partition(" ")
        if os.WIFSIGNALED(status):
            # It went round in circles, or crashed the interpreter.
            return Trial(KILLED, f"signal {os.WTERMSIG(status)}", int(number))
        return Trial(os.WEXITSTATUS(status), why, int(number))
    code = HARNESS
    with open(writing, "w", encoding="utf-8") as tell:  # noqa: PTH123 - a descriptor
        try:
            sys.meta_path.insert(0, _Instead(mutant))
            with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 2)
            code = _live_through(given, tell)
        except BaseException as error:  # noqa: BLE001 - a mutant may fail in any way
            tell.write(f"-1 {type(error).__name__}\n")
            code = KILLED
        finally:
            tell.flush()
            os._exit(code)


def _live_through(given: Sequence[tuple[int, str, str]], tell: TextIO) -> int:
    lifetimes = importlib.import_module("framework.campaign.lifetimes")
    laboratory = importlib.import_module("framework.targets.simulated.laboratory").Laboratory()
    differs = ""
    for number, text, expected in given:
        tell.write(f"{number} \n")
        tell.flush()
        signal.setitimer(signal.ITIMER_PROF, LIFETIME_S)
        lifetime = lifetimes.live(laboratory, lifetimes.Schedule.from_json(text))
        signal.setitimer(signal.ITIMER_PROF, 0)
        why = next((line for line in lifetime.lines if "error: internal:" in line), "")
        if why or lifetime.verdict.violated:
            tell.write(f"{number} {why or lifetime.verdict}\n")
            return KILLED
        if not differs and _digest(lifetime) != expected:
            differs = f"{number} \n"
    tell.write(differs or "-1 \n")
    return DIFFERS if differs else SURVIVED


def _digest(lifetime: Any) -> str:
    return hashlib.sha256(repr((lifetime.lines, lifetime.events)).encode()).hexdigest()[:16]


class Survey(NamedTuple):
    """The lifetimes, and for each a digest of what the shipped client made of it.

    `reached`: the lines of each module that it ran, as "module:line".
    """

    given: list[str]
    digests: list[str]
    reached: list[frozenset[str]]


def survey(most: int | None = None) -> Survey:
    """Have the shipped client live through the (first) lifetimes, in another process, traced."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        with open(writing, "w", encoding="utf-8") as file:  # noqa: PTH123 - a descriptor
            for one in itertools.islice(_survey(), most):
                file.write(json.dumps(one) + "\n")
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:  # noqa: PTH123
        found: list[Any] = [json.loads(line) for line in file]
    _, status = os.waitpid(pid, 0)
    if status or not found:
        sys.exit("the client itself does not survive the lifetimes")
    given, digests, reached = zip(*found, strict=True)
    return Survey(list(given), list(digests), [frozenset(lines) for lines in reached])


def _survey() -> Iterator[tuple[str, str, list[str]]]:
    lifetimes = importlib.import_module("framework.campaign.lifetimes")
    laboratory = importlib.import_module("framework.targets.simulated.laboratory").Laboratory()
    files = {str(ROOT / (module.replace(".", "/") + ".py")): module for module in MODULES}
    lines: set[str] = set()

    def trace(frame: Any, event: str, _: object) -> Any:
        name = files.get(frame.f_code.co_filename)
        if name is None:
            return None

        def local(frame: Any, event: str, _: object) -> Any:
            lines.add(f"{name}:{frame.f_lineno}")
            return local

        return local(frame, event, None)

    for text in _schedules(lifetimes, laboratory):
        lines.clear()
        sys.settrace(trace)
        try:
            lifetime = lifetimes.live(laboratory, lifetimes.Schedule.from_json(text))
        finally:
            sys.settrace(None)
        if lifetime.verdict.violated:
            sys.exit(f"the client itself does not survive {text}: {lifetime.verdict}")
        yield text, _digest(lifetime), sorted(lines)


class Statements:
    """Which lines of a module belong to the statement that a line is in."""

    def __init__(self, module: str) -> None:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        self._module = module
        self._source = source.splitlines()
        self._spans: list[tuple[int, int, bool]] = []
        self._visit(ast.parse(source), inside=False)

    def _visit(self, node: ast.AST, *, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                body = getattr(child, "body", None) or getattr(child, "cases", None)
                last = child.end_lineno or child.lineno
                if isinstance(body, list) and body:
                    last = max(child.lineno, body[0].lineno - 1)
                self._spans.append((child.lineno, last, inside))
            self._visit(child, inside=inside or isinstance(child, ast.FunctionDef))

    def of(self, mutant: Mutant) -> frozenset[str] | None:
        """The lines, as a survey names them; None: at the module's level, where all come by."""
        changed = mutant.source.splitlines()
        pairs = zip(self._source, changed, strict=False)
        at = next(n for n, (old, new) in enumerate(pairs, 1) if old != new)
        spans = [span for span in self._spans if span[0] <= at <= span[1]]
        first, last, inside = min(spans, key=lambda span: span[1] - span[0])
        if not inside:
            return None
        return frozenset(f"{self._module}:{line}" for line in range(first, last + 1))


def _schedules(lifetimes: Any, laboratory: Any) -> Iterator[str]:
    """First what shows most: the order decides how soon a mutant is killed."""
    search = importlib.import_module("framework.campaign.search")
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
    yield from (one.to_json() for one in _special(lifetimes, laboratory, search))
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


def _special(lifetimes: Any, laboratory: Any, search: Any) -> Iterator[Any]:
    """What few lifetimes come to: a bad network, damage in the store, an environment that refuses.

    Also what an operator does with a package, or while an update has ended half.
    """
    fault, schedule = lifetimes.Fault, lifetimes.Schedule
    for kind in ("break", "corrupt"):
        for at in (100, 700, 9_000, 60_000, 107_000):
            yield schedule((fault(at, kind),))
    for module in (search.MODULES[1], search.MODULES[2], search.MODULES[5]):
        for actions in (("stage", "restart", "commit"), ("stage", "rollback"), ("stage", "commit")):
            yield schedule(module=module, actions=actions)
    endless = "reboot=Yes reverts=Yes fails=ArtifactVerifyRollbackReboot"
    yield schedule(module=endless, behaviour="unhealthy")
    for state in ("ArtifactRollbackReboot", "ArtifactFailure"):
        for reboot in ("Automatic", "Yes"):
            module = f"reboot={reboot} reverts=Yes fails={state}"
            yield schedule(module=module, behaviour="unhealthy")
    refusing = schedule(scripts="fail ArtifactInstall_Leave_00")
    steps = lifetimes.trace(laboratory, refusing)
    first = next(
        step.number
        for step in steps
        if (step.state, step.area) == ("ArtifactRollback", "environment")
    )
    for times in (1, 2, 3):
        errors = tuple(fault(first + number, "error") for number in range(times))
        yield dataclasses.replace(refusing, faults=errors)
    for after in ((), ("commit",), ("rollback",)):
        base = schedule(actions=("stage", "restart", *after), scripts="ok")
        steps = [s for s in lifetimes.trace(laboratory, base) if s.area == "data"]
        late = [s.number for s in steps if s.state in ("ArtifactCommit", "Cleanup")]
        for at in late[::2]:
            yield dataclasses.replace(base, faults=(fault(at, "error"),))
        for at in late[1::3]:
            yield dataclasses.replace(base, faults=(fault(at, "flip"), fault(at + 4)))
    yield from _killed(lifetimes, laboratory, search)
    yield from _deployed(lifetimes, laboratory, search)
    yield from _damaged(lifetimes, laboratory)
    yield schedule(actions=("stray",))
    for behaviour in ("well", "unhealthy"):
        yield schedule(behaviour=behaviour, bootloader="grub", slot="b")
        yield schedule(behaviour=behaviour, slot="b", scripts="ok")
    downloading = [s.number for s in lifetimes.trace(laboratory, schedule(scripts="ok"))]
    for at in downloading[4:40:6]:
        for kind in ("cut", "error"):
            yield schedule((fault(at, kind),), scripts="ok")


def _killed(lifetimes: Any, laboratory: Any, search: Any) -> Iterator[Any]:
    """The client is killed in each state, and in the same boot another command goes on."""
    fault, schedule = lifetimes.Fault, lifetimes.Schedule
    bases = [
        schedule(scripts="ok"),
        schedule(behaviour="unhealthy", scripts="ok"),
        schedule(scripts="fail ArtifactInstall_Leave_00"),
        schedule(module=search.MODULES[1]),
        schedule(module=search.MODULES[2], behaviour="unhealthy"),
        schedule(module="reboot=No reverts=Yes fails=ArtifactCommit", scripts="ok"),
    ]
    commands = itertools.cycle(("resume", "commit", "rollback", "install"))
    for base in bases:
        last = lifetimes.live(laboratory, base).exposed
        states: dict[tuple[str, int], list[int]] = {}
        for step in lifetimes.trace(laboratory, base):
            if step.number <= last and step.state != "Idle":
                states.setdefault((step.state, step.starts), []).append(step.number)
        for numbers in states.values():
            # Near the end the work of a state is done, and the next one is not yet on record.
            for at in sorted({numbers[len(numbers) // 3], *numbers[-4:][:1], numbers[-1]}):
                for command in itertools.islice(commands, 2):
                    actions = ("install", command, "restart")
                    yield dataclasses.replace(base, faults=(fault(at, "kill"),), actions=actions)


def _deployed(lifetimes: Any, laboratory: Any, search: Any) -> Iterator[Any]:
    """The daemon does it: with pauses, lost requests, broken downloads, and killed in its waits."""
    fault = lifetimes.Fault
    plain = lifetimes.Schedule(actions=("deploy",), managed="plain")
    paused = dataclasses.replace(plain, managed="pauses", scripts="ok")
    for managed in lifetimes.MANAGED[1:]:
        for behaviour in ("well", "unhealthy"):
            base = dataclasses.replace(plain, managed=managed, behaviour=behaviour)
            yield base
            yield dataclasses.replace(base, module=search.MODULES[1])
            yield dataclasses.replace(base, module=search.MODULES[0], scripts="ok")
    broken = tuple(fault(100 + number, "break") for number in range(20))
    yield dataclasses.replace(plain, faults=broken)
    yield dataclasses.replace(plain, faults=broken[:2])
    yield dataclasses.replace(plain, faults=(fault(60_000, "corrupt"),))
    for request in (4, 5, 7, 9):
        for kind in lifetimes.SERVER_FAULTS:
            yield dataclasses.replace(paused, faults=(fault(request, kind),))
    for base in (paused, dataclasses.replace(paused, module=search.MODULES[1])):
        steps = lifetimes.trace(laboratory, base)
        for state in ("Download", "ArtifactInstall", "ArtifactReboot", "ArtifactCommit"):
            numbers = [step.number for step in steps if step.state == state]
            for part in (2, 3):
                at = numbers[len(numbers) * (part - 1) // part]
                yield dataclasses.replace(base, faults=(fault(at),))
                yield dataclasses.replace(base, faults=(fault(at, "error"),))
                for command in ("cycle", "resume", "commit", "rollback"):
                    actions = ("deploy", command, "cycle")
                    yield dataclasses.replace(base, faults=(fault(at, "kill"),), actions=actions)
        # Each record of a wait, and of its end, fails, and what they are in is lost.
        waits = [step.number for step in steps if step.state == "ArtifactInstall"][4:40:2]
        for at in waits:
            yield dataclasses.replace(base, faults=(fault(at, "error"),))
    module = dataclasses.replace(plain, managed="holds", module=search.MODULES[1])
    numbers = [
        s.number for s in lifetimes.trace(laboratory, module) if s.state == "ArtifactInstall"
    ]
    for command in ("cycle", "resume", "commit", "rollback"):
        killed = (fault(numbers[len(numbers) // 2], "kill"),)
        yield dataclasses.replace(module, faults=killed, actions=("deploy", command, "cycle"))
    # Killed in the same wait again and again, which is no step forward.
    held = dataclasses.replace(plain, managed="holds", actions=("deploy", *("cycle",) * 34))
    steps = lifetimes.trace(laboratory, dataclasses.replace(held, actions=("deploy",)))
    first = next(step.number for step in steps if step.state == "ArtifactInstall") + 40
    for ahead in (30, 45):
        faults = tuple(fault(first + ahead * number, "kill") for number in range(32))
        yield dataclasses.replace(held, faults=faults)


def _damaged(lifetimes: Any, laboratory: Any) -> Iterator[Any]:
    """What takes two faults: a store that fails twice or forgets, an environment that refuses."""
    fault, schedule = lifetimes.Fault, lifetimes.Schedule
    late = schedule(scripts="fail ArtifactCommit_Leave_00")
    wanted = ("ArtifactCommit", "Cleanup")
    for at in [s.number for s in lifetimes.trace(laboratory, late) if s.state in wanted][::3]:
        for ahead in (2, 9):
            kinds = (fault(at + ahead, "error"), fault(at + ahead))
            for second in kinds:
                yield dataclasses.replace(late, faults=(fault(at, "error"), second))
    base = schedule(scripts="ok")
    steps = lifetimes.trace(laboratory, base)
    armed = next(s.number for s in steps if (s.state, s.area) == (wanted[0], "environment"))
    for at in range(armed - 14, armed):
        yield dataclasses.replace(base, faults=(fault(at, "flip"), fault(armed + 2)))
    # Damaged in the last record before the restart, the store has forgotten the trial.
    before = [s.number for s in steps if (s.state, s.area) == ("ArtifactInstall", "data")]
    for at in before[-8:]:
        yield dataclasses.replace(base, faults=(fault(at, "flip"),))
    # On trial it fails while an interrupted transaction is undone.
    proving = [s.number for s in steps if (s.state, s.area) == ("ArtifactReboot", "data")]
    for at in proving[::2]:
        for times in (1, 12):
            failing = tuple(fault(at + number, "error") for number in range(1, 1 + times))
            faults = (fault(at, "kill"), *failing)
            yield dataclasses.replace(base, faults=faults, actions=("install", "resume"))
    # Killed again and again, on trial and on the old system: stopped in the end.
    for before, state in (
        (("install",), "ArtifactVerifyReboot"),
        (
            ("stage", "rollback"),
            "ArtifactRollback",
        ),
    ):
        base = schedule(actions=(*before, *("resume",) * 34))
        first = next(s.number for s in lifetimes.trace(laboratory, base) if s.state == state)
        for ahead in (14, 15, 16):
            faults = tuple(fault(first + ahead * number, "kill") for number in range(34))
            yield dataclasses.replace(base, faults=faults)
    for behaviour in ("panics", "hangs", "unhealthy"):
        base = schedule(behaviour=behaviour)
        last = lifetimes.live(laboratory, base).exposed
        places = [
            s.number
            for s in lifetimes.trace(laboratory, base)
            if s.area == "environment" and s.number <= last
        ]
        for at in places:
            for kind, times in (("error", 2), ("error", 6), ("flip", 6)):
                faults = tuple(fault(at + number, kind) for number in range(times))
                yield dataclasses.replace(base, faults=faults)


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
    parser.add_argument("--seconds", type=float, default=86400.0, help="when to stop")
    parser.add_argument("--only", default="", help="only changes that contain this text")
    parser.add_argument("--fate", default="", help="only mutants that became of this before")
    parser.add_argument("--again", action="store_true", help="try also what is in the output")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json")
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for name in PRELOADED:
        importlib.import_module(name)
    begun = time.monotonic()
    surveyed = survey()
    print(f"{len(surveyed.given)} lifetimes, lived through in {time.monotonic() - begun:.0f} s")
    state = _state(surveyed)
    results = _read(chosen.output)
    found = [mutant for mutant in mutants() if chosen.only in mutant.change]
    if chosen.fate:
        found = [m for m in found if results.get(_key(m), {}).get("fate") == chosen.fate]
    # Mutants of one line stand together; a run that is ended early shall be a sample of all.
    random.Random(1).shuffle(found)
    statements = {module: Statements(module) for module in MODULES}
    for mutant in found if chosen.again else ():
        if _key(mutant) in results:
            results[_key(mutant)]["state"] = ""
    run = _Run(surveyed, state, results, chosen.output, begun + chosen.seconds)
    with contextlib.suppress(KeyboardInterrupt):
        # What kills most comes first for all: a run that is ended early is worth more.
        for most in (FIRST, len(surveyed.given)):
            for number, mutant in enumerate(found, 1):
                if run.is_over:
                    break
                run.one(mutant, statements[mutant.module], most)
                print(f"{number} of {len(found)}, {most} lifetimes", end="\r", flush=True)
    sys.exit(_report(found, results, state))


class _Run:
    """The mutants' trials, with what is known from earlier ones."""

    def __init__(
        self,
        surveyed: Survey,
        state: str,
        results: dict[str, dict[str, Any]],
        output: Path,
        until: float,
    ) -> None:
        self._surveyed = surveyed
        self._state = state
        self._results = results
        self._output = output
        self._until = until
        self._kills: Counter[tuple[str, int]] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self._until

    def one(self, mutant: Mutant, statements: Statements, most: int) -> None:
        """Let a mutant live through up to `most` lifetimes, unless that is known already."""
        before = self._results.get(_key(mutant), {})
        known = before.get("state") == self._state
        if known and (before["fate"] == "killed" or before["most"] >= most):
            return
        given = self._chosen(mutant, statements, before.get("by"))[:most]
        cpu = _cpu_s()
        trial = try_it(mutant, given)
        if trial.fate == HARNESS:
            sys.exit(f"the harness failed at {_key(mutant)}: {trial.why}")
        if trial.fate == KILLED:
            self._kills[mutant.module, trial.by] += 1
        self._results[_key(mutant)] = {
            "fate": FATES[trial.fate],
            "why": trial.why,
            "by": self._surveyed.given[trial.by] if trial.by >= 0 else "",
            "lifetimes": len(given),
            "most": most,
            "cpu_s": round(_cpu_s() - cpu, 2),
            "state": self._state,
        }
        _write(self._output, self._results)

    def _chosen(
        self, mutant: Mutant, statements: Statements, known: str | None
    ) -> list[tuple[int, str, str]]:
        """The lifetimes that come to what is changed, the likeliest killers first."""
        lines, given = statements.of(mutant), self._surveyed.given
        numbers = [
            number
            for number, reached in enumerate(self._surveyed.reached)
            if lines is None or reached & lines
        ]
        numbers.sort(
            key=lambda number: (
                given[number] != known,
                -self._kills[mutant.module, number],
                number,
            )
        )
        return [(number, given[number], self._surveyed.digests[number]) for number in numbers]


def _state(surveyed: Survey) -> str:
    """What a result depends on, but for the mutant: the client, the lifetimes, the judges."""
    parts = [repr(surveyed.given), repr(surveyed.digests)]
    folders = ("updater/device", "framework/targets/simulated", "framework/verdict")
    paths = [path for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    parts += [path.read_text(encoding="utf-8") for path in paths]
    for name in ("lifetimes", "contract"):
        parts.append((ROOT / f"framework/campaign/{name}.py").read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _report(found: list[Mutant], results: dict[str, dict[str, Any]], state: str) -> int:
    explained = _explained()
    tried = [
        (mutant, results[_key(mutant)]["fate"])
        for mutant in found
        if results.get(_key(mutant), {}).get("state") == state
    ]
    print(f"{len(tried)} of {len(found)} tried")
    for module in MODULES:
        _show(module, [(mutant, fate) for mutant, fate in tried if mutant.module == module])
    _show("all", tried)
    missing = 0
    for mutant, fate in tried:
        kind, why = explained.get(_key(mutant), ("", ""))
        if fate == "killed":
            if why:
                print(f"explained, and killed all the same: {_key(mutant)}")
            continue
        missing += fate == "survived" and not why
        print(f"{fate}: {_key(mutant)}\n  {f'{kind}: {why}' if why else 'not explained'}")
    return 1 if missing else 0


def _show(name: str, of: list[tuple[Mutant, str]]) -> None:
    explained = _explained()
    alike = sum(
        fate != "killed" and explained.get(_key(mutant), ("",))[0] == "equivalent"
        for mutant, fate in of
    )
    if len(of) > alike:
        killed, differs = _count(of, "killed"), _count(of, "differs")
        print(
            f"{name}: {len(of)} mutants, {alike} equivalent; of the other {len(of) - alike}"
            f" {killed} killed by an invariant ({killed / (len(of) - alike):.1%});"
            f" {differs} differ and {_count(of, 'survived')} survived"
        )


def _key(mutant: Mutant) -> str:
    """What a mutant is known by, wherever the line moves."""
    return f"{mutant.module} {mutant.operator}\n{mutant.change}\nin {mutant.place}"


def _explained() -> dict[str, tuple[str, str]]:
    """By `_key`: what kind a survivor is of, and why."""
    entries = json.loads(EXPLAINED.read_text(encoding="utf-8"))
    return {
        "\n".join(
            [f"{entry['module']} {entry['operator']}", *entry["change"], f"in {entry['place']}"]
        ): (entry["kind"], entry["why"])
        for entry in entries
    }


def _count(tried: list[tuple[Mutant, str]], wanted: str) -> int:
    return sum(fate == wanted for _, fate in tried)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _write(path: Path, results: dict[str, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
