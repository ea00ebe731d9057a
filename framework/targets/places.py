"""labgrid's places, over the coordinator's own gRPC: reserve, lock, free, tag, mark as sick.

A board that failed its check carries the tag `health=quarantine` and the reason as its place's
comment, so that every user of the coordinator sees it; a reservation that asks for `health=ok`
passes it by. It is released by a check that passes, or by a person (`brownout rig release`).

The calls are those of labgrid-client (labgrid/remote/proto/labgrid-coordinator.proto), which takes
a second to start and can't be asked many times. To reserve and to lock, a client has to be
announced by a stream on the same connection. The coordinator sends every change of any place to
every client that is, so on a farm each of a hundred workers would cost all the others something: we
are announced for these two calls only (`leave`), and ask everything else unannounced.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import grpc
from attrs import field, frozen
from labgrid.remote.common import TAG_KEY, ReservationState
from labgrid.remote.generated import labgrid_coordinator_pb2 as messages
from labgrid.remote.generated import labgrid_coordinator_pb2_grpc as services
from labgrid.util import labgrid_version

from framework.targets.errors import InfrastructureError, RigError

__all__ = [
    "HEALTHY",
    "QUARANTINED",
    "Place",
    "Places",
    "RefusedError",
    "Reserved",
    "coordinator_address",
    "me",
    "parse_tags",
]

HEALTHY, QUARANTINED = "ok", "quarantine"
DEFAULT_PORT = 20408
_ANSWER_S = 20.0  # the coordinator's lock is held while an exporter acquires resources
_CONNECT_S = 10.0
_ASK_AGAIN_S = 0.5
_LONGEST_REASON = 200
_NO_PLACE = "no_place_has_this_name"


@frozen
class Place:
    """A place.

    Attributes:
        name: its name.
        acquired: who has it; empty: nobody.
        tags, comment: what is said of it.
        reservation: the token of the reservation that it was given to.
        lacking: whether it is acquired without any of the resources that it should have: their
            exporter is away.
    """

    name: str
    acquired: str = ""
    tags: Mapping[str, str] = field(factory=dict)
    comment: str = ""
    reservation: str = ""
    lacking: bool = False

    @property
    def quarantined(self) -> bool:
        """Whether a check found it sick."""
        return self.tags.get("health") == QUARANTINED


@frozen
class Reserved:
    """A reservation: its token, its state, and the place that it was given (empty: none yet)."""

    token: str
    state: ReservationState
    place: str = ""


def coordinator_address() -> str:
    """Where the coordinator is, as labgrid's own programs find it."""
    told = os.environ.get("LG_COORDINATOR", "") or f"127.0.0.1:{DEFAULT_PORT}"
    return told if told.rpartition(":")[2].isdigit() and ":" in told else f"{told}:{DEFAULT_PORT}"


def me() -> str:
    """The name under which labgrid knows us: host and user."""
    host = os.environ.get("LG_HOSTNAME") or socket.gethostname()
    return f"{host}/{os.environ.get('LG_USERNAME') or getpass.getuser()}"


