"""The updater under test: the one place where the framework knows a particular updater.

An updater is a set of commands that a shell on the device runs, a way to make an artifact of an
image on the host, and the lines of its console output that mean something. `BrownoutUpdater` is
ours. Others (Mender, RAUC, SWUpdate) are further implementations of the same protocol.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import ClassVar, Protocol

from attrs import frozen

from updater.artifact import ArtifactError, write_artifact
from updater.artifact.signature import load_private_key

ZSTD_LEVEL = 9
RUNNING = re.compile(r"^running: (?P<name>\S+) \(slot [ab]\)", re.MULTILINE)
LAST_UPDATE = re.compile(
    r"^last update: \S+ (?P<result>\S+) at [^\s:]+:\d+:\d+Z(?:: (?P<cause>.*))?$", re.MULTILINE
)


class UutError(Exception):
    """The updater under test could not be used; the message names the file or command."""


@frozen
class DeviceStatus:
    """What the device says of itself: its artifact, the last update's outcome and its cause."""

    artifact: str
    outcome: str
    cause: str


@frozen
class ConsoleSigns:
    """Regular expressions for the updater's lines on the console.

    Attributes:
        state: group `name` is the state entered.
        installed: group `name` is the artifact, `slot` where.
        committed: group `name` is the artifact, `slot` where.
        rolled_back: group `name` is the artifact that runs again, `cause` why.
        error: group `cause` says why a command failed.
        armed: in such a cause: what failed is still what the next restart starts.
    """

    state: re.Pattern[str]
    installed: re.Pattern[str]
    committed: re.Pattern[str]
    rolled_back: re.Pattern[str]
    error: re.Pattern[str]
    armed: re.Pattern[str]


@frozen
class BootSigns:
    """Regular expressions for the lines of a start, complete with their line end.

    Attributes:
        booting: the bootloader loaded a kernel and starts it; groups `slot` and `trial` (`1`: the
            slot is on trial).
        trying: the bootloader begins to load a slot, as it decided; the same groups. Not every
            bootloader says it.
        nothing: the bootloader found no slot that it can load.
        ready: the system is up; groups `version` and `slot`.
        data_lost: the data partition could not be mounted.
    """

    booting: re.Pattern[str]
    trying: re.Pattern[str]
    nothing: re.Pattern[str]
    ready: re.Pattern[str]
    data_lost: re.Pattern[str]


class ArtifactServer(Protocol):
    """A running TLS server of a folder of artifacts."""

    host: str
    port: int

    def close(self) -> None:
        """Stop it."""


def serve_artifacts(folder: Path, certificate: Path, key: Path) -> ArtifactServer:
    """Serve a folder's files over TLS on the loopback, on any free port. Raises UutError."""
    # Here, as below: most of what imports this module starts no server.
    from updater.server import ArtifactFileServer, ServerError  # noqa: PLC0415

    try:
        return ArtifactFileServer(folder, certificate, key).start()
    except ServerError as error:
        raise UutError(str(error)) from error


def make_management(folder: Path, name: str, artifact_key: Path) -> str:
    """Make a management server's folder; `updater server run` starts it.

    It is called `name`, listens on the loopback, and trusts artifacts signed by `artifact_key`.
    Returns its admin's password. Raises UutError.
    """
    from updater.server import ServerError  # noqa: PLC0415
    from updater.server.setup import initialise  # noqa: PLC0415

    try:
        return initialise(folder, [name], 0, "127.0.0.1", [artifact_key]).admin_password
    except ServerError as error:
        raise UutError(str(error)) from error


class UpdaterUnderTest(Protocol):
    """What the framework asks of an updater."""

    name: str
    signs: ConsoleSigns
    boot_signs: BootSigns
    commit_state: str
    """The state that says: the new system proved itself, it is committed now."""

    def build_artifact(
        self, image: Path, name: str, device_type: str, key: Path, destination: Path
    ) -> Path:
        """Make an installable artifact of a root file system image."""

    def install(self, url: str) -> str:
        """The shell command that installs from `url`; exit code 0 or 4 means installed."""

    def commit(self) -> str:
        """The shell command that commits."""

    def rollback(self) -> str:
        """The shell command that rolls back."""

    def resume(self) -> str:
        """The shell command that every boot runs, to go on after a cut."""

    def status(self) -> str:
        """The shell command whose output `parse_status` reads."""

    def parse_status(self, lines: list[str]) -> DeviceStatus:
        """The device's own view of itself."""

    def record(self, state: str) -> re.Pattern[bytes]:
        """What the write carries that puts `state` on the updater's record on the disk."""


