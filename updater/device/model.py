"""The values that the client remembers, and the decision what a remembered update means.

Everything here is pure: no files, no processes. The table at the bottom is the whole recovery
logic of a boot, and is tested row by row.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class State(StrEnum):
    """The states of an update, by the names that Mender's documents give them."""

    IDLE = "Idle"
    SYNC = "Sync"
    DOWNLOAD = "Download"
    INSTALL = "ArtifactInstall"
    REBOOT = "ArtifactReboot"
    VERIFY = "ArtifactVerifyReboot"
    COMMIT = "ArtifactCommit"
    ROLLBACK = "ArtifactRollback"
    ROLLBACK_REBOOT = "ArtifactRollbackReboot"
    VERIFY_ROLLBACK = "ArtifactVerifyRollbackReboot"
    FAILURE = "ArtifactFailure"
    CLEANUP = "Cleanup"


class Result(StrEnum):
    """How an update ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


ROOTFS_IMAGE = "rootfs-image"


class Part(StrEnum):
    """Where in a state one is; the names are those of the state scripts' actions.

    WAIT is before all of them: the state is held, and nothing of it has begun.
    """

    WAIT = "Wait"
    ENTER = "Enter"
    ACTION = ""
    LEAVE = "Leave"
    ERROR = "Error"


class Update(NamedTuple):
    """An update in progress, as it is persisted before each step.

    `boot_id` is the boot in which `state` was entered: a different one now means that the device
    restarted since. `cause` is the first failure, kept until the outcome is recorded.

    `kind` is the payload's type; for anything but a root file system image an update module does
    the work, `source` and `target` are both the slot that runs, `reboot` is what the module
    answered ("No", "Yes", "Automatic") and `reverts` whether it can roll back. `part` names the
    state scripts that were running, `steps` counts the states entered since the start, `result`
    is set once the outcome is certain, and `inconsistent` once an error could only be ignored.
    `deployment` is the server's id, empty for an installation by hand.
    """

    artifact_name: str
    previous_name: str
    source: str
    target: str
    state: State
    boot_id: str
    cause: str = ""
    provides: dict[str, str] = {}  # noqa: RUF012 - never mutated
    clears: tuple[str, ...] | None = None
    kind: str = ROOTFS_IMAGE
    part: Part = Part.ACTION
    steps: int = 0
    result: Result | None = None
    inconsistent: bool = False
    reboot: str = "Automatic"
    reverts: bool = True
    deployment: str = ""

    @property
    def is_image(self) -> bool:
        """Whether the slots are switched, rather than a module called."""
        return self.kind == ROOTFS_IMAGE

    @property
    def where(self) -> str:
        """Return where it is: a state, or a state's scripts ("ArtifactInstall_Leave")."""
        return f"{self.state}_{self.part}" if self.part else str(self.state)


class Outcome(NamedTuple):
    """How an update ended; `finished_at` is UTC, seconds since 1970.

    `deployment` is the server's id; `number` is the store's, 0 before it is recorded; `again`
    means that the deployment is not over, so that the server is not told.
    """

    result: Result
    artifact_name: str
    slot: str
    cause: str
    finished_at: int
    deployment: str = ""
    number: int = 0
    again: bool = False


class Boot(NamedTuple):
    """What the boot environment says: the slot it starts, and whether that is a trial.

    `slot` is None when the environment is unreadable or names neither slot.
    """

    slot: str | None
    trial: bool


class Decision(StrEnum):
    """What to do about a remembered update at boot."""

    AWAIT_REBOOT = "installed, waiting for the reboot"
    HELD = "held before its installation began"
    PROVE = "on the new system, unproven: check health, then commit"
    FINISH_COMMIT = "committed in the boot environment, not yet in the store"
    ROLL_BACK = "on the new system, to be left: point the boot environment back, reboot"
    REBOOT_AGAIN = "rolled back in the boot environment, reboot still needed"
    STRANDED = "rolled back, but the boot loader started the new system again"
    CLOSE_INTERRUPTED = "never activated: forget it"
    CLOSE_ROLLED_BACK = "on the old system again: record it"
    REVERT = "a module was interrupted: let it roll back"
    VERIFY_ROLLBACK = "restarted to roll back: let the module verify that"
    CLEAN_UP = "its outcome is certain: clean up and record it"
    BREAK_LOOP = "it ran in circles: leave it in a safe state and record that"


# An update enters at most eleven states; repeating its last ones after a cut must fit too.
MAX_STEPS = 28


