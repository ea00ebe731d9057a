"""The texts inside an artifact: version, manifest, header-info, type-info.

Field names and meaning are those of the public Artifact v3 description. Parsing is strict about
types and duplicates and lenient about unknown JSON fields, which newer writers may add. Nothing
here reads or writes files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from updater.artifact.errors import ArtifactFormatError
from updater.artifact.tar import check_name

VERSION = b'{"format":"mender","version":3}'
ROOTFS_IMAGE = "rootfs-image"
DEFAULT_CLEARS = ("artifact_group", "rootfs_image_checksum", "rootfs-image.*")
_FILE_NAME = re.compile(r"[A-Za-z0-9.,_-]{1,255}")
_PAYLOAD_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SCRIPT_NAME = re.compile(r"([A-Za-z]+)_(?:Enter|Leave|Error)_[0-9]{2}(?:_[^\s/]+)?")
# The states whose scripts come in the artifact; those of Idle, Sync and Download are the device's.
_SCRIPT_STATES = (
    "ArtifactInstall",
    "ArtifactReboot",
    "ArtifactCommit",
    "ArtifactRollback",
    "ArtifactRollbackReboot",
    "ArtifactFailure",
)
_MANIFEST_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_MAX_MANIFEST_LINES = 10_000
_MAX_TEXT = 4096

Depends = Mapping[str, tuple[str, ...]]


class HeaderInfo(NamedTuple):
    """`header-info`: what the artifact is and which devices may take it.

    A payload type of None (JSON null) means that there is no payload: an artifact that only says
    what a device runs, as `mender-artifact write bootstrap-artifact` makes them.
    """

    payload_types: tuple[str | None, ...]
    provides: Mapping[str, str]
    depends: Depends

    @property
    def artifact_name(self) -> str:
        """The artifact's name; always present after parsing."""
        return self.provides["artifact_name"]

    @property
    def device_types(self) -> tuple[str, ...]:
        """The device types that may install it; never empty after parsing."""
        return self.depends["device_type"]


class TypeInfo(NamedTuple):
    """`headers/0000/type-info`: what a payload provides, needs and clears.

    `clears` is None when the artifact says nothing, which by the format means "all".
    """

    provides: Mapping[str, str]
    depends: Depends
    clears: tuple[str, ...] | None


def parse_version(content: bytes) -> None:
    """Refuse anything but Artifact version 3."""
    value = _object(content, "version")
    if value.get("format") != "mender":
        raise ArtifactFormatError(f"not a Mender artifact: format is {value.get('format')!r}")
    version = value.get("version")
    if type(version) is not int or version != 3:
        raise ArtifactFormatError(f"artifact version {version!r} is not supported; 3 is")
    if len(value) != 2:
        raise ArtifactFormatError("version: unknown fields")


def parse_manifest(content: bytes) -> dict[str, str]:
    """Return path → SHA-256 (hexadecimal) of every member that the manifest lists."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactFormatError("manifest: not UTF-8") from error
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    if not 0 < len(lines) <= _MAX_MANIFEST_LINES:
        raise ArtifactFormatError(f"manifest: {len(lines)} lines")
    entries: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _MANIFEST_LINE.fullmatch(line)
        if match is None:
            raise ArtifactFormatError(
                f"manifest line {number}: not 'sha256, two spaces, path': {line[:80]!r}"
            )
        checksum, name = match.groups()
        check_name(name, f"manifest line {number}")
        if name in entries:
            raise ArtifactFormatError(f"manifest line {number}: {name!r} is listed twice")
        entries[name] = checksum
    return entries


def format_manifest(entries: Mapping[str, str]) -> bytes:
    """Return the manifest's bytes, in the order of `entries`."""
    return "".join(f"{checksum}  {name}\n" for name, checksum in entries.items()).encode()


def parse_header_info(content: bytes) -> HeaderInfo:
    """Parse `header-info`; artifact_name and device_type must be there."""
    value = _object(content, "header-info")
    payloads = value.get("payloads")
    if not isinstance(payloads, list) or not payloads:
        raise ArtifactFormatError("header-info: 'payloads' is missing or empty")
    types: list[str | None] = []
    for payload in payloads:
        if not isinstance(payload, dict) or "type" not in payload:
            raise ArtifactFormatError("header-info: a payload without a type")
        kind = payload["type"]
        types.append(None if kind is None else check_payload_type(kind))
    provides = _strings(value.get("artifact_provides"), "header-info: artifact_provides")
    depends = _lists(value.get("artifact_depends"), "header-info: artifact_depends")
    if not provides.get("artifact_name"):
        raise ArtifactFormatError("header-info: no artifact_name")
    if not depends.get("device_type"):
        raise ArtifactFormatError("header-info: no device_type")
    return HeaderInfo(tuple(types), provides, depends)


