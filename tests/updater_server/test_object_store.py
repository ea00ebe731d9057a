"""Artifacts in an S3-compatible store: the real protocol against a real store, OpenStack Swift.

Streamed in parts, read in ranges as from a folder, nothing half-written to be seen, leftovers swept
away, a store that is away answered with a clear error.
"""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from swift_store import ACCESS_KEY, SECRET, Swift, swift, why_not
from test_crash_safety import ServerProcess
from updater_server_world import World, make_artifact, world

from updater.server.artifacts import ArtifactStore, Store
from updater.server.errors import RefusedError, ServerError
from updater.server.objects import PART_BYTES, Bucket, ObjectStore
from updater.server.settings import load_settings
from updater.server.setup import initialise

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "runs")
SIZE = 2 * PART_BYTES + 1_234_567


@pytest.fixture(scope="module")
def store() -> Iterator[Swift]:
    with swift() as running:
        ObjectStore(bucket(running))._client.create_bucket(Bucket="artifacts")
        yield running


def bucket(store: Swift, prefix: str = "", **changes: Any) -> Bucket:
    values: dict[str, Any] = {
        "name": "artifacts", "prefix": prefix, "endpoint": store.url, "region": "us-east-1",
        "access_key": ACCESS_KEY, "secret": SECRET, "ca": store.ca,
    }  # fmt: skip
    return Bucket(**{**values, **changes})


def settings_of(store: Swift, folder: Path, prefix: str) -> dict[str, str]:
    """What server.toml says about the bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder / "s3.key"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    return {
        "artifacts": f"s3://artifacts/{prefix}",
        "s3_endpoint": store.url,
        "s3_region": "us-east-1",
        "s3_access_key": ACCESS_KEY,
        "s3_secret": "s3.key",
        "s3_ca": str(store.ca),
    }


@pytest.fixture
def there(store: Swift, tmp_path: Path) -> Iterator[World]:
    """A server whose artifacts are in the bucket, below a prefix of the test's own."""
    folder = tmp_path / "server"
    with world(folder, **settings_of(store, folder, tmp_path.name)) as running:
        yield running


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("big"), "v2", SIZE)


def everything(where: Bucket) -> tuple[list[str], list[str]]:
    """The objects below the prefix, and the uploads that nobody completed."""
    client = ObjectStore(where)._client
    names = {"Bucket": where.name, "Prefix": where.prefix}
    objects = client.list_objects_v2(**names).get("Contents", ())
    uploads = client.list_multipart_uploads(**names).get("Uploads", ())
    return [item["Key"] for item in objects], [item["Key"] for item in uploads]


def of(there: World) -> Bucket:
    assert there.core.settings.bucket is not None
    return there.core.settings.bucket


def test_an_artifact_goes_through_the_bucket_in_parts_and_a_device_gets_it(
    there: World, big: Path
) -> None:
    answer = there.upload(big)
    assert answer.status_code == 201, answer.text
    objects, uploads = everything(of(there))
    assert (objects, uploads) == ([f"{of(there).prefix}{answer.json()['id']}.mender"], [])
    etag = ObjectStore(of(there))._client.head_object(Bucket="artifacts", Key=objects[0])["ETag"]
    assert etag.strip('"').endswith("-3"), "it was not uploaded in three parts"
    device = there.accepted()
    deployment = there.deploy("v2")
    uri = device.next().json()["artifact"]["source"]["uri"]
    assert there.client().get(uri).content == big.read_bytes()
    # Cut after the first part, and resumed.
    rest = there.client().get(uri, headers={"Range": f"bytes={PART_BYTES}-"})
    total = big.stat().st_size
    assert rest.status_code == 206
    assert rest.headers["content-range"] == f"bytes {PART_BYTES}-{total - 1}/{total}"
    assert rest.content == big.read_bytes()[PART_BYTES:]
    device.update(deployment)
    assert there.deployment(deployment)["counts"] == {"success": 1}
    assert there.admin.delete(f"/artifacts/{answer.json()['id']}").status_code == 204
    assert everything(of(there)) == ([], [])
    assert there.client().get(uri).status_code == 404


RANGES = [
    "", "bytes=0-0", "bytes=0-", "bytes=5000-5999", "bytes=-1", "bytes=-999999999", "bytes=100000-",
    "bytes=999999999-", "bytes=0-999999999", "bytes=7-3", "bytes=-0", "bytes=a-b", "bytes=-",
    "lines=1-2",
]  # fmt: skip


