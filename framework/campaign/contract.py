"""What the client promises of its states, scripts and statements, checked line by line.

Independent of the client's own table: the order of the states and the scripts around them are those
of Mender's public documents ("State scripts", "Update modules"), and a statement about a slot is
compared with the slot that runs. Each broken promise is an event that invariant 7 judges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from framework.verdict import ContractChecked

_FAILING: Final = frozenset({"ArtifactRollback"})
ORDER: Final[Mapping[str, frozenset[str]]] = {
    "Download": frozenset({"ArtifactInstall", "Cleanup"}),
    "ArtifactInstall": frozenset({"ArtifactReboot", "ArtifactCommit"}) | _FAILING,
    "ArtifactReboot": frozenset({"ArtifactVerifyReboot"}) | _FAILING,
    "ArtifactVerifyReboot": frozenset({"ArtifactCommit"}) | _FAILING,
    "ArtifactCommit": frozenset({"Cleanup"}) | _FAILING,
    "ArtifactRollback": frozenset({"ArtifactRollbackReboot", "ArtifactFailure"}),
    "ArtifactRollbackReboot": frozenset({"ArtifactVerifyRollbackReboot", "ArtifactFailure"}),
    "ArtifactVerifyRollbackReboot": frozenset({"ArtifactFailure", "ArtifactRollbackReboot"}),
    "ArtifactFailure": frozenset({"Cleanup"}),
    "Cleanup": frozenset({"Idle"}),
    "Idle": frozenset(),
}
"""The states that may follow each within one command."""
_ENDS: Final = re.compile(
    r"(?P<committed>committed)|(?P<back>rolled back to)|\S+ (?P<stayed>was not installed)"
)
_SLOT: Final = re.compile(r"\(slot (\w)\)")
BACKWARD: Final = ("ArtifactRollback_Enter_00", "ArtifactFailure_Enter_00")
"""The scripts of an artifact that are run when its update is rolled back."""


class Contract:
    """Listens to one device.

    `tell` gets an event for each promise that was broken. `running` says which slot runs, `settled`
    whether that is the one that is started next, for good; `struck` whether any fault has struck,
    so that an interruption is none of the client's invention.
    `scripted`: the artifact has state scripts, which end at their first try; `slots`: its payload
    is an image, so that what it says of slots is about slots.
    """

    def __init__(
        self,
        tell: Callable[[ContractChecked], None],
        running: Callable[[], str],
        settled: Callable[[], bool],
        struck: Callable[[], bool],
        *,
        scripted: bool,
        slots: bool,
    ) -> None:
        self._tell = tell
        self._running = running
        self._settled = settled
        self._struck = struck
        self._scripted = scripted
        self._slots = slots
        self._state = ""
        self._verb = ""
        self._ran: list[str] = []
        self._said: list[str] = []
        self._installed = False

    def begin(self, verb: str) -> None:
        """A command begins."""
        self._verb, self._state, self._said = verb, "", []

    def end(self, exit_code: int) -> None:
        """It has ended by itself."""
        # An update that had failed before, and whose end a fault kept from being recorded, is only
        # cleaned up.
        only_cleaned = ("state Cleanup",) if self._struck() else ()
        done = {
            "commit": ("committed ",),
            "rollback": (
                "state ArtifactRollback",
                "rolled back to",
                "was not installed",
                *only_cleaned,
            ),
            "install": ("installed ",) if self._slots else (),
        }.get(self._verb, ())
        if exit_code == 0 and done and not self._has(*done):
            self._broken(f"{self._verb} ended well, and never said {done[0]!r}")
        if exit_code == 2 and self._has({"commit": "state ArtifactCommit"}.get(self._verb, "\n")):
            self._broken(f"{self._verb} says that there was nothing to do, and did it")

    def heard(self, line: str) -> None:
        """The client says something."""
        self._said.append(line)
        if line.startswith("state script "):
            self._script(line.removeprefix("state script "))
        elif line.startswith("state "):
            self._enter(line.removeprefix("state "))
        elif match := _ENDS.match(line):
            self._ended(line, match)

    def _enter(self, state: str) -> None:
        # A module that never says that its rollback is verified is given up in the end.
        given_up = (self._state, state) == ("ArtifactVerifyRollbackReboot", "Cleanup")
        allowed = not self._state or state in ORDER[self._state] or (given_up and not self._slots)
        # A state whose name the store refuses is left before it is told.
        if not allowed and not self._struck():
            self._broken(f"state {state} follows {self._state}")
        if state == "Download":
            self._ran.clear()
            self._installed = False
        if state == "Idle" and self._slots and not self._struck() and not self._settled():
            self._broken(f"the update has ended, and slot {self._running()} is not settled")
        self._installed |= state == "ArtifactInstall"
        self._state = state

    def _script(self, name: str) -> None:
        if self._scripted and not self._struck() and name in self._ran:
            self._broken(f"state script {name} was run twice")
        self._ran.append(name)

    def _ended(self, line: str, match: re.Match[str]) -> None:
        slot = _SLOT.search(line)
        if self._slots and slot is not None and slot[1] != self._running():
            self._broken(f"says {line!r}, and slot {self._running()} runs")
        if match["stayed"] and not self._struck():
            self._broken(f"says {line!r}, and nothing interrupted it")
        if self._scripted and self._installed and not self._struck():
            if match["back"] and (missing := set(BACKWARD) - set(self._ran)):
                self._broken(f"rolled back, and {min(missing)} was not run")
            if match["committed"] and (there := set(BACKWARD) & set(self._ran)):
                self._broken(f"committed, and {min(there)} was run")

    def status(self, lines: Sequence[str], *, updating: bool) -> None:
        """The client's status was read."""
        state = next((line for line in lines if line.startswith("state: ")), "")
        if not lines or lines[0] != state:
            self._broken(f"the status does not begin with the state: {list(lines)}")
        if (state == "state: Idle") == updating:
            self._broken(f"says {state!r}, and an update is {'' if updating else 'not '}recorded")
        running = next((line for line in lines if line.startswith("running: ")), "")
        slot = _SLOT.search(running)
        if slot is None or slot[1] != self._running():
            self._broken(f"says {running!r}, and slot {self._running()} runs")

    def cause(self, told: str, expected: str) -> None:
        """The cause of an outcome was read: it must name what failed."""
        if expected not in told:
            self._broken(f"the cause is {expected!r}, and it says {told!r}")

    def _has(self, *texts: str) -> bool:
        return any(text in line for line in self._said for text in texts)

    def _broken(self, what: str) -> None:
        self._tell(ContractChecked(what, kept=False))