def format_header_info(info: HeaderInfo) -> bytes:
    """Return `header-info` as compact JSON."""
    return _compact(
        {
            "payloads": [{"type": kind} for kind in info.payload_types],
            "artifact_provides": dict(info.provides),
            "artifact_depends": {key: list(values) for key, values in info.depends.items()},
        }
    )


def parse_type_info(content: bytes, payload_type: str | None) -> TypeInfo:
    """Parse `type-info`. `mender-artifact` 3.9 leaves the type empty for rootfs images."""
    value = _object(content, "type-info")
    kind = value.get("type")
    if kind not in (None, "", payload_type):
        raise ArtifactFormatError(f"type-info: type {kind!r} differs from {payload_type!r}")
    clears = value.get("clears_artifact_provides")
    if clears is not None:
        clears = _list(clears, "type-info: clears_artifact_provides")
    return TypeInfo(
        _strings(value.get("artifact_provides"), "type-info: artifact_provides"),
        _lists(value.get("artifact_depends"), "type-info: artifact_depends"),
        clears,
    )


def format_type_info(info: TypeInfo, payload_type: str | None) -> bytes:
    """Return `type-info` as compact JSON; a single value a key stands without its list."""
    value: dict[str, object] = {"type": payload_type}
    if info.depends:
        value["artifact_depends"] = {
            key: values[0] if len(values) == 1 else list(values)
            for key, values in sorted(info.depends.items())
        }
    if info.provides:
        value["artifact_provides"] = dict(sorted(info.provides.items()))
    if info.clears is not None:
        value["clears_artifact_provides"] = list(info.clears)
    return _compact(value)


def parse_meta_data(content: bytes) -> dict[str, Any]:
    """Parse a payload's `meta-data`: nothing, or one JSON object."""
    return _object(content, "meta-data") if content.strip() else {}


def format_meta_data(value: Mapping[str, Any]) -> bytes:
    """Return `meta-data` as compact JSON with sorted keys, as `mender-artifact` writes it."""
    try:
        text = json.dumps(
            value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, sort_keys=True
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactFormatError(f"meta-data: not JSON ({error})") from error


def check_payload_type(value: object) -> str:
    """Refuse a payload type that is no plain name: it becomes the name of a program."""
    if not isinstance(value, str) or _PAYLOAD_TYPE.fullmatch(value) is None:
        raise ArtifactFormatError(
            f"malformed payload type {value!r}: a letter or digit, then up to 63 of"
            " letters, digits, '_', '.' and '-'"
        )
    return value


def check_file_name(name: str, where: str) -> str:
    """Refuse a payload file's name that `mender-artifact` would not write: it goes to modules."""
    if _FILE_NAME.fullmatch(name) is None or name in (".", ".."):
        raise ArtifactFormatError(
            f"{where}: {name[:80]!r} is not a plain file name; letters, digits and '.,_-' are"
        )
    return name


def type_words(payload_type: str | None) -> str:
    """Return a payload type for a message."""
    return "none" if payload_type is None else payload_type


def check_script_name(name: str) -> str:
    """Refuse a state script whose name is not `State_Action_NN[_text]` of an artifact's state."""
    match = _SCRIPT_NAME.fullmatch(name)
    if match is None or match[1] not in _SCRIPT_STATES or not name.isprintable():
        raise ArtifactFormatError(
            f"script {name[:80]!r}: not named State_Action_NN[_text] with a state of"
            f" {', '.join(_SCRIPT_STATES)} and an action of Enter, Leave, Error"
        )
    return name


def check_text(value: str, what: str) -> str:
    """Refuse a text that is empty, too long or unprintable; return it otherwise."""
    if not value or len(value) > _MAX_TEXT or not value.isprintable():
        raise ArtifactFormatError(
            f"{what}: {value[:80]!r} is empty, longer than {_MAX_TEXT} characters or unprintable"
        )
    return value


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _object(content: bytes, what: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ArtifactFormatError(f"{what}: a JSON key occurs twice")
        return value

    try:
        value = json.loads(content, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ArtifactFormatError(f"{what}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtifactFormatError(f"{what}: not a JSON object")
    return value


def _strings(value: object, what: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ArtifactFormatError(f"{what}: not an object")
    for key, text in value.items():
        check_text(key, what)
        if not isinstance(text, str):
            raise ArtifactFormatError(f"{what}: {key!r} is not a string")
        if text:
            check_text(text, f"{what}: {key}")
    return value


def _lists(value: object, what: str) -> dict[str, tuple[str, ...]]:
    """Accept {"key": ["a", "b"]} and the equivalent {"key": "a"}."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ArtifactFormatError(f"{what}: not an object")
    result = {}
    for key, texts in value.items():
        check_text(key, what)
        if isinstance(texts, str):
            texts = [texts]  # noqa: PLW2901
        if texts is None:
            continue
        result[key] = _list(texts, f"{what}: {key}")
    return result


def _list(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ArtifactFormatError(f"{what}: not a list of strings")
    return tuple(check_text(text, what) for text in value)
