"""GRUB's side of the simulated device, and the client's: two environment blocks and their locks.

The boot loader is the real script (`images/boot/grub.cfg`) on the bytes of the drive: `load_env`
and `save_env` read and write blocks as GRUB does, sector by sector and without a flush, so that a
power cut may come between any two sectors, and take any of them back. In the running system it is
the shipped `updater.device.bootenv_grub`, whose `os` is this module's: a write goes to the drive at
once and is flushed, as on the target, which mounts the copies with `sync`. What init does to the
copies before (`images/boot/mount-grubenv.sh`) is `restore`.

On the drive each copy has a place of its own, `env` and `lock` side by side in it, so that what
tears a unit of the medium may take both, but not those of the other copy. Inodes and superblocks
of the copies' file systems are not modelled: the explorer has the real ones.
"""

from __future__ import annotations

import errno
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from framework.disk.grubenv import (
    SIGNATURE,
    SIZE,
    GrubEnvironments,
    parse_grub_environment,
    parse_grub_environments,
)
from framework.disk.journal import SECTOR
from framework.targets.simulated.bootloader import PARTS, SLOTS, Choice
from framework.targets.simulated.drive import Disk, DriveError
from framework.targets.simulated.grubscript import Interpreter, Script, ScriptError

SCRIPT: Final = Path(__file__).parents[3] / "images/boot/grub.cfg"
COPIES: Final = (4 << 10, 68 << 10)
"""Where the copies begin: `env`, and behind it `lock`, 1024 bytes each."""
LOCK: Final = SIZE
"""Where a copy's lock is, from its beginning."""
PLACES: Final = tuple(f"/boot/grub/mender_grubenv{number}/env" for number in (1, 2))
"""The copies' paths on the running system."""
_FILES: Final = {
    name: at
    for place, copy in zip(PLACES, COPIES, strict=True)
    for name, at in ((place, copy), (f"{place.rpartition('/')[0]}/lock", copy + LOCK))
}
_DEVICES: Final = {"(hd0,gpt1)": COPIES[0], "(hd0,gpt6)": COPIES[1]}
"""What the script calls the copies' file systems."""
_VALUES: Final = {
    "COPY_1": "(hd0,gpt1)",
    "COPY_2": "(hd0,gpt6)",
    "CONSOLE": "ttyS0,115200",
    "DEVICE": "/dev/vda",
    "KERNEL_ARGUMENTS": "panic=1",
}
_PADDING: Final = b"#"
_IGNORED: Final = (
    *("serial", "terminal_input", "terminal_output", "setpci", "regexp", "sleep"),
    *("write_word", "write_dword"),
)
"""Commands that succeed and do nothing here: there is no watchdog, and no time to wait."""


class _StartsKernel(Exception):  # noqa: N818 - no error
    pass


class _Restarts(Exception):  # noqa: N818 - no error
    pass


def format_block(variables: Mapping[str, str]) -> bytes:
    """An environment block. ValueError if the variables don't fit."""
    block = SIGNATURE + "".join(f"{name}={value}\n" for name, value in variables.items()).encode()
    if len(block) > SIZE:
        raise ValueError(f"the variables take {len(block)} bytes, a block has {SIZE}")
    return block.ljust(SIZE, _PADDING)


def format_copies(content: bytearray, variables: Mapping[str, str]) -> None:
    """Put both copies, settled, on a drive that is being made.

    A variable of someone else's stands among them, so long that they are in two sectors: a torn
    block may name the new slot, and say of the trial what was true of the old one.
    """
    names = list(variables)
    first = names[: names.index("upgrade_available")]
    rest = {name: variables[name] for name in names if name not in first}
    values = {**{name: variables[name] for name in first}, "note": "x" * 440, **rest}
    for copy in COPIES:
        content[copy : copy + SIZE] = format_block(values)
        content[copy + LOCK : copy + LOCK + SIZE] = format_block({"editing": "0"})


