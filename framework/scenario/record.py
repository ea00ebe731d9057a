"""From a judged scenario to its result file and its Allure attachments."""

from __future__ import annotations

import allure

from framework.disk import DiskError, JournalReader, Kind
from framework.report import FindingRecord, Moment, OperationRecord, RegionRecord, ScenarioResult
from framework.report.picture import draw
from framework.scenario.device import Device
from framework.targets.errors import InfrastructureError
from framework.verdict import INVARIANTS, Outcome, Verdict

PICTURE_OPERATIONS = 2500
CONSOLE_CHARACTERS = 200_000
KINDS = {
    Kind.WRITE: "write",
    Kind.FLUSH: "flush",
    Kind.DISCARD: "discard",
    Kind.ZEROES: "write-zeroes",
}


def record(
    *,
    scenario: str,
    title: str,
    device: Device,
    fault: str,
    seed: int,
    verdict: Verdict,
    failure: BaseException | None,
) -> ScenarioResult:
    """The result of one scenario. A failure that is no assertion is INFRASTRUCTURE."""
    said = str(verdict)
    if isinstance(failure, InfrastructureError):
        said = Outcome.INFRASTRUCTURE.value
    elif failure is not None:
        said = "FAILED" if isinstance(failure, AssertionError) else "BROKEN"
    operations, count = journal_operations(device)
    cut = device.machine.last_cut
    return ScenarioResult(
        scenario=scenario,
        title=title,
        rig=device.manifest.target,
        fault=fault,
        did=tuple(device.did),
        verdict=said,
        findings=tuple(
            FindingRecord(i.number, i.name, f.held, f.evidence)
            for i, f in zip(INVARIANTS, verdict.findings, strict=True)
        ),
        error="" if failure is None else f"{type(failure).__name__}: {failure}",
        seed=seed,
        elapsed_s=device.elapsed_s,
        moments=tuple(sorted(device.moments, key=lambda moment: moment.at_s)),
        operations=operations,
        operation_count=count,
        regions=tuple(
            RegionRecord(extent.name, extent.device, extent.offset, extent.length)
            for extent in device.manifest.extents()
        ),
        console=device.console_text()[-CONSOLE_CHARACTERS:],
        facts={
            **{f"image {name}": facts.sha256 for name, facts in device.images.items()},
            **({"last cut": str(cut)} if cut is not None else {}),
            "repeat": f"pytest '{scenario}' --lg-env rigs/{device.manifest.target}.yaml",
        },
    )


def journal_operations(device: Device) -> tuple[tuple[OperationRecord, ...], int]:
    """The journal's mutating operations, thinned to what a picture can show, and their number."""
    try:
        reader = JournalReader(device.machine.recorder.journal_path)
    except DiskError:
        return (), 0
    table = reader.operations
    names = reader.devices
    thin = max(1, len(table) // PICTURE_OPERATIONS)
    return tuple(
        OperationRecord(
            at_s=(int(table.arrived_ns[row]) - device.started_ns) / 1e9,
            number=int(table.number[row]),
            kind=KINDS[Kind(int(table.kind[row]))],
            device=names[int(table.device[row])],
            offset=int(table.offset[row]),
            length=int(table.length[row]),
        )
        for row in range(0, len(table), thin)
    ), len(table)


def attach(result: ScenarioResult) -> None:
    """Attach console, timeline, picture and verdict to the running Allure test."""
    kinds = allure.attachment_type
    allure.dynamic.parameter("seed", result.seed, excluded=True)
    if result.fault:
        allure.dynamic.parameter("fault", result.fault)
    allure.attach(result.console, "console", kinds.TEXT)
    allure.attach(_timeline(result.moments), "timeline", kinds.TEXT)
    if result.regions:
        allure.attach(
            draw(result.operations, result.moments, result.regions, result.elapsed_s),
            "writes over time and place",
            kinds.SVG,
        )
    allure.attach(
        "\n".join(
            f"{f.invariant} {f.name}: "
            f"{'not judged' if f.held is None else 'held' if f.held else 'BROKEN'}: {f.evidence}"
            for f in result.findings
        ),
        f"verdict {result.verdict}",
        kinds.TEXT,
    )


def _timeline(moments: tuple[Moment, ...]) -> str:
    return "\n".join(f"{m.at_s:9.3f} s  {m.source:8}  {m.text}" for m in moments)
