"""Running the host's programs: looked up once, with a message that names the package to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from images.errors import MissingToolError, ToolFailedError

PACKAGE_OF_TOOL: Mapping[str, str] = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "e2fsck": "e2fsprogs",
    "grub-mkimage": "grub-common",
    "mke2fs": "e2fsprogs",
    "tune2fs": "e2fsprogs",
}

# A user's PATH often lacks the sbin folders, where e2fsprogs lives.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def find_tool(name: str) -> Path:
    """Path of a program of the host.

    Raises:
        MissingToolError: it is not installed.
    """
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), *_SBIN))
    found = shutil.which(name, path=search)
    if found is None:
        raise MissingToolError(name, PACKAGE_OF_TOOL.get(name, name))
    return Path(found)


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_s: float = 300,
    cwd: Path | None = None,
    may_fail: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program of the host to its end, in the C locale.

    Args:
        command: the program's bare name and its arguments.
        env: variables on top of the present ones.
        stdin: text for its standard input, which is empty otherwise.
        timeout_s: seconds after which it is killed.
        cwd: its working directory.
        may_fail: an exit code other than 0 is the caller's business.

    Raises:
        MissingToolError: the program is not installed.
        ToolFailedError: it ended with an error or ran into the time-out.
    """
    name, *arguments = [str(part) for part in command]
    program = find_tool(name)
    try:
        result = subprocess.run(
            [str(program), *arguments],
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        raise ToolFailedError(f"{name} did not end within {timeout_s:.0f} s") from expired
    except OSError as error:
        raise ToolFailedError(f"{name} could not be started: {error}") from error
    if result.returncode != 0 and not may_fail:
        words = (result.stderr.strip() or result.stdout.strip()).splitlines()
        said = "; ".join(words[-3:]) or "no message"
        raise ToolFailedError(f"{name} failed with exit code {result.returncode}: {said}")
    return result