class BrownoutUpdater:
    """Our own updater."""

    name = "brownout"
    commit_state = "ArtifactCommit"
    signs = ConsoleSigns(
        state=re.compile(r"updater: state (?P<name>\w+)"),
        installed=re.compile(r"updater: installed (?P<name>\S+) into slot (?P<slot>[ab])"),
        committed=re.compile(r"updater: committed (?P<name>\S+) \(slot (?P<slot>[ab])\)"),
        rolled_back=re.compile(
            r"updater: rolled back to (?P<name>\S+) \(slot [ab]\): (?P<cause>.*)"
        ),
        error=re.compile(r"updater: error: (?P<cause>.*)"),
        armed=re.compile(r"slot [ab] is still armed"),
    )

    boot_signs = BootSigns(
        booting=re.compile(
            r"BROWNOUT: booting slot (?P<slot>[ab]) upgrade_available=(?P<trial>\d?) [^\n]*\n"
        ),
        trying=re.compile(
            r"BROWNOUT: trying slot (?P<slot>[ab]) upgrade_available=(?P<trial>\d?) [^\n]*\n"
        ),
        nothing=re.compile(r"BROWNOUT: no slot can be booted\s*\n"),
        ready=re.compile(r"BROWNOUT READY version=(?P<version>\S+) slot=(?P<slot>[ab]) [^\n]*\n"),
        data_lost=re.compile(r"BROWNOUT DATA-FAILED\s*\n"),
    )

    data_views: ClassVar[dict[str, str]] = {
        "/updater/state.db": "sqlite",
        "/updater/lock": "ignored",  # its content is for people
    }
    """What its files on the data partition are, as `framework.explore.views` names it."""

    def build_artifact(
        self, image: Path, name: str, device_type: str, key: Path, destination: Path
    ) -> Path:
        """Make a signed artifact with `updater.artifact`.

        Raises:
            UutError: the image or key can't be read, or the artifact can't be written.
        """
        temporary = destination.with_suffix(f".{os.getpid()}.tmp")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            write_artifact(
                temporary,
                image,
                name=name,
                device_types=[device_type],
                key=load_private_key(key),
                compression="zstd",
                level=ZSTD_LEVEL,
                # A variant's name may hold characters that no payload file may.
                file_name="rootfs.img",
            )
            temporary.replace(destination)
        except (ArtifactError, OSError) as error:
            raise UutError(f"no artifact can be made of {image}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return destination

    def install(self, url: str) -> str:
        """`updater install URL`."""
        return f"updater install {shlex.quote(url)}"

    def commit(self) -> str:
        """`updater commit`."""
        return "updater commit"

    def rollback(self) -> str:
        """`updater rollback`."""
        return "updater rollback"

    def resume(self) -> str:
        """`updater resume`."""
        return "updater resume"

    def status(self) -> str:
        """`updater status`."""
        return "updater status"

    def parse_status(self, lines: list[str]) -> DeviceStatus:
        """Read the lines of `updater status`."""
        text = "\n".join(lines)
        running = RUNNING.search(text)
        last = LAST_UPDATE.search(text)
        return DeviceStatus(
            artifact=running["name"] if running else "",
            outcome=last["result"] if last else "",
            cause=(last["cause"] or "").strip() if last else "",
        )

    def record(self, state: str) -> re.Pattern[bytes]:
        """A row of `update_in_progress`: source, target, state and boot id stand in a row.

        SQLite stores a record's values one after the other (sqlite.org/fileformat.html, 2.1).
        """
        return re.compile(b"[ab][ab]" + re.escape(state).encode() + b"[0-9a-f]{8}-[0-9a-f]{4}-")
