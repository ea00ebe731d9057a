"""What the management API and the web page show: reading jobs that return plain values."""

from __future__ import annotations

import datetime
import json
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from updater.server import deployments as rollouts
from updater.server import fleet, rollout
from updater.server.errors import not_found
from updater.server.models import (
    Artifact,
    Assignment,
    AssignmentEvent,
    AuditEntry,
    Deployment,
    DeploymentLog,
    Device,
    DeviceGroup,
    DeviceKey,
    GroupMember,
)

_HISTORY = 50


def iso(seconds: float | None) -> str | None:
    """Return a time as RFC 3339 in UTC."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def device_page(
    session: Session,
    conditions: list[fleet.Condition],
    *,
    group: str | None,
    after: str,
    limit: int,
) -> dict[str, Any]:
    """Return one page of devices in the order of their ids, and where the next one begins."""
    query = select(Device).where(fleet.matching(conditions)).order_by(Device.id).limit(limit + 1)
    if group is not None:
        query = query.where(fleet.in_group(session, group))
    if after:
        query = query.where(Device.id > after)
    devices = session.scalars(query).all()
    page = devices[:limit]
    attributes = fleet.inventories(session, [d.id for d in page])
    return {
        "devices": [_device(d) | {"inventory": attributes.get(d.id, {})} for d in page],
        "next": page[-1].id if len(devices) > limit else None,
    }


def _device(device: Device) -> dict[str, Any]:
    return {
        "id": device.id,
        "identity": json.loads(device.identity),
        "status": device.status,
        "artifact_name": device.artifact_name,
        "device_type": device.device_type,
        "created_at": iso(device.created_at),
        "seen_at": iso(device.seen_at),
    }


def device(session: Session, device_id: str) -> dict[str, Any]:
    """Return everything about a device; `last_failure` says why, if its last update failed."""
    found = session.get(Device, device_id)
    if found is None:
        raise not_found("device", device_id)
    keys = session.scalars(
        select(DeviceKey).where(DeviceKey.device_id == device_id).order_by(DeviceKey.created_at)
    )
    groups = session.scalars(
        select(DeviceGroup.name)
        .join(GroupMember, GroupMember.group_id == DeviceGroup.id)
        .where(GroupMember.device_id == device_id)
        .order_by(DeviceGroup.name)
    )
    history = _history(session, device_id)
    failures = (h for h in history if h["cause"])
    return {
        **_device(found),
        "keys": [
            {
                "id": key.id,
                "sha256": key.key_hash,
                "status": key.status,
                "created_at": iso(key.created_at),
            }
            for key in keys
        ],
        "inventory": fleet.inventory(session, device_id),
        "groups": list(groups),
        "history": history,
        "last_failure": next(failures, None),
    }


def _history(session: Session, device_id: str) -> list[dict[str, Any]]:
    rows = session.execute(
        select(Assignment, Deployment.name, Deployment.artifact_name, DeploymentLog.received_at)
        .join(Deployment, Deployment.id == Assignment.deployment_id)
        .outerjoin(DeploymentLog, DeploymentLog.assignment_id == Assignment.id)
        .where(Assignment.device_id == device_id)
        .order_by(Assignment.id.desc())
        .limit(_HISTORY)
    ).all()
    events: dict[int, list[dict[str, Any]]] = {}
    for event in session.scalars(
        select(AssignmentEvent)
        .where(AssignmentEvent.assignment_id.in_([row[0].id for row in rows]))
        .order_by(AssignmentEvent.id)
    ):
        events.setdefault(event.assignment_id, []).append(
            {"at": iso(event.at), "status": event.status, "substate": event.substate}
        )
    return [
        {
            **_assignment(assignment),
            "deployment": name,
            "artifact_name": artifact_name,
            "has_log": logged is not None,
            "events": events.get(assignment.id, []),
        }
        for assignment, name, artifact_name, logged in rows
    ]


def _assignment(assignment: Assignment) -> dict[str, Any]:
    return {
        "number": assignment.id,
        "deployment_id": assignment.deployment_id,
        "device_id": assignment.device_id,
        "phase": assignment.phase + 1,
        "status": assignment.status,
        "substate": assignment.substate,
        "cause": assignment.cause,
        "failed_attempts": assignment.attempts,
        "started_at": iso(assignment.started_at),
        "changed_at": iso(assignment.changed_at),
        "finished_at": iso(assignment.finished_at),
    }


def groups(session: Session) -> list[dict[str, Any]]:
    """Return all groups with how many devices each has now."""
    return [
        {
            "name": group.name,
            "filter": group.filter
            and [{"attribute": a, "operator": o, "values": v} for a, o, v in group.filter],
            "devices": session.scalar(
                select(func.count()).select_from(Device).where(fleet.in_group(session, group.name))
            ),
        }
        for group in session.scalars(select(DeviceGroup).order_by(DeviceGroup.name)).all()
    ]


def artifacts(session: Session, name: str | None, limit: int) -> list[dict[str, Any]]:
    """Return artifacts, newest first."""
    query = select(Artifact).order_by(Artifact.created_at.desc(), Artifact.id).limit(limit)
    if name is not None:
        query = query.where(Artifact.name == name)
    return [_artifact(found) for found in session.scalars(query)]


def artifact(session: Session, artifact_id: str) -> dict[str, Any]:
    """Return one artifact."""
    found = session.get(Artifact, artifact_id)
    if found is None:
        raise not_found("artifact", artifact_id)
    return _artifact(found)


def _artifact(found: Artifact) -> dict[str, Any]:
    return {
        "id": found.id,
        "name": found.name,
        "device_types": found.depends.get("device_type", []),
        "payload_type": found.payload_type,
        "size": found.size,
        "sha256": found.sha256,
        "signed": found.signed,
        "signature_checked": found.verified,
        "provides": found.provides,
        "depends": found.depends,
        "created_at": iso(found.created_at),
        "created_by": found.created_by,
    }


def deployments(session: Session, status: str | None, limit: int) -> list[dict[str, Any]]:
    """Return deployments, newest first, with their counts."""
    query = select(Deployment).order_by(Deployment.created_at.desc(), Deployment.id).limit(limit)
    if status is not None:
        query = query.where(Deployment.status == status)
    return [_deployment(session, found) for found in session.scalars(query).all()]


def deployment(session: Session, deployment_id: str) -> dict[str, Any]:
    """Return one deployment with the standing of its phases."""
    found = rollouts.require(session, deployment_id)
    phases = zip(found.plan["phases"], rollouts.tallies(session, found), strict=True)
    return {
        **_deployment(session, found),
        "plan": found.plan,
        "target": found.target,
        "phases": [
            {
                **rule,
                "open": number <= found.open_phase,
                **vars(tally),
            }
            for number, (rule, tally) in enumerate(phases)
        ],
    }


def _deployment(session: Session, found: Deployment) -> dict[str, Any]:
    by_status = rollouts.counts(session, found.id)
    return {
        "id": found.id,
        "name": found.name,
        "artifact_name": found.artifact_name,
        "status": found.status,
        "reason": found.reason,
        "devices": found.device_count,
        "open_phase": found.open_phase + 1,
        "counts": by_status,
        "succeeded": sum(by_status.get(s, 0) for s in rollout.SUCCEEDED),
        "failed": sum(by_status.get(s, 0) for s in rollout.FAILED),
        "in_progress": sum(by_status.get(s, 0) for s in rollout.STARTED),
        "created_at": iso(found.created_at),
        "created_by": found.created_by,
        "starts_at": iso(found.starts_at),
        "ends_at": iso(found.ends_at),
        "finished_at": iso(found.finished_at),
    }


def assignments(
    session: Session, deployment_id: str, status: str | None, after: int, limit: int
) -> list[dict[str, Any]]:
    """Return a page of a deployment's devices; `after` is the last page's last `number`."""
    rollouts.require(session, deployment_id)
    query = (
        select(Assignment, Device.identity, DeploymentLog.received_at)
        .outerjoin(Device, Device.id == Assignment.device_id)
        .outerjoin(DeploymentLog, DeploymentLog.assignment_id == Assignment.id)
        .where(Assignment.deployment_id == deployment_id, Assignment.id > after)
        .order_by(Assignment.id)
        .limit(limit)
    )
    if status is not None:
        query = query.where(Assignment.status == status)
    return [
        {
            **_assignment(found),
            "identity": json.loads(identity) if identity else None,
            "has_log": logged is not None,
        }
        for found, identity, logged in session.execute(query)
    ]


def log(session: Session, deployment_id: str, device_id: str) -> dict[str, Any]:
    """Return a device's log for a deployment."""
    row = session.execute(
        select(DeploymentLog, Device.identity, Deployment.name)
        .join(Assignment, Assignment.id == DeploymentLog.assignment_id)
        .join(Deployment, Deployment.id == Assignment.deployment_id)
        .outerjoin(Device, Device.id == Assignment.device_id)
        .where(Assignment.deployment_id == deployment_id, Assignment.device_id == device_id)
    ).first()
    if row is None:
        raise not_found("log", deployment_id)
    found, identity, name = row
    return {
        "received_at": iso(found.received_at),
        "messages": json.loads(found.messages),
        "identity": json.loads(identity) if identity else None,
        "deployment": name,
    }


