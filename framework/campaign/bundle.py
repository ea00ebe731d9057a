"""A bundle: one file that has everything of one scenario's run, to be looked at and done again.

A zip archive. `bundle.json` says what ran (scenario, rig, versions, images' hashes, seed), what
went wrong with it (the faults, the cuts) and what came of it (steps, timeline, verdict); `rig.yaml`
is the rig file; `console.log` has every line with its times; `journal.zst` is the recorder's
journal, from which every disk at every cut can be rebuilt bit for bit, given the base images (known
by hash).

Versioned: what an older version wrote stays readable, what a newer one wrote is refused by a line
that says so. Written whole or not at all. Sizes are bounded when it is read, so that a damaged or
hostile file ends in an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final

import zstandard
from attrs import asdict, evolve, field, frozen

FORMAT: Final = 3
"""2: a campaign's run, with its composition. 3: how its machine ran, `network` and `deterministic`.
A bundle is written in the oldest version that has everything in it."""
WITH_MACHINE: Final = 3
SUFFIX: Final = ".bundle"
FACTS: Final = "bundle.json"
RIG: Final = "rig.yaml"
CONSOLE: Final = "console.log"
JOURNAL: Final = "journal.zst"
MAX_FACTS_BYTES: Final = 16 << 20
MAX_TEXT_BYTES: Final = 64 << 20
MAX_JOURNAL_BYTES: Final = 16 << 30
_COPY_BYTES: Final = 1 << 20
# All that zipfile raises for an archive that isn't one (RuntimeError: it says it is encrypted;
# NotImplementedError: it says it needs a newer program).
DAMAGE: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
)


class BundleError(Exception):
    """A bundle can't be read or written; the message names the file and the cause."""


@frozen
class CutFacts:
    """A power cut, and what the rebuilt disks held.

    Attributes:
        index: its number in the journal, from 0 (switching off counts, too).
        operation: the last operation carried out before it.
        model: the cache model.
        seed: of the model's choices.
        disks: the SHA-256 of each whole disk, by its name.
    """

    index: int
    operation: int
    model: str
    seed: int
    disks: dict[str, str] = field(factory=dict)


@frozen
class Bundle:
    """What a bundle says.

    Attributes:
        scenario: the pytest node id, or how a campaign calls the run.
        title: what is tested, in words.
        rig: the rig file's name.
        rig_text: the rig file.
        run_seed: the seed of the run (`--brownout-seed`); every random choice comes of it.
        faults: the faults' sentences.
        steps: what was seen, comparable between runs.
        verdict: such as `PASS` or `VIOLATION(2)`, or `FAILED`, `BROKEN`, `INFRASTRUCTURE`.
        error: the message of an error that is no verdict.
        findings: one per invariant: number, whether it held, the evidence.
        timeline: seconds, source and text.
        cuts: the power cuts.
        versions: of this program and what it ran on.
        images: hashes of the images involved, by name.
        bases: path and hash of the disks' base images, by device.
        journal_sha256: of the journal, unpacked; empty without one.
        composition: of a campaign's run, `Composition` as plain values; else None.
        network: whether the device used the network; None: not known, or there is no such thing.
        deterministic: whether the machine's time was counted in instructions.
        format: the version that it is written in.
    """

    scenario: str
    title: str
    rig: str
    rig_text: str
    run_seed: int
    faults: tuple[str, ...]
    steps: tuple[str, ...]
    verdict: str
    error: str = ""
    findings: tuple[tuple[int, bool | None, str], ...] = ()
    timeline: tuple[tuple[float, str, str], ...] = ()
    cuts: tuple[CutFacts, ...] = ()
    versions: dict[str, str] = field(factory=dict)
    images: dict[str, str] = field(factory=dict)
    bases: dict[str, tuple[str, str]] = field(factory=dict)
    journal_sha256: str = ""
    composition: dict[str, Any] | None = None
    network: bool | None = None
    deterministic: bool = False
    format: int = 1


