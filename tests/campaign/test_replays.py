"""Many bundles done again end in a table; one is opened at a cut, on a console or a debugger."""

from __future__ import annotations

import hashlib
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attrs import evolve, frozen
from disk_nbd_client import Client
from targets_rigs import DISK_BYTES, UBOOT, write_rig

from framework.campaign import Bundle, CutFacts, read_bundle, write_bundle
from framework.campaign.bundle import unpack_journal
from framework.campaign.replay import disk_sha256
from framework.campaign.replays import Again, replay_all
from framework.cli import main
from framework.disk import DeviceSpec, Recorder, VolatileCache

WORD = b"left-by-the-cut!"
BOOT_S = 60


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, Path]:
    """A bundle of a machine whose first cut left a word on the disk, and its rig file."""
    rig = write_rig(tmp_path / "rig")
    base = tmp_path / "rig" / "disk.img"
    recorder = Recorder([DeviceSpec("vda", base)], tmp_path / "run").start()
    with Client(recorder.endpoint("vda").socket, "vda") as client:
        client.write(4096, WORD * 32)
        client.flush()
    cut = recorder.cut(VolatileCache(), seed=1)
    with recorder.disk("vda") as disk:
        facts = CutFacts(cut.index, cut.operation, cut.model, cut.seed, {"vda": disk_sha256(disk)})
    with Client(recorder.endpoint("vda").socket, "vda") as client:
        client.write(4096, bytes(512))
        client.flush()
    recorder.cut(VolatileCache(), seed=2)
    recorder.close()
    made = Bundle(
        scenario="scenarios/test_power.py::test_x",
        title="Power cut",
        rig=str(rig),
        rig_text=rig.read_text(),
        run_seed=1,
        faults=("power cut at flush 1 (cache: volatile)",),
        steps=("power cut (volatile)",),
        verdict="PASS",
        cuts=(facts,),
        bases={"vda": (str(base), hashlib.sha256(bytes(DISK_BYTES)).hexdigest())},
    )
    path = tmp_path / "bundles" / "a.bundle"
    write_bundle(path, made, "", recorder.journal_path)
    return path, rig


@frozen
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def brownout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """The command, in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["brownout", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def test_a_folder_of_bundles_ends_in_a_table(
    bundle: tuple[Path, Path], brownout: Callable[..., Done]
) -> None:
    path, _ = bundle
    again = path.with_name("b.bundle")
    again.write_bytes(path.read_bytes())
    done = brownout("replay", "--disks-only", path.parent)
    assert done.code == 0, done.err
    assert "2 of 2 reproduced; 2 cuts rebuilt" in done.out
    uncut = evolve(read_bundle(path), cuts=())
    write_bundle(path.with_name("uncut.bundle"), uncut)
    done = brownout("replay", "--disks-only", path.parent)
    assert done.code == 0
    assert "2 of 2 reproduced; 2 cuts rebuilt; 1 had no power cut" in done.out
    (path.with_name("c.bundle")).write_bytes(b"PK no")
    done = brownout("replay", "--disks-only", path.parent)
    assert done.code == 1
    assert "2 of 3 reproduced" in done.out
    assert "not a bundle, or damaged" in " ".join(done.out.split())


def test_a_base_image_may_be_elsewhere_but_no_other(
    bundle: tuple[Path, Path], brownout: Callable[..., Done], tmp_path: Path
) -> None:
    path, rig = bundle
    (rig.parent / "disk.img").rename(tmp_path / "moved.img")
    assert brownout("replay", "--disks-only", path).code == 2
    done = brownout("replay", "--disks-only", path, "--base", f"vda={tmp_path / 'moved.img'}")
    assert done.code == 0, done.err
    path.with_name("b.bundle").write_bytes(path.read_bytes())
    moved = f"vda={tmp_path / 'moved.img'}"
    assert "2 of 2" in brownout("replay", "--disks-only", path.parent, "--base", moved).out
    (tmp_path / "moved.img").write_bytes(b"x" * DISK_BYTES)
    done = brownout("replay", "--disks-only", path, "--base", f"vda={tmp_path / 'moved.img'}")
    assert done.code == 2
    assert "build the images it was made of" in done.err


def test_a_disk_that_came_out_otherwise_is_told_of_its_bundle(
    bundle: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = bundle
    read = read_bundle(path)
    journal = unpack_journal(path, read, tmp_path / "journal")
    wrong = path.with_name("wrong.bundle")
    facts = evolve(read.cuts[0], disks={"vda": "0" * 64})
    write_bundle(wrong, evolve(read, cuts=(facts,)), "", journal)
    told: list[Again] = []
    replay_all([path, wrong], lambda _: Path("rig"), told.append, disks_only=True)
    assert [again.reproduced for again in told] == [True, False]
    assert told[1].told == "not the same: vda after cut 0 (operation 2)"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--console", "--cut", "5"], "has no cut 5: the run had 1, 0 to 0"),
        (["--console", "--rig", "none.yaml"], "none.yaml"),
    ],
)
def test_a_console_that_cannot_be_opened_is_one_clear_line(
    bundle: tuple[Path, Path], brownout: Callable[..., Done], arguments: list[str], says: str
) -> None:
    done = brownout("replay", bundle[0], *arguments)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_empty_folder_is_one_clear_line(tmp_path: Path, brownout: Callable[..., Done]) -> None:
    done = brownout("replay", tmp_path)
    assert (done.code, len(done.err.strip().splitlines())) == (2, 1)
    assert "has no file that ends in .bundle" in done.err


# -- a console and a debugger --------------------------------------------------------------------


class Talk:
    """A command that runs, its keys and what it says."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "framework.cli", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.said = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + BOOT_S
        while (found := re.search(pattern, self.said)) is None:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, left))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"no {pattern!r} in {self.said!r}"
            self.said += data.decode(errors="replace")
        return found

    def keys(self, keys: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys)
        self.process.stdin.flush()


