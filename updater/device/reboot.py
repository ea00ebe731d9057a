"""Restarting is init's job: the client exits with code 4 and init does it after a sync."""

from __future__ import annotations


class ExitCodeReboot:
    """Remembers the request; the command line turns it into the exit code."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Note that the device must restart now."""
        self.requested = True
