"""The index of a recording: every sector of every operation as numbers that add up.

A crash state differs from the power-on state in the sectors that survived, so everything that is
asked of a state is kept as a quantity to which each sector contributes on its own:

* *identity* of a region: the XOR over its sectors of mix(sector, content) ^ mix(sector, content in
  the base image), 64 bits: 0 for the base image. Replacing a sector's content is one XOR, and all
  prefixes of a sequence are one cumulative XOR.
* *distance* of a slot to each known image: how many sectors differ; the image stands there bit for
  bit if it is 0. An exact count, and again a cumulative sum.
* *identity of the whole disk*, to count distinct states: the XOR over all sectors ever touched.

Sectors that no operation touches are the same in every state and are not looked at, except once,
through SHA-256, to learn which image a slot holds. `content` hashes are XXH3-64 of a sector's 512
bytes; they are not adversarial, which is why `engine.confirm` reads members back.

Last-writer-wins: operations take effect in the order of application (completion); a row's *rank*
is its place in it. An event (one sector of one operation) counts only where its rank is above that
of what stands there.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from framework.disk import SECTOR, JournalReader, Kind, LazyDisk, PowerCycle, UnreadableSectorError
from framework.disk.digest import region_sha256
from framework.disk.lazy import EXTRA, UNREADABLE, ZERO, SectorMap, new_map, runs
from framework.explore.layout import Layout, LayoutMistakeError, Region, Role

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

ZERO_HASH: Final = np.uint64(xxhash.xxh3_64_intdigest(bytes(SECTOR)))
UNREADABLE_HASH: Final = np.uint64(0xD6E8FEB86659FD93)
_NEVER: Final = np.iinfo(np.int64).max
_CHUNK: Final = 1 << 20
_ZEROES: Final = bytes(_CHUNK)
MAX_IMAGES: Final = 60
"""Most images over all slots: a bit each in one 64-bit mask."""


def scramble(values: U64) -> U64:
    """A bijection of 64-bit numbers that leaves no structure (the finaliser of SplitMix64)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def symbol(text: str) -> np.uint64:
    """A 64-bit name for something that has no bytes of its own."""
    return np.uint64(xxhash.xxh3_64_intdigest(text.encode()))


def xor_all(values: U64) -> np.uint64:
    """The XOR of an array's elements."""
    return np.uint64(np.bitwise_xor.reduce(values)) if len(values) else np.uint64(0)


