"""The daemon on the simulated device, and the management server that it asks for work.

The daemon is the shipped one (`updater.device.managed`, `api`, `files`), loaded once more with this
module's files in `os`'s place: its log and the update control map are on the simulated data
partition, where a power cut may take them. Below the device API there is no network: the server is
called. It is Mender's device API ("Device API", docs.mender.io) as one accepted device sees it: a
token that expires, a deployment that is offered until its end was told, statuses, logs, an update
control map that pauses a few times. A request may be lost on its way there, or its answer on the
way back, after it was carried out.

Not modelled: TLS, HTTP's own errors, maintenance windows; `tests/updater_server` runs real ones.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, Final, Literal, NamedTuple

from framework.targets.simulated.filesystem import FileSystem, FileSystemError
from updater.device.api import Answer, DeviceApi
from updater.device.config import ServerConfig
from updater.device.errors import ServerError

URL: Final = "https://server.invalid"
CONTROL: Final = "update-control"
"""The file on the data partition that holds the update control map."""
TOKEN_REQUESTS: Final = 9
"""Requests that a token is good for."""
BROKE: Final = "the connection broke, and stayed so"
"""What a download says that the network ended."""
ENDED: Final = ("success", "failure", "already-installed")
"""The statuses that end a deployment."""
Loss = Literal["", "request", "answer"]
"""What the network loses of a request: nothing, the request itself, or what is answered."""

_V1: Final = "/api/devices/v1"
_DEPLOYMENTS: Final = "deployments/device/deployments"
_DATA: Final = "/data/"


class Restarting(BaseException):
    """The daemon has asked init for a restart: its process is ended."""


class Job:
    """A deployment to this device: its id and artifact, and what the server was told of it.

    `told` are the statuses, `causes` what came with each, `logs` counts the logs that were sent,
    `left` says how often it will say yet that a state is paused.
    """

    def __init__(self, number: int, artifact: str, pauses: Mapping[str, int]) -> None:
        self.id = f"deployment-{number}"
        self.artifact = artifact
        self.told: list[str] = []
        self.causes: list[str] = []
        self.logs = 0
        self.left = dict(pauses)

    @property
    def over(self) -> bool:
        """Whether its end was told."""
        return bool(self.told) and self.told[-1] in ENDED

    @property
    def status(self) -> str:
        """The last status that the server was told."""
        return self.told[-1] if self.told else "nothing"

    @property
    def cause(self) -> str:
        """What came with that."""
        return self.causes[-1] if self.causes else ""

    def control(self) -> dict[str, Any]:
        """The update control map as it is now."""
        states = {
            f"{state}_Enter": {"action": "pause" if left else "continue"}
            for state, left in self.left.items()
        }
        return {"id": self.id, "states": states} if states else {}


class Server:
    """A server with one device. `lose` says before each request what is lost of it.

    `ended` is called when the server is told that a deployment is over. `reached` counts the
    requests that came and whose answer came back.
    """

    def __init__(
        self,
        lose: Callable[[], Loss] = lambda: "",
        ended: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.jobs: list[Job] = []
        self._lose = lose
        self._ended = ended
        self.reached = 0
        self._token = 0
        self._uses = 0

    @property
    def job(self) -> Job | None:
        """The deployment that is not over."""
        return next((job for job in self.jobs if not job.over), None)

    def offer(self, artifact: str, pauses: Mapping[str, int]) -> Job:
        """Deploy an artifact to the device; `pauses`: states, and how often each is paused."""
        job = Job(len(self.jobs) + 1, artifact, pauses)
        self.jobs.append(job)
        return job

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """Answer a request, unless the network takes it or the answer."""
        lost = self._lose()
        if lost == "request":
            raise ServerError(f"{URL}: cannot be reached: Connection refused")
        answer = self._answer(method, path, body, headers)
        if lost == "answer":
            raise ServerError(f"{URL}: cannot be reached: timed out")
        self.reached += 1
        return answer

    def _answer(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        value: Any = json.loads(body) if body else None
        if (method, path) == ("POST", f"{_V1}/authentication/auth_requests"):
            if headers.get("X-MEN-Signature") != _Key().sign(body):
                return _told(401)
            self._token, self._uses = self._token + 1, 0
            return _told(200, f"token-{self._token}".encode())
        if headers.get("Authorization") != f"Bearer token-{self._token}":
            return _told(401)
        self._uses += 1
        if self._uses > TOKEN_REQUESTS:
            return _told(401)
        if (method, path) == ("PUT", f"{_V1}/inventory/device/attributes"):
            return _told(200)
        _, _, rest = path.partition(f"/{_DEPLOYMENTS}/")
        if (method, rest) == ("POST", "next"):
            return self._next()
        name, _, what = rest.partition("/")
        job = next((job for job in self.jobs if job.id == name), None)
        if job is None:
            return _told(404)
        if (method, what) == ("GET", "update_control_map"):
            return self._control(job)
        if (method, what) == ("PUT", "log"):
            job.logs += bool(value["messages"])
            return _told(204)
        if (method, what) == ("PUT", "status"):
            job.told.append(value["status"])
            job.causes.append(value.get("substate", ""))
            if job.over:
                self._ended(job)
            return _told(204)
        return _told(405)

    def _next(self) -> Answer:
        job = self.job
        if job is None:
            return _told(204)
        offered = {
            "id": job.id,
            "artifact": {
                "artifact_name": job.artifact,
                "device_types_compatible": ["simulated"],
                "source": {"uri": job.artifact},
            },
            "update_control_map": job.control(),
        }
        return _told(200, json.dumps(offered).encode())

    def _control(self, job: Job) -> Answer:
        for state, left in job.left.items():
            if left:
                job.left[state] = left - 1
                break
        return _told(200, json.dumps({"update_control_map": job.control()}).encode())


def _told(status: int, body: bytes = b"") -> Answer:
    return Answer(status, body, 0.0)


class _Key:
    """A key that proves nothing: whose it is does not matter here."""

    public_pem = "simulated"

    def sign(self, body: bytes) -> str:
        return hashlib.sha256(body).hexdigest()


class Api(DeviceApi):
    """The device's side of the API, on a wire that is a call."""

    def __init__(self, config: ServerConfig, server: Server) -> None:
        super().__init__(config, None, _Key(), '{"mac":"simulated"}')
        self._server = server

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        return self._server.ask(method, path, body, headers)