def group_names(session: Session) -> list[str]:
    """Return the names of all groups."""
    return list(session.scalars(select(DeviceGroup.name).order_by(DeviceGroup.name)))


def latest_failures(session: Session, limit: int) -> list[dict[str, Any]]:
    """Return the last failed updates with their causes, newest first."""
    rows = session.execute(
        select(Assignment, Device.identity, Deployment.name)
        .join(Deployment, Deployment.id == Assignment.deployment_id)
        .outerjoin(Device, Device.id == Assignment.device_id)
        # Spelt out, so that the planner sees that the partial index answers it.
        .where(text("assignment.status IN ('failure', 'stalled')"))
        .order_by(Assignment.finished_at.desc())
        .limit(limit)
    )
    return [
        {
            **_assignment(found),
            "identity": json.loads(identity) if identity else None,
            "deployment": name,
        }
        for found, identity, name in rows
    ]


def audit_entry(entry: AuditEntry) -> dict[str, Any]:
    """Return one audit entry."""
    return {
        "number": entry.id,
        "at": iso(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "object": entry.object_id,
        "details": entry.details,
    }


def statistics(session: Session) -> dict[str, Any]:
    """Count devices and deployments by status."""
    return {
        "devices": _by_status(session, Device),
        "deployments": _by_status(session, Deployment),
    }


def _by_status(session: Session, table: Any) -> dict[str, int]:
    rows = session.execute(select(table.status, func.count()).group_by(table.status))
    return {str(status): int(count) for status, count in rows}
