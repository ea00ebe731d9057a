"""Deployments in the database: made, offered to devices, reported on, driven forward.

`updater.server.rollout` decides; here its decisions are carried out, each in one transaction.
A phase is let go by raising `deployment.open_phase`: one row, however many devices. Devices are
put into phases in an order that is random but fixed by the deployment's id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, bindparam, func, insert, select, true, update
from sqlalchemy.orm import Session

from updater.server import artifacts, fleet, rollout
from updater.server.audit import SYSTEM, record
from updater.server.errors import RefusedError, conflict, invalid, not_found
from updater.server.models import (
    Artifact,
    Assignment,
    AssignmentEvent,
    Deployment,
    DeploymentLog,
    Device,
    new_id,
)
from updater.server.rollout import Phase, Status, Tally, Window

SCHEDULED, RUNNING, PAUSED = "scheduled", "running", "paused"
FINISHED, STOPPED, ABORTED = "finished", "stopped", "aborted"
LIVE = (SCHEDULED, RUNNING, PAUSED)
# Up to this many devices a deployment is judged at every report; above, when one fails and at
# every tick, because counting costs as much as there are devices.
_JUDGED_AT_ONCE = 200
_STALLED_AT_ONCE = 500
_MAX_CANDIDATES = 16
_MAX_SUBSTATE = 4096


class Plan(NamedTuple):
    """How a deployment rolls out; what `Deployment.plan` holds as JSON."""

    phases: tuple[Phase, ...] = (Phase(),)
    max_failure_percent: float = 100.0
    retries: int = 0
    retry_delay_s: float = 60.0
    stall_s: float = 86_400.0
    window: Window | None = None
    control_map: dict[str, Any] | None = None


class Target(NamedTuple):
    """Which devices: `kind` is all, devices, group or filter; only accepted ones count."""

    kind: str
    devices: tuple[str, ...] = ()
    group: str = ""
    conditions: tuple[fleet.Condition, ...] = ()


class Offer(NamedTuple):
    """What a device is given to install."""

    deployment_id: str
    artifact_id: str
    artifact_name: str
    device_types: tuple[str, ...]
    control_map: dict[str, Any] | None


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as the database keeps it."""
    return {
        **plan._asdict(),
        "phases": [vars(phase) for phase in plan.phases],
        "window": vars(plan.window) if plan.window else None,
    }


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Return the plan that `plan_to_json` wrote."""
    window = value["window"]
    return Plan(
        **{
            **value,
            "phases": tuple(Phase(**phase) for phase in value["phases"]),
            "window": Window(**{**window, "days": tuple(window["days"])}) if window else None,
        }
    )


def create(
    session: Session,
    *,
    name: str,
    artifact_name: str,
    target: Target,
    plan: Plan,
    starts_at: float,
    ends_at: float,
    actor: str,
    now: float,
) -> str:
    """Make a deployment; it starts at once if `starts_at` is not in the future. Return its id."""
    found = select(Artifact.id).where(Artifact.name == artifact_name).limit(1)
    if session.scalar(found) is None:
        raise invalid(f"no artifact is named {artifact_name!r}")
    if ends_at <= max(starts_at, now):
        raise invalid("the deployment would end before it starts")
    count = session.scalar(
        select(func.count()).select_from(Device).where(_targeted(session, target))
    )
    if not count and starts_at <= now:
        raise invalid("no accepted device is in the target")
    deployment = Deployment(
        id=new_id(),
        name=name,
        artifact_name=artifact_name,
        status=SCHEDULED,
        target={
            "kind": target.kind,
            "devices": list(target.devices),
            "group": target.group,
            "conditions": [[c.attribute, c.operator, list(c.values)] for c in target.conditions],
        },
        plan=plan_to_json(plan),
        open_phase=-1,
        created_at=now,
        created_by=actor,
        starts_at=starts_at,
        ends_at=ends_at,
    )
    session.add(deployment)
    session.flush()
    record(
        session, now, actor, "deployment.create", deployment.id, name=name, artifact=artifact_name
    )
    if starts_at <= now:
        _start(session, deployment, now)
    return deployment.id


def abort(session: Session, deployment_id: str, actor: str, now: float) -> None:
    """End a deployment; devices in the middle get 409 at their next report."""
    deployment = require(session, deployment_id)
    if deployment.status not in LIVE:
        raise conflict(f"the deployment is {deployment.status} already")
    record(session, now, actor, "deployment.abort", deployment_id)
    _end(session, deployment, ABORTED, f"aborted by {actor}", Status.ABORTED, now)


def pause(session: Session, deployment_id: str, actor: str, now: float, *, paused: bool) -> None:
    """Stop offering a running deployment, or offer it again; started devices go on."""
    deployment = require(session, deployment_id)
    wanted = RUNNING if paused else PAUSED
    if deployment.status != wanted:
        raise conflict(f"the deployment is {deployment.status}, not {wanted}")
    deployment.status = PAUSED if paused else RUNNING
    record(
        session, now, actor, "deployment.pause" if paused else "deployment.resume", deployment_id
    )


def require(session: Session, deployment_id: str) -> Deployment:
    """Return the deployment or raise 404."""
    deployment = session.get(Deployment, deployment_id)
    if deployment is None:
        raise not_found("deployment", deployment_id)
    return deployment


def has_candidates(session: Session, device_id: str, now: float) -> bool:
    """Return whether a poll needs more than this look-up: the answer is mostly no."""
    rows = session.connection().execute(_POLL, {"device": device_id}).all()
    return any(
        not_before <= now
        and (status != Status.PENDING or rollout.in_window(plan_from_json(plan).window, now))
        for status, not_before, plan in rows
    )


def offer(
    session: Session, device_id: str, provides: Mapping[str, str], now: float
) -> Offer | None:
    """Give a polling device its next update, oldest deployment first; settle what can't be."""
    for assignment, deployment in session.execute(_OPEN, {"device": device_id}).all():
        plan = plan_from_json(deployment.plan)
        pending = assignment.status == Status.PENDING
        if assignment.not_before > now or (pending and not rollout.in_window(plan.window, now)):
            continue
        if provides.get("artifact_name") == deployment.artifact_name:
            status = Status.ALREADY_INSTALLED if pending else Status.SUCCESS
            _settle(session, deployment, assignment, status, "the device runs it", now)
            continue
        artifact = artifacts.for_device(
            session,
            deployment.artifact_name,
            provides.get("device_type", ""),
            dict(provides),
        )
        if artifact is None:
            cause = (
                f"no artifact {deployment.artifact_name!r} fits device type "
                f"{provides.get('device_type', '')!r} and what the device provides"
            )
            assignment.cause = cause
            _settle(session, deployment, assignment, Status.NO_ARTIFACT, cause, now)
            continue
        if assignment.artifact_id is None:
            assignment.artifact_id = artifact.id
            assignment.started_at = now
            assignment.stalls_at = now + plan.stall_s
        return Offer(
            deployment.id,
            artifact.id,
            artifact.name,
            tuple(artifact.depends.get("device_type", ())),
            control_map_of(deployment),
        )
    return None


