"""`updater support-bundle`: one file with what it takes to understand, and reproduce, a failure.

Format, version 1: a tar archive, compressed with zstd (with gzip where Python has no zstandard).
Its first member is `manifest.json`:

    {"format": "updater-support-bundle", "version": 1, "created": UTC seconds,
     "sections": {NAME: {"status": "ok" | "failed" | "skipped", "reason": TEXT,
                         "files": [PATH, …]}}}

A section that cannot be collected says why, and the others are there all the same: the bundle is
asked for when something is broken. Later versions may add sections, fields and files.

    versions   versions.json      kernel, machine, Python, the updater and the hash of its files
    status     status.json        boot id, uptime, clock, running slot, last outcome and its cause
    config     config/…           updater.toml, artifact_info, fw_env.config, health checks' names
    store      store/state.json   every table of the state store, row by row
               store/files.json   what is in the data directory: names, sizes, times; no contents
               store/….db         a store that cannot be read, as it is (the first 256 KiB)
    bootenv    bootenv/variables.json, and bootenv/raw-N: each copy as it is on the medium
    slots      slots.json         size, head, and with --slot-hashes the SHA-256 of each slot
    kernel     kernel.log, cmdline, mounts, partitions
    log        journal.log        the client's part of the system's journal; deployments/*.log

Secrets are taken out (`redact.py`); private keys, tokens and identities are never opened. Memory
is bounded: every file has a limit, and of a log that is longer its end is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from updater.artifact import tar
from updater.artifact.compression import compressor
from updater.artifact.errors import ArtifactError
from updater.device.config import BootEnvConfig, Slot, load_config
from updater.device.console import say
from updater.device.errors import UpdaterError
from updater.device.redact import redact, redact_json, secret_values

FORMAT = "updater-support-bundle"
VERSION = 1
DEFAULT_DATA_DIR = "/data/updater"
_TEXT_BYTES = 256 * 1024
_LOG_BYTES = 512 * 1024
_RAW_BYTES = 256 * 1024
_MAX_ROWS = 1000
_MAX_FILES = 2000
_MAX_LOGS = 20
_COMMAND_TIMEOUT_S = 20.0
_CHUNK_BYTES = 1024 * 1024
_HEAD_BYTES = 64 * 1024
_EXT4_MAGIC_AT = 1024 + 0x38


class Sources(NamedTuple):
    """Where the system's own facts are."""

    proc: str = "/proc"
    kmsg: str = "/dev/kmsg"
    journal: tuple[str, ...] = (
        "journalctl", "--no-pager", "--output=short-iso-precise", "--lines=3000",
        "--identifier=updater", "--identifier=updater-resume",
    )  # fmt: skip
    logs: tuple[str, ...] = ("/var/log/updater.log",)


class _SkippedError(Exception):
    """The section does not apply here, for the reason given."""


