"""From a device in the field to runs that end as it did: its support bundle, ranked candidates.

What the updater packs (`updater/device/support_bundle.py` has the format, version 1) is reduced to
symptoms, and these are compared with what could have led there:

- crash states of recordings: what a power cut left, and what the next start makes of it by the boot
  contract (the static oracle), each with how it is made again;
- runs of campaigns, by the symptoms that they ended with.

A support bundle is a device's word: it is read with bounds, its names and sizes are not trusted,
and what is damaged or missing in it is not compared. Nothing here boots anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tomllib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import zstandard
from attrs import field, frozen

from framework.campaign.errors import CampaignError
from framework.campaign.ledger import Run
from framework.campaign.symptoms import Match, match, state_in, symptoms_of_disk
from framework.disk import DiskError, LazyDisk
from framework.disk.grubenv import parse_grub_environments
from framework.disk.ubootenv import parse_environment
from framework.explore.bulk import phases_of
from framework.explore.judges.static import Expectation, StaticOracle
from framework.explore.states import CrashClass, RegionFact, Span
from framework.explore.timeline import Step
from framework.verdict import BootEnvironment, InstallEnded, InstallStarted

FORMAT: Final = "updater-support-bundle"
VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
MAX_FILES: Final = 5000
_CHUNK: Final = 4 << 20


@frozen
class Failure:
    """What a support bundle says of a failure.

    Attributes:
        symptoms: see `framework.campaign.symptoms`; slots are not named there yet.
        slots: the SHA-256 of whole slots, by name; only what was hashed on the device.
        loadable: by slot, whether it has a file system's magic.
        cause: what the device said of its last update, for people.
        device_type: what it is.
    """

    symptoms: dict[str, str]
    slots: dict[str, str] = field(factory=dict)
    loadable: dict[str, bool] = field(factory=dict)
    cause: str = ""
    device_type: str = ""


# -- the support bundle --------------------------------------------------------------------------


def read_failure(path: Path) -> Failure:
    """Read a support bundle.

    Raises:
        CampaignError: it is missing, damaged, no support bundle, or of a later version.
    """
    files = _unpack(path)
    try:
        manifest = json.loads(files["manifest.json"])
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        version = int(manifest["version"])
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CampaignError(f"{path}: no support bundle of the updater: {error}") from error
    if version > VERSION:
        raise CampaignError(
            f"{path}: support bundle of version {version}, this program knows up to {VERSION}: "
            "update it"
        )
    return failure_of(files)


def _unpack(path: Path) -> dict[str, bytes]:
    try:
        packed = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except OSError as error:
        raise CampaignError(f"{path}: {error.strerror}") from error
    try:
        plain = _decompress(packed)
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            return dict(_members(archive))
    except (tarfile.TarError, zstandard.ZstdError, zlib.error, ValueError, EOFError) as error:
        raise CampaignError(f"{path}: no support bundle, or a damaged one: {error}") from error


def _decompress(packed: bytes) -> bytes:
    """Whatever it is packed with; at most MAX_BYTES."""
    if packed.startswith(b"\x28\xb5\x2f\xfd"):
        engine = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed))
        plain = engine.read(MAX_BYTES + 1)
    elif packed.startswith(b"\x1f\x8b"):
        plain = zlib.decompressobj(wbits=31).decompress(packed, MAX_BYTES + 1)
    else:
        plain = packed
    if not plain or len(plain) > MAX_BYTES:
        raise ValueError("it is empty, or unpacks to more than is reasonable")
    return plain


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for number, member in enumerate(archive):
        if number >= MAX_FILES:
            raise ValueError(f"more than {MAX_FILES} files")
        content = archive.extractfile(member) if member.isfile() else None
        if content is not None:
            yield member.name, content.read()


def failure_of(files: Mapping[str, bytes]) -> Failure:
    """The failure of a support bundle's files; what can't be read is left out."""
    status = _json(files, "status.json")
    config = _toml(files.get("config/updater.toml", b""))
    numbers = {str(s.get("number")): name for name, s in _tables(config.get("slots")).items()}
    symptoms: dict[str, str] = {}
    if slot := _text(status.get("running_slot")):
        symptoms["running slot"] = slot
    info = files.get("config/artifact_info", b"").decode("utf-8", "replace")
    for line in info.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "artifact_name" and value.strip():
            symptoms["runs"] = value.strip()
    outcome = status.get("last_outcome")
    cause = ""
    if isinstance(outcome, Mapping):
        symptoms["outcome"] = _text(outcome.get("result")) or "none"
        cause = _text(outcome.get("cause"))
        if state := state_in(cause):
            symptoms["state"] = state
    under_way = status.get("update_in_progress")
    if isinstance(under_way, Mapping):
        symptoms["state"] = _text(under_way.get("state"))
        cause = _text(under_way.get("cause")) or cause
    symptoms |= _environment(files, config, numbers)
    slots = _json(files, "slots.json")
    return Failure(
        symptoms=symptoms,
        slots={
            name: _text(facts["sha256"])
            for name, facts in _tables(slots).items()
            if "sha256" in facts
        },
        loadable={
            name: bool(facts["ext4"]) for name, facts in _tables(slots).items() if "ext4" in facts
        },
        cause=cause,
        device_type=_text(status.get("device_type")),
    )


def _environment(
    files: Mapping[str, bytes], config: Mapping[str, Any], numbers: Mapping[str, str]
) -> dict[str, str]:
    """The boot environment as its bootloader reads it, of the copies that were packed raw."""
    kind = _tables({"bootenv": config.get("bootenv")}).get("bootenv", {}).get("kind")
    raw = [files[name] for name in sorted(files) if name.startswith("bootenv/raw-")]
    variables: Mapping[str, str] = {}
    valid = None
    if kind == "uboot" and raw:
        uboot = parse_environment(raw)
        variables, valid = uboot.variables, uboot.valid_copies
    elif kind == "grub" and raw:
        # Each copy, and its lock behind it.
        grub = parse_grub_environments(raw[::2], raw[1::2] if len(raw) > 2 else None)
        variables, valid = grub.variables, grub.valid_copies
    if not variables:
        told = _json(files, "bootenv/variables.json")
        variables = {key: _text(value) for key, value in told.items()}
    found: dict[str, str] = {}
    if valid is not None:
        found["valid copies"] = str(valid)
    if (slot := numbers.get(variables.get("mender_boot_part", ""))) is not None:
        found["boot slot"] = slot
        found["on trial"] = "yes" if variables.get("upgrade_available") == "1" else "no"
    return found


def _json(files: Mapping[str, bytes], name: str) -> Mapping[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, Mapping) else {}


def _toml(text: bytes) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8", "replace"))
    except (tomllib.TOMLDecodeError, RecursionError):
        return {}


def _tables(values: object) -> dict[str, Mapping[str, Any]]:
    """The tables in a table, by name."""
    if not isinstance(values, Mapping):
        return {}
    return {str(name): table for name, table in values.items() if isinstance(table, Mapping)}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


# -- recordings ----------------------------------------------------------------------------------


@frozen
class InRecording:
    """A crash state that could have led to the failure.

    Attributes:
        match: how well its symptoms agree.
        symptoms: they.
        crash_class, span, phase: what, and when power has to fail.
        promised: the newest promise then, in words.
        violated: the invariants that it breaks there.
        recovered: whether the updater has settled everything after the next start; else the
            symptoms are those of a start that went no further.
    """

    match: Match
    symptoms: dict[str, str]
    crash_class: CrashClass
    span: Span
    phase: int
    promised: str
    violated: tuple[int, ...]
    recovered: bool


def name_slots(
    failure: Failure, oracle: StaticOracle, classes: Iterable[CrashClass]
) -> dict[str, str]:
    """The failure's symptoms, with what stands in its slots.

    A slot is named after a known image if some state of the recording has the same slot with that
    image in it, by the hash of the whole; what equals none is no known image.
    """
    named: dict[str, str] = {}
    known: dict[tuple[str, str], str] = {}
    wanted = {slot for slot in failure.slots if slot in oracle.context.slots}
    for crash_class in classes:
        for slot in wanted - set(named):
            fact = crash_class.fact(oracle.context.slots[slot])
            if fact.image is None or (slot, fact.image) in known:
                continue
            known[slot, fact.image] = _hash_slot(oracle, crash_class, fact)
            if known[slot, fact.image] == failure.slots[slot]:
                named[slot] = fact.image
    for slot, loadable in failure.loadable.items():
        if slot in wanted:
            named.setdefault(slot, "mixed" if loadable else "unloadable")
        elif not loadable:
            named[slot] = "unloadable"
    return failure.symptoms | {f"slot {slot}": name for slot, name in named.items()}


def _hash_slot(oracle: StaticOracle, crash_class: CrashClass, fact: RegionFact) -> str:
    (region,) = (r for r in oracle.context.layout.all_regions() if r.name == fact.region)
    (part,) = region.ranges
    digest = hashlib.sha256()
    with crash_class.representative.disks(oracle.context.journal) as disks:
        disk: LazyDisk = disks[part.device]
        for at in range(0, part.length, _CHUNK):
            try:
                digest.update(disk.read(part.offset + at, min(_CHUNK, part.length - at)))
            except DiskError:
                return ""
    return digest.hexdigest()


def rank_states(
    symptoms: Mapping[str, str], oracle: StaticOracle, classes: Iterable[CrashClass]
) -> list[InRecording]:
    """The crash states that agree best, best first; one a class: in its best phase.

    Of those that agree equally well, states that break an invariant come first: a device that
    reached the field failed.
    """
    found = []
    for crash_class in classes:
        expectation = oracle.expect(crash_class)
        best: InRecording | None = None
        for span, phase in phases_of(crash_class, oracle.context.timeline):
            steps = oracle.context.timeline.steps[:phase]
            seen = oracle.seen(crash_class)
            there = symptoms_of_disk(seen.environment, seen.slots)
            running = there | _running(expectation)
            settled = _settled(running, seen.environment, expectation, steps)
            for candidate, recovered in ((settled, True), (running, False)):
                agreement = match(symptoms, candidate)
                if best is not None and agreement.score <= best.match.score:
                    continue
                best = InRecording(
                    agreement,
                    candidate,
                    crash_class,
                    span,
                    phase,
                    oracle.context.timeline.describe(phase),
                    oracle.judge(crash_class, phase).violated,
                    recovered,
                )
        if best is not None:
            found.append(best)
    return sorted(
        found, key=lambda one: (-one.match.score, not one.violated, one.crash_class.first_operation)
    )


def _running(expectation: Expectation) -> dict[str, str]:
    """What the next start brings up."""
    if expectation.slot is None:
        return {"running slot": "none", "runs": "nothing"}
    found = {"running slot": expectation.slot}
    if expectation.version is not None:
        found["runs"] = expectation.version
    return found


def _settled(
    running: Mapping[str, str],
    environment: BootEnvironment,
    expectation: Expectation,
    steps: Iterable[Step],
) -> dict[str, str]:
    """What the next start leaves, if bootloader and updater keep the contract to the end."""
    found = dict(running)
    slot = expectation.slot
    if slot is None:
        return found
    if environment.boot_slot != slot or environment.upgrade_available:
        # It is settled: the older copy is written, which may mend it.
        found.pop("valid copies", None)
        found |= {"boot slot": slot, "on trial": "no"}
    started, ended = "", False
    for step in steps:
        if isinstance(step.event, InstallStarted):
            started, ended = step.event.artifact, False
        ended = ended or isinstance(step.event, InstallEnded)
    if started and expectation.version is not None:
        if expectation.version == started:
            found["outcome"] = "committed"
        else:
            tried = ended or environment.upgrade_available
            found["outcome"] = "rolled-back" if tried else "interrupted"
    return found


# -- campaigns -----------------------------------------------------------------------------------


@frozen
class InCampaign:
    """A run of a campaign that ended like the failure."""

    match: Match
    run: Run


def rank_runs(symptoms: Mapping[str, str], runs: Iterable[Run]) -> list[InCampaign]:
    """The runs that agree best, best first; of equals, those that violated something first."""
    found = [
        InCampaign(match(symptoms, run.outcome.symptoms), run)
        for run in runs
        if run.outcome is not None and run.outcome.symptoms
    ]
    return sorted(
        found,
        key=lambda one: (
            -one.match.score,
            not (one.run.outcome and one.run.outcome.violated),
            one.run.index,
        ),
    )