def control_map_of(deployment: Deployment) -> dict[str, Any] | None:
    """Return the update control map as the device wants it."""
    control_map = deployment.plan.get("control_map")
    return None if control_map is None else {**control_map, "id": deployment.id}


def device_control_map(
    session: Session, device_id: str, deployment_id: str
) -> dict[str, Any] | None:
    """Return the present control map of a device's deployment, or raise 404."""
    _, deployment = _of_device(session, device_id, deployment_id)
    return control_map_of(deployment)


def take_report(
    session: Session,
    device_id: str,
    deployment_id: str,
    status: Status,
    substate: str | None,
    now: float,
) -> None:
    """Apply a device's report. Raises RefusedError: 404 for others' deployments, 409 if aborted."""
    assignment, deployment = _of_device(session, device_id, deployment_id)
    current = Status(assignment.status)
    if current in (Status.ABORTED, Status.DECOMMISSIONED):
        raise RefusedError(409, "this deployment was aborted")
    plan = plan_from_json(deployment.plan)
    change = rollout.report(
        current,
        status,
        assignment.attempts,
        plan.retries if deployment.status in (RUNNING, PAUSED) else 0,
        offered=assignment.artifact_id is not None,
    )
    text = substate[:_MAX_SUBSTATE] if substate else None
    if change is None:
        if text and text != assignment.substate and current in rollout.UNSETTLED:
            assignment.substate = text
        return
    _event(session, assignment, status, text, now)
    if status == Status.FAILURE:
        assignment.cause = text or f"the device failed while {current}"
    _apply(session, deployment, assignment, change, plan, text, now)


