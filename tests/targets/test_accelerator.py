"""The accelerator is found out, and never left hanging."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from framework.targets import accel, probe_payloads
from framework.targets.accel import Accelerator, choose, probe, runs, static_hint
from framework.targets.errors import RigError
from framework.targets.rundir import base_directory

VMX = frozenset({"fpu", "vmx"})
PROGRAMS = ("qemu-system-x86_64", "qemu-system-aarch64")


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.mark.parametrize(
    ("guest", "host", "kvm", "flags", "pvm", "said"),
    [
        ("x86_64", "x86_64", True, VMX, False, None),
        ("aarch64", "aarch64", True, frozenset(), False, None),
        ("aarch64", "x86_64", True, VMX, False, "a guest for aarch64"),
        ("x86_64", "x86_64", False, VMX, False, "missing or may not be opened"),
        ("x86_64", "x86_64", True, VMX, True, "paravirtual"),
        ("x86_64", "x86_64", True, frozenset({"fpu"}), False, "neither vmx nor svm"),
    ],
)
def test_hints_rule_kvm_out_but_never_in(  # noqa: PLR0917
    guest: str, host: str, kvm: bool, flags: frozenset[str], pvm: bool, said: str | None
) -> None:
    hint = static_hint(guest, host, kvm_usable=kvm, cpu_flags=flags, pvm=pvm)
    assert hint is None if said is None else said in (hint or "")


@pytest.mark.emulated
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_test_guests_really_run(name: str) -> None:
    assert runs(program(name), "tcg", deadline_s=20) is None


@pytest.mark.emulated
def test_a_guest_that_hangs_is_noticed_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A guest as a bad hypervisor makes it: it starts and never gets to its line.
    hanging = b"\xeb\xfe".ljust(510, b"\0") + b"\x55\xaa"
    monkeypatch.setattr(accel, "X86_FLOPPY", hanging.ljust(65536, b"\0"))
    before = set(base_directory().iterdir())
    began = time.monotonic()
    said = runs(program("qemu-system-x86_64"), "tcg", deadline_s=1)
    assert said is not None
    assert "1 s" in said
    assert time.monotonic() - began < 8
    assert set(base_directory().iterdir()) <= before
    assert b"qemu-system" not in _children()


def _children() -> bytes:
    """The command lines of this process's children (proc(5))."""
    lines = b""
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                lines += Path(f"/proc/{pid}/cmdline").read_bytes() + b"\n"
    return lines


@pytest.mark.emulated
def test_the_probe_answers_in_time_whatever_kvm_does() -> None:
    began = time.monotonic()
    answer = probe(program("qemu-system-x86_64"), use_hints=False)
    assert time.monotonic() - began < 10
    assert answer.name in ("tcg", "kvm")
    hinted = probe(program("qemu-system-x86_64"))
    if answer.name == "tcg":
        assert hinted.name == "tcg", "a hint must not promise what the guest does not show"


def test_the_answer_is_kept_for_this_boot_and_asked_again_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def count(name: str, **_: object) -> Accelerator:
        asked.append(name)
        return Accelerator("tcg", "counted")

    monkeypatch.setattr(accel, "probe", count)
    for _ in range(3):
        assert choose("auto", "qemu-system-x86_64", cache=tmp_path).reason == "counted"
    assert len(asked) == 1
    monkeypatch.setattr(accel, "_boot_id", lambda: "another boot")
    choose("auto", "qemu-system-x86_64", cache=tmp_path)
    assert len(asked) == 2
    (stored,) = tmp_path.iterdir()
    stored.write_text("{ not json")
    choose("auto", "qemu-system-x86_64", cache=tmp_path)
    assert len(asked) == 3
    assert json.loads(stored.read_text())["answer"]["name"] == "tcg"


def test_kvm_by_order_is_an_error_where_it_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "probe", lambda *_, **__: Accelerator("tcg", "it hangs"))
    with pytest.raises(RigError, match="it hangs; write 'accelerator: auto'"):
        choose("kvm", "qemu-system-x86_64", cache=tmp_path)
    assert choose("tcg", "qemu-system-x86_64", cache=tmp_path / "unused").name == "tcg"
    assert not (tmp_path / "unused").exists()


def test_the_x86_guest_is_what_its_source_says(tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("ld") is None or os.uname().machine != "x86_64":
        pytest.skip("needs x86 binutils")
    source, made, flat = (tmp_path / name for name in ("probe.S", "probe.o", "probe.bin"))
    source.write_text(probe_payloads.X86_SOURCE)
    subprocess.run(["as", "--64", "-o", made, source], check=True)
    link = ["ld", "-m", "elf_x86_64", "-Ttext", "0x7c00", "--oformat", "binary", "-o", flat, made]
    subprocess.run(link, check=True, capture_output=True)
    assert flat.read_bytes() == probe_payloads.X86_FLOPPY[:512]


def test_the_arm64_guest_is_what_its_source_says(tmp_path: Path) -> None:
    if shutil.which("llvm-mc") is None or shutil.which("llvm-objcopy") is None:
        pytest.skip("needs llvm-mc")
    source, made, flat = (tmp_path / name for name in ("probe.S", "probe.o", "probe.bin"))
    source.write_text(probe_payloads.AARCH64_SOURCE)
    assemble = ["llvm-mc", "-triple=aarch64", "-filetype=obj", "-o", made, source]
    subprocess.run(assemble, check=True)
    subprocess.run(["llvm-objcopy", "-O", "binary", "-j", ".text", made, flat], check=True)
    assert flat.read_bytes() == probe_payloads.AARCH64_FIRMWARE
