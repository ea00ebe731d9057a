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
    DOWNLOAD = "Download"
    INSTALL = "ArtifactInstall"
    REBOOT = "ArtifactReboot"
    VERIFY = "ArtifactVerifyReboot"
    COMMIT = "ArtifactCommit"
    ROLLBACK = "ArtifactRollback"
    FAILURE = "ArtifactFailure"
    CLEANUP = "Cleanup"


class Result(StrEnum):
    """How an update ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Update(NamedTuple):
    """An update in progress, as it is persisted before each step.

    `boot_id` is the boot in which `state` was entered: a different one now means that the device
    restarted since. `cause` is the first failure, kept until the outcome is recorded.
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


class Outcome(NamedTuple):
    """How the last update ended; `finished_at` is UTC, seconds since 1970."""

    result: Result
    artifact_name: str
    slot: str
    cause: str
    finished_at: int


class Boot(NamedTuple):
    """What the boot environment says: the slot it starts, and whether that is a trial.

    `slot` is None when the environment is unreadable or names neither slot.
    """

    slot: str | None
    trial: bool


class Decision(StrEnum):
    """What to do about a remembered update at boot."""

    AWAIT_REBOOT = "installed, waiting for the reboot"
    PROVE = "on the new system, unproven: check health, then commit"
    FINISH_COMMIT = "committed in the boot environment, not yet in the store"
    ROLL_BACK = "on the new system, to be left: point the boot environment back, reboot"
    REBOOT_AGAIN = "rolled back in the boot environment, reboot still needed"
    STRANDED = "rolled back, but the boot loader started the new system again"
    CLOSE_INTERRUPTED = "never activated: forget it"
    CLOSE_ROLLED_BACK = "on the old system again: record it"


def decide(update: Update, running: str, boot: Boot, boot_id: str) -> Decision:
    """Say what `update` means for a system that runs from slot `running`.

    ==========  =====================  ==================  ========  =====================
    running on  state                  boot environment    restart?  decision
    ==========  =====================  ==================  ========  =====================
    target      ArtifactCommit         target, no trial    any       FINISH_COMMIT
    target      Rollback, Failure      source              no        REBOOT_AGAIN
    target      Rollback, Failure      source              yes       STRANDED
    target      Rollback, Failure      else                any       ROLL_BACK
    target      Download               any                 any       ROLL_BACK or STRANDED
    target      else                   any                 any       PROVE
    source      Install to Failure     target, trial       no        AWAIT_REBOOT
    source      Download               any                 any       CLOSE_INTERRUPTED
    source      ArtifactInstall        not target          any       CLOSE_INTERRUPTED
    source      else                   any                 any       CLOSE_ROLLED_BACK
    ==========  =====================  ==================  ========  =====================
    """
    restarted = update.boot_id != boot_id
    if running == update.target:
        if update.state is State.COMMIT and boot.slot == update.target and not boot.trial:
            return Decision.FINISH_COMMIT
        if update.state in (State.ROLLBACK, State.FAILURE, State.DOWNLOAD):
            if boot.slot != update.source:
                return Decision.ROLL_BACK
            return Decision.STRANDED if restarted else Decision.REBOOT_AGAIN
        return Decision.PROVE
    if update.state is State.DOWNLOAD:
        return Decision.CLOSE_INTERRUPTED
    armed = boot.slot == update.target
    if armed and boot.trial and not restarted and update.state is not State.ROLLBACK:
        return Decision.AWAIT_REBOOT
    if update.state is State.INSTALL and not armed:
        return Decision.CLOSE_INTERRUPTED
    return Decision.CLOSE_ROLLED_BACK


def fallback_cause(update: Update) -> str:
    """Say why an update is found rolled back when nobody recorded a cause."""
    if update.cause:
        return update.cause
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
