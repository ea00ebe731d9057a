"""Leases on places: who has one, in which process, and until when.

A place that labgrid's coordinator lends has no expiry: a CI job that is killed keeps its board for
ever. So whoever holds a place for a farm run says so in the place's tags, *before* it locks it, and
renews the time while it lives (`framework.farm.tenure`). A lock of ours without a lease can't be.

Whether a lease is dead is decided here, from what can be seen:

* On the machine (and in the process namespace) that it names, its process is looked up: process id
  and start time, so that a recycled id is never taken for it. The time does not matter there: a
  run that was starved for an hour still lives.
* From anywhere else there is only the time, with a minute for clocks that differ.

Tags are `lease_…`, all set in one call; every user of the coordinator sees them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import evolve, frozen

from framework.targets.places import me
from framework.targets.rundir import start_time

__all__ = ["CLEARED", "LEASE_S", "Lease", "death_of", "my_lease"]

LEASE_S = 120.0
"""How long a lease is good without being renewed."""
CLOCKS_S = 60
"""By how much the clocks of two hosts may differ."""

_PREFIX = "lease_"
_FIELDS = ("owner", "where", "pid", "start", "until", "run", "worker")
CLEARED: Mapping[str, str] = {_PREFIX + name: "" for name in _FIELDS}
"""The tags of a place that nobody holds."""


@frozen
class Lease:
    """Who holds a place.

    Attributes:
        owner: host and user, as labgrid names who acquired a place.
        where: the kernel's boot and the process namespace in which `pid` means something.
        pid, start: the process that holds it, and when that started (clock ticks since boot).
        until: when it expires if it is not renewed, in seconds since 1970.
        run: the farm run; all its workers' leases have it.
        worker: the run's worker.
    """

    owner: str
    where: str
    pid: int
    start: int
    until: int
    run: str
    worker: str

    @property
    def tags(self) -> dict[str, str]:
        """As the tags of a place."""
        return {_PREFIX + name: str(getattr(self, name)) for name in _FIELDS}

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> Lease | None:
        """The lease in a place's tags; None if there is none that makes sense."""
        told = {name: tags.get(_PREFIX + name, "") for name in _FIELDS}
        numbers = {name: told[name] for name in ("pid", "start", "until")}
        if not told["owner"] or not all(text.isdecimal() for text in numbers.values()):
            return None
        return cls(**{**told, **{name: int(text) for name, text in numbers.items()}})  # type: ignore[arg-type]

    def renewed(self, now: float | None = None, lease_s: float = LEASE_S) -> Lease:
        """The same, good for another while."""
        return evolve(self, until=int((time.time() if now is None else now) + lease_s))

    def same_holder(self, other: Lease | None) -> bool:
        """Whether another lease is this one, renewed or not."""
        return other is not None and evolve(other, until=self.until) == self

    def __str__(self) -> str:
        return f"{self.owner}, run {self.run}, worker {self.worker} (process {self.pid})"


def death_of(
    lease: Lease,
    *,
    here: str | None = None,
    now: float | None = None,
    started: Callable[[int], int | None] = start_time,
) -> str:
    """Why a lease's holder is dead; empty if it lives, or if nobody can tell yet."""
    now = time.time() if now is None else now
    if lease.where == (where_we_are() if here is None else here):
        return "" if started(lease.pid) == lease.start else "its process has ended"
    overdue = now - lease.until - CLOCKS_S
    return f"expired {overdue + CLOCKS_S:.0f} s ago" if overdue > 0 else ""


def where_we_are() -> str:
    """What tells this kernel's boot and this process namespace from all others.

    Containers on one host share the boot id, but not their process ids.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:16]
    return f"{boot}_{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - follows the link


def my_lease(run: str, worker: str, lease_s: float = LEASE_S) -> Lease:
    """A lease of this process, beginning now."""
    pid = os.getpid()
    started = start_time(pid)
    assert started is not None, "we live"
    until = int(time.time() + lease_s)
    return Lease(me(), where_we_are(), pid, started, until, run, worker)
