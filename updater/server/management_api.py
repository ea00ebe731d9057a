"""The management API, `/api/management/v1`: everything the web page and the CLI can do.

Callers show a bearer secret (an API token, or a session from `/login`); `viewer` reads,
`operator` changes the fleet, `admin` manages users. Lists are pages by `after` and `limit`,
in the order of an index, so that the last page costs what the first does.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import zoneinfo
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

import anyio.from_thread
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from updater.server import accounts, artifacts, deployments, fleet, rollout, views
from updater.server.accounts import Actor
from updater.server.audit import record
from updater.server.core import Core, core_of
from updater.server.errors import RefusedError, invalid
from updater.server.identity import parse_identity, parse_key
from updater.server.models import AuditEntry, Credential, User

router = APIRouter(prefix="/api/management/v1")
Shared = Annotated[Core, Depends(core_of)]
DEFAULT_LIFE_S = 30 * 86_400


def _no_nul(text: str) -> str:
    if "\0" in text or not text.isprintable():
        raise ValueError("must be printable")
    return text


Text = Annotated[str, AfterValidator(_no_nul), Field(min_length=1, max_length=256)]
Name = Annotated[str, AfterValidator(_no_nul), Field(min_length=1, max_length=128)]
Identifier = Annotated[str, AfterValidator(_no_nul), Field(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=500)]


class Closed(BaseModel):
    """A body that takes no unknown fields: a misspelt option must not silently not hold."""

    model_config = ConfigDict(extra="forbid")


class Login(Closed):
    """A user's name and password."""

    name: Annotated[str, Field(max_length=128)]
    password: Annotated[str, Field(max_length=1024)]


class NewToken(Closed):
    """An API token to make."""

    label: Name
    days: Annotated[int, Field(ge=1, le=3650)] = 365


class NewUser(Closed):
    """A user to add."""

    name: Name
    password: Annotated[str, Field(max_length=1024)]
    role: Literal["viewer", "operator", "admin"] = "viewer"


class UserChange(Closed):
    """What to change of a user."""

    password: Annotated[str, Field(max_length=1024)] | None = None
    role: Literal["viewer", "operator", "admin"] | None = None


class KeyChoice(Closed):
    """Which of a device's keys is meant; none: the newest pending one, or all."""

    key_id: Identifier | None = None


class Preauthorization(Closed):
    """A device that may come: its identity as an object, its public key in PEM."""

    identity: dict[str, Any]
    pubkey: Annotated[str, Field(max_length=16_384)]


class ConditionBody(Closed):
    """A condition on an inventory attribute."""

    attribute: Text
    operator: Literal["=", "!=", "in", "not in", "exists", "missing", "prefix"] = "="
    values: Annotated[list[Text], Field(max_length=100)] = []


class NewGroup(Closed):
    """A group: dynamic if it has a filter."""

    name: Name
    filter: Annotated[list[ConditionBody], Field(min_length=1, max_length=20)] | None = None


class MemberChange(Closed):
    """Devices to put into a static group, and to take out."""

    add: Annotated[list[Identifier], Field(max_length=10_000)] = []
    remove: Annotated[list[Identifier], Field(max_length=10_000)] = []