def shipped_script() -> str:
    """The text of the boot script that the images have."""
    return SCRIPT.read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def read_script(text: str) -> Script:
    """Read a boot script; its values are those of the simulated device."""
    for name, value in _VALUES.items():
        text = text.replace(f"@{name}@", value)
    return Script(text)


def read_environments(drive: Disk) -> GrubEnvironments:
    """Read and parse copies and locks; what can't be read is not valid."""
    blocks = [_read(drive, copy + at) for at in (0, LOCK) for copy in COPIES]
    return _parsed(*blocks)


# The same bytes are looked at again and again, by the device and by its witnesses.
@lru_cache(maxsize=4096)
def _parsed(
    first: bytes | None, second: bytes | None, lock: bytes | None, other: bytes | None
) -> GrubEnvironments:
    return parse_grub_environments((first, second), (lock, other))


@lru_cache(maxsize=4096)
def _variables(block: bytes | None) -> Mapping[str, str] | None:
    parsed = parse_grub_environment(block)
    return parsed.variables if parsed.valid else None


def _read(drive: Disk, offset: int) -> bytes | None:
    try:
        return drive.read(offset, SIZE)
    except DriveError:
        return None


class GrubBootloader:
    """GRUB with a boot script; `loads` says whether a slot's kernel can be loaded."""

    def __init__(self, drive: Disk, script: Script, loads: Callable[[str], bool]) -> None:
        self._drive = drive
        self._script = script
        self._loads = loads
        self._kernel = ""
        self.lines: list[str] = []
        self._shell = Interpreter(
            {
                "load_env": self._load_env,
                "save_env": self._save_env,
                "linux16": self._linux,
                "initrd16": lambda arguments: self._loads(_slot_in(arguments[0])),
                "boot": self._boot,
                "reboot": self._reboot,
                "echo": self._echo,
                **dict.fromkeys(_IGNORED, lambda arguments: True),
            }
        )

    def start(self) -> Choice:
        """Run the script once, from power-on or reset to the start of a kernel."""
        variables = self._shell.variables
        try:
            self._shell.run(self._script)
        except _StartsKernel:
            trial = variables.get("upgrade_available") == "1"
            use = variables.get("bo_use", "0")
            return Choice(self._kernel, trial, int(use))
        except _Restarts:
            return Choice(None, False, int(variables.get("bo_use", "0")))
        raise ScriptError("the boot script ends without starting a kernel")

    def _load_env(self, arguments: Sequence[str]) -> bool:
        place, names = _place(arguments)
        found = _variables(_read(self._drive, place))
        if found is None:
            return False
        self._shell.variables.update(
            (name, value) for name, value in found.items() if not names or name in names
        )
        return True

    def _save_env(self, arguments: Sequence[str]) -> bool:
        place, names = _place(arguments)
        block = _read(self._drive, place)
        if block is None or not block.startswith(SIGNATURE):
            return False
        for name in names:
            block = _with(block, name, self._shell.variables.get(name))
        try:
            # GRUB has a list of the file's sectors, and writes them one by one.
            for at in range(0, SIZE, SECTOR):
                self._drive.write(place + at, block[at : at + SECTOR])
        except DriveError:
            return False
        return True

    def _linux(self, arguments: Sequence[str]) -> bool:
        slot = _slot_in(arguments[0])
        self._kernel = ""
        if not self._loads(slot):
            return False
        self._kernel = slot
        return True

    def _boot(self, arguments: Sequence[str]) -> bool:
        if not self._kernel:
            return False
        raise _StartsKernel

    def _reboot(self, arguments: Sequence[str]) -> bool:
        raise _Restarts

    def _echo(self, arguments: Sequence[str]) -> bool:
        self.lines.append(" ".join(arguments))
        return True


def _place(arguments: Sequence[str]) -> tuple[int, Sequence[str]]:
    """The block that `-f` names, and what else there is."""
    if len(arguments) < 2 or arguments[0] != "-f":
        raise ScriptError("an environment block has no default place here: -f is wanted")
    device, _, name = arguments[1].partition("/")
    if device not in _DEVICES or name not in ("env", "lock"):
        raise ScriptError(f"there is no {arguments[1]} here")
    return _DEVICES[device] + (LOCK if name == "lock" else 0), arguments[2:]