class _Bundle:
    """What was collected so far."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.values: dict[str, Any] = {}
        self.raw: set[str] = set()
        self.secrets: set[bytes] = set()
        self.sections: dict[str, dict[str, Any]] = {}

    def add(self, name: str, content: bytes | str, *, raw: bool = False) -> None:
        """Add a file to the section that is being collected."""
        self.files[name] = content.encode() if isinstance(content, str) else content
        if raw:
            self.raw.add(name)

    def add_json(self, name: str, value: object) -> None:
        """Add a value that becomes a JSON file once secrets were taken out of it."""
        self.files[name] = b""
        self.values[name] = value

    @contextmanager
    def section(self, name: str) -> Iterator[list[str]]:
        """Collect one section; whatever goes wrong in it is its own affair.

        The list takes problems that leave the rest of the section intact.
        """
        before = set(self.files)
        problems: list[str] = []
        status = "ok"
        try:
            yield problems
        except _SkippedError as reason:
            status = "skipped"
            problems.append(str(reason))
        except Exception as error:  # noqa: BLE001 - the bundle is for when things are broken
            problems.append(f"{type(error).__name__}: {error}")
        if problems and status == "ok":
            status = "failed"
            say(f"support bundle: {name}: {problems[0]}")
        self.sections[name] = {
            "status": status,
            "reason": "; ".join(problems),
            "files": sorted(set(self.files) - before),
        }


def write_bundle(
    output: str | None,
    config_path: str,
    *,
    slot_hashes: bool = False,
    sources: Sources | None = None,
) -> str:
    """Collect and write a bundle; return where it is.

    `output` None: a name with the date in the current directory; "-": standard output. Raises
    UpdaterError only when the file itself cannot be written.
    """
    packer, suffix = _packer()
    if output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        output = f"support-{stamp}.tar{suffix}"
    packed = packer(_archive(_collect(config_path, slot_hashes, sources or Sources())))
    try:
        if output == "-":
            sys.stdout.buffer.write(packed)
            sys.stdout.buffer.flush()
        else:
            _write_file(output, packed)
    except OSError as error:
        raise UpdaterError(f"{output}: cannot be written: {error.strerror}") from error
    return output


def _packer() -> tuple[Callable[[bytes], bytes], str]:
    for compression, suffix in (("zstd", ".zst"), ("gzip", ".gz")):
        try:
            compressor(compression)
        except ArtifactError:
            continue

        def pack(content: bytes, compression: str = compression) -> bytes:
            engine = compressor(compression)
            return engine.compress(content) + engine.flush()

        return pack, suffix
    return (lambda content: content), ""


def _write_file(output: str, content: bytes) -> None:
    temporary = f"{output}.part"
    handle = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise


def _archive(bundle: _Bundle) -> bytes:
    """Return the tar archive, secrets taken out of every file."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "created": int(time.time()),
        "sections": bundle.sections,
    }
    pieces = []
    for name, value in {"manifest.json": manifest, **bundle.values}.items():
        clean_value = redact_json(value, bundle.secrets)
        pieces.append(tar.member(name, (json.dumps(clean_value, indent=1) + "\n").encode()))
    for name, content in bundle.files.items():
        if name not in bundle.values:
            clean = redact(content, bundle.secrets, keep_length=name in bundle.raw)
            pieces.append(tar.member(name, clean))
    return b"".join(pieces) + tar.END_OF_ARCHIVE


def _collect(config_path: str, slot_hashes: bool, sources: Sources) -> _Bundle:
    bundle = _Bundle()
    facts = _Facts()
    with bundle.section("config") as problems:
        facts = _collect_config(bundle, config_path, problems)
    with bundle.section("versions") as problems:
        _collect_versions(bundle, problems)
    with bundle.section("store") as problems:
        bundle.add_json("store/state.json", _collect_store(bundle, facts.data_dir, problems))
    with bundle.section("bootenv") as problems:
        _collect_bootenv(bundle, facts.bootenv, problems)
    with bundle.section("status") as problems:
        _collect_status(bundle, facts, sources, problems)
    with bundle.section("slots") as problems:
        _collect_slots(bundle, facts.slots, slot_hashes, problems)
    with bundle.section("kernel") as problems:
        _collect_kernel(bundle, sources, problems)
    with bundle.section("log") as problems:
        _collect_logs(bundle, facts.data_dir, sources, problems)
    return bundle


# Configuration.


class _Facts(NamedTuple):
    """What the configuration says, as far as it says it: one wrong key must not hide the rest."""

    data_dir: str = DEFAULT_DATA_DIR
    device_type: str = ""
    artifact_info: str = ""
    health_directory: str = ""
    slots: tuple[Slot, ...] = ()
    bootenv: BootEnvConfig | None = None


def _collect_config(bundle: _Bundle, path: str, problems: list[str]) -> _Facts:
    text = _add_copy(bundle, "config/updater.toml", path, problems)
    bundle.secrets |= secret_values(text)
    try:
        load_config(path)
    except UpdaterError as error:
        problems.append(str(error))
    facts = _facts(text)
    if facts.artifact_info:
        _add_copy(bundle, "config/artifact_info", facts.artifact_info, problems)
    if facts.bootenv is not None and facts.bootenv.fw_env_config:
        _add_copy(bundle, "config/fw_env.config", facts.bootenv.fw_env_config, problems)
    if facts.health_directory:
        bundle.add_json("config/health.json", _listing(facts.health_directory, problems))
    return facts


