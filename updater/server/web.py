"""The web page: fleet, devices, artifacts, deployments, audit log; server-rendered, no build step.

Jinja2 renders (escaping everything), htmx (vendored, 0BSD) refreshes a deployment's progress; all
of it works without JavaScript too, except uploading. The session is a cookie (`__Host-`,
HttpOnly, SameSite=Strict), and a change is taken only from our own origin: the cookie isn't sent
from elsewhere, and `Sec-Fetch-Site` and `Origin` are checked besides. What a role may not do, its
page doesn't show and the server refuses.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

import jinja2
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from sqlalchemy import select
from sqlalchemy.orm import Session

from updater.server import accounts, deployments, fleet, rollout, views
from updater.server.accounts import Actor
from updater.server.core import Core, core_of
from updater.server.errors import RefusedError, invalid, not_found
from updater.server.management_api import Identifier, log_in, upload
from updater.server.models import AuditEntry

router = APIRouter(include_in_schema=False)
COOKIE = "__Host-brownout"
_HERE = Path(__file__).parent
_STATIC = {
    "htmx.js": (_HERE / "static" / "htmx-2.0.11.min.js", "text/javascript"),
    "icon.svg": (_HERE / "static" / "icon.svg", "image/svg+xml"),
    "page.js": (_HERE / "static" / "page.js", "text/javascript"),
    "page.css": (_HERE / "static" / "page.css", "text/css"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_PAGE = 50
Shared = Annotated[Core, Depends(core_of)]


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _identity(value: dict[str, Any] | None) -> str:
    """A device's identity in a few words: its attributes' values."""
    if not value:
        return "(decommissioned)"
    return ", ".join(f"{name} {text}" for name, text in value.items())


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters["size"] = _size
_templates.filters["identity"] = _identity
_templates.globals["failed_statuses"] = sorted(rollout.FAILED | {rollout.Status.NO_ARTIFACT})
_templates.globals["good_statuses"] = sorted(rollout.SUCCEEDED)
_templates.globals["started_statuses"] = sorted(rollout.STARTED)


class _LoginNeededError(RefusedError):
    """Nobody is logged in: to the login page."""


async def actor_of(request: Request, core: Shared) -> Actor:
    """Return who is logged in. Raises when nobody is."""
    secret, now = request.cookies.get(COOKIE, ""), core.clock()
    actor = (
        await core.database.look_up(lambda s: accounts.recognise(s, secret, accounts.SESSION, now))
        if secret
        else None
    )
    if actor is None:
        raise _LoginNeededError(401, "log in first")
    if request.method != "GET":
        _check_origin(request)
    return actor


async def operator_of(actor: Annotated[Actor, Depends(actor_of)]) -> Actor:
    """Return an operator. Raises RefusedError(403)."""
    if not actor.may("operator"):
        raise RefusedError(403, f"this needs the role operator; {actor.name} is {actor.role}")
    return actor


Visitor = Annotated[Actor, Depends(actor_of)]
Operator = Annotated[Actor, Depends(operator_of)]


def _check_origin(request: Request) -> None:
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if (origin is not None and origin != f"https://{request.headers.get('host', '')}") or (
        site is not None and site not in ("same-origin", "none")
    ):
        raise RefusedError(403, "this change came from another site")


def _page(
    request: Request, name: str, actor: Actor | None, code: int = 200, **values: Any
) -> HTMLResponse:
    text = _templates.get_template(name).render(
        actor=actor, path=request.url.path, now=views.iso(time.time()), **values
    )
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(text, code, headers=headers)


def error_page(request: Request, error: RefusedError) -> Response:
    """Return an error as a page, or the way to the login."""
    if isinstance(error, _LoginNeededError):
        return RedirectResponse("/login", 303)
    return _page(request, "error.html", None, error.status, message=error.message)


def wants_page(request: Request) -> bool:
    """Return whether an error should be a page."""
    return not request.url.path.startswith(("/api/", "/metrics", "/health", "/static/"))


async def _form(request: Request) -> dict[str, str]:
    pairs = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    return {name: texts[0].replace("\0", "").strip() for name, texts in pairs.items()}


@router.get("/static/{name}")
async def static(name: str) -> Response:
    """Serve the files of the page."""
    if name not in _STATIC:
        raise not_found("file", name)
    path, kind = _STATIC[name]
    return FileResponse(path, media_type=kind, headers={"Cache-Control": "max-age=3600"})


@router.get("/login")
async def login_page(request: Request) -> Response:
    """Ask for name and password."""
    return _page(request, "login.html", None, message="")


@router.post("/login")
async def login(request: Request, core: Shared) -> Response:
    """Begin a session."""
    _check_origin(request)
    form = await _form(request)
    address = request.client.host if request.client else "?"
    try:
        secret = await log_in(
            core, form.get("name", "")[:128], form.get("password", "")[:1024], address
        )
    except RefusedError as error:
        return _page(request, "login.html", None, error.status, message=error.message)
    response = RedirectResponse("/", 303)
    response.set_cookie(
        COOKIE,
        secret,
        max_age=core.settings.session_s,
        secure=True,
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/logout")
async def logout(actor: Visitor, core: Shared) -> Response:
    """End the session."""
    now = core.clock()
    await core.database.write(
        lambda s: accounts.revoke(s, actor.credential_id, actor.user_id, actor.name, now)
    )
    response = RedirectResponse("/login", 303)
    response.delete_cookie(COOKIE, secure=True, httponly=True, samesite="strict")
    return response


@router.get("/")
async def overview(request: Request, actor: Visitor, core: Shared) -> Response:
    """Show the fleet at a glance: what waits, what runs, what failed."""

    def job(session: Session) -> dict[str, Any]:
        pending = [fleet.Condition("status", "=", (fleet.PENDING,))]
        return {
            "statistics": views.statistics(session),
            "pending": views.device_page(session, pending, group=None, after="", limit=5),
            "deployments": views.deployments(session, None, 5),
            "failures": views.latest_failures(session, 8),
        }

    return _page(request, "overview.html", actor, **await core.database.read(job))


@router.get("/devices")
async def devices(
    request: Request,
    actor: Visitor,
    core: Shared,
    status: str = "",
    group: str = "",
    where: Annotated[str, Query(max_length=512)] = "",
    after: Identifier = "",
) -> Response:
    """List devices; `where` is like `kernel=6.1 site=lab`."""
    conditions = [fleet.Condition("status", "=", (status,))] if status else []
    message = ""
    for text in where.replace("\0", "").split():
        name, equals, value = text.partition("=")
        if equals and name and value:
            conditions.append(fleet.Condition(name, "=", (value,)))
        else:
            message = f"{text}: write name=value, for example kernel=6.1"
    if message:
        conditions.append(fleet.Condition("id", "=", ("none",)))

    def job(session: Session) -> dict[str, Any]:
        return {
            "page": views.device_page(
                session, conditions, group=group or None, after=after, limit=_PAGE
            ),
            "groups": views.group_names(session),
        }

    found = await core.database.read(job)
    following = found["page"]["next"]
    query = {"status": status, "group": group, "where": where, "after": following or ""}
    return _page(
        request,
        "devices.html",
        actor,
        status=status,
        group=group,
        where=where,
        message=message,
        following=urlencode({k: v for k, v in query.items() if v}) if following else "",
        **found,
    )


@router.get("/devices/{device_id}")
async def device(request: Request, device_id: Identifier, actor: Visitor, core: Shared) -> Response:
    """Show a device: state, keys, inventory, history, and why its last update failed."""
    found = await core.database.read(lambda s: views.device(s, device_id))
    return _page(request, "device.html", actor, device=found)


@router.post("/devices/{device_id}/{action}")
async def change_device(
    request: Request, device_id: Identifier, action: str, actor: Operator, core: Shared
) -> Response:
    """Accept, reject or decommission."""
    form, now = await _form(request), core.clock()
    key_id = form.get("key_id") or None
    if action == "accept":
        await core.database.write(lambda s: fleet.accept(s, device_id, key_id, actor.name, now))
    elif action == "reject":
        await core.database.write(lambda s: fleet.reject(s, device_id, key_id, actor.name, now))
    elif action == "decommission":
        await core.database.write(lambda s: fleet.decommission(s, device_id, actor.name, now))
        return RedirectResponse("/devices", 303)
    else:
        raise not_found("action", action)
    return RedirectResponse(_back(request, f"/devices/{device_id}"), 303)


def _back(request: Request, otherwise: str) -> str:
    """Return the page that the change was made on."""
    origin = f"https://{request.headers.get('host', '')}"
    referer = request.headers.get("referer", "")
    if referer.startswith(f"{origin}/") and "\n" not in referer:
        return referer.removeprefix(origin)
    return otherwise


@router.get("/artifacts")
async def artifact_list(request: Request, actor: Visitor, core: Shared) -> Response:
    """List artifacts; upload one."""
    found = await core.database.read(lambda s: views.artifacts(s, None, 200))
    return _page(request, "artifacts.html", actor, artifacts=found)


@router.post("/artifacts")
async def upload_artifact(request: Request, actor: Operator, core: Shared) -> Response:
    """Take an artifact from the page's script: the body is the file."""
    await upload(core, request, actor)
    return Response(status_code=201)


