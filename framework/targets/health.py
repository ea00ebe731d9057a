"""Is this board fit for tests? Asked of live hardware, one yes or no a line.

Power is never taken for granted: off is what the head *says* and the console *shows* (silence), on
is a boot that was never seen before. A check that needs what failed before it is not made. What a
check reads is read by the device over its console, as in scenarios.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from attrs import frozen

from framework.console import ConsoleError
from framework.targets.errors import InfrastructureError, RigError
from framework.targets.strategy import BootFailure, BootOutcome, SlotStrategy
from framework.targets.switched import SwitchedBoardDriver

__all__ = ["Finding", "check_board"]

_OFF_S = 3.0  # longer than any boot goes without a word, shorter than a person waits
_ECHO_BYTES = 1024
_WATCHDOG_S = 120.0
_COMMAND_S = 30.0
#: The device's own program for a hang: real-time priority, for ever. As the faults' (`hang`).
_SPIN = (
    "echo -1 > /proc/sys/kernel/sched_rt_runtime_us; "
    "python3 -c 'import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))\n"
    "for _ in range(3): os.fork()\n"
    "while True: pass'"
)


@frozen
class Finding:
    """One line of a check: what was asked, whether it holds (None: not asked), and the fact."""

    question: str
    held: bool | None
    fact: str

    def __str__(self) -> str:
        """As it is printed."""
        answer = {True: "yes", False: "NO", None: "-"}[self.held]
        return f"{answer:3}  {self.question}: {self.fact}"


@frozen
class _Bed:
    """What the checks act on."""

    strategy: SlotStrategy
    features: frozenset[str]
    cycles: int

    @property
    def power(self) -> Any:
        return self.strategy.power


def check_board(
    strategy: SlotStrategy,
    features: frozenset[str],
    *,
    cycles: int = 3,
    say: Callable[[Finding], None] = lambda finding: None,
) -> list[Finding]:
    """Check a board, which must be ours alone; it is off afterwards. The findings, in order."""
    bed = _Bed(strategy, features, cycles)
    findings: list[Finding] = []
    broken: set[str] = set()
    for check, needs in _checks(bed):
        question = (check.__doc__ or check.__name__).strip().rstrip(".")
        missing = sorted(needs & broken)
        if missing:
            finding = Finding(question, None, f"not asked: {missing[0]} failed")
            broken.add(check.__name__.lstrip("_"))
        else:
            finding = _answered(question, partial(check, bed))
            if finding.held is False:
                broken.add(check.__name__.lstrip("_"))
        findings.append(finding)
        say(finding)
    return findings


def _checks(bed: _Bed) -> Iterator[tuple[Callable[[_Bed], str], frozenset[str]]]:
    """Each check, and the names of those without which it makes no sense."""
    yield _off, frozenset()
    yield _on, frozenset({"off"})
    yield _serial, frozenset({"on"})
    if "network" in bed.features:
        yield _network, frozenset({"serial"})
    if isinstance(bed.power, SwitchedBoardDriver) and bed.power.disks:
        yield _storage, frozenset({"serial"})
    if "watchdog" in bed.features:
        yield _watchdog, frozenset({"serial"})
    yield _off_again, frozenset({"on"})
    if "bootloader" in bed.features:
        yield _bootloader, frozenset({"off"})
    yield _cycles, frozenset({"on", "off_again"})


def _answered(question: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(question, True, check())
    except BootFailure as error:
        return Finding(question, False, _fate(error.outcome))
    except (_NoError, ConsoleError, InfrastructureError) as error:
        first = str(error).removeprefix("INFRASTRUCTURE: ").splitlines()[0]
        return Finding(question, False, first)


class _NoError(Exception):
    """The answer is no; the message is the fact."""


def _fate(outcome: BootOutcome) -> str:
    """What became of a boot, without the console's last words: those are in its log."""
    return f"{outcome.fate.value} after {outcome.seconds:.0f} s, {outcome.starts} start(s)"


def _off(bed: _Bed) -> str:
    """Power goes off."""
    strategy = bed.strategy
    strategy.invalidate()
    strategy.transition("off")
    try:
        told = "the head says off" if not bed.power.get() else ""
    except NotImplementedError:
        told = "the head can't tell"
    if not told:
        raise _NoError("the head says on after it was switched off")
    position = strategy.pump.position
    if not strategy.pump.wait_silence(_OFF_S, _OFF_S + 2.0) or strategy.pump.position != position:
        raise _NoError("the console talks while the power is off")
    return f"{told}, and the console is silent"


