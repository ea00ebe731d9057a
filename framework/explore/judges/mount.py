"""The judge that mounts: a real kernel, from just before it has seen the disk, on a crash state.

A guest is started once, up to the point where only the disk's driver is missing, and kept as a
snapshot. From there it goes on for every state: driver, the device's own repair, mount, the synced
files' digests, unmount, e2fsck. So the data judge, which runs e2fsck on an export on the host, is
checked by what a kernel does with that disk, sectors that can't be read included. A snapshot of a
guest that has seen a disk would not do: it holds pages of another one. It proves mount and
recovery, no boot.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace

from attrs import frozen

from framework.explore.judges.context import Context
from framework.explore.judges.data import DataContent, DataJudge
from framework.explore.judges.kit import DONE, READY, make_kit
from framework.explore.layout import Role
from framework.explore.serve import Snapshot, StateMachine, Workplace
from framework.explore.states import CrashClass, CrashState, Disks
from framework.targets.errors import InfrastructureError
from framework.targets.machine import Machine, architecture_of

MEMORY = "256M"
START_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 60.0
_CONSOLES = {"aarch64": "ttyAMA0", "arm": "ttyAMA0"}


@frozen
class Mounted:
    """What a real kernel made of a data partition.

    Attributes:
        crash_class, state: which one.
        clean: it mounts, and e2fsck finds nothing afterwards.
        digests: the synced files' SHA-256, None for one that is gone.
        disagreement: how it differs from what the data judge said; empty if it does not.
        seconds: how long it took.
    """

    crash_class: CrashClass
    state: CrashState
    clean: bool
    digests: Mapping[str, str | None]
    disagreement: str
    seconds: float


class MountJudge:
    """Has a real kernel mount data partitions."""

    name = "mount"

    def __init__(self, context: Context, data: DataJudge, machine: Machine) -> None:
        self._context = context
        self._data = data
        regions = [r for r in context.layout.all_regions() if r.role is Role.DATA]
        if len(regions) != 1:
            raise InfrastructureError(f"{len(regions)} data partitions: one can be probed")
        self._part = regions[0].ranges[0]
        console = _CONSOLES.get(architecture_of(machine.program), "ttyS0")
        self._machine = replace(
            machine,
            firmware=None,
            pflash=None,
            memory=MEMORY,
            network=None,
            watchdog="",
            boot_args=f"console={console} loglevel=1 panic=1 mitigations=off",
        )
        self._making = threading.Lock()
        self._made: dict[Workplace, tuple[Machine, Snapshot]] = {}

    def check(self, crash_class: CrashClass, state: CrashState, place: Workplace) -> Mounted:
        """Mount a state's data partition; the data judge must have checked its class.

        Raises InfrastructureError if the guest gets nowhere, KitError if there is none to start.
        """
        known = self._data.checked[self._data.key(crash_class)]
        with state.disks(self._context.journal) as disks:
            mine = self._only_data(disks)
            with self._making:
                if place not in self._made:
                    self._made[place] = self._start(disks, place)
            machine, snapshot = self._made[place]
            with StateMachine(machine, mine, place) as running:
                heard = running.run([DONE], PROBE_TIMEOUT_S, max_starts=1, snapshot=snapshot)
        if heard.ended != "matched":
            raise InfrastructureError(
                f"the probing guest {heard.ended} on {state}", evidence=heard.tail
            )
        match = heard.matches[-1]
        told = [None if word == "-" else word for word in match["files"].split()]
        digests = dict(zip(self._data.paths, told, strict=True)) if told else {}
        clean = match["mounted"] == "1" and match["check"] == "0"
        if differs := _compare(clean, digests, known):
            differs += f" ({state})"
        return Mounted(crash_class, state, clean, digests, differs, heard.seconds)

    def _only_data(self, disks: Disks) -> Disks:
        return Disks({self._part.device: disks[self._part.device]})

    def _start(self, disks: Disks, place: Workplace) -> tuple[Machine, Snapshot]:
        """Start the guest, and keep it from before it sees a disk."""
        slot = self._context.layout.region(self._context.slots["a"]).ranges[0]
        with Disks(self._context.journal.initial()) as first:
            kit = make_kit(
                first,
                slot,
                self._part,
                self._context.repair,
                paths=self._data.paths,
                folder=place.run.path,
            )
        machine = replace(
            self._machine,
            kernel=kit.kernel,
            extra_args=(*self._machine.extra_args, "-initrd", str(kit.initrd)),
        )
        with StateMachine(machine, self._only_data(disks), place) as running:
            path = place.run.path / "probe-snapshot"
            return machine, running.snapshot(READY, b"\n", path, START_TIMEOUT_S)


def _compare(clean: bool, digests: Mapping[str, str | None], known: DataContent) -> str:
    """How the kernel's finding differs from the data judge's."""
    if clean != known.clean:
        mine, its = ("sound" if is_clean else "damaged" for is_clean in (clean, known.clean))
        return f"the data judge finds the data partition {its}, a kernel {mine}"
    if not clean:
        return ""
    for path, digest in digests.items():
        if digest != known.digests.get(path):
            return f"the data judge reads {path} as {known.digests.get(path)}, a kernel as {digest}"
    return ""
