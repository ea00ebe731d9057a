"""What an artifact says, as plain values: for people, for scripts (`--json`), and to compare two.

`summarize` reads an artifact to its end, so a summary exists only of an artifact that was found
right. `differences` compares two summaries by meaning: the order of files and keys is no
difference, nor is how an artifact is packed (compression, signature) unless that is asked for.
`dump` takes an artifact apart into folders, and `write_arguments` says how to put it together
again. Nothing here trusts a name that the reader did not check.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from updater.artifact.errors import ArtifactError
from updater.artifact.metadata import type_words
from updater.artifact.reader import ArtifactReader, PayloadFile
from updater.artifact.tar import Counted

if TYPE_CHECKING:
    from updater.artifact.signature import PublicKey

_PACKING = ("compression", "payload_compression", "signed", "verified")

Progress = Callable[[int], None]


class Change(NamedTuple):
    """One difference: where, and what each side has there (None: nothing)."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {_words(self.before)} → {_words(self.after)}"


def summarize(
    path: Path | str, keys: Sequence[PublicKey] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Read and check the whole artifact at `path`; return what it says, ready for JSON.

    Keys of the result: `name`, `device_types`, `group` (or None), `provides`, `depends` and
    `clears` (payload; `clears` None: says nothing), `depends_names`, `depends_groups`, `payload`
    (its type, or None), `meta_data`, `files` and `scripts` (name → `size`, `sha256`; in order),
    `compression`, `payload_compression`, `signed`, `verified`. `progress` is called with the
    number of bytes read since the last call. Raises ArtifactError.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            reader = ArtifactReader(Counted(file, progress), keys)
            files = list(reader.files())
            return _summary(reader, files)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error


def _summary(reader: ArtifactReader, files: Sequence[PayloadFile]) -> dict[str, Any]:
    assert reader.complete
    info = reader.header_info
    return {
        "name": info.artifact_name,
        "device_types": list(info.device_types),
        "group": info.provides.get("artifact_group"),
        "depends_names": list(info.depends.get("artifact_name", ())),
        "depends_groups": list(info.depends.get("artifact_group", ())),
        "payload": reader.payload_type,
        "provides": dict(reader.type_info.provides),
        "depends": {key: list(values) for key, values in reader.type_info.depends.items()},
        "clears": None if reader.type_info.clears is None else list(reader.type_info.clears),
        "meta_data": reader.meta_data,
        "files": {file.name: {"size": file.size, "sha256": file.sha256} for file in files},
        "scripts": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in reader.scripts.items()
        },
        "compression": reader.header_compression,
        "payload_compression": reader.payload_compression,
        "signed": reader.signed,
        "verified": reader.verified,
    }


def describe(summary: Mapping[str, Any]) -> str:
    """Return a summary as lines for a person."""
    lines = [
        f"name: {summary['name']}",
        "format: mender, version 3",
        f"signature:{signature_words(summary).lstrip(',') or ' none'}",
        f"device types: {', '.join(summary['device_types'])}",
    ]
    if summary["group"] is not None:
        lines.append(f"group: {summary['group']}")
    for label, key in (("artifact", "depends_names"), ("group", "depends_groups")):
        if summary[key]:
            lines.append(f"needs {label}: {' or '.join(summary[key])}")
    lines.append(f"payload: {type_words(summary['payload'])}")
    lines += [
        f"file: {name}, {file['size']} bytes, sha256 {file['sha256']}"
        for name, file in summary["files"].items()
    ]
    lines += [f"provides: {key}={value}" for key, value in summary["provides"].items()]
    lines += [f"needs: {key}={' or '.join(v)}" for key, v in summary["depends"].items()]
    lines += [f"clears: {pattern}" for pattern in summary["clears"] or ()]
    lines += [
        f"script: {name}, {script['size']} bytes" for name, script in summary["scripts"].items()
    ]
    if summary["meta_data"]:
        lines.append(f"meta-data: {json.dumps(summary['meta_data'], ensure_ascii=True)}")
    lines.append(
        f"compression: {summary['compression']}"
        if summary["compression"] == summary["payload_compression"]
        else f"compression: {summary['compression']}, payload {summary['payload_compression']}"
    )
    return "\n".join(lines) + "\n"


def signature_words(summary: Mapping[str, Any]) -> str:
    """Say in a few words, after a comma, whose signature there is; nothing when there is none."""
    if summary["verified"]:
        return ", signed by a trusted key"
    return ", signed, not checked (give -k)" if summary["signed"] else ""


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], *, packing: bool = False
) -> list[Change]:
    """Compare two summaries; with `packing` also compression and signature."""
    return [
        change
        for key in before
        if packing or key not in _PACKING
        for change in _compare(key, before[key], after[key])
    ]


