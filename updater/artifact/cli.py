"""`updater artifact write|read|validate|sign|dump|diff`: the host's side of artifacts.

Option names are `mender-artifact`'s where it has the same option. Exit codes: 0 done, 1 error;
`diff --exit-code` also gives 1 when the artifacts differ. Everything that a script may read comes
as JSON with `--json`, on standard output, one object (the keys: `summary.py`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from updater.artifact import summary, writer
from updater.artifact.compression import MIB, SUFFIXES, WINDOW_BYTES
from updater.artifact.errors import ArtifactError
from updater.artifact.metadata import parse_meta_data
from updater.artifact.summary import DumpFolders, Progress

if TYPE_CHECKING:
    from updater.artifact.signature import PublicKey

_MAX_META_DATA_BYTES = 4 * 1024 * 1024
# mender-artifact's name for xz.
_ALIASES = {"lzma": "xz"}
_WINDOWS_MIB = (1, 2, 4, 8, 16, 32, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-verbs to `updater artifact`."""
    verbs = parser.add_subparsers(dest="artifact_verb", required=True, metavar="VERB")
    write = verbs.add_parser("write", help="make an artifact")
    kinds = write.add_subparsers(dest="kind", required=True, metavar="TYPE")
    _add_rootfs_image(kinds.add_parser("rootfs-image", help="from a root file system image"))
    _add_module_image(kinds.add_parser("module-image", help="from files for an update module"))
    _add_common(kinds.add_parser("bootstrap-artifact", help="without a payload"))

    read = verbs.add_parser("read", help="check an artifact and print what it says")
    validate = verbs.add_parser("validate", help="check an artifact; with -k also its signature")
    sign = verbs.add_parser("sign", help="sign an artifact")
    sign.add_argument("file", metavar="FILE")
    sign.add_argument("-k", "--key", required=True, metavar="PEM", help="private key")
    sign.add_argument("-o", "--output-path", metavar="FILE", help="default: replace the artifact")
    sign.add_argument("-f", "--force", action="store_true", help="replace a signature")
    dump = verbs.add_parser("dump", help="take an artifact apart into folders")
    dump.add_argument("--files", type=Path, metavar="FOLDER", help="write the payload's files here")
    dump.add_argument("--scripts", type=Path, metavar="FOLDER", help="write state scripts here")
    dump.add_argument("--meta-data", type=Path, metavar="FOLDER", help="write meta-data here")
    dump.add_argument(
        "--print-cmdline",
        action="store_true",
        help="print the `updater artifact` command that makes the same artifact again",
    )
    diff = verbs.add_parser("diff", help="say in what two artifacts differ")
    diff.add_argument("before", metavar="BEFORE")
    diff.add_argument("after", metavar="AFTER")
    diff.add_argument("--packing", action="store_true", help="compare compression, signature, too")
    diff.add_argument("--exit-code", action="store_true", help="exit with 1 when they differ")
    for verb in (read, validate, dump):
        verb.add_argument("file", metavar="FILE")
    for verb in (read, validate, dump, diff):
        verb.add_argument(
            "-k", "--key", action="append", default=[], metavar="PEM", help="trusted public key"
        )
    for verb in (read, validate, sign, dump, diff):
        verb.add_argument("--json", action="store_true", help="print JSON")
        verb.add_argument("--no-progress", action="store_true", help="show no progress")


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-n", "--artifact-name", required=True, metavar="NAME")
    verb.add_argument("-t", "--device-type", required=True, action="append", metavar="TYPE")
    verb.add_argument("-o", "--output-path", required=True, metavar="FILE")
    verb.add_argument("-k", "--key", metavar="PEM", help="sign with this private key")
    verb.add_argument("--compression", choices=(*SUFFIXES, *_ALIASES), default="zstd")
    verb.add_argument("--level", type=int, help="compression level")
    verb.add_argument(
        "--window-mib",
        type=int,
        choices=_WINDOWS_MIB,
        default=WINDOW_BYTES // MIB,
        help="memory that a device needs to unpack xz or zstd; more packs better",
    )
    verb.add_argument("-g", "--provides-group", metavar="GROUP", help="group of this artifact")
    _many(verb, "-N", "--artifact-name-depends", "NAME", "install only over this artifact")
    _many(verb, "-G", "--depends-groups", "GROUP", "install only over an artifact of this group")
    _many(verb, "-p", "--provides", "KEY:VALUE", "what the payload provides")
    _many(verb, "-d", "--depends", "KEY:VALUE", "what the device must provide")
    _many(verb, None, "--clears-provides", "PATTERN", "what the payload makes obsolete")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--no-progress", action="store_true", help="show no progress")


