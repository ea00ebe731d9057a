"""A real board as a scenario sees it: what the disk holds is read by the device, over its console.

A board has no recorder, so the witness of the disk is the medium as the running kernel reads it,
past its page cache (O_DIRECT): the slots hashed, the copies of the boot environment fetched, both
judged here. That can only be done while the device runs, so after a cut the first look comes with
the first boot, and a device that never boots is judged by its console alone (it is never BRICKED
here: that takes two witnesses). Each boot is judged against the look that follows it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import define, field

from framework.console import ConsoleError, ConsoleTimeout
from framework.disk.ubootenv import parse_environment
from framework.scenario.device import CANARY_PATH, COMMAND_TIMEOUT_S, Device
from framework.scenario.inspect import EXT4_MAGIC, reduce_environment
from framework.scenario.manifest import Extent, TargetManifest
from framework.targets.errors import InfrastructureError
from framework.targets.strategy import BootOutcome
from framework.verdict import (
    BootEnvironment,
    BootSeen,
    DataChecked,
    DiskSeen,
    ImageFacts,
    PowerCut,
    SlotContent,
    SlotState,
)

__all__ = ["BoardDevice", "disk_seen", "look_command"]

LOOK_TIMEOUT_S = 240.0
REBOOT_NOTICED_S = 30.0
OWN_DRIVE = "the board's own drive"

#: Runs on the device. Its argument: slots as `[node, offset, [size...]]`, copies of the environment
#: as `[node, offset, length]`.
_LOOKER = """
import sys,os,json,mmap,hashlib,zlib,base64
slots,copies=json.loads(sys.argv[1])
B=1<<20
m=mmap.mmap(-1,B)
def blocks(node,at,n):
 f=os.open(node,os.O_RDONLY|os.O_DIRECT)
 while n>0:
  got=os.preadv(f,[memoryview(m)[:min(B,-(-n//4096)*4096)]],at)
  if got<=0:break
  got=min(got,n)
  yield m[:got]
  at+=got;n-=got
 os.close(f)
def slot(node,at,sizes):
 head=b"".join(blocks(node,at,4096))
 h=hashlib.sha256();d={};done=0
 for size in sizes:
  for b in blocks(node,at+done,size-done):h.update(b)
  done=size;d[size]=h.copy().hexdigest()
 return [head[1080:1082].hex(),d]
def safe(f,*a):
 try:return f(*a)
 except OSError as e:return str(e)
def copy(*a):return base64.b64encode(zlib.compress(b"".join(blocks(*a)))).decode()
print("LOOK "+json.dumps([[safe(slot,*s) for s in slots],[safe(copy,*c) for c in copies]]))
"""


def look_command(
    manifest: TargetManifest, images: Iterable[ImageFacts], disks: Mapping[str, str]
) -> str:
    """The shell command that prints what a look needs, in one line that begins with LOOK."""
    sizes = sorted({image.size_bytes for image in images})

    def node(extent: Extent) -> str:
        try:
            return disks[extent.device]
        except KeyError as error:
            raise InfrastructureError(
                f"the rig does not say which device node the disk {extent.device} is ('disks:')"
            ) from error

    slots = [[node(s), s.offset, sizes] for s in manifest.slots.values()]
    copies = [[node(c), c.offset, c.length] for c in manifest.environment]
    program = base64.b64encode(zlib.compress(_LOOKER.encode(), 9)).decode()
    asked = json.dumps([slots, copies], separators=(",", ":"))
    return (
        "python3 -c 'import base64,zlib;"
        f"exec(zlib.decompress(base64.b64decode(\"{program}\")))' '{asked}'"
    )


def disk_seen(
    moment: str, printed: str, manifest: TargetManifest, images: Iterable[ImageFacts]
) -> DiskSeen:
    """What the look's output says. InfrastructureError if it is no such output."""
    told = [line for line in printed.splitlines() if line.startswith("LOOK ")]
    try:
        slots, copies = json.loads(told[-1].removeprefix("LOOK "))
        states = dict(
            zip(manifest.slots, [_slot(slot, list(images)) for slot in slots], strict=True)
        )
        contents = [_copy(copy) for copy in copies]
        if len(contents) != len(manifest.environment):
            raise ValueError("copies are missing")
    except (IndexError, ValueError, TypeError, zlib.error) as error:
        raise InfrastructureError(
            "the serial line garbled what the device told of its disk", evidence=printed[-200:]
        ) from error
    found = parse_environment(contents)
    environment = reduce_environment(found.valid_copies, found.variables, manifest)
    return DiskSeen(moment, states, environment)


def _slot(told: Any, images: list[ImageFacts]) -> SlotState:
    if isinstance(told, str):  # the error that reading it gave
        return SlotState(SlotContent.MIXED)
    magic, digests = told
    if magic != EXT4_MAGIC.hex():
        return SlotState(SlotContent.UNLOADABLE)
    for image in images:
        if digests[str(image.size_bytes)] == image.sha256:
            return SlotState(SlotContent.IMAGE, image.name)
    return SlotState(SlotContent.MIXED)


def _copy(told: Any) -> bytes | None:
    with contextlib.suppress(ValueError, zlib.error):
        return zlib.decompress(base64.b64decode(told, validate=True))
    if isinstance(told, str) and told.startswith("[Errno"):
        return None
    raise ValueError("no copy of an environment")


@define
class BoardDevice(Device):
    """A board; see the module text.

    Attributes:
        disks: the device node of each of the manifest's disks.
    """

    disks: Mapping[str, str] = field(factory=dict)

    def boot(self) -> BootSeen:
        """As `Device.boot`; a board that does not come up is recovered, a few times."""
        machine: Any = self.machine
        boot = super().boot()
        for attempt in range(2, machine.recovery_attempts + 1):
            if boot.ready or machine.recovery is None:
                break
            self.note("rig", f"the board did not come up; recovery {attempt}")
            self.events.clear()  # what a run's beginning was is no event of the run
            self.strategy.transition("off")
            machine.fresh()
            boot = super().boot()
        if boot.ready:
            self._require_known_good(boot)
        return boot

    def reboot(self) -> BootSeen | None:
        """Restart the device; its console stays, so that the next banner says that it took it."""
        with self._step("rebooting", "boot"):
            pump = self.machine.pump
            self.strategy.run("sync", COMMAND_TIMEOUT_S)
            since = pump.position
            strategy: Any = self.strategy
            strategy.leave_shell()
            pump.write(b"reboot -f\n")
            try:
                pump.wait_for(strategy.first_sign, REBOOT_NOTICED_S, since, deaths=False)
            except ConsoleTimeout as error:
                raise InfrastructureError(
                    "the device did not restart when it was told to", evidence=pump.tail()
                ) from error
            except ConsoleError:
                pass  # the power went: told by what comes next
            return self._seen(self.strategy.await_boot(since, adopt=False))

    def power_went(self) -> None:
        """Witness a power cut; the disk can be read when the device is up again."""
        loss = self._require_cut()
        self._event(PowerCut(0, OWN_DRIVE, 0))
        self.note("power", loss.cause)

    def look(self, moment: str) -> DiskSeen:
        """Have the device read its slots and boot environment; before it runs, see nothing."""
        if self.running is None or not self.running.ready:
            self.note("disk", f"{moment}: not to be seen from outside")
            return DiskSeen(moment, {}, BootEnvironment(valid_copies=0))
        seen = self._read(moment)
        self._event(seen)
        self._note_look(seen)
        return seen

    def check_data(self) -> None:
        """Check the mounted data partition, and the file that was synced at the start."""
        if self.canary_sha256 is None or self.running is None or not self.running.ready:
            return
        result = self.strategy.run(
            f"grep -c ' /data .* rw' /proc/mounts; dmesg | grep -c 'EXT4-fs error';"
            f" sha256sum /data{CANARY_PATH}",
            COMMAND_TIMEOUT_S,
        )
        lines = [line.strip() for line in result.lines if line.strip()]
        if len(lines) < 2 or not (lines[0].isdigit() and lines[1].isdigit()):
            raise InfrastructureError(
                "the data partition could not be checked", evidence=result.text
            )
        clean = lines[0] == "1" and lines[1] == "0"
        intact = len(lines) > 2 and lines[2].split()[0] == self.canary_sha256
        state = "mounted, no errors" if clean else f"damaged: {result.text[-200:]}"
        checked = DataChecked(
            clean, intact, f"{state}, synced file {'intact' if intact else 'lost'}"
        )
        self._event(checked)
        self.note("disk", f"data partition: {checked.detail}")

    # -- inside -------------------------------------------------------------------------------

    def _seen(self, outcome: BootOutcome) -> BootSeen | None:
        """A boot comes into the events after the look that it is judged by."""
        if outcome.ready and self.canary_sha256 is not None:
            before, self.running = self.running, BootSeen(ready=True)
            try:
                self.look("with the start")
            finally:
                self.running = before
        return super()._seen(outcome)

    def _read(self, moment: str) -> DiskSeen:
        command = look_command(self.manifest, self.images.values(), self.disks)
        result = self.strategy.run(command, LOOK_TIMEOUT_S)
        if result.code != 0:
            raise InfrastructureError(
                "the device could not read its disk", evidence=result.text[-300:]
            )
        return disk_seen(moment, result.text, self.manifest, self.images.values())

    def _require_known_good(self, boot: BootSeen) -> None:
        """A scenario begins on the golden image, committed; else its verdict would say nothing."""
        seen = self.look("at the beginning")
        there = seen.slots.get(boot.slot or "")
        if (
            there is None
            or there.image != self.base.name
            or boot.version != self.base.name
            or seen.environment.upgrade_available
        ):
            raise InfrastructureError(
                f"the board does not begin with {self.base.name}, committed: it runs "
                f"{boot.version}, slot {boot.slot} holds {there}"
            )
