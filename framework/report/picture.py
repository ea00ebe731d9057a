"""The picture of a run: time from left to right, the disk's regions from top to bottom.

Each write is a mark at its place in its region, each flush a tick on the rule at the top, each
moment (power cut, boot, state of the updater) a vertical line. Plain SVG, so that the report needs
no script to show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attrs import frozen

from framework.report.results import Moment, OperationRecord, RegionRecord

WIDTH = 960
LEFT = 120
ROW = 26
GAP = 6
TOP = 40
COLOURS = {
    "write": "#2f6db5",
    "write-zeroes": "#7fa8d6",
    "discard": "#b0b0b0",
    "flush": "#3c8c4a",
}
STRONG_SOURCES = ("power", "network", "boot", "fault", "event")
VERDICTS = {"held": "#2c7a3d", "accepted": "#d99a00", "broken": "#b3261e"}
STRIP = 12


@frozen
class CutPoint:
    """What cutting the power after an operation may leave: `verdict` is held, accepted or broken.

    `text` says what broke, or how many classes of crash states were judged.
    """

    at_s: float
    number: int
    verdict: str
    text: str


def draw(
    operations: tuple[OperationRecord, ...],
    moments: tuple[Moment, ...],
    regions: tuple[RegionRecord, ...],
    elapsed_s: float,
    cuts: Sequence[CutPoint] = (),
) -> str:
    """The picture as an SVG element; with `cuts`, a strip of their verdicts below the regions."""
    below = TOP + len(regions) * (ROW + GAP)
    height = below + 24 + (STRIP + GAP if cuts else 0)
    span = max([elapsed_s, 0.001, *(o.at_s for o in operations), *(m.at_s for m in moments)])

    def x(at_s: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * at_s / span

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="writes over time and place" xmlns="http://www.w3.org/2000/svg">'
    ]
    for index, region in enumerate(regions):
        y = TOP + index * (ROW + GAP)
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + ROW / 2 + 4}" text-anchor="end">'
            f"{escape(region.name)}</text>"
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW}" class="row"/>'
        )
    parts.extend(_operation(operation, regions, x(operation.at_s)) for operation in operations)
    for moment in moments:
        if moment.source in STRONG_SOURCES:
            parts.append(
                f'<line x1="{x(moment.at_s):.1f}" x2="{x(moment.at_s):.1f}" y1="{TOP - 14}" '
                f'y2="{height - 20}" class="{escape(moment.source)}">'
                f"<title>{moment.at_s:.2f} s {escape(moment.text)}</title></line>"
            )
    if cuts:
        parts.append(
            f'<text x="{LEFT - 8}" y="{below + STRIP - 2}" text-anchor="end">cut points</text>'
        )
    # What broke is drawn last, so that nothing hides it.
    for cut in sorted(cuts, key=lambda cut: list(VERDICTS).index(cut.verdict)):
        parts.append(
            f'<rect x="{x(cut.at_s) - 1:.1f}" y="{below}" width="2" height="{STRIP}" '
            f'fill="{VERDICTS[cut.verdict]}"><title>cut after operation {cut.number}: '
            f"{escape(cut.text)}</title></rect>"
        )
    for tick in range(5):
        at_s = span * tick / 4
        parts.append(
            f'<text x="{x(at_s):.1f}" y="{height - 6}" text-anchor="middle">{at_s:.1f} s</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _operation(operation: OperationRecord, regions: tuple[RegionRecord, ...], x: float) -> str:
    """One operation's mark, with its number and place as the tooltip."""
    title = f"<title>operation {operation.number}: {operation.kind}"
    if operation.kind == "flush":
        return (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 12}" y2="{TOP - 4}" '
            f'stroke="{COLOURS["flush"]}">{title} {escape(operation.device)}</title></line>'
        )
    for index, region in enumerate(regions):
        place = operation.offset - region.offset
        if operation.device != region.device or not -operation.length < place < region.length:
            continue
        scale = ROW / region.length
        y = TOP + index * (ROW + GAP) + max(place, 0) * scale
        height = max(1.2, min(operation.length, region.length) * scale)
        return (
            f'<rect x="{x - 0.6:.1f}" y="{min(y, TOP + index * (ROW + GAP) + ROW - height):.1f}" '
            f'width="1.2" height="{height:.1f}" fill="{COLOURS.get(operation.kind, "#000")}">'
            f"{title}, {operation.length} bytes at {operation.offset} of "
            f"{escape(operation.device)}</title></rect>"
        )
    return ""
