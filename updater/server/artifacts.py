"""The artifact store: a folder in which every visible file is whole, valid and on disk.

The other kind of store, a bucket, is `updater.server.objects`; both are a `Store`. An upload is
written to `incoming/` and read by `updater.artifact` at the same time, in pieces; nothing is held
whole in memory. Only when the last byte was found valid is the file synced, renamed to its place,
the folder synced, and the row committed, in this order: a power cut at any moment leaves either no
artifact or a whole one. Files without a row (a cut between rename and commit) are never visible and
are swept away later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from sqlalchemy import delete, exists, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from updater.artifact import ArtifactError, ArtifactReader
from updater.artifact.signature import PublicKey
from updater.server.audit import record
from updater.server.errors import RefusedError, ServerError, conflict, not_found
from updater.server.models import Artifact, ArtifactDeviceType, Assignment, Deployment, new_id

SUFFIX = ".mender"
# Keep this much of the disk for the database.
_RESERVE_BYTES = 64 << 20
SWEEP_AGE_S = 6 * 3600.0
_PIECE = 256 * 1024


class Stored(NamedTuple):
    """A validated file in its final place, not yet in the database."""

    id: str
    name: str
    device_types: tuple[str, ...]
    size: int
    sha256: str
    payload_type: str
    signed: bool
    verified: bool
    provides: dict[str, str]
    depends: dict[str, list[str]]


class Sink(Protocol):
    """Where an upload's bytes go while they are validated."""

    def write(self, data: memoryview, /) -> int | None:
        """Take some of `data`; return how many bytes."""


class Store(Protocol):
    """What the server asks of a store of artifacts. Methods block: call them in a thread."""

    def path(self, artifact_id: str) -> Path | None:
        """Return the artifact's file, if it is one of this machine's."""

    def size(self, artifact_id: str) -> int | None:
        """Return the artifact's size in bytes, or None if it isn't there."""

    def read(self, artifact_id: str, start: int, count: int) -> Iterator[bytes]:
        """Yield `count` bytes of the artifact from byte `start` on."""

    def check_room(self, size: int) -> None:
        """Refuse an upload that can't fit. Raises RefusedError(507)."""

    def receive(self, pull: Callable[[], bytes], limit: int) -> Stored:
        """Store and validate an upload; visible only when it is whole. Raises RefusedError."""

    def discard(self, artifact_id: str) -> None:
        """Remove an artifact."""

    def sweep(self, known: set[str], now: float) -> int:
        """Remove old leftovers of cut uploads; return how many."""


