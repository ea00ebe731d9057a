"""What a tiny device does after a power cut: its bootloader, its updater, the update tried again.

`TinyDevice` again (`tiny_ab`), started from a crash state instead of from a fresh disk: the same
order of writes, syncs and promises as the real one's recovery; or with a bug that only a recovery
has, so that the run which was recorded, and all cuts of it, know nothing of it.
"""

from __future__ import annotations

from pathlib import Path

from disk_nbd_client import Client
from tiny_ab import ENV, ENVIRONMENT, IMAGES, SLOTS, TinyDevice, image, layout

from framework.disk import (
    DeviceSpec,
    JournalReader,
    Recorder,
    StartState,
    UnreadableSectorError,
    read_environment,
)
from framework.explore.judges.context import Context
from framework.explore.states import CrashState
from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    SlotContent,
    SlotState,
    next_boot,
)
from framework.verdict.oracle import other

RECOVERY_BUGS = ("both-copies-at-once", "no-sync-before-switch", "acknowledged-too-early")
"""Of TinyDevice's bugs, those that a recovery can have as well."""


class RecoveringDevice(TinyDevice):
    """Starts from the disk that the recorder serves; `bug` is one of RECOVERY_BUGS, or none."""

    def __init__(self, recorder: Recorder, disks, bug: str = "") -> None:
        self.recorder = recorder
        self.bug = bug
        self.boot = layout().boot(disks)
        found = read_environment(disks["vda"], [(at, ENV) for at in ENVIRONMENT], redundant=True)
        self.copy = 1 if found.current is None else found.current
        self.flags = 0 if found.current is None else found.copies[found.current].flags
        self.slots = {slot: self._content(disks["vda"], slot) for slot in SLOTS}
        endpoint = recorder.endpoint("vda")
        self.client = Client(endpoint.socket, endpoint.export)

    @staticmethod
    def _content(disk, slot: str) -> SlotState:
        for name in IMAGES:
            if _read(disk, SLOTS[slot], len(image(name))) == image(name):
                return SlotState(SlotContent.IMAGE, name)
        whole = _read(disk, SLOTS[slot] + 1024 + 56, 2) == b"\x53\xef"
        return SlotState(SlotContent.MIXED if whole else SlotContent.UNLOADABLE)

    def recover(self) -> str | None:
        """From power-on to the ready line; the slot that runs."""
        decision = next_boot(self.boot, self.slots)
        slot = decision.slot
        if slot is None:
            return None
        if decision.rolled_back:
            self.switch(slot, trial=False)
        if decision.on_trial:
            self.switch(slot, trial=True, count=self.boot.bootcount + 1)
            name = self.slots[slot].image
            if name is not None and IMAGES[name].healthy:
                self._commit(name, slot)
            else:
                slot = other(slot)
                self.switch(slot, trial=False)
        self.runs = self.slots[slot].image
        self.promise(BootSeen(True, self.runs, slot))
        return slot

    def _commit(self, name: str, slot: str) -> None:
        self.promise(CommitReached(name))
        if self.bug == "acknowledged-too-early":
            self.promise(Committed(name, slot))
        self.switch(slot, trial=False)
        self.promise(Committed(name, slot))


def _read(disk, offset: int, length: int) -> bytes | None:
    try:
        return disk.read(offset, length)
    except UnreadableSectorError:
        return None


def recovered(
    context: Context, state: CrashState, folder: Path, bug: str = "", retry: str = ""
) -> JournalReader:
    """The journal of the recovery from a state, and of the update tried again after it.

    It stays valid as long as `folder` does.
    """
    disks = state.disks(context.journal)
    specs = [DeviceSpec(n, d.base_path, d.size_bytes, "-") for n, d in disks.items()]
    begin = StartState.of(disks)
    with Recorder(specs, folder, prepare_bytes=0, begin=begin) as recorder:
        device = RecoveringDevice(recorder, disks, bug)
        runs = device.recover()
        if retry and runs is not None:
            device.update(retry, other(runs))
        device.close()
        path = recorder.journal_path
    return JournalReader(path, begin=begin)
