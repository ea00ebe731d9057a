"""The management API: fleets, artifacts, rollouts, users; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import datetime
import http.client
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import delete
from updater_server_world import DEVICE_TYPE, World, make_artifact

from updater.server.jobs import run_due, take_lease
from updater.server.models import Base, Lease


def tick(world: World) -> bool:
    return asyncio.run(world.tick())


def actions(world: World) -> list[str]:
    return [entry["action"] for entry in world.admin.get("/audit").json()]


def test_a_canary_that_fails_stops_the_rollout(world: World, artifact_v2: Path) -> None:
    devices = {d.id: d for d in (world.accepted(f"d{n}") for n in range(5))}
    world.upload(artifact_v2)
    deployment = world.deploy(
        "v2", phases=[{"count": 1, "success_percent": 100}, {}], max_failure_percent=10
    )
    offered = [d for d in devices.values() if d.next().status_code == 200]
    assert len(offered) == 1
    offered[0].update(deployment, ends="failure", cause="no boot")
    standing = world.deployment(deployment)
    assert standing["status"] == "stopped"
    assert "1 of 1 devices failed" in standing["reason"]
    assert standing["counts"] == {"failure": 1, "aborted": 4}
    assert all(d.next().status_code == 204 for d in devices.values())
    assert "deployment.stop" in actions(world)


def test_phases_follow_each_other(world: World, artifact_v2: Path) -> None:
    devices = [world.accepted(f"d{n}") for n in range(4)]
    world.upload(artifact_v2)
    deployment = world.deploy("v2", phases=[{"percent": 25}, {}])
    first = [d for d in devices if d.next().status_code == 200]
    assert len(first) == 1
    first[0].update(deployment)
    rest = [d for d in devices if d.next().status_code == 200]
    assert len(rest) == 3
    for device in rest:
        device.update(deployment)
    standing = world.deployment(deployment)
    assert (standing["status"], standing["counts"]) == ("finished", {"success": 4})
    assert [phase["succeeded"] for phase in standing["phases"]] == [1, 3]


def test_a_silent_device_stalls_and_the_deployment_ends(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2", stall_timeout_s=3600)
    device.next()
    device.report(deployment, "downloading")
    world.clock.advance(3599)
    assert tick(world)
    assert world.deployment(deployment)["status"] == "running"
    world.clock.advance(2)
    tick(world)
    standing = world.deployment(deployment)
    assert (standing["status"], standing["counts"]) == ("finished", {"stalled": 1})
    cause = world.admin.get(f"/devices/{device.id}").json()["last_failure"]["cause"]
    assert cause == "no word from the device for 3600 s while downloading"
    # What the device says later is the truth.
    assert device.report(deployment, "success") == 204
    assert world.deployment(deployment)["counts"] == {"success": 1}


def test_a_device_that_never_calls_does_not_keep_a_deployment_open(
    world: World, artifact_v2: Path
) -> None:
    world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2", duration_s=86_400)
    world.clock.advance(86_401)
    tick(world)
    standing = world.deployment(deployment)
    assert (standing["status"], standing["counts"]) == ("finished", {"expired": 1})


def test_a_failed_device_tries_again_after_a_pause(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2", retries=1, retry_delay_s=60)
    device.update(deployment, ends="failure", cause="first")
    assert device.report(deployment, "failure", "first") == 204
    assert device.next().status_code == 204
    world.clock.advance(61)
    device.update(deployment)
    assert world.deployment(deployment)["counts"] == {"success": 1}


def test_a_scheduled_deployment_waits_for_its_time(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    start = datetime.datetime.fromtimestamp(world.clock() + 3600, datetime.UTC)
    deployment = world.deploy("v2", starts_at=start.isoformat())
    tick(world)
    assert device.next().status_code == 204
    late = world.accepted("late")
    world.clock.advance(3601)
    tick(world)
    # Who is in the target is decided when it starts.
    assert device.next().status_code == late.next().status_code == 200
    assert world.deployment(deployment)["devices"] == 2


def test_outside_the_window_nobody_starts(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    now = datetime.datetime.fromtimestamp(world.clock(), datetime.UTC)
    later, end = now + datetime.timedelta(hours=2), now + datetime.timedelta(hours=3)
    world.deploy("v2", window={"start": f"{later:%H:%M}", "end": f"{end:%H:%M}"})
    assert device.next().status_code == 204
    world.clock.advance(2 * 3600 + 60)
    assert device.next().status_code == 200
    world.clock.advance(3600)
    assert device.next().status_code == 204


def test_a_paused_deployment_offers_nothing(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    assert world.admin.post(f"/deployments/{deployment}/pause").status_code == 204
    assert device.next().status_code == 204
    assert world.admin.post(f"/deployments/{deployment}/pause").status_code == 409
    assert world.admin.post(f"/deployments/{deployment}/resume").status_code == 204
    assert device.next().status_code == 200


def test_a_key_is_rotated_and_the_old_one_stops(world: World) -> None:
    device = world.accepted()
    world.clock.advance(1)
    renewed = world.device("d1", ec.generate_private_key(ec.SECP256R1()))
    assert renewed.authenticate().status_code == 401
    # The old key works until the new one is accepted.
    assert device.next().status_code == 204
    assert world.admin.post(f"/devices/{device.id}/accept").status_code == 204
    assert renewed.authenticate().status_code == 200
    assert device.next().status_code == 401
    assert device.authenticate().status_code == 401
    keys = world.admin.get(f"/devices/{device.id}").json()["keys"]
    assert [key["status"] for key in keys] == ["rejected", "accepted"]


def test_a_preauthorised_device_needs_nobody(world: World) -> None:
    import json

    device = world.device("new")
    pubkey = json.loads(device.auth_body())["pubkey"]
    body = {"identity": {"mac": "new"}, "pubkey": pubkey}
    assert world.admin.post("/devices", json=body).status_code == 201
    assert world.admin.post("/devices", json=body).status_code == 409
    assert device.authenticate().status_code == 200
    # Another key for that identity is nobody's.
    assert world.device("new").authenticate().status_code == 401


def test_a_decommissioned_device_starts_anew(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    device.next()
    assert world.admin.delete(f"/devices/{device.id}").status_code == 204
    assert device.next().status_code == 401
    # A replayed auth request brings it back as pending, not as accepted.
    assert device.authenticate().status_code == 401
    assert world.deployment(deployment)["counts"] == {"decommissioned": 1}


def test_groups_static_and_dynamic(world: World, artifact_v2: Path) -> None:
    one, two, three = (world.accepted(f"d{n}") for n in range(3))
    three.send_inventory(site="lab")
    assert world.admin.post("/groups", json={"name": "canaries"}).status_code == 201
    add = {"add": [one.id]}
    assert world.admin.patch("/groups/canaries/devices", json=add).status_code == 204
    conditions = [{"attribute": "site", "operator": "=", "values": ["lab"]}]
    made = world.admin.post("/groups", json={"name": "lab", "filter": conditions})
    assert made.status_code == 201
    assert world.admin.patch("/groups/lab/devices", json=add).status_code == 409
    sizes = {g["name"]: g["devices"] for g in world.admin.get("/groups").json()}
    assert sizes == {"canaries": 1, "lab": 1}
    world.upload(artifact_v2)
    world.deploy("v2", target={"group": "lab"})
    assert [d.next().status_code for d in (one, two, three)] == [204, 204, 200]
    two.send_inventory(site="lab")
    assert {g["name"]: g["devices"] for g in world.admin.get("/groups").json()}["lab"] == 2


@pytest.mark.parametrize(
    ("operator", "values", "found"),
    [
        ("=", ["6.1"], {"d0"}),
        ("!=", ["6.1"], {"d1", "d2"}),
        ("in", ["6.1", "6.6"], {"d0", "d1"}),
        ("not in", ["6.1", "6.6"], {"d2"}),
        ("exists", [], {"d0", "d1"}),
        ("missing", [], {"d2"}),
        ("prefix", ["6."], {"d0", "d1"}),
        ("prefix", ["%"], set()),
    ],
)
def test_devices_are_found_by_inventory(
    world: World, operator: str, values: list[str], found: set[str]
) -> None:
    for number, kernel in enumerate(("6.1", "6.6", None)):
        device = world.accepted(f"d{number}")
        if kernel:
            device.send_inventory(kernel=kernel)
    condition = {"attribute": "kernel", "operator": operator, "values": values}
    answer = world.admin.post("/devices/search", json=[condition]).json()
    assert {d["identity"]["mac"] for d in answer["devices"]} == found


def test_pages_hold_every_device_once(world: World) -> None:
    for number in range(7):
        world.device(f"d{number}").authenticate()
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = world.admin.get("/devices", params={"after": after, "limit": 3}).json()
        seen += [d["identity"]["mac"] for d in page["devices"]]
        after = page["next"]
    assert sorted(seen) == [f"d{n}" for n in range(7)]


def test_a_broken_artifact_is_refused_and_leaves_nothing(world: World, artifact_v2: Path) -> None:
    content = bytearray(artifact_v2.read_bytes())
    content[-20_000] ^= 1
    for bad in (bytes(content), content[:50_000], b"", b"no artifact"):
        answer = world.admin.post("/artifacts", content=bytes(bad))
        assert answer.status_code == 422
        assert "not a valid artifact" in answer.json()["error"]
    assert world.admin.get("/artifacts").json() == []
    assert [p for p in world.core.settings.artifacts.rglob("*") if p.is_file()] == []


def test_an_artifacts_name_is_taken_once_for_a_device_type(world: World, artifact_v2: Path) -> None:
    assert world.upload(artifact_v2).status_code == 201
    assert world.upload(artifact_v2).status_code == 409
    assert len(list(world.core.settings.artifacts.glob("*.mender"))) == 1


def test_an_artifact_in_use_stays(world: World, artifact_v2: Path) -> None:
    world.accepted()
    identifier = world.upload(artifact_v2).json()["id"]
    shown = world.admin.get(f"/artifacts/{identifier}").json()
    assert (shown["name"], shown["device_types"]) == ("v2", [DEVICE_TYPE])
    deployment = world.deploy("v2")
    assert world.admin.delete(f"/artifacts/{identifier}").status_code == 409
    world.admin.post(f"/deployments/{deployment}/abort")
    assert world.admin.delete(f"/artifacts/{identifier}").status_code == 204
    assert not list(world.core.settings.artifacts.glob("*.mender"))


def test_a_declared_giant_is_refused_before_it_is_sent(world: World) -> None:
    connection = http.client.HTTPSConnection(
        "localhost", world.port, context=world.context, timeout=20
    )
    connection.putrequest("POST", "/api/management/v1/artifacts")
    connection.putheader("Authorization", world.admin.headers["Authorization"])
    connection.putheader("Content-Length", str(10 << 30))
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 413
    assert str(10 << 30) in answer.read().decode()
    connection.close()
    assert world.admin.get("/me").status_code == 200


def test_roles_say_who_may_do_what(world: World, artifact_v2: Path) -> None:
    for role in ("viewer", "operator"):
        body = {"name": role, "password": "correct horse", "role": role}
        assert world.admin.post("/users", json=body).status_code == 201
    viewer, operator = (world.user(n, "correct horse") for n in ("viewer", "operator"))
    world.device().authenticate()
    device_id = world.device_id("d1")
    assert viewer.get("/devices").status_code == 200
    assert viewer.post(f"/devices/{device_id}/accept").status_code == 403
    assert viewer.post("/artifacts", content=artifact_v2.read_bytes()).status_code == 403
    assert operator.post(f"/devices/{device_id}/accept").status_code == 204
    assert operator.get("/users").status_code == 403
    assert world.admin.delete("/users/viewer").status_code == 204
    assert viewer.get("/devices").status_code == 401
    assert world.admin.delete("/users/admin").status_code == 409
    assert world.client().get("/api/management/v1/devices").status_code == 401


def test_a_token_lasts_until_it_is_revoked_or_over(world: World) -> None:
    token = world.admin.post("/tokens", json={"label": "ci", "days": 1}).json()["token"]
    client = world.client(Authorization=f"Bearer {token}")
    path = "/api/management/v1/me"
    assert client.get(path).json() == {"name": "admin", "role": "admin"}
    (listed,) = world.admin.get("/tokens").json()
    assert token not in str(listed)
    assert world.admin.delete(f"/tokens/{listed['id']}").status_code == 204
    assert client.get(path).status_code == 401
    token = world.admin.post("/tokens", json={"label": "ci", "days": 1}).json()["token"]
    client.headers["Authorization"] = f"Bearer {token}"
    world.clock.advance(86_401)
    assert client.get(path).status_code == 401


def test_guessing_passwords_is_stopped_for_the_name(world: World) -> None:
    client = world.client()
    path = "/api/management/v1/login"
    guess = {"name": "admin", "password": "wrong"}
    answers = [client.post(path, json=guess).status_code for _ in range(12)]
    assert answers == [401] * 10 + [429] * 2
    right = {"name": "admin", "password": world.password}
    refused = client.post(path, json=right)
    assert refused.status_code == 429
    world.clock.advance(int(refused.headers["retry-after"]))
    assert client.post(path, json=right).status_code == 200


def test_every_change_is_in_the_audit_log(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    world.admin.post(f"/deployments/{deployment}/abort")
    world.admin.post(f"/devices/{device.id}/reject")
    world.admin.post("/users", json={"name": "eve", "password": "long enough", "role": "viewer"})
    assert actions(world)[::-1] == [
        "device.accept",
        "artifact.upload",
        "deployment.create",
        "deployment.start",
        "deployment.phase",
        "deployment.abort",
        "device.reject",
        "user.create",
    ]
    assert {entry["actor"] for entry in world.admin.get("/audit").json()} == {"admin", "server"}


def test_only_one_worker_has_the_lease(world: World) -> None:
    database, now = world.core.database, world.clock()
    take = lambda who, at: database.write_now(  # noqa: E731
        lambda s: take_lease(s, "jobs", who, at, 30)
    )
    database.write_now(lambda s: s.execute(delete(Lease)) and None)
    assert [take("a", now), take("b", now), take("a", now + 20)] == [True, False, True]
    assert [take("b", now + 49), take("b", now + 51), take("a", now + 52)] == [False, True, False]
    assert not database.write_now(lambda s: run_due(s, "a", now + 53))


def test_the_migrations_make_exactly_the_models(world: World) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with world.core.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_metrics_and_health_answer(world: World) -> None:
    client = world.client()
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").status_code == 200
    assert client.get("/metrics").status_code == 401
    client.headers["Authorization"] = world.admin.headers["Authorization"]
    world.accepted().next()
    tick(world)
    text = client.get("/metrics").text
    assert 'brownout_devices{status="accepted"} 1.0' in text
    assert "brownout_requests_total" in text
    assert "deployments/next" in text


def test_the_last_call_of_a_device_is_stored(world: World) -> None:
    device = world.accepted()
    assert world.admin.get(f"/devices/{device.id}").json()["seen_at"] is None
    tick(world)
    assert world.admin.get(f"/devices/{device.id}").json()["seen_at"] is not None


def test_a_signed_fleet_takes_signed_artifacts_only(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from updater_server_world import world as serve

    trusted, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    public = tmp_path / "trusted.pem"
    public.write_bytes(
        trusted.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with serve(tmp_path / "server", artifact_keys=[str(public)]) as there:
        unsigned = there.upload(make_artifact(tmp_path, "plain", 5000))
        foreign = there.upload(make_artifact(tmp_path, "foreign", 5000, other))
        good = there.upload(make_artifact(tmp_path, "good", 5000, trusted))
        assert [unsigned.status_code, foreign.status_code, good.status_code] == [422, 422, 201]
        (listed,) = there.admin.get("/artifacts").json()
        assert listed["signature_checked"] is True