class ArtifactStore:
    """A folder of artifacts. With `keys`, only what one of them signed is taken.

    Methods block: call them in a thread.
    """

    def __init__(self, folder: Path, keys: Sequence[PublicKey] = ()) -> None:
        self.folder = folder
        self._incoming = folder / "incoming"
        self._keys = keys
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"{folder}: cannot make the store: {error.strerror}") from error

    def path(self, artifact_id: str) -> Path:
        """Return where an artifact lies."""
        return self.folder / f"{artifact_id}{SUFFIX}"

    def size(self, artifact_id: str) -> int | None:
        """Return an artifact's size in bytes, or None if it isn't there."""
        try:
            return self.path(artifact_id).stat().st_size
        except OSError:
            return None

    def read(self, artifact_id: str, start: int, count: int) -> Iterator[bytes]:
        """Yield `count` bytes of an artifact from byte `start` on."""
        with self.path(artifact_id).open("rb") as file:
            file.seek(start)
            while count and (piece := file.read(min(count, _PIECE))):
                count -= len(piece)
                yield piece

    def check_room(self, size: int) -> None:
        """Refuse an upload that can't fit. Raises RefusedError(507)."""
        free = shutil.disk_usage(self.folder).free
        if size + _RESERVE_BYTES > free:
            raise RefusedError(
                507, f"no room: the upload has {size} bytes, the store {max(free, 0)} free"
            )

    def receive(self, pull: Callable[[], bytes], limit: int) -> Stored:
        """Write and validate an upload; `pull` returns its next bytes, b"" at the end.

        Raises RefusedError: 413 over `limit`, 422 for an invalid artifact, 507 for a full disk.
        """
        artifact_id = new_id()
        part = self._incoming / f"{artifact_id}.part"
        try:
            with part.open("xb", buffering=0) as file:
                stored = validated(artifact_id, pull, file, limit, self._keys)
                os.fsync(file.fileno())
            part.rename(self.path(artifact_id))
            _sync_folder(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RefusedError(507, "the store's disk is full") from error
            raise RefusedError(500, f"the store cannot be written: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
        return stored

    def discard(self, artifact_id: str) -> None:
        """Remove an artifact's file."""
        self.path(artifact_id).unlink(missing_ok=True)

    def sweep(self, known: set[str], now: float) -> int:
        """Remove old leftovers of cut uploads; return how many. `known`: ids in the database."""
        removed = 0
        for path in (*self._incoming.glob("*.part"), *self.folder.glob(f"*{SUFFIX}")):
            with contextlib.suppress(OSError):
                old = now - path.stat().st_mtime > SWEEP_AGE_S
                if old and path.stem not in known:
                    path.unlink()
                    removed += 1
        return removed


def validated(
    artifact_id: str,
    pull: Callable[[], bytes],
    sink: Sink,
    limit: int,
    keys: Sequence[PublicKey],
) -> Stored:
    """Read an upload to its end, every byte into `sink` too, and return what it is.

    Raises RefusedError: 413 over `limit` bytes, 422 for an invalid artifact.
    """
    source = _Tee(pull, sink, limit)
    try:
        reader = ArtifactReader(source, keys)
        for file in reader.files():
            for _ in file:
                pass
        source.drain()
        if reader.payload_type is None:
            raise RefusedError(422, "the artifact has no payload, so nothing can be deployed")
    except ArtifactError as error:
        raise RefusedError(422, f"not a valid artifact: {error}") from error
    depends = {**reader.header_info.depends, **reader.type_info.depends}
    return Stored(
        id=artifact_id,
        name=reader.artifact_name,
        device_types=reader.header_info.device_types,
        size=source.size,
        sha256=source.digest.hexdigest(),
        payload_type=reader.payload_type,
        signed=reader.signed,
        verified=reader.verified,
        provides=reader.provides,
        depends={key: list(values) for key, values in depends.items()},
    )


class _Tee:
    """The upload as the artifact reader wants it; every byte goes to the sink too."""

    def __init__(self, pull: Callable[[], bytes], sink: Sink, limit: int) -> None:
        self._pull = pull
        self._sink = sink
        self._limit = limit
        self._pending = memoryview(b"")
        self.size = 0
        self.digest = hashlib.sha256()

    def readinto(self, buffer: memoryview, /) -> int:
        if not self._pending:
            piece = self._pull()
            if not piece:
                return 0
            self.size += len(piece)
            if self.size > self._limit:
                raise RefusedError(413, f"the artifact is larger than {self._limit} bytes")
            self.digest.update(piece)
            view = memoryview(piece)
            while view:
                written = self._sink.write(view)
                assert written
                view = view[written:]
            self._pending = memoryview(piece)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def drain(self) -> None:
        """Take what the reader left (nothing, by its contract)."""
        buffer = memoryview(bytearray(_PIECE))
        while self.readinto(buffer):
            pass


def publish(session: Session, stored: Stored, actor: str, now: float) -> str:
    """Make a stored artifact visible; raises RefusedError(409) if its name is taken."""
    session.add(
        Artifact(
            id=stored.id,
            name=stored.name,
            file=f"{stored.id}{SUFFIX}",
            size=stored.size,
            sha256=stored.sha256,
            payload_type=stored.payload_type,
            signed=stored.signed,
            verified=stored.verified,
            provides=stored.provides,
            depends=stored.depends,
            created_at=now,
            created_by=actor,
        )
    )
    try:
        session.flush()
        session.add_all(
            ArtifactDeviceType(name=stored.name, device_type=kind, artifact_id=stored.id)
            for kind in dict.fromkeys(stored.device_types)
        )
        session.flush()
    except IntegrityError as error:
        raise conflict(
            f"an artifact named {stored.name!r} for one of these device types exists"
        ) from error
    record(session, now, actor, "artifact.upload", stored.id, name=stored.name, size=stored.size)
    return stored.id


def withdraw(session: Session, artifact_id: str, actor: str, now: float) -> None:
    """Take an artifact out of the database; refused while a deployment needs it."""
    artifact = session.get(Artifact, artifact_id)
    if artifact is None:
        raise not_found("artifact", artifact_id)
    needed = session.scalar(
        select(Deployment.id)
        .where(
            Deployment.status.in_(("scheduled", "running", "paused")),
            or_(
                Deployment.artifact_name == artifact.name,
                exists().where(
                    Assignment.deployment_id == Deployment.id,
                    Assignment.artifact_id == artifact_id,
                ),
            ),
        )
        .limit(1)
    )
    if needed:
        raise conflict(f"deployment {needed} needs this artifact")
    record(session, now, actor, "artifact.delete", artifact_id, name=artifact.name)
    session.execute(delete(Artifact).where(Artifact.id == artifact_id))


def for_device(
    session: Session, name: str, device_type: str, provides: dict[str, str]
) -> Artifact | None:
    """Return the artifact of this name that the device may install, or None."""
    artifact = session.scalar(
        select(Artifact)
        .join(ArtifactDeviceType, ArtifactDeviceType.artifact_id == Artifact.id)
        .where(ArtifactDeviceType.name == name, ArtifactDeviceType.device_type == device_type)
    )
    if artifact is None:
        return None
    for key, allowed in artifact.depends.items():
        if key != "device_type" and provides.get(key) not in allowed:
            return None
    return artifact


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def now_s() -> float:
    """Return the wall clock; tests give the application another."""
    return time.time()
