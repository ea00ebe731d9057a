"""From a judged scenario to its result file and its Allure attachments."""

from __future__ import annotations

from collections.abc import Iterable

import allure

from framework.disk import DiskError, JournalReader, Kind
from framework.network import FaultProxy
from framework.report import (
    ConsoleLine,
    FindingRecord,
    Moment,
    OperationRecord,
    RegionRecord,
    ScenarioResult,
    Strike,
    Traffic,
    cause_of,
    state_at,
)
from framework.report.picture import draw
from framework.scenario.arming import ArmedFault, Faults
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
    faults: Faults | None,
    proxy: FaultProxy | None,
    verdict: Verdict,
    failure: BaseException | None,
    feature: str = "",
    story: str = "",
) -> ScenarioResult:
    """The result of one scenario. A failure that is neither assertion nor rig is BROKEN."""
    said = str(verdict)
    if isinstance(failure, InfrastructureError):
        said = Outcome.INFRASTRUCTURE.value
    elif failure is not None:
        said = "FAILED" if isinstance(failure, AssertionError) else "BROKEN"
    operations, count = journal_operations(device)
    cut = device.machine.last_cut
    moments = tuple(sorted(device.moments, key=lambda moment: moment.at_s))
    return ScenarioResult(
        scenario=scenario,
        title=title,
        rig=device.manifest.target,
        fault="" if faults is None else faults.sentence(),
        did=tuple(device.did),
        verdict=said,
        findings=tuple(
            FindingRecord(i.number, i.name, f.held, f.evidence)
            for i, f in zip(INVARIANTS, verdict.findings, strict=True)
        ),
        error="" if failure is None else f"{type(failure).__name__}: {failure}",
        seed=0 if faults is None else faults.seed,
        elapsed_s=device.elapsed_s,
        moments=moments,
        operations=operations,
        operation_count=count,
        regions=tuple(
            RegionRecord(extent.name, extent.device, extent.offset, extent.length)
            for extent in device.manifest.extents()
        ),
        strikes=tuple(_strikes(() if faults is None else faults.armed, moments)),
        traffic=() if proxy is None else _traffic(proxy, device.started_ns),
        lines=_console(device),
        feature=feature,
        story=story,
        facts={
            **{f"image {name}": facts.sha256 for name, facts in device.images.items()},
            **({"last cut": str(cut)} if cut is not None else {}),
            "repeat": f"pytest '{scenario}' --lg-env rigs/{device.manifest.target}.yaml",
        },
    )


def _strikes(armed: Iterable[ArmedFault], moments: tuple[Moment, ...]) -> Iterable[Strike]:
    """What struck, and in which state; a cut that nobody gave power back from, at its own time."""
    cuts = [moment.at_s for moment in moments if moment.source == "power"]
    for each in armed:
        at_s = each.struck_s
        if at_s is None and each.fired():
            at_s = cuts[-1] if cuts else moments[-1].at_s
        if at_s is not None:
            fault = each.fault
            yield Strike(at_s, fault.family, fault.what(), state_at(moments, at_s))


def _traffic(proxy: FaultProxy, started_ns: int) -> tuple[Traffic, ...]:
    return tuple(
        Traffic((each.time_ns - started_ns) / 1e9, each.up_bytes, each.down_bytes)
        for each in proxy.meter.samples
    )


def _console(device: Device) -> tuple[ConsoleLine, ...]:
    """The newest lines of the console, as many as a result has room for."""
    room = CONSOLE_CHARACTERS
    kept: list[ConsoleLine] = []
    for line in reversed(device.console_lines()):
        room -= len(line.text) + 1
        if room < 0:
            break
        at_s = (line.monotonic_ns - device.started_ns) / 1e9
        kept.append(ConsoleLine(at_s, line.direction, line.text))
    return tuple(reversed(kept))


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
    if cause := cause_of(result):
        allure.attach(cause, "cause", kinds.TEXT)
    allure.attach(_told(result.lines), "console", kinds.TEXT)
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


def _told(lines: tuple[ConsoleLine, ...]) -> str:
    return "".join(f"{line.at_s:9.3f} s  {line.direction}  {line.text}\n" for line in lines)


def _timeline(moments: tuple[Moment, ...]) -> str:
    return "\n".join(f"{m.at_s:9.3f} s  {m.source:8}  {m.text}" for m in moments)
