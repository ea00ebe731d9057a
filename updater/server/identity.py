"""A device's identity and the signature of its auth request: pure functions over bytes.

Facts: the device API's public description and Debian's mender-client 3.4. The signature covers
the request's raw body, a trailing newline included: RSA PKCS#1 v1.5 with SHA-256, ECDSA in DER
with SHA-256, or Ed25519 over the body itself. Identity data is a JSON object; two devices are the
same when it is equal, whatever the order of its keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from updater.server.errors import RefusedError

DevicePublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_MIN_RSA_BITS = 2048
_MAX_RSA_BITS = 8192
_MAX_ATTRIBUTES = 64


class Identity(NamedTuple):
    """Canonical identity data and its hash."""

    text: str
    digest: str


class Key(NamedTuple):
    """A public key in one spelling, and its hash."""

    key: DevicePublicKey
    pem: str
    digest: str


def parse_identity(text: str) -> Identity:
    """Parse `id_data`: a JSON object of strings (or lists of strings). Raises RefusedError(400)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "id_data is not JSON") from error
    if not isinstance(value, dict) or not value or len(value) > _MAX_ATTRIBUTES:
        raise RefusedError(400, "id_data is not a JSON object with 1 to 64 attributes")
    for name, content in value.items():
        texts = content if isinstance(content, list) else [content]
        for item in (name, *texts):
            if not isinstance(item, str) or len(item) > 1024 or not _storable(item):
                raise RefusedError(400, "id_data: names and values have at most 1024 characters")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Identity(canonical, hashlib.sha256(canonical.encode()).hexdigest())


def parse_key(pem: str) -> Key:
    """Parse a PEM public key and check its strength. Raises RefusedError(400)."""
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise RefusedError(400, "pubkey is not a PEM public key") from error
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        raise RefusedError(400, "pubkey must be RSA, ECDSA or Ed25519")
    if isinstance(key, rsa.RSAPublicKey) and not _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
        raise RefusedError(400, f"an RSA pubkey needs {_MIN_RSA_BITS} to {_MAX_RSA_BITS} bits")
    if isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < 256:
        raise RefusedError(400, "an ECDSA pubkey needs at least 256 bits")
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    text = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()
    return Key(key, text, hashlib.sha256(der).hexdigest())


def signature_is_valid(key: DevicePublicKey, signature: str, body: bytes) -> bool:
    """Return whether `signature` (base64) was made by `key` over `body`."""
    try:
        raw = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        return False
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(raw, body)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(raw, body, padding.PKCS1v15(), hashes.SHA256())
        else:
            key.verify(raw, body, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _storable(text: str) -> bool:
    """PostgreSQL holds no NUL, and neither database holds half a surrogate pair."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)