class _Connection:
    """One connection, until `close`; `announce` makes us known to the coordinator on it."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
            address,
            options=[  # as labgrid's client: a dead connection is noticed
                ("grpc.keepalive_time_ms", 7500),
                ("grpc.keepalive_timeout_ms", 10000),
                ("grpc.http2.max_pings_without_data", 0),
                # A connection of its own: the coordinator tells its clients apart by it.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.stub = services.CoordinatorStub(self.channel)
        #: Whether the stream ended: gRPC connects anew by itself, and nobody would know us there.
        self.broken = False
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stream: Any = None

    def announce(self) -> None:
        """Announce ourselves, and wait until the coordinator knows us. grpc.RpcError."""
        startup = messages.ClientInMessage()
        startup.startup.version = labgrid_version()
        startup.startup.name = me()
        sync = messages.ClientInMessage()
        sync.sync.id = 1
        self._said.put(startup)
        self._said.put(sync)
        self._stream = self.stub.ClientStream(iter(self._said.get, None))
        timer = threading.Timer(_CONNECT_S, self._stream.cancel)
        timer.daemon = True
        timer.start()
        try:
            for told in self._stream:
                if told.HasField("sync"):
                    break
        finally:
            timer.cancel()
        # What it says later (nothing was subscribed) is read so that the stream never stalls.
        threading.Thread(target=self._read, name="coordinator", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):
            for _ in self._stream:
                pass
        self.broken = True

    def close(self) -> None:
        self._said.put(None)
        if self._stream is not None:
            self._stream.cancel()
        self.channel.close()


class Places:
    """A coordinator's places. Every method raises InfrastructureError if it does not answer.

    It connects when it is first asked, and again after the coordinator was away. Any thread may
    ask. A context manager, for whoever wants the connection gone at the end.
    """

    def __init__(self, coordinator: str = "") -> None:
        self.coordinator = coordinator or coordinator_address()
        self._silent: _Connection | None = None
        self._announced: _Connection | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; reservations and locks stay. Idempotent."""
        self.leave()
        with self._lock:
            connection, self._silent = self._silent, None
        if connection is not None:
            connection.close()

    def leave(self) -> None:
        """Be announced no longer, until the next reservation or lock. Idempotent.

        Whoever holds what it wanted should: see the module text.
        """
        with self._lock:
            connection, self._announced = self._announced, None
        if connection is not None:
            connection.close()

    # -- looking ------------------------------------------------------------------------------

    def all(self) -> list[Place]:
        """What there is, by name."""
        answer = self._ask(lambda stub, s: stub.GetPlaces(messages.GetPlacesRequest(), timeout=s))
        return sorted(map(_place, answer.places), key=lambda place: place.name)

    def find(self, name: str) -> Place:
        """One place, by its name, or `+` for the one that LG_TOKEN has reserved."""
        token = os.environ.get("LG_TOKEN", "") if name == "+" else ""
        for place in self.all():
            if place.name == name or (token and place.reservation == token):
                return place
        wanted = f"place for the reservation LG_TOKEN={token}" if name == "+" else f"place {name!r}"
        raise RigError(f"{self.coordinator} has no {wanted}")

    # -- reservations and locks -----------------------------------------------------------------

    def request(self, tags: Mapping[str, str]) -> Reserved:
        """Ask for a place with these tags; it may have to be waited for (`poll`)."""
        main = messages.Reservation.Filter(filter=dict(tags))
        wanted = messages.CreateReservationRequest(filters={"main": main}, prio=0.0)
        return _reserved(
            self._ask(
                lambda stub, s: stub.CreateReservation(wanted, timeout=s), announced=True
            ).reservation
        )

    def poll(self, token: str) -> Reserved:
        """What became of a reservation. Asked less than once a minute, it expires."""
        wanted = messages.PollReservationRequest(token=token)
        return _reserved(
            self._ask(lambda stub, s: stub.PollReservation(wanted, timeout=s)).reservation
        )

    def reserve(self, tags: Mapping[str, str], patience_s: float) -> str:
        """Reserve a place with these tags, and wait for it; its token."""
        deadline = time.monotonic() + patience_s
        reserved = self.request(tags)
        while reserved.state is ReservationState.waiting:
            if time.monotonic() > deadline:
                self.cancel(reserved.token)
                raise InfrastructureError(f"no place with {dict(tags)} after {patience_s:g} s")
            time.sleep(_ASK_AGAIN_S)
            self.next_in_line()
            reserved = self.poll(reserved.token)
        return reserved.token

    def cancel(self, token: str) -> None:
        """Give a reservation back; nothing happens if there is none any more."""
        wanted = messages.CancelReservationRequest(token=token)
        with contextlib.suppress(RefusedError):
            self._ask(lambda stub, s: stub.CancelReservation(wanted, timeout=s))

    def next_in_line(self) -> None:
        """Have the coordinator look now for who gets the places that are free.

        When a reservation is cancelled it frees the place, and looks for the next in line only when
        it is asked for something else, or within 15 s: so it is asked, for a place that can't be.
        """
        self.cancel(self.request({"name": _NO_PLACE}).token)

    def lock(self, token: str) -> str:
        """Acquire the place that a token has reserved; its name."""
        name = self.poll(token).place
        if not name:
            raise InfrastructureError(f"the reservation {token} has no place")
        self.acquire(name)
        return name

    def acquire(self, name: str) -> None:
        """Acquire a place, which nobody has and nobody else has reserved."""
        wanted = messages.AcquirePlaceRequest(placename=name)
        self._ask(lambda stub, s: stub.AcquirePlace(wanted, timeout=s), announced=True)

    def free(self, name: str, owner: str = "") -> None:
        """Release a place; with `owner`, only if it is theirs. Nothing happens if it is free."""
        wanted = messages.ReleasePlaceRequest(placename=name)
        if owner:
            wanted.fromuser = owner
        try:
            self._ask(lambda stub, s: stub.ReleasePlace(wanted, timeout=s))
        except RefusedError:
            if self.find(name).acquired:
                raise

    # -- tags ---------------------------------------------------------------------------------

    def set_tags(self, name: str, tags: Mapping[str, str]) -> None:
        """Set tags of a place, all at once; an empty value takes one away."""
        wanted = messages.SetPlaceTagsRequest(placename=name, tags=dict(tags))
        self._ask(lambda stub, s: stub.SetPlaceTags(wanted, timeout=s))

    def comment(self, name: str, text: str) -> None:
        """Set a place's comment."""
        wanted = messages.SetPlaceCommentRequest(placename=name, comment=text)
        self._ask(lambda stub, s: stub.SetPlaceComment(wanted, timeout=s))

    def quarantine(self, name: str, reason: str) -> None:
        """Mark a place as sick, for every user of the coordinator."""
        self.comment(name, f"quarantine: {' '.join(reason.split())[:_LONGEST_REASON]}")
        self.set_tags(name, {"health": QUARANTINED})

    def heal(self, name: str) -> None:
        """Mark a place as well."""
        self.set_tags(name, {"health": HEALTHY})
        self.comment(name, "")

    # -- inside ---------------------------------------------------------------------------------

    def _ask(self, call: Callable[[Any, float], Any], *, announced: bool = False) -> Any:
        try:
            connection = self._introduced() if announced else self._connected()
            return call(connection.stub, _ANSWER_S)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            said = " ".join(str(error.details() if isinstance(error, grpc.Call) else error).split())
            if code in _REFUSALS:
                raise RefusedError(f"{self.coordinator}: {said}") from error
            # Unavailable, or a coordinator that was restarted and knows nobody: say hello again.
            self.close()
            raise InfrastructureError(
                f"the coordinator at {self.coordinator} does not answer: {said or code}"
            ) from error
        except ValueError as error:  # closed by another thread meanwhile
            raise InfrastructureError(f"the connection to {self.coordinator} is closed") from error

    def _connected(self) -> _Connection:
        with self._lock:
            if self._silent is None:
                self._silent = _Connection(self.coordinator)
            return self._silent

    def _introduced(self) -> _Connection:
        with self._lock:
            if self._announced is not None and self._announced.broken:
                self._announced.close()
                self._announced = None
            if self._announced is None:
                connection = _Connection(self.coordinator)
                try:
                    connection.announce()
                except grpc.RpcError:
                    connection.close()
                    raise
                self._announced = connection
            return self._announced


class RefusedError(InfrastructureError):
    """The coordinator answered, and said no."""


_REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


def _place(told: Any) -> Place:
    lacking = bool(told.acquired and told.matches and not told.acquired_resources)
    return Place(
        *(told.name, told.acquired, dict(told.tags), told.comment, told.reservation), lacking
    )


def _reserved(told: Any) -> Reserved:
    return Reserved(told.token, ReservationState(told.state), told.allocations.get("main", ""))


def parse_tags(texts: Iterable[str]) -> dict[str, str]:
    """`board=rpi4` as a dictionary; several may be separated by commas. RigError."""
    tags: dict[str, str] = {}
    for text in (part for given in texts for part in given.split(",")):
        key, equals, value = text.strip().partition("=")
        if not equals or not value or not TAG_KEY.fullmatch(key):
            raise RigError(f"--tags: {text!r} is not like board=rpi4")
        tags[key] = value
    return tags
