"""Certificates that a device must not accept: expired, not valid yet, another name's, a stranger's.

Made with the authority that the device trusts (but for the stranger's), so that nothing but the
fault named is wrong with them. RFC 5280 for validity, RFC 9525 for names.
"""

from __future__ import annotations

import datetime
import ssl
import tempfile
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CertificateKind = Literal["good", "expired", "not-yet-valid", "wrong-name", "unknown-authority"]

_DAY = datetime.timedelta(days=1)
_WRONG_NAME = "somewhere-else.brownout.test"
_STRANGER = "An authority that nobody knows"


class CertificateError(Exception):
    """The authority's files can't be used; the message names them."""


def make_certificate(
    kind: CertificateKind,
    name: str,
    ca_certificate: bytes,
    ca_key: bytes,
    now: datetime.datetime,
) -> tuple[bytes, bytes]:
    """A certificate for `name`, wrong in one way, and its key: both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = x509.load_pem_x509_certificate(ca_certificate).subject
    signer = serialization.load_pem_private_key(ca_key, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    if kind == "unknown-authority":
        authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _STRANGER)])
        signer = ec.generate_private_key(ec.SECP256R1())
    begins, ends = {
        "expired": (now - 400 * _DAY, now - _DAY),
        # Devices' clocks may run ahead of ours by days, not by decades.
        "not-yet-valid": (now + 9000 * _DAY, now + 9400 * _DAY),
    }.get(kind, (now - 400 * _DAY, now + 400 * _DAY))
    shown = _WRONG_NAME if kind == "wrong-name" else name
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, shown)]))
        .issuer_name(authority)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(shown)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def server_context(
    kind: CertificateKind,
    name: str,
    ca_certificate: Path,
    ca_key: Path,
    now: datetime.datetime | None = None,
) -> ssl.SSLContext:
    """A TLS server's context that shows such a certificate; `now` is the present unless given.

    Raises:
        CertificateError: the authority's files are missing or unusable.
    """
    moment = datetime.datetime.now(datetime.UTC) if now is None else now
    try:
        pair = make_certificate(
            kind, name, ca_certificate.read_bytes(), ca_key.read_bytes(), moment
        )
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(
            f"{ca_certificate} and {ca_key}: not a usable authority: {error}"
        ) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:  # ssl takes a file only
        file.write(b"".join(pair))
        file.flush()
        context.load_cert_chain(file.name)
    return context
