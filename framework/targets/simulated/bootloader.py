"""A boot loader that keeps the boot contract, on the bytes of a redundant U-Boot environment.

It does what the script in `images/boot/uboot-virtio.env` does: reads both copies, takes the newer
valid one, counts a trial's attempt into the older copy and reads it back, leaves a trial whose
attempts are used up, and tries the other slot when one can't be loaded. Like U-Boot, it never
flushes the drive. `tests/targets/test_simulated_bootloader.py` compares it with real U-Boot.

A rule can be broken on purpose (`Bootloader.quirks`), so that a search can show that it is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from framework.disk.ubootenv import UbootEnvironment, build_copy, parse_environment
from framework.targets.simulated.drive import Disk, DriveError
from updater.device.errors import BootEnvError

KEYS: Final = (
    "mender_boot_part",
    "mender_boot_part_hex",
    "upgrade_available",
    "bootcount",
    "mender_check_saveenv_canary",
    "mender_saveenv_canary",
)
PARTS: Final = {"a": "2", "b": "3"}
SLOTS: Final = {"2": "a", "3": "b"}
BOOTLIMIT: Final = 1


class Choice(NamedTuple):
    """What a start of the boot loader came to.

    `slot`: whose kernel is started; None if neither loads. `trial`: it was told that the slot is on
    trial. `environment`: which copy counted (1, 2), 0 for none.
    """

    slot: str | None
    trial: bool
    environment: int


class Seen(Protocol):
    """The copies as they are on the drive."""

    @property
    def valid_copies(self) -> int:
        """How many are valid."""
        ...

    @property
    def variables(self) -> Mapping[str, str]:
        """What the one that counts says."""
        ...


class Copies(Protocol):
    """The boot variables of one device: the boot loader's, init's, and the client's way to them."""

    def start(self, loads: Callable[[str], bool]) -> Choice:
        """Run the boot loader once; `loads` says whether a slot's kernel can be loaded."""
        ...

    def restore(self, use: int, slot: str) -> list[str]:
        """Do what init does before the client runs; return what went wrong.

        `use` is the copy that the boot loader used, 0 for none; `slot` the one that runs.
        """
        ...

    def read(self) -> dict[str, str]:
        """The variables (the client's port)."""
        ...

    def write(self, values: Mapping[str, str]) -> None:
        """Set variables (the client's port)."""
        ...

    def seen(self) -> Seen:
        """The copies, read from outside the device."""
        ...


class EnvironmentArea(NamedTuple):
    """Where the copies are: two offsets and one size, in bytes."""

    first: int
    second: int
    size: int

    @property
    def offsets(self) -> tuple[int, int]:
        """Both offsets."""
        return self.first, self.second


def read_copies(drive: Disk, area: EnvironmentArea) -> UbootEnvironment:
    """Read and parse both copies; an unreadable one is an invalid one."""
    return parse_environment(_contents(drive, area), redundant=True)


def _contents(drive: Disk, area: EnvironmentArea) -> list[bytes | None]:
    contents: list[bytes | None] = []
    for offset in area.offsets:
        try:
            contents.append(drive.read(offset, area.size))
        except DriveError:
            contents.append(None)
    return contents