def test_ranges_are_answered_as_from_a_folder(
    there: World, tmp_path: Path, artifact_v2: Path
) -> None:
    answers = []
    with world(tmp_path / "folder") as plain:
        for server in (there, plain):
            assert server.upload(artifact_v2).status_code == 201
            device = server.accepted()
            server.deploy("v2")
            uri = device.next().json()["artifact"]["source"]["uri"]
            found = []
            for method in ("GET", "HEAD"):
                for text in RANGES:
                    headers = {"Range": text} if text else {}
                    answer = server.client().request(method, uri, headers=headers)
                    kept = ("content-range", "content-length", "accept-ranges", "content-type")
                    shown = {n: answer.headers.get(n) for n in kept}
                    if answer.status_code >= 400:
                        shown = {"content-range": shown["content-range"]}
                    found.append((method, text, answer.status_code, shown, answer.content))
            answers.append(found)
    for from_bucket, from_folder in zip(*answers, strict=True):
        # What no server need understand, ours ignores; Starlette calls some of it a bad request.
        if from_folder[2] == 400:
            assert from_bucket[2] == 200
        elif from_folder[2] == 416:
            assert from_bucket[2:4] == from_folder[2:4]
        else:
            assert from_bucket == from_folder


@pytest.mark.parametrize("spoil", ["cut", "invalid"])
def test_an_upload_that_is_cut_or_invalid_leaves_nothing(
    there: World, big: Path, spoil: str
) -> None:
    content = bytearray(big.read_bytes())
    if spoil == "invalid":
        content[PART_BYTES + 5_000_000] ^= 1
        answer = there.admin.post("/artifacts", content=bytes(content))
        assert answer.status_code == 422
    else:

        def broken() -> Iterator[bytes]:
            yield bytes(content[: PART_BYTES + 1_000_000])
            raise ConnectionError("cut")

        with pytest.raises(ConnectionError):
            there.admin.post("/artifacts", content=broken())
    end = time.monotonic() + 20
    while everything(of(there)) != ([], []):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert there.admin.get("/artifacts").json() == []


def test_a_store_that_is_away_is_a_clear_503_and_it_recovers(
    there: World, store: Swift, artifact_v2: Path, tmp_path: Path
) -> None:
    assert there.upload(artifact_v2).status_code == 201
    device = there.accepted()
    there.deploy("v2")
    uri = device.next().json()["artifact"]["source"]["uri"]
    store.stop()
    try:
        away = there.client().get(uri)
        assert (away.status_code, away.headers["retry-after"]) == (503, "5")
        assert "artifact store does not answer" in away.json()["error"]
        refused = there.upload(make_artifact(tmp_path, "v3"))
        assert refused.status_code == 503
        # Everything else goes on.
        assert device.next().status_code == 200
        assert there.client().get("/health/ready").status_code == 200
    finally:
        store.start()
    assert there.client().get(uri).content == artifact_v2.read_bytes()
    assert there.upload(make_artifact(tmp_path, "v3")).status_code == 201


@pytest.mark.slow
def test_a_killed_upload_shows_nothing_and_is_swept_away(
    store: Swift, tmp_path: Path, big: Path
) -> None:
    folder = tmp_path / "server"
    made = initialise(folder, ["localhost"], 0, "127.0.0.1")
    lines = settings_of(store, folder, tmp_path.name)
    with (folder / "server.toml").open("a") as file:
        file.writelines(f'{name} = "{value}"\n' for name, value in lines.items())
    where = load_settings(folder).bucket
    assert where is not None
    server = ServerProcess(folder)
    login = {"name": "admin", "password": made.admin_password}
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    with httpx.Client(base_url=server.url, verify=context, timeout=60) as client:
        token = client.post("/api/management/v1/login", json=login).json()["token"]
        client.headers["Authorization"] = f"Bearer {token}"
        began = threading.Event()

        def slowly() -> Iterator[bytes]:
            content = big.read_bytes()
            yield content[: PART_BYTES + 1_000_000]
            end = time.monotonic() + 30
            while not everything(where)[1]:
                assert time.monotonic() < end, "no part was uploaded"
                time.sleep(0.05)
            began.set()
            server.kill()
            yield content[PART_BYTES + 1_000_000 :]

        with contextlib.suppress(httpx.HTTPError):
            client.post("/api/management/v1/artifacts", content=slowly())
    assert began.is_set()
    objects, uploads = everything(where)
    assert objects == [], "half an artifact is to be seen"
    assert len(uploads) == 1
    left = ObjectStore(where)
    assert left.sweep(set(), time.time()) == 0, "a young upload may be in progress"
    assert left.sweep(set(), time.time() + 7 * 3600) == 1
    assert everything(where) == ([], [])


