"""Clients that mean harm, disks that are full, a database that is away: clear errors, still up."""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from updater_server_world import Postgres, World, make_artifact, world

from updater.server import protocol
from updater.server.app import create_app, openapi
from updater.server.certificates import Authority


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server with short time-outs and small limits."""
    patch = pytest.MonkeyPatch()
    patch.setattr(protocol, "HEADER_S", 2.0)
    folder = tmp_path_factory.mktemp("strict")
    with world(folder, request_s=2.0, idle_s=2.0, max_artifact_bytes=300_000) as there:
        yield there
    patch.undo()


def connection(there: World) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("localhost", there.port, context=there.context, timeout=30)


def still_up(there: World) -> bool:
    return there.client().get("/health/ready").status_code == 200


def test_a_body_without_end_is_cut_off(strict: World) -> None:
    client = connection(strict)
    client.putrequest("POST", "/api/devices/v1/authentication/auth_requests")
    client.putheader("Transfer-Encoding", "chunked")
    client.putheader("X-MEN-Signature", "x")
    client.endheaders()
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    end = time.monotonic() + 20
    with pytest.raises((ConnectionError, ssl.SSLError)):
        while time.monotonic() < end:
            client.send(piece)
    assert still_up(strict)


def test_a_body_that_does_not_come_is_given_up(strict: World) -> None:
    client = connection(strict)
    client.putrequest("POST", "/api/devices/v1/authentication/auth_requests")
    client.putheader("Content-Length", "100")
    client.putheader("X-MEN-Signature", "x")
    client.endheaders()
    client.send(b"{")
    answer = client.getresponse()
    assert answer.status == 408
    assert b"did not arrive within 2 s" in answer.read()


def test_an_upload_that_stops_is_given_up_and_leaves_nothing(
    strict: World, artifact_v2: Path
) -> None:
    strict.reset()
    content = artifact_v2.read_bytes()
    client = connection(strict)
    client.putrequest("POST", "/api/management/v1/artifacts")
    client.putheader("Authorization", strict.admin.headers["Authorization"])
    client.putheader("Content-Length", str(len(content)))
    client.endheaders()
    client.send(content[:50_000])
    assert client.getresponse().status == 408
    assert [p for p in strict.core.settings.artifacts.rglob("*") if p.is_file()] == []


def test_an_undeclared_upload_over_the_limit_is_refused(strict: World, tmp_path: Path) -> None:
    strict.reset()
    big = make_artifact(tmp_path, "big", 400_000).read_bytes()
    answer = strict.admin.post("/artifacts", content=iter([big[:200_000], big[200_000:]]))
    assert answer.status_code == 413
    assert [p for p in strict.core.settings.artifacts.rglob("*") if p.is_file()] == []


def slow_loris(there: World, count: int) -> None:
    """Open connections that never finish their headers; others must be served meanwhile."""

    async def attack() -> None:
        streams = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", there.port, ssl=there.context, server_hostname="localhost"
            )
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            streams.append((reader, writer))
        assert await asyncio.to_thread(still_up, there)
        # All of them are closed by the server.
        for reader, _ in streams:
            async with asyncio.timeout(60):
                with pytest.MonkeyPatch.context():
                    try:
                        assert await reader.read() == b""
                    except (ConnectionError, ssl.SSLError):
                        continue
        for _, writer in streams:
            writer.transport.abort()

    asyncio.run(attack())


def test_slow_headers_block_nobody_and_are_closed(strict: World) -> None:
    slow_loris(strict, 100)


@pytest.mark.server_night
def test_a_thousand_slow_connections_block_nobody(strict: World) -> None:
    slow_loris(strict, 1000)


def test_giant_headers_are_cut_off(strict: World) -> None:
    client = connection(strict)
    client.putrequest("GET", "/health/live")
    for number in range(1000):
        client.putheader(f"X-{number}", "x" * 1000)
    with pytest.raises((ConnectionError, ssl.SSLError, http.client.HTTPException)):
        client.endheaders()
        client.getresponse()
    assert still_up(strict)


def test_plain_http_and_old_tls_and_wrong_names_get_nothing(strict: World) -> None:
    plain = http.client.HTTPConnection("localhost", strict.port, timeout=10)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        plain.request("GET", "/health/live")
        plain.getresponse()
    old = ssl.create_default_context(cafile=str(strict.folder / "ca.pem"))
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    for context, name in ((old, "localhost"), (strict.context, "another.example")):
        with (
            socket.create_connection(("127.0.0.1", strict.port), timeout=10) as raw,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            context.wrap_socket(raw, server_hostname=name)


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2f..%2fsettings.py",
        "/static/%2e%2e/app.py",
        "/api/devices/v1/download/..%2f..%2fserver.key?expires=9999999999&signature=x",
        "/artifacts/../server.toml",
    ],
)
def test_names_do_not_climb_out(strict: World, path: str) -> None:
    client = connection(strict)
    client.putrequest("GET", path)
    client.endheaders()
    assert client.getresponse().status in (303, 403, 404)


def test_an_old_auth_request_brings_no_rejected_device_back(strict: World) -> None:
    strict.reset()
    device = strict.accepted()
    body = device.auth_body()
    signature = device.sign(body)
    assert device.authenticate(body, signature).status_code == 200
    strict.admin.post(f"/devices/{device.id}/reject")
    assert device.authenticate(body, signature).status_code == 401
    assert strict.admin.get(f"/devices/{device.id}").json()["status"] == "rejected"


def test_a_flood_of_new_devices_is_bounded(tmp_path: Path) -> None:
    with world(tmp_path, max_pending_devices=3) as there:
        statuses = [there.device(f"d{n}").authenticate().status_code for n in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        # Known ones still get an answer of their own.
        assert there.admin.post(f"/devices/{there.device_id('d0')}/accept").status_code == 204


def test_without_the_enrolment_token_nobody_new_comes(tmp_path: Path) -> None:
    with world(tmp_path, enrolment_token="right") as there:
        device = there.device()
        assert device.authenticate().status_code == 401
        assert there.admin.get("/devices").json()["devices"] == []
        body = device.auth_body().replace(b'"tenant_token": ""', b'"tenant_token": "right"')
        assert device.authenticate(body).status_code == 401
        assert len(there.admin.get("/devices").json()["devices"]) == 1


def test_with_client_certificates_required_the_device_api_wants_one(tmp_path: Path) -> None:
    authority = Authority.create("devices")
    (tmp_path / "devices.pem").write_bytes(authority.pem())
    chain, key = authority.client("board-1")
    (tmp_path / "client.pem").write_bytes(chain)
    (tmp_path / "client.key").write_bytes(key)
    stranger_chain, stranger_key = Authority.create("others").client("board-1")
    (tmp_path / "stranger.pem").write_bytes(stranger_chain)
    (tmp_path / "stranger.key").write_bytes(stranger_key)
    options = {
        "client_ca": str(tmp_path / "devices.pem"),
        "client_certificates": "required",
    }
    with world(tmp_path / "server", **options) as there:
        assert there.device().authenticate().status_code == 403
        # People manage without one.
        assert there.admin.get("/me").status_code == 200
        there.context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        assert there.device("with").authenticate().status_code == 401
        foreign = ssl.create_default_context(cafile=str(there.folder / "ca.pem"))
        foreign.load_cert_chain(tmp_path / "stranger.pem", tmp_path / "stranger.key")
        client = http.client.HTTPSConnection("localhost", there.port, context=foreign, timeout=10)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            client.request("GET", "/health/live")
            client.getresponse()


def test_a_full_database_is_a_clear_507_and_it_recovers(tmp_path: Path) -> None:
    from sqlalchemy import text

    with world(tmp_path) as there:
        device = there.accepted()

        def limit(pages: int) -> None:
            for _ in range(2):
                with there.core.database.engine.connect() as c:
                    c.execute(text(f"PRAGMA max_page_count={pages}"))

        limit(1)
        statuses = {device.send_inventory(blob="x" * 1000, n=str(n)).status_code for n in range(40)}
        assert 507 in statuses
        assert statuses <= {200, 507}
        assert device.next().status_code == 204
        limit(1 << 30)
        assert device.send_inventory(back="yes").status_code == 200


def test_a_full_store_is_a_clear_507_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", small],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with world(tmp_path / "server", artifacts=str(small)) as there:
            artifact = make_artifact(tmp_path, "v2", 300_000)
            declared = there.upload(artifact)
            assert declared.status_code == 507
            assert "no room" in declared.json()["error"]
            there.core.store.check_room = lambda size: None  # type: ignore[method-assign]
            answer = there.admin.post("/artifacts", content=iter([artifact.read_bytes()]))
            assert (answer.status_code, answer.json()["error"]) == (507, "the store's disk is full")
            assert [p for p in small.rglob("*") if p.is_file()] == []
            assert still_up(there)
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_database_that_is_away_is_a_clear_503_and_it_recovers(
    tmp_path: Path, postgres: Postgres
) -> None:
    with world(tmp_path, postgres.new_database()) as there:
        device = there.accepted()
        assert device.next().status_code == 204
        postgres.stop()
        try:
            away = device.next()
            assert away.status_code == 503
            assert away.headers["retry-after"]
            assert "database does not answer" in away.json()["error"]
            assert there.client().get("/health/ready").status_code == 503
            assert there.client().get("/health/live").status_code == 200
        finally:
            postgres.start()
        deadline = time.monotonic() + 30
        while (status := device.next().status_code) != 204:
            assert status == 503
            assert time.monotonic() < deadline
        assert there.client().get("/health/ready").status_code == 200


@pytest.mark.server_night
def test_a_database_that_is_away_for_a_minute_costs_nobody_more_than_that_minute(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Ten devices go on asking for a minute: each answer is clear and prompt, and all come back."""
    with world(tmp_path, postgres.new_database()) as there:
        devices = [there.accepted(f"d{number}") for number in range(10)]
        assert there.upload(make_artifact(tmp_path)).status_code == 201
        deployment = there.deploy("v2")
        postgres.stop()
        away: set[int] = set()
        slowest = 0.0
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end:
                for device in devices:
                    began = time.monotonic()
                    away.add(device.next().status_code)
                    slowest = max(slowest, time.monotonic() - began)
        finally:
            postgres.start()
        assert away == {503}
        assert slowest < 20, "a device waits longer than its own patience"
        deadline = time.monotonic() + 60
        while devices[0].next().status_code == 503:
            assert time.monotonic() < deadline
        for device in devices:
            device.update(deployment)
        assert there.deployment(deployment)["counts"] == {"success": 10}


