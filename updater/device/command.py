"""One command of the client, from its verb to its exit code and its last word.

Shared by the command line and by whoever runs the client elsewhere (the simulated device).
"""

from __future__ import annotations

from updater.device.console import say
from updater.device.errors import InterruptedBySignal, NothingInProgressError, UpdaterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.client import Client

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_NOTHING_IN_PROGRESS = 2
EXIT_REBOOT_NEEDED = 4


def operate(client: Client, verb: str, source: str = "") -> int:
    """Let the client do `verb` (install, resume, commit or rollback); return the exit code."""
    try:
        if verb == "install":
            client.install(source)
            return EXIT_OK
        getattr(client, verb)()
    except InterruptedBySignal as error:
        error.armed = client.waiting_slot()
        raise
    except UpdaterError as error:
        if not client.reboot_needed:
            raise
        say(f"error: {error}")
    return EXIT_REBOOT_NEEDED if client.reboot_needed else EXIT_OK


def last_word(error: Exception | InterruptedBySignal) -> int:
    """Say in one line what ended the command; return its exit code."""
    if isinstance(error, InterruptedBySignal):
        then = "nothing is lost, run the command again"
        if error.armed:
            # The same words as where a roll-back failed; but this restart may end in a commit.
            then = f"slot {error.armed} is still armed: the next restart starts it, unless it is"
            then += " rolled back"
        say(f"error: {error}; {then}")
        return error.exit_code
    known = isinstance(error, UpdaterError) or type(error).__module__.startswith("updater.")
    say(f"error: {error}" if known else f"error: internal: {type(error).__name__}: {error}")
    return EXIT_NOTHING_IN_PROGRESS if isinstance(error, NothingInProgressError) else EXIT_ERROR
