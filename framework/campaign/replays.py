"""Does the runs of many bundles again, those of one rig and seed in one session, and compares.

As `replay` for one; the session's machine and server are started once, so fifty bundles take about
as long as their fifty scenarios.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from framework.campaign.bundle import SUFFIX, Bundle, BundleError, read_bundle
from framework.campaign.manner import Manner, manner_of
from framework.campaign.replay import (
    Ran,
    Replayed,
    check_disks,
    compare_runs,
    features_of,
    lived_again,
    rebased,
    run_again,
)

SCENARIO_TIMEOUT_S: Final = 600.0
STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.5


@frozen
class Again:
    """One bundle, done again.

    Attributes:
        path: the bundle.
        bundle: what it says; None if it can't be read.
        replayed: how it came out; None if it could not be done again.
        error: why not.
        idle: whether there was nothing to do: no cut, so no disk to rebuild.
    """

    path: Path
    bundle: Bundle | None
    replayed: Replayed | None
    error: str = ""
    idle: bool = False

    @property
    def reproduced(self) -> bool:
        """Whether everything came out the same."""
        return self.replayed is not None and self.replayed.reproduced

    @property
    def told(self) -> str:
        """How it came out, in one line."""
        if self.replayed is None:
            return self.error
        parts = [f"not the same: {difference}" for difference in self.replayed.disks]
        if self.replayed.divergence is not None:
            parts.append(str(self.replayed.divergence))
        note = f", {self.replayed.note}" if self.replayed.note else ""
        return "; ".join(parts) or f"reproduced{note}"


def replay_all(
    paths: Sequence[Path],
    rig_of: Callable[[Bundle], Path],
    done: Callable[[Again], None],
    *,
    disks_only: bool = False,
    bases: Mapping[str, Path] | None = None,
    deterministic: bool | None = None,
) -> list[Again]:
    """Do all of them again; `done` is called with each, as it ends. One that can't be is told.

    `deterministic`: as `replay` has it, for each.
    """
    ended: list[Again] = []

    def end(again: Again) -> None:
        ended.append(again)
        done(again)

    sessions: dict[tuple[Path, int, Manner], dict[str, tuple[Path, Bundle, tuple[str, ...]]]] = {}
    for path in paths:
        bundle: Bundle | None = None
        try:
            bundle = rebased(read_bundle(path), bases or {})
            if (lived := lived_again(bundle)) is not None:
                end(Again(path, bundle, lived))
                continue
            disks = check_disks(path, bundle)
            if disks_only and not bundle.cuts:
                end(Again(path, bundle, None, "the run had no power cut", idle=True))
                continue
            if disks_only:
                end(Again(path, bundle, Replayed(disks, None, "")))
                continue
            rig = rig_of(bundle)
            manner = manner_of(bundle, features_of(rig), deterministic)
            session = sessions.setdefault((rig, bundle.run_seed, manner), {})
            if "::" not in bundle.scenario or bundle.scenario in session:
                # Not one of pytest's, or a second time in one session.
                ran = run_again(bundle, rig, lambda text: None, manner)
                end(Again(path, bundle, _compared(path, bundle, disks, ran, manner)))
            else:
                session[bundle.scenario] = (path, bundle, disks)
        except BundleError as error:
            end(Again(path, bundle, None, str(error)))
    for (rig, seed, manner), session in sessions.items():
        for ran in _run_session(tuple(session), rig, seed, manner):
            path, bundle, disks = session.pop(ran.bundle.scenario)
            end(Again(path, bundle, _compared(path, bundle, disks, ran, manner)))
        for path, bundle, _ in session.values():
            end(Again(path, bundle, None, f"{bundle.scenario} could not be run again on {rig}"))
    return ended


def _compared(
    path: Path, bundle: Bundle, disks: tuple[str, ...], ran: Ran, manner: Manner
) -> Replayed:
    parted, note = compare_runs(path, bundle, ran, exact=manner.exact)
    return Replayed(disks, parted, ran.bundle.verdict, note)


def _run_session(scenarios: Sequence[str], rig: Path, seed: int, manner: Manner) -> Iterator[Ran]:
    """Run scenarios in one session of pytest, and yield each one's run as its bundle is written."""
    if not scenarios:
        return
    with tempfile.TemporaryDirectory(prefix="brownout-replay-") as name:
        folder = Path(name)
        arguments = [
            # Whatever ends this process ends the run.
            *("setpriv", "--pdeathsig", "TERM", "--"),
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *scenarios),
            *("--lg-env", str(rig), "--brownout-seed", str(seed), "--brownout-bundles", name),
            *manner.options,
        ]
        seen: set[Path] = set()
        deadline = time.monotonic() + len(scenarios) * SCENARIO_TIMEOUT_S
        with (folder / "pytest.log").open("wb") as log:
            running = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                ended = False
                while not ended and time.monotonic() < deadline:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        running.wait(POLL_S)
                        ended = True
                    # Looked for after the end, too: the last one was written just before it.
                    for path in sorted(set(folder.glob(f"*{SUFFIX}")) - seen):
                        seen.add(path)
                        ran = Ran.of(path, exact=manner.exact)
                        path.unlink()
                        yield ran
            finally:
                _stop(running)


def _stop(running: subprocess.Popen[bytes]) -> None:
    """Interrupt it so that its fixtures clean up; kill it if it stays."""
    if running.poll() is None:
        running.send_signal(signal.SIGINT)
        try:
            running.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
