"""Development keys: the TLS authority devices trust, the server's certificate, the artifact key.

Made once per checkout below `build/keys/` and never committed. They are inputs of the images. The
certificates are valid from 2020 on, so that a device whose clock is a little behind accepts them.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from images.errors import ImageError
from images.store import exclusive, sweep, write_atomically

SERVER_NAME = "updates.brownout.test"
_FROM = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(2049, 12, 31, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Keys:
    """Paths of the development keys, all PEM.

    Attributes:
        ca_certificate: the authority that devices pin.
        ca_key: its private key.
        server_certificate: for `updates.brownout.test`, localhost, 10.0.2.2 and 127.0.0.1.
        server_key: its private key.
        artifact_public: what devices verify artifacts with (ECDSA P-256).
        artifact_key: what artifacts are signed with.
    """

    ca_certificate: Path
    ca_key: Path
    server_certificate: Path
    server_key: Path
    artifact_public: Path
    artifact_key: Path


def ensure_keys(directory: Path) -> Keys:
    """The development keys in `directory`, made if it has none yet.

    Raises:
        ImageError: the set is incomplete; nothing is overwritten then.
    """
    keys = Keys(
        ca_certificate=directory / "ca.pem",
        ca_key=directory / "ca.key",
        server_certificate=directory / "server.pem",
        server_key=directory / "server.key",
        artifact_public=directory / "artifact.pem",
        artifact_key=directory / "artifact.key",
    )
    complete = directory / "complete"
    if complete.exists():
        missing = [path.name for path in vars(keys).values() if not path.is_file()]
        if missing:
            raise ImageError(
                f"{directory} lacks {', '.join(missing)}: restore it, or delete the folder to "
                "have new keys made (images must be built anew then)"
            )
        return keys
    with exclusive(directory / ".lock", "the development keys"):
        if not complete.exists():
            sweep(directory)
            _make(keys)
            write_atomically(complete, b"")
    return keys


def _make(keys: Keys) -> None:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("Brownout development CA", authority_key, None)
    server_key = ec.generate_private_key(ec.SECP256R1())
    server = _certificate(SERVER_NAME, server_key, (authority, authority_key))
    artifact_key = ec.generate_private_key(ec.SECP256R1())
    write_atomically(keys.ca_certificate, authority.public_bytes(serialization.Encoding.PEM))
    write_atomically(keys.server_certificate, server.public_bytes(serialization.Encoding.PEM))
    write_atomically(
        keys.artifact_public,
        artifact_key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )
    for path, key in (
        (keys.ca_key, authority_key),
        (keys.server_key, server_key),
        (keys.artifact_key, artifact_key),
    ):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomically(path, pem, mode=0o600)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
) -> x509.Certificate:
    """A certificate for `name`: an authority's own one without an issuer, else a server's."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    is_authority = issuer is None
    signing_key = key if issuer is None else issuer[1]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
        .add_extension(_key_usage(is_authority), critical=True)
    )
    if not is_authority:
        addresses = ("10.0.2.2", "127.0.0.1")
        names: list[x509.GeneralName] = [x509.DNSName(name), x509.DNSName("localhost")]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signing_key, hashes.SHA256())


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
