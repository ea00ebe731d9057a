"""The device API, `/api/devices`: what Mender's clients speak, from its public description.

Differences between client generations (3.4 and 5.x) are all here: the three spellings of "next",
chunked bodies, repeated reports. A device is known by the token in `Authorization`; the database
says on every request whether its key still counts, so a rejected device is out at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from updater.server import deployments, fleet
from updater.server.core import Core, core_of
from updater.server.errors import RefusedError, not_found
from updater.server.identity import parse_identity, parse_key, signature_is_valid
from updater.server.rollout import REPORTABLE, Status

router = APIRouter(prefix="/api/devices")
ARTIFACT_TYPE = "application/vnd.mender-artifact"
MIN_ARTIFACT_BYTES = 4096
_RANGE = re.compile(r"^bytes=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*$", re.ASCII)
_MAX_ATTRIBUTES = 512
_MAX_MESSAGES = 100_000


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain NUL")
    return text


Text = Annotated[str, AfterValidator(_no_nul), Field(max_length=1024)]
Identifier = Annotated[str, AfterValidator(_no_nul), Field(max_length=64)]
Shared = Annotated[Core, Depends(core_of)]


class AuthRequest(BaseModel):
    """Who a device says it is. Unknown fields (like 5.x's `tier`) are let be."""

    id_data: str = Field(max_length=16_384)
    pubkey: str = Field(max_length=16_384)
    tenant_token: str | None = Field(default=None, max_length=4096)


class InventoryAttribute(BaseModel):
    """One attribute; 3.4 adds nothing else, newer clients may."""

    name: Annotated[str, AfterValidator(_no_nul), Field(min_length=1, max_length=256)]
    value: Text | Annotated[list[Text], Field(max_length=256)]


class NextRequest(BaseModel):
    """v2: what the device provides."""

    device_provides: Annotated[dict[Text, Text | list[Text]], Field(max_length=512)]
    update_control_map: bool = False


class StatusReport(BaseModel):
    """How far a device is."""

    status: Status
    substate: Annotated[str, Field(max_length=65_536)] | None = None


class LogMessage(BaseModel):
    """One line of a device's log; other fields are kept."""

    model_config = ConfigDict(extra="allow")

    timestamp: str = Field(max_length=64)
    level: str = Field(max_length=32)
    message: str


class DeviceLog(BaseModel):
    """A device's deployment log."""

    messages: Annotated[list[LogMessage], Field(max_length=_MAX_MESSAGES)]


Attributes = Annotated[list[InventoryAttribute], Field(max_length=_MAX_ATTRIBUTES)]


class Instructions(BaseModel):
    """The answer to "next": which artifact, from where."""

    id: str
    artifact: dict[str, Any]
    update_control_map: dict[str, Any] | None = None


async def require_certificate(request: Request, core: Shared) -> None:
    """With client certificates required, refuse a connection without one."""
    if core.settings.client_certificates == "required" and not request.scope.get("state", {}).get(
        "client_certificate"
    ):
        raise RefusedError(403, "this server wants a client certificate from devices")


async def device_of(core: Shared, authorization: Annotated[str | None, Header()] = None) -> str:
    """Return the id of the device that the token names. Raises RefusedError(401)."""
    scheme, _, token = (authorization or "").partition(" ")
    claims = core.signer.check_device_token(token, core.clock()) if scheme == "Bearer" else None
    if claims is None or not await core.database.look_up(
        lambda session: fleet.key_counts(session, claims.device_id, claims.key_id)
    ):
        raise RefusedError(401, "not authenticated")
    core.note_seen(claims.device_id)
    return claims.device_id


DeviceId = Annotated[str, Depends(device_of)]


@router.post(
    "/v1/authentication/auth_requests",
    response_class=PlainTextResponse,
    responses={400: {}, 401: {}, 429: {}},
    tags=["device"],
)
async def authenticate(
    request: Request,
    body: AuthRequest,
    core: Shared,
    x_men_signature: Annotated[str, Header(max_length=4096)],
) -> Response:
    """Give an accepted device its token; a new one is recorded and waits."""
    identity, key = parse_identity(body.id_data), parse_key(body.pubkey)
    # Over the bytes as they came, the newline at their end included.
    if not signature_is_valid(key.key, x_men_signature, await request.body()):
        raise RefusedError(401, "the signature does not match the body")
    settings, now = core.settings, core.clock()
    known = await core.database.look_up(lambda s: fleet.find_key(s, identity, key))
    if known is None or known.status == fleet.PREAUTHORIZED:
        if settings.enrolment_token and body.tenant_token != settings.enrolment_token:
            raise RefusedError(401, "the tenant token is not this server's")
        known = await core.database.write(
            lambda s: fleet.introduce(s, identity, key, now, settings.max_pending_devices)
        )
    if known.status != fleet.ACCEPTED:
        raise RefusedError(401, f"this device's key is {known.status}")
    core.note_seen(known.device_id)
    token = core.signer.device_token(known.device_id, known.key_id, now, settings.device_token_s)
    return PlainTextResponse(token, media_type="application/jwt")


@router.put("/v1/inventory/device/attributes", tags=["device"])
async def put_inventory(attributes: Attributes, device_id: DeviceId, core: Shared) -> Response:
    """Replace the device's inventory."""
    return await _inventory(core, device_id, attributes, replace=True)


@router.patch("/v1/inventory/device/attributes", tags=["device"])
async def patch_inventory(attributes: Attributes, device_id: DeviceId, core: Shared) -> Response:
    """Change some of the device's inventory."""
    return await _inventory(core, device_id, attributes, replace=False)


async def _inventory(
    core: Core, device_id: str, attributes: list[InventoryAttribute], *, replace: bool
) -> Response:
    values = {attribute.name: attribute.value for attribute in attributes}
    stored = await core.database.look_up(lambda s: fleet.inventory(s, device_id))
    wanted = values if replace else {**stored, **values}
    if {name: value for name, value in wanted.items() if value != []} != stored:
        await core.database.write(
            lambda s: fleet.set_inventory(s, device_id, values, replace=replace)
        )
    return Response(status_code=200)


@router.post(
    "/v2/deployments/device/deployments/next",
    response_model=Instructions,
    responses={204: {}, 401: {}},
    tags=["device"],
)
async def next_v2(
    request: Request, body: NextRequest, device_id: DeviceId, core: Shared
) -> Response:
    """Give the device its next update, with a control map if it knows them."""
    provides = {
        name: value for name, value in body.device_provides.items() if isinstance(value, str)
    }
    return await _next(request, core, device_id, provides, maps=body.update_control_map)


@router.post(
    "/v1/deployments/device/deployments/next",
    response_model=Instructions,
    responses={204: {}, 401: {}},
    tags=["device"],
)
async def next_v1_post(
    request: Request,
    provides: Annotated[dict[Text, Text | list[Text]], Field(max_length=512)],
    device_id: DeviceId,
    core: Shared,
) -> Response:
    """As v2, with flat provides."""
    texts = {name: value for name, value in provides.items() if isinstance(value, str)}
    return await _next(request, core, device_id, texts, maps=False)


@router.get(
    "/v1/deployments/device/deployments/next",
    response_model=Instructions,
    responses={204: {}, 401: {}},
    tags=["device"],
)
async def next_v1_get(
    request: Request,
    device_id: DeviceId,
    core: Shared,
    artifact_name: Annotated[Text, Query()],
    device_type: Annotated[Text, Query()],
) -> Response:
    """As v2, for the oldest clients."""
    provides = {"artifact_name": artifact_name, "device_type": device_type}
    return await _next(request, core, device_id, provides, maps=False)


async def _next(
    request: Request, core: Core, device_id: str, provides: dict[str, str], *, maps: bool
) -> Response:
    now = core.clock()
    database = core.database
    if not await database.look_up(lambda s: deployments.has_candidates(s, device_id, now)):
        return Response(status_code=204)
    offer = await database.write(lambda s: deployments.offer(s, device_id, provides, now))
    if offer is None:
        return Response(status_code=204)
    expires = int(now) + core.settings.link_s
    signature = core.signer.link(offer.artifact_id, expires)
    base = core.settings.public_url or f"https://{request.url.netloc}"
    answer: dict[str, Any] = {
        "id": offer.deployment_id,
        "artifact": {
            "artifact_name": offer.artifact_name,
            "device_types_compatible": list(offer.device_types),
            "source": {
                "uri": f"{base}/api/devices/v1/download/{offer.artifact_id}"
                f"?expires={expires}&signature={signature}",
                "expire": _iso(expires),
            },
        },
    }
    if maps and offer.control_map is not None:
        answer["update_control_map"] = offer.control_map
    return Response(json.dumps(answer), media_type="application/json")


@router.get(
    "/v2/deployments/device/deployments/{deployment_id}/update_control_map",
    responses={204: {}, 401: {}, 404: {}},
    tags=["device"],
)
async def control_map(deployment_id: Identifier, device_id: DeviceId, core: Shared) -> Response:
    """Return the present control map of a deployment in progress."""
    found = await core.database.read(
        lambda s: deployments.device_control_map(s, device_id, deployment_id)
    )
    if found is None:
        return Response(status_code=204)
    return Response(json.dumps({"update_control_map": found}), media_type="application/json")


@router.put(
    "/v1/deployments/device/deployments/{deployment_id}/status",
    status_code=204,
    responses={401: {}, 404: {}, 409: {}},
    tags=["device"],
)
async def put_status(
    deployment_id: Identifier, report: StatusReport, device_id: DeviceId, core: Shared
) -> Response:
    """Take a progress report; 409 tells the device that the deployment was aborted."""
    if report.status not in REPORTABLE:
        raise RefusedError(400, f"a device can't report {report.status!r}")
    substate = report.substate.replace("\0", "\ufffd") if report.substate else None
    now = core.clock()
    await core.database.write(
        lambda s: deployments.take_report(s, device_id, deployment_id, report.status, substate, now)
    )
    core.metrics.reports.labels(report.status).inc()
    return Response(status_code=204)


@router.put(
    "/v1/deployments/device/deployments/{deployment_id}/log",
    status_code=204,
    responses={401: {}, 404: {}, 413: {}},
    tags=["device"],
)
async def put_log(
    deployment_id: Identifier, log: DeviceLog, device_id: DeviceId, core: Shared
) -> Response:
    """Store the log of a deployment; at most 1 MiB."""
    messages = json.dumps([message.model_dump() for message in log.messages], ensure_ascii=False)
    # A NUL is written in JSON as \u0000, which PostgreSQL's text takes; readers get it back.
    now = core.clock()
    await core.database.write(
        lambda s: deployments.take_log(s, device_id, deployment_id, messages, now)
    )
    return Response(status_code=204)


@router.head("/v1/download/{artifact_id}", include_in_schema=False)
@router.get(
    "/v1/download/{artifact_id}",
    response_class=FileResponse,
    responses={206: {}, 403: {}, 404: {}, 416: {}},
    tags=["device"],
)
async def download(
    request: Request,
    artifact_id: Identifier,
    core: Shared,
    expires: Annotated[int, Query(ge=0, le=1 << 53)],
    signature: Annotated[str, Query(max_length=128)],
) -> Response:
    """Send an artifact by its signed link, whole or in ranges (RFC 9110, section 14)."""
    if not core.signer.check_link(artifact_id, expires, signature, core.clock()):
        raise RefusedError(403, "this link is not ours, or its time is over")
    # The artifact's id is its identity and it never changes, so it is the strong validator.
    headers = {"ETag": f'"{artifact_id}"', "Cache-Control": "private, immutable"}
    path = core.store.path(artifact_id)
    if path is None:
        return await _from_store(request, core, artifact_id, headers)
    try:
        stat = path.stat()
    except OSError:
        raise not_found("artifact", artifact_id) from None
    return FileResponse(path, media_type=ARTIFACT_TYPE, headers=headers, stat_result=stat)


async def _from_store(
    request: Request, core: Core, artifact_id: str, headers: dict[str, str]
) -> Response:
    """Answer a download from a store that is no folder, as `FileResponse` does from one."""
    size = await asyncio.to_thread(core.store.size, artifact_id)
    if size is None:
        raise not_found("artifact", artifact_id)
    headers["Accept-Ranges"] = "bytes"
    asked = request.headers.get("range", "")
    if request.headers.get("if-range", headers["ETag"]) != headers["ETag"]:
        asked = ""
    try:
        part = parse_range(asked, size)
    except ValueError:
        return Response(status_code=416, headers={**headers, "Content-Range": f"bytes */{size}"})
    start, end = part or (0, size)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    status = 206 if part else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=ARTIFACT_TYPE)
    pieces = core.store.read(artifact_id, start, end - start)
    # The first piece before the headers: a store that does not answer is still an error then.
    first = await asyncio.to_thread(next, pieces, b"")
    return StreamingResponse(
        itertools.chain((first,), pieces), status, headers, media_type=ARTIFACT_TYPE
    )


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Read a `Range` header: first byte and the one after the last, or None for the whole.

    As RFC 9110, section 14.2, lets a server: units that it doesn't know, what it can't read and
    more than one range mean the whole. Raises ValueError for a range outside of `size` bytes.
    """
    match = _RANGE.match(header)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        start, end = max(size - int(match[2]), 0), size
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        raise ValueError(f"no byte of {size} is in {header!r}")
    return start, end


def _iso(seconds: float) -> str:
    import datetime  # noqa: PLC0415

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
