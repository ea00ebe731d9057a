"""Downloads from a real TLS server: resumed when they can be, refused when they must be."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from updater_artifacts import image_bytes
from updater_server import Authority, Behaviour, Request, Server, serving
from updater_world import FakeClock

from updater.device.config import DownloadConfig
from updater.device.errors import TransportError
from updater.device.transport import FileOrHttpsTransport

CONTENT = image_bytes(700_000, 9)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


class Fetch:
    """One client, one server, and what happened."""

    def __init__(self, authority: Authority, **bounds: float) -> None:
        self.clock = FakeClock()
        self.bounds = DownloadConfig(**{"timeout_s": 5.0, "retries": 4, **bounds})
        self.ca_file = str(authority.ca_file)
        self.context = authority.server_context("127.0.0.1")
        self.host = "127.0.0.1"
        self.server: Server | None = None

    def __call__(self, behave: Behaviour, buffer_bytes: int = 300_000) -> bytes:
        transport = FileOrHttpsTransport(self.ca_file, self.bounds, self.clock)
        with serving(self.context, behave) as server:
            self.server = server
            url = f"https://{self.host}:{server.server_address[1]}/v2.mender?token=1"
            received = bytearray()
            buffer = memoryview(bytearray(buffer_bytes))
            with transport.open(url) as stream:
                while count := stream.readinto(buffer):
                    received += buffer[:count]
        return bytes(received)

    @property
    def ranges(self) -> list[str | None]:
        assert self.server is not None
        return [request.get("Range") for request in self.server.requests]


def test_a_whole_file_arrives_in_one_request(authority: Authority) -> None:
    fetch = Fetch(authority)
    assert fetch(lambda request, _: request.serve(CONTENT)) == CONTENT
    assert fetch.ranges == [None]
    assert fetch.clock.waits == []


@pytest.mark.parametrize("reset", [True, False])
def test_a_broken_connection_is_resumed_where_it_broke(authority: Authority, reset: bool) -> None:
    fetch = Fetch(authority)
    assert (
        fetch(
            lambda request, number: request.serve(
                CONTENT, stop_after=200_000 if number < 4 else None, reset=reset
            )
        )
        == CONTENT
    )
    assert len(fetch.ranges) == 4
    if not reset:
        assert fetch.ranges == [None, "bytes=200000-", "bytes=400000-", "bytes=600000-"]
    assert fetch.server is not None
    assert all(request["If-Range"] == '"one"' for request in fetch.server.requests[1:])


def test_progress_of_a_few_bytes_at_a_time_still_ends(authority: Authority) -> None:
    fetch = Fetch(authority, retries=1)
    content = CONTENT[:20_000]
    assert fetch(lambda request, _: request.serve(content, stop_after=900)) == content


def test_a_stalled_server_is_left_after_the_time_out(
    authority: Authority, release: threading.Event
) -> None:
    def behave(request: Request, number: int) -> None:
        request.serve(CONTENT, stop_after=100_000 if number == 1 else None)
        if number == 1:
            request.wfile.flush()
            release.wait(20)

    fetch = Fetch(authority, timeout_s=0.3)
    started = time.monotonic()
    assert fetch(behave) == CONTENT
    release.set()
    assert time.monotonic() - started < 10
    assert fetch.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_server_errors_are_tried_again_with_growing_pauses(
    authority: Authority, status: int
) -> None:
    def behave(request: Request, number: int) -> None:
        if number < 4:
            request.send_error(status)
        else:
            request.serve(CONTENT)

    fetch = Fetch(authority, backoff_s=1.0)
    assert fetch(behave) == CONTENT
    assert len(fetch.clock.waits) == 3
    for number, pause in enumerate(fetch.clock.waits):
        assert 0.1 * 2**number <= pause <= 2**number


def test_retries_are_bounded(authority: Authority) -> None:
    fetch = Fetch(authority)
    with pytest.raises(TransportError, match=r"gave up at byte 0 after 5 attempts: .* 503"):
        fetch(lambda request, _: request.send_error(503))
    assert len(fetch.ranges) == 5


def test_the_whole_download_has_a_deadline(authority: Authority) -> None:
    fetch = Fetch(authority, retries=100, backoff_s=10.0, deadline_s=60.0)
    with pytest.raises(TransportError, match="deadline passed at byte 0: the server answered 503"):
        fetch(lambda request, _: request.send_error(503))
    assert sum(fetch.clock.waits) < 60


@pytest.mark.parametrize(
    ("behave", "message"),
    [
        (lambda request, _: request.send_error(404), "answered 404 instead of 200"),
        (
            lambda request, _: request.send_response(302) or request.end_headers(),
            "302 .*redirects are not followed",
        ),
        (
            lambda request, _: request.serve(CONTENT, **{"Content-Length": "many"}),
            "does not say how long",
        ),
        (
            lambda request, number: request.serve(
                CONTENT, stop_after=1000 if number == 1 else None, ETag=f'"{number}"'
            ),
            "cannot resume at byte 1000: the file changed",
        ),
        (
            lambda request, number: request.serve(
                CONTENT, stop_after=1000 if number == 1 else None, ranges=False
            ),
            "cannot resume at byte 1000",
        ),
        (
            lambda request, number: request.serve(
                CONTENT if number == 1 else CONTENT + b"x", stop_after=1000
            ),
            "Content-Range is 'bytes 1000-700000/700001', expected 'bytes 1000-699999/700000'",
        ),
        (
            lambda request, number: request.serve(
                CONTENT, stop_after=1000, **{"Content-Range": "bytes 0-699999/700000"}
            ),
            "Content-Range is 'bytes 0-",
        ),
    ],
)
def test_wrong_answers_end_the_download(
    authority: Authority, behave: Behaviour, message: str
) -> None:
    with pytest.raises(TransportError, match=message):
        Fetch(authority)(behave)


def test_an_unknown_authority_is_refused_at_once(authority: Authority, tmp_path: Path) -> None:
    fetch = Fetch(authority)
    fetch.ca_file = str(Authority(tmp_path, "other CA").ca_file)
    with pytest.raises(TransportError, match="certificate is not trusted"):
        fetch(lambda request, _: request.serve(CONTENT))
    assert fetch.clock.waits == []


def test_a_wrong_host_name_is_refused(authority: Authority) -> None:
    fetch = Fetch(authority)
    fetch.host = "localhost"
    with pytest.raises(TransportError, match="certificate is not trusted: Hostname mismatch"):
        fetch(lambda request, _: request.serve(CONTENT))


def test_old_tls_is_refused(authority: Authority) -> None:
    fetch = Fetch(authority, retries=0)
    fetch.context = authority.server_context("127.0.0.1", ssl.TLSVersion.TLSv1_1)
    with pytest.raises(TransportError, match="gave up at byte 0"):
        fetch(lambda request, _: request.serve(CONTENT))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/x", "only https is allowed"),
        ("ftp://127.0.0.1/x", "only https is allowed"),
        ("https://user:secret@127.0.0.1/x", "malformed URL"),
        ("https:///x", "malformed URL"),
        ("https://127.0.0.1:99999/x", "malformed port"),
        ("/nonexistent/v2.mender", "No such file"),
    ],
)
def test_unusable_locations_are_refused(authority: Authority, location: str, message: str) -> None:
    transport = FileOrHttpsTransport(str(authority.ca_file), DownloadConfig(), FakeClock())
    with pytest.raises(TransportError, match=message), transport.open(location):
        pass


def test_an_unusable_ca_file_is_named(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("nothing")
    transport = FileOrHttpsTransport(str(ca_file), DownloadConfig(), FakeClock())
    with pytest.raises(TransportError, match=r"ca\.pem: not a usable"), transport.open("https://x"):
        pass