def _facts(text: bytes) -> _Facts:
    try:
        values = tomllib.loads(text.decode("utf-8", "replace"))
    except tomllib.TOMLDecodeError:
        return _Facts()

    def text_at(*keys: str) -> str:
        value: Any = values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, str) else ""

    slots = []
    tables = values.get("slots")
    for name, entry in (tables if isinstance(tables, dict) else {}).items():
        device = text_at("slots", name, "device")
        number = entry.get("number") if isinstance(entry, dict) else None
        if device:
            slots.append(Slot(name, device, number if isinstance(number, int) else 0))
    kind = text_at("bootenv", "kind")
    bootenv = None
    if kind in ("uboot", "grub"):
        copies = values["bootenv"].get("copies")
        paths = tuple(map(str, copies)) if isinstance(copies, list) else ()
        bootenv = BootEnvConfig(kind, text_at("bootenv", "fw_env_config"), paths)
    return _Facts(
        text_at("data_dir") or DEFAULT_DATA_DIR,
        text_at("device_type"),
        text_at("artifact_info"),
        text_at("health", "directory"),
        tuple(slots),
        bootenv,
    )


def _add_copy(bundle: _Bundle, name: str, path: str, problems: list[str]) -> bytes:
    try:
        content = _read_head(path, _TEXT_BYTES)
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return b""
    bundle.add(name, content)
    return content


# Versions and status.


def _collect_versions(bundle: _Bundle, problems: list[str]) -> None:
    from importlib import metadata  # noqa: PLC0415

    try:
        version = metadata.version("brownout")
    except metadata.PackageNotFoundError:
        version = "not installed as a package"
    kernel = os.uname()
    values: dict[str, Any] = {
        "updater": version,
        "updater_files_sha256": _package_hash(),
        "python": sys.version,
        "sqlite": sqlite3.sqlite_version,
        "kernel": f"{kernel.sysname} {kernel.release} {kernel.version}",
        "machine": kernel.machine,
    }
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        if os.path.exists(path):  # noqa: PTH110
            values["os_release"] = _read_head(path, 4096).decode("utf-8", "replace")
            break
    else:
        problems.append("there is no os-release")
    bundle.add_json("versions.json", values)


def _package_hash() -> str:
    """Return one hash over the client's own files, names and contents."""
    import updater  # noqa: PLC0415

    (root,) = updater.__path__
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(names):
            path = f"{folder}/{name}"
            digest.update(f"{path.removeprefix(root)}\n".encode())
            digest.update(hashlib.sha256(_read_head(path, 1 << 24)).digest())
    return digest.hexdigest()


def _collect_status(bundle: _Bundle, facts: _Facts, sources: Sources, problems: list[str]) -> None:
    values: dict[str, Any] = {"utc_seconds": time.time(), "monotonic_seconds": time.monotonic()}
    for key, name in (("boot_id", "sys/kernel/random/boot_id"), ("uptime", "uptime")):
        try:
            values[key] = _read_head(f"{sources.proc}/{name}", 4096).decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{key}: {error}")
    values["device_type"] = facts.device_type
    if len(facts.slots) == 2:
        from updater.device.blockdev import LinuxMachine  # noqa: PLC0415

        first, second = facts.slots
        try:
            values["running_slot"] = LinuxMachine().running_slot((first, second)).name
        except UpdaterError as error:
            problems.append(f"running slot: {error}")
    try:
        space = os.statvfs(facts.data_dir)
        values["data_free_bytes"] = space.f_bavail * space.f_frsize
    except OSError as error:
        problems.append(f"{facts.data_dir}: {error.strerror}")
    tables = bundle.values.get("store/state.json", {})
    outcomes = tables.get("outcome") or []
    values["update_in_progress"] = (tables.get("update_in_progress") or [None])[0]
    values["last_outcome"] = outcomes[-1] if outcomes else None
    bundle.add_json("status.json", values)


# The store.


