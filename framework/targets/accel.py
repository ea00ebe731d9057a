"""Which accelerator a guest may use here: probed, never assumed.

A `/dev/kvm` that opens proves nothing: on some hosts firmware and 16-bit code run and the guest
then hangs. So: static hints first (no device, another architecture, no vmx/svm flag, a
paravirtual KVM module), then a tiny guest (probe_payloads.py) or, if given, a real kernel is
started under KVM with a deadline, and only its own serial output counts. Everything else is
TCG. The answer is kept per boot of this machine, because it cannot change in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from framework.console import ConsoleError, ConsoleLost, ConsolePump, SocketTransport
from framework.targets.errors import RigError
from framework.targets.machine import architecture_of
from framework.targets.probe_payloads import AARCH64_FIRMWARE, MARKER, X86_FLOPPY
from framework.targets.process import MachineProcess
from framework.targets.rundir import RunDirectory

__all__ = ["Accelerator", "cache_directory", "choose", "probe"]

_KVM = Path("/dev/kvm")
_DEADLINE_S = 3.0
_FAMILY = {"x86_64": "x86", "i386": "x86", "amd64": "x86", "aarch64": "arm64", "arm64": "arm64"}


@dataclass(frozen=True)
class Accelerator:
    """`name` is QEMU's (`tcg` or `kvm`); `reason` says in a few words how that is known."""

    name: str
    reason: str


def cache_directory() -> Path:
    """Where answers are kept: `brownout` below XDG_CACHE_HOME (default `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(root) / "brownout"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def static_hint(
    guest: str, host: str, *, kvm_usable: bool, cpu_flags: frozenset[str], pvm: bool
) -> str | None:
    """Why KVM cannot work, as far as that shows without trying; None if it may."""
    if _FAMILY.get(guest) != _FAMILY.get(host, host):
        return f"a guest for {guest} on a machine of {host}"
    if not kvm_usable:
        return f"{_KVM} is missing or may not be opened"
    if pvm:
        return "KVM is a paravirtual one (kvm_pvm), under which ordinary guests hang"
    if _FAMILY[guest] == "x86" and not cpu_flags & {"vmx", "svm"}:
        return "this CPU shows neither vmx nor svm"
    return None


def _cpu_flags() -> frozenset[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _kvm_usable() -> bool:
    try:
        os.close(os.open(_KVM, os.O_RDWR))
    except OSError:
        return False
    return True


def _guest_arguments(program: str, directory: Path, kernel: Path | None) -> tuple[list[str], str]:
    if kernel is not None:
        console = "ttyAMA0" if architecture_of(program) == "aarch64" else "ttyS0"
        append = f"console={console} earlyprintk=serial panic=-1"
        return ["-m", "256", "-kernel", str(kernel), "-append", append], "Linux version"
    if architecture_of(program) == "aarch64":
        firmware = directory / "probe.bin"
        firmware.write_bytes(AARCH64_FIRMWARE)
        return ["-m", "64", "-bios", str(firmware)], MARKER
    floppy = directory / "probe.img"
    floppy.write_bytes(X86_FLOPPY)
    drive = f"if=floppy,format=raw,readonly=on,file={floppy}"
    return ["-m", "64", "-drive", drive], MARKER


def runs(
    program: str,
    accelerator: str,
    *,
    kernel: Path | None = None,
    deadline_s: float = _DEADLINE_S,
) -> str | None:
    """Start a tiny guest (or `kernel`) under `accelerator`; None if it spoke, else what it did.

    The guest is ended for certain, whatever it did.
    """
    directory = RunDirectory.create()
    ours, theirs = socket.socketpair()
    process: MachineProcess | None = None
    try:
        guest, marker = _guest_arguments(program, directory.path, kernel)
        machine = "virt" if architecture_of(program) == "aarch64" else "pc"
        cpu: Sequence[str] = ("-cpu", "host") if accelerator == "kvm" else ()
        if not cpu and machine == "virt":
            cpu = ("-cpu", "cortex-a57")
        fd = theirs.fileno()
        command = [program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", machine, "-accel", accelerator, *cpu, *guest]
        command += ["-chardev", f"socket,id=console,fd={fd}", "-serial", "chardev:console"]
        with ConsolePump("accelerator probe", deaths=()) as pump:
            process = MachineProcess(
                command,
                output_path=directory.path / "output",
                pass_fds=(fd,),
                environment=directory.environment,
            )
            theirs.close()
            pump.attach(SocketTransport(ours))
            try:
                pump.wait_for(marker, deadline_s, since=0)
            except ConsoleLost:
                process.exited.wait(deadline_s)
                return f"QEMU gave up ({process.output()})"
            except ConsoleError:
                return f"no answer within {deadline_s:g} s"
            return None
    finally:
        theirs.close()
        ours.close()
        if process is not None:
            process.kill()
        directory.remove()


def probe(
    program: str,
    *,
    kernel: Path | None = None,
    deadline_s: float = _DEADLINE_S,
    use_hints: bool = True,
) -> Accelerator:
    """Find out, without the cache, what the guests of `program` may use on this machine."""
    if use_hints:
        hint = static_hint(
            architecture_of(program),
            platform.machine(),
            kvm_usable=_kvm_usable(),
            cpu_flags=_cpu_flags(),
            pvm=Path("/sys/module/kvm_pvm").exists(),
        )
        if hint is not None:
            return Accelerator("tcg", hint)
    what = "a kernel" if kernel is not None else "a test guest"
    problem = runs(program, "kvm", kernel=kernel, deadline_s=deadline_s)
    if problem is None:
        return Accelerator("kvm", f"{what} ran under KVM")
    return Accelerator("tcg", f"{what} did not run under KVM: {problem}")


def choose(
    wanted: str, program: str, *, kernel: Path | None = None, cache: Path | None = None
) -> Accelerator:
    """The accelerator for `wanted` (`auto`, `tcg`, `kvm`); `RigError` if `kvm` cannot be had."""
    if wanted == "tcg":
        return Accelerator("tcg", "as the rig says")
    answer = _cached_probe(program, kernel, cache or cache_directory())
    if wanted == "kvm" and answer.name != "kvm":
        raise RigError(
            f"accelerator: kvm cannot be used: {answer.reason}; write 'accelerator: auto'"
        )
    return answer


def _cached_probe(program: str, kernel: Path | None, cache: Path) -> Accelerator:
    path = cache / f"accelerator-{architecture_of(program)}.json"
    key = {
        "boot_id": _boot_id(),
        "program": str(Path(program).resolve()),
        "kernel": str(kernel) if kernel else "",
        "kvm": _kvm_usable(),
    }
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return Accelerator(str(stored["answer"]["name"]), str(stored["answer"]["reason"]))
    answer = probe(program, kernel=kernel)
    with contextlib.suppress(OSError):  # a cache that cannot be written is only slower
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as file:
            json.dump({"key": key, "answer": asdict(answer)}, file)
        Path(file.name).replace(path)
    return answer
