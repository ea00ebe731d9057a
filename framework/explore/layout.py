"""What a boot can depend on: a disk's regions, and adapters that read its boot environment.

A `Layout` names the byte ranges that decide what a device does at its next power-on: partition
table, every copy of the boot environment, slots, boot files, data partition. The engine groups
crash states by the content of these regions and by nothing else, so a layout is a claim: *what
lies outside of all regions can't change a boot*. The engine counts the writes that fell outside
(`Exploration.outside`), so that a wrong claim is seen.

A boot environment is a *store* (where its copies lie and which of them counts: U-Boot's raw
copies, GRUB's environment blocks in files) and a *vocabulary* (what its variables mean: Mender's,
RAUC's). Both are small frozen values; `Layout.boot` reduces them to `framework.verdict`'s
`BootEnvironment`, on which `framework.verdict.next_boot` decides. Nothing here knows an updater.

Sources: the boot contracts are those of Mender's documentation ("Bootloader support":
`mender_boot_part`, `upgrade_available`, `bootcount`) and of RAUC's ("Bootloader interaction":
U-Boot's `BOOT_ORDER` and `BOOT_<bootname>_LEFT`, GRUB's `ORDER`, `<bootname>_OK` and
`<bootname>_TRY`); the formats are `framework.disk`'s.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Final, Protocol

from framework.disk import SECTOR, DiskError, LazyDisk
from framework.disk.grubenv import read_grub_environments
from framework.disk.ubootenv import read_environment
from framework.verdict import BootEnvironment

SUPERBLOCK: Final = (1024, 1024)
"""Offset and length of an ext4 superblock in its partition."""

EXT4_MAGIC: Final = (1024 + 56, b"\x53\xef")
"""s_magic; the kernel's Documentation/filesystems/ext4/super.rst."""


class LayoutMistakeError(DiskError):
    """A layout contradicts itself or the recording; the message names the region."""


class Role(enum.Enum):
    """What a region is to a boot, which decides how its content is classed.

    Of a SLOT it is asked which known image it holds bit for bit, if any, and what its probes
    hold; of every other region each distinct content is a class of its own.
    """

    TABLE = "partition table"
    ENVIRONMENT = "boot environment"
    SLOT = "slot"
    BOOT = "boot files"
    DATA = "data partition"


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """A byte range of one device, in whole sectors of 512 bytes."""

    device: str
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The offset after it."""
        return self.offset + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class KnownImage:
    """An image that may stand at a slot's beginning; `sha256` (hexadecimal) is of all its bytes.

    The engine needs no file of it: it looks for the content in the recording.
    """

    name: str
    sha256: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A region: a name, its role, where it lies (usually one range; a GPT has two).

    Attributes:
        name: unique in the layout.
        role: see `Role`.
        ranges: its bytes; a slot has exactly one range.
        images: for a slot, the images that may stand in it. Without any, the content at the
            recording's first power-on is called `initial`, that at its end `final`.
        probes: for a slot, (offset, length) in it of what a bootloader looks at before it trusts
            the rest: their content counts in full. Rounded out to sectors.
        magic: for a slot, (offset, bytes) without which no bootloader loads anything from it.
    """

    name: str
    role: Role
    ranges: tuple[Range, ...]
    images: tuple[KnownImage, ...] = ()
    probes: tuple[tuple[int, int], ...] = (SUPERBLOCK,)
    magic: tuple[int, bytes] | None = EXT4_MAGIC

    def __post_init__(self) -> None:
        if not self.ranges or (self.role is Role.SLOT and len(self.ranges) != 1):
            raise LayoutMistakeError(f"region {self.name}: {len(self.ranges)} ranges")
        for part in self.ranges:
            if part.offset < 0 or part.length <= 0 or (part.offset | part.length) % SECTOR:
                raise LayoutMistakeError(
                    f"region {self.name}: {part.length} bytes at {part.offset} of {part.device} "
                    f"are not whole sectors of {SECTOR}"
                )


@dataclasses.dataclass(frozen=True, slots=True)
class EnvironmentReading:
    """A boot environment as found: which copies are valid, and the variables that count.

    Attributes:
        valid: for every copy, whether a bootloader takes it.
        current: index of the copy that counts, None if no copy is valid.
        variables: of that copy; empty without one.
        problems: for people, one line a copy that is not valid, or not whole.
    """

    valid: tuple[bool, ...]
    current: int | None
    variables: Mapping[str, str]
    problems: tuple[str, ...] = ()


class Store(Protocol):
    """Where a boot environment's copies lie and which of them counts."""

    def regions(self) -> tuple[Region, ...]:
        """The regions that hold it, with role ENVIRONMENT."""

    def read(self, disks: Mapping[str, LazyDisk]) -> EnvironmentReading:
        """Read it as a bootloader does. `disks`: by device name. Never raises for content."""