def _compare(path: str, before: Any, after: Any) -> Iterator[Change]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _compare(f"{path}.{key}", before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list) and not path.startswith("meta_data"):
        # These lists are sets: device types, depends, clears.
        if sorted(before) != sorted(after):
            yield Change(path, before, after)
    elif before != after:
        yield Change(path, before, after)


def _words(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)


class DumpFolders(NamedTuple):
    """Where each kind of content goes; None: it is not dumped."""

    files: Path | None = None
    scripts: Path | None = None
    meta_data: Path | None = None


def dump(
    path: Path | str,
    folders: DumpFolders,
    keys: Sequence[PublicKey] = (),
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write an artifact's contents into folders; return its summary and the files written.

    The files get their names only when the whole artifact was found right, and replace nothing:
    a file that exists already is an error. Meta-data goes to `0000.meta-data`, as with
    `mender-artifact`. Raises ArtifactError.
    """
    pending: list[tuple[Path, Path]] = []
    try:
        with Path(path).open("rb", buffering=0) as file:
            reader = ArtifactReader(Counted(file, progress), keys)
            for folder in folders:
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
            if folders.scripts is not None:
                for name, content in reader.scripts.items():
                    _save(folders.scripts / name, [content], 0o755, pending)
            if folders.meta_data is not None and reader.header_files["meta-data"]:
                content = reader.header_files["meta-data"]
                _save(folders.meta_data / "0000.meta-data", [content], 0o644, pending)
            files = []
            for payload_file in reader.files():
                files.append(payload_file)
                if folders.files is not None:
                    _save(folders.files / payload_file.name, payload_file, 0o644, pending)
            assert reader.complete
            for temporary, final in pending:
                # A hard link, unlike a rename, replaces nothing.
                os.link(temporary, final)
            return _summary(reader, files), [final for _, final in pending]
    except OSError as error:
        raise ArtifactError(f"{error.filename2 or error.filename or path}: {error.strerror}") from (
            error
        )
    finally:
        for temporary, _ in pending:
            temporary.unlink(missing_ok=True)


def _save(
    final: Path,
    pieces: Sequence[bytes] | PayloadFile,
    mode: int,
    pending: list[tuple[Path, Path]],
) -> None:
    if final.exists() or final.is_symlink():
        raise ArtifactError(f"{final}: exists already; dump into an empty folder")
    temporary = final.with_name(f".{final.name[:200]}.{os.getpid()}.part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    pending.append((temporary, final))
    with os.fdopen(handle, "wb") as file:
        for piece in pieces:
            file.write(piece)


def write_arguments(summary: Mapping[str, Any], folders: DumpFolders) -> list[str]:
    """Return the arguments of `updater artifact` that make the same artifact from a dump.

    Everything is spelt out, so no default of the writer's is relied upon; the key, if there was
    one, and the output's name are not part of it.
    """
    kind = {"rootfs-image": "rootfs-image", None: "bootstrap-artifact"}.get(
        summary["payload"], "module-image"
    )
    arguments = ["write", kind, "--artifact-name", summary["name"]]

    def add(option: str, *values: str) -> None:
        for value in values:
            arguments.extend([option, value])

    add("--device-type", *summary["device_types"])
    add("--artifact-name-depends", *summary["depends_names"])
    add("--depends-groups", *summary["depends_groups"])
    if summary["group"] is not None:
        add("--provides-group", summary["group"])
    if kind == "module-image":
        add("--type", summary["payload"])
    if kind == "rootfs-image":
        arguments.append("--no-checksum-provide")
    if kind != "bootstrap-artifact":
        arguments += ["--no-default-software-version", "--no-default-clears-provides"]
    for key, value in summary["provides"].items():
        add("--provides", f"{key}:{value}")
    for key, values in summary["depends"].items():
        add("--depends", *(f"{key}:{value}" for value in values))
    add("--clears-provides", *(summary["clears"] or ()))
    if folders.scripts is not None:
        add("--script", *(str(folders.scripts / name) for name in summary["scripts"]))
    if folders.meta_data is not None and summary["meta_data"] and kind == "module-image":
        add("--meta-data", str(folders.meta_data / "0000.meta-data"))
    if folders.files is not None:
        add("--file", *(str(folders.files / name) for name in summary["files"]))
    add("--compression", summary["payload_compression"])
    return arguments
