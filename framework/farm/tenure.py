"""Holding a place for a farm run: reserve, lease, lock; renew; hand back, also for the dead.

    nothing --reserve--> reserved --lease tags--> leased --lock--> held --heartbeat--> held
       ^                                                            | |
       '--lease taken away, reservation cancelled <----- freed <----' '--someone else's--> lost

The order is what makes it safe. The lease is written before the lock is taken, so a process that
is killed anywhere leaves no lock that nobody can explain. It is taken away before the reservation
is cancelled, so the next run to be given the place can't have written its own by then.

A coordinator that restarts forgets reservations and locks, not tags: the heartbeat locks again
what is still free, and nobody else takes a place that carries a living run's lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from attrs import frozen
from labgrid.remote.common import ReservationState

from framework.targets.errors import InfrastructureError, RigError
from framework.targets.lease import CLEARED, LEASE_S, Lease, death_of, my_lease
from framework.targets.places import HEALTHY, Place, Places, me
from framework.targets.rundir import base_directory

__all__ = ["Freed", "Tenure", "free_dead", "hand_back"]

_ASK_AGAIN_S = 0.3
_AWAY_S = 2.0  # before a coordinator that is away is asked again
_BEATS_A_LEASE = 6


class Tenure:
    """One place at a time, held by this process.

    Args:
        places: the coordinator.
        run, worker: as the lease names them.
        lease_s: how long a lease is good without a heartbeat.
    """

    def __init__(self, places: Places, run: str, worker: str, lease_s: float = LEASE_S) -> None:
        self.place = ""
        self.token = ""
        self.lost = ""
        """Why the place is not ours any more; empty while it is."""
        self._places = places
        self._lease_s = lease_s
        self._lease = my_lease(run, worker, lease_s)
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def obtain(
        self,
        tags: Mapping[str, str],
        patience_s: float,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Wait for a healthy place with these tags, and take it; whether there was one.

        False after `patience_s`, or when it is `unwanted` meanwhile. A coordinator or an exporter
        that is away is waited for.
        """
        deadline = time.monotonic() + patience_s
        while not unwanted() and time.monotonic() < deadline:
            try:
                if self._try(tags, deadline, unwanted):
                    self._places.leave()
                    self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
                    self._beating.start()
                    return True
            except (InfrastructureError, RigError):  # away, or the place is no more
                time.sleep(_AWAY_S)
        return False

    def _try(self, tags: Mapping[str, str], deadline: float, unwanted: Callable[[], bool]) -> bool:
        reserved = self._places.request({**tags, "health": HEALTHY})
        self.token = reserved.token
        asked = time.monotonic()
        while reserved.state is ReservationState.waiting:
            if unwanted() or time.monotonic() > deadline:
                self._places.cancel(self.token)
                return False
            time.sleep(_ASK_AGAIN_S)
            if time.monotonic() - asked > _AWAY_S:
                self._places.next_in_line()
                asked = time.monotonic()
            reserved = self._places.poll(self.token)
        try:
            if reserved.place and self._take(reserved.place):
                self.place = reserved.place
                return True
        except (InfrastructureError, RigError):
            with contextlib.suppress(InfrastructureError):
                self._places.cancel(self.token)
            raise
        self._places.cancel(self.token)
        time.sleep(_ASK_AGAIN_S)
        return False

    def _take(self, name: str) -> bool:
        """Lease and lock a place that is reserved for us.

        False if a living run has it, or if its exporter is away.
        """
        found = self._places.find(name)
        other = Lease.of(found.tags)
        if other is not None and not self._lease.same_holder(other) and not death_of(other):
            return False  # its coordinator was restarted; it will lock it again
        self._lease = self._lease.renewed(lease_s=self._lease_s)
        self._places.set_tags(name, self._lease.tags)
        try:
            self._places.acquire(name)
        except InfrastructureError:
            with contextlib.suppress(InfrastructureError):
                self._places.set_tags(name, CLEARED)
            raise
        found = self._places.find(name)
        if found.lacking:
            hand_back(self._places, found, self._lease)
            time.sleep(_AWAY_S)  # its exporter may come back
            return False
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self._lease_s / _BEATS_A_LEASE):
            # Away for a while: the lease is longer than that, and its process is seen to live.
            with contextlib.suppress(InfrastructureError, RigError):
                self.renew()

    def renew(self) -> None:
        """Make the lease good for another while, and see that the place is still ours."""
        found = self._places.find(self.place)
        if found.acquired and found.acquired != me():
            self.lost = f"{self.place} was taken by {found.acquired}"
            return
        other = Lease.of(found.tags)
        if other is not None and not self._lease.same_holder(other) and not death_of(other):
            self.lost = f"{self.place} was taken by {other}"
            return
        self._lease = self._lease.renewed(lease_s=self._lease_s)
        self._places.set_tags(self.place, self._lease.tags)
        if not found.acquired:
            self._places.acquire(self.place)
            self._places.leave()

    def quarantine(self, reason: str) -> None:
        """Mark the place as sick, for everybody."""
        self._places.quarantine(self.place, reason)

    def give_back(self) -> None:
        """Hand the place back. Idempotent. InfrastructureError if the coordinator is away."""
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        if self.place:
            cancelled = ""
            with contextlib.suppress(RigError):  # the place is no more
                cancelled = hand_back(self._places, self._places.find(self.place), self._lease)
            self.place = ""
            if cancelled == self.token:
                return
        self._places.cancel(self.token)


@frozen
class Freed:
    """A place that was handed back for its holder, and why."""

    place: str
    lease: Lease
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: held by {self.lease}: {self.reason}; freed"


def hand_back(places: Places, place: Place, lease: Lease) -> str:
    """Release a place that a lease holds; nothing of it is left. Others' are left alone.

    The reservation that was cancelled; empty: none.
    """
    if not lease.same_holder(Lease.of(place.tags)):
        return ""
    locked = place.acquired == lease.owner
    if locked:
        places.free(place.name, lease.owner)
    places.set_tags(place.name, CLEARED)
    if not locked or not place.reservation:  # where nobody locked it may be somebody else's
        return ""
    places.cancel(place.reservation)
    return place.reservation


def free_dead(
    places: Places,
    *,
    run: str = "",
    dead: Callable[[Lease], str] = death_of,
    dry: bool = False,
) -> list[Freed]:
    """Hand back the places whose holders are dead (of one `run`, if it is named)."""
    freed: list[Freed] = []
    with _alone():
        for place in places.all():
            lease = Lease.of(place.tags)
            if lease is None or (run and lease.run != run):
                continue
            reason = dead(lease)
            if reason:
                if not dry:
                    hand_back(places, places.find(place.name), lease)
                freed.append(Freed(place.name, lease, reason))
    return freed


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One at a time on this host: between looking and freeing, a place may change hands."""
    path = base_directory() / "farm.lock"
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
