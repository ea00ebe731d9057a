"""Checks each distinct data partition once: as the device's start leaves it, and synced files.

Invariant 5. What the device does to it before it mounts it is done here, too (`Repair`). A distinct
content is checked on one member of a class that has it; what must be intact depends on the phase (a
file counts from when its sync was acknowledged), so files are read once and compared a phase at a
time. Cost: an export of what the partition holds and a run of e2fsck: 7 ms of one core.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Final

from attrs import frozen

from framework.disk import Ext4Check, check_ext4
from framework.disk.glimpse import Glimpses
from framework.explore.judges.context import Context
from framework.explore.layout import Role
from framework.explore.rest import spared
from framework.explore.states import CrashClass, CrashState, Disks
from framework.explore.views import view_of
from framework.verdict import DataChecked

_NUMBER: Final = re.compile(r"\d+")


@frozen
class DataContent:
    """What one distinct data partition came to.

    `digests` are the synced files' (None: gone); `plain`: a journal's replay was all it needed, and
    every sector could be read. Of what a start finds, if that was looked at: `needed`, what it has
    to do to the partition first, and `view`, the identity of the files then.
    """

    clean: bool
    output: str
    digests: Mapping[str, str | None]
    plain: bool
    needed: str = ""
    view: str = ""


class DataJudge:
    """Checks data partitions; remembers each distinct content."""

    name = "data"

    def __init__(
        self,
        context: Context,
        checked: dict[tuple[str, ...], DataContent] | None = None,
        *,
        views: bool = False,
    ) -> None:
        """`checked`: what is known already; `views`: also look at what a start finds."""
        self.context = context
        self._views = views
        self._glimpses = Glimpses(context.journal, context.layout.hulls(Role.DATA))
        self._regions = [r for r in context.layout.all_regions() if r.role is Role.DATA]
        every = len(context.timeline.steps)
        self.paths = sorted({f.path for f in context.timeline.synced(every)})
        self.checked: dict[tuple[str, ...], DataContent] = {} if checked is None else checked

    def key(self, crash_class: CrashClass) -> tuple[str, ...]:
        """The identity of a class's data partitions."""
        return tuple(crash_class.fact(region.name).content for region in self._regions)

    def check(self, crash_class: CrashClass) -> DataContent:
        """Check a class's data partitions, unless that content was checked before.

        Raises DiskError if e2fsck is missing or doesn't end.
        """
        key = self.key(crash_class)
        if key not in self.checked:
            self.checked[key] = self.look(crash_class.representative)
        return self.checked[key]

    def look(self, state: CrashState) -> DataContent:
        """Check a state's data partitions. Raises DiskError if e2fsck is missing or doesn't end."""
        clean, words, plain = True, "", True
        needed: list[str] = []
        views: list[str] = []
        digests: dict[str, str | None] = dict.fromkeys(self.paths)
        with Disks(self._glimpses.disks(state.decision, state.operation)) as disks:
            for region in self._regions:
                part = region.ranges[0]
                found = check_ext4(
                    disks[part.device],
                    part.offset,
                    part.length,
                    read=self.paths,
                    repair=self.context.repair,
                    everything=self._views,
                )
                clean = clean and found.clean
                plain = plain and found.clean and not found.mended and not found.unreadable
                words = words if found.clean else found.output.strip()
                for path, content in found.files.items():
                    if content is not None:
                        digests[path] = hashlib.sha256(content).hexdigest()
                if self._views:
                    needed.append(_needed(found))
                    tree = found.tree
                    views.append(
                        "" if tree is None else view_of(tree, self.context.views, found.lost)
                    )
        return DataContent(clean, words, digests, plain, "; ".join(needed), "; ".join(views))

    def seen(self, crash_class: CrashClass, phase: int) -> DataChecked | None:
        """The event of a class's check for a phase; None if its content was not checked."""
        found = self.checked.get(self.key(crash_class))
        if found is None or not self._regions:
            return None
        return self.said(found, phase)

    def holds(self, state: CrashState, phase: int) -> bool:
        """Whether a state's data partition is sound, with all that is synced in a phase."""
        said = self.said(self.look(state), phase)
        return said.clean and said.intact

    def holds_spared(self, state: CrashState, phase: int) -> bool:
        """Whether the medium destroyed data at rest in a state, and it would hold without that."""
        gentler = spared(self.context.journal, state)
        return gentler is not None and self.holds(gentler, phase)

    def said(self, found: DataContent, phase: int) -> DataChecked:
        """A check's event for a phase."""
        lost = [
            f"{file.path} {'changed' if found.digests.get(file.path) else 'is missing'}"
            for file in self.context.timeline.synced(phase)
            if found.digests.get(file.path) != file.sha256
        ]
        detail = "; ".join(lost)
        if not found.clean:
            last = found.output.splitlines()[-1] if found.output else "e2fsck gave up"
            detail = "; ".join((f"file system damaged: {last}", *lost))
        return DataChecked(found.clean, not lost, detail or "clean and intact")


def _needed(found: Ext4Check) -> str:
    """What a start has to do to a data partition, and how well that goes."""
    needed = "replayed" if found.replayed else "as it is"
    if found.mended or not found.clean:
        words = hashlib.sha256(_NUMBER.sub("#", found.output).encode()).hexdigest()
        needed = f"{'mended' if found.clean else 'lost'} ({words[:8]})"
    return f"{needed}, unreadable sectors" if found.unreadable else needed
