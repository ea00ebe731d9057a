"""The state machine as a table: what each state does, how long it may take, what comes next.

The client (`client.py`) walks this table, the daemon adds Idle and Sync; `diagram` renders it, and
`STATES.md` holds that rendering (`python -m updater.device.states` writes it, a test compares).
State names, and which scripts run where, are those of Mender's public documents. Nothing here
acts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from updater.device.model import State


class Event(StrEnum):
    """How a state ended."""

    DONE = "done"
    FAILED = "failed"
    NOTHING = "nothing to do"
    NO_REBOOT = "no restart needed"
    RESTART = "restart"
    GONE = "gave up"


class Step(NamedTuple):
    """One row of the state machine.

    `action` is the method that does the work. `scripts` is the name under which state scripts
    run: Enter before the action, Leave after it, Error when either fails. ArtifactReboot's Leave
    scripts run after the restart, when it was verified, so that the states before and after the
    restart share them. Where `ignores` is set, a script's failure is noted and the state goes on.
    Past `deadline_s` the state fails. `after` is the next state by event; None ends this run
    (for Event.RESTART the next boot goes on, as `model.decide` says).
    """

    action: str
    after: dict[Event, State | None]
    deadline_s: float
    enter: str = ""
    leave: str = ""
    error: str = ""
    ignores: bool = False


_HOUR = 3600.0

TABLE: dict[State, Step] = {
    State.IDLE: Step(
        "wait",
        {Event.DONE: State.SYNC},
        25 * _HOUR,
        enter="Idle",
        leave="Idle",
        ignores=True,
    ),
    State.SYNC: Step(
        "ask",
        {Event.DONE: State.DOWNLOAD, Event.NOTHING: State.IDLE, Event.FAILED: State.IDLE},
        2 * _HOUR,
        enter="Sync",
        leave="Sync",
        error="Sync",
        ignores=True,
    ),
    State.DOWNLOAD: Step(
        "download",
        {Event.DONE: State.INSTALL, Event.FAILED: State.CLEANUP},
        25 * _HOUR,
        enter="Download",
        leave="Download",
        error="Download",
    ),
    State.INSTALL: Step(
        "activate",
        {Event.DONE: State.REBOOT, Event.NO_REBOOT: State.COMMIT, Event.FAILED: State.ROLLBACK},
        4 * _HOUR,
        enter="ArtifactInstall",
        leave="ArtifactInstall",
        error="ArtifactInstall",
    ),
    State.REBOOT: Step(
        "await_reboot",
        {Event.RESTART: None, Event.DONE: State.VERIFY, Event.FAILED: State.ROLLBACK},
        4 * _HOUR,
        enter="ArtifactReboot",
        error="ArtifactReboot",
    ),
    State.VERIFY: Step(
        "verify",
        {Event.DONE: State.COMMIT, Event.FAILED: State.ROLLBACK},
        4 * _HOUR,
        leave="ArtifactReboot",
        error="ArtifactReboot",
    ),
    State.COMMIT: Step(
        "commit_environment",
        {Event.DONE: State.CLEANUP, Event.FAILED: State.ROLLBACK},
        4 * _HOUR,
        enter="ArtifactCommit",
        leave="ArtifactCommit",
        error="ArtifactCommit",
    ),
    State.ROLLBACK: Step(
        "roll_back",
        {
            Event.DONE: State.ROLLBACK_REBOOT,
            Event.NO_REBOOT: State.FAILURE,
            Event.GONE: State.FAILURE,
            Event.FAILED: None,
        },
        4 * _HOUR,
        enter="ArtifactRollback",
        leave="ArtifactRollback",
        ignores=True,
    ),
    State.ROLLBACK_REBOOT: Step(
        "reboot_back",
        {Event.RESTART: None, Event.DONE: State.VERIFY_ROLLBACK, Event.FAILED: State.FAILURE},
        4 * _HOUR,
        enter="ArtifactRollbackReboot",
        ignores=True,
    ),
    State.VERIFY_ROLLBACK: Step(
        "verify_rollback",
        {
            Event.DONE: State.FAILURE,
            Event.GONE: State.ROLLBACK_REBOOT,
            Event.FAILED: State.FAILURE,
        },
        4 * _HOUR,
        leave="ArtifactRollbackReboot",
        ignores=True,
    ),
    State.FAILURE: Step(
        "report_failure",
        {Event.DONE: State.CLEANUP, Event.FAILED: State.CLEANUP},
        4 * _HOUR,
        enter="ArtifactFailure",
        leave="ArtifactFailure",
        ignores=True,
    ),
    State.CLEANUP: Step(
        "clean_up",
        {Event.DONE: State.IDLE, Event.FAILED: None},
        _HOUR,
    ),
}


def diagram() -> str:
    """Render TABLE as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> Idle"]
    for state, step in TABLE.items():
        for event, after in step.after.items():
            if after is not None:
                lines.append(f"    {state} --> {after} : {event}")
            elif event is Event.RESTART:
                back = {
                    State.REBOOT: State.VERIFY,
                    State.ROLLBACK_REBOOT: State.VERIFY_ROLLBACK,
                }[state]
                lines.append(f"    {state} --> {back} : {event} (the device boots)")
            else:
                lines.append(f"    {state} --> {state} : {event}, again at the next boot")
    return "\n".join(lines)


def table() -> str:
    """Render TABLE as a Markdown table: scripts, deadline, what an error does."""
    rows = [
        "| state | scripts before | scripts after | scripts on error | deadline |",
        "|---|---|---|---|---|",
    ]
    for state, step in TABLE.items():
        scripts = [
            f"{name}_{action}" if name else "–"
            for name, action in (
                (step.enter, "Enter"),
                (step.leave, "Leave"),
                (step.error, "Error"),
            )
        ]
        hours = f"{step.deadline_s / _HOUR:g} h"
        ignored = "errors ignored" if step.ignores and step.enter + step.leave else scripts[2]
        rows.append(f"| {state} | {scripts[0]} | {scripts[1]} | {ignored} | {hours} |")
    return "\n".join(rows)


def document() -> str:
    """Return the text of STATES.md."""
    return f"""\
# The states of an update

Generated from `TABLE` in `states.py` by `python -m updater.device.states`; a test compares them.

```mermaid
{diagram()}
```

{table()}

A state is persisted before anything in it runs. After a power cut, `decide` in `model.py` says how
to go on; its table is there. An update that enters more than 28 states is stopped where it is safe.
"""


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).with_name("STATES.md").write_text(document(), encoding="utf-8")
