"""What a power cut did to data at rest: bytes that were durable, and that nothing open was writing.

A torn page and a wiped erase unit take with them what else lies in them. What has a second copy
elsewhere can survive that, and has to: a boot environment, a slot. A file system's only copy can't,
whoever wrote it. To tell the two apart a state is made again as it would be on a medium that spares
data at rest: if that holds, the medium is what broke it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from framework.disk import JournalReader
from framework.disk.state import Garbage, PowerCycle, Unreadable
from framework.explore.states import CrashState

Ranges = list[tuple[int, int]]


def spared(journal: JournalReader, state: CrashState) -> CrashState | None:
    """The state on a medium that spares data at rest; None if nothing at rest was destroyed.

    Garbage and unreadable ranges are cut down to what operations at stake at that moment touch.
    """
    decision = state.decision
    if not decision.garbage and not decision.unreadable:
        return None
    _, cycle = journal.power_cycle_at(state.operation)
    touched = _touched(cycle)
    garbage = [
        Garbage(g.device, start, _piece(g, start, end))
        for g in decision.garbage
        for start, end in _common(touched.get(g.device, []), g.offset, g.offset + g.length)
    ]
    unreadable = [
        Unreadable(u.device, start, end - start)
        for u in decision.unreadable
        for start, end in _common(touched.get(u.device, []), u.offset, u.offset + u.length)
    ]
    if _bytes(garbage) == _bytes(decision.garbage) and _bytes(unreadable) == _bytes(
        decision.unreadable
    ):
        return None
    gentler = dataclasses.replace(decision, garbage=tuple(garbage), unreadable=tuple(unreadable))
    return CrashState(state.operation, gentler, state.model, state.seed)


def _touched(cycle: PowerCycle) -> dict[int, Ranges]:
    """By device, what the operations at stake change: ranges in order that don't overlap."""
    operations = cycle.operations
    ranges: dict[int, Ranges] = {}
    for row in cycle.open_rows().tolist():
        start = int(operations.offset[row])
        ranges.setdefault(int(operations.device[row]), []).append(
            (start, start + int(operations.length[row]))
        )
    return {device: _merged(found) for device, found in ranges.items()}


def _merged(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _common(ranges: Ranges, start: int, end: int) -> Ranges:
    return [(max(a, start), min(b, end)) for a, b in ranges if a < end and start < b]


def _piece(garbage: Garbage, start: int, end: int) -> bytes:
    size = len(garbage.content)
    return bytes(garbage.content[(at - garbage.offset) % size] for at in range(start, end))


def _bytes(ranges: Iterable[Garbage | Unreadable]) -> int:
    return sum(one.length for one in ranges)
