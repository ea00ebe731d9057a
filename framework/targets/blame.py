"""Whose failure an error is: the rig's, which says nothing of the product, or not."""

from __future__ import annotations

from labgrid.exceptions import NoResourceFoundError, NoSupplierFoundError
from labgrid.remote.client import Error as LabgridRemoteError

from framework.console import ConsoleLost
from framework.targets.errors import InfrastructureError

__all__ = ["infrastructure_in"]

_LINE_GONE = ("the line ended", "cannot send")
# The last three: labgrid finds no resource of a place whose exporter is away, or no lock on it.
_OF_THE_RIG = (
    InfrastructureError,
    ConnectionError,
    NoResourceFoundError,
    NoSupplierFoundError,
    LabgridRemoteError,
)


def infrastructure_in(error: BaseException) -> str:
    """What a failure says of the rig; empty if the rig did nothing that is known.

    What the product did wrong (an assertion) stays that, whatever it came from; so do a panic,
    a restart and a command that did not end. A line that ended under us is the rig's.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, AssertionError):
            return ""
        gone = isinstance(seen, ConsoleLost) and any(why in seen.reason for why in _LINE_GONE)
        if gone or isinstance(seen, _OF_THE_RIG):
            first = (str(seen).splitlines() or [""])[0].partition("; last output: ")[0]
            return first.removeprefix("INFRASTRUCTURE: ") or type(seen).__name__
        seen = seen.__cause__ or seen.__context__
    return ""
