"""An update module on the simulated device: it installs a *package*, a file on the data partition.

The client's port for modules, as a module for Mender's protocol would behave: the payload is kept
beside the package that is installed, ArtifactInstall keeps the old one and puts the new one in its
place (written, synced, renamed), a rollback puts the old one back, and only Cleanup takes it away.
Every step may be begun again after a cut. What it answers, and where it fails, is in the artifact's
meta-data: `reboot` (No, Yes, Automatic), `reverts` (Yes, No), `fails` (a state, or "").

Not modelled: streams, and a module's own process; `tests/updater` runs real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from framework.targets.simulated.filesystem import FileSystem, FileSystemError
from updater.artifact import ArtifactReader, PayloadFile
from updater.device.errors import ModuleError, StoreError
from updater.device.model import State

KIND: Final = "package"
"""The payload's type."""
PACKAGE: Final = "package"
PACKAGE_BYTES: Final = 5000
_NEW: Final = "package-new"
_OLD: Final = "package-old"
_TREE: Final = "module-tree"


def make_package(name: str, behaviour: str) -> bytes:
    """Return the content of a package: what it is, and how the system is with it."""
    return f"{name} {behaviour}\n".encode().ljust(PACKAGE_BYTES, b".")


def read_package(data: FileSystem) -> tuple[str, str]:
    """Say which package is installed, and how it behaves; ("mixed", "well") if it is not whole."""
    if not data.exists(PACKAGE):
        return "v1", "well"
    content = data.read(PACKAGE, 0, PACKAGE_BYTES + 1)
    name, _, behaviour = content.partition(b"\n")[0].decode("ascii", "replace").partition(" ")
    return (name, behaviour) if content == make_package(name, behaviour) else ("mixed", "well")


class PackageModule:
    """The port `Modules`, on the data partition that `data` is.

    `ignored` is called when a rollback fails: the client has to go on, and to tell it. `calls` gets
    the state of every call.
    """

    def __init__(
        self,
        data: FileSystem,
        ignored: Callable[[str], None],
        calls: Callable[[str], None] = lambda state: None,
    ) -> None:
        self._data = data
        self._ignored = ignored
        self._calls = calls

    def prepare(self, reader: ArtifactReader, provides: Mapping[str, str]) -> None:
        """Keep what the module is told, durably."""
        if reader.payload_type != KIND:
            raise ModuleError(f"update module {reader.payload_type} is not installed")
        self.drop()
        try:
            self._keep(_TREE, json.dumps(dict(reader.meta_data)).encode())
        except FileSystemError as error:
            raise StoreError(f"{_TREE}: {error.strerror}") from error

    def download(self, files: Iterator[PayloadFile]) -> None:
        """Keep the payload, durably."""
        try:
            for file in files:
                self._keep(_NEW, b"".join(bytes(piece) for piece in file))
        except FileSystemError as error:
            raise ModuleError(f"update module {KIND}: {error.strerror}") from error

    def reverts(self) -> bool:
        """Say what the meta-data says."""
        return self._told("reverts") == "Yes"

    def needs_reboot(self) -> str:
        """Say what the meta-data says."""
        return self._told("reboot")

    def call(self, state: State) -> None:
        """Do `state`; ModuleError where the meta-data says so, or the drive fails."""
        self._calls(str(state))
        try:
            self._do(state)
        except ModuleError:
            if state is State.ROLLBACK:
                self._ignored(str(state))
            raise

    def _do(self, state: State) -> None:
        try:
            if state is State.CLEANUP:
                self._clean_up()
                return
            if self._told("fails") == state:
                raise ModuleError(f"update module {KIND} {state} exited with status 1")
            if state is State.INSTALL:
                self._install()
            elif state is State.ROLLBACK and self._data.exists(_OLD):
                self._data.rename(_OLD, PACKAGE)
                self._data.sync_directory()
        except FileSystemError as error:
            raise ModuleError(f"update module {KIND} {state}: {error.strerror}") from error

    def drop(self) -> None:
        """Remove what was kept for the module."""
        try:
            for name in (_TREE, _NEW):
                if self._data.exists(name):
                    self._data.remove(name)
            self._data.sync_directory()
        except FileSystemError as error:
            raise StoreError(f"{_TREE}: {error.strerror}") from error

    def _install(self) -> None:
        if not self._data.exists(_OLD):
            old = make_package("v1", "well")
            if self._data.exists(PACKAGE):
                old = self._data.read(PACKAGE, 0, PACKAGE_BYTES)
            self._keep(_OLD, old)
        self._keep(f"{PACKAGE}-tmp", self._data.read(_NEW, 0, PACKAGE_BYTES))
        self._data.rename(f"{PACKAGE}-tmp", PACKAGE)
        self._data.sync_directory()

    def _clean_up(self) -> None:
        for name in (_OLD, f"{PACKAGE}-tmp", f"{_OLD}-tmp", f"{_NEW}-tmp"):
            if self._data.exists(name):
                self._data.remove(name)
        self._data.sync_directory()

    def _keep(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all: under another name, which is then changed."""
        temporary = name if name.endswith("-tmp") else f"{name}-tmp"
        if self._data.exists(temporary):
            self._data.remove(temporary)
        self._data.create(temporary)
        self._data.write(temporary, 0, content)
        self._data.sync(temporary)
        if temporary != name:
            self._data.rename(temporary, name)
            self._data.sync_directory()

    def _told(self, key: str) -> str:
        try:
            text = self._data.read(_TREE, 0, 4096)
            return str(json.loads(text)[key])
        except (FileSystemError, KeyError, ValueError) as error:
            raise ModuleError(f"update module {KIND}: its file tree can't be read") from error
