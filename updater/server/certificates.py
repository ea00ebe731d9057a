"""A certificate authority of one's own, for development and for fleets that want no other.

X.509 by the `cryptography` library: an ECDSA P-256 authority, a server certificate for given
names, and client certificates for devices. RFC 5280 decides the extensions. No revocation: a
device is refused by rejecting its key.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from updater.server.errors import ServerError

_CA_DAYS = 3650
_LEAF_DAYS = 825
# A device without a clock of its own starts in the past; be valid from well before now.
_BACKDATED_DAYS = 30


class Authority:
    """An authority's certificate and private key."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def create(cls, name: str = "Brownout update server CA") -> Authority:
        """Make a new authority."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, subject, key.public_key(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        """Read an authority back from its two PEM files."""
        try:
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
            parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise ServerError(f"{key}: not a usable authority: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ServerError(f"{key}: the authority's key is not ECDSA")
        return cls(parsed, loaded)

    def server(self, names: list[str]) -> tuple[bytes, bytes]:
        """Return the PEM chain and PEM key of a server certificate for DNS names or addresses."""
        return self._leaf(names[0], names, ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, name: str) -> tuple[bytes, bytes]:
        """Return the PEM chain and PEM key of a client certificate."""
        return self._leaf(name, [], ExtendedKeyUsageOID.CLIENT_AUTH)

    def pem(self) -> bytes:
        """Return the authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the authority's private key."""
        return _key_pem(self._key)

    def fingerprint(self) -> str:
        """Return the certificate's SHA-256 as people compare it."""
        return self.certificate.fingerprint(hashes.SHA256()).hex(":").upper()

    def _leaf(
        self, common: str, names: list[str], purpose: x509.ObjectIdentifier
    ) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])
        builder = (
            _builder(subject, self.certificate.subject, key.public_key(), _LEAF_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM) + self.pem(), _key_pem(key)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=_BACKDATED_DAYS))
        .not_valid_after(now + datetime.timedelta(days=days - _BACKDATED_DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
