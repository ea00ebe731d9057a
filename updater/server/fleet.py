"""Devices: who they are, which keys count, what their inventory says, which groups they are in.

Jobs for the database: functions of a Session, called through `Database`. A device's status
follows from its keys: accepted if one is, else pending if one is, else rejected; a preauthorised
key becomes accepted when the device first shows it. Accepting a key of a device that has one
already replaces that one (key rotation), and the old key's tokens stop at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, bindparam, delete, exists, func, select, true, update
from sqlalchemy.orm import Session

from updater.server.audit import record
from updater.server.errors import RefusedError, conflict, invalid, not_found, require_plain
from updater.server.identity import Identity, Key
from updater.server.models import (
    Assignment,
    Attribute,
    Device,
    DeviceGroup,
    DeviceKey,
    GroupMember,
    new_id,
)
from updater.server.rollout import Status

ACCEPTED, PENDING, REJECTED, PREAUTHORIZED = "accepted", "pending", "rejected", "preauthorized"
_MAX_KEYS_PER_DEVICE = 16


class Credentials(NamedTuple):
    """A device and the key that it may use; `status` is the key's."""

    device_id: str
    key_id: str
    status: str


class Condition(NamedTuple):
    """One condition on an inventory attribute (or on `status`, `artifact_name`, `device_type`)."""

    attribute: str
    operator: str
    values: tuple[str, ...]


OPERATORS = ("=", "!=", "in", "not in", "exists", "missing", "prefix")
_COLUMNS = {
    "id": Device.id,
    "status": Device.status,
    "artifact_name": Device.artifact_name,
    "device_type": Device.device_type,
}


def find_key(session: Session, identity: Identity, key: Key) -> Credentials | None:
    """Return what is known about a device's key: two index look-ups."""
    row = session.execute(
        select(DeviceKey.device_id, DeviceKey.id, DeviceKey.status)
        .join(Device, Device.id == DeviceKey.device_id)
        .where(Device.identity_hash == identity.digest, DeviceKey.key_hash == key.digest)
    ).first()
    return None if row is None else Credentials(*row)


def key_counts(session: Session, device_id: str, key_id: str) -> bool:
    """Return whether a token for this device and key is still good."""
    found = session.connection().execute(_KEY, {"key": key_id, "device": device_id})
    return found.scalar() == ACCEPTED


# On every request of every device, so it is built once.
_KEY = select(DeviceKey.__table__.c.status).where(
    DeviceKey.__table__.c.id == bindparam("key"),
    DeviceKey.__table__.c.device_id == bindparam("device"),
)


def introduce(
    session: Session, identity: Identity, key: Key, now: float, max_pending: int
) -> Credentials:
    """Record a key that a device showed with a valid signature; return what it may do."""
    known = find_key(session, identity, key)
    if known is not None:
        if known.status == PREAUTHORIZED:
            _accept(session, known.device_id, known.key_id)
            record(session, now, "device", "device.arrive", known.device_id, key=key.digest)
            return known._replace(status=ACCEPTED)
        return known
    device = session.scalar(select(Device).where(Device.identity_hash == identity.digest))
    if device is None:
        pending = session.scalar(
            select(func.count()).select_from(
                select(Device.id).where(Device.status == PENDING).limit(max_pending).subquery()
            )
        )
        if (pending or 0) >= max_pending:
            raise RefusedError(429, "too many devices wait to be accepted", retry_after_s=300)
        device = _new_device(session, identity, PENDING, now)
    elif _key_count(session, device.id) >= _MAX_KEYS_PER_DEVICE:
        raise RefusedError(429, "this device has shown too many keys", retry_after_s=3600)
    new = _new_key(session, device.id, key, PENDING, now)
    if device.status == REJECTED:
        device.status = PENDING
    return Credentials(device.id, new.id, PENDING)


def preauthorize(session: Session, identity: Identity, key: Key, actor: str, now: float) -> str:
    """Accept a device before it first calls; return its id."""
    if session.scalar(select(Device.id).where(Device.identity_hash == identity.digest)):
        raise conflict("a device with this identity is known already")
    device = _new_device(session, identity, PREAUTHORIZED, now)
    _new_key(session, device.id, key, PREAUTHORIZED, now)
    record(session, now, actor, "device.preauthorize", device.id, identity=identity.text)
    return device.id


def accept(session: Session, device_id: str, key_id: str | None, actor: str, now: float) -> None:
    """Accept a device by its newest pending key, or by the one given."""
    _require(session, device_id)
    query = select(DeviceKey).where(DeviceKey.device_id == device_id)
    if key_id is not None:
        query = query.where(DeviceKey.id == key_id)
    else:
        query = query.order_by(
            (DeviceKey.status == PENDING).desc(), DeviceKey.created_at.desc(), DeviceKey.id
        )
    key = session.scalars(query.limit(1)).first()
    if key is None:
        raise not_found("key", key_id or device_id)
    _accept(session, device_id, key.id)
    record(session, now, actor, "device.accept", device_id, key=key.key_hash)


