"""Take secrets out of texts and raw bytes that leave the device.

Two nets: patterns (private keys, bearer tokens, JSON web tokens, user names and query strings in
URLs, anything assigned to a name that sounds secret), and the values that such names have in the
configuration and the boot environment, wherever else they turn up. A pattern cannot know
everything: whoever puts a secret under a harmless name must not expect it to be found. Too much
taken out is better than too little.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

MARK = b"[redacted]"
_MIN_VALUE_BYTES = 6

_NAME = (
    rb"[A-Za-z0-9_.-]*(?:passw(?:or)?d|passphrase|passcode|passwd|secret|token|credential|"
    rb"private[-_]?key|api[-_]?key|access[-_]?key|authorization|cookie|psk|wifi[-_]?pass|_pass)"
    rb"[A-Za-z0-9_-]*"
)
_SECRET_NAME = re.compile(rb"(?i)" + _NAME)
# name = value, "name": "value", name: value; quoted values end at their quote.
_ASSIGNED = re.compile(
    rb"(?i)(?P<name>"
    + _NAME
    + rb")(?P<between>[\"']?\s{0,8}[:=]\s{0,8})"
    + rb"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|[^\s\"',;}\0][^\n\0]*)"
)
_WHOLE = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rb"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY-----.*?"
        rb"(?:-----END [A-Z0-9 ]{0,30}PRIVATE KEY-----|\0|\Z)",
        rb"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?",
        rb"(?i:(?<=bearer )|(?<=basic )|(?<=digest ))[^\s\"',;\0]+",
        rb"(?<=://)[^/\s@\"'\0]+(?=@)",
        # A signed link's query is what makes it one.
        rb"(?<=[?])[^\s\"'<>\0]*[=][^\s\"'<>\0]*",
    )
)


def secret_values(text: bytes) -> set[bytes]:
    """Return the values that names which sound secret have in a configuration text."""
    found = set()
    for match in _ASSIGNED.finditer(text):
        value = match["value"].strip().strip(b"\"'")
        if len(value) >= _MIN_VALUE_BYTES:
            found.add(value)
    return found


def redact(content: bytes, values: Collection[bytes] = (), *, keep_length: bool = False) -> bytes:
    """Return `content` without secrets.

    `values` are taken out wherever they stand. With `keep_length` every byte taken out becomes
    an `X`, so that offsets in a raw image stay what they were.
    """

    def mark(found: bytes) -> bytes:
        return b"X" * len(found) if keep_length else MARK

    for value in sorted(values, key=len, reverse=True):
        content = content.replace(value, mark(value))
    for pattern in _WHOLE:
        content = pattern.sub(lambda match: mark(match[0]), content)
    return _ASSIGNED.sub(
        lambda match: match["name"] + match["between"] + mark(match["value"]), content
    )


def redact_json(value: Any, values: Collection[bytes] = ()) -> Any:
    """Return a JSON value without secrets: each text by itself, and all below a secret's name."""
    if isinstance(value, dict):
        return {
            redact_json(key, values): MARK.decode()
            if item and _SECRET_NAME.fullmatch(key.encode())
            else redact_json(item, values)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_json(item, values) for item in value]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        clean = redact(value.encode("utf-8", "surrogateescape"), values)
        return clean.decode("utf-8", "replace")
    return value
