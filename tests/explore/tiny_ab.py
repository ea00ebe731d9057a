"""A whole A/B update on a disk of 4 MiB, sent through the live recorder: honest, or with a bug.

The order of writes, syncs and promises is the real updater's; only the sizes are small. What it
leaves is a journal like any other, so that everything above the recorder is tested on it in
milliseconds.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from disk_nbd_client import FLUSH, WRITE, ZEROES, Client

from framework.disk import DeviceSpec, Recorder, build_copy
from framework.explore.judges.context import Context
from framework.explore.layout import (
    KnownImage,
    Layout,
    MenderVariables,
    Range,
    Region,
    Role,
    UbootStore,
)
from framework.explore.timeline import SOURCE, FileSynced, Restarted, to_mark
from framework.verdict import (
    BootSeen,
    CommitReached,
    Committed,
    ImageFacts,
    InstallEnded,
    InstallStarted,
)

KIB = 1 << 10
MIB = 1 << 20
ENV = 4 * KIB
HEAD = 4 * KIB
SLOT = 256 * KIB
ENVIRONMENT = (64 * KIB, 128 * KIB)
SLOTS = {"a": MIB, "b": 2 * MIB}
NUMBERS = {"a": "2", "b": "3"}
BUGS = (
    "no-sync-before-switch",
    "switch-before-image",
    "both-copies-at-once",
    "one-copy-only",
    "acknowledged-too-early",
    "installed-too-early",
    "never-on-trial",
)


def image(name: str) -> bytes:
    """A root file system, as far as a bootloader looks: an ext4 magic and content."""
    data = bytearray(random.Random(name).randbytes(20 * KIB))
    data[1024 + 56 : 1024 + 58] = b"\x53\xef"
    return bytes(data)


IMAGES = {
    name: ImageFacts(name, hashlib.sha256(image(name)).hexdigest(), len(image(name)), healthy)
    for name, healthy in (("v1", True), ("v2", True), ("sick", False))
}


def environment(slot: str, flags: int, *, trial: bool = False, count: int = 0) -> bytes:
    """A copy whose every sector differs from that of another state."""
    values = {
        "mender_boot_part": NUMBERS[slot],
        "upgrade_available": str(int(trial)),
        "bootcount": str(count),
    }
    filler = {f"x{i}": f"{flags:03}{slot}{int(trial)}{count}" * 40 for i in range(12)}
    return build_copy(values | filler, ENV, flags=flags)


def layout(*, redundant: bool = True) -> Layout:
    """Its layout."""
    known = tuple(KnownImage(i.name, i.sha256, i.size_bytes) for i in IMAGES.values())
    slots = tuple(
        Region(f"slot {name}", Role.SLOT, (Range("vda", offset, SLOT),), known)
        for name, offset in SLOTS.items()
    )
    copies = ENVIRONMENT if redundant else ENVIRONMENT[:1]
    store = UbootStore(tuple(Range("vda", offset, ENV) for offset in copies), redundant=True)
    numbers = {number: slot for slot, number in NUMBERS.items()}
    return Layout(slots, store, MenderVariables(numbers))


def base_image(path: Path, *, slot_b: str = "") -> Path:
    """A disk that runs v1 in slot a."""
    disk = bytearray(4 * MIB)
    disk[SLOTS["a"] : SLOTS["a"] + len(image("v1"))] = image("v1")
    if slot_b:
        disk[SLOTS["b"] : SLOTS["b"] + len(image(slot_b))] = image(slot_b)
    disk[ENVIRONMENT[0] : ENVIRONMENT[0] + ENV] = environment("a", 1)
    disk[ENVIRONMENT[1] : ENVIRONMENT[1] + ENV] = environment("a", 0)
    path.write_bytes(disk)
    return path


class TinyDevice:
    """Runs updates against a recorder; `bug` is one of BUGS, or none."""

    def __init__(self, recorder: Recorder, bug: str = "") -> None:
        assert not bug or bug in BUGS
        self.recorder = recorder
        self.bug = bug
        self.flags = 1
        self.copy = 0
        endpoint = recorder.endpoint("vda")
        self.client = Client(endpoint.socket, endpoint.export)
        self.runs = "v1"
        self.promise(BootSeen(True, "v1", "a"))

    def promise(self, event) -> None:
        self.recorder.mark(SOURCE, to_mark(event))

    def update(self, name: str, slot: str) -> None:
        """Install, restart, commit; or roll back what is sick."""
        running = {"a": "b", "b": "a"}[slot]
        self.promise(InstallStarted(name))
        if self.bug == "switch-before-image":
            self.switch(slot, trial=True)
        self.fill(name, slot)
        if self.bug == "installed-too-early":
            self.promise(InstallEnded(name, 0))
        if self.bug != "switch-before-image":
            self.switch(slot, trial=self.bug != "never-on-trial")
        self.promise(InstallEnded(name, 0))
        self.promise(Restarted())
        self.switch(slot, trial=True, count=1)  # the bootloader counts
        if not IMAGES[name].healthy:
            self.switch(running, trial=False)
            self.promise(BootSeen(True, self.runs, running))
            return
        self.promise(CommitReached(name))
        if self.bug == "acknowledged-too-early":
            self.promise(Committed(name, slot))
        self.switch(slot, trial=False)
        self.promise(Committed(name, slot))
        self.runs = name
        self.promise(BootSeen(True, name, slot))

    def fill(self, name: str, slot: str) -> None:
        """The image, its head last."""
        data, at = image(name), SLOTS[slot]
        sync = self.bug not in ("no-sync-before-switch", "switch-before-image")
        if sync:
            self.client.zero(at, HEAD)
            self.client.flush()
        for offset in range(HEAD, len(data), 4 * KIB):
            self.client.write(at + offset, data[offset : offset + 4 * KIB])
        if sync:
            self.client.flush()
        self.client.write(at, data[:HEAD])
        if sync:
            self.client.flush()

    def switch(self, slot: str, *, trial: bool, count: int = 0) -> None:
        """One transaction of the boot environment."""
        self.flags += 1
        data = environment(slot, self.flags, trial=trial, count=count)
        if self.bug == "both-copies-at-once":
            targets = ENVIRONMENT
        elif self.bug == "one-copy-only":
            targets = ENVIRONMENT[:1]
        else:
            self.copy = 1 - self.copy
            targets = (ENVIRONMENT[self.copy],)
        for at in range(0, ENV, KIB):  # one copy after the other, or both block by block
            for offset in targets:
                self.client.write(offset + at, data[at : at + KIB])
        self.client.flush()

    def close(self) -> None:
        self.client.close()


def run(directory: Path, updates: tuple[str, ...] = ("v2", "sick"), bug: str = "") -> Path:
    """The journal of updates, one after the other."""
    base = base_image(directory / f"base-{bug}.img")
    with Recorder([DeviceSpec("vda", base)], directory / f"run-{bug}", prepare_bytes=0) as recorder:
        device = TinyDevice(recorder, bug)
        slot = "b"
        for name in updates:
            device.update(name, slot)
            if IMAGES[name].healthy:
                slot = {"a": "b", "b": "a"}[slot]
        device.close()
        return recorder.journal_path


def facts(bug: str = "") -> dict:
    """The facts of a recording of it."""
    from attrs import asdict

    from framework.explore.describe import layout_to_values

    return {
        "layout": layout_to_values(layout(redundant=bug != "one-copy-only")),
        "images": {name: asdict(i) for name, i in IMAGES.items()},
        "initial": "v1",
        "slots": {"a": "slot a", "b": "slot b"},
    }


def context(journal, bug: str = "") -> Context:
    """The context of its journal."""
    return Context.of(journal, facts(bug))


__all__ = ["BUGS", "FLUSH", "WRITE", "ZEROES", "FileSynced"]
