"""GRUB's environment in two copies, each with a lock file, as grub-mender-grubenv lays it out.

Files, for copies 1 and 2: `<dir>/env`, and beside it `<dir>/lock`, which is a GRUB environment
block too and holds `editing=0` or `editing=1`. All are 1024 bytes: a signature line,
`key=value` lines, `#` up to the end (GRUB manual, "Environment block").

The reading rule, the boot loader's and ours: copy 1 if its lock says `editing=0`, else copy 2.

The writing protocol, each step fsynced before the next:

    heal    if copy 1 is valid and copy 2 differs from it: write copy 2 like this, first
    1.      lock 1: editing=1          reader: copy 2, old
    2.      env 1: new values          reader: copy 2, old
    3.      lock 1: editing=0          reader: copy 1, new: this one sector is the commit point
    4.      lock 2: editing=1          reader: copy 1, new
    5.      env 2: new values
    6.      lock 2: editing=0

The boot loader, which can't flush, writes to copy 1 only, and only where copy 2 is settled; what
starts the system makes copy 2 the same again.

A cut in any step leaves a copy that the rule selects and that is wholly old or wholly new: steps
1 and 3 differ in one byte of one sector, and if that sector is torn the block is invalid, which
the rule takes for "being edited". Without the healing step, a cut in step 5 followed by another
write would select the half-written copy 2 in step 1.

Files are overwritten in place, never replaced: GRUB reads ext4 without replaying its journal,
so a rename that fsync made durable may be invisible to it, while overwritten blocks are not.
`grub-editenv` is not used because it truncates the file first, which is both problems at once;
`tests/updater` checks the format against it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from updater.device.errors import BootEnvError

BLOCK_BYTES = 1024
_SIGNATURE = "# GRUB Environment Block\n"


class GrubEnvironment:
    """The two copies; `first` and `second` are the paths of their `env` files."""

    def __init__(self, first: str, second: str) -> None:
        self._copies = (first, second)

    def read(self) -> dict[str, str]:
        """Return the variables of the copy that the boot loader would use."""
        first, second = self._copies
        chosen = first if self._is_settled(first) else second
        try:
            return parse_block(_read_file(chosen))
        except (OSError, ValueError) as error:
            raise BootEnvError(f"boot environment {chosen}: {_reason(error)}") from error

    def write(self, values: Mapping[str, str]) -> None:
        """Set the variables in both copies, by the protocol above."""
        first, second = self._copies
        try:
            current = self._current()
            if self._is_settled(first) and not self._holds(second, current):
                self._write_copy(second, current)
            # What is set goes first, into one sector: half a block is never a mix of it.
            new = {**values, **{key: current[key] for key in current if key not in values}}
            self._write_copy(first, new)
            self._write_copy(second, new)
        except (OSError, ValueError) as error:
            raise BootEnvError(
                f"boot environment {first} and {second}: cannot be written: {_reason(error)}"
            ) from error

    def _current(self) -> dict[str, str]:
        """Return the valid values, or none when there is no valid copy left to preserve."""
        try:
            return self.read()
        except BootEnvError:
            return {}

    def _is_settled(self, copy: str) -> bool:
        try:
            settled = parse_block(_read_file(_lock_of(copy))).get("editing") == "0"
            parse_block(_read_file(copy))
        except (OSError, ValueError):
            return False
        return settled

    def _holds(self, copy: str, values: Mapping[str, str]) -> bool:
        return self._is_settled(copy) and parse_block(_read_file(copy)) == values

    def _write_copy(self, copy: str, values: Mapping[str, str]) -> None:
        content = format_block(values)
        _overwrite(_lock_of(copy), format_block({"editing": "1"}))
        _overwrite(copy, content)
        _overwrite(_lock_of(copy), format_block({"editing": "0"}))


def parse_block(block: bytes) -> dict[str, str]:
    """Return the variables of an environment block; ValueError when it is none."""
    if len(block) != BLOCK_BYTES or not block.startswith(_SIGNATURE.encode()):
        raise ValueError("not a GRUB environment block")
    values: dict[str, str] = {}
    # Lines that begin with # are comments; the padding is one that never ends, and most of it.
    body = block[len(_SIGNATURE) :].rstrip(b"#").decode("utf-8", "surrogateescape")
    key, text, escaped, in_value, in_comment = "", "", False, False, False
    for char in body:
        if escaped:
            text += char
            escaped = False
        elif char == "\n":
            if in_value:
                values[key] = text
            text, in_value, in_comment = "", False, False
        elif in_comment:
            continue
        elif in_value and char == "\\":
            escaped = True
        elif not in_value and char == "=":
            key, text, in_value = text, "", True
        elif not in_value and not text and char == "#":
            in_comment = True
        else:
            text += char
    return values


def format_block(values: Mapping[str, str]) -> bytes:
    """Return the environment block that holds `values`; ValueError when they do not fit."""
    text = _SIGNATURE
    for key, value in values.items():
        if not key or any(char in "=#\n\\" for char in key):
            raise ValueError(f"boot variable {key!r} cannot be stored")
        escaped = value.replace("\\", "\\\\").replace("\n", "\\\n")
        text += f"{key}={escaped}\n"
    block = text.encode("utf-8", "surrogateescape")
    if len(block) > BLOCK_BYTES:
        raise ValueError(f"the variables need {len(block)} bytes, the block has {BLOCK_BYTES}")
    return block.ljust(BLOCK_BYTES, b"#")


def _lock_of(copy: str) -> str:
    return f"{copy.rpartition('/')[0]}/lock"


def _read_file(path: str) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, BLOCK_BYTES + 1)
    finally:
        os.close(handle)


def _overwrite(path: str, block: bytes) -> None:
    """Write `block` over the file in place and make it durable."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(handle).st_size
        if os.pwrite(handle, block, 0) != len(block):
            raise OSError(None, "short write", path)
        if size > len(block):
            os.ftruncate(handle, len(block))
        os.fsync(handle)
    finally:
        os.close(handle)
    if size == 0:
        directory = os.open(path.rpartition("/")[0] or "/", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
