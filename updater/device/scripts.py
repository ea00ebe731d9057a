"""State scripts: programs that run before and after the states of an update, or when one fails.

Names are `State_Action_NN[_description]`, run in the order of their names, without arguments.
Idle, Sync and Download scripts are part of the root file system; all others came with the
artifact and are kept on the data partition, so that the new system and the old one run the same.
Exit code 0: go on; 21: again later, `retry_interval_s` apart, for at most `retry_window_s`;
anything else is an error. A script that runs longer than `timeout_s` is killed with its whole
process group. The last 10 KiB of its standard error are kept, and go to the log. The directory's
`version` file must say 2 or 3. (Facts: Mender's public documents, "State scripts".)
"""

from __future__ import annotations

import os

from updater.device import files, process
from updater.device.config import ScriptsConfig
from updater.device.console import say
from updater.device.errors import ScriptError, StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from updater.device.ports import Clock

RETRY_LATER = 21
_VERSIONS = ("2", "3")
_FROM_ROOTFS = ("Idle", "Sync", "Download")


class ScriptRunner:
    """Runs the scripts of the root file system and of the artifact in progress."""

    def __init__(self, config: ScriptsConfig, data_dir: str, clock: Clock) -> None:
        self._config = config
        self._artifact_dir = f"{data_dir}/scripts"
        self._clock = clock

    def take(self, scripts: Mapping[str, bytes]) -> None:
        """Replace the artifact's scripts by these, durably."""
        files.remove_tree(self._artifact_dir)
        if not scripts:
            return
        try:
            os.mkdir(self._artifact_dir, 0o700)  # noqa: PTH102 - os throughout
            for name, content in scripts.items():
                if "/" in name or not name.startswith("Artifact"):
                    raise ScriptError(f"state script {name}: an artifact cannot bring that one")
                files.write_durably(f"{self._artifact_dir}/{name}", content, 0o700)
            # Last: a directory without it was not finished.
            files.write_durably(f"{self._artifact_dir}/version", b"3")
            files.sync_directory(self._artifact_dir.rpartition("/")[0])
        except OSError as error:
            raise StoreError(f"{self._artifact_dir}: {error.strerror}") from error

    def drop(self) -> None:
        """Forget the artifact's scripts; what cannot be removed now is replaced next time."""
        try:
            files.remove_tree(self._artifact_dir)
        except StoreError as error:
            say(f"warning: {error}")

    def left_over(self) -> bool:
        """Say whether there are scripts of an artifact."""
        return os.path.exists(f"{self._artifact_dir}/version")  # noqa: PTH110 - boot path

    def has(self, state: str, action: str) -> bool:
        """Say whether any script would run."""
        return bool(self._names(self._directory(state), state, action))

    def run(self, state: str, action: str, *, ignore_errors: bool) -> str:
        """Run them in order; see `ports.Scripts`."""
        directory = self._directory(state)
        names = self._names(directory, state, action)
        if not names:
            return ""
        first = ""
        try:
            self._check_version(directory)
        except ScriptError as error:
            if not ignore_errors:
                raise
            return str(error)
        for name in names:
            try:
                self._run_one(f"{directory}/{name}", name)
            except ScriptError as error:
                if not ignore_errors:
                    raise
                say(f"error ignored: {error}")
                first = first or str(error)
        return first

    def _directory(self, state: str) -> str:
        return self._config.directory if state in _FROM_ROOTFS else self._artifact_dir

    def _names(self, directory: str, state: str, action: str) -> list[str]:
        try:
            names = sorted(os.listdir(directory))  # noqa: PTH208 - boot path
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ScriptError(f"state scripts in {directory}: {error.strerror}") from error
        start = f"{state}_{action}_"
        return [name for name in names if _is_script(name, start)]

    def _check_version(self, directory: str) -> None:
        path = f"{directory}/version"
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123
                version = file.read(16).strip()
        except FileNotFoundError as error:
            raise ScriptError(f"{path} is missing: state scripts need it (3)") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ScriptError(f"{path}: {error}") from error
        if version not in _VERSIONS:
            raise ScriptError(f"{path}: version {version!r} is not supported (3 is)")

    def _run_one(self, path: str, name: str) -> None:
        give_up = self._clock.monotonic() + self._config.retry_window_s
        while True:
            say(f"state script {name}")
            try:
                if not os.access(path, os.X_OK):
                    raise ScriptError(f"state script {name} is not executable")
                result = process.run([path], timeout_s=self._config.timeout_s)
            except OSError as error:
                raise ScriptError(f"state script {name} cannot start: {error.strerror}") from error
            for line in result.errors.decode("utf-8", "replace").splitlines():
                say(f"{name}: {line}")
            if result.status == 0:
                return
            if result.status != RETRY_LATER:
                raise ScriptError(f"state script {name} {result.failure()}")
            interval = self._config.retry_interval_s
            if self._clock.monotonic() + interval > give_up:
                raise ScriptError(
                    f"state script {name} asked for a later try (exit code {RETRY_LATER}) for"
                    f" {self._config.retry_window_s:g} s"
                )
            say(f"state script {name} asks to be run again in {interval:g} s")
            self._clock.wait(interval)


def _is_script(name: str, start: str) -> bool:
    number, _, description = name[len(start) :].partition("_")
    return (
        name.startswith(start)
        and len(number) == 2
        and number.isascii()
        and number.isdigit()
        and not any(char.isspace() for char in description)
        and (bool(description) or len(name) == len(start) + 2)
    )
