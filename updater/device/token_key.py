"""The device's key in a PKCS#11 token (an HSM, a TPM, a smart card): it signs there, and stays.

An extra: the Python package PyKCS11 (Debian: python3-pykcs11) is imported only where `[server]
key_uri` names such a key, as RFC 7512 writes it:

    pkcs11:token=device;object=updater?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/updater/pin

The key is made by the token's own tools; RSA and ECDSA (P-256) keys with SHA-256 are used, as the
device API has them (PKCS#11 v2.40 §2.1, §2.3). The library is loaded anew for each operation, so
that a token that was away is found again, and nothing is held in between. Every signature is
checked with the token's public key before it is used. A PIN is read from its file; one in the
configuration is refused.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from updater.device.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    PublicKey = EllipticCurvePublicKey | RSAPublicKey

_MAX_PIN_BYTES = 256


class TokenUri(NamedTuple):
    """What a `pkcs11:` URI says; empty is what it doesn't."""

    module: str
    token: str = ""
    serial: str = ""
    label: str = ""
    id: bytes = b""
    pin_file: str = ""


def parse_uri(text: str) -> TokenUri:
    """Read a URI of RFC 7512; ConfigError for what is not understood, and for a PIN in it."""
    scheme, _, rest = text.partition(":")
    path, _, query = rest.partition("?")
    if scheme != "pkcs11":
        raise ConfigError("server.key_uri must begin with pkcs11:")
    found: dict[str, Any] = {}
    names = {"token": "token", "serial": "serial", "object": "label"}
    for part in filter(None, path.split(";")):
        name, equals, value = part.partition("=")
        if name == "id" and equals:
            found["id"] = unquote_to_bytes(value)
        elif name in names and equals:
            found[names[name]] = unquote(value)
        elif part != "type=private":
            # To leave out what narrows the search could find another key.
            raise ConfigError(f"server.key_uri: {name!r} is not understood")
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name == "pin-value":
            raise ConfigError(
                "server.key_uri: a PIN does not belong in the configuration: use pin-source=file:…"
            )
        if name not in ("module-path", "pin-source"):
            raise ConfigError(f"server.key_uri: {name!r} is not understood")
        file = unquote(value).removeprefix("file:")
        if not file.startswith("/"):
            raise ConfigError(f"server.key_uri: {name} must be an absolute path")
        found["module" if name == "module-path" else "pin_file"] = file
    if "module" not in found:
        raise ConfigError("server.key_uri: module-path=… is missing: the token's PKCS#11 library")
    if not found.get("label") and not found.get("id"):
        raise ConfigError("server.key_uri: object=… or id=… is missing: which key?")
    return TokenUri(**found)


