"""What can go wrong, as one line for a person and a status for a client."""

from __future__ import annotations


class ServerError(Exception):
    """The server could not start or a command failed; the message names the thing and the cause."""


class RefusedError(Exception):
    """A request that is answered with `status` and one line. `retry_after_s` asks for patience."""

    def __init__(self, status: int, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


def not_found(what: str, identifier: str) -> RefusedError:
    """Return the 404 for `what` with `identifier`."""
    return RefusedError(404, f"no {what} {identifier!r}")


def conflict(message: str) -> RefusedError:
    """Return a 409."""
    return RefusedError(409, message)


def require_plain(what: str, name: str) -> None:
    """Refuse a name that could not stand in an address. Raises RefusedError(422)."""
    if "/" in name or name in (".", ".."):
        raise invalid(f"the name of a {what} can't be {name!r}: no slash, not a dot or two alone")


def invalid(message: str) -> RefusedError:
    """Return a 422: well-formed, but not possible."""
    return RefusedError(422, message)
