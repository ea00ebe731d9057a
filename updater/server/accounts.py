"""Who may manage the fleet: users with roles, passwords, API tokens, browser sessions.

Passwords are hashed by argon2id (argon2-cffi's defaults, RFC 9106); bearer secrets are 256 random
bits, stored as SHA-256. Failed logins are counted in the database for the name and for the
address, so that the limit holds over all workers.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

import argon2
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from updater.server.audit import record
from updater.server.errors import RefusedError, conflict, invalid, not_found, require_plain
from updater.server.models import Credential, LoginFailure, User, new_id

ROLES = ("viewer", "operator", "admin")
TOKEN, SESSION = "token", "session"
MIN_PASSWORD = 10
_MAX_FAILURES = 10
_FAILURE_WINDOW_S = 900.0
_MAX_ADDRESS_FAILURES = 100
_HASHER = argon2.PasswordHasher()
# Checked when the name is unknown, so that the answer takes as long.
_NOBODY = _HASHER.hash(secrets.token_hex(16))


class Actor(NamedTuple):
    """A user who was recognised."""

    user_id: str
    name: str
    role: str
    credential_id: str = ""

    def may(self, role: str) -> bool:
        """Return whether this user's role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


def check_password(stored: str | None, password: str) -> bool:
    """Compare slowly, as argon2 does; call it in a thread and outside a transaction."""
    try:
        _HASHER.verify(stored or _NOBODY, password)
    except argon2.exceptions.VerificationError:
        return False
    return stored is not None


def hash_password(password: str) -> str:
    """Return a password's hash; refuses a short one."""
    if not MIN_PASSWORD <= len(password) <= 1024:
        raise invalid(f"a password has {MIN_PASSWORD} to 1024 characters")
    return _HASHER.hash(password)


def create_user(
    session: Session, name: str, password_hash: str, role: str, actor: str, now: float
) -> str:
    """Add a user; return the id."""
    if role not in ROLES:
        raise invalid(f"role {role!r}: use one of {', '.join(ROLES)}")
    require_plain("user", name)
    if session.scalar(select(User.id).where(User.name == name)):
        raise conflict(f"a user named {name!r} exists")
    user = User(id=new_id(), name=name, password=password_hash, role=role, created_at=now)
    session.add(user)
    record(session, now, actor, "user.create", user.id, name=name, role=role)
    return user.id


def change_user(
    session: Session,
    name: str,
    actor: str,
    now: float,
    *,
    password_hash: str | None = None,
    role: str | None = None,
) -> None:
    """Change a user's password (which ends the sessions) or role."""
    user = require_user(session, name)
    if role is not None:
        if role not in ROLES:
            raise invalid(f"role {role!r}: use one of {', '.join(ROLES)}")
        if user.role == "admin" and role != "admin":
            _keep_an_admin(session, user)
        user.role = role
    if password_hash is not None:
        user.password = password_hash
        session.execute(
            delete(Credential).where(Credential.user_id == user.id, Credential.kind == SESSION)
        )
    record(
        session, now, actor, "user.change", user.id, role=role, password=password_hash is not None
    )


def delete_user(session: Session, name: str, actor: str, now: float) -> None:
    """Delete a user with all tokens; the last admin stays."""
    user = require_user(session, name)
    _keep_an_admin(session, user)
    record(session, now, actor, "user.delete", user.id, name=name)
    session.execute(delete(User).where(User.id == user.id))


def require_user(session: Session, name: str) -> User:
    """Return the user or raise 404."""
    user = session.scalar(select(User).where(User.name == name))
    if user is None:
        raise not_found("user", name)
    return user


def grant(
    session: Session, user_id: str, kind: str, label: str, now: float, lifetime_s: float
) -> str:
    """Make a bearer secret for a user and return it; only its hash is kept."""
    secret = f"brownout_{secrets.token_urlsafe(32)}"
    session.add(
        Credential(
            id=new_id(),
            secret_hash=_digest(secret),
            user_id=user_id,
            kind=kind,
            label=label,
            created_at=now,
            expires_at=now + lifetime_s,
        )
    )
    return secret


def recognise(session: Session, secret: str, kind: str | None, now: float) -> Actor | None:
    """Return whose bearer secret this is, or None."""
    query = (
        select(User.id, User.name, User.role, Credential.id)
        .join(User, User.id == Credential.user_id)
        .where(Credential.secret_hash == _digest(secret), Credential.expires_at > now)
    )
    if kind is not None:
        query = query.where(Credential.kind == kind)
    row = session.execute(query).first()
    return None if row is None else Actor(*row)


def revoke(
    session: Session, credential_id: str, user_id: str | None, actor: str, now: float
) -> None:
    """Delete a bearer secret (of `user_id`, or of anybody)."""
    query = delete(Credential).where(Credential.id == credential_id)
    if user_id is not None:
        query = query.where(Credential.user_id == user_id)
    if not session.execute(query).rowcount:  # type: ignore[attr-defined]
        raise not_found("token", credential_id)
    record(session, now, actor, "token.delete", credential_id)


def check_rate(session: Session, name: str, address: str, now: float) -> None:
    """Refuse a login after too many failures. Raises RefusedError(429)."""
    for key, limit in _limits(name, address):
        row = session.get(LoginFailure, key)
        if row is not None and row.until > now and row.failures >= limit:
            raise RefusedError(
                429, "too many failed logins; wait", retry_after_s=int(row.until - now) + 1
            )


def note_failure(session: Session, name: str, address: str, now: float) -> None:
    """Count a failed login."""
    for key, _ in _limits(name, address):
        row = session.get(LoginFailure, key)
        if row is None:
            session.add(LoginFailure(key=key, failures=1, until=now + _FAILURE_WINDOW_S))
        elif row.until <= now:
            row.failures, row.until = 1, now + _FAILURE_WINDOW_S
        else:
            session.execute(
                update(LoginFailure)
                .where(LoginFailure.key == key)
                .values(failures=LoginFailure.failures + 1)
            )
    record(session, now, name[:128], "login.fail", address)


def purge(session: Session, now: float) -> None:
    """Forget expired secrets and failures."""
    session.execute(delete(Credential).where(Credential.expires_at <= now))
    session.execute(delete(LoginFailure).where(LoginFailure.until <= now))


def _limits(name: str, address: str) -> tuple[tuple[str, int], tuple[str, int]]:
    # The name is hashed: it is whatever somebody typed.
    return (
        (f"name:{hashlib.sha256(name.encode()).hexdigest()}", _MAX_FAILURES),
        (f"address:{address[:200]}", _MAX_ADDRESS_FAILURES),
    )


def _keep_an_admin(session: Session, user: User) -> None:
    admins = session.scalar(select(func.count()).where(User.role == "admin"))
    if user.role == "admin" and (admins or 0) <= 1:
        raise conflict(f"{user.name!r} is the last admin")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