class UbootCopies:
    """U-Boot's redundant environment, and libubootenv's way to it."""

    def __init__(
        self, drive: Disk, area: EnvironmentArea, quirks: frozenset[str] = frozenset()
    ) -> None:
        self._drive = drive
        self._area = area
        self._quirks = quirks
        # The same bytes are looked at again and again, by the device and by its witnesses.
        self._last: list[bytes | None] = []
        self._parsed = UbootEnvironment((), None)

    def start(self, loads: Callable[[str], bool]) -> Choice:
        """Run the boot loader once."""
        return Bootloader(self._drive, self._area, loads, self._quirks).start()

    def restore(self, use: int, slot: str) -> list[str]:
        """Where no copy counted, write both anew."""
        said = []
        for name in ("mender_boot_part", "mender_boot_part_hex") if use == 0 else ():
            try:
                self.write({name: PARTS[slot]}, {"bootcount": "0", "upgrade_available": "0"})
            except BootEnvError as error:
                said.append(str(error))
        return said

    def read(self) -> dict[str, str]:
        """The variables (the client's port)."""
        found = self.seen()
        if found.current is None:
            raise BootEnvError("boot environment: no copy is valid")
        return dict(found.variables)

    def write(self, values: Mapping[str, str], default: Mapping[str, str] | None = None) -> None:
        """Put the whole environment over the older copy, and flush: libubootenv's way."""
        found = self.seen()
        where, flags = 0, 1
        if found.current is not None:
            where = 1 - found.current
            flags = ((found.copies[found.current].flags or 0) + 1) % 256
        variables = {**(found.variables or default or {}), **values}
        area = self._area
        try:
            content = build_copy(variables, area.size, flags=flags)
            self._drive.write(area.offsets[where], content)
            self._drive.flush()
        except DriveError as error:
            raise BootEnvError(f"boot environment: write failed: {error.strerror}") from error

    def seen(self) -> UbootEnvironment:
        """The copies, read from outside the device."""
        contents = _contents(self._drive, self._area)
        if contents != self._last:
            self._parsed = parse_environment(contents, redundant=True)
            self._last = contents
        return self._parsed


class Bootloader:
    """`loads` says whether a slot's kernel can be loaded."""

    def __init__(
        self,
        drive: Disk,
        area: EnvironmentArea,
        loads: Callable[[str], bool],
        quirks: frozenset[str] = frozenset(),
    ) -> None:
        self._drive = drive
        self._area = area
        self._loads = loads
        self._quirks = quirks
        self._values: dict[str, str] = {}
        self._flags = 0
        self._next = area.first

    def start(self) -> Choice:
        """Run once from power-on or reset to the start of a kernel."""
        use = self._read()
        if use == 0:
            # Nothing says which slot is good: the first that loads.
            return Choice(next((s for s in ("a", "b") if self._loads(s)), None), False, 0)
        values = self._values
        if values["upgrade_available"] == "1":
            limit = BOOTLIMIT + ("bootcount-off-by-one" in self._quirks)
            if _number(values["bootcount"]) >= limit and "never-falls-back" not in self._quirks:
                self._roll_back()
            else:
                values["bootcount"] = str(_number(values["bootcount"]) + 1)
                if "does-not-count" not in self._quirks and not self._save():
                    values["upgrade_available"] = "0"
                    self._flip()
        for _ in range(2):
            slot = SLOTS.get(values["mender_boot_part"], "a")
            if self._loads(slot):
                return Choice(slot, values["upgrade_available"] == "1", use)
            if values["upgrade_available"] == "1":
                self._roll_back()
            else:
                self._flip()
        return Choice(None, False, use)

    def _read(self) -> int:
        copies = read_copies(self._drive, self._area)
        self._values = dict.fromkeys(KEYS, "")
        self._values.update(upgrade_available="0", bootcount="0")
        self._flags, self._next = 0, self._area.first
        use = 0
        if copies.current is not None:
            use = copies.current + 1
            found = copies.variables
            self._values.update({key: found[key] for key in KEYS if key in found})
            self._flags = copies.copies[copies.current].flags or 0
            if use == 1:
                self._next = self._area.second
        return use if self._values["mender_boot_part"] in SLOTS else 0

    def _save(self) -> bool:
        self._flags = (self._flags + 1) % 256
        if "flags-do-not-count" in self._quirks:
            self._flags = (self._flags - 1) % 256
        content = build_copy(
            {key: value for key, value in self._values.items() if value},
            self._area.size,
            flags=self._flags,
        )
        offset = self._next
        first, second = self._area.offsets
        self._next = second if offset == first else first
        try:
            self._drive.write(offset, content)
            return self._drive.read(offset, len(content)) == content
        except DriveError:
            return False

    def _roll_back(self) -> None:
        self._flip()
        if "rollback-keeps-trial" not in self._quirks:
            self._values["upgrade_available"] = "0"
        self._values["bootcount"] = "0"
        self._save()

    def _flip(self) -> None:
        part = "2" if self._values["mender_boot_part"] == "3" else "3"
        self._values["mender_boot_part"] = self._values["mender_boot_part_hex"] = part


def _number(text: str) -> int:
    """What U-Boot's `test -ge` makes of a value: decimal digits, 0 without any."""
    return int(text) if text.isdigit() else 0
