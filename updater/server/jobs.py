"""What happens without anybody asking: time-outs, phases, sweeping, counting.

Every worker runs the loop; a lease in the database lets one of them act. The lease is taken in
the same transaction as the work, so that a worker that was paused past its lease can't act on
an old belief: its transaction takes the lease anew or does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from sqlalchemy import select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from updater.server import accounts, deployments, fleet, views
from updater.server.core import Core
from updater.server.database import one_line
from updater.server.errors import RefusedError
from updater.server.models import Artifact, Lease

LEASE_S = 30.0
_SWEEP_EVERY = 720
_SEEN_AT_ONCE = 2000
_log = structlog.get_logger("updater.server")


def take_lease(session: Session, name: str, holder: str, now: float, lease_s: float) -> bool:
    """Take or renew a lease; False while another worker holds it."""
    dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
    session.execute(
        dialect.insert(Lease)
        .values(name=name, holder=holder, until=0.0)
        .on_conflict_do_nothing(index_elements=["name"])
    )
    taken = session.execute(
        update(Lease)
        .where(Lease.name == name, (Lease.until <= now) | (Lease.holder == holder))
        .values(holder=holder, until=now + lease_s)
        .execution_options(synchronize_session=False)
    )
    return bool(taken.rowcount)  # type: ignore[attr-defined]


def release_lease(session: Session, name: str, holder: str) -> None:
    """Give a lease up, so that another worker need not wait for its end."""
    session.execute(
        update(Lease).where(Lease.name == name, Lease.holder == holder).values(until=0.0)
    )


def run_due(session: Session, holder: str, now: float) -> bool:
    """Do everything that is due, if this worker has the lease; return whether it had."""
    if not take_lease(session, "jobs", holder, now, LEASE_S):
        return False
    deployments.tick(session, now)
    accounts.purge(session, now)
    return True


async def flush_seen(core: Core) -> None:
    """Write when devices last called, in bounded pieces; put back what could not be written."""
    while core.seen:
        piece = dict(list(core.seen.items())[:_SEEN_AT_ONCE])
        for device_id in piece:
            core.seen.pop(device_id, None)
        try:
            await core.database.write(_writing_seen(piece))
        except Exception:
            for device_id, at in piece.items():
                core.seen.setdefault(device_id, at)
            raise


def _writing_seen(piece: dict[str, float]) -> Callable[[Session], None]:
    return lambda session: fleet.note_seen(session, piece)


async def run_jobs(core: Core) -> None:
    """Loop until cancelled; a failure is logged and tried again at the next round."""
    rounds = 0
    while True:
        try:
            await one_round(core, sweep=rounds % _SWEEP_EVERY == 0)
        except (SQLAlchemyError, RefusedError, OSError) as error:
            core.metrics.job_failures.inc()
            text = one_line(error) if isinstance(error, SQLAlchemyError) else str(error)
            _log.warning("background jobs failed; tried again soon", error=text)
        except Exception:  # noqa: BLE001 - the loop must go on; the log has the traceback
            core.metrics.job_failures.inc()
            _log.exception("background jobs failed")
        rounds += 1
        await asyncio.sleep(core.settings.job_interval_s)


async def one_round(core: Core, *, sweep: bool = False) -> bool:
    """Run the jobs once; return whether this worker held the lease."""
    now = core.clock()
    await flush_seen(core)
    held = await core.database.write(lambda s: run_due(s, core.worker, now))
    core.last_tick = now
    counts = await core.database.read(views.statistics)
    for gauge, name in (
        (core.metrics.devices, "devices"),
        (core.metrics.deployments, "deployments"),
    ):
        gauge.clear()
        for status, count in counts[name].items():
            gauge.labels(status).set(count)
    if held and sweep:
        known = set(await core.database.read(lambda s: list(s.scalars(select(Artifact.id)))))
        removed = await asyncio.to_thread(core.store.sweep, known, now)
        if removed:
            _log.info("leftovers of cut uploads removed", files=removed)
    return held


async def stop_jobs(core: Core, task: asyncio.Task[None]) -> None:
    """End the loop, write what it had collected, give the lease up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    try:
        await flush_seen(core)
        await core.database.write(lambda s: release_lease(s, "jobs", core.worker))
    except (SQLAlchemyError, RefusedError) as error:
        _log.warning("the lease was not given up", error=str(error))
