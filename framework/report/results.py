"""The result of one scenario as a file, and the folder of them that a run leaves.

One JSON file a scenario, written whole or not at all (temporary file, then rename), so a harness
that is killed leaves complete results only. `progress.jsonl` in the same folder is what a live
display follows: one line per thing that happens, appended with a single write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, field, frozen

FORMAT_VERSION = 2
PROGRESS_NAME = "progress.jsonl"
SUFFIX = ".result.json"


class ResultError(Exception):
    """A result file can't be read or written; the message names the file."""


@frozen
class FindingRecord:
    """One invariant's part of the verdict; `held` is None where it was not judged."""

    invariant: int
    name: str
    held: bool | None
    evidence: str


@frozen
class Moment:
    """Something that happened, `at_s` seconds into the scenario."""

    at_s: float
    source: str
    text: str


@frozen
class OperationRecord:
    """One operation of the recorder's journal, for the picture. Offsets and lengths in bytes."""

    at_s: float
    number: int
    kind: str
    device: str
    offset: int
    length: int


@frozen
class RegionRecord:
    """A named range of a disk: a partition, or a copy of the boot environment."""

    name: str
    device: str
    offset: int
    length: int


@frozen
class Strike:
    """A fault that struck, for the first time.

    Attributes:
        at_s: seconds into the scenario.
        family: such as `power`.
        what: what went wrong, without when.
        state: what the device was doing: the updater's state, or `starting`, `Idle`, `off`.
    """

    at_s: float
    family: str
    what: str
    state: str


@frozen
class Traffic:
    """How many bytes the proxy had forwarded, `at_s` seconds into the scenario."""

    at_s: float
    up_bytes: int
    down_bytes: int


@frozen
class ConsoleLine:
    """A line of the console: `RX` from the device, `TX` to it, `--` a note of the harness."""

    at_s: float
    direction: str
    text: str


@frozen
class ScenarioResult:
    """All that a report shows of one scenario.

    Attributes:
        scenario: the pytest node id.
        title: what is tested, in words.
        rig: the rig's name.
        fault: the fault as a sentence; empty for none.
        did: what the device did, in a few words each.
        verdict: such as `PASS` or `VIOLATION(2)`.
        findings: one per invariant.
        error: the message of an error that is no verdict.
        seed: the seed of every random choice.
        elapsed_s: wall time of the scenario.
        moments: the timeline.
        operations: the journal's operations (thinned for the picture, see `operation_count`).
        operation_count: mutating operations in all.
        regions: the disk map of the picture.
        strikes: the faults that struck.
        traffic: bytes through the proxy over time.
        lines: the console, with its times.
        feature, story: where a QA engineer looks for it.
        facts: whatever else identifies the run (versions, hashes, command to repeat).
    """

    scenario: str
    title: str
    rig: str
    fault: str
    did: tuple[str, ...]
    verdict: str
    findings: tuple[FindingRecord, ...] = ()
    error: str = ""
    seed: int = 0
    elapsed_s: float = 0.0
    moments: tuple[Moment, ...] = ()
    operations: tuple[OperationRecord, ...] = ()
    operation_count: int = 0
    regions: tuple[RegionRecord, ...] = ()
    strikes: tuple[Strike, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    lines: tuple[ConsoleLine, ...] = ()
    feature: str = ""
    story: str = ""
    facts: dict[str, str] = field(factory=dict)

    @property
    def console(self) -> str:
        """What the device said, as text."""
        return "".join(f"{line.text}\n" for line in self.lines if line.direction == "RX")

    @property
    def passed(self) -> bool:
        """Whether every judged invariant held."""
        return self.verdict == "PASS"


class ResultStore:
    """The folder that a run's results and progress go to.

    Raises:
        ResultError: the folder can't be made, or a file in it can't be read or written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultError(f"{directory}: cannot make the folder: {error.strerror}") from error

    @property
    def progress_path(self) -> Path:
        """The file that a live display follows."""
        return self.directory / PROGRESS_NAME

    def progress(self, scenario: str, kind: str, text: str) -> None:
        """Append one line of progress (O_APPEND: several workers may write)."""
        line = json.dumps({"scenario": scenario, "kind": kind, "text": text}) + "\n"
        with _told(self.progress_path):
            descriptor = os.open(self.progress_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)

    def write(self, result: ScenarioResult) -> Path:
        """Write one result; an older one of the same scenario is replaced."""
        path = self.directory / f"{name_of(result.scenario)}{SUFFIX}"
        text = json.dumps({"format": FORMAT_VERSION, **asdict(result)}, indent=1)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with _told(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        return path

    def find(self, scenario: str) -> ScenarioResult | None:
        """The result of a scenario; None if there is none."""
        path = self.directory / f"{name_of(scenario)}{SUFFIX}"
        return _read(path) if path.exists() else None

    def read_all(self) -> list[ScenarioResult]:
        """All results in the folder, ordered by scenario."""
        return sorted(self.stored(), key=lambda result: result.scenario)

    def stored(self) -> StoredResults:
        """The results in the folder, each read when it is asked for: there may be thousands."""
        return StoredResults(tuple(sorted(self.directory.glob(f"*{SUFFIX}"))))


class StoredResults(Collection[ScenarioResult]):
    """Results in files, read anew each time they are gone through, in the order of their names."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, result: object) -> bool:
        return any(each == result for each in self)

    def __iter__(self) -> Iterator[ScenarioResult]:
        """The results. Raises ResultError for one that can't be read."""
        return map(_read, self._paths)


def _read(path: Path) -> ScenarioResult:
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ResultError(f"{path}: not a result file of this version: {error}") from error


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn an OSError into a ResultError that names the file."""
    try:
        yield
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror}") from error


def from_json(data: dict[str, Any]) -> ScenarioResult:
    """A result from what `ResultStore.write` wrote. Raises ValueError, TypeError or KeyError."""
    if data.pop("format") != FORMAT_VERSION:
        raise ValueError(f"format is not {FORMAT_VERSION}")
    parts = {
        "findings": FindingRecord,
        "moments": Moment,
        "operations": OperationRecord,
        "regions": RegionRecord,
        "strikes": Strike,
        "traffic": Traffic,
        "lines": ConsoleLine,
    }
    for name, kind in parts.items():
        data[name] = tuple(kind(**item) for item in data[name])
    data["did"] = tuple(data["did"])
    return ScenarioResult(**data)


def name_of(scenario: str) -> str:
    """A file name for a scenario: readable, and unique by a hash of the whole."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", scenario)[-80:].strip("-")
    return f"{readable}-{hashlib.sha256(scenario.encode()).hexdigest()[:8]}"
