"""The command line can do all that the management API can, and says in one line what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from updater_server_world import World, make_artifact

from updater.server.app import create_app, openapi
from updater.server.cli import main
from updater.server.errors import ServerError
from updater.server.fleet_cli import conditions, window

Run = Callable[..., str]
# What a person at a shell has no use for: a session (there are tokens), and who one is.
NOT_ON_THE_COMMAND_LINE = {("POST", "/login"), ("GET", "/me")}


@pytest.fixture
def run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    token = tmp_path / "token"
    token.write_text(world.admin.headers["Authorization"].removeprefix("Bearer "))

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        fixed = ["fleet", "--url", world.url, "--ca", str(world.folder / "ca.pem")]
        fixed += ["--token-file", str(token)]
        assert main([*fixed, *map(str, arguments)]) == code, capsys.readouterr().err
        said = capsys.readouterr()
        return said.out.strip() if code == 0 else said.err.strip()

    return run


def called(world: World) -> set[tuple[str, str]]:
    """Which routes of the management API were called, by the server's own count."""
    prefix = "/api/management/v1"
    return {
        (sample.labels["method"], sample.labels["route"].removeprefix(prefix))
        for metric in world.core.metrics.requests.collect()
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.labels["route"].startswith(prefix)
    }


def test_every_route_of_the_management_api_has_a_command(
    world: World, run: Run, tmp_path: Path
) -> None:
    world.core.metrics.requests.clear()
    device, other = world.device("d1"), world.device("d2")
    device.authenticate()
    other.authenticate()
    (first,) = [d["id"] for d in json.loads(run("devices", "--status", "pending"))
                if d["identity"] == {"mac": "d1"}]  # fmt: skip
    run("accept", first)
    device.authenticate()
    device.send_inventory(site="berlin")

    # Keys: one known beforehand, one rotated, one refused.
    key = ec.generate_private_key(ec.SECP256R1())
    pem = tmp_path / "device.pem"
    pem.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    known = run("preauthorize", pem, "--identity", "mac=d3")
    assert world.device("d3", key).authenticate().status_code == 200
    new = world.device("d1")
    assert new.authenticate().status_code == 401
    keys = json.loads(run("device", first))["keys"]
    (pending,) = [k["id"] for k in keys if k["status"] == "pending"]
    run("accept", first, "--key", pending)
    assert (new.authenticate().status_code, device.authenticate().status_code) == (200, 401)
    run("reject", world.device_id("d2"))
    run("decommission", known, world.device_id("d2"))
    assert "accepted" in run("statistics")

    run("group", "create", "by hand")
    run("group", "change", "by hand", "--add", first)
    run("group", "create", "berlin", "--where", "site=berlin")
    sizes = {g["name"]: g["devices"] for g in json.loads(run("group", "list"))}
    assert sizes == {"by hand": 1, "berlin": 1}
    assert first in run("devices", "--group", "by hand")
    run("group", "change", "by hand", "--remove", first)
    run("group", "delete", "by hand")

    uploaded = run("upload", make_artifact(tmp_path))
    assert json.loads(run("artifact", uploaded))["name"] == "v2"
    spare = run("upload", make_artifact(tmp_path, "v3"))
    run("delete-artifact", spare)
    assert [a["id"] for a in json.loads(run("artifacts"))] == [uploaded]

    later = run(
        "deploy", "v2", "--group", "berlin", "--starts-at", "2099-01-01T00:00:00+01:00",
        "--window", "sat-mon 22:00-04:30 Europe/Berlin", "--duration", 3600, "--retries", 2,
        "--stall-timeout", 600,
    )  # fmt: skip
    shown = json.loads(run("deployment", later))
    assert shown["status"] == "scheduled"
    assert shown["starts_at"].startswith("2098-12-31T23:00:00")
    assert shown["plan"]["window"]["days"] == [0, 5, 6]
    run("abort", later)
    # The maintenance window holds: a device that asks outside of it gets nothing.
    hour = int(world.clock.now // 3600)
    hours = f"{(hour + 2) % 24:02}:00-{(hour + 3) % 24:02}:00"
    closed = run("deploy", "v2", "--where", "site=berlin", "--window", hours)
    new.artifact = "v1"
    new.authenticate()
    assert new.next().status_code == 204
    world.clock.now = (hour + 2.5) * 3600
    run("pause", closed)
    assert new.next().status_code == 204
    run("resume", closed)
    assert new.next().status_code == 200
    assert new.send_log(closed, [{"timestamp": "t", "level": "info", "message": "hi"}]).is_success
    assert run("log", closed, first).endswith("hi")
    assert [d["device_id"] for d in json.loads(run("deployment", closed, "--devices"))] == [first]
    assert [d["id"] for d in json.loads(run("deployments", "--status", "running"))] == [closed]

    password = tmp_path / "password"
    password.write_text("a long enough password\n")
    run("user", "add", "olga", "--role", "operator", "--password-file", password)
    run("user", "change", "olga", "--role", "viewer")
    assert {u["name"]: u["role"] for u in json.loads(run("user", "list"))}["olga"] == "viewer"
    assert world.user("olga", "a long enough password").get("/me").json()["role"] == "viewer"
    run("user", "delete", "olga")
    secret = run("token", "create", "night job", "--days", 1)
    assert world.client(Authorization=f"Bearer {secret}").get("/api/management/v1/me").is_success
    (listed,) = [t["id"] for t in json.loads(run("token", "list")) if t["label"] == "night job"]
    run("token", "revoke", listed)
    assert "token.delete" in run("audit")

    described = openapi(create_app(None, background=False))["paths"]  # type: ignore[arg-type]
    prefix = "/api/management/v1"
    wanted = {
        (method.upper(), path.removeprefix(prefix))
        for path, methods in described.items()
        for method in methods
        if path.startswith(prefix)
    }
    assert wanted - called(world) - NOT_ON_THE_COMMAND_LINE == set()


def test_what_is_wrong_is_one_line(world: World, run: Run, tmp_path: Path) -> None:
    assert run("deploy", "nothing", "--all", code=1) == "error: no artifact is named 'nothing'"
    assert run("group", "delete", "none", code=1) == "error: no group 'none'"
    wrong = "error: --where a=: write NAME=VALUE"
    assert run("devices", "--where", "a=", code=1) == wrong
    for name in ("a/b", ".."):
        assert "no slash" in run("group", "create", name, code=1)
    assert "nothing to change" in run("user", "change", "admin", code=1)
    (tmp_path / "map.json").write_text("{")
    said = run("deploy", "v2", "--all", "--control-map", tmp_path / "map.json", code=1)
    assert "not valid JSON" in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("22:00-04:30", {"start": "22:00", "end": "04:30"}),
        ("mon,wed 01:00-02:00", {"start": "01:00", "end": "02:00", "days": [0, 2]}),
        ("Fri-Mon 01:00-02:00 UTC",
         {"start": "01:00", "end": "02:00", "days": [0, 4, 5, 6], "timezone": "UTC"}),
    ],
)  # fmt: skip
def test_a_window_is_read_as_people_write_it(text: str, wanted: dict[str, Any]) -> None:
    assert window(text) == wanted


@pytest.mark.parametrize("text", ["", "22-23", "mo 01:00-02:00", "mon- 01:00-02:00"])
def test_a_window_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ServerError, match="--window"):
        window(text)


def test_conditions_are_read_as_people_write_them() -> None:
    assert conditions(("a=b=c", "a!=b", "a^=b", "!a", "a")) == [
        {"attribute": "a", "operator": "=", "values": ["b=c"]},
        {"attribute": "a", "operator": "!=", "values": ["b"]},
        {"attribute": "a", "operator": "prefix", "values": ["b"]},
        {"attribute": "a", "operator": "missing"},
        {"attribute": "a", "operator": "exists"},
    ]