class TokenKey:
    """The key that `uri` names. Raises ConfigError, also for a token that is not there."""

    def __init__(self, uri: str) -> None:
        try:
            import PyKCS11  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                "server.key_uri needs the Python package PyKCS11 (Debian: python3-pykcs11)"
            ) from error
        self._uri = parse_uri(uri)
        self._kit: Any = PyKCS11
        with self._session() as session:
            self._find(session, PyKCS11.CKO_PRIVATE_KEY, "private")
            self._public = self._read_public(session)
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

        form = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public_pem = self._public.public_bytes(serialization.Encoding.PEM, form).decode()

    def sign(self, body: bytes) -> str:
        """Return the base64 signature over exactly these bytes, made in the token."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils  # noqa: PLC0415

        kit = self._kit
        with self._session() as session:
            key = self._find(session, kit.CKO_PRIVATE_KEY, "private")
            if isinstance(self._public, rsa.RSAPublicKey):
                mechanism = kit.Mechanism(kit.CKM_SHA256_RSA_PKCS)
                signature = bytes(session.sign(key, body, mechanism))
            else:
                digest = hashlib.sha256(body).digest()
                raw = bytes(session.sign(key, digest, kit.Mechanism(kit.CKM_ECDSA)))
                half = len(raw) // 2
                numbers = (int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
                signature = utils.encode_dss_signature(*numbers)
        try:
            if isinstance(self._public, rsa.RSAPublicKey):
                self._public.verify(signature, body, padding.PKCS1v15(), hashes.SHA256())
            else:
                self._public.verify(signature, body, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature as error:
            raise ConfigError(
                f"{self._name()}: what the private key signs does not fit the public key beside it"
            ) from error
        return base64.b64encode(signature).decode("ascii")

    @contextlib.contextmanager
    def _session(self) -> Iterator[Any]:
        """Open a session with the token, logged in; whatever the token says is a ConfigError."""
        kit = self._kit
        library = kit.PyKCS11Lib()
        try:
            library.load(self._uri.module)
        except kit.PyKCS11Error as error:
            raise ConfigError(f"{self._uri.module}: cannot be used: {error}") from error
        try:
            session = library.openSession(self._slot(library), kit.CKF_SERIAL_SESSION)
            try:
                if self._uri.pin_file:
                    session.login(_read_pin(self._uri.pin_file))
                yield session
            finally:
                session.closeSession()
        except kit.PyKCS11Error as error:
            raise ConfigError(f"{self._name()}: {error}") from error
        finally:
            library.unload()

    def _slot(self, library: Any) -> int:
        found = []
        for slot in library.getSlotList(tokenPresent=True):
            info = library.getTokenInfo(slot)
            if self._uri.token in ("", _text(info.label)) and (
                self._uri.serial in ("", _text(info.serialNumber))
            ):
                found.append(int(slot))
        if len(found) != 1:
            many = f"{len(found)} tokens fit" if found else "there is no such token"
            raise ConfigError(f"{self._name()}: {many}")
        return found[0]

    def _find(self, session: Any, kind: int, words: str) -> Any:
        kit = self._kit
        wanted: list[tuple[int, object]] = [(kit.CKA_CLASS, kind)]
        if self._uri.label:
            wanted.append((kit.CKA_LABEL, self._uri.label))
        if self._uri.id:
            wanted.append((kit.CKA_ID, tuple(self._uri.id)))
        found = session.findObjects(wanted)
        if len(found) != 1:
            many = f"{len(found)} {words} keys fit" if found else f"there is no such {words} key"
            hint = "" if found or self._uri.pin_file else " (one that a PIN hides, perhaps)"
            raise ConfigError(f"{self._name()}: {many}{hint}")
        return found[0]

    def _read_public(self, session: Any) -> PublicKey:
        from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415

        kit = self._kit
        key = self._find(session, kit.CKO_PUBLIC_KEY, "public")
        (kind,) = session.getAttributeValue(key, [kit.CKA_KEY_TYPE])
        try:
            if kind == kit.CKK_RSA:
                numbers = session.getAttributeValue(key, [kit.CKA_MODULUS, kit.CKA_PUBLIC_EXPONENT])
                modulus, exponent = (int.from_bytes(bytes(each), "big") for each in numbers)
                return rsa.RSAPublicNumbers(exponent, modulus).public_key()
            if kind == kit.CKK_EC:
                (point,) = session.getAttributeValue(key, [kit.CKA_EC_POINT])
                # A DER octet string around the point; a curve other than P-256 has another length.
                return ec.EllipticCurvePublicKey.from_encoded_point(
                    ec.SECP256R1(), bytes(point)[-65:]
                )
        except ValueError as error:
            raise ConfigError(
                f"{self._name()}: not a key of a kind that is used: {error}"
            ) from error
        raise ConfigError(f"{self._name()}: neither an RSA nor an ECDSA key")

    def _name(self) -> str:
        where = f" in token {self._uri.token}" if self._uri.token else ""
        return f"key {self._uri.label or self._uri.id.hex()}{where}"


def _text(field: object) -> str:
    return str(field).rstrip("\0 ")


def _read_pin(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            return file.read(_MAX_PIN_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
