"""Keys and signatures of the manifest.

Written signatures: ECDSA on P-256 with SHA-256 as raw R‖S (64 bytes), RSA PKCS#1 v1.5 with
SHA-256, or Ed25519; base64, no line break, as `mender-artifact` writes them. Read signatures may
also be ECDSA in DER. The signed message is the manifest's bytes. ECDSA nonces follow RFC 6979
where the installed `cryptography` can (43 and newer), which makes signing deterministic.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from updater.artifact.errors import ArtifactError, ArtifactSignatureError

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
MAX_SIGNATURE_BYTES = 4096
_MIN_RSA_BITS = 2048
_MAX_KEY_FILE_BYTES = 64 * 1024


def load_private_key(path: Path | str) -> PrivateKey:
    """Read an unencrypted PEM private key (PKCS#8, SEC 1 or PKCS#1)."""
    pem = _read_key_file(path)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path}: not an unencrypted PEM private key") from error
    if isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        _check_strength(key.public_key(), path)
        return key
    raise ArtifactError(f"{path}: keys must be ECDSA P-256, RSA or Ed25519")


def load_public_key(path: Path | str) -> PublicKey:
    """Read a PEM public key."""
    pem = _read_key_file(path)
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"{path}: not a PEM public key") from error
    if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey):
        _check_strength(key, path)
        return key
    raise ArtifactError(f"{path}: keys must be ECDSA P-256, RSA or Ed25519")


def sign(message: bytes, key: PrivateKey) -> bytes:
    """Return the base64 signature for `manifest.sig`."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        raw = key.sign(message)
    elif isinstance(key, rsa.RSAPrivateKey):
        raw = key.sign(message, padding.PKCS1v15(), hashes.SHA256())
    else:
        r, s = decode_dss_signature(key.sign(message, _ecdsa_for_signing()))
        raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    return base64.b64encode(raw)


def verify(message: bytes, signature: bytes, keys: Sequence[PublicKey]) -> None:
    """Pass if one of `keys` made `signature` (base64) over `message`."""
    try:
        raw = base64.b64decode(signature.strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArtifactSignatureError("manifest.sig is not base64") from error
    if not any(_matches(message, raw, key) for key in keys):
        raise ArtifactSignatureError(
            f"the signature was made by none of the {len(keys)} trusted key(s)"
        )


def _matches(message: bytes, raw: bytes, key: PublicKey) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(raw, message)
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(raw, message, padding.PKCS1v15(), hashes.SHA256())
        else:
            key.verify(_as_der(raw), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True


def _as_der(raw: bytes) -> bytes:
    # A DER signature of P-256 can have 64 bytes only with an R or S that is 2^-40 unlikely.
    if len(raw) != 64:
        return raw
    return encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))


def _ecdsa_for_signing() -> ec.ECDSA:
    try:
        return ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    except (TypeError, UnsupportedAlgorithm):
        return ec.ECDSA(hashes.SHA256())


def _check_strength(key: PublicKey, path: Path | str) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name != "secp256r1":
        raise ArtifactError(f"{path}: ECDSA keys must be on P-256, this one is on {key.curve.name}")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _MIN_RSA_BITS:
        raise ArtifactError(f"{path}: RSA keys need at least {_MIN_RSA_BITS} bits")


def _read_key_file(path: Path | str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            pem = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot read the key: {error.strerror}") from error
    if len(pem) > _MAX_KEY_FILE_BYTES:
        raise ArtifactError(f"{path}: too large for a key")
    return pem
