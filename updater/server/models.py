"""The tables. What each row means, which index answers which question; no behaviour.

Times are seconds since the epoch, UTC (`…_at`), durations seconds (`…_s`). Identifiers are random
UUIDs as text, so that workers make them without asking each other. The two questions that every
poll asks are answered by an index whatever the size of the fleet: a device's key by its primary
key, and a device's open assignments by `assignment_open`, which holds open rows only.
"""

from __future__ import annotations

import uuid
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAMES = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


def new_id() -> str:
    """Return a fresh random identifier."""
    return str(uuid.uuid4())


class Base(DeclarativeBase):
    """Common base; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(naming_convention=_NAMES)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, float: Float(53)}  # noqa: RUF012


class Device(Base):
    """One device, known by its identity data. `status` is derived from its keys."""

    __tablename__ = "device"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    identity_hash: Mapped[str] = mapped_column(String(64), unique=True)
    identity: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16), index=True)
    created_at: Mapped[float]
    seen_at: Mapped[float | None] = mapped_column(index=True)
    artifact_name: Mapped[str | None] = mapped_column(String(256))
    device_type: Mapped[str | None] = mapped_column(String(256))


class DeviceKey(Base):
    """A public key that a device showed, and what an operator decided about it."""

    __tablename__ = "device_key"
    __table_args__ = (UniqueConstraint("device_id", "key_hash"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    device_id: Mapped[str] = mapped_column(ForeignKey("device.id", ondelete="CASCADE"))
    key_hash: Mapped[str] = mapped_column(String(64))
    pem: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[float]


class Attribute(Base):
    """One value of one inventory attribute; lists have several rows."""

    __tablename__ = "attribute"
    __table_args__ = (Index("attribute_search", "name", "value", "device_id"),)

    device_id: Mapped[str] = mapped_column(
        ForeignKey("device.id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    value: Mapped[str] = mapped_column(String(1024))
    is_list: Mapped[bool] = mapped_column(Boolean, default=False)


class DeviceGroup(Base):
    """A named set of devices: `filter` is null for a static group."""

    __tablename__ = "device_group"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    filter: Mapped[list[Any] | None]
    created_at: Mapped[float]


class GroupMember(Base):
    """A device in a static group."""

    __tablename__ = "group_member"

    group_id: Mapped[str] = mapped_column(
        ForeignKey("device_group.id", ondelete="CASCADE"), primary_key=True
    )
    device_id: Mapped[str] = mapped_column(
        ForeignKey("device.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class Artifact(Base):
    """One validated, durable artifact file; `file` is its name in the store."""

    __tablename__ = "artifact"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(256), index=True)
    file: Mapped[str] = mapped_column(String(64))
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    payload_type: Mapped[str] = mapped_column(String(64))
    signed: Mapped[bool]
    verified: Mapped[bool]
    provides: Mapped[dict[str, Any]]
    depends: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(128))


class ArtifactDeviceType(Base):
    """Which device types an artifact serves; a name is unique for each of them."""

    __tablename__ = "artifact_device_type"

    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    device_type: Mapped[str] = mapped_column(String(256), primary_key=True)
    artifact_id: Mapped[str] = mapped_column(
        ForeignKey("artifact.id", ondelete="CASCADE"), index=True
    )


class Deployment(Base):
    """One artifact name for a set of devices; `open_phase` is the last phase let go (-1: none)."""

    __tablename__ = "deployment"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(256))
    artifact_name: Mapped[str] = mapped_column(String(256), index=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    target: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any]]
    open_phase: Mapped[int] = mapped_column(Integer, default=-1)
    phase_opened_at: Mapped[float | None]
    device_count: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(String(128))
    starts_at: Mapped[float]
    ends_at: Mapped[float]
    finished_at: Mapped[float | None]
    reason: Mapped[str | None] = mapped_column(Text)


class Assignment(Base):
    """One device in one deployment. `open` is true until nothing more is expected."""

    __tablename__ = "assignment"
    __table_args__ = (
        UniqueConstraint("deployment_id", "device_id"),
        Index(
            "assignment_open",
            "device_id",
            "deployment_id",
            sqlite_where=text("open = 1"),
            postgresql_where=text("open"),
        ),
        Index("assignment_tally", "deployment_id", "phase", "status"),
        Index(
            "assignment_stalled",
            "stalls_at",
            sqlite_where=text("stalls_at IS NOT NULL"),
            postgresql_where=text("stalls_at IS NOT NULL"),
        ),
        Index("assignment_history", "device_id", "id"),
        Index(
            "assignment_failed",
            "finished_at",
            sqlite_where=text("status IN ('failure', 'stalled')"),
            postgresql_where=text("status IN ('failure', 'stalled')"),
        ),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    deployment_id: Mapped[str] = mapped_column(ForeignKey("deployment.id", ondelete="CASCADE"))
    device_id: Mapped[str] = mapped_column(String(36))
    phase: Mapped[int] = mapped_column(Integer)
    open: Mapped[bool] = mapped_column(Boolean)
    status: Mapped[str] = mapped_column(String(32))
    substate: Mapped[str | None] = mapped_column(Text)
    cause: Mapped[str | None] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    not_before: Mapped[float] = mapped_column(default=0.0)
    artifact_id: Mapped[str | None] = mapped_column(String(36), index=True)
    started_at: Mapped[float | None]
    changed_at: Mapped[float]
    finished_at: Mapped[float | None]
    stalls_at: Mapped[float | None]


class AssignmentEvent(Base):
    """One change of an assignment, kept for the device's history."""

    __tablename__ = "assignment_event"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    assignment_id: Mapped[int] = mapped_column(
        ForeignKey("assignment.id", ondelete="CASCADE"), index=True
    )
    at: Mapped[float]
    status: Mapped[str] = mapped_column(String(32))
    substate: Mapped[str | None] = mapped_column(Text)


class DeploymentLog(Base):
    """The log that a device sent for an assignment: JSON text of its messages."""

    __tablename__ = "deployment_log"

    assignment_id: Mapped[int] = mapped_column(
        ForeignKey("assignment.id", ondelete="CASCADE"), primary_key=True
    )
    received_at: Mapped[float]
    messages: Mapped[str] = mapped_column(Text)


class User(Base):
    """A person or program that manages the fleet."""

    __tablename__ = "account"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    password: Mapped[str] = mapped_column(String(256))
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[float]


class Credential(Base):
    """A bearer secret of a user, stored as its SHA-256: an API token or a browser session."""

    __tablename__ = "credential"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("account.id", ondelete="CASCADE"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    label: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[float]
    expires_at: Mapped[float]


class LoginFailure(Base):
    """Failed logins of one name or address in the present window."""

    __tablename__ = "login_failure"

    key: Mapped[str] = mapped_column(String(256), primary_key=True)
    failures: Mapped[int] = mapped_column(Integer)
    until: Mapped[float]


class AuditEntry(Base):
    """Who changed what, when."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    object_id: Mapped[str] = mapped_column(String(256), index=True)
    details: Mapped[dict[str, Any]]


class Lease(Base):
    """Which worker does a job that must run once, and until when."""

    __tablename__ = "lease"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    until: Mapped[float]
