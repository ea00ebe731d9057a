"""The ASGI application: device API, management API, web page, health, metrics, one OpenAPI text.

`create_app(core)` puts the routers together; nothing is global, so tests run several at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from updater.server import device_api, jobs, management_api, web
from updater.server.core import Core
from updater.server.database import one_line
from updater.server.errors import RefusedError
from updater.server.guard import Guard, answer_to, problem

# Readiness fails when the background jobs have not run for so many of their intervals.
_LATE_INTERVALS = 12


def create_app(core: Core, *, background: bool = True) -> ASGIApp:
    """Return the application; with `background`, its jobs run while it is served."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(jobs.run_jobs(core)) if background else None
        yield
        core.stopping = True
        if task is not None:
            await jobs.stop_jobs(core, task)

    app = FastAPI(
        title="Brownout update server",
        summary="Updates for fleets of embedded Linux devices.",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        strict_content_type=False,
    )
    app.state.core = core
    app.include_router(device_api.router, dependencies=[Depends(device_api.require_certificate)])
    app.include_router(management_api.router)
    app.include_router(web.router)
    _add_operations(app)
    _add_error_handlers(app)
    return Guard(app, core)


def _add_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, RefusedError) and web.wants_page(request):
            return web.error_page(request, error)
        return answer_to(error)

    async def handle_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        # Mender's clients expect 400 for what they could not have meant.
        status = 400 if request.url.path.startswith("/api/devices") else 422
        return problem(status, f"{place}: {first['msg']}".encode("utf-8", "replace").decode())

    for kind in (RefusedError, SQLAlchemyError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _add_operations(app: FastAPI) -> None:
    @app.get("/health/live", tags=["operations"])
    async def live() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "alive"}

    @app.get("/health/ready", tags=["operations"], responses={503: {}})
    async def ready(core: management_api.Shared) -> Response:
        """Say whether requests make sense: the database answers, the jobs run, no shutdown."""
        if core.stopping:
            return problem(503, "the server is stopping", 5)
        try:
            await core.database.read(lambda session: session.execute(text("SELECT 1")).scalar())
        except SQLAlchemyError as error:
            return problem(503, f"the database does not answer: {one_line(error)}", 5)
        late = core.settings.job_interval_s * _LATE_INTERVALS
        if core.last_tick is not None and core.clock() - core.last_tick > late:
            return problem(503, "the background jobs don't run", 5)
        return Response('{"status":"ready"}', media_type="application/json")

    @app.get("/metrics", tags=["operations"], responses={401: {}})
    async def metrics(core: management_api.Shared, _: management_api.Viewer) -> Response:
        """Return Prometheus metrics; scrape with a viewer's token."""
        return Response(core.metrics.exposition(), media_type="text/plain; version=0.0.4")


def openapi(app: ASGIApp) -> dict[str, Any]:
    """Return the OpenAPI description of what `create_app` returned."""
    assert isinstance(app, Guard)
    inner = app.inner
    assert isinstance(inner, FastAPI)
    return inner.openapi()
