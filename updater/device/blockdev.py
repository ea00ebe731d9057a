"""Block devices on Linux: which slot runs, who uses the other, and direct, checked input/output.

Writing and reading bypass the page cache (O_DIRECT): what is read back comes from the medium,
and a large image does not push the running system's pages out. Where a file system refuses
O_DIRECT (tmpfs), pages are written back and dropped before reading instead. The device is opened
with O_EXCL, which the kernel refuses while it is mounted or otherwise claimed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from updater.device.config import Slot
from updater.device.errors import SlotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.ports import BlockDevice

_BLKSSZGET = 0x1268
_BLKFLSBUF = 0x1261
_FILE_BLOCK_BYTES = 4096


class LinuxMachine:
    """The running device."""

    def running_slot(self, slots: tuple[Slot, Slot]) -> Slot:
        """Return the slot whose device number is that of the root file system."""
        root = os.stat("/").st_dev  # noqa: PTH116 - boot path
        for slot in slots:
            if _device_number(slot) == root:
                return slot
        raise SlotError(
            f"the root file system (device {os.major(root)}:{os.minor(root)}) is on none of the"
            f" configured slots {slots[0].device} and {slots[1].device}"
        )

    def user_of(self, slot: Slot) -> str | None:
        """Say where the slot is mounted, by any name, or None."""
        number = _device_number(slot)
        wanted = f"{os.major(number)}:{os.minor(number)}"
        with open("/proc/self/mountinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                fields = line.split(" ")
                if fields[2] == wanted:
                    return f"mounted at {fields[4]}"
        return None

    def open_slot(self, slot: Slot) -> BlockDevice:
        """Open the slot's device for exclusive reading and writing, overlapped with the rest."""
        from updater.device.overlapped import Overlapped  # noqa: PLC0415
        from updater.device.slot_writer import CHUNK_BYTES  # noqa: PLC0415

        _device_number(slot)
        return Overlapped(DirectDevice(slot.device), CHUNK_BYTES)

    def boot_id(self) -> str:
        """Return the kernel's identifier of this boot."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()

    def free_bytes(self, path: str) -> int:
        """Return how much may still be written to the file system of `path`; or OSError."""
        from updater.device.files import free_bytes  # noqa: PLC0415

        return free_bytes(path)

    def sync_all(self) -> None:
        """Make durable what was written to any file."""
        os.sync()


class DirectDevice:
    """A block device, or a file that stands for one, opened for exclusive writing."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._handle, self._direct = _open_direct(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise SlotError(f"{path}: in use (mounted or claimed by the kernel)") from error
            raise SlotError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self.is_block = stat.S_ISBLK(os.fstat(self._handle).st_mode)
            self.size_bytes = os.lseek(self._handle, 0, os.SEEK_END)
            self.block_bytes = _FILE_BLOCK_BYTES
            if self.is_block:
                answer = fcntl.ioctl(self._handle, _BLKSSZGET, bytes(4))
                self.block_bytes = struct.unpack("i", answer)[0]
        except OSError as error:
            os.close(self._handle)
            raise SlotError(f"{path}: cannot be examined: {error.strerror}") from error

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`; `offset` and length are multiples of `block_bytes`."""
        done = 0
        try:
            while done < len(data):
                count = os.pwrite(self._handle, data[done:], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += count
        except OSError as error:
            raise self._error("write", offset + done, error) from error

    def sync(self) -> None:
        """fsync: for a block device this flushes the drive's own cache too."""
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise SlotError(f"{self._path}: sync failed: {error.strerror}") from error

    def read_medium(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the medium."""
        done = 0
        try:
            if not self._direct:
                self._drop_cache(offset, len(into))
            while done < len(into):
                count = os.preadv(self._handle, [into[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the device ends")
                done += count
        except OSError as error:
            raise self._error("read", offset + done, error) from error

    def close(self) -> None:
        """Close; the kernel reports late write errors here."""
        handle, self._handle = self._handle, -1
        if handle < 0:
            return
        try:
            os.close(handle)
        except OSError as error:
            raise SlotError(f"{self._path}: close failed: {error.strerror}") from error

    def _drop_cache(self, offset: int, length: int) -> None:
        if self.is_block:
            fcntl.ioctl(self._handle, _BLKFLSBUF, 0)
        os.posix_fadvise(self._handle, offset, length, os.POSIX_FADV_DONTNEED)

    def _error(self, what: str, offset: int, error: OSError) -> SlotError:
        return SlotError(f"{self._path}: {what} failed at byte {offset}: {error.strerror or error}")


def _open_direct(path: str) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CLOEXEC
    if stat.S_ISBLK(os.stat(path).st_mode):  # noqa: PTH116
        flags |= os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags), False


def _device_number(slot: Slot) -> int:
    try:
        status = os.stat(slot.device)  # noqa: PTH116 - boot path
    except OSError as error:
        raise SlotError(f"slot {slot.name}: {slot.device}: {error.strerror}") from error
    if not stat.S_ISBLK(status.st_mode):
        raise SlotError(f"slot {slot.name}: {slot.device} is not a block device")
    return status.st_rdev
