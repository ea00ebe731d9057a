"""A machine's process: started so that it cannot outlive the harness, ended for certain.

The kernel ends it when the harness ends, however that happens: `setpriv --pdeathsig KILL`
(util-linux) sets the parent-death signal in the child and then becomes QEMU. That signal is
sent when the *thread* that forked ends (prctl(2)), so all machines are forked by one thread
that lives as long as the process. No `preexec_fn`: in a threaded process it can deadlock.

One thread per machine waits for its end, so an exit is noticed at once, whoever caused it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from framework.targets.errors import InfrastructureError, RigError

__all__ = ["MachineProcess"]

_SPAWN_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 10.0
_STDERR_TAIL_BYTES = 2000

_Job = tuple[Callable[[], "subprocess.Popen[bytes]"], "Future[subprocess.Popen[bytes]]"]


class _Spawner:
    """The one thread that forks machines; made anew in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] | None = None
        self._pid = 0

    def run(self, job: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._jobs is None or self._pid != os.getpid():
                self._jobs = queue.SimpleQueue()
                self._pid = os.getpid()
                threading.Thread(
                    target=self._serve, args=(self._jobs,), name="machine-spawner", daemon=True
                ).start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._jobs.put((job, future))
        return future.result(_SPAWN_TIMEOUT_S)

    @staticmethod
    def _serve(jobs: queue.SimpleQueue[_Job]) -> None:
        while True:
            job, future = jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller
                future.set_exception(error)


_spawner = _Spawner()


class MachineProcess:
    """One run of a machine's program.

    `arguments` start with the program; `pass_fds` stay open in it; `environment` replaces ours;
    standard output and error go to `output_path`. `on_exit(self)` is called once, in this
    object's own thread, after the process was reaped and `exited` is set.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        output_path: Path,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        on_exit: Callable[[MachineProcess], None] | None = None,
    ) -> None:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise RigError("setpriv is missing: apt install util-linux")
        self.arguments = tuple(arguments)
        self.output_path = output_path
        self.exited = threading.Event()
        self.told = threading.Event()
        """Set once `on_exit` has returned."""
        self._on_exit = on_exit
        command = [setpriv, "--pdeathsig", "KILL", "--", *arguments]

        def start() -> subprocess.Popen[bytes]:
            with output_path.open("wb") as output:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=tuple(pass_fds),
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is for the harness, which then ends us
                )

        self._popen = _spawner.run(start)
        self.pid = self._popen.pid
        threading.Thread(target=self._reap, name=f"machine-{self.pid}", daemon=True).start()

    def _reap(self) -> None:
        self._popen.wait()
        self.exited.set()
        try:
            if self._on_exit is not None:
                self._on_exit(self)
        finally:
            self.told.set()

    @property
    def alive(self) -> bool:
        """Whether the process runs: asked of the kernel's reaper, not remembered."""
        return not self.exited.is_set()

    @property
    def ended(self) -> str:
        """How it ended, for people: `signal 9 (SIGKILL)` or `exit code 1`."""
        code = self._popen.returncode
        if code is None:
            return "still running"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {-code} ({signal.Signals(-code).name})"
            return f"signal {-code}"
        return f"exit code {code}"

    def signal_kill(self) -> None:
        """Send SIGKILL and return at once; safe from any thread, and after the end."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGKILL)

    def kill(self, timeout_s: float = _KILL_TIMEOUT_S) -> None:
        """SIGKILL, and wait until the process is reaped (`InfrastructureError` if it is not)."""
        self.signal_kill()
        if not self.exited.wait(timeout_s):
            raise InfrastructureError(
                f"process {self.pid} survived SIGKILL for {timeout_s:g} s",
                evidence=self.arguments[0],
            )

    def output(self) -> str:
        """The end of what the program printed (its errors), on one line."""
        try:
            raw = self.output_path.read_bytes()[-_STDERR_TAIL_BYTES:]
        except OSError:
            return ""
        lines = raw.decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines if line.strip())