@router.get("/deployments")
async def deployment_list(request: Request, actor: Visitor, core: Shared) -> Response:
    """List deployments; make one."""

    def job(session: Session) -> dict[str, Any]:
        return {
            "deployments": views.deployments(session, None, 100),
            "names": sorted({a["name"] for a in views.artifacts(session, None, 500)}),
            "groups": views.group_names(session),
        }

    return _page(request, "deployments.html", actor, **await core.database.read(job))


@router.post("/deployments")
async def create_deployment(request: Request, actor: Operator, core: Shared) -> Response:
    """Make a deployment from the form."""
    form, now = await _form(request), core.clock()
    group = form.get("group", "")
    target = deployments.Target("group", group=group) if group else deployments.Target("all")
    plan = deployments.Plan(
        phases=_phases(form.get("phases", "")),
        max_failure_percent=_number(form, "max_failure_percent", 0, 100),
        retries=int(_number(form, "retries", 0, 20)),
        stall_s=_number(form, "stall_hours", 0.1, 24 * 90) * 3600,
    )
    name = form.get("artifact_name", "")[:256]
    identifier = await core.database.write(
        lambda s: deployments.create(
            s,
            name=form.get("name", "")[:256] or name,
            artifact_name=name,
            target=target,
            plan=plan,
            starts_at=now,
            ends_at=now + 30 * 86_400,
            actor=actor.name,
            now=now,
        )
    )
    return RedirectResponse(f"/deployments/{identifier}", 303)


