"""Does a bundle's run again, and says whether it came out the same.

Two things are looked at. *The disks*: from the journal and the base images, every disk is rebuilt
at every cut and compared bit for bit with what the run had; no guest takes part, so this must agree
always. *The run*: the same scenario with the same seed on the same rig, compared step by step. A
guest's timing is not ours, so a run may part from its bundle where the scenario leaves it room;
then the first differing step is named. A run without network is repeated in a deterministic machine
(`framework.campaign.manner`); if it was made in one, every disk operation is compared as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from attrs import evolve, frozen

from framework.campaign.bundle import (
    SUFFIX,
    Bundle,
    BundleError,
    read_bundle,
    unpack_journal,
)
from framework.campaign.manner import (
    REAL_TIME,
    Manner,
    Operations,
    compare_operations,
    manner_of,
    operations_of,
)
from framework.campaign.steps import Divergence, compare
from framework.disk import BaseImageError, DiskError, JournalReader, LazyDisk, UnreadableSectorError
from framework.targets.errors import RigError
from framework.targets.rig import rig_features

REPLAY_TIMEOUT_S = 3600.0
_CHUNK_BYTES = 4 << 20
_UNREADABLE = b"unreadable sector"
_SECTOR = 512

Say = Callable[[str], None]


@frozen
class Replayed:
    """How a replay came out.

    Attributes:
        disks: differences of rebuilt disks, in words; empty if all are the same.
        divergence: where the run parted from the bundle's; None if it did not, or was not asked.
        verdict: the new run's verdict; empty if it was not asked for.
        note: what else there is to say of the run, in words.
    """

    disks: tuple[str, ...]
    divergence: Divergence | None
    verdict: str
    note: str = ""

    @property
    def reproduced(self) -> bool:
        """Whether everything came out the same."""
        return not self.disks and self.divergence is None


def disk_sha256(disk: LazyDisk) -> str:
    """The hash of a whole disk; a sector that can't be read counts as such."""
    digest = hashlib.sha256()
    for at in range(0, disk.size_bytes, _CHUNK_BYTES):
        for piece in _pieces(disk, at, min(_CHUNK_BYTES, disk.size_bytes - at)):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(disk: LazyDisk, offset: int, length: int) -> Iterator[bytes]:
    try:
        yield disk.read(offset, length)
    except UnreadableSectorError:
        for at in range(offset, offset + length, _SECTOR):
            try:
                yield disk.read(at, _SECTOR)
            except UnreadableSectorError:
                yield _UNREADABLE


def rebased(bundle: Bundle, bases: Mapping[str, Path]) -> Bundle:
    """The bundle with base images at other places; their hashes stay."""
    return evolve(
        bundle,
        bases={
            name: (str(bases.get(name, path)), digest)
            for name, (path, digest) in bundle.bases.items()
        },
    )


def check_disks(path: Path, bundle: Bundle) -> tuple[str, ...]:
    """Rebuild every disk at every cut, and say which are not what the run had.

    Raises:
        BundleError: the journal is damaged, or a base image is missing or another.
    """
    if not bundle.cuts:
        return ()
    with tempfile.TemporaryDirectory(prefix="brownout-bundle-") as folder:
        journal = unpack_journal(path, bundle, Path(folder) / "disk.journal")
        bases = {name: Path(base) for name, (base, _) in bundle.bases.items()}
        try:
            reader = JournalReader(journal, bases, verify_bases=True)
        except BaseImageError as error:
            raise BundleError(f"bundle {path}: {error}; build the images it was made of") from error
        except DiskError as error:
            raise BundleError(f"bundle {path}: {error}") from error
        return tuple(_different(reader, bundle))


def _different(reader: JournalReader, bundle: Bundle) -> Iterator[str]:
    for cut in bundle.cuts:
        if cut.index >= len(reader.cuts):
            yield f"cut {cut.index} is not in the journal, which has {len(reader.cuts)}"
            continue
        for name, expected in cut.disks.items():
            with reader.after_cut(cut.index, name) as disk:
                if disk_sha256(disk) != expected:
                    yield f"{name} after cut {cut.index} (operation {cut.operation})"


@frozen
class Ran:
    """A run that was made again: its bundle, and its disks' operations if they were asked for."""

    bundle: Bundle
    operations: Operations = ()

    @classmethod
    def of(cls, path: Path, *, exact: bool) -> Ran:
        """Of the bundle that it left. Raises BundleError."""
        bundle = read_bundle(path)
        return cls(bundle, operations_in(path, bundle) if exact else ())


def operations_in(path: Path, bundle: Bundle) -> Operations:
    """The operations in a bundle's journal; none without one. Raises BundleError."""
    if not bundle.journal_sha256:
        return ()
    with tempfile.TemporaryDirectory(prefix="brownout-bundle-") as folder:
        try:
            return operations_of(unpack_journal(path, bundle, Path(folder) / "disk.journal"))
        except DiskError as error:
            raise BundleError(f"bundle {path}: {error}") from error


