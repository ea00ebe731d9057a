"""What the server signs: device tokens and download links. Pure, no database.

A device token is a JWT (RFC 7519, HS256 by PyJWT) that names the device and the key it
authenticated with; the database decides on every request whether that key still counts. A link
holds the artifact, its end, and an HMAC-SHA256 over both.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import NamedTuple

import jwt

_ISSUER = "brownout"


class DeviceToken(NamedTuple):
    """A checked device token."""

    device_id: str
    key_id: str


class Signer:
    """Signs and checks with keys derived from one secret, one for each purpose."""

    def __init__(self, secret: bytes) -> None:
        self._device = hmac.digest(secret, b"brownout device token", "sha256")
        self._link = hmac.digest(secret, b"brownout download link", "sha256")

    def device_token(self, device_id: str, key_id: str, now: float, lifetime_s: int) -> str:
        """Return a token for `device_id`."""
        claims = {
            "iss": _ISSUER,
            "sub": device_id,
            "key": key_id,
            "iat": int(now),
            "exp": int(now) + lifetime_s,
        }
        return jwt.encode(claims, self._device, algorithm="HS256")

    def check_device_token(self, token: str, now: float) -> DeviceToken | None:
        """Return what a token says, or None if it is forged, malformed or over."""
        try:
            claims = jwt.decode(
                token,
                self._device,
                algorithms=["HS256"],
                issuer=_ISSUER,
                options={
                    "require": ["exp", "sub", "iss"],
                    "verify_exp": False,
                    "verify_iat": False,
                },
            )
        except (jwt.InvalidTokenError, ValueError):
            return None
        expires, device_id, key_id = claims.get("exp"), claims.get("sub"), claims.get("key")
        if not isinstance(expires, int) or now >= expires:
            return None
        if not isinstance(device_id, str) or not isinstance(key_id, str):
            return None
        return DeviceToken(device_id, key_id)

    def link(self, artifact_id: str, expires: int) -> str:
        """Return the signature of a download link."""
        message = f"{artifact_id}\n{expires}".encode()
        return hmac.new(self._link, message, hashlib.sha256).hexdigest()

    def check_link(self, artifact_id: str, expires: int, signature: str, now: float) -> bool:
        """Return whether a link is ours and not over."""
        expected = self.link(artifact_id, expires)
        return hmac.compare_digest(expected.encode(), signature.encode()) and now < expires
