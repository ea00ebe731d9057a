"""Downloads that survive restarts: checkpoints, expired links, stalls, portals, wrong clocks."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from updater_artifacts import image_bytes
from updater_server import Authority, Behaviour, Request, serving
from updater_world import FakeClock

from updater.device import clock, spool
from updater.device.config import DownloadConfig
from updater.device.errors import TransportError
from updater.device.spool import CHECKPOINT_BYTES, Spool, worth_it
from updater.device.transport import FileOrHttpsTransport, backoff

CONTENT = image_bytes(3_000_000, 12)


class CutError(BaseException):
    """The power went away."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHECKPOINT_BYTES", 256 * 1024)
    monkeypatch.setattr(spool, "HOLD_BYTES", 64 * 1024)


class Downloads:
    """One server, and processes that download from it one after the other."""

    def __init__(self, authority: Authority, directory: Path, **bounds: float) -> None:
        self.directory = directory
        self.clock = FakeClock()
        self.bounds = DownloadConfig(
            **{"timeout_s": 5.0, "retries": 3, "spool_min_s": 0.0, **bounds}  # type: ignore[arg-type]
        )
        self.authority = authority
        self.refresh: Callable[[str], str] | None = None
        self.requests: list[dict[str, str]] = []

    def __call__(
        self,
        behave: Behaviour,
        *,
        cut_after: int | None = None,
        error: BaseException | None = None,
        path: str = "/v2.mender?token=1",
    ) -> bytes:
        """Download; after `cut_after` bytes the power goes, or `error` is raised."""
        transport = FileOrHttpsTransport(
            str(self.authority.ca_file), self.bounds, self.clock, str(self.directory)
        )
        received = bytearray()
        buffer = memoryview(bytearray(100_000))
        with serving(self.authority.server_context("127.0.0.1"), behave) as server:
            base = f"https://127.0.0.1:{server.server_address[1]}"
            if self.refresh is not None:
                refresh = self.refresh
                transport.refresh = lambda: refresh(base)
            transport.identity = "deployment d-1"
            try:
                with transport.open(base + path) as stream:
                    while count := stream.readinto(buffer):
                        received += buffer[:count]
                        if cut_after is not None and len(received) >= cut_after:
                            raise error or CutError
            finally:
                self.requests = server.requests
        return bytes(received)

    @property
    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]


def whole(request: Request, number: int) -> None:
    request.serve(CONTENT)


def first_byte(ranges: list[str | None]) -> int:
    assert len(ranges) == 1
    return int((ranges[0] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))