def _on(bed: _Bed) -> str:
    """Power on gives a new boot."""
    outcome = bed.strategy.boot()
    if not outcome.ready or outcome.boot is None:
        raise _NoError(_fate(outcome))
    boot = outcome.boot
    return f"{boot.version} in slot {boot.slot}, boot {boot.boot_id[:8]}, {outcome.seconds:.1f} s"


def _serial(bed: _Bed) -> str:
    """Serial both ways, whole."""
    told = secrets.token_hex(_ECHO_BYTES // 2)
    heard = bed.strategy.run(f"echo {told}", _COMMAND_S).text.strip()
    if heard != told:
        wrong = sum(a != b for a, b in zip(heard, told, strict=False)) + abs(len(heard) - len(told))
        raise _NoError(f"of {_ECHO_BYTES} bytes there and back, {wrong} are wrong or missing")
    return f"{_ECHO_BYTES} bytes there and back"


def _network(bed: _Bed) -> str:
    """The device has a network."""
    result = bed.strategy.run("cat /proc/net/route", _COMMAND_S)
    default = [line.split()[0] for line in result.lines if line.split()[1:2] == ["00000000"]]
    if not default:
        raise _NoError("it has no default route")
    return f"default route over {default[0]}"


def _storage(bed: _Bed) -> str:
    """Its disks are where the rig says."""
    facts: list[str] = []
    nodes: Mapping[str, str] = bed.power.disks
    for name, node in nodes.items():
        block = node.rpartition("/")[2]
        result = bed.strategy.run(
            f"cat /sys/class/block/{block}/size /sys/class/block/{block}/device/cid "
            f"/sys/class/block/{block}/serial 2>/dev/null",
            _COMMAND_S,
        )
        lines = [line.strip() for line in result.lines if line.strip()]
        if not lines or not lines[0].isdigit():
            raise _NoError(f"{name}: there is no {node}")
        identity = f", identity {lines[1]}" if len(lines) > 1 else ""
        facts.append(f"{name} is {node}, {int(lines[0]) // 2048} MiB{identity}")
    return "; ".join(facts)


def _watchdog(bed: _Bed) -> str:
    """A hang is reset by the watchdog."""
    strategy = bed.strategy
    pump = strategy.pump
    since = pump.position
    began = time.monotonic()
    # Typed past the shell, which would wait for an answer that never comes.
    strategy.leave_shell()
    pump.write(_SPIN.encode() + b"\n")
    outcome = strategy.await_boot(since, _WATCHDOG_S)
    if not outcome.ready:
        raise _NoError(f"hung, and not back after {_WATCHDOG_S:g} s: {outcome.fate.value}")
    return f"back {time.monotonic() - began:.0f} s after it hung"


def _bootloader(bed: _Bed) -> str:
    """The bootloader's prompt can be reached."""
    bed.strategy.transition("off")
    began = time.monotonic()
    bed.strategy.transition("bootloader")
    return f"after {time.monotonic() - began:.1f} s"


def _cycles(bed: _Bed) -> str:
    """It comes back from every power cycle."""
    seconds: list[float] = []
    for number in range(1, bed.cycles + 1):
        began = time.monotonic()
        outcome = bed.strategy.boot()
        if not outcome.ready:
            raise _NoError(f"not from cycle {number} of {bed.cycles}: {_fate(outcome)}")
        seconds.append(time.monotonic() - began)
    return (
        f"{bed.cycles} of {bed.cycles}, {statistics.median(seconds):.1f} s each "
        f"({min(seconds):.1f} to {max(seconds):.1f})"
    )


def _off_again(bed: _Bed) -> str:
    """Power goes off from a running system."""
    return _off(bed)


def strategy_of(target: Any) -> SlotStrategy:
    """A target's strategy. RigError if it is none of ours."""
    strategy = target.get_strategy()
    if not isinstance(strategy, SlotStrategy):
        raise RigError(f"{target.name}: only a rig with a SlotStrategy can be checked live")
    return strategy
