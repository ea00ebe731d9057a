"""What a QEMU machine consists of, as values, and its command line, as a pure function.

The YAML of a rig says it with plain dictionaries; `Disk.parse` and `Network.parse` turn these
into values and refuse what they do not know, in one line that names the key. The option names
are QEMU 7.2's (qemu-system-*(1), docs/interop/qemu-storage-daemon for `-blockdev nbd`).

Nothing here touches a file, a socket or a process.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.targets.errors import RigError

__all__ = [
    "Disk",
    "Forward",
    "Machine",
    "Network",
    "architecture_of",
    "command_line",
    "parse_address",
    "refuse_unknown",
]

INTERFACES = ("virtio", "sd", "ide")
WATCHDOGS = ("i6300esb",)
INSTRUCTION_SHIFT = 0
"""A deterministic machine's instruction takes 2 to this power nanoseconds: so few that a start is
over before the kernel's timers (5 s, 30 s) write back what it left; at 4 (16 ns) they came amid it.
"""
_NAME = re.compile(r"[a-z][a-z0-9]{0,15}")
_PACKAGES = {
    "aarch64": "qemu-system-arm",
    "arm": "qemu-system-arm",
    "x86_64": "qemu-system-x86",
    "i386": "qemu-system-x86",
    "riscv64": "qemu-system-misc",
}


def architecture_of(program: str) -> str:
    """The guest architecture of a QEMU program by its name: `qemu-system-aarch64` → `aarch64`."""
    return Path(program).name.removeprefix("qemu-system-")


def package_of(program: str) -> str:
    """The Debian package that holds a QEMU program."""
    return _PACKAGES.get(architecture_of(program), "qemu-system")


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """`RigError` naming the first unknown key in `where` and what was probably meant."""
    known = sorted(known)
    for key in given:
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise RigError(f"{where}: unknown key {key!r} ({meant})")


def _mapping(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RigError(f"{where}: must be a mapping, not {value!r}")
    return value


def _text(where: str, values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise RigError(f"{where}.{key}: must be a non-empty string, not {value!r}")
    return value


def _port(where: str, value: object, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= 65535:
        raise RigError(f"{where}: must be a port number from {lowest} to 65535, not {value!r}")
    return value


def parse_address(where: str, value: object) -> int | None:
    """A PCI device number, or None; boot scripts may rely on where a device sits."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 31:
        raise RigError(f"{where}: must be a PCI device number from 0 to 31, not {value!r}")
    return value


def _at(address: int | None) -> str:
    return "" if address is None else f",addr={address:#x}"


@dataclass(frozen=True)
class Disk:
    """One disk: `name` (also in the journal), `image` (a key of `images:`), `interface`.

    `size_bytes` grows the disk beyond its image with zeroes; None: as large as the image.
    `address` is the PCI device number; None: QEMU's choice.
    """

    name: str
    image: str
    interface: str = "virtio"
    size_bytes: int | None = None
    address: int | None = None

    @classmethod
    def parse(cls, where: str, value: object) -> Disk:
        """A disk from its dictionary in the rig file."""
        values = _mapping(where, value)
        refuse_unknown(where, values, ("name", "image", "interface", "size_bytes", "address"))
        name = _text(where, values, "name")
        if not _NAME.fullmatch(name):
            raise RigError(f"{where}.name: {name!r} must be like 'vda' (a-z, digits, at most 16)")
        interface = values.get("interface", "virtio")
        if interface not in INTERFACES:
            raise RigError(
                f"{where}.interface: {interface!r} is not one of {', '.join(INTERFACES)}"
            )
        size = values.get("size_bytes")
        if size is not None and (not isinstance(size, int) or size <= 0 or size % 512):
            raise RigError(f"{where}.size_bytes: {size!r} is not a positive multiple of 512")
        address = parse_address(f"{where}.address", values.get("address"))
        return cls(name, _text(where, values, "image"), interface, size, address)

    @classmethod
    def parse_all(cls, where: str, value: object) -> tuple[Disk, ...]:
        """The list of disks; two of the same name are refused."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise RigError(f"{where}: must be a list of disks, not {value!r}")
        disks = tuple(cls.parse(f"{where}[{index}]", item) for index, item in enumerate(value))
        names = [disk.name for disk in disks]
        for name in names:
            if names.count(name) > 1:
                raise RigError(f"{where}: two disks are called {name!r}")
        return disks


@dataclass(frozen=True)
class Forward:
    """A TCP port of the guest offered on this machine's loopback; `host` 0: any free port."""

    guest: int
    host: int = 0


@dataclass(frozen=True)
class Network:
    """QEMU's user-mode network: the guest reaches this machine as 10.0.2.2."""

    device: str = "virtio-net-pci"
    forward: tuple[Forward, ...] = ()
    address: int | None = None

    @classmethod
    def parse(cls, where: str, value: object) -> Network | None:
        """`none`, `user`, or `{device, address, forward: [{guest, host}]}`."""
        if value is None or value == "none":
            return None
        if value == "user":
            return cls()
        if isinstance(value, str):
            raise RigError(f"{where}: {value!r} is neither 'user' nor 'none' nor a mapping")
        values = _mapping(where, value)
        refuse_unknown(where, values, ("device", "forward", "address"))
        forwards = []
        for index, item in enumerate(values.get("forward", ())):
            place = f"{where}.forward[{index}]"
            entry = _mapping(place, item)
            refuse_unknown(place, entry, ("guest", "host"))
            guest = _port(f"{place}.guest", entry.get("guest"), 1)
            forwards.append(Forward(guest, _port(f"{place}.host", entry.get("host", 0), 0)))
        device = values.get("device", "virtio-net-pci")
        if not isinstance(device, str):
            raise RigError(f"{where}.device: must be a string, not {device!r}")
        return cls(
            device, tuple(forwards), parse_address(f"{where}.address", values.get("address"))
        )