def _collect_store(bundle: _Bundle, data_dir: str, problems: list[str]) -> dict[str, Any]:
    from updater.device.store import database_path  # noqa: PLC0415

    bundle.add_json("store/files.json", _listing(data_dir, problems))
    path = database_path(data_dir)
    if not os.path.exists(path):  # noqa: PTH110
        raise _SkippedError(f"{path}: there is none, no update was ever begun")
    try:
        return _tables(path)
    except (sqlite3.Error, OSError, ValueError) as error:
        problems.append(f"{path}: {error}")
    for name, place in (("unreadable.db", path), ("unreadable.db-journal", f"{path}-journal")):
        if os.path.exists(place):  # noqa: PTH110
            bundle.add(f"store/{name}", _read_head(place, _RAW_BYTES), raw=True)
    return {}


def _tables(path: str) -> dict[str, Any]:
    """Return every table's last rows, without creating, locking for long or repairing anything."""
    from urllib.parse import quote  # noqa: PLC0415

    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True, timeout=2.0)
    try:
        connection.row_factory = sqlite3.Row
        tables: dict[str, Any] = {
            "schema_version": connection.execute("PRAGMA user_version").fetchone()[0]
        }
        names = connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        for (name,) in names:
            quoted = name.replace('"', '""')
            rows = connection.execute(
                f'SELECT * FROM "{quoted}" LIMIT {_MAX_ROWS}'  # noqa: S608 - a name from the schema
            ).fetchall()
            tables[name] = [dict(row) for row in rows]
        return tables
    finally:
        connection.close()