def hash_sectors(data: bytes | memoryview | mmap.mmap, start: int, count: int) -> list[int]:
    """The content hashes of `count` sectors from byte `start`."""
    digest = xxhash.xxh3_64_intdigest
    view = memoryview(data)
    try:
        stop = start + count * SECTOR
        return [digest(view[at : at + SECTOR]) for at in range(start, stop, SECTOR)]
    finally:
        view.release()


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A slot as the index sees it: which bits of the image mask are its images, smallest first."""

    region: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    first_bit: int

    @property
    def bits(self) -> int:
        """All its bits."""
        return ((1 << len(self.names)) - 1) << self.first_bit


class Universe:
    """The sectors that any operation of the recording touches, numbered from 0 over all devices.

    With whole aligned units of `unit` bytes, for models that destroy a unit at a time.
    """

    def __init__(self, journal: JournalReader, unit: int) -> None:
        self.unit_sectors = unit // SECTOR
        sizes = [d.size_bytes // SECTOR for d in journal.header.devices]
        self.device_base = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.device_sectors = np.array(sizes, dtype=np.int64)
        device, first, after = _touched(journal)
        first -= first % self.unit_sectors
        after += -after % self.unit_sectors
        after = np.minimum(after, self.device_sectors[device])
        starts, ends = _merge(first + self.device_base[device], after + self.device_base[device])
        self.starts, self.lengths = starts, ends - starts
        self.offsets = np.concatenate(([0], np.cumsum(self.lengths)))[:-1]
        self.size = int(self.lengths.sum())

    def index(self, device: I64, sector: I64) -> I64:
        """The numbers of touched sectors."""
        where = self.device_base[device] + sector
        at = np.searchsorted(self.starts, where, side="right") - 1
        return np.asarray(self.offsets[at] + where - self.starts[at])

    def spans(self) -> Iterator[tuple[int, int, int, int]]:
        """(device, first sector on it, count, first number), in order."""
        for start, length, offset in zip(
            self.starts.tolist(), self.lengths.tolist(), self.offsets.tolist(), strict=True
        ):
            at, left, number = start, length, offset
            while left:  # a span that was merged over a device's end
                device = int(np.searchsorted(self.device_base, at, side="right")) - 1
                base = int(self.device_base[device])
                count = min(left, base + int(self.device_sectors[device]) - at)
                yield device, at - base, count, number
                at, left, number = at + count, left - count, number + count

    @cached_property
    def sectors(self) -> I64:
        """The global sector of every number (devices in a row)."""
        steps = np.repeat(self.starts - self.offsets, self.lengths)
        return np.asarray(steps + np.arange(self.size, dtype=np.int64))

    @cached_property
    def salt(self) -> U64:
        """What sets a sector apart from every other, for `mix`."""
        return scramble(self.sectors.astype(np.uint64) * np.uint64(0xA24BAED4963EE407))


def _touched(journal: JournalReader) -> tuple[I64, I64, I64]:
    """Device, first sector and sector after of everything that ever changed."""
    operations = journal.operations
    rows = np.flatnonzero((operations.kind != Kind.FLUSH) & (operations.error == 0))
    parts = [
        np.stack([operations.device[rows], operations.offset[rows], operations.length[rows]], 1)
    ]
    more = [(r.device, r.offset, r.length) for r in journal.rots]
    for cut in journal.cuts:
        more += [(g.device, g.offset, g.length) for g in cut.decision.garbage]
        more += [(u.device, u.offset, u.length) for u in cut.decision.unreadable]
    parts.append(np.array(more, dtype=np.int64).reshape(-1, 3))
    whole = np.concatenate(parts)
    return whole[:, 0], whole[:, 1] // SECTOR, (whole[:, 1] + whole[:, 2]) // SECTOR


def _merge(first: I64, after: I64) -> tuple[I64, I64]:
    """The union of half-open intervals, as sorted disjoint ones."""
    if not len(first):
        return first, after
    order = np.argsort(first, kind="stable")
    first, after = first[order], np.maximum.accumulate(after[order])
    new = np.concatenate(([True], first[1:] > after[:-1]))
    return first[new], after[np.concatenate((np.flatnonzero(new)[1:] - 1, [len(first) - 1]))]


class Index:
    """The recording's index: the universe, the layout mapped onto it, the known images."""

    def __init__(self, journal: JournalReader, layout: Layout, *, unit: int = SECTOR) -> None:
        self.journal = journal
        self.layout = layout
        self.regions: tuple[Region, ...] = layout.all_regions()
        self.universe = Universe(journal, unit)
        size = self.universe.size
        self._check()
        self.region = np.full(size, -1, dtype=np.int16)
        """The region of every sector, -1 outside of all."""
        self.identity = np.zeros(size, dtype=bool)
        """Whether its content counts for its region's identity (not a slot's body)."""
        self._in_slot = np.full(size, -1, dtype=np.int64)
        for number, region in enumerate(self.regions):
            self._map_region(number, region)
        self.salts = [symbol(f"region {r.name}") for r in self.regions]
        self._payloads = self._hash_payloads()
        self.image_content: list[U64] = []
        """For every image bit, the content hash that each sector of the slot has in it."""
        self.image_applies: list[Bool] = []
        self.slots: tuple[Slot, ...] = ()
        self._cycles: dict[int, CycleIndex] = {}
        self._find_images()

    # ---------------------------------------------------------------- the layout

    def _check(self) -> None:
        sizes = {d.name: d.size_bytes for d in self.journal.header.devices}
        for region in self.regions:
            for part in region.ranges:
                if part.device not in sizes:
                    raise LayoutMistakeError(
                        f"region {region.name}: no device {part.device!r} in the recording; "
                        f"there are {', '.join(sizes)}"
                    )
                if part.end > sizes[part.device]:
                    raise LayoutMistakeError(
                        f"region {region.name}: it ends at {part.end}, device {part.device} at "
                        f"{sizes[part.device]}"
                    )

    def _map_region(self, number: int, region: Region) -> None:
        for part in region.ranges:
            at = self.within(part.device, part.offset, part.length)
            self.region[at] = number
            if region.role is not Role.SLOT:
                self.identity[at] = True
                continue
            device = self.journal.devices.index(part.device)
            base = int(self.universe.device_base[device]) + part.offset // SECTOR
            self._in_slot[at] = self.universe.sectors[at] - base
            for offset, length in region.probes:
                inside = self._in_slot[at]
                last = -(-(offset + length) // SECTOR)
                self.identity[at] |= (inside >= offset // SECTOR) & (inside < last)

    def within(self, device: str, offset: int, length: int) -> slice:
        """The numbers of the touched sectors in a byte range: they are consecutive."""
        base = int(self.universe.device_base[self.journal.devices.index(device)])
        a, b = base + offset // SECTOR, base + (offset + length) // SECTOR
        lo, hi = np.searchsorted(self.universe.sectors, [a, b])
        return slice(int(lo), int(hi))

    # ---------------------------------------------------------------- content

    def _hash_payloads(self) -> U64:
        """The content hashes of all writes' payloads, in the order of the operations."""
        operations = self.journal.operations
        writes = np.flatnonzero(operations.kind == Kind.WRITE)
        counts = np.zeros(len(operations), dtype=np.int64)
        counts[writes] = operations.length[writes] // SECTOR
        self._payload_at = np.concatenate(([0], np.cumsum(counts)))
        if not len(writes):
            return np.zeros(0, dtype=np.uint64)
        hashes: list[int] = []
        with (
            self.journal.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            for at, length in zip(
                operations.position[writes].tolist(),
                operations.length[writes].tolist(),
                strict=True,
            ):
                hashes += hash_sectors(data, at, length // SECTOR)
        return np.array(hashes, dtype=np.uint64)

    def payload(self, row: int) -> U64:
        """The content hashes of operation row `row` of the journal."""
        return self._payloads[self._payload_at[row] : self._payload_at[row + 1]]

    @cached_property
    def base_content(self) -> U64:
        """The content hash of every touched sector in the base images."""
        found = np.empty(self.universe.size, dtype=np.uint64)
        for device, first, count, number in self.universe.spans():
            name = self.journal.devices[device]
            header = self.journal.header.devices[device]
            sectors = new_map(header.size_bytes, header.base.size_bytes)
            path = self.journal.base_paths[name]
            with LazyDisk(name, sectors, path, self.journal.path) as disk:
                _hash_range(disk, first, count, found[number : number + count])
        return found

    def content_of(self, maps: Sequence[SectorMap]) -> U64:
        """The content hash of every touched sector in a state given by its sector maps.

        Where a sector lies says what it holds: nothing is read that was hashed before.
        """
        whole = np.concatenate([m[f : f + n] for m, f, n in self._pieces(maps)])
        found = self.base_content.copy()
        found[whole == ZERO] = ZERO_HASH
        found[whole == UNREADABLE] = UNREADABLE_HASH
        written = np.flatnonzero(whole > 0)
        position = whole[written] - 1
        writes = np.flatnonzero(self.journal.operations.kind == Kind.WRITE)
        starts = self.journal.operations.position[writes]
        which = np.searchsorted(starts, position, side="right") - 1
        inside = which >= 0
        inside[inside] &= (
            position[inside]
            < starts[which[inside]] + self.journal.operations.length[writes][which[inside]]
        )
        row = writes[which[inside]]
        offset = (position[inside] - starts[which[inside]]) // SECTOR
        found[written[inside]] = self._payloads[self._payload_at[row] + offset]
        self._read_rest(found, written[~inside], position[~inside])
        return found

    def _pieces(self, maps: Sequence[SectorMap]) -> Iterator[tuple[SectorMap, int, int]]:
        yield np.zeros(0, dtype=np.int64), 0, 0
        for device, first, count, _ in self.universe.spans():
            yield maps[device], first, count

    def _read_rest(self, found: U64, at: I64, position: I64) -> None:
        """Content that no write has: rot, what earlier cuts made up, what was there before."""
        if not len(at):
            return
        beneath = self.journal.made_up()
        with self.journal.path.open("rb") as file:
            for place, where in zip(at.tolist(), position.tolist(), strict=True):
                if where >= EXTRA:
                    data = beneath[where - EXTRA : where - EXTRA + SECTOR]
                else:
                    file.seek(where)
                    data = file.read(SECTOR)
                found[place] = hash_sectors(data, 0, 1)[0]

    def mix(self, at: I64 | slice, content: U64) -> U64:
        """What a content at a sector contributes to an identity."""
        return scramble(self.universe.salt[at] ^ content)

    def differs(self, at: I64 | slice, content: U64) -> U64:
        """Of contents at sectors: bit k says that it is not what image k has there."""
        differs = np.zeros(len(content), dtype=np.uint64)
        for bit, (image, applies) in enumerate(
            zip(self.image_content, self.image_applies, strict=True)
        ):
            wrong = applies[at] & (image[at] != content)
            differs |= wrong.astype(np.uint64) << np.uint64(bit)
        return differs

    # ---------------------------------------------------------------- images

    def _find_images(self) -> None:
        """Learn what each known image looks like in each slot, from the recording itself."""
        slots: list[Slot] = []
        bit = 0
        for number, region in enumerate(self.regions):
            if region.role is not Role.SLOT:
                continue
            found = self._images_of(number, region)
            slots.append(
                Slot(number, tuple(n for n, _, _ in found), tuple(s for _, s, _ in found), bit)
            )
            at = self.within(
                region.ranges[0].device, region.ranges[0].offset, region.ranges[0].length
            )
            for _, size, content in found:
                whole = np.zeros(self.universe.size, dtype=np.uint64)
                whole[at] = content
                applies = np.zeros(self.universe.size, dtype=bool)
                applies[at] = self._in_slot[at] < -(-size // SECTOR)
                self.image_content.append(whole)
                self.image_applies.append(applies)
            bit += len(found)
        if bit > MAX_IMAGES:
            raise LayoutMistakeError(f"{bit} images in all slots, at most {MAX_IMAGES} can be told")
        self.slots = tuple(slots)

    def _images_of(self, number: int, region: Region) -> list[tuple[str, int, U64]]:
        """(name, size, content of the slot's touched sectors) of the images found in a slot."""
        part = region.ranges[0]
        at = self.within(part.device, part.offset, part.length)
        if not region.images:
            first = self.content_of(self.journal.power_on(0))[at]
            cycle = self.journal.cycle_of(len(self.journal.operations))
            final_maps, _ = self.journal.maps_at(len(self.journal.operations))
            last = self.content_of(final_maps)[at] if cycle >= 0 else first
            found = [("initial", part.length, first)]
            if not np.array_equal(first, last):
                found.append(("final", part.length, last))
            return found
        known = {i.sha256: i for i in region.images}
        sizes = sorted({i.size_bytes for i in region.images if i.size_bytes <= part.length})
        images: dict[str, tuple[str, int, U64]] = {}
        seen: set[bytes] = set()
        for maps in self._candidates(number):
            content = self.content_of(maps)[at]
            if content.tobytes() in seen:
                continue
            seen.add(content.tobytes())
            name = part.device
            device = self.journal.devices.index(name)
            with self.journal.disk(name, maps[device]) as disk:
                for size in sizes:
                    try:
                        digest = region_sha256(disk, part.offset, size)
                    except UnreadableSectorError:
                        continue
                    if digest in known and digest not in images:
                        images[digest] = (known[digest].name, size, content)
        return sorted(images.values(), key=lambda image: image[1])

    def _candidates(self, number: int) -> Iterator[list[npt.NDArray[np.int64]]]:
        """The maps of moments at which a slot may hold a whole image: before it is relied upon.

        That is at power-on, at a power cycle's end, and before every write to a region that is no
        slot's, if the slot was written since the last look.
        """
        operations = self.journal.operations
        total = len(self.journal.cuts) + 1
        for cycle in range(total):
            maps = self.journal.power_on(cycle)
            yield maps
            first = self.journal.cuts[cycle - 1].operation + 1 if cycle else 1
            last = (
                self.journal.cuts[cycle].operation
                if cycle < len(self.journal.cuts)
                else len(operations)
            )
            if last < first:
                continue
            rows = np.arange(first - 1, last)
            rows = rows[(operations.kind[rows] != Kind.FLUSH) & (operations.error[rows] == 0)]
            if not len(rows):
                continue
            regions = self.region[
                self.universe.index(operations.device[rows], operations.offset[rows] // SECTOR)
            ]
            environment = [
                i for i, r in enumerate(self.regions) if r.role in (Role.ENVIRONMENT, Role.BOOT)
            ]
            mine = regions == number
            before = np.isin(regions, environment)
            written = np.cumsum(mine)
            looks = np.flatnonzero(before & (written > 0))
            _, at = np.unique(written[looks], return_index=True)
            for row in rows[looks[at]].tolist():
                yield self.journal.maps_at(row)[0]
            if written[-1]:
                yield self.journal.maps_at(last)[0]

    # ---------------------------------------------------------------- cycles

    @property
    def cycles(self) -> int:
        """How many power cycles the recording has."""
        return len(self.journal.cuts) + 1

    def cycle(self, number: int) -> CycleIndex:
        """The index of one power cycle (kept while the next is not asked for)."""
        if number not in self._cycles:
            self._cycles = {number: CycleIndex(self, number)}
        return self._cycles[number]

    def outside(self) -> tuple[int, int]:
        """How many operations, and how many sectors, lie outside of all regions."""
        operations = self.journal.operations
        rows = np.flatnonzero((operations.kind != Kind.FLUSH) & (operations.error == 0))
        if not len(rows):
            return 0, 0
        prefix = np.concatenate(([0], np.cumsum(self.region < 0)))
        first = self.universe.index(operations.device[rows], operations.offset[rows] // SECTOR)
        inside = prefix[first + operations.length[rows] // SECTOR] - prefix[first]
        return int((inside > 0).sum()), int(inside.sum())


def _hash_range(disk: LazyDisk, first: int, count: int, out: U64) -> None:
    """Hash sectors of a disk into `out`; unreadable ones get a hash of their own."""
    at = 0
    while at < count:
        size = min(_CHUNK // SECTOR, count - at)
        offset = (first + at) * SECTOR
        part = disk.map[first + at : first + at + size]
        if not bool((part == UNREADABLE).any()):
            data = disk.read(offset, size * SECTOR)
            if data == _ZEROES[: len(data)]:
                out[at : at + size] = ZERO_HASH
            else:
                out[at : at + size] = hash_sectors(data, 0, size)
        else:
            for start, length, value in runs(part):
                piece = out[at + start : at + start + length]
                if value == UNREADABLE:
                    piece[:] = UNREADABLE_HASH
                else:
                    data = disk.read(offset + start * SECTOR, length * SECTOR)
                    piece[:] = hash_sectors(data, 0, length)
        at += size


@dataclasses.dataclass(slots=True)
class Base:
    """A durable state, to which crash states are compared: contents, ranks and sums.

    Attributes:
        mix: of every touched sector, what it contributes to identities.
        rank: the rank of the operation that wrote it last, -1 for the power-on content.
        differs: bit k: it differs from image k (where that image has it).
        identity: a region's identity each.
        distance: an image's count of differing sectors each.
        total: identity of all touched sectors.
    """

    mix: U64
    rank: I32
    differs: U64
    identity: U64
    distance: I64
    total: np.uint64

    def copy(self) -> Base:
        """An independent copy."""
        return Base(
            self.mix.copy(),
            self.rank.copy(),
            self.differs.copy(),
            self.identity.copy(),
            self.distance.copy(),
            self.total,
        )


class CycleIndex:
    """One power cycle: its operations as rows in the order of application, their events.

    A *row* is an operation that changes a device (or rot of the medium); its number in these
    arrays is its rank. An *event* is one sector of a row.
    """

    def __init__(self, index: Index, number: int) -> None:
        self.index = index
        self.number = number
        journal = index.journal
        last = (
            journal.cuts[number].operation
            if number < len(journal.cuts)
            else len(journal.operations)
        )
        first = journal.cuts[number - 1].operation + 1 if number else 1
        self.first, self.last = first, last
        sizes = tuple(d.size_bytes for d in journal.header.devices)
        self.power_cycle = PowerCycle(journal.operations.part(first, last), journal.devices, sizes)
        self.end_sequence = (
            journal.cuts[number].sequence if number < len(journal.cuts) else self._last_sequence()
        )
        self._rows()
        self._events()
        self.power_on = self._power_on()

    def _last_sequence(self) -> int:
        journal = self.index.journal
        operations = journal.operations
        known = [
            int(operations.arrived.max(initial=0)),
            int(operations.completed.max(initial=0)),
            max((m.sequence for m in journal.marks), default=0),
        ]
        return max(known) + 1

    def _rows(self) -> None:
        operations = self.power_cycle.operations
        changing = np.flatnonzero(self.power_cycle.changing())
        rots = [r for r in self.index.journal.rots if r.cycle == self.number]
        none = np.zeros(len(rots), dtype=np.int64)

        def column(values: I64, of_rots: list[int]) -> I64:
            return np.concatenate((values[changing], np.array(of_rots, dtype=np.int64)))

        completed = column(operations.completed, [r.sequence for r in rots])
        key = np.where(completed < 0, _NEVER, completed)
        arrived = column(operations.arrived, [r.sequence for r in rots])
        order = np.lexsort((arrived, key))
        self.rot = np.concatenate((np.zeros(len(changing), bool), none == 0))[order]
        self.op = np.concatenate(
            (changing + operations.first, np.array([r.after_operation for r in rots], np.int64))
        )[order].astype(np.int64)
        """A row's operation number (of rot: the operation that it follows)."""
        self.kind = column(operations.kind, [int(Kind.WRITE)] * len(rots))[order]
        self.device = column(operations.device, [r.device for r in rots])[order]
        self.offset = column(operations.offset, [r.offset for r in rots])[order]
        self.length = column(operations.length, [r.length for r in rots])[order]
        self.completed = completed[order]
        self.arrived = arrived[order]
        self.fua = np.concatenate((operations.fua[changing], np.zeros(len(rots), bool)))[order]
        self._rots = {int(r.sequence): r for r in rots}

    def _events(self) -> None:
        index = self.index
        counts = self.length // SECTOR
        self.first_event = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        size = int(self.first_event[-1])
        self.row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        within = np.arange(size, dtype=np.int64) - np.repeat(self.first_event[:-1], counts)
        self.within = within.astype(np.int32)
        start = (
            index.universe.index(self.device, self.offset // SECTOR)
            if len(counts)
            else np.zeros(0, np.int64)
        )
        self.sector = np.repeat(start, counts) + within
        content = np.full(size, ZERO_HASH, dtype=np.uint64)
        for row in np.flatnonzero(self.kind == Kind.WRITE).tolist():
            a, b = int(self.first_event[row]), int(self.first_event[row + 1])
            if self.rot[row]:
                content[a:b] = self._rot_content(int(self.arrived[row]), b - a)
            else:
                content[a:b] = index.payload(int(self.op[row]) - 1)
        self.mix = index.mix(self.sector, content)
        self.differs = self.index.differs(self.sector, content)
        self.region = index.region[self.sector]
        self.identity = index.identity[self.sector]

    def _rot_content(self, sequence: int, count: int) -> list[int]:
        rot = self._rots[sequence]
        with self.index.journal.path.open("rb") as file:
            file.seek(rot.position)
            return hash_sectors(file.read(count * SECTOR), 0, count)

    def _power_on(self) -> Base:
        index = self.index
        content = index.content_of(index.journal.power_on(self.number))
        everything = slice(0, index.universe.size)
        mix = index.mix(everything, content)
        differs = self.index.differs(everything, content)
        since_base = mix ^ index.mix(everything, index.base_content)
        identity = np.array(
            [
                xor_all(since_base[(index.region == r) & index.identity])
                for r in range(len(index.regions))
            ],
            dtype=np.uint64,
        )
        distance = np.array(
            [
                int(((differs >> np.uint64(bit)) & np.uint64(1)).sum())
                for bit in range(len(index.image_content))
            ],
            dtype=np.int64,
        )
        return Base(
            mix,
            np.full(len(mix), -1, dtype=np.int32),
            differs,
            identity,
            distance,
            xor_all(since_base),
        )

    def events_of(self, rows: I64) -> I64:
        """The events of rows, in the order of the rows."""
        starts = self.first_event[rows]
        counts = self.first_event[rows + 1] - starts
        total = int(counts.sum())
        if not total:
            return np.zeros(0, dtype=np.int64)
        ends = np.cumsum(counts)
        steps = np.repeat(starts - (ends - counts), counts)
        return np.asarray(np.arange(total, dtype=np.int64) + steps)

    def advance(self, base: Base, rows: I64) -> None:
        """Let rows (in the order of application) take effect on a durable state."""
        events = self.events_of(rows)
        if not len(events):
            return
        events = events[self.row[events] > base.rank[self.sector[events]]]
        sector = self.sector[events]
        order = np.argsort(sector, kind="stable")
        last = np.concatenate((sector[order][1:] != sector[order][:-1], [True]))
        events = events[order][last] if len(events) else events
        if not len(events):
            return
        at = self.sector[events]
        delta = base.mix[at] ^ self.mix[events]
        base.total ^= xor_all(delta)
        region = self.region[events]
        for number in (np.flatnonzero(np.bincount(region + 1)) - 1).tolist():
            if number >= 0:
                mine = (region == number) & self.identity[events]
                base.identity[number] ^= xor_all(delta[mine])
        for bit in range(len(base.distance)):
            shift = np.uint64(bit)
            new = (self.differs[events] >> shift) & np.uint64(1)
            old = (base.differs[at] >> shift) & np.uint64(1)
            base.distance[bit] += int(new.sum()) - int(old.sum())
        base.mix[at] = self.mix[events]
        base.differs[at] = self.differs[events]
        base.rank[at] = self.row[events]