@pytest.mark.usefixtures("small_steps")
def test_after_a_power_cut_the_download_goes_on_behind_the_last_checkpoint(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path)
    reached = 0
    for cut_after in (800_000, 1_700_000, 2_500_000):
        with pytest.raises(CutError):
            downloads(whole, cut_after=cut_after)
        assert first_byte(downloads.ranges) == reached
        record = json.loads((tmp_path / "download.checkpoint").read_text())
        assert cut_after - 256 * 1024 - 100_000 <= record["size"] <= cut_after + 100_000
        reached = record["size"]
    assert downloads(whole) == CONTENT
    assert first_byte(downloads.ranges) == reached
    assert downloads.requests[0]["If-Range"] == '"one"'
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.usefixtures("small_steps")
def test_only_what_was_synced_counts(authority: Authority, tmp_path: Path) -> None:
    """Behind the checkpoint a cut may leave anything: here, garbage."""
    downloads = Downloads(authority, tmp_path)
    with pytest.raises(CutError):
        downloads(whole, cut_after=1_000_000)
    size = json.loads((tmp_path / "download.checkpoint").read_text())["size"]
    with (tmp_path / "download").open("r+b") as file:
        file.seek(size)
        file.write(os.urandom(200_000))
    assert downloads(whole) == CONTENT


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("damage", ["flip", "cut", "record", "gone"])
def test_a_spool_that_is_not_what_was_downloaded_is_thrown_away(
    authority: Authority, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    downloads = Downloads(authority, tmp_path)
    with pytest.raises(CutError):
        downloads(whole, cut_after=1_000_000)
    data, record = tmp_path / "download", tmp_path / "download.checkpoint"
    content = bytearray(data.read_bytes())
    if damage == "flip":
        content[300_000] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(content[:300_000])
    elif damage == "record":
        record.write_text('{"size": "many"')
    else:
        data.unlink()
    assert downloads(whole) == CONTENT
    assert first_byte(downloads.ranges) == 0
    if damage != "gone":
        assert "the download starts again" in capfd.readouterr().err


@pytest.mark.usefixtures("small_steps")
def test_a_file_that_changed_meanwhile_is_fetched_anew(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path)
    with pytest.raises(CutError):
        downloads(whole, cut_after=1_000_000)
    other = image_bytes(2_000_000, 13)
    assert downloads(lambda request, _: request.serve(other, ETag='"two"')) == other


@pytest.mark.usefixtures("small_steps")
def test_a_download_that_had_arrived_whole_is_not_fetched_again(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path)
    with pytest.raises(CutError):
        downloads(whole, cut_after=len(CONTENT))
    assert downloads(whole) == CONTENT
    assert downloads.ranges == [f"bytes={len(CONTENT) - 1}-"]


@pytest.mark.usefixtures("small_steps")
def test_what_was_found_wrong_is_not_kept_for_the_next_time(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path)
    with pytest.raises(ValueError, match="wrong hash"):
        downloads(whole, cut_after=1_000_000, error=ValueError("wrong hash"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_steps")
def test_a_download_that_gave_up_goes_on_next_time(authority: Authority, tmp_path: Path) -> None:
    """Not a byte is fetched twice."""
    downloads = Downloads(authority, tmp_path, retries=1)

    def broken(request: Request, number: int) -> None:
        if number == 1:
            request.serve(CONTENT, stop_after=900_000)
        else:
            request.send_error(503)

    with pytest.raises(TransportError, match="gave up at byte 900000"):
        downloads(broken)
    assert downloads(whole) == CONTENT
    assert downloads.ranges == ["bytes=900000-"]


@pytest.mark.usefixtures("small_steps")
def test_a_full_data_partition_costs_the_checkpoint_not_the_download(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if offset > 500_000:
            raise OSError(28, "No space left on device")
        return honest(handle, data, offset)

    monkeypatch.setattr("updater.device.spool.os.pwrite", full)
    assert Downloads(authority, tmp_path)(whole) == CONTENT
    assert list(tmp_path.iterdir()) == []


def test_a_fast_download_is_not_spooled(authority: Authority, tmp_path: Path) -> None:
    downloads = Downloads(authority, tmp_path, spool_min_s=60.0)
    with pytest.raises(CutError):
        downloads(whole, cut_after=2_900_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("elapsed_s", "free_mib", "answer"),
    [(0.0, 1000, False), (0.5, 1000, False), (1.0, 1000, True), (1.0, 100, False)],
)
def test_it_is_worth_spooling_what_is_slow_and_fits(
    elapsed_s: float, free_mib: int, answer: bool
) -> None:
    total = 100 << 20
    assert worth_it(total, 1 << 20, elapsed_s, free_mib << 20, 60.0) is answer
    assert total > CHECKPOINT_BYTES


def test_a_checkpoint_comes_after_the_sync_of_what_it_covers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: without it a record may speak of bytes that a cut takes away."""
    log: list[str] = []
    honest_sync = os.fsync
    monkeypatch.setattr(
        "updater.device.spool.os.fsync",
        lambda handle: (
            log.append(str(Path(f"/proc/self/fd/{handle}").readlink())),
            honest_sync(handle),
        ),
    )
    store = Spool(str(tmp_path))
    store.begin("x", 100, "", b"abc")
    store.checkpoint()
    assert [Path(path).name for path in log] == [
        "download",
        "download.checkpoint.new",
        tmp_path.name,
    ]
    store.close()


# Links, pauses, stalls, portals


def test_an_expired_link_is_replaced_and_the_download_goes_on(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path)
    links = iter(range(2, 10))
    downloads.refresh = lambda base: f"{base}/v2.mender?token={next(links)}"
    seen: list[str] = []

    def behave(request: Request, number: int) -> None:
        seen.append(request.path)
        if number == 2:
            request.send_error(403)
        else:
            request.serve(CONTENT, stop_after=1_000_000 if number == 1 else None)

    assert downloads(behave) == CONTENT
    assert [path[-1] for path in seen] == ["1", "1", "2"]
    assert downloads.ranges == [None, "bytes=1000000-", "bytes=1000000-"]


def test_links_that_never_work_end_it(authority: Authority, tmp_path: Path) -> None:
    downloads = Downloads(authority, tmp_path)
    downloads.refresh = lambda base: f"{base}/v2.mender"
    with pytest.raises(TransportError, match="answered 403 instead of 200"):
        downloads(lambda request, _: request.send_error(403))
    assert len(downloads.requests) == 6


def test_retry_after_is_honoured(authority: Authority, tmp_path: Path) -> None:
    downloads = Downloads(authority, tmp_path)

    def behave(request: Request, number: int) -> None:
        if number == 1:
            request.send_response(429)
            request.send_header("Retry-After", "77")
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            request.serve(CONTENT)

    assert downloads(behave) == CONTENT
    assert downloads.clock.waits == [77.0]


def test_a_retry_after_behind_the_deadline_gives_up_at_once(
    authority: Authority, tmp_path: Path
) -> None:
    downloads = Downloads(authority, tmp_path, deadline_s=60.0)

    def behave(request: Request, number: int) -> None:
        request.send_response(503)
        request.send_header("Retry-After", "3600")
        request.send_header("Content-Length", "0")
        request.end_headers()

    with pytest.raises(TransportError, match="deadline passed"):
        downloads(behave)
    assert downloads.clock.waits == []


def test_pauses_are_fully_jittered_bounded_and_never_nothing() -> None:
    for failures in range(1, 60):
        bound = min(30.0, 0.5 * 2 ** (failures - 1))
        pauses = [backoff(failures, 0.5, 30.0) for _ in range(200)]
        assert all(bound / 10 <= pause <= bound for pause in pauses)
        assert max(pauses) > 0.8 * bound
        assert min(pauses) < 0.3 * bound


def test_a_server_that_trickles_is_left(authority: Authority, tmp_path: Path) -> None:
    """Each read succeeds within its time-out; only the pace is hopeless."""
    downloads = Downloads(authority, tmp_path, stall_s=10.0, stall_bytes=1000, retries=2)
    release = threading.Event()

    def behave(request: Request, number: int) -> None:
        request.send_response(206 if request.headers.get("Range") else 200)
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        request.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        request.send_header("Content-Length", str(len(CONTENT) - start))
        request.end_headers()
        try:
            while not release.is_set():
                request.wfile.write(b"x")
                downloads.clock.now += 4.0
                time.sleep(0.01)
        except OSError:
            return

    with pytest.raises(TransportError, match=r"gave up .* the download stalls"):
        downloads(behave)
    release.set()
    assert len(downloads.requests) == 3


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (200, "text/html; charset=utf-8", "a web page came instead of an artifact"),
        (511, "text/html", "a captive portal wants a login"),
        (302, "text/html", "a captive portal"),
    ],
)
def test_a_captive_portal_is_named_at_once(
    authority: Authority, tmp_path: Path, status: int, kind: str, message: str
) -> None:
    downloads = Downloads(authority, tmp_path)

    def behave(request: Request, number: int) -> None:
        body = b"<html>Please log in</html>"
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    with pytest.raises(TransportError, match=message):
        downloads(behave)
    assert len(downloads.requests) == 1


# The clock


def test_a_clock_before_the_build_is_set_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "info").touch()
    os.utime(tmp_path / "info", (1_700_000_000, 1_700_000_000))
    floor = clock.floor_seconds([str(tmp_path / "info"), str(tmp_path / "absent")])
    assert floor == 1_700_000_000
    sets: list[float] = []
    monkeypatch.setattr("updater.device.clock.time.time", lambda: 12.0)
    monkeypatch.setattr(
        "updater.device.clock.time.clock_settime", lambda _, seconds: sets.append(seconds)
    )
    clock.raise_to(floor)
    assert sets == [floor]
    assert (
        "the clock said 1970-01-01T00:00:12Z; set forward to 2023-11-14" in capfd.readouterr().err
    )
    monkeypatch.setattr("updater.device.clock.time.time", lambda: 1.8e9)
    clock.raise_to(floor)
    assert sets == [floor]


def test_a_clock_that_cannot_be_set_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: int, seconds: float) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("updater.device.clock.time.time", lambda: 12.0)
    monkeypatch.setattr("updater.device.clock.time.clock_settime", refuse)
    clock.raise_to(1_700_000_000)
    assert "cannot be set" in capfd.readouterr().err