def _listing(directory: str, problems: list[str]) -> list[dict[str, Any]]:
    """Return what is in a directory and below: never any content."""
    found: list[dict[str, Any]] = []

    def remember(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(directory, onerror=remember):
        folders.sort()
        for name in sorted(names):
            path = f"{folder}/{name}"
            if len(found) == _MAX_FILES:
                problems.append(f"{directory}: more than {_MAX_FILES} files")
                return found
            try:
                facts = os.lstat(path)
            except OSError as error:
                remember(error)
                continue
            found.append(
                {
                    "name": path.removeprefix(f"{directory}/"),
                    "size": facts.st_size,
                    "mode": oct(facts.st_mode),
                    "modified": facts.st_mtime,
                }
            )
    return found


# The boot environment.


def _collect_bootenv(bundle: _Bundle, config: BootEnvConfig | None, problems: list[str]) -> None:
    from updater.device.bootenv import open_environment  # noqa: PLC0415

    if config is None:
        raise _SkippedError("the configuration names no boot environment")
    for number, (path, offset, size) in enumerate(_raw_places(config, problems)):
        try:
            content = _read_head(path, min(size, _RAW_BYTES), offset)
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        bundle.secrets |= secret_values(content.replace(b"\0", b"\n"))
        bundle.add(f"bootenv/raw-{number}", content, raw=True)
    try:
        variables = open_environment(config).read()
    except UpdaterError as error:
        problems.append(str(error))
        return
    bundle.secrets |= secret_values("".join(f"{k}={v}\n" for k, v in variables.items()).encode())
    bundle.add_json("bootenv/variables.json", variables)


def _raw_places(config: BootEnvConfig, problems: list[str]) -> list[tuple[str, int, int]]:
    """Return (path, offset, size) of each copy of the environment and each lock."""
    if config.kind == "grub":
        return [
            (path, 0, 4096)
            for copy in config.copies
            for path in (copy, f"{copy.rpartition('/')[0]}/lock")
        ]
    places = []
    try:
        text = _read_head(config.fw_env_config, _TEXT_BYTES).decode("utf-8", "replace")
    except OSError as error:
        problems.append(f"{config.fw_env_config}: {error.strerror}")
        return []
    for line in text.splitlines():
        fields = line.split("#", 1)[0].split()
        if len(fields) < 3:
            continue
        try:
            places.append((fields[0], int(fields[1], 0), int(fields[2], 0)))
        except ValueError:
            problems.append(f"{config.fw_env_config}: malformed line {line[:80]!r}")
    return places


# Slots.


def _collect_slots(
    bundle: _Bundle, slots: tuple[Slot, ...], hashes: bool, problems: list[str]
) -> None:
    if not slots:
        raise _SkippedError("the configuration names no slots")
    values = {}
    for slot in slots:
        facts: dict[str, Any] = {"device": slot.device, "number": slot.number}
        values[slot.name] = facts
        try:
            facts |= _slot_facts(slot, hashes)
        except OSError as error:
            facts["error"] = error.strerror or str(error)
            problems.append(f"slot {slot.name} ({slot.device}): {facts['error']}")
        bundle.add_json("slots.json", values)
        if "read_error" in facts:
            problems.append(f"slot {slot.name} ({slot.device}): {facts['read_error']}")


def _slot_facts(slot: Slot, hashes: bool) -> dict[str, Any]:
    handle = os.open(slot.device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(handle, 0, os.SEEK_END)
        head = os.pread(handle, _HEAD_BYTES, 0)
        facts: dict[str, Any] = {
            "size": size,
            "head_is_zero": not any(head),
            "ext4": head[_EXT4_MAGIC_AT : _EXT4_MAGIC_AT + 2] == b"\x53\xef",
        }
        if hashes:
            facts.update(_slot_hash(handle, slot.name, size))
        return facts
    finally:
        os.close(handle)


def _slot_hash(handle: int, name: str, size: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    offset, said = 0, 0
    while offset < size:
        try:
            chunk = os.pread(handle, min(_CHUNK_BYTES, size - offset), offset)
        except OSError as error:
            return {"read_error": f"{error.strerror} at byte {offset}"}
        if not chunk:
            return {"read_error": f"ends at byte {offset} of {size}"}
        digest.update(chunk)
        # The system that is being looked at keeps its cache.
        os.posix_fadvise(handle, offset, len(chunk), os.POSIX_FADV_DONTNEED)
        offset += len(chunk)
        if offset * 10 // size > said:
            said = offset * 10 // size
            say(f"support bundle: hashing slot {name}: {said * 10} %")
    return {"sha256": digest.hexdigest()}


# The kernel and the logs.


def _collect_kernel(bundle: _Bundle, sources: Sources, problems: list[str]) -> None:
    for name in ("cmdline", "mounts", "partitions"):
        try:
            content = _read_head(f"{sources.proc}/{name}", _TEXT_BYTES)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if name == "cmdline":
            bundle.secrets |= secret_values(content.replace(b" ", b"\n"))
        bundle.add(name, content)
    bundle.add("kernel.log", _kernel_log(sources.kmsg))


def _kernel_log(path: str) -> bytes:
    """Return the end of the kernel's log, one record a read, without waiting for the next."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    tail = b""
    try:
        while True:
            try:
                record = os.read(handle, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:
                # Records were overwritten while they were read; the next one is there.
                continue
            if not record:
                break
            tail = (tail + record)[-_LOG_BYTES:]
    finally:
        os.close(handle)
    return tail


def _collect_logs(bundle: _Bundle, data_dir: str, sources: Sources, problems: list[str]) -> None:
    found = False
    try:
        done = subprocess.run(
            sources.journal, capture_output=True, check=False, timeout=_COMMAND_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        # Without systemd there is no journal.
        if not isinstance(error, FileNotFoundError):
            problems.append(f"{sources.journal[0]}: {error}")
    else:
        bundle.add("journal.log", (done.stdout + done.stderr)[-_LOG_BYTES:])
        found = True
    for path in sources.logs:
        if os.path.exists(path):  # noqa: PTH110
            bundle.add(f"log/{path.rpartition('/')[2]}", _read_tail(path, _LOG_BYTES))
            found = True
    folder = f"{data_dir}/deployments"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []  # noqa: PTH112, PTH208
    for name in [name for name in names if name.endswith(".log")][-_MAX_LOGS:]:
        try:
            tar.check_name(f"deployments/{name}", folder)
            bundle.add(f"deployments/{name}", _read_tail(f"{folder}/{name}", _LOG_BYTES))
            found = True
        except (OSError, ArtifactError) as error:
            problems.append(str(error))
    if not found and not problems:
        raise _SkippedError("neither a journal nor a log file is here")


def _read_head(path: str, limit: int, offset: int = 0) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.lseek(handle, offset, os.SEEK_SET)
        content = b""
        while len(content) < limit and (chunk := os.read(handle, limit - len(content))):
            content += chunk
        return content
    finally:
        os.close(handle)


def _read_tail(path: str, limit: int) -> bytes:
    return _read_head(path, limit, max(0, os.stat(path).st_size - limit))  # noqa: PTH116