def _phases(text: str) -> tuple[rollout.Phase, ...]:
    """Parse `1, 10%, 50%`: the devices that are left come last."""
    phases = []
    for part in text.replace(",", " ").split()[:31]:
        number = part.removesuffix("%")
        try:
            if part.endswith("%"):
                share = float(number)
                if not 0 < share <= 100:
                    raise ValueError
                phases.append(rollout.Phase(share=share))
            else:
                count = int(number)
                if not 1 <= count <= 10_000_000:
                    raise ValueError
                phases.append(rollout.Phase(count=count))
        except ValueError:
            raise invalid(f"phase {part!r}: write a number of devices or a percentage") from None
    return (*phases, rollout.Phase())


def _number(form: dict[str, str], name: str, low: float, high: float) -> float:
    try:
        value = float(form.get(name, ""))
    except ValueError:
        raise invalid(f"{name.replace('_', ' ')}: not a number") from None
    if not low <= value <= high:
        raise invalid(f"{name.replace('_', ' ')}: from {low:g} to {high:g}")
    return value


@router.get("/deployments/{deployment_id}")
async def deployment(
    request: Request,
    deployment_id: Identifier,
    actor: Visitor,
    core: Shared,
    status: str = "",
    after: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
) -> Response:
    """Show a deployment's progress; htmx asks for the part that changes."""

    def job(session: Session) -> dict[str, Any]:
        shown = views.assignments(session, deployment_id, status or None, after, _PAGE + 1)
        return {
            "deployment": views.deployment(session, deployment_id),
            "devices": shown[:_PAGE],
            "more": shown[_PAGE - 1]["number"] if len(shown) > _PAGE else 0,
        }

    fragment = request.headers.get("hx-request") == "true"
    return _page(
        request,
        "progress.html" if fragment else "deployment.html",
        actor,
        status=status,
        after=after,
        **await core.database.read(job),
    )


@router.post("/deployments/{deployment_id}/{action}")
async def change_deployment(
    deployment_id: Identifier, action: str, actor: Operator, core: Shared
) -> Response:
    """Abort, pause or resume."""
    now = core.clock()
    if action == "abort":
        await core.database.write(lambda s: deployments.abort(s, deployment_id, actor.name, now))
    elif action in ("pause", "resume"):
        await core.database.write(
            lambda s: deployments.pause(s, deployment_id, actor.name, now, paused=action == "pause")
        )
    else:
        raise not_found("action", action)
    return RedirectResponse(f"/deployments/{deployment_id}", 303)


@router.get("/deployments/{deployment_id}/log/{device_id}")
async def log(
    request: Request, deployment_id: Identifier, device_id: Identifier, actor: Visitor, core: Shared
) -> Response:
    """Show the log that a device sent."""
    found = await core.database.read(lambda s: views.log(s, deployment_id, device_id))
    shown = found["messages"][-2000:]
    return _page(
        request,
        "log.html",
        actor,
        log=found | {"messages": shown},
        left_out=len(found["messages"]) - len(shown),
        deployment_id=deployment_id,
        device_id=device_id,
    )


@router.get("/audit")
async def audit(
    request: Request,
    actor: Visitor,
    core: Shared,
    before: Annotated[int | None, Query(ge=0, le=1 << 31)] = None,
) -> Response:
    """Show who changed what."""

    def job(session: Session) -> list[dict[str, Any]]:
        query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(_PAGE)
        if before is not None:
            query = query.where(AuditEntry.id < before)
        return [views.audit_entry(entry) for entry in session.scalars(query)]

    return _page(request, "audit.html", actor, entries=await core.database.read(job))
