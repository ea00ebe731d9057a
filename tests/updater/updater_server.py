"""A real HTTPS server in a thread, with a test CA, that misbehaves on request."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Authority:
    """A CA and certificates of it, as files."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.ca_file = directory / "ca.pem"
        self._write(self.ca_file, builder.sign(self._key, hashes.SHA256()))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
        )

    def server_context(
        self, host: str, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> ssl.SSLContext:
        """Return a TLS context with a certificate for `host`."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = (
            self._builder(subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path = self.directory / f"{host}.pem"
        self._write(path, certificate)
        with path.open("ab") as file:
            file.write(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = maximum
        if maximum < ssl.TLSVersion.TLSv1_2:
            context.set_ciphers("ALL:@SECLEVEL=0")
        return context

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


class Request(http.server.BaseHTTPRequestHandler):
    """One request; what it does is the server's `behave`."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers.items()))
        self.server.behave(self, len(self.server.requests))
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return

    def serve(
        self,
        content: bytes,
        *,
        stop_after: int | None = None,
        reset: bool = False,
        ranges: bool = True,
        **overrides: str,
    ) -> None:
        """Answer properly, honouring Range, but break off after `stop_after` body bytes."""
        start = 0
        asked = self.headers.get("Range") if ranges else None
        etag = overrides.get("ETag", '"one"')
        if asked is not None and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            default = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", overrides.get("Content-Range", default))
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", overrides.get("Content-Length", str(len(body))))
        self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(body if stop_after is None else body[:stop_after])
        if stop_after is not None and reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


Behaviour = Callable[[Request, int], None]


class Server(http.server.ThreadingHTTPServer):
    """The server; `behave(request, number)` answers, numbers begin at 1."""

    daemon_threads = True
    behave: Behaviour

    def __init__(self, context: ssl.SSLContext, behave: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.behave = behave
        self.requests: list[dict[str, str]] = []
        self._context = context

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        connection.settimeout(10)
        return self._context.wrap_socket(connection, server_side=True), address

    def handle_error(self, request: object, client_address: object) -> None:
        return


@contextmanager
def serving(context: ssl.SSLContext, behave: Behaviour) -> Iterator[Server]:
    """Run a server for the block."""
    server = Server(context, behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
        assert not thread.is_alive()
