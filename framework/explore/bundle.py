"""Bundles: everything that makes one crash state again, and why it is interesting.

A bundle is a folder: `bundle.json` names the recording (a path beside it, and the hash of its
journal), the state's complete decision, the invariant that broke and the evidence. A state at
depth two also has `recovery.journal.zst`, the journal of the recovery from the first cut, in which
it cuts again. Nothing else is needed to make the same disks, bit for bit.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import zstandard
from attrs import frozen

from framework.disk import DiskError, JournalReader, StartState
from framework.disk.state import parse_cut
from framework.explore.recording import Recording
from framework.explore.states import CrashState, Disks

FORMAT: Final = 1
NAME: Final = "bundle.json"
RECOVERY: Final = "recovery.journal.zst"


class BundleError(DiskError):
    """A bundle can't be read or written; the message names the file."""


@frozen
class Bundle:
    """A crash state with its reason.

    Attributes:
        folder: where it is.
        recording: the recording's file.
        journal_sha256: of its journal.
        states: the state, and for depth two the one in the recovery after it.
        why: what broke, for people and for scripts.
    """

    folder: Path
    recording: Path
    journal_sha256: str
    states: tuple[CrashState, ...]
    why: Mapping[str, Any]


def write_bundle(
    folder: Path,
    recording: Recording,
    states: tuple[CrashState, ...],
    why: Mapping[str, Any],
    recovery: bytes | None = None,
) -> Path:
    """Write a bundle; `recovery`: the compressed journal in which the second state cuts.

    Raises BundleError.
    """
    fields = {
        "format": FORMAT,
        "recording": os.path.relpath(recording.path.resolve(), folder.resolve()),
        "journal_sha256": recording.header.journal_sha256,
        "states": [_state_to_values(state) for state in states],
        "why": dict(why),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if recovery is not None:
            _write(folder / RECOVERY, recovery)
        _write(folder / NAME, json.dumps(fields, indent=1, sort_keys=True).encode())
    except OSError as error:
        raise BundleError(f"bundle {folder}: can't be written: {error.strerror}") from error
    return folder


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle (its folder, or its bundle.json). Raises BundleError."""
    if folder.name == NAME:
        folder = folder.parent
    path = folder / NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise BundleError(
                f"bundle {path}: format {fields['format']}, this program knows {FORMAT}: update it"
            )
        return Bundle(
            folder,
            Path(os.path.normpath(folder / str(fields["recording"]))),
            str(fields["journal_sha256"]),
            tuple(_state_from_values(values) for values in fields["states"]),
            dict(fields["why"]),
        )
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"bundle {path}: damaged: {error!r}") from error


@contextlib.contextmanager
def open_state(bundle: Bundle, recording: Recording) -> Iterator[Disks]:
    """The bundle's disks.

    Raises BundleError if the recording is another one, or the recovery's journal is missing.
    """
    if recording.header.journal_sha256 != bundle.journal_sha256:
        raise BundleError(
            f"bundle {bundle.folder}: {recording.path} is another recording than it was made of"
        )
    first = bundle.states[0]
    with first.disks(recording.reader) as disks:
        if len(bundle.states) == 1:
            yield disks
            return
        with tempfile.TemporaryFile(prefix="brownout-recovery-") as file:
            try:
                with (bundle.folder / RECOVERY).open("rb") as packed:
                    zstandard.ZstdDecompressor().copy_stream(packed, file)
            except (OSError, zstandard.ZstdError) as error:
                raise BundleError(f"bundle {bundle.folder / RECOVERY}: {error}") from error
            file.flush()
            journal = JournalReader(
                Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"),
                recording.base_paths,
                begin=StartState.of(disks),
            )
            with bundle.states[1].disks(journal) as later:
                yield later


def _state_to_values(state: CrashState) -> dict[str, Any]:
    payload, _ = state.decision.to_payload({})
    return {
        "operation": state.operation,
        "model": state.model,
        "seed": state.seed,
        "says": str(state),
        "decision": base64.b64encode(zstandard.compress(payload)).decode(),
    }


def _state_from_values(values: Mapping[str, Any]) -> CrashState:
    try:
        payload = zstandard.ZstdDecompressor().decompress(
            base64.b64decode(values["decision"], validate=True)
        )
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    _, decision, _ = parse_cut(payload)
    return CrashState(int(values["operation"]), decision, str(values["model"]), int(values["seed"]))
