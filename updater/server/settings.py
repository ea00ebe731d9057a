"""`server.toml`: read once, checked completely, unknown keys refused.

Relative paths are relative to the file. The secret of tokens and links is a file of its own,
readable by the server alone, and shared by all workers of one installation.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from updater.server.errors import ServerError

SETTINGS_NAME = "server.toml"
# A bucket's name as S3 has it; the prefix is the beginning of every object's name.
_BUCKET = re.compile(r"^s3://(?P<name>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[\w./-]*))?$")
_SECRET_BYTES = 32


@dataclass(frozen=True)
class Bucket:
    """Where the artifacts are. Empty `endpoint` and `access_key`: the AWS library's own defaults.

    `ca` is the authority of an endpoint whose certificate the system doesn't know.
    """

    name: str
    prefix: str
    endpoint: str = ""
    region: str = ""
    access_key: str = ""
    secret: str = ""
    ca: Path | None = None


class _File(BaseModel):
    """The keys of server.toml with their defaults and bounds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    host: str = "0.0.0.0"  # noqa: S104 - a server for devices listens on the network
    port: int = Field(default=8443, ge=0, le=65535)
    public_url: str = Field(default="", pattern=r"^(https://[^/?#\s]+)?$")
    certificate: str = "server.pem"
    key: str = "server.key"
    secret: str = "secret.key"  # noqa: S105 - a file's name
    client_ca: str = ""
    client_certificates: str = Field(default="off", pattern="^(off|required)$")
    database_url: str = ""
    artifacts: str = "artifacts"
    s3_endpoint: str = Field(
        default="", pattern=r"^(https://[^/?#\s]+|http://(localhost|127\.0\.0\.1)(:\d+)?)?$"
    )
    s3_region: str = ""
    s3_access_key: str = ""
    s3_secret: str = ""
    s3_ca: str = ""
    artifact_keys: list[str] = []
    enrolment_token: str = ""
    max_artifact_bytes: int = Field(default=8 << 30, ge=4096)
    max_pending_devices: int = Field(default=100_000, ge=1)
    device_token_s: int = Field(default=604_800, ge=60)
    link_s: int = Field(default=86_400, ge=60)
    session_s: int = Field(default=43_200, ge=60)
    request_s: float = Field(default=30.0, gt=0)
    idle_s: float = Field(default=60.0, gt=0)
    job_interval_s: float = Field(default=5.0, gt=0)
    shutdown_s: int = Field(default=20, ge=1)
    log_level: str = Field(default="info", pattern="^(debug|info|warning|error)$")


@dataclass(frozen=True)
class Settings:
    """Everything the server is told. Paths are absolute; durations seconds, sizes bytes.

    With a `bucket` the artifacts are there, and the folder `artifacts` isn't used.
    """

    path: Path
    host: str
    port: int
    public_url: str
    certificate: Path
    key: Path
    secret: bytes
    client_ca: Path | None
    client_certificates: str
    database_url: str
    artifacts: Path
    bucket: Bucket | None
    artifact_keys: tuple[Path, ...]
    enrolment_token: str
    max_artifact_bytes: int
    max_pending_devices: int
    device_token_s: int
    link_s: int
    session_s: int
    request_s: float
    idle_s: float
    job_interval_s: float
    shutdown_s: int
    log_level: str


def load_settings(path: Path, **changes: Any) -> Settings:
    """Read `path` (a server.toml or the folder that holds one). Raises ServerError.

    `changes` override the file's keys, for tests and command-line options.
    """
    if path.is_dir():
        path = path / SETTINGS_NAME
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ServerError(
            f"{path}: cannot read the settings: {error.strerror}; make them with "
            "`updater server init`"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ServerError(f"{path}: not valid TOML: {error}") from error
    try:
        file = _File.model_validate({**values, **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ServerError(f"{path}: {key}: {first['msg']}") from error
    folder = path.parent.resolve()
    bucket = _bucket(path, folder, file) if file.artifacts.startswith("s3:") else None
    if file.client_certificates != "off" and not file.client_ca:
        raise ServerError(f"{path}: client_certificates needs client_ca")
    return Settings(
        path=path,
        certificate=folder / file.certificate,
        key=folder / file.key,
        secret=_secret(folder / file.secret),
        client_ca=folder / file.client_ca if file.client_ca else None,
        database_url=file.database_url or f"sqlite:///{folder / 'server.db'}",
        artifacts=folder / ("artifacts" if bucket else file.artifacts),
        bucket=bucket,
        artifact_keys=tuple(folder / name for name in file.artifact_keys),
        **file.model_dump(
            exclude={
                "certificate",
                "key",
                "secret",
                "client_ca",
                "database_url",
                "artifacts",
                "artifact_keys",
                "s3_endpoint",
                "s3_region",
                "s3_access_key",
                "s3_secret",
                "s3_ca",
            }
        ),
    )


def _bucket(path: Path, folder: Path, file: _File) -> Bucket:
    """`s3://bucket/prefix` and the keys that go with it."""
    match = _BUCKET.match(file.artifacts)
    if match is None:
        raise ServerError(f"{path}: artifacts: write s3://BUCKET or s3://BUCKET/PREFIX")
    if bool(file.s3_access_key) != bool(file.s3_secret):
        raise ServerError(f"{path}: s3_access_key and s3_secret need each other")
    prefix = (match["prefix"] or "").strip("/")
    return Bucket(
        name=match["name"],
        prefix=f"{prefix}/" if prefix else "",
        endpoint=file.s3_endpoint,
        region=file.s3_region,
        access_key=file.s3_access_key,
        secret=_read_secret(folder / file.s3_secret).decode().strip() if file.s3_secret else "",
        ca=folder / file.s3_ca if file.s3_ca else None,
    )


def _secret(path: Path) -> bytes:
    secret = _read_secret(path)
    if len(secret) < _SECRET_BYTES:
        raise ServerError(f"{path}: the secret is shorter than {_SECRET_BYTES} bytes")
    return secret


def _read_secret(path: Path) -> bytes:
    try:
        secret = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise ServerError(f"{path}: cannot read the secret: {error.strerror}") from error
    if mode & 0o077:
        raise ServerError(f"{path}: others may read the secret; run chmod 600 {path}")
    return secret
