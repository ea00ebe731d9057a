"""The device API: what Mender's clients send is answered as their public description says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from updater_server_world import DEVICE_TYPE, World


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519"])
def test_a_device_waits_is_accepted_and_gets_a_token(world: World, kind: str) -> None:
    key = {
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }[kind]()
    device = world.device(key=key)
    assert device.authenticate().status_code == 401
    assert device.authenticate().status_code == 401
    (waiting,) = world.admin.get("/devices", params={"status": "pending"}).json()["devices"]
    assert waiting["identity"] == {"mac": "d1"}
    assert world.admin.post(f"/devices/{waiting['id']}/accept").status_code == 204
    answer = device.authenticate()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jwt")
    assert device.next().status_code == 204


def test_the_signature_covers_the_bytes_as_they_came(world: World) -> None:
    device = world.accepted()
    body = device.auth_body()
    assert device.authenticate(body, device.sign(body[:-1])).status_code == 401
    assert device.authenticate(body[:-1], device.sign(body)).status_code == 401
    assert device.authenticate(body + b" ", device.sign(body)).status_code == 401
    assert device.authenticate(body, device.sign(body)).status_code == 200
    assert device.authenticate(body, "not base64").status_code == 401


def test_a_rejected_device_is_out_at_once(world: World) -> None:
    device = world.accepted()
    assert device.next().status_code == 204
    assert world.admin.post(f"/devices/{device.id}/reject").status_code == 204
    assert device.next().status_code == 401
    assert device.authenticate().status_code == 401


def test_the_inventory_is_replaced_by_put_and_changed_by_patch(world: World) -> None:
    device = world.accepted()
    device.send_inventory(kernel="6.1", mac=["a", "b"])
    shown = world.admin.get(f"/devices/{device.id}").json()["inventory"]
    assert shown == {
        "device_type": DEVICE_TYPE,
        "artifact_name": "v1",
        "kernel": "6.1",
        "mac": ["a", "b"],
    }
    changed = device.client.patch(
        "/v1/inventory/device/attributes", json=[{"name": "kernel", "value": "6.6"}]
    )
    assert changed.status_code == 200
    assert world.admin.get(f"/devices/{device.id}").json()["inventory"] == shown | {"kernel": "6.6"}
    device.send_inventory()
    assert set(world.admin.get(f"/devices/{device.id}").json()["inventory"]) == {
        "device_type",
        "artifact_name",
    }


def test_an_update_from_offer_to_success(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    assert world.upload(artifact_v2).status_code == 201
    deployment = world.deploy("v2")
    offer = device.next()
    assert offer.status_code == 200
    assert offer.json()["id"] == deployment
    artifact = offer.json()["artifact"]
    assert artifact["artifact_name"] == "v2"
    assert artifact["device_types_compatible"] == [DEVICE_TYPE]
    assert artifact["source"]["expire"].endswith("Z")
    # No token goes with the download.
    content = world.client().get(artifact["source"]["uri"])
    assert content.content == artifact_v2.read_bytes()
    device.update(deployment)
    assert device.next().status_code == 204
    standing = world.deployment(deployment)
    assert (standing["status"], standing["counts"]) == ("finished", {"success": 1})


def test_all_three_spellings_of_next_give_the_same(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    world.deploy("v2")
    path = "/v1/deployments/device/deployments/next"
    provides = {"artifact_name": "v1", "device_type": DEVICE_TYPE}
    answers = [
        device.next(),
        device.client.post(path, json=provides),
        device.client.get(path, params=provides),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_repeated_reports_are_normal_and_an_aborted_one_is_409(
    world: World, artifact_v2: Path
) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    device.next()
    assert [device.report(deployment, "downloading") for _ in range(3)] == [204] * 3
    assert world.admin.post(f"/deployments/{deployment}/abort").status_code == 204
    assert device.report(deployment, "installing") == 409
    assert device.report(deployment, "failure") == 409
    assert device.next().status_code == 204
    assert world.deployment(deployment)["counts"] == {"aborted": 1}


def test_a_failure_is_shown_with_its_cause_and_log(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    device.update(deployment, ends="failure", cause="checksum of slot B is wrong")
    messages = [{"timestamp": "2026-01-01T00:00:00Z", "level": "error", "message": "bad\0slot"}]
    assert device.send_log(deployment, messages).status_code == 204
    shown = world.admin.get(f"/devices/{device.id}").json()
    assert shown["last_failure"]["cause"] == "checksum of slot B is wrong"
    assert [event["status"] for event in shown["history"][0]["events"]] == [
        "downloading",
        "installing",
        "rebooting",
        "failure",
    ]
    log = world.admin.get(f"/deployments/{deployment}/devices/{device.id}/log").json()
    assert log["messages"] == messages


def test_a_log_over_one_mebibyte_is_refused(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    device.next()
    messages = [{"timestamp": "t", "level": "info", "message": "x" * (1 << 20)}]
    assert device.send_log(deployment, messages).status_code == 413
    fits = [{"timestamp": "t", "level": "info", "message": "x" * ((1 << 20) - 200)}]
    assert device.send_log(deployment, fits).status_code == 204


def test_a_control_map_goes_to_devices_that_know_them(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    control_map = {"priority": 1, "states": {"ArtifactReboot_Enter": {"action": "pause"}}}
    deployment = world.deploy("v2", update_control_map=control_map)
    given = device.next().json()["update_control_map"]
    assert given["id"] == deployment
    assert given["states"]["ArtifactReboot_Enter"]["action"] == "pause"
    path = f"/v2/deployments/device/deployments/{deployment}/update_control_map"
    assert device.client.get(path).json() == {"update_control_map": given}
    assert device.report(deployment, "pause_before_rebooting") == 204
    old = {"artifact_name": "v1", "device_type": DEVICE_TYPE}
    answer = device.client.post("/v1/deployments/device/deployments/next", json=old)
    assert "update_control_map" not in answer.json()


def test_downloads_resume_with_exact_ranges(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    world.deploy("v2")
    content = artifact_v2.read_bytes()
    uri = device.next().json()["artifact"]["source"]["uri"]
    client = world.client()
    size = len(content)
    head = client.head(uri)
    assert (head.status_code, head.headers["content-length"]) == (200, str(size))
    assert head.headers["accept-ranges"] == "bytes"
    rest = client.get(uri, headers={"Range": "bytes=5000-", "If-Range": head.headers["etag"]})
    assert (rest.status_code, rest.content) == (206, content[5000:])
    assert rest.headers["content-range"] == f"bytes 5000-{size - 1}/{size}"
    middle = client.get(uri, headers={"Range": "bytes=10-19"})
    assert (middle.status_code, middle.content) == (206, content[10:20])
    assert middle.headers["content-length"] == "10"
    changed = client.get(uri, headers={"Range": "bytes=5000-", "If-Range": '"another"'})
    assert (changed.status_code, changed.content) == (200, content)
    beyond = client.get(uri, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")


def test_a_link_is_signed_and_expires(world: World, artifact_v2: Path) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    world.deploy("v2")
    uri = device.next().json()["artifact"]["source"]["uri"]
    client = world.client()
    assert client.get(uri[:-1] + ("0" if uri[-1] != "0" else "1")).status_code == 403
    assert client.get(uri.replace("expires=", "expires=9")).status_code == 403
    assert client.get(uri.replace("/download/", "/download/..%2f")).status_code in (403, 404)
    world.clock.advance(world.core.settings.link_s + 1)
    assert client.get(uri).status_code == 403


def test_another_devices_deployment_is_unknown(world: World, artifact_v2: Path) -> None:
    device, other = world.accepted("d1"), world.accepted("d2")
    world.upload(artifact_v2)
    deployment = world.deploy("v2", target={"devices": [device.id]})
    device.next()
    assert other.next().status_code == 204
    assert other.report(deployment, "success") == 404
    assert other.send_log(deployment, []).status_code == 404
    assert world.deployment(deployment)["counts"] == {"pending": 1}


def test_a_device_that_runs_it_already_is_settled(world: World, artifact_v2: Path) -> None:
    device = world.accepted(artifact="v2")
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    assert device.next().status_code == 204
    assert world.deployment(deployment)["counts"] == {"already-installed": 1}


def test_a_device_of_another_type_gets_nothing_and_is_settled(
    world: World, artifact_v2: Path
) -> None:
    device = world.accepted()
    world.upload(artifact_v2)
    deployment = world.deploy("v2")
    assert device.next(device_type="another-board").status_code == 204
    assert world.deployment(deployment)["counts"] == {"noartifact": 1}
    shown = world.admin.get(f"/devices/{device.id}").json()
    assert "another-board" in shown["last_failure"]["cause"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"id_data":1}', b"\xff\xfe", b'{"id_data":"{}","pubkey":"x"}'],
)
def test_a_malformed_auth_request_is_a_clear_400(world: World, body: bytes) -> None:
    answer = world.device().authenticate(body, "c2ln")
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_token_is_not_forged(world: World) -> None:
    import jwt

    device = world.accepted()
    token = device.client.headers["Authorization"].removeprefix("Bearer ")
    claims = jwt.decode(token, options={"verify_signature": False})
    none = jwt.encode(claims, None, algorithm="none")
    guessed = jwt.encode(claims, "secret" * 8, algorithm="HS256")
    for forged in (none, guessed, token[:-2], token + "x", "x", json.dumps(claims)):
        device.client.headers["Authorization"] = f"Bearer {forged}"
        assert device.next().status_code == 401
    device.client.headers["Authorization"] = f"Bearer {token}"
    assert device.next().status_code == 204
    world.clock.advance(world.core.settings.device_token_s + 1)
    assert device.next().status_code == 401