def write_bundle(
    path: Path, bundle: Bundle, console: str = "", journal: Path | None = None
) -> Bundle:
    """Write a bundle; `journal` is the recorder's, unpacked. Returns it with the journal's hash.

    Raises:
        BundleError: it can't be written; nothing is left then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            if journal is not None:
                bundle = _with_journal(bundle, archive, journal)
            bundle = _in_its_version(bundle)
            fields = asdict(bundle)
            if bundle.composition is None:
                del fields["composition"]
            if bundle.format < WITH_MACHINE:
                del fields["network"], fields["deterministic"]
            rig_text = fields.pop("rig_text")
            archive.writestr(FACTS, json.dumps(fields, indent=1, sort_keys=True))
            archive.writestr(RIG, rig_text)
            archive.writestr(CONSOLE, console)
        temporary.replace(path)
    except OSError as error:
        raise BundleError(f"bundle {path}: can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return bundle


def _in_its_version(bundle: Bundle) -> Bundle:
    """The oldest version that has everything in it."""
    version = 1 if bundle.composition is None else 2
    if bundle.network is not None or bundle.deterministic:
        version = WITH_MACHINE
    return evolve(bundle, format=version)


def _with_journal(bundle: Bundle, archive: zipfile.ZipFile, journal: Path) -> Bundle:
    digest = hashlib.sha256()
    entry = zipfile.ZipInfo(JOURNAL)
    entry.compress_type = zipfile.ZIP_STORED
    with (
        journal.open("rb") as source,
        archive.open(entry, "w", force_zip64=True) as into,
        zstandard.ZstdCompressor(level=3).stream_writer(into, closefd=False) as packed,
    ):
        while piece := source.read(_COPY_BYTES):
            digest.update(piece)
            packed.write(piece)
    return evolve(bundle, journal_sha256=digest.hexdigest())


def read_bundle(path: Path) -> Bundle:
    """Read what a bundle says; its journal stays packed.

    Raises:
        BundleError: it is missing, damaged, or of a newer version.
    """
    with _opened(path) as archive:
        fields = _facts(path, archive)
        rig_text = _text(path, archive, RIG, MAX_TEXT_BYTES)
    try:
        return _from_values({**fields, "rig_text": rig_text})
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"bundle {path}: damaged: {error!r}") from error


def read_console(path: Path) -> str:
    """The console's lines with their times. Raises BundleError."""
    with _opened(path) as archive:
        return _text(path, archive, CONSOLE, MAX_TEXT_BYTES)


def unpack_journal(path: Path, bundle: Bundle, destination: Path) -> Path:
    """Unpack the journal to `destination`.

    Raises:
        BundleError: there is none, or it is not what was packed; nothing is left then.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with (
            _opened(path) as archive,
            archive.open(JOURNAL) as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as source,
            destination.open("wb") as into,
        ):
            while piece := source.read(_COPY_BYTES):
                size += len(piece)
                if size > MAX_JOURNAL_BYTES:
                    raise BundleError(f"bundle {path}: its journal is too large")
                digest.update(piece)
                into.write(piece)
        if digest.hexdigest() != bundle.journal_sha256:
            raise BundleError(f"bundle {path}: its journal is not the one that was packed")
    except KeyError as error:
        raise BundleError(f"bundle {path}: has no journal") from error
    except (zstandard.ZstdError, *DAMAGE) as error:
        destination.unlink(missing_ok=True)
        raise BundleError(f"bundle {path}: its journal is damaged: {error}") from error
    except OSError as error:
        destination.unlink(missing_ok=True)
        raise BundleError(f"bundle {path}: {error.strerror or error}") from error
    except BundleError:
        destination.unlink(missing_ok=True)
        raise
    return destination


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.strerror or error}") from error
    except DAMAGE as error:
        raise BundleError(f"bundle {path}: not a bundle, or damaged: {error}") from error


def _facts(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        fields = json.loads(_text(path, archive, FACTS, MAX_FACTS_BYTES))
        version = fields["format"]
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format {version!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"bundle {path}: damaged: {error!r}") from error
    if version > FORMAT:
        raise BundleError(
            f"bundle {path}: format {version}, this program knows up to {FORMAT}: update it"
        )
    return dict(fields)


def _text(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> str:
    try:
        with archive.open(name) as file:
            return _bounded(file, limit).decode()
    except KeyError as error:
        raise BundleError(f"bundle {path}: has no {name}") from error
    except (OSError, *DAMAGE) as error:
        raise BundleError(f"bundle {path}: {name} is damaged: {error}") from error


def _bounded(file: IO[bytes], limit: int) -> bytes:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def _from_values(fields: Mapping[str, Any]) -> Bundle:
    values = dict(fields)
    for name in ("faults", "steps"):
        values[name] = tuple(str(item) for item in values[name])
    values["run_seed"] = int(values["run_seed"])
    values["findings"] = tuple(
        (int(number), held, str(evidence)) for number, held, evidence in values["findings"]
    )
    values["timeline"] = tuple(
        (float(at_s), str(source), str(text)) for at_s, source, text in values["timeline"]
    )
    values["cuts"] = tuple(CutFacts(**cut) for cut in values["cuts"])
    values["bases"] = {
        name: (str(base), str(digest)) for name, (base, digest) in values["bases"].items()
    }
    for name in ("scenario", "title", "rig", "verdict", "error", "journal_sha256"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is no text")
    if not isinstance(values.get("composition"), dict | None):
        raise TypeError("the composition is none")
    if not isinstance(values.get("network"), bool | None):
        raise TypeError("network is neither true nor false")
    if not isinstance(values.get("deterministic", False), bool):
        raise TypeError("deterministic is neither true nor false")
    return Bundle(**values)