def _slot_in(path: str) -> str:
    """The slot whose partition a path names: "(hd0,gpt2)/boot/vmlinuz"."""
    part = path.partition("gpt")[2].partition(")")[0]
    if part not in SLOTS:
        raise ScriptError(f"there is no slot at {path}")
    return SLOTS[part]


def _with(block: bytes, name: str, value: str | None) -> bytes:
    """The block with a variable set, or (None) deleted, in its place or behind the others."""
    lines = block[len(SIGNATURE) :].rstrip(_PADDING).splitlines(keepends=True)
    line = b"" if value is None else f"{name}={value}\n".encode()
    start = f"{name}=".encode()
    for index, old in enumerate(lines):
        if old.startswith(start):
            lines[index] = line
            break
    else:
        lines.append(line)
    made = SIGNATURE + b"".join(lines)
    # One that doesn't fit is left as it was.
    return made.ljust(SIZE, _PADDING) if len(made) <= SIZE else block


# The running system.


class _Files:
    """What `bootenv_grub` uses of `os`, on the copies' files of whichever device asks.

    Every file is a kibibyte in a fixed place. A page that could not be written stays in the page
    cache, as Linux keeps it, and is found there until the next start.
    """

    O_RDONLY, O_RDWR, O_CREAT = os.O_RDONLY, os.O_RDWR, os.O_CREAT
    O_CLOEXEC, O_DIRECTORY = os.O_CLOEXEC, os.O_DIRECTORY

    def __init__(self) -> None:
        self.drive: Disk | None = None
        self.cache: dict[int, bytes] = {}
        self._open: dict[int, int] = {}
        self._next = 3

    def __getattr__(self, name: str) -> object:
        raise AttributeError(f"the simulated GRUB environment has no os.{name}")

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """Open one of the files."""
        if path not in _FILES:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._next += 1
        self._open[self._next] = _FILES[path]
        return self._next

    def close(self, handle: int) -> None:
        """Close it."""
        del self._open[handle]

    def fstat(self, handle: int) -> os.stat_result:
        """Its size, and nothing else."""
        return os.stat_result((0o100644, 0, 0, 1, 0, 0, SIZE, 0, 0, 0))

    def read(self, handle: int, count: int) -> bytes:
        """Read it from its beginning: nobody reads one twice."""
        place = self._open[handle]
        if place not in self.cache:
            assert self.drive is not None
            self.cache[place] = self.drive.read(place, SIZE)
        return self.cache[place][:count]

    def pread(self, handle: int, count: int, offset: int) -> bytes:
        """Read from it."""
        return self.read(handle, SIZE)[offset : offset + count]

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        """Write all of it: through to the drive, as it is mounted."""
        if offset or len(data) != SIZE:
            raise OSError(errno.EINVAL, "a block is written as a whole")
        self.write_through(self._open[handle], data)
        return len(data)

    def ftruncate(self, handle: int, size: int) -> None:
        """It has that size."""

    def fsync(self, handle: int) -> None:
        """What was written is on the medium: `pwrite` has flushed it."""

    def write_through(self, place: int, data: bytes) -> None:
        """Write to a file that is mounted with `sync`."""
        assert self.drive is not None
        self.cache[place] = data
        self.drive.write(place, data)
        self.drive.flush()


_FILES_OF_ALL: Final = _Files()


@lru_cache(maxsize=1)
def client_module() -> ModuleType:
    """The client's `bootenv_grub`, loaded once more, with the files above in `os`'s place."""
    spec = importlib.util.find_spec("updater.device.bootenv_grub")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.os = _FILES_OF_ALL  # type: ignore[attr-defined]
    return module


