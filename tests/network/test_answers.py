"""Wrong answers and bad certificates, as a real TLS client of ours sees them through the proxy."""

import contextlib
import datetime
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from framework.network import (
    Answer,
    AnswerServer,
    CertificateError,
    FaultProxy,
    NetworkFault,
    OrderLine,
    OrderLineError,
    server_context,
)
from framework.network.answers import PORTAL, answer_to
from framework.network.certificates import CertificateKind
from images.keys import Keys, ensure_keys

NAME = "updates.brownout.test"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """An authority of this module's own."""
    return ensure_keys(tmp_path_factory.mktemp("keys"))


@contextlib.contextmanager
def answering(keys: Keys, kind: CertificateKind, answer: Answer) -> Iterator[AnswerServer]:
    """A server with one answer."""
    context = server_context(kind, NAME, keys.ca_certificate, keys.ca_key)
    with AnswerServer(answer, context) as server:
        yield server


def ask(
    keys: Keys, port: int, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """What a client that trusts only the authority gets."""
    context = ssl.create_default_context(cafile=str(keys.ca_certificate))
    raw = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection = http.client.HTTPSConnection(NAME, port, timeout=10, context=context)
    connection.sock = context.wrap_socket(raw, server_hostname=NAME)
    with contextlib.closing(connection):
        connection.request("GET", "/artifacts/x.mender", headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def test_a_status_with_its_headers_arrives(keys: Keys) -> None:
    with answering(keys, "good", Answer(429, (("Retry-After", "7"),), b"no\n")) as server:
        status, headers, body = ask(keys, server.address[1])
    assert (status, headers["Retry-After"], body) == (429, "7", b"no\n")
    assert server.requests == 1


def test_garbage_is_as_long_as_the_file_and_goes_on_where_it_is_asked_to(keys: Keys) -> None:
    with answering(keys, "good", Answer(200, garbage_bytes=100_000)) as server:
        status, headers, whole = ask(keys, server.address[1])
        assert (status, headers["Content-Length"]) == (200, "100000")
        status, headers, rest = ask(keys, server.address[1], {"Range": "bytes=99000-"})
    assert status == 206
    assert headers["Content-Range"] == "bytes 99000-99999/100000"
    assert rest == whole[99_000:]


def test_what_is_promised_and_not_sent_is_noticed_by_a_client(keys: Keys) -> None:
    answer = Answer(200, garbage_bytes=1000, promised_bytes=1)
    with (
        answering(keys, "good", answer) as server,
        pytest.raises(http.client.IncompleteRead),
    ):
        ask(keys, server.address[1])


def test_a_portal_is_a_web_page() -> None:
    answer = Answer(200, (("Content-Type", "text/html"),), PORTAL)
    head, _, body = answer_to(answer, b"GET / HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/html" in head
    assert body == PORTAL


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("expired", "expired"),
        ("not-yet-valid", "not yet valid"),
        ("wrong-name", "Hostname mismatch"),
        ("unknown-authority", "unable to get local issuer"),
    ],
)
def test_a_bad_certificate_is_bad_in_exactly_one_way(
    keys: Keys, kind: CertificateKind, says: str
) -> None:
    with (
        answering(keys, kind, Answer(200)) as server,
        pytest.raises(ssl.SSLCertVerificationError, match=says),
    ):
        ask(keys, server.address[1])


def test_a_certificate_is_dated_from_the_moment_that_is_given(keys: Keys) -> None:
    past = datetime.datetime(2021, 1, 1, tzinfo=datetime.UTC)
    context = server_context("good", NAME, keys.ca_certificate, keys.ca_key, past)
    with (
        AnswerServer(Answer(200), context) as server,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        ask(keys, server.address[1])


def test_an_authority_that_is_missing_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="not a usable authority"):
        server_context("good", NAME, tmp_path / "ca.pem", tmp_path / "ca.key")


def test_the_proxy_leads_to_the_wrong_answer_and_back(keys: Keys) -> None:
    with (
        answering(keys, "good", Answer(200, body=b"right")) as real,
        answering(keys, "good", Answer(503)) as broken,
        FaultProxy(real.address) as proxy,
    ):
        assert ask(keys, proxy.port)[2] == b"right"
        proxy.strike(NetworkFault("divert", 0, upstream=broken.address, connections=2))
        assert [ask(keys, proxy.port)[0] for _ in range(3)] == [503, 503, 200]


def test_a_client_that_leaves_in_the_handshake_harms_nobody(keys: Keys) -> None:
    with answering(keys, "good", Answer(200, body=b"x")) as server:
        for _ in range(3):
            with socket.create_connection(server.address, timeout=5) as client:
                client.sendall(b"\x16\x03\x01")
        assert ask(keys, server.address[1])[0] == 200


def test_orders_reach_a_shell_that_fetches_them(tmp_path: Path) -> None:
    """As on a device, with this machine's own shell."""
    nc = "python3 -c 'import socket,sys;s=socket.create_connection((sys.argv[1],int(sys.argv[2])));"
    nc += "[(sys.stdout.write(l),sys.stdout.flush()) for l in s.makefile()]"
    with OrderLine() as line:
        import subprocess

        command = line.shell_command("127.0.0.1").replace("nc ", f"{nc}' ")
        with subprocess.Popen(["sh", "-c", command]):
            line.wait_for_device()
            line.send(f"echo done > {tmp_path}/done")
            fifo_end = datetime.datetime.now() + datetime.timedelta(seconds=20)
            while not (tmp_path / "done").exists():
                assert datetime.datetime.now() < fifo_end
    assert (tmp_path / "done").read_text() == "done\n"


def test_an_order_to_nobody_is_an_error() -> None:
    with OrderLine() as line, pytest.raises(OrderLineError, match="not connected"):
        line.send("true")
