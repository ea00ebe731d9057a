"""Update modules: programs that install what is no root file system image, by the v3 protocol.

A module is `<directory>/<payload type>`. It is run as `module STATE TREE` in TREE, a directory on
the data partition that holds `version`, `current_*`, `header/`, `tmp/`, and either the payload's
`files/` or, during Download, FIFOs: each read of `stream-next` yields the path of the next one
in `streams/`, and an empty read means that there are no more. A module that ends Download without
having asked gets its payload in `files/`. Facts: Mender's public "Update modules v3 protocol";
modules written for it run unchanged. Not handled: augmented artifacts, and several payloads.

The tree is fsynced before the module sees it, and stays until the update has ended, so that a
module whose work was cut short finds in `tmp/` what it had put there. Every call has a deadline.
"""

from __future__ import annotations

import errno
import os
import time

from updater.device import files, process
from updater.device.config import ModulesConfig
from updater.device.console import say
from updater.device.errors import ModuleError, StoreError
from updater.device.model import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from updater.artifact import ArtifactReader, PayloadFile

_QUESTION_TIMEOUT_S = 60.0
_RESERVE_BYTES = 1024 * 1024
_COPY_BYTES = 256 * 1024
# How often a FIFO is looked at whose reader has not come yet; the kernel has no event for that.
_READER_POLL_S = 0.02


class ModuleRunner:
    """Finds and calls the module of the artifact in progress."""

    def __init__(self, config: ModulesConfig, data_dir: str, device_type: str) -> None:
        self._config = config
        self._device_type = device_type
        self._payloads = f"{data_dir}/modules/v3/payloads"
        self._tree = f"{self._payloads}/0000/tree"

    def prepare(self, reader: ArtifactReader, provides: Mapping[str, str]) -> None:
        """Lay out the file tree, durably; ModuleError when there is no such module."""
        kind = reader.payload_type or ""
        self._find(kind)
        self.drop()
        texts = {
            "version": b"3\n",
            "current_artifact_name": _line(provides.get("artifact_name", "")),
            "current_artifact_group": _line(provides.get("artifact_group", "")),
            "current_device_type": _line(self._device_type),
            "header/artifact_name": reader.artifact_name.encode(),
            "header/artifact_group": reader.provides.get("artifact_group", "").encode(),
            "header/payload_type": kind.encode(),
            **{f"header/{name}": content for name, content in reader.header_files.items()},
        }
        try:
            for directory in ("header", "tmp"):
                os.makedirs(f"{self._tree}/{directory}", 0o700)  # noqa: PTH103 - os throughout
            for name, content in texts.items():
                files.write_durably(f"{self._tree}/{name}", content)
            for directory in (self._tree, f"{self._payloads}/0000", self._payloads):
                files.sync_directory(directory)
        except OSError as error:
            raise StoreError(f"{self._tree}: {error.strerror}") from error

    def download(self, payload: Iterator[PayloadFile]) -> None:
        """Stream the payload to the module, or store it durably where it will look."""
        with_sizes = self._ask("ProvidePayloadFileSizes") == "Yes"
        call = "DownloadWithFileSizes" if with_sizes else "Download"
        next_fifo = f"{self._tree}/stream-next"
        try:
            os.mkdir(f"{self._tree}/streams", 0o700)  # noqa: PTH102
            os.mkfifo(next_fifo, 0o600)
            with self._start(call) as program:
                stream = _Stream(program, self._kind(), call, self._config.timeout_s)
                self._offer(stream, payload, next_fifo, with_sizes=with_sizes)
            os.unlink(next_fifo)  # noqa: PTH108
            files.remove_tree(f"{self._tree}/streams")
        except OSError as error:
            raise ModuleError(
                f"update module {self._kind()}: {error.filename or self._tree}: {error.strerror}"
            ) from error

    def reverts(self) -> bool:
        """Ask whether the module can roll back."""
        answer = self._ask("SupportsRollback")
        if answer not in ("", "No", "Yes"):
            raise ModuleError(
                f"update module {self._kind()} answers {answer!r} to SupportsRollback"
            )
        return answer == "Yes"

    def needs_reboot(self) -> str:
        """Ask for "No", "Yes" or "Automatic"."""
        answer = self._ask("NeedsArtifactReboot") or "No"
        if answer not in ("No", "Yes", "Automatic"):
            raise ModuleError(
                f"update module {self._kind()} answers {answer!r} to NeedsArtifactReboot"
            )
        return answer

    def call(self, state: State) -> None:
        """Let the module do `state`; one that never began has nothing to clean up."""
        if state is State.CLEANUP and not os.path.isdir(self._tree):  # noqa: PTH112
            return
        with self._start(str(state)) as program:
            _check(self._kind(), str(state), program.wait(self._config.timeout_s))

    def drop(self) -> None:
        """Remove the file tree."""
        files.remove_tree(f"{self._payloads}/0000")

    def _offer(
        self, stream: _Stream, payload: Iterator[PayloadFile], next_fifo: str, *, with_sizes: bool
    ) -> None:
        for number, file in enumerate(payload):
            path = f"streams/{file.name}"
            line = f"{path} {file.size}\n" if with_sizes else f"{path}\n"
            # Before it is named: a module opens it at once.
            os.mkfifo(f"{self._tree}/{path}", 0o600)
            if not stream.write(next_fifo, [memoryview(line.encode())]):
                if number:
                    stream.fail(f"ended without asking for {file.name}")
                stream.succeed()
                self._store(file, payload)
                return
            if not stream.write(f"{self._tree}/{path}", file):
                stream.fail(f"ended without reading {file.name}")
        stream.write(next_fifo, [])
        stream.succeed()

    def _store(self, first: PayloadFile, others: Iterator[PayloadFile]) -> None:
        """Keep the payload for later calls."""
        directory = f"{self._tree}/files"
        os.mkdir(directory, 0o700)  # noqa: PTH102
        file: PayloadFile | None = first
        while file is not None:
            free = files.free_bytes(directory)
            if free < file.size + _RESERVE_BYTES:
                raise StoreError(
                    f"{directory}: {file.name} needs {file.size + _RESERVE_BYTES} bytes,"
                    f" {free} are free"
                )
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            handle = os.open(f"{directory}/{file.name}", flags, 0o600)
            try:
                for piece in file:
                    done = 0
                    while done < len(piece):
                        done += os.write(handle, piece[done:])
                os.fsync(handle)
            finally:
                os.close(handle)
            file = next(others, None)
        files.sync_directory(directory)
        files.sync_directory(self._tree)

    def _ask(self, question: str) -> str:
        with self._start(question) as program:
            result = program.wait(_QUESTION_TIMEOUT_S)
        _check(self._kind(), question, result)
        return result.output.decode("utf-8", "replace").strip()

    def _start(self, call: str) -> process.Program:
        module = self._find(self._kind())
        # posix_spawn cannot change the directory; a shell can.
        arguments = ["sh", "-c", 'cd "$1" && exec "$0" "$2" "$1"', module, self._tree, call]
        try:
            return process.Program(arguments)
        except OSError as error:
            raise ModuleError(f"update module {module}: {error.strerror}") from error

    def _kind(self) -> str:
        path = f"{self._tree}/header/payload_type"
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123
                return file.read(1024).strip()
        except OSError as error:
            raise ModuleError(f"{path}: {error.strerror}: no module can be called") from error

    def _find(self, kind: str) -> str:
        searched = self._config.directories
        if kind and "/" not in kind and not kind.startswith("."):
            for directory in searched:
                path = f"{directory}/{kind}"
                if os.path.isfile(path) and os.access(path, os.X_OK):  # noqa: PTH113
                    return path
        raise ModuleError(
            f"there is no update module for payload type {kind!r} in {', '.join(searched)}"
        )