def test_an_object_without_a_row_is_swept_and_others_files_are_let_be(
    store: Swift, tmp_path: Path, artifact_v2: Path
) -> None:
    where = bucket(store, f"{tmp_path.name}/")
    left = ObjectStore(where)
    orphan, kept = (left.receive(feed(artifact_v2), 1 << 30).id for _ in range(2))
    left._client.put_object(Bucket="artifacts", Key=f"{where.prefix}notes.txt", Body=b"mine")
    later = time.time() + 7 * 3600
    assert left.sweep({kept}, later) == 1
    assert left.size(orphan) is None
    assert left.size(kept) == artifact_v2.stat().st_size
    assert f"{where.prefix}notes.txt" in everything(where)[0]


def feed(path: Path) -> Callable[[], bytes]:
    file = path.open("rb")
    return lambda: file.read(40_000)


def test_both_stores_say_the_same_of_an_artifact(
    store: Swift, tmp_path: Path, artifact_v2: Path
) -> None:
    stores: list[Store] = [
        ArtifactStore(tmp_path / "folder"),
        ObjectStore(bucket(store, f"{tmp_path.name}/")),
    ]
    content = artifact_v2.read_bytes()
    told = []
    for each in stores:
        stored = each.receive(feed(artifact_v2), 1 << 30)
        assert each.size(stored.id) == stored.size == len(content)
        assert b"".join(each.read(stored.id, 10_000, 70_000)) == content[10_000:80_000]
        assert stored.sha256 == hashlib.sha256(content).hexdigest()
        with pytest.raises(RefusedError) as refused:
            each.receive(feed(artifact_v2), 50_000)
        assert refused.value.status == 413
        told.append(stored._replace(id=""))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "another"}, "404"),
        ({"secret": "wrong"}, "403"),
        ({"ca": None}, "does not answer (SSLError)"),
        ({"endpoint": "https://localhost:9"}, "does not answer (EndpointConnectionError)"),
    ],
)
def test_a_wrong_setting_is_one_line_at_the_start(
    store: Swift, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ServerError) as failed:
        ObjectStore(bucket(store, **changes)).check()
    assert message in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_planted_store_that_completes_before_the_end_is_caught(
    store: Swift, tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the object is made visible although its bytes turned out to be invalid."""
    from updater.server import objects

    monkeypatch.setattr(objects._Upload, "abandon", lambda upload: upload.complete())
    where = bucket(store, f"{tmp_path.name}/")
    spoilt = bytearray(big.read_bytes())
    spoilt[PART_BYTES + 5_000_000] ^= 1
    pieces = iter([bytes(spoilt), b""])
    with pytest.raises(RefusedError):
        ObjectStore(where).receive(lambda: next(pieces), 1 << 30)
    assert everything(where)[0], "the check of what is to be seen can't fail"


def test_a_backup_says_that_the_artifacts_stay_in_the_bucket(
    there: World, artifact_v2: Path, tmp_path: Path
) -> None:
    from updater.server.backup import back_up, restore

    lines = settings_of_world(there)
    with (there.folder / "server.toml").open("a") as file:
        file.writelines(f'{name} = "{value}"\n' for name, value in lines.items())
    assert there.upload(artifact_v2).status_code == 201
    said: list[str] = []
    back_up(load_settings(there.folder), tmp_path / "backup.tar", said.append)
    assert said[-1].startswith(f"the artifacts stay in s3://artifacts/{tmp_path.name}/")
    restore(tmp_path / "backup.tar", tmp_path / "restored", said.append)
    assert not any("not in the backup" in line for line in said)
    again = load_settings(tmp_path / "restored").bucket
    assert again is not None
    assert len(everything(again)[0]) == 1


def settings_of_world(there: World) -> dict[str, str]:
    where = of(there)
    return {
        "artifacts": f"s3://{where.name}/{where.prefix}",
        "s3_endpoint": where.endpoint,
        "s3_region": where.region,
        "s3_access_key": where.access_key,
        "s3_secret": "s3.key",
        "s3_ca": str(where.ca),
    }
