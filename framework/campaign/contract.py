"""What the client promises of its states, scripts, modules and statements, checked line by line.

Independent of the client's own tables: the order of the states, the scripts around them, the calls
of an update module and what follows a spontaneous restart are those of Mender's public documents
("State scripts", "Update modules v3 protocol"), and a statement about a slot or the boot
environment is compared with them. Each broken promise is an event that invariant 7 judges.

Where a fault struck, less can be promised. A power cut or a kill leaves the record of the state
that was told last, or of the one after it, which is written a moment before it is told; what may
follow is in `AFTER`. Where the drive failed or forged something (`Facts.damaged`), the record may
be any, and these rules are silent.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from framework.targets.simulated.device import AT_BOOT, DAEMON, KILLED, Recorded
from framework.targets.simulated.managed import BROKE, ENDED, Job
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
AFTER: Final[Mapping[str, frozenset[str]]] = {
    "Download": frozenset({"Cleanup"}),
    "ArtifactInstall": frozenset({"ArtifactRollback"}),
    "ArtifactReboot": frozenset({"ArtifactVerifyReboot", "ArtifactRollback"}),
    "ArtifactVerifyReboot": frozenset({"ArtifactRollback"}),
    "ArtifactCommit": frozenset({"ArtifactRollback", "ArtifactCommit", "Cleanup"}),
    "ArtifactRollback": frozenset({"ArtifactRollback"}),
    "ArtifactRollbackReboot": frozenset({"ArtifactVerifyRollbackReboot"}),
    "ArtifactVerifyRollbackReboot": frozenset({"ArtifactVerifyRollbackReboot"}),
    "ArtifactFailure": frozenset({"ArtifactFailure"}),
    "Cleanup": frozenset({"Cleanup"}),
}
"""What the next command may begin with where each was the last on record."""
AFTER_OF_IMAGES: Final[Mapping[str, frozenset[str]]] = {
    # The new slot may have been armed, and started.
    "ArtifactInstall": frozenset({"ArtifactVerifyReboot"}),
    # The boot loader falls back; a process that was killed leaves the trial running.
    "ArtifactVerifyReboot": frozenset({"ArtifactVerifyReboot"}),
    "ArtifactCommit": frozenset({"ArtifactVerifyReboot"}),
    # The new system may run, or run again, while it is being left.
    "ArtifactRollback": frozenset({"ArtifactFailure"}),
    "ArtifactRollbackReboot": frozenset({"ArtifactRollback", "ArtifactFailure"}),
    "ArtifactVerifyRollbackReboot": frozenset({"ArtifactRollback", "ArtifactFailure"}),
    "ArtifactFailure": frozenset({"ArtifactRollback"}),
}
"""What else it may begin with where slots are switched."""
AFTER_OF_DEPLOYMENTS: Final[Mapping[str, frozenset[str]]] = {
    # Held before its installation, or before the restart, and the daemon begins anew.
    "ArtifactInstall": frozenset({"ArtifactInstall", "ArtifactReboot"}),
    "ArtifactReboot": frozenset({"ArtifactReboot"}),
}
"""What else it may begin with where the daemon does it."""
BEGUN: Final[Mapping[str, frozenset[str]]] = {
    "ArtifactInstall": frozenset({"ArtifactVerifyReboot"}),
    "ArtifactCommit": frozenset({"ArtifactCommit", "Cleanup"}),
    "ArtifactRollback": frozenset({"ArtifactFailure"}),
}
"""What only the work of a state leads to, which begins once it was told."""


def _on_record(told: str) -> frozenset[str]:
    """The states that may be on record where `told` is the last that was told."""
    return frozenset({told}) | (ORDER[told] or {"Download"})


MOST: Final = 28
"""States that an update may enter; one that enters more is stopped (`updater/device/STATES.md`)."""
_ENDS: Final = re.compile(
    r"(?P<committed>committed)|(?P<back>rolled back to)|\S+ (?P<stayed>was not installed)"
)
_SLOT: Final = re.compile(r"\(slot (\w)\)")
_WAITS: Final = re.compile(r"(?:installed \S+|\S+ waits)(?: (?:into|in) slot (\w))?; reboot to")
_RETURNS: Final = re.compile(
    r"(?:rolling back to \S+(?: \(slot (\w)\))?, reboot needed: |reboot needed(?: to return to slot"
    r" (\w))?: )"
)
_ALTHOUGH: Final = re.compile(r"slot (\w) runs although the boot environment names (slot \w|no s)")
_BUT: Final = re.compile(r"the boot environment names (slot \w|no s).* but slot (\w) runs; settl")
_ARMED: Final = re.compile(r"slot (\w) is still armed")
_CIRCLES: Final = re.compile(r"entered (\d+) states without an end")
_INTERRUPTED: Final = re.compile(r"interrupted in ([^\s;,)]+)")
_WHERE: Final = re.compile(r"([A-Za-z]+)(?:_(Wait|Enter|Leave|Error))?")
_RECORDED: Final = re.compile(r"(\S+_INCONSISTENT) is recorded")
_LAST: Final = re.compile(r"last update: (\S+) (\S+) at [-0-9T:]+Z(?:: (.+))?")
_ATTEMPT: Final = re.compile(r"download attempt (\d+) of (\d+) for deployment (\S+)")
ATTEMPTS: Final = 20
"""Downloads of a deployment that the network may break before it has failed."""
BACKWARD: Final = ("ArtifactRollback_Enter_00", "ArtifactFailure_Enter_00")
"""The scripts of an artifact that are run when its update is rolled back."""
MIGRATES: Final = "ArtifactInstall_Leave_00"
"""The script without whose end an image must not be kept, even where it starts."""
MANAGED: Final = ("ArtifactReboot_", "ArtifactRollbackReboot_")
"""The scripts that nobody runs where the update is by hand: the restart is the operator's."""
RESTARTING: Final = "ArtifactReboot_Enter_00"
"""The script that is run before a deployment's restart."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the harness knows of the device, asked when it matters.

    Attributes:
        running: the slot that runs.
        next: the slot that the boot environment names ("" for none), and whether it is on trial.
        struck: whether any fault has struck, so that an interruption is none of the client's
            invention.
        damaged: whether the drive has failed a request or changed what it was given.
        refused: whether the boot environment may have refused or changed a write by that.
        done: whether a state script has been done.
        forgotten: whether the state scripts of an update are left, of which the store has neither
            record nor outcome.
        module: what the update module of the package that is being installed was told to do:
            "reboot", "reverts", "fails", and "healthy" (Yes, No); None where there is none.
    """

    running: Callable[[], str]
    next: Callable[[], tuple[str, bool]]
    struck: Callable[[], bool]
    damaged: Callable[[], bool]
    refused: Callable[[], bool]
    done: Callable[[str], bool]
    forgotten: Callable[[], bool]
    module: Callable[[], Mapping[str, str] | None]


