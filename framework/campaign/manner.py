"""How a bundle's run is repeated: in real time, or in a machine whose time is its own.

A *deterministic* machine counts instructions instead of looking at the host's clock (QEMU's
`-icount`, docs/devel/tcg-icount.rst): while the guest waits, its time leaps to its next timer. Two
runs then do the same to the disk. Nothing outside has that time: an answer from the network would
come hours later. So a run is repeated like this if it had no network.

It is not bit for bit: when the disk answers is the host's time, and what the guest's clock says by
then differs. A trigger that counts flushes or all operations can strike elsewhere on a busy host;
one that counts writes does not. Pure functions over bundles and journals.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from framework.campaign.bundle import Bundle, BundleError
from framework.campaign.steps import Divergence, compare
from framework.disk import JournalReader, Kind

RESTED: Final = "rest"
"""The source of the marks in a journal that tell where a machine rested."""
_FLUSH: Final = "flush of "
Operations = tuple[tuple[str, ...], ...]
OPTION: Final = "--brownout-deterministic"
"""What makes a session of pytest deterministic."""


@frozen
class Manner:
    """How a run is repeated.

    Attributes:
        deterministic: whether the machine's time is its own.
        why: in words.
        exact: whether the operations must agree as well: the run itself was deterministic.
    """

    deterministic: bool
    why: str
    exact: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """What pytest has to be told."""
        return (OPTION,) if self.deterministic else ()

    def __str__(self) -> str:
        """The manner in one line."""
        compared = "; every disk operation is compared" if self.exact else ""
        return f"{'deterministic' if self.deterministic else 'in real time'}: {self.why}{compared}"


REAL_TIME: Final = Manner(False, "not asked for")


def used_network(bundle: Bundle) -> bool:
    """Whether the run used the network; bundles before version 3 don't say, but show it."""
    if bundle.network is not None:
        return bundle.network
    connected = any(source == "network" for _, source, _ in bundle.timeline)
    return connected or any(step.startswith("installing") for step in bundle.steps)


def manner_of(bundle: Bundle, features: frozenset[str], wanted: bool | None = None) -> Manner:
    """How to repeat a run on a rig with these features; `wanted` is what the user said.

    Raises:
        BundleError: a deterministic run is wanted, and can't be had.
    """
    why_not = ""
    if "emulated" not in features:
        why_not = "the rig is not emulated"
    elif used_network(bundle):
        why_not = "the run used the network"
    if wanted and why_not:
        raise BundleError(f"{bundle.scenario}: can't be deterministic: {why_not}")
    if why_not or wanted is False:
        return Manner(False, why_not or "as wanted")
    return Manner(True, "the run had no network", exact=bundle.deterministic)


def operations_of(journal: Path) -> Operations:
    """What a journal's operations did to its disks, in words, step by step and flush by flush.

    A step ends where a deterministic machine has rested (before each command), or lost its power.
    Between two flushes a disk owes no order, and operations stand in that of their places. How many
    of the flushes that are asked for at the same time Linux makes one is the host's time
    (block/blk-flush.c): one straight after another does nothing, and is left out.

    Raises:
        DiskError: it is no journal.
    """
    steps: list[list[str]] = [[]]
    open_ones: list[tuple[int, int, int, str]] = []

    def settle() -> None:
        steps[-1].extend(words for *_, words in sorted(open_ones))
        open_ones.clear()

    with JournalReader(journal) as reader:
        found = reader.operations
        rests = {mark.after_operation for mark in reader.marks if mark.source == RESTED}
        columns = (found.kind, found.device, found.offset, found.length, found.cycle)
        cycle = 0
        for number, (kind, device, offset, length, now) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            if number in rests or now != cycle:
                settle()
                steps.append([])
                cycle = now
            name = reader.devices[device]
            if Kind(kind) is not Kind.FLUSH:
                words = f"{Kind(kind).name.lower()} of {length} bytes at {offset} of {name}"
                open_ones.append((device, offset, length, words))
                continue
            settle()
            if steps[-1][-1:] != [f"{_FLUSH}{name}"]:
                steps[-1].append(f"{_FLUSH}{name}")
        settle()
    return tuple(tuple(step) for step in steps)


def compare_operations(was: Operations, now: Operations) -> tuple[Divergence | None, str]:
    """Where two runs part, and if they don't, what else there is to say.

    What the kernel writes back by itself comes when its timers say, and a run whose disk answered
    at other moments is through them in another order. That is told, and is no divergence: each step
    has done the same in the end.
    """
    parted = compare(_all(was), _all(now), "disk operation")
    if parted is None:
        return None, ""
    before = 0
    for number in range(max(len(was), len(now))):
        old = was[number] if number < len(was) else ()
        new = now[number] if number < len(now) else ()
        if _written(old) != _written(new):
            there = compare(old, new, "disk operation")
            assert there is not None
            return evolve(there, number=before + there.number), ""
        before += len(old)
    return None, f"in another order from disk operation {parted.number} on, within a step"


def _all(operations: Operations) -> list[str]:
    return [one for step in operations for one in step]


def _written(step: tuple[str, ...]) -> Counter[str]:
    """What a step did but for its flushes, in any order."""
    return Counter(one for one in step if not one.startswith(_FLUSH))
