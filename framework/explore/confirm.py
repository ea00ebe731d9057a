"""Reads members of classes back and compares them with what the engine said of them.

The engine never looks at a crash state as bytes: it adds up 64-bit hashes. Here the representative
of a class is made real through another way (`JournalReader.apply`, `LazyDisk`), its regions are
read, hashed again and compared, and their SHA-256 is taken. A slot that is said to hold an image is
compared with that image's SHA-256, once for each distinct arrangement of its sectors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from framework.disk import SECTOR, CacheModel, DiskError, JournalReader, UnreadableSectorError
from framework.disk.digest import region_sha256
from framework.disk.lazy import UNREADABLE
from framework.explore.engine import largest_unit
from framework.explore.index import (
    U64,
    UNREADABLE_HASH,
    Index,
    hash_sectors,
    symbol,
    xor_all,
)
from framework.explore.layout import Layout, Role
from framework.explore.states import CrashClass, CrashState, Disks, Exploration


class DisagreementError(DiskError):
    """The engine and the bytes disagree: an error of the engine's, never of the device's."""


def confirm(
    journal: JournalReader,
    layout: Layout,
    models: Sequence[CacheModel],
    found: Exploration,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """The exploration with every class's `sha256` filled in; `models`, `seed` as explored with.

    Raises DisagreementError at the first class whose representative is not what was said.
    """
    reader = _Confirm(journal, layout, models, seed)
    classes = []
    for number, one in enumerate(found.classes, 1):
        classes.append(dataclasses.replace(one, sha256=reader.check(one)))
        if progress is not None:
            progress(number, len(found.classes))
    return dataclasses.replace(found, classes=tuple(classes))


class _Confirm:
    def __init__(
        self, journal: JournalReader, layout: Layout, models: Sequence[CacheModel], seed: int
    ) -> None:
        self.journal = journal
        self.index = Index(journal, layout, unit=largest_unit(models))
        self.units = {m.name: largest_unit([m]) for m in models}
        self.seed = seed
        everything = slice(0, self.index.universe.size)
        self.base = self.index.mix(everything, self.index.base_content)
        self._images: dict[tuple[str, bytes], str] = {}

    def check(self, one: CrashClass) -> str:
        """Compare a class's representative; the SHA-256 of its regions' touched sectors."""
        with one.representative.disks(self.journal) as disks:
            content, digest = self._read(one.representative, disks)
            for number, fact in enumerate(one.facts):
                mine = np.flatnonzero((self.index.region == number) & self.index.identity)
                identity = int(xor_all(self.index.mix(mine, content[mine]) ^ self.base[mine]))
                if f"{identity:016x}" != fact.content:
                    raise DisagreementError(
                        f"{one}: region {fact.region} reads as {identity:016x} "
                        f"({one.representative}); an error of the explorer"
                    )
                if fact.role is Role.SLOT and fact.image is not None:
                    self._check_image(one, number, fact.image, disks)
        return digest

    def _read(self, state: CrashState, disks: Disks) -> tuple[U64, str]:
        """The content hash of every identity sector, and the SHA-256 of them all in order."""
        content = np.zeros(self.index.universe.size, dtype=np.uint64)
        sha256 = hashlib.sha256()
        for device, first, count, number in self.index.universe.spans():
            disk = disks[self.journal.devices[device]]
            wanted = np.flatnonzero(self.index.identity[number : number + count])
            for place in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
                if not len(place):
                    continue
                start, size = first + int(place[0]), len(place)
                out = content[number + int(place[0]) : number + int(place[0]) + size]
                if bool((disk.map[start : start + size] == UNREADABLE).any()):
                    for at in range(size):
                        out[at], data = self._one(disks, device, start + at)
                        sha256.update(data)
                    continue
                data = disk.read(start * SECTOR, size * SECTOR)
                sha256.update(data)
                out[:] = hash_sectors(data, 0, size)
        self._symbols(state, content)
        return content, sha256.hexdigest()

    def _one(self, disks: Disks, device: int, sector: int) -> tuple[np.uint64, bytes]:
        try:
            data = disks[self.journal.devices[device]].read(sector * SECTOR, SECTOR)
        except UnreadableSectorError:
            return UNREADABLE_HASH, b"unreadable"
        return np.uint64(hash_sectors(data, 0, 1)[0]), data

    def _symbols(self, state: CrashState, content: U64) -> None:
        """Garbage has a name in the engine, not a content."""
        if state.model == "emmc":
            return
        name = (
            f"junk {self.seed}"
            if state.model == "discard"
            else f"garbage {self.seed} {self.units.get(state.model, SECTOR)}"
        )
        for garbage in state.decision.garbage:
            at = self.index.within(
                self.journal.devices[garbage.device], garbage.offset, garbage.length
            )
            content[at] = symbol(name)

    def _check_image(self, one: CrashClass, number: int, image: str, disks: Disks) -> None:
        region = self.index.regions[number]
        known = {i.name: i for i in region.images}
        if image not in known:
            return  # `initial` or `final`: named by the recording itself
        part = region.ranges[0]
        disk = disks[part.device]
        first = part.offset // SECTOR
        arrangement = xxhash.xxh3_128_digest(
            disk.map[first : first + part.length // SECTOR].tobytes()
        )
        key = (f"{region.name} {image}", arrangement)
        if key not in self._images:
            self._images[key] = region_sha256(disk, part.offset, known[image].size_bytes)
        if self._images[key] != known[image].sha256:
            raise DisagreementError(
                f"{one}: {region.name} is not {image} by SHA-256 ({one.representative}); "
                "an error of the explorer"
            )
