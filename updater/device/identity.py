"""Who the device is: its key, its identity, its inventory.

The private key has a file of its own on the data partition, made at first use, readable by root
alone, and shared by both systems; or it is in a PKCS#11 token (`token_key.py`). Identity is what an
executable prints as `key=value` lines (Mender's `mender-device-identity`); without one, the address
of the first network interface. Inventory is what every executable `mender-inventory-*` prints, and
what the client knows itself. A repeated key makes a list. A script that fails costs its own
attributes, not the others'.
"""

from __future__ import annotations

import base64
import json
import os
from typing import TYPE_CHECKING, Protocol

from updater.device import files, process
from updater.device.config import Config, ServerConfig
from updater.device.console import say
from updater.device.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    PrivateKey = EllipticCurvePrivateKey | Ed25519PrivateKey | RSAPrivateKey

_TIMEOUT_S = 60.0
_MAX_ATTRIBUTES = 200

Attributes = dict[str, str | list[str]]


class Key(Protocol):
    """What the device proves itself with."""

    public_pem: str

    def sign(self, body: bytes) -> str:
        """Return the base64 signature over exactly these bytes, as the device API wants it."""
        ...


def open_key(config: Config) -> Key:
    """Return the key that the configuration names. Raises StoreError or ConfigError."""
    if config.server.key_uri:
        from updater.device.token_key import TokenKey  # noqa: PLC0415

        return TokenKey(config.server.key_uri)
    path = config.server.key_file or f"{config.data_dir}/device-key.pem"
    return DeviceKey(path, config.server.key_type)


class DeviceKey:
    """The key at `path`; made there if there is none. Raises StoreError or ConfigError."""

    def __init__(self, path: str, kind: str) -> None:
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

        try:
            with open(path, "rb") as file:  # noqa: PTH123
                content = file.read(64 * 1024)
        except FileNotFoundError:
            content = _make_key(path, kind)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            self._key: PrivateKey = serialization.load_pem_private_key(content, None)  # type: ignore[assignment]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not a private key without a password") from error
        self.public_pem = (
            self._key.public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            .decode("ascii")
        )

    def sign(self, body: bytes) -> str:
        """Return the base64 signature over exactly these bytes, as the device API wants it."""
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa  # noqa: PLC0415

        if isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(body, padding.PKCS1v15(), hashes.SHA256())
        elif isinstance(self._key, ec.EllipticCurvePrivateKey):
            signature = self._key.sign(body, ec.ECDSA(hashes.SHA256()))
        else:
            signature = self._key.sign(body)
        return base64.b64encode(signature).decode("ascii")


def _make_key(path: str, kind: str) -> bytes:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    key: PrivateKey
    if kind == "rsa":
        key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    elif kind == "ecdsa":
        key = ec.generate_private_key(ec.SECP256R1())
    else:
        key = ed25519.Ed25519PrivateKey.generate()
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    try:
        files.write_durably(path, content, 0o600)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    say(f"made a device key ({kind}): {path}")
    return content


def identity(config: ServerConfig) -> str:
    """Return the identity as the JSON text that the server is told."""
    if os.access(config.identity, os.X_OK):
        result = _run(config.identity)
        values = parse(result.output) if result is not None and result.status == 0 else {}
        if not values:
            how = result.failure() if result is not None else "cannot be run"
            raise ConfigError(f"identity script {config.identity} {how}: the device has no name")
    else:
        values = {"mac": _first_address()}
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def inventory(config: ServerConfig, known: dict[str, str]) -> list[dict[str, object]]:
    """Return the attributes as the device API wants them, `known` ones last."""
    found: Attributes = {}
    try:
        names = sorted(os.listdir(config.inventory))  # noqa: PTH208
    except OSError:
        names = []
    for name in names:
        path = f"{config.inventory}/{name}"
        if not name.startswith("mender-inventory-") or not os.access(path, os.X_OK):
            continue
        result = _run(path)
        if result is None or result.status != 0:
            say(f"warning: inventory script {name} {result.failure() if result else 'failed'}")
            continue
        found.update(parse(result.output))
    found.update(known)
    pairs = list(found.items())[:_MAX_ATTRIBUTES]
    return [{"name": name, "value": value} for name, value in pairs]


def parse(output: bytes) -> Attributes:
    """Read `key=value` lines; a repeated key makes a list."""
    values: Attributes = {}
    for line in output.decode("utf-8", "replace").splitlines():
        key, equals, value = line.partition("=")
        if not equals or not key:
            continue
        before = values.get(key)
        if before is None:
            values[key] = value
        elif isinstance(before, list):
            before.append(value)
        else:
            values[key] = [before, value]
    return values


def _run(path: str) -> process.Completed | None:
    try:
        return process.run([path], timeout_s=_TIMEOUT_S)
    except OSError as error:
        say(f"warning: {path}: {error.strerror}")
        return None


def _first_address() -> str:
    base = "/sys/class/net"
    try:
        for name in sorted(os.listdir(base)):  # noqa: PTH208
            if name != "lo":
                with open(f"{base}/{name}/address", encoding="ascii") as file:  # noqa: PTH123
                    address = file.read(64).strip()
                if address and address != "00:00:00:00:00:00":
                    return address
    except OSError as error:
        raise ConfigError(f"{base}: {error.strerror}: the device has no identity") from error
    raise ConfigError("no network interface has an address: the device has no identity")
