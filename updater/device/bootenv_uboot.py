"""U-Boot's redundant environment through libubootenv's `fw_printenv` and `fw_setenv`.

`fw_setenv -s -` applies a script from standard input as one write: libubootenv puts the whole
new environment, with its CRC and the next flags value, over the *older* copy and fsyncs it, so
that a cut leaves the newer old copy valid (seen with strace on 0.3.2). Lines are `key=value`;
the older `key value` form is silently ignored there, and so every write is read back by the
caller (`bootenv.py`). With both copies invalid the tools refuse to work without a default
environment; `write` then gives them an empty one, as nothing is left to lose.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from updater.device import process
from updater.device.errors import BootEnvError

_TIMEOUT_S = 30.0


class UBootEnvironment:
    """The environment that `fw_env_config` (libubootenv's fw_env.config) describes."""

    def __init__(self, fw_env_config: str) -> None:
        self._config = fw_env_config

    def read(self) -> dict[str, str]:
        """Return all variables; BootEnvError when no copy is valid or the tool fails."""
        result = self._run(["fw_printenv", "-c", self._config])
        if result.status != 0:
            raise BootEnvError(f"boot environment ({self._config}): fw_printenv {result.failure()}")
        values = {}
        for line in result.output.decode("utf-8", "replace").splitlines():
            key, equals, value = line.partition("=")
            if equals:
                values[key] = value
        return values

    def write(self, values: Mapping[str, str]) -> None:
        """Set the variables in one write of the redundant copy."""
        for key, value in values.items():
            if not key.isidentifier() or not value.isprintable():
                raise BootEnvError(f"boot variable {key!r} cannot hold {value!r}")
        script = "".join(f"{key}={value}\n" for key, value in values.items()).encode()
        command = ["fw_setenv", "-c", self._config, "-s", "-"]
        try:
            self.read()
        except BootEnvError:
            command[3:3] = ["-f", "/dev/null"]
        result = self._run(command, script)
        if result.status != 0:
            raise BootEnvError(f"boot environment ({self._config}): fw_setenv {result.failure()}")
        self._forget_cache()

    def _forget_cache(self) -> None:
        """Have the next read come from the medium.

        libubootenv 0.3.2 takes no notice of an fsync that fails: a copy that the disk refused
        stays in the page cache, and reading it back would find it written.
        """
        try:
            with open(self._config, encoding="utf-8") as file:  # noqa: PTH123 - boot path
                lines = [line.split() for line in file]
            for device in {words[0] for words in lines if words and words[0].startswith("/")}:
                handle = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(handle)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(handle)
        except OSError as error:
            raise BootEnvError(
                f"boot environment ({self._config}): it cannot be read back: {error.strerror}"
            ) from error

    def _run(self, command: list[str], stdin: bytes = b"") -> process.Completed:
        try:
            return process.run(command, timeout_s=_TIMEOUT_S, stdin=stdin)
        except OSError as error:
            raise BootEnvError(
                f"{command[0]} cannot be run ({error.strerror}); install libubootenv-tool"
            ) from error
