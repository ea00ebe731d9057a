"""What can go wrong on the device. Every message is one line that a person can act on."""

from __future__ import annotations


class UpdaterError(Exception):
    """An operation could not be done; the message says what, where, and what to do."""


class ConfigError(UpdaterError):
    """The configuration file is missing, malformed, or has unknown keys."""


class SlotError(UpdaterError):
    """A slot is in use, too small, or does not hold what was written."""


class BootEnvError(UpdaterError):
    """The boot environment cannot be read, written, or did not keep what was written."""


class StoreError(UpdaterError):
    """The state store cannot be opened, read or written."""


class TransportError(UpdaterError):
    """The artifact cannot be fetched."""


class HealthError(UpdaterError):
    """A health check failed; the message names it and says how."""


class ScriptError(UpdaterError):
    """A state script failed; the message names it, says how, and quotes its last line."""


class ModuleError(UpdaterError):
    """An update module is missing or failed; the message names it and the call."""


class LoopError(UpdaterError):
    """An update entered more states than any update can need."""


class DeadlineError(UpdaterError):
    """A state took longer than it may."""


class ServerError(UpdaterError):
    """The management server cannot be reached, or refuses; `retry_after_s` is its wish."""

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s


class BusyError(UpdaterError):
    """Another updater process holds the lock; `verb` says what it does."""

    def __init__(self, verb: str, pid: str) -> None:
        super().__init__(f"another updater is running ({verb}, process {pid})")
        self.verb = verb


class NothingInProgressError(UpdaterError):
    """There is no update to commit or to roll back (exit code 2)."""


class InterruptedBySignal(BaseException):
    """SIGINT or SIGTERM arrived; the state stays as it is and the next run goes on from it.

    `armed`: the slot that waits for the next restart all the same; empty if none does.
    """

    def __init__(self, signal_number: int, signal_name: str) -> None:
        super().__init__(f"interrupted by {signal_name}")
        self.armed = ""
        self.exit_code = 128 + signal_number
