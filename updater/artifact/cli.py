"""`updater artifact write|read|validate`: the host's side of artifacts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from updater.artifact.compression import SUFFIXES
from updater.artifact.errors import ArtifactError
from updater.artifact.metadata import type_words
from updater.artifact.reader import ArtifactReader, PayloadFile
from updater.artifact.writer import write_artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs to `updater artifact`."""
    verbs = parser.add_subparsers(dest="artifact_verb", required=True, metavar="VERB")
    write = verbs.add_parser("write", help="make an artifact")
    kinds = write.add_subparsers(dest="kind", required=True, metavar="TYPE")
    image = kinds.add_parser("rootfs-image", help="from a root file system image")
    image.add_argument("-f", "--file", required=True, metavar="IMAGE")
    image.add_argument("-n", "--artifact-name", required=True, metavar="NAME")
    image.add_argument("-t", "--device-type", required=True, action="append", metavar="TYPE")
    image.add_argument("-o", "--output-path", required=True, metavar="FILE")
    image.add_argument("-k", "--key", metavar="PEM", help="sign with this private key")
    image.add_argument("--compression", choices=tuple(SUFFIXES), default="zstd")
    image.add_argument("--level", type=int, help="compression level")
    read = verbs.add_parser("read", help="check an artifact and print what it says")
    validate = verbs.add_parser("validate", help="check an artifact; with -k also its signature")
    for verb in (read, validate):
        verb.add_argument("file", metavar="FILE")
        verb.add_argument(
            "-k", "--key", action="append", default=[], metavar="PEM", help="trusted public key"
        )


def run(options: argparse.Namespace) -> int:
    """Run the sub-verb; raises ArtifactError."""
    if options.artifact_verb == "write":
        _write(options)
    else:
        _check(options)
    return 0


def _write(options: argparse.Namespace) -> None:
    key = None
    if options.key is not None:
        from updater.artifact.signature import load_private_key  # noqa: PLC0415

        key = load_private_key(options.key)
    write_artifact(
        options.output_path,
        options.file,
        name=options.artifact_name,
        device_types=options.device_type,
        key=key,
        compression=options.compression,
        level=options.level,
    )


def _check(options: argparse.Namespace) -> None:
    from updater.artifact.signature import load_public_key  # noqa: PLC0415

    keys = [load_public_key(path) for path in options.key]
    try:
        with Path(options.file).open("rb", buffering=0) as file:
            reader = ArtifactReader(file, keys)
            files = list(reader.files())
    except OSError as error:
        raise ArtifactError(f"{options.file}: {error.strerror}") from error
    if options.artifact_verb == "read":
        sys.stdout.write(_describe(reader, files))
    else:
        sys.stdout.write(f"{options.file}: valid{_signature_words(reader)}\n")


def _describe(reader: ArtifactReader, files: list[PayloadFile]) -> str:
    lines = [
        f"name: {reader.artifact_name}",
        "format: mender, version 3",
        f"signature:{_signature_words(reader).lstrip(',') or ' none'}",
        f"device types: {', '.join(reader.header_info.device_types)}",
        f"payload: {type_words(reader.payload_type)}",
        *(f"file: {file.name}, {file.size} bytes, sha256 {file.sha256}" for file in files),
        *(f"provides: {key}={value}" for key, value in reader.provides.items()),
        *(f"clears: {pattern}" for pattern in reader.type_info.clears or ()),
        *(f"script: {name}" for name in reader.scripts),
    ]
    return "\n".join(lines) + "\n"


def _signature_words(reader: ArtifactReader) -> str:
    if reader.verified:
        return ", signed by a trusted key"
    return ", signed, not checked (give -k)" if reader.signed else ""