def reject(session: Session, device_id: str, key_id: str | None, actor: str, now: float) -> None:
    """Reject all keys of a device, or one; tokens stop at once."""
    device = _require(session, device_id)
    change = update(DeviceKey).where(DeviceKey.device_id == device_id)
    if key_id is not None:
        change = change.where(DeviceKey.id == key_id)
    if not session.execute(change.values(status=REJECTED)).rowcount:  # type: ignore[attr-defined]
        raise not_found("key", key_id or device_id)
    statuses = set(
        session.scalars(select(DeviceKey.status).where(DeviceKey.device_id == device_id))
    )
    device.status = next((s for s in (ACCEPTED, PENDING) if s in statuses), REJECTED)
    record(session, now, actor, "device.reject", device_id, key=key_id or "all")


def decommission(session: Session, device_id: str, actor: str, now: float) -> None:
    """Forget a device: keys, inventory, groups. Its history in deployments stays."""
    device = _require(session, device_id)
    session.execute(
        update(Assignment)
        .where(Assignment.device_id == device_id, Assignment.open)
        .values(status=Status.DECOMMISSIONED, open=False, finished_at=now, stalls_at=None)
    )
    record(session, now, actor, "device.decommission", device_id, identity=device.identity)
    session.execute(delete(Device).where(Device.id == device_id))


def set_inventory(
    session: Session, device_id: str, attributes: dict[str, str | list[str]], *, replace: bool
) -> None:
    """Store a device's attributes; with `replace`, those not given are forgotten."""
    stored = inventory(session, device_id)
    unwanted = [
        name
        for name, value in stored.items()
        if (name in attributes and attributes[name] != value)
        or (replace and name not in attributes)
    ]
    if unwanted:
        session.execute(
            delete(Attribute).where(Attribute.device_id == device_id, Attribute.name.in_(unwanted))
        )
    rows = []
    for name, value in attributes.items():
        if stored.get(name) == value:
            continue
        values = value if isinstance(value, list) else [value]
        rows += [
            {
                "device_id": device_id,
                "name": name,
                "position": position,
                "value": text,
                "is_list": isinstance(value, list),
            }
            for position, text in enumerate(values)
        ]
    if rows:
        session.execute(Attribute.__table__.insert(), rows)  # type: ignore[attr-defined]
    columns = {
        name: text
        for name in ("artifact_name", "device_type")
        if isinstance(text := attributes.get(name), str)
    }
    if columns:
        session.execute(update(Device).where(Device.id == device_id).values(**columns))


def inventory(session: Session, device_id: str) -> dict[str, str | list[str]]:
    """Return a device's attributes."""
    return inventories(session, [device_id]).get(device_id, {})


def inventories(
    session: Session, device_ids: Sequence[str]
) -> dict[str, dict[str, str | list[str]]]:
    """Return the attributes of several devices."""
    found: dict[str, dict[str, str | list[str]]] = {}
    rows = session.execute(
        select(
            Attribute.device_id,
            Attribute.name,
            Attribute.value,
            Attribute.is_list,
        )
        .where(Attribute.device_id.in_(device_ids))
        .order_by(Attribute.device_id, Attribute.name, Attribute.position)
    )
    for device_id, name, value, is_list in rows:
        attributes = found.setdefault(device_id, {})
        if not is_list:
            attributes[name] = value
            continue
        existing = attributes.setdefault(name, [])
        assert isinstance(existing, list)
        existing.append(value)
    return found


def matching(conditions: Sequence[Condition]) -> ColumnElement[bool]:
    """Return the SQL condition on Device that all `conditions` make; raises RefusedError(422)."""
    clauses: list[ColumnElement[bool]] = [true()]
    for attribute, operator, values in conditions:
        if operator not in OPERATORS:
            raise invalid(f"operator {operator!r}: use one of {', '.join(OPERATORS)}")
        if operator not in ("exists", "missing") and not values:
            raise invalid(f"the condition on {attribute!r} has no value")
        clauses.append(_clause(attribute, operator, values))
    result = clauses[0]
    for clause in clauses[1:]:
        result = result & clause
    return result


def _clause(attribute: str, operator: str, values: tuple[str, ...]) -> ColumnElement[bool]:
    column = _COLUMNS.get(attribute)
    if column is not None:
        return _compare(column, operator, values)
    of_device = (Attribute.device_id == Device.id) & (Attribute.name == attribute)
    if operator in ("exists", "missing"):
        found = exists().where(of_device)
        return ~found if operator == "missing" else found
    if operator in ("!=", "not in"):
        return ~exists().where(of_device & Attribute.value.in_(values))
    # A subquery over the search index, so that a rare value costs what it finds.
    return Device.id.in_(
        select(Attribute.device_id).where(
            Attribute.name == attribute, _compare(Attribute.value, operator, values)
        )
    )