def compare_runs(
    path: Path, bundle: Bundle, again: Ran, *, exact: bool
) -> tuple[Divergence | None, str]:
    """Where a run parts from its bundle, at an event, or if `exact` an operation; and a note.

    Raises BundleError.
    """
    parted = compare(course_of(bundle), course_of(again.bundle))
    if parted is None and exact:
        return compare_operations(operations_in(path, bundle), again.operations)
    return parted, ""


def run_again(bundle: Bundle, rig: Path, say: Say, manner: Manner = REAL_TIME) -> Ran:
    """Run the scenario again with the same seed.

    Raises:
        BundleError: it could not be run.
    """
    with tempfile.TemporaryDirectory(prefix="brownout-replay-") as folder:
        if bundle.composition is not None:
            return _perform_again(bundle, rig, Path(folder), say, manner)
        arguments = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(bundle.scenario, "--lg-env", str(rig)),
            *("--brownout-seed", str(bundle.run_seed), "--brownout-bundles", folder),
            *manner.options,
        ]
        say("running " + " ".join(arguments[1:]))
        try:
            ended = subprocess.run(
                arguments, capture_output=True, text=True, timeout=REPLAY_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BundleError(f"the replay did not end within {REPLAY_TIMEOUT_S:g} s") from error
        found = list(Path(folder).glob(f"*{SUFFIX}"))
        if len(found) != 1:
            last = (ended.stdout + ended.stderr).strip().splitlines()[-1:] or ["no output"]
            raise BundleError(f"{bundle.scenario} could not be run again: {last[0]}")
        return Ran.of(found[0], exact=manner.exact)


def _perform_again(bundle: Bundle, rig: Path, folder: Path, say: Say, manner: Manner) -> Ran:
    """Perform a campaign's composition again. Raises BundleError."""
    # Performing leaves bundles, whose disks are hashed here.
    from framework.campaign.composition import Composition  # noqa: PLC0415
    from framework.campaign.perform import Place, needs, perform  # noqa: PLC0415
    from framework.scenario.bench import open_bench_on  # noqa: PLC0415

    composition = Composition.from_values(bundle.composition)
    features = rig_features(rig)
    missing = sorted(composition.features() - features)
    if missing:
        raise BundleError(
            f"{bundle.scenario}: needs the feature {', '.join(missing)}, which {rig} does not have"
        )
    say(f"performing {composition}")
    with contextlib.closing(open_bench_on(rig, needs(composition))) as bench:
        if manner.deterministic:
            bench.make_deterministic()
        done = perform(
            Place(bench, rig, features),
            composition,
            title=bundle.scenario,
            repeat="",
            bundles=folder,
            always=True,
        )
    if not done.bundle:
        raise BundleError(f"{bundle.scenario} could not be run again: {done.evidence}")
    return Ran.of(Path(done.bundle), exact=manner.exact)


def replay(
    path: Path,
    rig: Path,
    say: Say,
    *,
    disks_only: bool = False,
    bases: Mapping[str, Path] | None = None,
    deterministic: bool | None = None,
) -> Replayed:
    """Rebuild the disks, and run the scenario again unless `disks_only`.

    `bases`: base images that are not where the bundle says, by disk. `deterministic`: whether the
    machine's time is to be its own; None: if the run had no network.

    Raises:
        BundleError: the bundle or the rig can't be used.
    """
    bundle = rebased(read_bundle(path), bases or {})
    say(f"{bundle.scenario} on {bundle.rig}, seed {bundle.run_seed}: {bundle.verdict}")
    for fault in bundle.faults:
        say(f"fault: {fault}")
    if (lived := lived_again(bundle)) is not None:
        return lived
    if disks_only and not bundle.cuts:
        raise BundleError(
            f"bundle {path}: the run had no power cut, so there is no disk to rebuild"
        )
    disks = check_disks(path, bundle)
    say(f"{len(bundle.cuts)} cuts rebuilt, {'all the same' if not disks else 'NOT the same'}")
    if disks_only:
        return Replayed(disks, None, "")
    manner = manner_of(bundle, features_of(rig), deterministic)
    say(str(manner))
    again = run_again(bundle, rig, say, manner)
    parted, note = compare_runs(path, bundle, again, exact=manner.exact)
    return Replayed(disks, parted, again.bundle.verdict, note)


def features_of(rig: Path) -> frozenset[str]:
    """What a rig can do. Raises BundleError if it makes no sense."""
    try:
        return rig_features(rig)
    except RigError as error:
        raise BundleError(str(error)) from error


def lived_again(bundle: Bundle) -> Replayed | None:
    """A simulated lifetime, lived through again; None for any other. Raises BundleError."""
    # What lives leaves bundles, whose replays are defined here.
    from framework.campaign.kept import is_simulated, live_again  # noqa: PLC0415
    from framework.targets.simulated.laboratory import Laboratory  # noqa: PLC0415

    if not is_simulated(bundle):
        return None
    with contextlib.closing(Laboratory()) as laboratory:
        return live_again(laboratory, bundle)


def course_of(bundle: Bundle) -> tuple[str, ...]:
    """What a run did, up to its verdict: what two runs are compared by."""
    return (*bundle.steps, f"verdict {bundle.verdict}")
