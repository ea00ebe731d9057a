"""What every request handler shares: settings, database, store, signer, clock, counters.

Built once per process by `open_core`; the clock is a function, so that tests can turn it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request

from updater.artifact import ArtifactError
from updater.artifact.signature import PublicKey, load_public_key
from updater.server.artifacts import ArtifactStore, Store
from updater.server.database import Database
from updater.server.errors import ServerError
from updater.server.metrics import Metrics
from updater.server.models import new_id
from updater.server.objects import ObjectStore
from updater.server.settings import Settings
from updater.server.tokens import Signer

MAX_SEEN = 200_000


@dataclass
class Core:
    """The server's parts. `seen` collects when devices called, until it is written."""

    settings: Settings
    database: Database
    store: Store
    signer: Signer
    clock: Callable[[], float] = time.time
    metrics: Metrics = field(default_factory=Metrics)
    seen: dict[str, float] = field(default_factory=dict)
    worker: str = field(default_factory=new_id)
    stopping: bool = False
    last_tick: float | None = None

    def note_seen(self, device_id: str) -> None:
        """Remember that a device called; bounded if the database is away for long."""
        if device_id in self.seen or len(self.seen) < MAX_SEEN:
            self.seen[device_id] = self.clock()


def open_core(settings: Settings, clock: Callable[[], float] = time.time) -> Core:
    """Open everything that `settings` name. Raises ServerError."""
    try:
        keys = [load_public_key(path) for path in settings.artifact_keys]
    except ArtifactError as error:
        raise ServerError(str(error)) from error
    return Core(
        settings,
        Database(settings.database_url),
        _open_store(settings, keys),
        Signer(settings.secret),
        clock,
    )


def _open_store(settings: Settings, keys: list[PublicKey]) -> Store:
    if settings.bucket is None:
        return ArtifactStore(settings.artifacts, keys)
    store = ObjectStore(settings.bucket, keys)
    store.check()
    return store


async def core_of(request: Request) -> Core:
    """Return the core of the application that handles `request` (a FastAPI dependency).

    It is async because FastAPI runs a plain function in a thread, which costs more than all else.
    """
    core = request.app.state.core
    assert isinstance(core, Core)
    return core