def _compare(column: Any, operator: str, values: tuple[str, ...]) -> ColumnElement[bool]:
    result: ColumnElement[bool]
    if operator == "exists":
        result = column.is_not(None)
    elif operator == "missing":
        result = column.is_(None)
    elif operator == "prefix":
        result = column.startswith(values[0], autoescape=True)
    elif operator in ("!=", "not in"):
        result = column.is_(None) | column.not_in(values)
    else:
        result = column.in_(values)
    return result


def create_group(
    session: Session, name: str, conditions: list[Condition] | None, actor: str, now: float
) -> str:
    """Make a group: static without conditions, dynamic with them. Return its id."""
    require_plain("group", name)
    if session.scalar(select(DeviceGroup.id).where(DeviceGroup.name == name)):
        raise conflict(f"a group named {name!r} exists")
    stored = None
    if conditions is not None:
        matching(conditions)
        stored = [[c.attribute, c.operator, list(c.values)] for c in conditions]
    group = DeviceGroup(id=new_id(), name=name, filter=stored, created_at=now)
    session.add(group)
    record(session, now, actor, "group.create", group.id, name=name, filter=stored)
    return group.id


def delete_group(session: Session, name: str, actor: str, now: float) -> None:
    """Delete a group; its devices stay."""
    group = require_group(session, name)
    record(session, now, actor, "group.delete", group.id, name=name)
    session.execute(delete(DeviceGroup).where(DeviceGroup.id == group.id))


def change_members(
    session: Session, name: str, add: list[str], remove: list[str], actor: str, now: float
) -> None:
    """Put devices into a static group and take others out."""
    group = require_group(session, name)
    if group.filter is not None:
        raise conflict(f"group {name!r} is dynamic: its filter says who is in it")
    known = set(session.scalars(select(Device.id).where(Device.id.in_(add))))
    if missing := [device for device in add if device not in known]:
        raise not_found("device", missing[0])
    present = set(
        session.scalars(select(GroupMember.device_id).where(GroupMember.group_id == group.id))
    )
    session.add_all(
        GroupMember(group_id=group.id, device_id=device) for device in set(add) - present
    )
    if remove:
        session.execute(
            delete(GroupMember).where(
                GroupMember.group_id == group.id, GroupMember.device_id.in_(remove)
            )
        )
    record(session, now, actor, "group.members", group.id, name=name, add=add, remove=remove)


def require_group(session: Session, name: str) -> DeviceGroup:
    """Return the group or raise 404."""
    group = session.scalar(select(DeviceGroup).where(DeviceGroup.name == name))
    if group is None:
        raise not_found("group", name)
    return group


def in_group(session: Session, name: str) -> ColumnElement[bool]:
    """Return the SQL condition on Device for a group's members now."""
    group = require_group(session, name)
    if group.filter is None:
        return Device.id.in_(select(GroupMember.device_id).where(GroupMember.group_id == group.id))
    return matching([Condition(a, o, tuple(v)) for a, o, v in group.filter])


def note_seen(session: Session, seen: dict[str, float]) -> None:
    """Store when devices last called."""
    if seen:
        session.execute(
            update(Device),
            [{"id": device_id, "seen_at": at} for device_id, at in seen.items()],
        )


def _require(session: Session, device_id: str) -> Device:
    device = session.get(Device, device_id)
    if device is None:
        raise not_found("device", device_id)
    return device


def _accept(session: Session, device_id: str, key_id: str) -> None:
    session.execute(
        update(DeviceKey)
        .where(DeviceKey.device_id == device_id, DeviceKey.status == ACCEPTED)
        .values(status=REJECTED)
    )
    session.execute(update(DeviceKey).where(DeviceKey.id == key_id).values(status=ACCEPTED))
    session.execute(update(Device).where(Device.id == device_id).values(status=ACCEPTED))


def _key_count(session: Session, device_id: str) -> int:
    query = select(func.count()).where(DeviceKey.device_id == device_id)
    return session.execute(query).scalar_one()


def _new_device(session: Session, identity: Identity, status: str, now: float) -> Device:
    device = Device(
        id=new_id(),
        identity_hash=identity.digest,
        identity=identity.text,
        status=status,
        created_at=now,
        seen_at=None,
    )
    session.add(device)
    session.flush()
    return device


def _new_key(session: Session, device_id: str, key: Key, status: str, now: float) -> DeviceKey:
    new = DeviceKey(
        id=new_id(),
        device_id=device_id,
        key_hash=key.digest,
        pem=key.pem,
        status=status,
        created_at=now,
    )
    session.add(new)
    session.flush()
    return new