class Vocabulary(Protocol):
    """What a boot environment's variables mean."""

    def reduce(self, reading: EnvironmentReading) -> BootEnvironment:
        """To what `framework.verdict.next_boot` decides on."""


# ---------------------------------------------------------------- stores


@dataclasses.dataclass(frozen=True, slots=True)
class UbootStore:
    """U-Boot's environment in raw sectors: one range a copy, in the bootloader's order.

    With two copies of the redundant format (a flags byte) unless `redundant` says otherwise; one
    copy is the plain format.
    """

    copies: tuple[Range, ...]
    redundant: bool | None = None

    def regions(self) -> tuple[Region, ...]:
        """One region a copy: `env 1`, `env 2`."""
        return tuple(
            Region(f"env {number}", Role.ENVIRONMENT, (copy,))
            for number, copy in enumerate(self.copies, 1)
        )

    def read(self, disks: Mapping[str, LazyDisk]) -> EnvironmentReading:
        """As U-Boot: of the valid copies the newer one."""
        disk = disks[self.copies[0].device]
        found = read_environment(
            disk, [(c.offset, c.length) for c in self.copies], redundant=self.redundant
        )
        return EnvironmentReading(
            tuple(c.valid for c in found.copies),
            found.current,
            found.variables,
            tuple(f"env {i}: {c.problem}" for i, c in enumerate(found.copies, 1) if c.problem),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class GrubStore:
    """GRUB's environment blocks: a file at each of `paths`, in the file system of its partition.

    The file systems are FAT or ext, `partitions` one for each path or the same for all. One path
    is the single grubenv; of two the first that is valid and settled counts (a `lock` beside it
    says so, as grub-mender-grubenv keeps it). A partition is a region as a whole: a torn directory
    loses a file as a torn file does.
    """

    partitions: tuple[Range, ...]
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.paths or len(self.partitions) not in (1, len(self.paths)):
            raise LayoutMistakeError(
                f"{len(self.paths)} environment blocks in {len(self.partitions)} partitions"
            )

    def regions(self) -> tuple[Region, ...]:
        """A region for each partition: `grubenv`, or `grubenv 1` and `grubenv 2`."""
        if len(self.partitions) == 1:
            return (Region("grubenv", Role.ENVIRONMENT, self.partitions),)
        return tuple(
            Region(f"grubenv {number}", Role.ENVIRONMENT, (part,))
            for number, part in enumerate(self.partitions, 1)
        )

    def read(self, disks: Mapping[str, LazyDisk]) -> EnvironmentReading:
        """As GRUB reads the files, without replaying a file system's journal."""
        parts = self.partitions * (len(self.paths) if len(self.partitions) == 1 else 1)
        found = read_grub_environments(
            [
                (disks[part.device], part.offset, part.length, path)
                for part, path in zip(parts, self.paths, strict=True)
            ]
        )
        editing = [lock.variables.get("editing") != "0" for lock in found.locks]
        problems = [
            copy.problem or ("being edited" if e else lock.problem and f"lock: {lock.problem}")
            for copy, lock, e in zip(found.copies, found.locks, editing, strict=True)
        ]
        return EnvironmentReading(
            tuple(c.valid and not e for c, e in zip(found.copies, editing, strict=True)),
            found.current,
            found.variables,
            tuple(f"{n}, {self.paths[n - 1]}: {p}" for n, p in enumerate(problems, 1) if p),
        )


# ---------------------------------------------------------------- vocabularies


@dataclasses.dataclass(frozen=True, slots=True)
class MenderVariables:
    """Mender's: `slots` maps the partition numbers that `mender_boot_part` names to slot names.

    Slot names are `a` and `b`, as `framework.verdict` has them.
    """

    slots: Mapping[str, str]
    bootlimit: int = 1

    def reduce(self, reading: EnvironmentReading) -> BootEnvironment:
        """`mender_boot_part`, `upgrade_available`, `bootcount`."""
        variables = reading.variables
        return BootEnvironment(
            valid_copies=sum(reading.valid),
            boot_slot=self.slots.get(variables.get("mender_boot_part", "")),
            upgrade_available=variables.get("upgrade_available") == "1",
            bootcount=_count(variables.get("bootcount", "")),
            bootlimit=self.bootlimit,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class RaucUbootVariables:
    """RAUC's in a U-Boot environment: `slots` maps bootnames (`A`, `B`) to slot names.

    The first of `BOOT_ORDER` with attempts left is booted. RAUC's variables don't tell a slot
    that was marked good from one just installed, so `upgrade_available` here means only that
    another slot is there to fall back to. With no attempts left anywhere the script resets them
    and begins again with the order's first.
    """

    slots: Mapping[str, str]
    attempts: int = 3

    def reduce(self, reading: EnvironmentReading) -> BootEnvironment:
        """`BOOT_ORDER` and `BOOT_<bootname>_LEFT`; a missing counter counts as `attempts`."""
        variables = reading.variables
        order = variables.get("BOOT_ORDER", " ".join(self.slots)).split()
        left = {
            n: _count(variables.get(f"BOOT_{n}_LEFT", str(self.attempts)), base=16)
            for n in order
            if n in self.slots
        }
        ready = [n for n in left if left[n] > 0] or list(left)
        return BootEnvironment(
            valid_copies=sum(reading.valid),
            boot_slot=self.slots[ready[0]] if ready else None,
            upgrade_available=len(ready) > 1,
            bootcount=0,
            bootlimit=max(1, left[ready[0]]) if ready else 1,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class RaucGrubVariables:
    """RAUC's in GRUB's environment: the first of `ORDER` with `_OK=1` and `_TRY=0` is booted.

    `<bootname>_TRY` is set by the script before the start and cleared when the slot is marked
    good; what was said of `RaucUbootVariables` holds for `upgrade_available`.
    """

    slots: Mapping[str, str]

    def reduce(self, reading: EnvironmentReading) -> BootEnvironment:
        """`ORDER`, `<bootname>_OK`, `<bootname>_TRY`."""
        variables = reading.variables
        order = [n for n in variables.get("ORDER", "").split() if n in self.slots]
        ready = [
            n
            for n in order
            if variables.get(f"{n}_OK") == "1" and variables.get(f"{n}_TRY", "0") == "0"
        ]
        return BootEnvironment(
            valid_copies=sum(reading.valid),
            boot_slot=self.slots[ready[0]] if ready else None,
            upgrade_available=len(ready) > 1,
            bootcount=0,
            bootlimit=1,
        )


# ---------------------------------------------------------------- the layout


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """All regions of a machine's disks that a boot can depend on, and how to read them.

    Attributes:
        regions: everything but the environment, in the order of a report's columns.
        store: where the environment lies; its regions are added (`all_regions`).
        vocabulary: what its variables mean.
    """

    regions: tuple[Region, ...]
    store: Store
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        seen: list[tuple[Range, str]] = []
        names: set[str] = set()
        for region in self.all_regions():
            if region.name in names:
                raise LayoutMistakeError(f"two regions are called {region.name}")
            names.add(region.name)
            for part in region.ranges:
                for other, owner in seen:
                    if (
                        part.device == other.device
                        and part.offset < other.end
                        and other.offset < part.end
                    ):
                        raise LayoutMistakeError(f"regions {owner} and {region.name} overlap")
                seen.append((part, region.name))

    def all_regions(self) -> tuple[Region, ...]:
        """The environment's regions, then the others."""
        return (*self.store.regions(), *self.regions)

    def region(self, name: str) -> Region:
        """The region of that name; raises KeyError."""
        for region in self.all_regions():
            if region.name == name:
                return region
        raise KeyError(f"no region {name!r}; there are {[r.name for r in self.all_regions()]}")

    def hulls(self, role: Role) -> dict[str, tuple[int, int]]:
        """Of each device with regions of a role, (offset, length) of the part that has them all."""
        found: dict[str, tuple[int, int]] = {}
        for region in self.all_regions():
            if region.role is role:
                for part in region.ranges:
                    begin, length = found.get(part.device, (part.offset, part.length))
                    first, end = min(begin, part.offset), max(begin + length, part.end)
                    found[part.device] = (first, end - first)
        return found

    def environment(self, disks: Mapping[str, LazyDisk]) -> EnvironmentReading:
        """The boot environment of a state. `disks`: all its devices by name."""
        return self.store.read(disks)

    def boot(self, disks: Mapping[str, LazyDisk]) -> BootEnvironment:
        """The same, reduced to what `framework.verdict.next_boot` decides on."""
        return self.vocabulary.reduce(self.store.read(disks))


def gpt_region(device: str, size_bytes: int, *, entries_bytes: int = 16384) -> Region:
    """A GPT's region: protective MBR, header and entries at both ends of the device."""
    head = 2 * SECTOR + entries_bytes
    tail = SECTOR + entries_bytes
    return Region(
        "gpt" if device == "vda" else f"gpt {device}",
        Role.TABLE,
        (Range(device, 0, head), Range(device, size_bytes - tail, tail)),
    )


def _count(text: str, base: int = 10) -> int:
    """A counter; what is no number counts as 0, as in both bootloaders' arithmetic."""
    try:
        return int(text or "0", base)
    except ValueError:
        return 0
