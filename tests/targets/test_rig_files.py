"""Rig files: every one of ours is valid, and every mistake is one line that says what to do."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from targets_rigs import UBOOT, write_rig

from framework.targets import preflight
from framework.targets.errors import RigError
from framework.targets.machine import (
    Disk,
    Forward,
    Machine,
    Network,
    architecture_of,
    command_line,
    package_of,
)
from framework.targets.rig import check_rig, is_remote, load_rig

RIGS = Path(__file__).parents[2] / "rigs"
OURS = [path for path in sorted(RIGS.glob("*.yaml")) if not is_remote(load_rig(path))]


@pytest.mark.parametrize("rig", OURS, ids=lambda path: path.stem)
def test_our_rigs_have_no_key_that_nothing_reads(rig: Path) -> None:
    environment = load_rig(rig)
    assert environment.get_target() is not None
    assert environment.get_target_features()


@pytest.mark.parametrize("rig", OURS, ids=lambda path: path.stem)
def test_our_rigs_look_for_images_where_the_builder_puts_them(rig: Path) -> None:
    for path in load_rig(rig).config.get_images().values():
        assert Path(path).resolve().parent == RIGS.parent / "build" / rig.stem


Change = Callable[[dict[str, Any]], object]


def driver_of(rig: dict[str, Any]) -> dict[str, Any]:
    found = rig["targets"]["main"]["drivers"]["RecordedQEMUDriver"]
    assert isinstance(found, dict)
    return found


MISTAKES: list[tuple[str, Change, str]] = [
    ("top level", lambda r: r.update(target={}), "unknown key 'target' (did you mean 'targets'?)"),
    ("no targets", lambda r: r.pop("targets"), "has no 'targets:'"),
    (
        "driver key",
        lambda r: driver_of(r).update(watchdg="i6300esb"),
        "RecordedQEMUDriver: unknown key 'watchdg' (did you mean 'watchdog'?)",
    ),
    (
        "driver class",
        lambda r: r["targets"]["main"]["drivers"].update(ShelDriver={}),
        "unknown key 'ShelDriver' (did you mean 'ShellDriver'?)",
    ),
    (
        "resource class",
        lambda r: r["targets"]["main"].update(resources={"RawSerial": {}}),
        "resources: unknown key 'RawSerial'",
    ),
    (
        "target key",
        lambda r: r["targets"]["main"].update(feature=[]),
        "targets.main: unknown key 'feature' (did you mean 'features'?)",
    ),
    (
        "disk key",
        lambda r: driver_of(r).update(disks=[{"name": "vda", "imge": "disk"}]),
        "disks[0]: unknown key 'imge' (did you mean 'image'?)",
    ),
    (
        "disk interface",
        lambda r: driver_of(r).update(disks=[{"name": "a", "image": "disk", "interface": "nvme"}]),
        "disks[0].interface: 'nvme' is not one of virtio, sd, ide",
    ),
    (
        "two disks of one name",
        lambda r: driver_of(r).update(disks=[{"name": "vda", "image": "disk"}] * 2),
        "disks: two disks are called 'vda'",
    ),
    (
        "unknown image",
        lambda r: driver_of(r).update(firmware="uboot"),
        "RecordedQEMUDriver.firmware: no image 'uboot' under 'images:'",
    ),
    (
        "port number",
        lambda r: driver_of(r).update(network={"forward": [{"guest": 70000}]}),
        "network.forward[0].guest: must be a port number from 1 to 65535, not 70000",
    ),
    ("network", lambda r: driver_of(r).update(network="bridge"), "network: 'bridge' is neither"),
    ("memory", lambda r: driver_of(r).update(memory="lots"), "memory: 'lots' must be like 512M"),
    (
        "accelerator",
        lambda r: driver_of(r).update(accelerator="hvf"),
        "accelerator: 'hvf'; known: auto, tcg, kvm",
    ),
    ("import", lambda r: r.update(imports=["framework.targets.qmeu"]), "qmeu"),
    (
        "missing image",
        lambda r: r["images"].update(disk="../build/qemu-arm64x/disk.img"),
        "build/qemu-arm64x/disk.img is missing; build it: python -m images build qemu-arm64x",
    ),
    (
        "missing program",
        lambda r: driver_of(r).update(qemu_bin="qemu-system-riscv64"),
        "qemu-system-riscv64 is not installed: apt install qemu-system-misc",
    ),
]


@pytest.mark.parametrize(
    ("change", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES]
)
def test_a_mistake_is_one_line_with_file_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, said: str
) -> None:
    if "not installed" in said:
        real = shutil.which
        monkeypatch.setattr(preflight.shutil, "which", lambda n: None if "riscv" in n else real(n))
    path = write_rig(tmp_path / "rigs")
    rig = yaml.safe_load(path.read_text())
    change(rig)
    path.write_text(yaml.safe_dump(rig))
    with pytest.raises(RigError) as caught:
        check_rig(path)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert message.startswith(str(path)) or "image" in message


def test_a_rig_file_that_is_not_there_or_not_yaml(tmp_path: Path) -> None:
    with pytest.raises(RigError, match="no such rig file"):
        load_rig(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("targets: [unclosed")
    with pytest.raises(RigError) as caught:
        load_rig(bad)
    assert "\n" not in str(caught.value)
    bad.write_text("")
    with pytest.raises(RigError, match="empty"):
        load_rig(bad)


def test_pytest_refuses_a_bad_rig_in_one_line_with_a_non_zero_exit(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(rig.read_text().replace("network:", "netwrk:"))
    empty = tmp_path / "test_empty.py"
    empty.write_text("def test_nothing(): pass\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--lg-env", str(rig), str(empty)],
        capture_output=True,
        text=True,
        cwd=RIGS.parent,
        timeout=60,
        check=False,
    )
    assert ran.returncode != 0
    assert "unknown key 'netwrk'" in ran.stderr + ran.stdout
    assert "Traceback" not in ran.stderr + ran.stdout


# -- what is checked before anything is started -------------------------------------------


def test_a_port_in_use_is_named_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        rig = write_rig(tmp_path, network=f"{{forward: [{{guest: 22, host: {port}}}]}}")
        with pytest.raises(RigError, match=rf"port {port} on 127.0.0.1 .*'host: 0' takes any"):
            check_rig(rig)
    check_rig(rig)


def test_an_unusable_kvm_is_named_with_its_reason(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(rig.read_text().replace("memory:", "accelerator: kvm\n        memory:"))
    with pytest.raises(RigError, match=r"kvm cannot be used: .*; write 'accelerator: auto'"):
        check_rig(rig)  # an arm64 guest on this x86 machine, or no KVM


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"arch": "amd64"}, r"image .*disk.img is for amd64, but the machine is aarch64"),
        (
            {"arch": "arm64", "files": {"disk.img": {"size": 4096}}},
            r"is 8388608 bytes, its manifest says 4096",
        ),
    ],
)
def test_an_image_of_the_wrong_architecture_or_size_is_refused(
    tmp_path: Path, manifest: dict[str, Any], said: str
) -> None:
    rig = write_rig(tmp_path)
    check_rig(rig)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RigError, match=said):
        check_rig(rig)


def test_a_broken_manifest_is_told(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RigError, match=r"manifest\.json: unreadable manifest"):
        check_rig(rig)


@pytest.mark.parametrize("size", [0, 100, 513])
def test_a_file_that_is_no_disk_is_refused(tmp_path: Path, size: int) -> None:
    rig = write_rig(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(size))
    with pytest.raises(RigError, match="are not a disk"):
        check_rig(rig)


def test_an_sd_card_must_have_a_card_s_size(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(rig.read_text().replace("image: disk}", "image: disk, interface: sd}"))
    check_rig(rig)
    (tmp_path / "disk.img").write_bytes(bytes(3 << 20))
    with pytest.raises(RigError, match="power of two; set size_bytes: 4194304"):
        check_rig(rig)
    rig.write_text(rig.read_text().replace("sd}", "sd, size_bytes: 4194304}"))
    check_rig(rig)


def test_a_pflash_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    rig = write_rig(tmp_path)
    rig.write_text(rig.read_text().replace("memory:", "pflash: disk\n        memory:"))
    with pytest.raises(RigError, match="exactly 67108864"):
        check_rig(rig)


# -- the command line, as a pure function -----------------------------------------------


def options(arguments: list[str], name: str) -> list[str]:
    return [b for a, b in itertools.pairwise(arguments) if a == name]


def test_the_command_line_says_what_the_machine_is(tmp_path: Path) -> None:
    machine = Machine(
        program="/usr/bin/qemu-system-aarch64",
        machine="virt",
        cpu="cortex-a57",
        memory="512M",
        accelerator="tcg",
        firmware=UBOOT,
        pflash=tmp_path / "a,b.img",
        disks=(Disk("vda", "disk", address=1), Disk("mmc0", "card", "sd")),
        network=Network(forward=(Forward(22),), address=2),
        watchdog="i6300esb",
        watchdog_address=5,
        extra_args=("-smp", "2"),
    )
    sockets = {name: (tmp_path / "nbd.sock", name) for name in ("vda", "mmc0")}
    line = command_line(machine, console_fd=10, qmp_fd=11, exports=sockets)
    backends = [json.loads(value) for value in options(line, "-blockdev")]
    assert [backend["driver"] for backend in backends] == ["nbd", "nbd"]
    devices = options(line, "-device")
    virtio = next(device for device in devices if device.startswith("virtio-blk-pci"))
    assert "write-cache=on" in virtio
    assert "werror=report,rerror=report" in virtio
    assert virtio.endswith("addr=0x1")
    assert "sd-card,drive=disk-mmc0,id=mmc0" in devices
    assert "i6300esb,addr=0x5" in devices
    assert "-S" in line
    assert "-no-reboot" not in line
    assert any("file=" in drive and "a,,b.img" in drive for drive in options(line, "-drive"))
    assert not re.search(r"file=[^ ]*disk\.img", " ".join(line)), "a disk beside the recorder"
    assert options(line, "-netdev") == ["user,id=net0,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22"]
    assert line[-2:] == ["-smp", "2"]


@pytest.mark.parametrize(
    ("program", "architecture", "package"),
    [
        ("/usr/bin/qemu-system-aarch64", "aarch64", "qemu-system-arm"),
        ("qemu-system-x86_64", "x86_64", "qemu-system-x86"),
    ],
)
def test_programs_tell_architecture_and_package(
    program: str, architecture: str, package: str
) -> None:
    assert architecture_of(program) == architecture
    assert package_of(program) == package