class _Open(NamedTuple):
    """An open file: its name ("" for the directory, or a removed one), whether it is appended."""

    name: str
    appends: bool


class _Path:
    def __init__(self, files: _Files) -> None:
        self._files = files

    def exists(self, path: str) -> bool:
        return self._files.here.exists(_name(path))


class _Files:
    """What the daemon uses of `os`, on the data partition of whichever device asks.

    There are no folders: a path below /data is a file's name.
    """

    O_RDONLY, O_WRONLY, O_CREAT, O_TRUNC = os.O_RDONLY, os.O_WRONLY, os.O_CREAT, os.O_TRUNC
    O_APPEND, O_CLOEXEC, O_DIRECTORY = os.O_APPEND, os.O_CLOEXEC, os.O_DIRECTORY

    def __init__(self) -> None:
        self.data: FileSystem | None = None
        self.handles: dict[int, _Open] = {}
        self.path = _Path(self)
        self._next = 3

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"the simulated daemon has no os.{name}")

    @property
    def here(self) -> FileSystem:
        """The data partition."""
        assert self.data is not None
        return self.data

    def take(self, folder: str, verb: str) -> int:
        """The lock: one process runs at a time."""
        return self._opened(_Open("", appends=False))

    def makedirs(self, path: str, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        """There are no folders."""

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """Open a file, or the folder that it is in."""
        if flags & self.O_DIRECTORY:
            return self._opened(_Open("", appends=False))
        name = _name(path)
        if not self.here.exists(name):
            if not flags & self.O_CREAT:
                raise _missing(path)
            self.here.create(name)
        elif flags & self.O_TRUNC:
            self.here.truncate(name, 0)
        return self._opened(_Open(name, appends=bool(flags & self.O_APPEND)))

    def _opened(self, file: _Open) -> int:
        self._next += 1
        self.handles[self._next] = file
        return self._next

    def close(self, handle: int) -> None:
        """Close it."""
        self.handles.pop(handle, None)

    def fchmod(self, handle: int, mode: int) -> None:
        """There are no other users."""

    def fstat(self, handle: int) -> os.stat_result:
        """Its size, and nothing else."""
        name = self.handles[handle].name
        size = self.here.size(name) if name else 0
        return os.stat_result((0o100600, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def write(self, handle: int, data: bytes) -> int:
        """Write all of it: at the end, or (what is written at once) at the beginning."""
        file = self.handles[handle]
        if not file.name:
            return len(data)
        self.here.write(file.name, self.here.size(file.name) if file.appends else 0, bytes(data))
        return len(data)

    def fsync(self, handle: int) -> None:
        """Make a file, or the directory, durable."""
        name = self.handles[handle].name
        if name:
            self.here.sync(name)
        else:
            self.here.sync_directory()

    def rename(self, path: str, to: str) -> None:
        """Rename a file."""
        self.here.rename(_name(path), _name(to))

    def unlink(self, path: str) -> None:
        """Remove a file; what is written to it by who has it open is gone with it."""
        name = _name(path)
        if not self.here.exists(name):
            raise _missing(path)
        self.here.remove(name)
        for handle, file in self.handles.items():
            if file.name == name:
                self.handles[handle] = _Open("", appends=False)

    def sync(self) -> None:
        """Write everything; like Linux's, it says nothing of what failed."""
        try:
            self.here.unmount()
        except FileSystemError:
            return

    def read(self, path: str, mode: str) -> io.BytesIO:
        """The builtin `open`, for reading."""
        name = _name(path)
        if not self.here.exists(name):
            raise _missing(path)
        return io.BytesIO(self.here.read(name, 0, self.here.size(name)))


def _name(path: str) -> str:
    return path.removeprefix(_DATA)


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class _Processes:
    """What the daemon uses of `process`: the restart is the only program that it runs."""

    @staticmethod
    def run(command: list[str], timeout_s: float) -> None:
        raise Restarting


FILES: Final = _Files()


@lru_cache(maxsize=1)
def daemon_module() -> ModuleType:
    """The client's `managed`, loaded once more, on the files above and without chance."""
    files = _load("updater.device.files")
    files.os = FILES  # type: ignore[attr-defined]
    module = _load("updater.device.managed")
    changed = {
        "os": FILES,
        "lock": FILES,
        "open": FILES.read,
        "files": files,
        "process": _Processes,
        "inventory": lambda config, known: [],
        # The spread of a fleet would make two runs of a lifetime differ.
        "_spread": lambda: 0.0,
        "backoff": lambda failures, first_s, ceiling_s: min(ceiling_s, first_s * 2**failures),
    }
    vars(module).update(changed)
    return module


def _load(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