@dataclass(frozen=True)
class Machine:
    """Everything about a machine that stays the same from boot to boot."""

    program: str
    machine: str
    cpu: str
    memory: str
    accelerator: str
    cpus: int = 1
    firmware: Path | None = None
    pflash: Path | None = None
    kernel: Path | None = None
    boot_args: str = ""
    disks: tuple[Disk, ...] = ()
    network: Network | None = None
    watchdog: str = ""
    watchdog_address: int | None = None
    extra_args: tuple[str, ...] = ()
    clock: str = ""
    """What the hardware clock says at power-on (UTC, ISO 8601); empty: the right time."""
    deterministic: bool = False
    """Whether its time is counted in instructions, and leaps to its next timer while it waits.

    It has no watchdog then: while it waits for its disk, a host's milliseconds are seconds to it.
    """


def _disk_arguments(disk: Disk, socket: Path, export: str) -> list[str]:
    node = f"disk-{disk.name}"
    backend = {
        "driver": "nbd",
        "node-name": node,
        "server": {"type": "unix", "path": str(socket)},
        "export": export,
        "discard": "unmap",
        # The recorder must see what the guest sends, when it sends it.
        "cache": {"direct": True, "no-flush": False},
    }
    arguments = ["-blockdev", json.dumps(backend)]
    # An error must reach the guest: QEMU's default would pause the machine on ENOSPC.
    errors = "werror=report,rerror=report"
    match disk.interface:
        case "virtio":
            # A thread of its own: in QEMU's main loop, copying to the recorder's socket would keep
            # the lock that a guest's CPU needs (8 % of a bulk write; tests/benchmarks/recorder.py).
            thread = f"{disk.name}-io"
            arguments += ["-object", f"iothread,id={thread}"]
            device = f"virtio-blk-pci,drive={node},id={disk.name},write-cache=on,discard=on"
            device += f",iothread={thread}"
            arguments += ["-device", f"{device},{errors}{_at(disk.address)}"]
        case "sd":
            arguments += ["-device", f"sdhci-pci,id={disk.name}-host{_at(disk.address)}"]
            arguments += ["-device", f"sd-card,drive={node},id={disk.name}"]
        case "ide":
            arguments += ["-device", f"ide-hd,drive={node},id={disk.name},write-cache=on,{errors}"]
        case other:  # pragma: no cover - Disk.parse refuses it
            raise RigError(f"disk {disk.name}: unknown interface {other!r}")
    return arguments


def _network_arguments(network: Network | None) -> list[str]:
    if network is None:
        return ["-nic", "none"]
    backend = "user,id=net0,ipv6=off"
    for forward in network.forward:
        backend += f",hostfwd=tcp:127.0.0.1:{forward.host}-:{forward.guest}"
    device = f"{network.device},netdev=net0,id=nic0,romfile={_at(network.address)}"
    return ["-netdev", backend, "-device", device]


def _time_arguments(machine: Machine) -> list[str]:
    """The machine's clocks: the host's, or counted in instructions (qemu-system(1), `-icount`).

    The seed is of what QEMU itself gives a guest by chance: its device tree's, RDRAND's.
    """
    clock = [f"base={machine.clock}"] if machine.clock else []
    counted = []
    if machine.deterministic:
        counted = ["-icount", f"shift={INSTRUCTION_SHIFT},sleep=off", "-seed", "1"]
        clock.append("clock=vm")
    return counted + (["-rtc", ",".join(clock)] if clock else [])


def command_line(
    machine: Machine,
    *,
    console_fd: int,
    qmp_fd: int,
    exports: Mapping[str, tuple[Path, str]],
) -> list[str]:
    """QEMU's command line: paused at start, console and QMP on inherited file descriptors.

    `exports` has the NBD socket and export name of each disk, by the disk's name.
    """
    arguments = [machine.program, "-nodefaults", "-no-user-config", "-display", "none"]
    arguments += ["-machine", machine.machine, "-accel", machine.accelerator]
    arguments += ["-cpu", machine.cpu, "-m", machine.memory, "-smp", str(machine.cpus)]
    # `-S`: nothing may run before the monitor is listened to. No `-no-reboot`, although a reset
    # ends this QEMU: when it exits by itself it flushes its disks, and a real board's reset
    # button does not. The driver kills it at the RESET event and starts another.
    arguments += ["-S"]
    arguments += ["-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"]
    arguments += ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    if machine.firmware is not None:
        arguments += ["-bios", str(machine.firmware)]
    if machine.pflash is not None:
        image = str(machine.pflash).replace(",", ",,")
        arguments += ["-drive", f"if=pflash,index=1,format=raw,readonly=on,file={image}"]
    if machine.kernel is not None:
        arguments += ["-kernel", str(machine.kernel), "-append", machine.boot_args]
    for disk in machine.disks:
        arguments += _disk_arguments(disk, *exports[disk.name])
    arguments += _network_arguments(machine.network)
    arguments += _time_arguments(machine)
    if machine.watchdog and not machine.deterministic:
        arguments += ["-device", machine.watchdog + _at(machine.watchdog_address)]
        arguments += ["-action", "watchdog=reset"]
    arguments += machine.extra_args
    return arguments
