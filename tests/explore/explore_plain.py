"""One crash state, made and read as bytes: its class, without the engine.

A reference for the tests. Content is identified by hashing what is read.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import xxhash

from framework.disk import (
    SECTOR,
    DiskError,
    JournalReader,
    LazyDisk,
    UnreadableSectorError,
)
from framework.explore.layout import Layout, Region, Role
from framework.explore.states import (
    CrashClass,
    CrashState,
    Disks,
    RegionFact,
    Span,
)

MODEL = "subset"
_CHUNK = 4 << 20


def class_of(disks: Disks, layout: Layout, state: CrashState, journal: JournalReader) -> CrashClass:
    """The class of one state that is made already, with no other member."""
    return _class(journal, _Eyes(layout).facts(disks), [(state, state.operation)])


def _class(
    journal: JournalReader,
    facts: tuple[RegionFact, ...],
    members: list[tuple[CrashState, int]],
) -> CrashClass:
    arrived = journal.operations.arrived
    operations = sorted({operation for _, operation in members})
    spans = []
    for _, group in itertools.groupby(enumerate(operations), key=lambda pair: pair[1] - pair[0]):
        run = [operation for _, operation in group]
        first, last = run[0], run[-1]
        at = {operation: state for state, operation in reversed(members)}
        spans.append(
            Span(
                int(arrived[first - 1]) if first else 0,
                int(arrived[last]) if last < len(arrived) else np.iinfo(np.int64).max,
                first,
                last,
                at[first],
                at[last],
            )
        )
    digest = hashlib.sha256("".join(f.region + f.content for f in facts).encode()).hexdigest()
    state = members[-1][0]
    others = tuple(s for s, _ in members[:-1][:2])
    return CrashClass(
        digest[:16], facts, len(members), state, others, True, tuple(spans), (MODEL,), digest
    )


class _Eyes:
    """Reads the facts of states; remembers what it has read."""

    def __init__(self, layout: Layout) -> None:
        self._regions = layout.all_regions()
        self._slots: dict[bytes, str | None] = {}
        self._known: dict[bytes, tuple[RegionFact, ...]] = {}

    def identity(self, disks: Disks) -> bytes:
        """Where everything in the regions lies: the same identity is the same content."""
        digest = xxhash.xxh3_128()
        for region in self._regions:
            digest.update(_map(disks, region))
        return digest.digest()

    def facts(self, disks: Disks) -> tuple[RegionFact, ...]:
        """The facts of one state."""
        key = self.identity(disks)
        if key not in self._known:
            self._known[key] = tuple(self._fact(disks, region) for region in self._regions)
        return self._known[key]

    def _fact(self, disks: Disks, region: Region) -> RegionFact:
        if region.role is not Role.SLOT:
            content, damaged = _content(disks, region, None)
            return RegionFact(region.name, region.role, None, content, True, damaged)
        content, damaged = _content(disks, region, region.probes)
        part = region.ranges[0]
        loadable = True
        if region.magic is not None:
            at, magic = region.magic
            try:
                loadable = disks[part.device].read(part.offset + at, len(magic)) == magic
            except UnreadableSectorError:
                loadable = False
        image = None
        if loadable:
            key = xxhash.xxh3_128_digest(_map(disks, region))
            if key not in self._slots:
                self._slots[key] = _image(disks[part.device], region)
            image = self._slots[key]
        return RegionFact(region.name, region.role, image, content, loadable, damaged)


def _map(disks: Disks, region: Region) -> bytes:
    return b"".join(
        disks[part.device].map[part.offset // SECTOR : part.end // SECTOR].tobytes()
        for part in region.ranges
    )


def _content(
    disks: Disks, region: Region, probes: tuple[tuple[int, int], ...] | None
) -> tuple[str, bool]:
    digest = xxhash.xxh3_64()
    damaged = False
    for part in region.ranges:
        disk = disks[part.device]
        pieces = [(0, part.length)] if probes is None else probes
        for offset, length in pieces:
            for at in range(part.offset + offset, part.offset + offset + length, _CHUNK):
                size = min(_CHUNK, part.offset + offset + length - at)
                try:
                    digest.update(disk.read(at, size))
                except UnreadableSectorError:
                    digest.update(repr(disk.unreadable(at, size)).encode())
                    damaged = True
    return digest.hexdigest(), damaged


def _image(disk: LazyDisk, region: Region) -> str | None:
    part = region.ranges[0]
    for image in region.images:
        try:
            if disk.sha256(part.offset, image.size_bytes) == image.sha256:
                return image.name
        except DiskError:
            continue
    return None