class GrubCopies:
    """The copies of one device: the client's boot environment port, and what else has them.

    `make` makes the client's part, from the paths of the two copies; the shipped one unless a bug
    is planted. `script` is the boot loader's. `quirks` are bugs of init's: "init-does-not-flush".
    """

    def __init__(
        self,
        drive: Disk,
        script: str,
        make: Callable[[ModuleType], type] = lambda module: module.GrubEnvironment,
        quirks: frozenset[str] = frozenset(),
    ) -> None:
        self._drive = drive
        self._quirks = quirks
        self._script = read_script(script)
        self._cache: dict[int, bytes] = {}
        self._client = make(client_module())(*PLACES)

    def start(self, loads: Callable[[str], bool]) -> Choice:
        """Run the boot loader; what the system before it had in memory is gone."""
        self._cache = {}
        return GrubBootloader(self._drive, self._script, loads).start()

    def read(self) -> dict[str, str]:
        """The boot environment's variables (the client's port)."""
        return dict(self._here().read())

    def write(self, values: Mapping[str, str]) -> None:
        """Set variables (the client's port)."""
        self._here().write(values)

    def restore(self, use: int, slot: str) -> list[str]:
        """Make one copy as good as the other, or both anew, as init does."""
        good = 1 if use == 2 else 0
        try:
            if "init-does-not-flush" not in self._quirks:
                self._drive.flush()
            if use == 0 or not self._settled(good):
                self._make_anew(slot, (1 - good, good))
            else:
                self._make_same(good)
        except DriveError as error:
            return [f"boot environment: {error.strerror}"]
        return []

    def seen(self) -> GrubEnvironments:
        """The copies as they are on the drive."""
        return read_environments(self._drive)

    def _here(self) -> Any:
        _FILES_OF_ALL.drive, _FILES_OF_ALL.cache = self._drive, self._cache
        return self._client

    def _block(self, place: int) -> bytes | None:
        if place not in self._cache:
            block = _read(self._drive, place)
            if block is None:
                return None
            self._cache[place] = block
        return self._cache[place]

    def _settled(self, copy: int) -> bool:
        return self._block(COPIES[copy] + LOCK) == format_block({"editing": "0"})

    def _same(self) -> bool:
        env = self._block(COPIES[0])
        return (
            env is not None
            and env == self._block(COPIES[1])
            and self._settled(0)
            and self._settled(1)
        )

    def _make_same(self, good: int) -> None:
        if self._same():
            return
        content = self._block(COPIES[good])
        if content is None:
            raise DriveError(errno.EIO, f"copy {good + 1} can't be read")
        try:
            self._write_copy(1 - good, content)
            if self._same():
                return
        except DriveError:
            pass
        self._make_copy(1 - good)
        self._write_copy(1 - good, content)

    def _make_anew(self, slot: str, order: tuple[int, int]) -> None:
        part = PARTS[slot]
        variables = {
            "bootcount": "0",
            "mender_boot_part": part,
            "mender_boot_part_hex": part,
            "upgrade_available": "0",
        }
        for copy in order:
            self._make_copy(copy)
            self._write(COPIES[copy], format_block(variables))
            self._write(COPIES[copy] + LOCK, format_block({"editing": "0"}))

    def _make_copy(self, copy: int) -> None:
        """A new file system, whose lock is open: as it is before, without a superblock."""
        variables = {"bootcount": "0", "mender_boot_part": "2", "mender_boot_part_hex": "2"}
        env = format_block({**variables, "upgrade_available": "0"})
        both = env + format_block({"editing": "1"})
        self._write(COPIES[copy] + LOCK, both[SIZE:])
        self._cache[COPIES[copy]], self._cache[COPIES[copy] + LOCK] = both[:SIZE], both[SIZE:]
        self._drive.write(COPIES[copy], both)
        self._drive.flush()

    def _write_copy(self, copy: int, content: bytes) -> None:
        self._write(COPIES[copy] + LOCK, format_block({"editing": "1"}))
        self._write(COPIES[copy], content)
        self._write(COPIES[copy] + LOCK, format_block({"editing": "0"}))

    def _write(self, place: int, data: bytes) -> None:
        self._cache[place] = data
        self._drive.write(place, data)
        self._drive.flush()