def take_log(
    session: Session, device_id: str, deployment_id: str, messages: str, now: float
) -> None:
    """Store a device's deployment log (JSON text); the newest one counts."""
    assignment, _ = _of_device(session, device_id, deployment_id)
    session.merge(DeploymentLog(assignment_id=assignment.id, received_at=now, messages=messages))


def tallies(session: Session, deployment: Deployment) -> list[Tally]:
    """Return how each phase stands."""
    result = [Tally() for _ in deployment.plan["phases"]]
    rows = session.execute(
        select(Assignment.phase, Assignment.status, func.count())
        .where(Assignment.deployment_id == deployment.id)
        .group_by(Assignment.phase, Assignment.status)
    )
    for phase, status, count in rows:
        result[phase] += Tally(
            count,
            count * (status in rollout.SUCCEEDED),
            count * (status in rollout.FAILED),
            count * (status in rollout.UNSETTLED),
        )
    return result


def counts(session: Session, deployment_id: str) -> dict[str, int]:
    """Return how many devices have each status."""
    rows = session.execute(
        select(Assignment.status, func.count())
        .where(Assignment.deployment_id == deployment_id)
        .group_by(Assignment.status)
    ).all()
    return {status: count for status, count in rows}  # noqa: C416 - rows are not pairs for mypy


def tick(session: Session, now: float) -> None:
    """Do what time asks for: start, time out, open phases, finish. Runs under the lease."""
    due = select(Deployment).where(Deployment.status == SCHEDULED, Deployment.starts_at <= now)
    for deployment in session.scalars(due).all():
        _start(session, deployment, now)
    stalled = session.scalars(
        select(Assignment)
        .where(Assignment.stalls_at.is_not(None), Assignment.stalls_at <= now)
        .order_by(Assignment.stalls_at)
        .limit(_STALLED_AT_ONCE)
    ).all()
    for assignment in stalled:
        _stall(session, assignment, now)
    running = select(Deployment).where(Deployment.status.in_((RUNNING, PAUSED)))
    for deployment in session.scalars(running).all():
        if deployment.ends_at <= now:
            _end(session, deployment, FINISHED, "its time is over", Status.EXPIRED, now)
        else:
            judge(session, deployment, now)


def judge(session: Session, deployment: Deployment, now: float) -> None:
    """Carry out what `rollout.decide` says about a running deployment."""
    if deployment.status not in (RUNNING, PAUSED):
        return
    session.flush()
    plan = plan_from_json(deployment.plan)
    standing = tallies(session, deployment)
    while True:
        decision = rollout.decide(
            plan.phases,
            standing,
            deployment.open_phase,
            deployment.phase_opened_at or now,
            plan.max_failure_percent,
            now,
        )
        if isinstance(decision, rollout.Open):
            if deployment.status == PAUSED:
                return
            deployment.open_phase = decision.phase
            deployment.phase_opened_at = now
            record(
                session, now, SYSTEM, "deployment.phase", deployment.id, phase=decision.phase + 1
            )
            continue
        if isinstance(decision, rollout.Stop):
            record(session, now, SYSTEM, "deployment.stop", deployment.id, reason=decision.reason)
            _end(session, deployment, STOPPED, decision.reason, Status.ABORTED, now)
        elif isinstance(decision, rollout.Finish):
            record(session, now, SYSTEM, "deployment.finish", deployment.id)
            _end(session, deployment, FINISHED, None, Status.EXPIRED, now)
        return


_OPEN = (
    select(Assignment, Deployment)
    .join(Deployment, Deployment.id == Assignment.deployment_id)
    .where(
        Assignment.device_id == bindparam("device"),
        Assignment.open,
        Assignment.phase <= Deployment.open_phase,
        Deployment.status == RUNNING,
    )
    .order_by(Deployment.created_at, Deployment.id)
    .limit(_MAX_CANDIDATES)
)
# On every poll of every device, so it is built once: answered by the index `assignment_open`.
_POLL = _OPEN.with_only_columns(Assignment.status, Assignment.not_before, Deployment.plan)


def _of_device(
    session: Session, device_id: str, deployment_id: str
) -> tuple[Assignment, Deployment]:
    row = session.execute(
        select(Assignment, Deployment)
        .join(Deployment, Deployment.id == Assignment.deployment_id)
        .where(Assignment.deployment_id == deployment_id, Assignment.device_id == device_id)
    ).first()
    if row is None:
        raise not_found("deployment", deployment_id)
    return row[0], row[1]