def _add_software(verb: argparse.ArgumentParser) -> None:
    _many(verb, "-s", "--script", "FILE", "state script, named State_Action_NN[_text]")
    verb.add_argument("--software-filesystem", metavar="NAME", default="rootfs-image")
    verb.add_argument("--software-name", metavar="NAME")
    verb.add_argument("--software-version", metavar="VERSION", help="default: the artifact's name")
    verb.add_argument("--no-default-software-version", action="store_true")
    verb.add_argument("--no-default-clears-provides", action="store_true")


def _add_rootfs_image(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-f", "--file", required=True, metavar="IMAGE")
    _add_common(verb)
    _add_software(verb)
    verb.add_argument("--no-checksum-provide", action="store_true")
    verb.add_argument(
        "--legacy-rootfs-image-checksum",
        action="store_true",
        help="provide rootfs_image_checksum instead of rootfs-image.checksum",
    )


def _add_module_image(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("-T", "--type", required=True, metavar="MODULE", help="update module's name")
    _many(verb, "-f", "--file", "FILE", "payload file")
    verb.add_argument("-m", "--meta-data", metavar="FILE", help="JSON object for the module")
    _add_common(verb)
    _add_software(verb)


def _many(
    verb: argparse.ArgumentParser, short: str | None, name: str, metavar: str, text: str
) -> None:
    names = [name] if short is None else [short, name]
    verb.add_argument(*names, action="append", default=[], metavar=metavar, help=text)


def run(options: argparse.Namespace) -> int:
    """Run the sub-verb, return its exit code; raises ArtifactError."""
    verbs = {
        "write": _write,
        "read": _read,
        "validate": _validate,
        "sign": _sign,
        "dump": _dump,
        "diff": _diff,
    }
    return verbs[options.artifact_verb](options)


def _write(options: argparse.Namespace) -> int:
    key = None
    if options.key is not None:
        from updater.artifact.signature import load_private_key  # noqa: PLC0415

        key = load_private_key(options.key)
    common: dict[str, Any] = {
        "name": options.artifact_name,
        "device_types": options.device_type,
        "key": key,
        "compression": _ALIASES.get(options.compression, options.compression),
        "level": options.level,
        "window_bytes": options.window_mib * MIB,
        "group": options.provides_group,
        "provides": dict(_pair(text, "--provides") for text in options.provides),
        "depends": _depends(options),
        "clears": options.clears_provides,
    }
    output = options.output_path
    if options.kind == "bootstrap-artifact":
        writer.write_bootstrap_artifact(output, **common)
    else:
        common["scripts"] = options.script
        common["default_clears"] = not options.no_default_clears_provides
        common["software"] = _software(options)
        files = [options.file] if options.kind == "rootfs-image" else options.file
        # Every payload file is read twice: for its checksum, and into the artifact.
        with _progress(options, f"writing {output}", 2 * sum(map(_size, files))) as progress:
            common["progress"] = progress
            if options.kind == "rootfs-image":
                common["checksum_key"] = _checksum_key(options)
                writer.write_artifact(output, options.file, **common)
            else:
                common["meta_data"] = _meta_data(options.meta_data)
                common["payload_type"] = options.type
                writer.write_module_artifact(output, options.file, **common)
    _say_written(options, Path(output))
    return 0


def _pair(text: str, option: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise ArtifactError(f"{option} {text}: not KEY:VALUE")
    return key, value


def _depends(options: argparse.Namespace) -> dict[str, list[str]]:
    depends: dict[str, list[str]] = {}
    for text in options.depends:
        key, value = _pair(text, "--depends")
        if key in ("artifact_name", "artifact_group", "device_type"):
            raise ArtifactError(
                f"--depends {text}: use --artifact-name-depends, --depends-groups or --device-type"
            )
        depends.setdefault(key, []).append(value)
    if options.artifact_name_depends:
        depends["artifact_name"] = options.artifact_name_depends
    if options.depends_groups:
        depends["artifact_group"] = options.depends_groups
    return depends


def _software(options: argparse.Namespace) -> writer.Software | None:
    if options.no_default_software_version:
        return None
    return writer.Software(
        options.software_filesystem, options.software_name, options.software_version
    )


def _checksum_key(options: argparse.Namespace) -> str | None:
    if options.no_checksum_provide:
        return None
    return (
        "rootfs_image_checksum" if options.legacy_rootfs_image_checksum else "rootfs-image.checksum"
    )


def _meta_data(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MAX_META_DATA_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    if len(content) > _MAX_META_DATA_BYTES:
        raise ArtifactError(f"{path}: more than {_MAX_META_DATA_BYTES} bytes of meta-data")
    try:
        return parse_meta_data(content)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _say_written(options: argparse.Namespace, output: Path) -> None:
    if options.json:
        _print_json({"output": str(output), "size": _size(output)})


def _keys(options: argparse.Namespace) -> list[PublicKey]:
    if not options.key:
        return []
    from updater.artifact.signature import load_public_key  # noqa: PLC0415

    return [load_public_key(path) for path in options.key]


def _summarize(options: argparse.Namespace, path: str) -> dict[str, Any]:
    keys = _keys(options)
    with _progress(options, f"reading {path}", _size(path)) as progress:
        return summary.summarize(path, keys, progress)


def _read(options: argparse.Namespace) -> int:
    found = _summarize(options, options.file)
    if options.json:
        _print_json(found)
    else:
        _print(summary.describe(found))
    return 0


def _validate(options: argparse.Namespace) -> int:
    found = _summarize(options, options.file)
    if options.json:
        _print_json({"valid": True, "signed": found["signed"], "verified": found["verified"]})
    else:
        _print(f"{options.file}: valid{summary.signature_words(found)}\n")
    return 0


def _sign(options: argparse.Namespace) -> int:
    from updater.artifact.signature import load_private_key  # noqa: PLC0415

    output = options.output_path or options.file
    key = load_private_key(options.key)
    with _progress(options, f"signing {options.file}", 2 * _size(options.file)) as progress:
        writer.sign_artifact(options.file, output, key, replace=options.force, progress=progress)
    _say_written(options, Path(output))
    return 0


def _dump(options: argparse.Namespace) -> int:
    folders = DumpFolders(options.files, options.scripts, options.meta_data)
    keys = _keys(options)
    with _progress(options, f"reading {options.file}", _size(options.file)) as progress:
        found, written = summary.dump(options.file, folders, keys, progress)
    arguments = ["artifact", *summary.write_arguments(found, folders)]
    if options.json:
        _print_json({"written": [str(path) for path in written], "arguments": arguments})
    elif options.print_cmdline:
        _print(f"updater {shlex.join(arguments)}\n")
    return 0


def _diff(options: argparse.Namespace) -> int:
    before, after = (_summarize(options, path) for path in (options.before, options.after))
    changes = summary.differences(before, after, packing=options.packing)
    if options.json:
        _print_json({"differences": [change._asdict() for change in changes]})
    else:
        _print("".join(f"{change}\n" for change in changes))
    return 1 if changes and options.exit_code else 0


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error


@contextmanager
def _progress(options: argparse.Namespace, what: str, total: int) -> Iterator[Progress]:
    """Show a bar on a terminal, if `rich` is installed: it is on a host, not on a device."""
    if options.no_progress or options.json or not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.markup import escape  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415
    except ImportError:
        yield lambda _: None
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(what), total=total)
        yield lambda count: bar.advance(task, count)


def _print_json(value: object) -> None:
    _print(json.dumps(value, ensure_ascii=True) + "\n")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