@pytest.fixture
def talk() -> Iterator[list[Talk]]:
    begun: list[Talk] = []
    yield begun
    for each in begun:
        each.process.kill()
        each.process.wait()


needs_uboot = pytest.mark.skipif(not UBOOT.exists(), reason="needs Debian's u-boot-qemu")


@needs_uboot
@pytest.mark.emulated
def test_the_console_is_that_of_a_machine_on_the_disks_that_the_cut_left(
    bundle: tuple[Path, Path], talk: list[Talk]
) -> None:
    path, rig = bundle
    talk.append(one := Talk("replay", path, "--console", "--rig", rig))
    one.wait_for("console attached; Ctrl-] ends it")
    one.wait_for("stop autoboot")
    one.keys(b" ")
    one.wait_for("=> ")
    one.keys(b"virtio scan; virtio read 40000000 8 1; md.b 40000000 10\r")
    one.wait_for(WORD.decode().replace("!", r"\!"))
    one.keys(b"\x1d")
    assert one.process.wait(BOOT_S) == 0


@needs_uboot
@pytest.mark.emulated
def test_a_debugger_finds_the_machine_before_its_first_instruction(
    bundle: tuple[Path, Path], talk: list[Talk]
) -> None:
    path, rig = bundle
    talk.append(one := Talk("replay", path, "--gdb", "--rig", rig))
    port = int(one.wait_for(r"127\.0\.0\.1:(\d+)")[1])
    one.wait_for("console attached")
    with Debugger(port) as debugger:
        assert debugger.ask("?").startswith("T05"), "it is stopped"
        # The program counter of arm64 is the last of 33 registers of 8 bytes before CPSR's 4.
        registers = debugger.ask("g")
        assert registers[32 * 16 : 33 * 16] == "0" * 16, "nothing has run yet"
        assert "U-Boot" not in one.said
        debugger.say("c")
        one.wait_for("U-Boot 20")
    one.keys(b"\x1d")
    assert one.process.wait(BOOT_S) == 0


class Debugger:
    """As much of GDB's remote protocol as asks two questions (GDB manual, appendix E)."""

    def __init__(self, port: int) -> None:
        deadline = time.monotonic() + BOOT_S
        while True:
            try:
                self._link = socket.create_connection(("127.0.0.1", port), 5)
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "QEMU does not listen for a debugger"
                time.sleep(0.05)
        self._link.settimeout(BOOT_S)

    def __enter__(self) -> Debugger:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def say(self, text: str) -> None:
        self._link.sendall(f"${text}#{sum(text.encode()) % 256:02x}".encode())

    def ask(self, text: str) -> str:
        self.say(text)
        data = b""
        while (found := re.search(rb"\$([^#]*)#..", data)) is None:
            piece = self._link.recv(4096)
            assert piece, "the debugger's line is gone"
            data += piece
        self._link.sendall(b"+")
        return found[1].decode()