class Contract:
    """Listens to one device.

    `tell` gets an event for each promise that was broken.
    `scripted`: the artifact has state scripts, which end at their first try; `slots`: its payload
    is an image, so that what it says of slots is about slots; `initial`: the artifact that is
    committed at the beginning. `deployed`: the update is the daemon's, not somebody's by hand;
    `helped`: somebody has run a command since it began.
    """

    def __init__(
        self,
        tell: Callable[[ContractChecked], None],
        facts: Facts,
        *,
        scripted: bool,
        slots: bool,
        initial: str,
    ) -> None:
        self._tell = tell
        self._facts = facts
        self._scripted = scripted
        self._slots = slots
        self._state = ""
        self._verb = ""
        self._ran: list[str] = []
        self._said: list[str] = []
        # Of the update: the states told, oldest first; those behind which a command began anew.
        self._states: list[str] = []
        self._resumed: list[str] = []
        self._interruptions = 0
        self._open_call = ""
        self._migrating = False
        self._recorded = ""
        self._committed = initial
        self._unsure = False
        self.deployed = False
        # Of the whole lifetime: downloads of each deployment that were interrupted.
        self._attempts: Counter[str] = Counter()
        self._cuts = 0
        self.helped = False

    @property
    def recorded(self) -> str:
        """What the client said last that it recorded of ignored errors: "v2_INCONSISTENT"."""
        return self._recorded

    def begin(self, verb: str) -> None:
        """A command begins."""
        self.helped |= verb not in (DAEMON, AT_BOOT)
        self._verb, self._state, self._said = verb, "", []

    def interrupted(self) -> None:
        """Power goes, or the client is killed."""
        self._interruptions += 1
        self._cuts += 1
        self._open_call = ""
        # An outcome is on record a moment before it is told.
        self._unsure |= self._states[-1:] == ["Cleanup"]

    def end(self, exit_code: int) -> None:
        """It has ended by itself."""
        if exit_code == KILLED:
            return
        self._call_missing()
        # An update that had failed before, and whose end a fault kept from being recorded, is only
        # cleaned up.
        only_cleaned = ("state Cleanup",) if self._facts.struck() else ()
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
        there = {
            "commit": ("state ArtifactCommit", "committed "),
            "rollback": ("state ArtifactRollback", "rolled back to"),
        }.get(self._verb, ("",))
        if exit_code == 2 and (self._begins(*there) or there == ("",)):
            self._broken(f"{self._verb} says that there was nothing to do, and did it")
        if exit_code == 0 and self._verb == "rollback" and self._begins("committed "):
            self._broken("rollback ended well, and the update was committed")
        if self._slots and not self._facts.damaged():
            self._restart_is_due(exit_code)
        if self._verb in ("resume", AT_BOOT) and exit_code != 4 and self._facts.forgotten():
            self._broken(
                "state scripts of an update without a record are left, and it says nothing"
            )
        if self._verb == AT_BOOT and exit_code != 4 and self._slots and not self._facts.refused():
            named, trial = self._facts.next()
            left = self.deployed and self._has("is proved and committed by the daemon")
            if trial and named == self._facts.running() and not left:
                self._broken(f"slot {named} is on trial, and stays so once the device is started")

    def _restart_is_due(self, exit_code: int) -> None:
        named, trial = self._facts.next()
        settled = named == self._facts.running() and not trial
        if named and settled and exit_code == 4:
            self._broken(f"{self._verb} asks for a restart, which leads back to slot {named}")
        if self._state == "Idle" and not settled and exit_code != 4:
            self._broken(
                f"the update has ended, slot {named} is started next, and {self._verb} asks for no"
                " restart"
            )

    def heard(self, line: str) -> None:
        """The client says something."""
        self._said.append(line)
        if line.startswith("state script "):
            self._script(line.removeprefix("state script "))
        elif line.startswith("state "):
            self._enter(line.removeprefix("state "))
        else:
            if match := _ENDS.match(line):
                self._ended(line, match)
            self._stated(line)

    # The states.

    def _enter(self, state: str) -> None:
        self._call_missing()
        before = self._states[-1] if self._states else "Idle"
        if state == "Sync" or (self._verb == DAEMON and state == before == "Idle"):
            # The daemon's own: no update is in it.
            self._state = ""
            return
        if self._verb == DAEMON and state == "Idle" and before == "Cleanup" and not self._state:
            # It was interrupted, and all but over: on record a moment before it is told.
            self._forget_update()
            return
        if state == "Download":
            self._begin_update(before)
        elif not self._state:
            if before == "Idle":
                self._forget_update()
            self._resume(before, state)
        # A module that never says that its rollback is verified is given up in the end.
        given_up = (self._state, state) == ("ArtifactVerifyRollbackReboot", "Cleanup")
        allowed = not self._state or state in ORDER[self._state] or (given_up and not self._slots)
        # A state whose name the store refuses is left before it is told.
        if not self._facts.struck():
            if not allowed:
                self._broken(f"state {state} follows {self._state}")
            else:
                self._answered(state)
        if state == "Idle" and self._slots and not self._facts.struck():
            named, trial = self._facts.next()
            if trial or named != self._facts.running():
                self._broken(
                    f"the update has ended, and slot {self._facts.running()} is not settled"
                )
        self._states.append(state)
        self._state = state
        self._open_call = state

    def _begin_update(self, before: str) -> None:
        if before not in ("Idle", "Cleanup") and not self._facts.damaged():
            self._broken(f"an update begins, and the last one was in {before}")
        self._forget_update()

    def _forget_update(self) -> None:
        self._ran.clear()
        self._states.clear()
        self._resumed.clear()
        self._interruptions = 0
        self._migrating = False

    def _resume(self, before: str, state: str) -> None:
        """A command goes on with an update: does it know where that was?"""
        self._resumed.append(before)
        if self._facts.damaged():
            return
        may: set[str] = set()
        for one in _on_record(before):
            then = AFTER.get(one, frozenset())
            if self._slots:
                then |= AFTER_OF_IMAGES.get(one, frozenset())
            if self.deployed:
                then |= AFTER_OF_DEPLOYMENTS.get(one, frozenset())
            may |= then if one == before else then - BEGUN.get(one, frozenset())
        if state == "Cleanup" and len(self._states) + self._interruptions >= MOST:
            return
        if state not in may:
            self._broken(f"goes on with {state}, and {before} was interrupted")
        migrating = self._migrating and before == "ArtifactInstall"
        if migrating and not self._facts.done(MIGRATES) and state != "ArtifactRollback":
            self._broken(f"goes on with {state}, and {MIGRATES} was interrupted")

    def _answered(self, state: str) -> None:
        """Whether what the update module answered decides what comes next."""
        told, before = self._facts.module(), self._state
        if told is None:
            return
        restarts, reboots = told["reboot"] != "No", "ArtifactReboot" in self._states
        undone = told["reverts"] == "Yes" and told["fails"] != "ArtifactRollback"
        wrong = {
            ("ArtifactInstall", "ArtifactCommit"): restarts,
            ("ArtifactInstall", "ArtifactReboot"): not restarts,
            ("ArtifactRollback", "ArtifactRollbackReboot"): not (undone and reboots),
            ("ArtifactRollback", "ArtifactFailure"): undone and reboots,
            ("ArtifactRollbackReboot", "ArtifactFailure"): told["fails"] != before,
            ("ArtifactVerifyRollbackReboot", "ArtifactRollbackReboot"): told["fails"] != before,
            ("ArtifactVerifyRollbackReboot", "ArtifactFailure"): told["fails"] == before,
        }
        if wrong.get((before, state)):
            self._broken(f"state {state} follows {before}, and the update module says {told}")

    # The scripts, and the calls of an update module.

    def _script(self, name: str) -> None:
        if self._scripted and not self._facts.struck() and name in self._ran:
            self._broken(f"state script {name} was run twice")
        if name.startswith(MANAGED) and not self.deployed:
            self._broken(f"state script {name} was run, and the update is by hand")
        if not name.startswith(f"{self._script_state()}_"):
            self._broken(f"state script {name} was run in {self._state}")
        self._migrating |= self._slots and name == MIGRATES
        self._ran.append(name)

    def _script_state(self) -> str:
        """The state that scripts are called by, where the client is."""
        return self._state.replace("Verify", "")

    def called(self, state: str) -> None:
        """The update module is called for a state."""
        if state != self._state:
            self._broken(f"the update module is called for {state} in {self._state}")
        self._open_call = ""

    def _call_missing(self) -> None:
        """Whether the update module was called in the state that is being left."""
        state, self._open_call = self._open_call, ""
        told = self._facts.module()
        if not state or told is None or self._facts.struck():
            return
        yes = told["reboot"] == "Yes"
        # A script before it that fails, or a health check, may stand before the call.
        healthy = told["healthy"] == "Yes"
        must = {
            "ArtifactInstall": not self._scripted,
            "ArtifactReboot": yes,
            "ArtifactVerifyReboot": healthy,
            "ArtifactCommit": not self._scripted and healthy,
            "ArtifactRollback": told["reverts"] == "Yes",
            "ArtifactRollbackReboot": yes,
            "ArtifactVerifyRollbackReboot": True,
            "ArtifactFailure": True,
            "Cleanup": True,
        }
        if must.get(state):
            self._broken(f"the update module is not called for {state}")

    # What it says.

    def _ended(self, line: str, match: re.Match[str]) -> None:
        slot = _SLOT.search(line)
        struck = self._facts.struck()
        if self._slots and slot is not None and slot[1] != self._facts.running():
            self._broken(f"says {line!r}, and slot {self._facts.running()} runs")
        beyond = {"ArtifactReboot", "ArtifactVerifyReboot", "ArtifactCommit"} & set(self._states)
        if match["stayed"] and not struck:
            self._broken(f"says {line!r}, and nothing interrupted it")
        if match["stayed"] and beyond and not self._facts.damaged():
            self._broken(f"says {line!r}, and was in {min(beyond)}")
        installed = "ArtifactInstall" in self._states
        left = installed or "ArtifactRollback" in self._states
        if match["back"] and not left and not self._facts.damaged():
            self._broken(f"says {line!r}, and ArtifactInstall was never begun")
        if match["committed"]:
            self._recorded, self._unsure = "", False
            self._committed = line.split()[1]
        if self._scripted and installed and not struck:
            if match["back"] and (missing := set(BACKWARD) - set(self._ran)):
                self._broken(f"rolled back, and {min(missing)} was not run")
            if match["committed"] and (there := set(BACKWARD) & set(self._ran)):
                self._broken(f"committed, and {min(there)} was run")
            restarted = self.deployed and "ArtifactReboot" in self._states
            if match["committed"] and restarted and RESTARTING not in self._ran:
                self._broken(f"committed a deployment, and {RESTARTING} was not run")

    def _stated(self, line: str) -> None:
        if match := _RECORDED.search(line):
            self._recorded = match[1]
        if "interrupted in " in line:
            self._interrupted_in(line)
        if match := _CIRCLES.search(line):
            most = len(self._states) + self._interruptions + 1
            if int(match[1]) > most and not self._facts.damaged():
                self._broken(f"says {line!r}, and it was in {len(self._states)}")
        if line.startswith("error: "):
            parts = line.removeprefix("error: ").split("; then: ")
            if len(set(parts)) < len(parts) and not self._facts.damaged():
                self._broken(f"says {line!r}, one thing twice")
        if match := _ATTEMPT.match(line):
            self._attempts[match[3]] += 1
            said, attempts = (int(match[1]), int(match[2])), self._attempts[match[3]]
            # It is said before it is on record, and the power may go in between.
            sure = not self._cuts and not self._facts.damaged()
            if said[1] != ATTEMPTS or (sure and said[0] != attempts):
                self._broken(f"says {line!r}, and it is number {attempts} of {ATTEMPTS}")
        if match := _ARMED.search(line):
            named, _ = self._facts.next()
            if match[1] != named or match[1] == self._facts.running():
                self._broken(f"says {line!r}, and slot {named} is started next")
        if "slot" in line or "reboot" in line:
            self._stated_of_slots(line)

    def _stated_of_slots(self, line: str) -> None:
        match = _WAITS.match(line) or _RETURNS.match(line)
        if match is not None:
            slot = next(filter(None, match.groups()), "")
            if bool(slot) != self._slots:
                self._broken(f"says {line!r}, of {'an image' if self._slots else 'a package'}")
            if " waits" in line:
                self._waits(line)
        if not self._slots or self._facts.damaged():
            return
        named, trial = self._facts.next()
        running = self._facts.running()
        if match is not None and slot != named:
            self._broken(f"says {line!r}, and slot {named} is started next")
        if match := _ALTHOUGH.search(line):
            says = match[2].removeprefix("slot ") if match[2] != "no s" else ""
            if (match[1], says) != (running, named) or (says == running and trial):
                self._broken(f"says {line!r}, and slot {named} (trial: {trial}) is started next")
        if match := _BUT.search(line):
            says = match[1].removeprefix("slot ") if match[1] != "no s" else ""
            if (match[2], says) != (running, named) or says == running:
                self._broken(f"says {line!r}, and slot {named} is started next")

    def _waits(self, line: str) -> None:
        """It says that an update waits for its restart: is that what it was doing?"""
        last = self._states[-1] if self._states else "Idle"
        migrating = self._migrating and last == "ArtifactInstall"
        if self._verb == AT_BOOT:
            self._broken(f"says {line!r}, and has just been restarted")
        elif self._facts.damaged():
            return
        elif last not in ("ArtifactInstall", "ArtifactReboot"):
            self._broken(f"says {line!r}, and was in {last}")
        elif migrating and not self._facts.done(MIGRATES):
            self._broken(f"says {line!r}, and {MIGRATES} was interrupted")

    def _interrupted_in(self, line: str) -> None:
        match = _INTERRUPTED.search(line)
        where = _WHERE.fullmatch(match[1]) if match is not None else None
        if where is None or where[1] not in ORDER:
            self._broken(f"says {line!r}, which is no state")
            return
        may = {one for before in self._resumed for one in _on_record(before)}
        if where[1] not in may and not self._facts.damaged():
            self._broken(f"says {line!r}, and it was interrupted in {', '.join(self._resumed)}")

    # What the server was told.

    def deploy(self) -> None:
        """A deployment begins."""
        self.deployed, self.helped = True, False

    def told(self, job: Job) -> None:
        """The daemon has nothing more to do with a deployment."""
        ends = [status for status in job.told if status in ENDED]
        if not self._facts.struck() and (len(ends) != 1 or job.told[-1] not in ENDED):
            self._broken(f"told the server {job.told}")
        if len(set(ends)) > 1 and not self._facts.damaged():
            self._broken(f"told the server {job.told}: two ends")
        if not self._facts.struck() and "downloading" in job.told and "already-installed" in ends:
            self._broken(f"told the server {job.told}, and installed it")
        if self._facts.damaged():
            return
        if ends[-1:] == ["success"] and self._recorded == f"{job.artifact}_INCONSISTENT":
            self._broken(f"told the server that {job.id} went well, and recorded {self._recorded}")
        if ends[-1:] == ["success"] and any(job.left.values()) and not self.helped:
            self._broken(f"went on, and the server had {job.id} paused: {job.left}")
        if ends[-1:] == ["failure"]:
            if not job.logs:
                self._broken(f"told the server that {job.id} failed, and sent no log")
            # That a download is to be tried again is not on record: a cut in the Cleanup behind it
            # ends the deployment.
            attempts = self._attempts[job.id]
            if BROKE in job.cause and not self._cuts and attempts != ATTEMPTS:
                self._broken(f"gave {job.id} up after {attempts} downloads: {job.cause}")

    def status(self, lines: Sequence[str], recorded: Recorded) -> None:
        """The client's status was read, and what the store holds."""
        state = next((line for line in lines if line.startswith("state: ")), "")
        if not lines or lines[0] != state:
            self._broken(f"the status does not begin with the state: {list(lines)}")
        if (state == "state: Idle") == recorded.updating:
            there = "" if recorded.updating else "not "
            self._broken(f"says {state!r}, and an update is {there}recorded")
        running = next((line for line in lines if line.startswith("running: ")), "")
        slot = _SLOT.search(running)
        if slot is None or slot[1] != self._facts.running():
            self._broken(f"says {running!r}, and slot {self._facts.running()} runs")
        cause = [line.removeprefix("cause: ") for line in lines if line.startswith("cause: ")]
        if cause != list(filter(None, [recorded.cause])):
            self._broken(f"says the cause {cause}, and {recorded.cause!r} is recorded")
        last = _LAST.fullmatch(lines[-1]) if lines else None
        told = (last[1], last[2], last[3] or "") if last is not None else None
        if told != recorded.outcome:
            self._broken(f"says {list(lines[-1:])}, and {recorded.outcome} is recorded")
        if not recorded.updating or self._facts.damaged() or self._unsure or self._slots:
            return
        name = running.removeprefix("running: ").partition(" (slot ")[0]
        if name != (self._recorded or self._committed):
            self._broken(f"says {running!r}, and the package is not committed")

    def inconsistent(self, name: str) -> None:
        """The name of what runs was read: whether errors were ignored is as it was told."""
        if self._facts.damaged() or self._unsure:
            return
        if name == (self._recorded or name.removesuffix("_INCONSISTENT")):
            return
        self._broken(f"runs {name}, and {self._recorded or 'no ignored error'} was recorded")

    def cause(self, told: str, expected: str) -> None:
        """The cause of an outcome was read: it must name what failed."""
        if expected not in told:
            self._broken(f"the cause is {expected!r}, and it says {told!r}")

    def _has(self, *texts: str) -> bool:
        return any(text in line for line in self._said for text in texts)

    def _begins(self, *texts: str) -> bool:
        return any(line.startswith(texts) for line in self._said)

    def _broken(self, what: str) -> None:
        self._tell(ContractChecked(what, kept=False))