# The description needs no running server.
_SCHEMA = schemathesis.openapi.from_dict(openapi(create_app(None, background=False)))  # type: ignore[arg-type]


def fuzz(there: World, case: schemathesis.Case) -> None:
    there.core.settings  # noqa: B018
    secret = (
        _DEVICE_TOKENS[there.port]
        if case.path.startswith("/api/devices")
        else there.admin.headers["Authorization"]
    )
    case.headers = {**(case.headers or {}), "Authorization": secret}
    response = case.call(
        base_url=there.url, verify=str(there.folder / "ca.pem"), allow_redirects=False, timeout=30
    )
    assert response.status_code < 500 or response.status_code == 507, response.text


_DEVICE_TOKENS: dict[int, str] = {}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("fuzzed")) as there:
        _DEVICE_TOKENS[there.port] = there.accepted().client.headers["Authorization"]
        yield there


_FUZZ = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


@_SCHEMA.parametrize()
@settings(max_examples=3, **_FUZZ)  # type: ignore[arg-type]
def test_no_request_that_the_description_allows_is_a_500(
    case: schemathesis.Case, fuzzed: World
) -> None:
    fuzz(fuzzed, case)


@pytest.mark.server_night
@_SCHEMA.parametrize()
@settings(max_examples=200, **_FUZZ)  # type: ignore[arg-type]
def test_long_fuzzing_finds_no_500(case: schemathesis.Case, fuzzed: World) -> None:
    fuzz(fuzzed, case)
