"""From a scenario that has ended to its bundle."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from attrs import define, evolve, field

from framework.campaign.bundle import SUFFIX, Bundle, CutFacts, write_bundle
from framework.campaign.replay import disk_sha256
from framework.campaign.steps import steps_of
from framework.console.pump import format_line
from framework.disk import CutRecord, DiskError, JournalReader
from framework.report import ScenarioResult
from framework.report.results import name_of
from framework.scenario.arming import Faults
from framework.scenario.device import Device


@define
class Collector:
    """Keeps what only the moment of a cut shows, and writes the bundle at the end.

    Attributes:
        directory: where bundles go.
        rig: the rig file.
        run_seed: the run's seed.
        device: the device of the scenario.
        hash_at_once: hash the disks at the moment of each cut. Later they are hashed as the journal
            has them, which is cheaper for runs that may need no bundle.
    """

    directory: Path
    rig: Path
    run_seed: int
    device: Device
    hash_at_once: bool = True
    cuts: list[CutFacts] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.device.after_cut = self._cut

    def _cut(self, cut: CutRecord) -> None:
        """Hash the disks that the cut left, as the recorder serves them."""
        recorder = self.device.machine.recorder
        digests = {}
        for name in recorder.devices if self.hash_at_once else ():
            with recorder.disk(name) as disk:
                digests[name] = disk_sha256(disk)
        self.cuts.append(CutFacts(cut.index, cut.operation, cut.model, cut.seed, digests))

    def write(
        self,
        result: ScenarioResult,
        faults: Faults | None,
        composition: dict[str, Any] | None = None,
    ) -> Path:
        """Write the bundle of a run that has been judged; one of a campaign has a composition.

        Raises:
            BundleError: it can't be written.
        """
        device = self.device
        recorder = device.machine.recorder
        bases: dict[str, tuple[str, str]] = {}
        journal: Path | None = recorder.journal_path
        with contextlib.suppress(DiskError):
            header = JournalReader(recorder.journal_path).header
            bases = {d.name: (str(d.base.path), d.base.sha256) for d in header.devices}
            if not self.hash_at_once:
                self.cuts = [self._hashed(cut) for cut in self.cuts]
        if not bases:
            journal = None
        path = self.directory / f"{name_of(result.scenario)}{SUFFIX}"
        write_bundle(
            path,
            Bundle(
                scenario=result.scenario,
                title=result.title,
                rig=self.rig.name,
                rig_text=self.rig.read_text(encoding="utf-8"),
                run_seed=self.run_seed,
                faults=() if faults is None else tuple(str(a.fault) for a in faults.armed),
                steps=steps_of(device.events),
                verdict=result.verdict,
                error=result.error,
                findings=tuple((f.invariant, f.held, f.evidence) for f in result.findings),
                timeline=tuple((m.at_s, m.source, m.text) for m in result.moments),
                cuts=tuple(self.cuts),
                versions={
                    "brownout": metadata.version("brownout"),
                    "python": platform.python_version(),
                    "system": platform.platform(),
                },
                images={name: facts.sha256 for name, facts in device.images.items()},
                bases=bases,
                composition=composition,
                network=device.used_network,
                deterministic=device.deterministic,
            ),
            console="".join(format_line(line) for line in device.console_lines()),
            journal=journal,
        )
        return path

    def _hashed(self, cut: CutFacts) -> CutFacts:
        """A cut with the disks' hashes, of the journal. Raises DiskError."""
        recorder = self.device.machine.recorder
        reader = JournalReader(recorder.journal_path)
        digests = {}
        for name in recorder.devices:
            with reader.after_cut(cut.index, name) as disk:
                digests[name] = disk_sha256(disk)
        return evolve(cut, disks=digests)