class _Stream:
    """Feeds FIFOs to a running module, and never waits for one that has ended."""

    def __init__(self, program: process.Program, kind: str, call: str, timeout_s: float) -> None:
        self._program = program
        self._kind = kind
        self._call = call
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s

    def write(self, path: str, pieces: Iterable[memoryview]) -> bool:
        """Write everything to the FIFO as soon as it has a reader; False if none comes."""
        handle = self._open(path)
        if handle < 0:
            return False
        try:
            for piece in pieces:
                self._write_piece(handle, piece)
        except BrokenPipeError:
            self.fail(f"stopped reading {path.rpartition('/')[2]}")
        finally:
            os.close(handle)
        return True

    def _open(self, path: str) -> int:
        while True:
            try:
                return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            if not self._program.running:
                return -1
            self._check_deadline()
            self._program.poll(_READER_POLL_S)

    def _write_piece(self, handle: int, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            try:
                done += os.write(handle, piece[done:])
            except BlockingIOError:
                self._check_deadline()
                self._program.poll(1.0, writable=handle)

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise ModuleError(
                f"update module {self._kind}: {self._call} did not finish within"
                f" {self._timeout_s:g} s"
            )

    def fail(self, how: str) -> None:
        """Raise what the module's own exit says, or else `how` it went wrong."""
        result = self._program.wait(_QUESTION_TIMEOUT_S)
        _check(self._kind, self._call, result)
        raise ModuleError(f"update module {self._kind}: {self._call} {how}")

    def succeed(self) -> None:
        """Wait for the module's end; it must be a good one."""
        left = max(0.1, self._deadline - time.monotonic())
        _check(self._kind, self._call, self._program.wait(left))


def _check(kind: str, call: str, result: process.Completed) -> None:
    for line in result.errors.decode("utf-8", "replace").splitlines():
        say(f"{kind}: {line}")
    if result.status != 0:
        raise ModuleError(f"update module {kind}: {call} {result.failure()}")


def _line(text: str) -> bytes:
    return f"{text}\n".encode() if text else b""
