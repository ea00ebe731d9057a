"""Run directories: where a machine's sockets and journal live, and who sweeps them.

A directory belongs to one harness process and says so in its name: process id, that process's
start time (`/proc/PID/stat`, field 22, proc(5)) and the kernel's boot id, so a recycled id is
never taken for a living owner. `sweep()` removes what killed harnesses left: it looks only at
directories of this shape, of this user, whose owner is gone, and it ends only programs whose
environment names that very directory.

Paths are short because a unix socket's may have 107 bytes (unix(7)).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from framework.targets.errors import RigError

__all__ = ["RunDirectory", "base_directory", "programs_of", "start_time", "sweep"]

_SOCKET_PATH_LIMIT = 107
_ROOM_FOR_NAMES = 70  # the directory's own name and a socket's below the base
_OWNED = re.compile(r"m-(?P<pid>\d+)-(?P<start>\d+)-(?P<boot>[0-9a-f]{8})-\d+")
_VARIABLE = "BROWNOUT_RUN_DIRECTORY"

_counter = itertools.count(1)
_counter_lock = threading.Lock()


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot; None if it does not live.

    A zombie counts as not living: it holds nothing any more.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name may contain spaces and brackets
    return None if fields[0] in "ZX" else int(fields[19])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def base_directory() -> Path:
    """The parent of all run directories of this user, private to them; made if missing."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _SOCKET_PATH_LIMIT - _ROOM_FOR_NAMES - len("/brownout-4294967295"):
        parent = Path("/tmp")  # noqa: S108 - the directory below is private and checked
    base = parent / f"brownout-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    status = base.lstat()
    if base.is_symlink() or status.st_uid != os.getuid():
        raise RigError(f"{base}: belongs to someone else; set TMPDIR to a directory of your own")
    return base


@dataclass(frozen=True)
class RunDirectory:
    """One machine's directory: `path`. Made by `create`, ended by `remove`."""

    path: Path

    @classmethod
    def create(cls) -> RunDirectory:
        """A new directory owned by this process."""
        with _counter_lock:
            number = next(_counter)
        pid = os.getpid()
        path = base_directory() / f"m-{pid}-{start_time(pid)}-{_boot()}-{number}"
        path.mkdir(mode=0o700)
        return cls(path)

    @property
    def environment(self) -> dict[str, str]:
        """The environment for programs started for this directory: this is how `sweep` knows."""
        return {**os.environ, _VARIABLE: str(self.path)}

    def remove(self) -> None:
        """Delete the directory and everything in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)


def _owner_lives(name: re.Match[str]) -> bool:
    return name["boot"] == _boot() and start_time(int(name["pid"])) == int(name["start"])


def programs_of(path: Path) -> list[int]:
    """The living processes that were started for run directory `path` (proc(5), environ)."""
    wanted = f"{_VARIABLE}={path}".encode()
    found: list[int] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or someone else's
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def sweep() -> list[Path]:
    """Remove the run directories of killed harnesses and end their machines; returns them."""
    swept: list[Path] = []
    for path in sorted(base_directory().iterdir()):
        name = _OWNED.fullmatch(path.name)
        if name is None or path.is_symlink() or _owner_lives(name):
            continue
        for pid in programs_of(path):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(path, ignore_errors=True)
        swept.append(path)
    return swept
