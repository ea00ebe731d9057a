"""Faults of the network and of the server, from the cable up to the HTTP answer.

Faults of a connection are exact to the byte and never look into TLS. Faults of the server are
answers of a server that stands in for the real one, which has no part in them.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators

from framework.faults.base import Fault

DropKind = Literal["fin", "reset", "stall", "refuse", "black-hole", "corrupt", "duplicate"]
CertificateKind = Literal["expired", "not-yet-valid", "wrong-name", "unknown-authority"]
ContentKind = Literal["garbage", "truncated", "web-page"]

DROP_WORDS: dict[str, str] = {
    "fin": "connection closed",
    "reset": "connection reset",
    "stall": "network silent",
    "refuse": "server refusing",
    "black-hole": "network swallowing everything",
    "corrupt": "a byte corrupted",
    "duplicate": "a byte sent twice",
}
POSITIVE = validators.optional(validators.gt(0))
NOT_NEGATIVE = validators.optional(validators.ge(0))
COUNT = validators.optional(validators.ge(1))
ONCE: int | None = 1


def _length(lasts_s: float | None) -> str:
    return "" if lasts_s is None else f" for {lasts_s:g} s"


def _often(times: int) -> str:
    return "" if times == 1 else f", {times} times"


class NetworkFamily(Fault):
    """Base of the faults that the proxy does."""

    family: ClassVar[str] = "network"
    needs: ClassVar[frozenset[str]] = frozenset({"network"})


@frozen
class NetworkDrop(NetworkFamily):
    """The connection to the server fails.

    Attributes:
        kind: `fin`, `reset`, `stall` (open connections go silent), `refuse`, `black-hole` (silent,
            and nothing answers a new connection), `corrupt` or `duplicate` (a byte).
        lasts_s: how long a stall, a refusal or a black hole lasts; None: until the scenario
            restores it.
        times: how often.
    """

    kind: DropKind = field(validator=validators.in_(tuple(DROP_WORDS)))
    lasts_s: float | None = field(default=None, validator=POSITIVE)
    times: int = field(default=1, validator=validators.ge(1))

    def what(self) -> str:
        """What goes wrong."""
        return f"{DROP_WORDS[self.kind]}{_length(self.lasts_s)}"

    def details(self) -> str:
        """How often."""
        return _often(self.times)


@frozen
class NetworkSlow(NetworkFamily):
    """The network is slow: few bytes a second, or late.

    Attributes:
        bytes_per_s: at most so many in each direction; None: no limit.
        latency_s: each piece of data is so late.
        lasts_s: for how long; None: until the scenario restores it.
    """

    bytes_per_s: float | None = field(default=None, validator=POSITIVE)
    latency_s: float = field(default=0.0, validator=[validators.ge(0), validators.le(60)])
    lasts_s: float | None = field(default=None, validator=POSITIVE)

    def what(self) -> str:
        """What goes wrong."""
        slow = [] if self.bytes_per_s is None else [f"{self.bytes_per_s / 1024:g} KiB/s"]
        late = [f"{self.latency_s:g} s late"] if self.latency_s else []
        return f"network slow ({', '.join(slow + late)}){_length(self.lasts_s)}"


@frozen
class LinkDown(Fault):
    """The network cable is pulled.

    Attributes:
        lasts_s: for how long; None: until the scenario restores it.
        times: how often it is pulled: it comes back for as long as it was out.
    """

    family: ClassVar[str] = "network"
    needs: ClassVar[frozenset[str]] = frozenset({"link"})

    lasts_s: float | None = field(default=None, validator=POSITIVE)
    times: int = field(default=1, validator=[validators.ge(1), validators.le(100)])

    def what(self) -> str:
        """What goes wrong."""
        return f"cable pulled{_length(self.lasts_s)}"

    def details(self) -> str:
        """How often."""
        return _often(self.times)


@frozen
class ServerAnswers(NetworkFamily):
    """The server answers with an HTTP status instead of the file.

    Attributes:
        status: the status code.
        times: how many requests are answered so; None: all until the scenario restores it.
        retry_after_s: the Retry-After header, in seconds.
    """

    status: int = field(validator=validators.and_(validators.ge(300), validators.le(599)))
    times: int | None = field(default=ONCE, validator=COUNT)
    retry_after_s: int | None = field(default=None, validator=NOT_NEGATIVE)

    def what(self) -> str:
        """What goes wrong."""
        after = "" if self.retry_after_s is None else f" with Retry-After {self.retry_after_s}"
        return f"server answering {self.status}{after}"

    def details(self) -> str:
        """How often."""
        return ", always" if self.times is None else _often(self.times)


@frozen
class WrongContent(NetworkFamily):
    """The server answers 200 with something that is not the artifact.

    Attributes:
        kind: `garbage` (as many bytes as asked for), `truncated` (it says how much, and sends
            less), or `web-page` (a captive portal's).
        times: how many requests; None: all until the scenario restores it.
    """

    kind: ContentKind = field(validator=validators.in_(("garbage", "truncated", "web-page")))
    times: int | None = field(default=None, validator=COUNT)

    def what(self) -> str:
        """What goes wrong."""
        words = {
            "garbage": "server sending garbage",
            "truncated": "server sending less than it says",
            "web-page": "captive portal answering",
        }
        return words[self.kind]

    def details(self) -> str:
        """How often."""
        return "" if self.times is None else _often(self.times)


@frozen
class BadCertificate(NetworkFamily):
    """The server shows a certificate that nobody may accept.

    Attributes:
        kind: `expired`, `not-yet-valid`, `wrong-name` or `unknown-authority`.
    """

    kind: CertificateKind = field(
        validator=validators.in_(("expired", "not-yet-valid", "wrong-name", "unknown-authority"))
    )

    def what(self) -> str:
        """What goes wrong."""
        words = {
            "expired": "server certificate expired",
            "not-yet-valid": "server certificate not valid yet",
            "wrong-name": "server certificate of another host",
            "unknown-authority": "server certificate of an unknown authority",
        }
        return words[self.kind]


@frozen
class NameGone(Fault):
    """The server's name can't be resolved.

    Attributes:
        kind: `refused` (nobody listens where names are asked for) or `silent` (no answer ever).
    """

    family: ClassVar[str] = "network"
    needs: ClassVar[frozenset[str]] = frozenset({"network"})

    kind: Literal["refused", "silent"] = field(
        default="refused", validator=validators.in_(("refused", "silent"))
    )

    def what(self) -> str:
        """What goes wrong."""
        return f"DNS gone ({self.kind})"


def connection(kind: DropKind, *, lasts_s: float | None = None, times: int = 1) -> NetworkDrop:
    """The connection is closed, reset, silent, refused, swallowed, or a byte of it is wrong."""
    return NetworkDrop(kind, lasts_s, times)


def slow_network(
    *, bytes_per_s: float | None = None, latency_s: float = 0.0, lasts_s: float | None = None
) -> NetworkSlow:
    """The network has few bytes a second, or is late."""
    return NetworkSlow(bytes_per_s, latency_s, lasts_s)


def link_down(*, lasts_s: float | None = None, times: int = 1) -> LinkDown:
    """The cable is pulled."""
    return LinkDown(lasts_s, times)


def server_answers(
    status: int, *, times: int | None = 1, retry_after_s: int | None = None
) -> ServerAnswers:
    """The server answers with this status, so many times."""
    return ServerAnswers(status, times, retry_after_s)


def wrong_content(kind: ContentKind, *, times: int | None = None) -> WrongContent:
    """The server sends something else."""
    return WrongContent(kind, times)


def captive_portal(*, times: int | None = None) -> WrongContent:
    """A web page comes instead of the artifact."""
    return WrongContent("web-page", times)


def bad_certificate(kind: CertificateKind) -> BadCertificate:
    """The server shows a bad certificate."""
    return BadCertificate(kind)


def name_gone(kind: Literal["refused", "silent"] = "refused") -> NameGone:
    """The server's name can't be resolved."""
    return NameGone(kind)
