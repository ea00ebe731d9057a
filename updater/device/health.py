"""Health checks: the executables of one directory, in order of name, each with a deadline.

Exit 0 is healthy. A check that is not executable, cannot start, or overruns counts as failed:
a check that did not run has proved nothing. No configured directory means no checks.
"""

from __future__ import annotations

import os

from updater.device import process
from updater.device.errors import HealthError


class HealthRunner:
    """Runs every check of `directory`; `timeout_s` is per check."""

    def __init__(self, directory: str | None, timeout_s: float) -> None:
        self._directory = directory
        self._timeout_s = timeout_s

    def run(self) -> None:
        """Return when all checks passed; raise HealthError at the first that did not."""
        if not self._directory:
            return
        try:
            names = sorted(os.listdir(self._directory))  # noqa: PTH208 - boot path
        except OSError as error:
            raise HealthError(
                f"health checks in {self._directory} cannot be listed: {error.strerror}"
            ) from error
        for name in names:
            # Editors' and package managers' leftovers are not checks.
            if not name.startswith(".") and not name.endswith(("~", ".dpkg-dist", ".dpkg-old")):
                self._check(name)

    def _check(self, name: str) -> None:
        path = f"{self._directory}/{name}"
        if not os.access(path, os.X_OK):
            raise HealthError(f"health check {name} is not executable")
        try:
            result = process.run([path], timeout_s=self._timeout_s)
        except OSError as error:
            raise HealthError(f"health check {name} cannot start: {error.strerror}") from error
        if result.status != 0:
            raise HealthError(f"health check {name} {result.failure()}")