def _targeted(session: Session, target: Target) -> ColumnElement[bool]:
    accepted = Device.status == fleet.ACCEPTED
    if target.kind == "devices":
        return accepted & Device.id.in_(target.devices)
    if target.kind == "group":
        return accepted & fleet.in_group(session, target.group)
    if target.kind == "filter":
        return accepted & fleet.matching(target.conditions)
    return accepted & true()


def _start(session: Session, deployment: Deployment, now: float) -> None:
    """Resolve the target, divide it into phases, open the first."""
    stored = deployment.target
    target = Target(
        stored["kind"],
        tuple(stored["devices"]),
        stored["group"],
        tuple(fleet.Condition(a, o, tuple(v)) for a, o, v in stored["conditions"]),
    )
    try:
        where = _targeted(session, target)
    except RefusedError as error:
        # A group that was deleted in the meantime.
        _end(session, deployment, STOPPED, error.message, Status.ABORTED, now)
        return
    devices = list(session.scalars(select(Device.id).where(where)))
    devices.sort(key=lambda device: hashlib.sha256((deployment.id + device).encode()).digest())
    plan = plan_from_json(deployment.plan)
    sizes = rollout.phase_sizes(plan.phases, len(devices))
    phases = [phase for phase, size in enumerate(sizes) for _ in range(size)]
    rows = [
        {
            "deployment_id": deployment.id,
            "device_id": device,
            "phase": phase,
            "open": True,
            "status": Status.PENDING,
            "attempts": 0,
            "not_before": 0.0,
            "changed_at": now,
        }
        for device, phase in zip(devices, phases, strict=True)
    ]
    if rows:
        session.execute(insert(Assignment), rows)
    deployment.device_count = len(rows)
    deployment.status = RUNNING
    record(session, now, SYSTEM, "deployment.start", deployment.id, devices=len(rows))
    judge(session, deployment, now)


def _stall(session: Session, assignment: Assignment, now: float) -> None:
    deployment = require(session, assignment.deployment_id)
    plan = plan_from_json(deployment.plan)
    cause = f"no word from the device for {plan.stall_s:g} s while {assignment.status}"
    assignment.cause = cause
    _event(session, assignment, Status.STALLED, cause, now)
    change = rollout.failed_attempt(Status.STALLED, assignment.attempts, plan.retries)
    _apply(session, deployment, assignment, change, plan, None, now)


def _settle(
    session: Session,
    deployment: Deployment,
    assignment: Assignment,
    status: Status,
    substate: str,
    now: float,
) -> None:
    _event(session, assignment, status, substate, now)
    change = rollout.Change(status, False, assignment.attempts)
    _apply(session, deployment, assignment, change, plan_from_json(deployment.plan), None, now)


def _apply(
    session: Session,
    deployment: Deployment,
    assignment: Assignment,
    change: rollout.Change,
    plan: Plan,
    substate: str | None,
    now: float,
) -> None:
    again = change.status == Status.PENDING
    assignment.status = change.status
    assignment.open = change.open
    assignment.attempts = change.attempts
    assignment.substate = substate
    assignment.changed_at = now
    assignment.finished_at = None if change.open else now
    assignment.stalls_at = now + plan.stall_s if change.open and not again else None
    if again:
        assignment.artifact_id = None
        assignment.not_before = now + rollout.retry_delay_s(change.attempts, plan.retry_delay_s)
    if change.status in rollout.SUCCEEDED:
        assignment.cause = None
    failed = change.status in rollout.FAILED
    if not change.open and (failed or deployment.device_count <= _JUDGED_AT_ONCE):
        judge(session, deployment, now)


def _end(
    session: Session,
    deployment: Deployment,
    status: str,
    reason: str | None,
    rest: Status,
    now: float,
) -> None:
    session.flush()
    session.execute(
        update(Assignment)
        .where(Assignment.deployment_id == deployment.id, Assignment.open)
        .values(status=rest, open=False, finished_at=now, changed_at=now, stalls_at=None)
        .execution_options(synchronize_session=False)
    )
    deployment.status = status
    deployment.reason = reason
    deployment.finished_at = now
    session.flush()
    session.expire_all()


def _event(
    session: Session, assignment: Assignment, status: Status, substate: str | None, now: float
) -> None:
    session.add(
        AssignmentEvent(assignment_id=assignment.id, at=now, status=status, substate=substate)
    )
