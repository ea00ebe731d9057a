"""The artifact server speaks TLS only, resumes downloads, and serves nothing but artifacts."""

import http.client
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from updater.server import ArtifactFileServer, ServerError

CONTENT = bytes(i % 256 for i in range(200_000))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key, made by openssl."""
    folder = tmp_path_factory.mktemp("pair")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def server(tmp_path: Path, pair: tuple[Path, Path]) -> Iterator[ArtifactFileServer]:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    (folder / "v2.mender").write_bytes(CONTENT)
    (folder / "secret.key").write_text("not an artifact")
    (tmp_path / "outside.mender").write_text("not in the folder")
    with ArtifactFileServer(folder, *pair) as running:
        yield running


def get(
    server: ArtifactFileServer, pair: tuple[Path, Path], path: str, **headers: str
) -> http.client.HTTPResponse:
    context = ssl.create_default_context(cafile=str(pair[0]))
    connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=5)
    connection.request("GET", path, headers=headers)
    return connection.getresponse()


def test_a_whole_download(server: ArtifactFileServer, pair: tuple[Path, Path]) -> None:
    response = get(server, pair, "/artifacts/v2.mender")
    assert (response.status, response.read()) == (200, CONTENT)
    assert response.getheader("content-length") == str(len(CONTENT))


def test_a_resumed_download_has_an_exact_range(
    server: ArtifactFileServer, pair: tuple[Path, Path]
) -> None:
    response = get(server, pair, "/artifacts/v2.mender", Range="bytes=150000-")
    assert response.status == 206
    assert response.getheader("content-range") == "bytes 150000-199999/200000"
    assert response.read() == CONTENT[150_000:]


@pytest.mark.parametrize(
    "path",
    ["/artifacts/secret.key", "/artifacts/..%2foutside.mender", "/artifacts/../outside.mender"],
)
def test_nothing_but_artifacts_is_served(
    server: ArtifactFileServer, pair: tuple[Path, Path], path: str
) -> None:
    assert get(server, pair, path).status == 404


def test_plain_http_gets_no_answer(server: ArtifactFileServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/artifacts/v2.mender")
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        connection.getresponse()


def test_an_old_tls_version_is_rejected(
    server: ArtifactFileServer, pair: tuple[Path, Path]
) -> None:
    context = ssl.create_default_context(cafile=str(pair[0]))
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=5)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connection.request("GET", "/artifacts/v2.mender")


def test_a_port_in_use_is_one_clear_line(
    server: ArtifactFileServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        ArtifactFileServer(tmp_path, *pair, port=server.port)


def test_a_bad_key_is_one_clear_line(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ServerError, match=r"key\.pem: not a usable certificate and key"):
        ArtifactFileServer(tmp_path, pair[0], tmp_path / "key.pem")


CHACHA_FIRST = """
import socket, ssl, sys
context = ssl.create_default_context(cafile=sys.argv[1])
context.check_hostname = False
with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as plain:
    with context.wrap_socket(plain) as secure:
        print(secure.cipher()[0])
"""
ORDER = """openssl_conf = a
[a]
ssl_conf = b
[b]
system_default = c
[c]
Ciphersuites = TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384
"""


def test_the_client_chooses_the_cipher(
    server: ArtifactFileServer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Only the device knows what its processor is fast at."""
    (tmp_path / "openssl.cnf").write_text(ORDER)
    chosen = [
        subprocess.run(
            [sys.executable, "-c", CHACHA_FIRST, pair[0], str(server.port)],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for environment in ({}, {"OPENSSL_CONF": str(tmp_path / "openssl.cnf")})
    ]
    assert chosen == ["TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"]
