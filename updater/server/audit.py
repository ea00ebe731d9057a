"""The audit log: one entry for each change, written in the change's own transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from updater.server.models import AuditEntry

# The actor of what the server does by itself.
SYSTEM = "server"


def record(
    session: Session, at: float, actor: str, action: str, object_id: str, **details: Any
) -> None:
    """Add an entry: `actor` did `action` (like "device.accept") to `object_id`."""
    session.add(AuditEntry(at=at, actor=actor, action=action, object_id=object_id, details=details))