def decide(update: Update, running: str, boot: Boot, boot_id: str) -> Decision:
    """Say what `update` means for a system that runs from slot `running`.

    First, whatever the kind of update:

    ==========================================================  =================
    more than MAX_STEPS states entered                          BREAK_LOOP
    the outcome is certain, state Cleanup                       CLEAN_UP
    the outcome is "committed"                                  FINISH_COMMIT
    ==========================================================  =================

    Then, for a root file system image:

    ==========  =====================  ==================  ========  =====================
    running on  state                  boot environment    restart?  decision
    ==========  =====================  ==================  ========  =====================
    target      ArtifactCommit         target, no trial    any       FINISH_COMMIT
    target      Rollback to Failure    source              no        REBOOT_AGAIN
    target      Rollback to Failure    source              yes       STRANDED
    target      Rollback to Failure    else                any       ROLL_BACK
    target      Download               any                 any       ROLL_BACK or STRANDED
    target      …Install_Leave, …_Error  any               any       ROLL_BACK or STRANDED
    target      else                   any                 any       PROVE
    source      Install to Failure     target, trial       no        AWAIT_REBOOT
    source      Download               any                 any       CLOSE_INTERRUPTED
    source      …Install_Wait          not target          any       HELD
    source      ArtifactInstall        not target          any       CLOSE_INTERRUPTED
    source      else                   any                 any       CLOSE_ROLLED_BACK
    ==========  =====================  ==================  ========  =====================

    (An activated slot whose ArtifactInstall_Leave scripts did not end is not to be trusted: they
    may migrate its data.) For anything else, see `_decide_module`.
    """
    if update.steps > MAX_STEPS:
        return Decision.BREAK_LOOP
    if update.result is not None and update.state is State.CLEANUP:
        return Decision.CLEAN_UP
    if update.result is Result.COMMITTED:
        return Decision.FINISH_COMMIT
    restarted = update.boot_id != boot_id
    if not update.is_image:
        return _decide_module(update, restarted)
    in_scripts = update.part is Part.ERROR or update.where == "ArtifactInstall_Leave"
    if running == update.target:
        if update.state is State.COMMIT and boot.slot == update.target and not boot.trial:
            return Decision.FINISH_COMMIT
        if in_scripts or update.state in (*_LEAVING, State.DOWNLOAD):
            if boot.slot != update.source:
                return Decision.ROLL_BACK
            return Decision.STRANDED if restarted else Decision.REBOOT_AGAIN
        return Decision.PROVE
    if update.state is State.DOWNLOAD:
        return Decision.CLOSE_INTERRUPTED
    armed = boot.slot == update.target
    waits = not in_scripts and update.state not in _LEAVING
    if armed and boot.trial and not restarted and waits:
        return Decision.AWAIT_REBOOT
    if update.state is State.INSTALL and not armed:
        return Decision.HELD if update.part is Part.WAIT else Decision.CLOSE_INTERRUPTED
    return Decision.CLOSE_ROLLED_BACK


_LEAVING = (State.ROLLBACK, State.ROLLBACK_REBOOT, State.VERIFY_ROLLBACK, State.FAILURE)


def _decide_module(update: Update, restarted: bool) -> Decision:
    """Say what an interrupted module update means; the slots play no part in it.

    =============================  ========  =================
    state                          restart?  decision
    =============================  ========  =================
    Download                       any       CLOSE_INTERRUPTED
    ArtifactInstall_Wait           any       HELD
    ArtifactReboot                 no        AWAIT_REBOOT
    ArtifactReboot                 yes       PROVE
    ArtifactRollbackReboot         no        REBOOT_AGAIN
    ArtifactRollbackReboot         yes       VERIFY_ROLLBACK
    ArtifactVerifyRollbackReboot   any       VERIFY_ROLLBACK
    ArtifactFailure                any       CLOSE_ROLLED_BACK
    else                           any       REVERT
    =============================  ========  =================
    """
    if update.state is State.DOWNLOAD:
        return Decision.CLOSE_INTERRUPTED
    if update.state is State.INSTALL and update.part is Part.WAIT:
        return Decision.HELD
    if update.state is State.REBOOT and update.part is not Part.ERROR:
        return Decision.PROVE if restarted else Decision.AWAIT_REBOOT
    if update.state is State.ROLLBACK_REBOOT:
        return Decision.VERIFY_ROLLBACK if restarted else Decision.REBOOT_AGAIN
    if update.state is State.VERIFY_ROLLBACK:
        return Decision.VERIFY_ROLLBACK
    if update.state is State.FAILURE:
        return Decision.CLOSE_ROLLED_BACK
    return Decision.REVERT


def fallback_cause(update: Update) -> str:
    """Say why an update is found rolled back when nobody recorded a cause."""
    if update.cause:
        return update.cause
    if update.part or not update.is_image:
        return f"interrupted in {update.where}"
    return {
        State.INSTALL: f"slot {update.target} did not start after an interrupted activation",
        State.REBOOT: f"slot {update.target} did not come up; the boot loader fell back",
        State.VERIFY: f"slot {update.target} restarted before its health checks had passed",
        State.COMMIT: f"slot {update.target} restarted before it was committed",
        State.ROLLBACK: "rollback was asked for",
    }.get(update.state, f"interrupted in {update.state}")


def provides_after(
    provides: dict[str, str], added: dict[str, str], clears: tuple[str, ...] | None
) -> dict[str, str]:
    """Return what the device provides after a commit; `clears` are globs, None means all."""
    from fnmatch import fnmatchcase  # noqa: PLC0415 - only when something is committed

    if clears is None:
        kept = {}
    else:
        kept = {
            key: value
            for key, value in provides.items()
            if not any(fnmatchcase(key, pattern) for pattern in clears)
        }
    return {**kept, **added}