class TargetBody(Closed):
    """Which devices: exactly one of the four; `all` must be said."""

    all: Literal[True] | None = None
    devices: Annotated[list[Identifier], Field(min_length=1, max_length=10_000)] | None = None
    group: Name | None = None
    filter: Annotated[list[ConditionBody], Field(min_length=1, max_length=20)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> TargetBody:
        given = [x for x in (self.all, self.devices, self.group, self.filter) if x is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of all, devices, group, filter")
        return self


class PhaseBody(Closed):
    """One phase: `percent` or `count` of the devices; the last takes the rest."""

    percent: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    count: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    success_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 90.0
    delay_s: Annotated[float, Field(ge=0, le=90 * 86_400, allow_inf_nan=False)] = 0.0


class WindowBody(Closed):
    """A maintenance window: week days (0 is Monday), local times, an IANA time zone."""

    days: Annotated[list[Annotated[int, Field(ge=0, le=6)]], Field(min_length=1, max_length=7)] = (
        Field(default=[0, 1, 2, 3, 4, 5, 6])
    )
    start: Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    end: Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
    timezone: Annotated[str, Field(max_length=64)] = "UTC"


class MapState(Closed):
    """What a device does before one state."""

    action: Literal["continue", "force_continue", "pause", "fail"] = "continue"
    on_map_expire: Literal["force_continue", "fail"] = "force_continue"
    on_action_executed: Literal["continue", "force_continue", "pause", "fail"] = "continue"


class ControlMap(Closed):
    """An update control map, as the devices' clients define it."""

    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    states: dict[
        Literal["ArtifactInstall_Enter", "ArtifactReboot_Enter", "ArtifactCommit_Enter"], MapState
    ]


class NewDeployment(Closed):
    """A deployment to make."""

    name: Text
    artifact_name: Text
    target: TargetBody
    phases: Annotated[list[PhaseBody], Field(min_length=1, max_length=32)] = Field(
        default_factory=lambda: [PhaseBody()]
    )
    max_failure_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 100.0
    retries: Annotated[int, Field(ge=0, le=20)] = 0
    retry_delay_s: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = 60.0
    stall_timeout_s: Annotated[float, Field(ge=1, le=90 * 86_400, allow_inf_nan=False)] = 86_400.0
    starts_at: datetime.datetime | None = None
    duration_s: Annotated[float, Field(ge=1, le=366 * 86_400, allow_inf_nan=False)] = DEFAULT_LIFE_S
    window: WindowBody | None = None
    update_control_map: ControlMap | None = None


async def actor_of(core: Shared, authorization: Annotated[str | None, Header()] = None) -> Actor:
    """Return who calls. Raises RefusedError(401)."""
    scheme, _, secret = (authorization or "").partition(" ")
    now = core.clock()
    actor = (
        await core.database.look_up(lambda s: accounts.recognise(s, secret, None, now))
        if scheme == "Bearer"
        else None
    )
    if actor is None:
        raise RefusedError(401, "not authenticated")
    return actor


def _with_role(role: str) -> Callable[[Actor], Awaitable[Actor]]:
    async def check(actor: Annotated[Actor, Depends(actor_of)]) -> Actor:
        if not actor.may(role):
            raise RefusedError(403, f"this needs the role {role}; {actor.name} is {actor.role}")
        return actor

    return check


Viewer = Annotated[Actor, Depends(_with_role("viewer"))]
Operator = Annotated[Actor, Depends(_with_role("operator"))]
Admin = Annotated[Actor, Depends(_with_role("admin"))]


async def log_in(core: Core, name: str, password: str, address: str) -> str:
    """Check a password, at most so often; return a session's secret. Raises RefusedError."""
    now = core.clock()
    await core.database.read(lambda s: accounts.check_rate(s, name, address, now))

    def stored(session: Session) -> tuple[str, str] | None:
        user = session.scalar(select(User).where(User.name == name)) if "\0" not in name else None
        return None if user is None else (user.id, user.password)

    found = await core.database.read(stored)
    good = await asyncio.to_thread(accounts.check_password, found and found[1], password)
    if not good or found is None:
        await core.database.write(
            lambda s: accounts.note_failure(s, name.replace("\0", "?"), address, now)
        )
        raise RefusedError(401, "the name or the password is wrong")
    return await core.database.write(
        lambda s: accounts.grant(
            s, found[0], accounts.SESSION, "login", now, core.settings.session_s
        )
    )


@router.post("/login", responses={401: {}, 429: {}}, tags=["users"])
async def login(body: Login, request: Request, core: Shared) -> dict[str, str]:
    """Give a session for a name and password."""
    address = request.client.host if request.client else "?"
    return {"token": await log_in(core, body.name, body.password, address)}


@router.get("/me", tags=["users"])
async def me(actor: Viewer) -> dict[str, str]:
    """Say who calls."""
    return {"name": actor.name, "role": actor.role}


@router.post("/tokens", status_code=201, tags=["users"])
async def create_token(body: NewToken, actor: Viewer, core: Shared) -> dict[str, str]:
    """Make an API token of the caller; it is shown only now."""
    now = core.clock()

    def job(session: Session) -> str:
        record(session, now, actor.name, "token.create", actor.user_id, label=body.label)
        return accounts.grant(
            session, actor.user_id, accounts.TOKEN, body.label, now, body.days * 86_400.0
        )

    return {"token": await core.database.write(job)}


@router.get("/tokens", tags=["users"])
async def list_tokens(actor: Viewer, core: Shared) -> list[dict[str, Any]]:
    """List the caller's API tokens, without their secrets."""

    def job(session: Session) -> list[dict[str, Any]]:
        rows = session.scalars(
            select(Credential)
            .where(Credential.user_id == actor.user_id, Credential.kind == accounts.TOKEN)
            .order_by(Credential.created_at)
        )
        return [
            {"id": row.id, "label": row.label, "expires_at": views.iso(row.expires_at)}
            for row in rows
        ]

    return await core.database.read(job)


@router.delete("/tokens/{token_id}", status_code=204, tags=["users"])
async def delete_token(token_id: Identifier, actor: Viewer, core: Shared) -> Response:
    """Revoke an API token of the caller; an admin may revoke anybody's."""
    owner = None if actor.may("admin") else actor.user_id
    now = core.clock()
    await core.database.write(lambda s: accounts.revoke(s, token_id, owner, actor.name, now))
    return Response(status_code=204)


@router.get("/users", tags=["users"])
async def list_users(_: Admin, core: Shared) -> list[dict[str, Any]]:
    """List the users."""
    return await core.database.read(
        lambda s: [
            {"name": u.name, "role": u.role, "created_at": views.iso(u.created_at)}
            for u in s.scalars(select(User).order_by(User.name))
        ]
    )


@router.post("/users", status_code=201, responses={409: {}}, tags=["users"])
async def create_user(body: NewUser, actor: Admin, core: Shared) -> dict[str, str]:
    """Add a user."""
    hashed = await asyncio.to_thread(accounts.hash_password, body.password)
    now = core.clock()
    identifier = await core.database.write(
        lambda s: accounts.create_user(s, body.name, hashed, body.role, actor.name, now)
    )
    return {"id": identifier}


@router.patch("/users/{name}", status_code=204, tags=["users"])
async def change_user(name: Name, body: UserChange, actor: Admin, core: Shared) -> Response:
    """Change a user's role or password."""
    hashed = (
        None
        if body.password is None
        else await asyncio.to_thread(accounts.hash_password, body.password)
    )
    now = core.clock()
    await core.database.write(
        lambda s: accounts.change_user(
            s, name, actor.name, now, password_hash=hashed, role=body.role
        )
    )
    return Response(status_code=204)


@router.delete("/users/{name}", status_code=204, tags=["users"])
async def delete_user(name: Name, actor: Admin, core: Shared) -> Response:
    """Delete a user."""
    now = core.clock()
    await core.database.write(lambda s: accounts.delete_user(s, name, actor.name, now))
    return Response(status_code=204)


@router.get("/devices", tags=["devices"])
async def list_devices(
    _: Viewer,
    core: Shared,
    status: Literal["pending", "accepted", "rejected", "preauthorized"] | None = None,
    group: Name | None = None,
    after: Identifier = "",
    limit: Limit = 50,
) -> dict[str, Any]:
    """List devices, a page at a time."""
    conditions = [] if status is None else [fleet.Condition("status", "=", (status,))]
    return await core.database.read(
        lambda s: views.device_page(s, conditions, group=group, after=after, limit=limit)
    )


@router.post("/devices/search", tags=["devices"])
async def search_devices(
    filter: Annotated[list[ConditionBody], Field(max_length=20)],  # noqa: A002 - the API's word
    _: Viewer,
    core: Shared,
    after: Identifier = "",
    limit: Limit = 50,
) -> dict[str, Any]:
    """Search devices by their inventory."""
    conditions = _conditions(filter)
    return await core.database.read(
        lambda s: views.device_page(s, conditions, group=None, after=after, limit=limit)
    )


@router.get("/devices/{device_id}", responses={404: {}}, tags=["devices"])
async def get_device(device_id: Identifier, _: Viewer, core: Shared) -> dict[str, Any]:
    """Return a device with keys, inventory, groups and history."""
    return await core.database.read(lambda s: views.device(s, device_id))


@router.post("/devices", status_code=201, responses={409: {}}, tags=["devices"])
async def preauthorize(body: Preauthorization, actor: Operator, core: Shared) -> dict[str, str]:
    """Accept a device before it first calls."""
    identity, key = parse_identity(json.dumps(body.identity)), parse_key(body.pubkey)
    now = core.clock()
    return {
        "id": await core.database.write(
            lambda s: fleet.preauthorize(s, identity, key, actor.name, now)
        )
    }


@router.post("/devices/{device_id}/accept", status_code=204, tags=["devices"])
async def accept_device(
    device_id: Identifier, actor: Operator, core: Shared, body: KeyChoice | None = None
) -> Response:
    """Accept a device; with a key it has already, this rotates to the new one."""
    key_id, now = body.key_id if body else None, core.clock()
    await core.database.write(lambda s: fleet.accept(s, device_id, key_id, actor.name, now))
    return Response(status_code=204)


@router.post("/devices/{device_id}/reject", status_code=204, tags=["devices"])
async def reject_device(
    device_id: Identifier, actor: Operator, core: Shared, body: KeyChoice | None = None
) -> Response:
    """Reject a device or one of its keys; its tokens stop at once."""
    key_id, now = body.key_id if body else None, core.clock()
    await core.database.write(lambda s: fleet.reject(s, device_id, key_id, actor.name, now))
    return Response(status_code=204)


@router.delete("/devices/{device_id}", status_code=204, tags=["devices"])
async def decommission_device(device_id: Identifier, actor: Operator, core: Shared) -> Response:
    """Forget a device."""
    now = core.clock()
    await core.database.write(lambda s: fleet.decommission(s, device_id, actor.name, now))
    return Response(status_code=204)


@router.get("/groups", tags=["groups"])
async def list_groups(_: Viewer, core: Shared) -> list[dict[str, Any]]:
    """List the groups with their sizes."""
    return await core.database.read(views.groups)


@router.post("/groups", status_code=201, responses={409: {}}, tags=["groups"])
async def create_group(body: NewGroup, actor: Operator, core: Shared) -> dict[str, str]:
    """Make a group."""
    conditions = None if body.filter is None else _conditions(body.filter)
    now = core.clock()
    return {
        "id": await core.database.write(
            lambda s: fleet.create_group(s, body.name, conditions, actor.name, now)
        )
    }


@router.patch("/groups/{name}/devices", status_code=204, tags=["groups"])
async def change_group(name: Name, body: MemberChange, actor: Operator, core: Shared) -> Response:
    """Put devices into a static group and take others out."""
    now = core.clock()
    await core.database.write(
        lambda s: fleet.change_members(s, name, body.add, body.remove, actor.name, now)
    )
    return Response(status_code=204)


@router.delete("/groups/{name}", status_code=204, tags=["groups"])
async def delete_group(name: Name, actor: Operator, core: Shared) -> Response:
    """Delete a group."""
    now = core.clock()
    await core.database.write(lambda s: fleet.delete_group(s, name, actor.name, now))
    return Response(status_code=204)


@router.get("/artifacts", tags=["artifacts"])
async def list_artifacts(
    _: Viewer, core: Shared, name: Text | None = None, limit: Limit = 100
) -> list[dict[str, Any]]:
    """List artifacts, newest first."""
    return await core.database.read(lambda s: views.artifacts(s, name, limit))


@router.post(
    "/artifacts",
    status_code=201,
    responses={409: {}, 413: {}, 422: {}, 507: {}},
    tags=["artifacts"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def upload_artifact(request: Request, actor: Operator, core: Shared) -> dict[str, str]:
    """Take an artifact, streamed to disk and validated on the way; 201 when it is durable."""
    return {"id": await upload(core, request, actor)}


async def upload(core: Core, request: Request, actor: Actor) -> str:
    """Store and publish the request's body; return the artifact's id. Raises RefusedError."""
    store = core.store
    declared = request.headers.get("content-length", "")
    await asyncio.to_thread(store.check_room, int(declared) if declared.isdigit() else 0)
    pieces: AsyncIterator[bytes] = aiter(request.stream())

    async def next_piece() -> bytes:
        while True:
            piece = await anext(pieces, None)
            if piece is None:
                return b""
            if piece:
                return piece

    limit = core.settings.max_artifact_bytes
    try:
        stored = await anyio.to_thread.run_sync(
            lambda: store.receive(lambda: anyio.from_thread.run(next_piece), limit)
        )
    except BaseException:
        core.metrics.uploads.labels("refused").inc()
        raise
    now = core.clock()
    try:
        identifier = await core.database.write(
            lambda s: artifacts.publish(s, stored, actor.name, now)
        )
    except RefusedError:
        store.discard(stored.id)
        core.metrics.uploads.labels("refused").inc()
        raise
    core.metrics.uploads.labels("stored").inc()
    return identifier


@router.get("/artifacts/{artifact_id}", responses={404: {}}, tags=["artifacts"])
async def get_artifact(artifact_id: Identifier, _: Viewer, core: Shared) -> dict[str, Any]:
    """Return what an artifact says about itself."""
    return await core.database.read(lambda s: views.artifact(s, artifact_id))


@router.delete("/artifacts/{artifact_id}", status_code=204, tags=["artifacts"])
async def delete_artifact(artifact_id: Identifier, actor: Operator, core: Shared) -> Response:
    """Delete an artifact that no deployment needs."""
    now = core.clock()
    await core.database.write(lambda s: artifacts.withdraw(s, artifact_id, actor.name, now))
    await asyncio.to_thread(core.store.discard, artifact_id)
    return Response(status_code=204)


@router.get("/deployments", tags=["deployments"])
async def list_deployments(
    _: Viewer,
    core: Shared,
    status: Literal["scheduled", "running", "paused", "finished", "stopped", "aborted"]
    | None = None,
    limit: Limit = 50,
) -> list[dict[str, Any]]:
    """List deployments, newest first."""
    return await core.database.read(lambda s: views.deployments(s, status, limit))


@router.post("/deployments", status_code=201, tags=["deployments"])
async def create_deployment(body: NewDeployment, actor: Operator, core: Shared) -> dict[str, str]:
    """Make a deployment."""
    now = core.clock()
    starts_at = now if body.starts_at is None else body.starts_at.timestamp()
    plan, target = _plan(body), _target(body.target)
    return {
        "id": await core.database.write(
            lambda s: deployments.create(
                s,
                name=body.name,
                artifact_name=body.artifact_name,
                target=target,
                plan=plan,
                starts_at=starts_at,
                ends_at=max(starts_at, now) + body.duration_s,
                actor=actor.name,
                now=now,
            )
        )
    }


@router.get("/deployments/{deployment_id}", responses={404: {}}, tags=["deployments"])
async def get_deployment(deployment_id: Identifier, _: Viewer, core: Shared) -> dict[str, Any]:
    """Return a deployment with the counts of each phase."""
    return await core.database.read(lambda s: views.deployment(s, deployment_id))


@router.get("/deployments/{deployment_id}/devices", responses={404: {}}, tags=["deployments"])
async def deployment_devices(
    deployment_id: Identifier,
    _: Viewer,
    core: Shared,
    status: rollout.Status | None = None,
    after: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    limit: Limit = 50,
) -> list[dict[str, Any]]:
    """List a deployment's devices, a page at a time."""
    return await core.database.read(
        lambda s: views.assignments(s, deployment_id, status, after, limit)
    )


@router.get(
    "/deployments/{deployment_id}/devices/{device_id}/log",
    responses={404: {}},
    tags=["deployments"],
)
async def deployment_log(
    deployment_id: Identifier, device_id: Identifier, _: Viewer, core: Shared
) -> dict[str, Any]:
    """Return the log that a device sent."""
    return await core.database.read(lambda s: views.log(s, deployment_id, device_id))


@router.post("/deployments/{deployment_id}/abort", status_code=204, tags=["deployments"])
async def abort_deployment(deployment_id: Identifier, actor: Operator, core: Shared) -> Response:
    """End a deployment."""
    now = core.clock()
    await core.database.write(lambda s: deployments.abort(s, deployment_id, actor.name, now))
    return Response(status_code=204)


@router.post("/deployments/{deployment_id}/pause", status_code=204, tags=["deployments"])
async def pause_deployment(deployment_id: Identifier, actor: Operator, core: Shared) -> Response:
    """Let no more devices start."""
    now = core.clock()
    await core.database.write(
        lambda s: deployments.pause(s, deployment_id, actor.name, now, paused=True)
    )
    return Response(status_code=204)


@router.post("/deployments/{deployment_id}/resume", status_code=204, tags=["deployments"])
async def resume_deployment(deployment_id: Identifier, actor: Operator, core: Shared) -> Response:
    """Go on with a paused deployment."""
    now = core.clock()
    await core.database.write(
        lambda s: deployments.pause(s, deployment_id, actor.name, now, paused=False)
    )
    return Response(status_code=204)


@router.get("/audit", tags=["audit"])
async def audit_log(
    _: Viewer,
    core: Shared,
    object_id: Annotated[str, AfterValidator(_no_nul), Field(max_length=256)] | None = None,
    before: Annotated[int, Query(ge=0, le=1 << 31)] | None = None,
    limit: Limit = 100,
) -> list[dict[str, Any]]:
    """List changes, newest first."""

    def job(session: Session) -> list[dict[str, Any]]:
        query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
        if object_id is not None:
            query = query.where(AuditEntry.object_id == object_id)
        if before is not None:
            query = query.where(AuditEntry.id < before)
        return [views.audit_entry(entry) for entry in session.scalars(query)]

    return await core.database.read(job)


@router.get("/statistics", tags=["devices"])
async def statistics(_: Viewer, core: Shared) -> dict[str, Any]:
    """Count devices and deployments by status."""
    return await core.database.read(views.statistics)


def _conditions(bodies: list[ConditionBody]) -> list[fleet.Condition]:
    conditions = [
        fleet.Condition(body.attribute, body.operator, tuple(body.values)) for body in bodies
    ]
    fleet.matching(conditions)
    return conditions


def _target(body: TargetBody) -> deployments.Target:
    if body.devices is not None:
        return deployments.Target("devices", devices=tuple(body.devices))
    if body.group is not None:
        return deployments.Target("group", group=body.group)
    if body.filter is not None:
        return deployments.Target("filter", conditions=tuple(_conditions(body.filter)))
    return deployments.Target("all")


def _plan(body: NewDeployment) -> deployments.Plan:
    for phase in body.phases[:-1]:
        if (phase.percent is None) == (phase.count is None):
            raise invalid("every phase but the last needs either percent or count")
    window = None
    if body.window is not None:
        try:
            zoneinfo.ZoneInfo(body.window.timezone)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
            raise invalid(f"no time zone {body.window.timezone!r}") from None
        window = rollout.Window(
            tuple(sorted(set(body.window.days))),
            _minute(body.window.start),
            _minute(body.window.end),
            body.window.timezone,
        )
    control_map = None
    if body.update_control_map is not None:
        control_map = body.update_control_map.model_dump()
    return deployments.Plan(
        phases=tuple(
            rollout.Phase(phase.percent, phase.count, phase.success_percent, phase.delay_s)
            for phase in body.phases
        ),
        max_failure_percent=body.max_failure_percent,
        retries=body.retries,
        retry_delay_s=body.retry_delay_s,
        stall_s=body.stall_timeout_s,
        window=window,
        control_map=control_map,
    )


def _minute(text: str) -> int:
    hours, minutes = text.split(":")
    return int(hours) * 60 + int(minutes)


def count_of(session: Session, table: Any) -> int:
    """Return a table's size."""
    return session.execute(select(func.count()).select_from(table)).scalar_one()
