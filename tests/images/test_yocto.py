"""The Yocto layer, as far as it can be run without BitBake: its shell functions, for real."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from images.deb import build_deb, package_version
from updater.artifact.summary import summarize
from updater.device.config import load_config

REPOSITORY = Path(__file__).parent.parent.parent
LAYER = REPOSITORY / "images/yocto/meta-updater"
RECIPE = LAYER / f"recipes-support/updater/updater_{package_version()}.bb"
CLASS = LAYER / "classes/updater-image.bbclass"
SITE = "/usr/lib/python3.12/site-packages"
# What BitBake's own configuration sets.
STANDARD = {
    "PYTHON_SITEPACKAGES_DIR": SITE,
    "bindir": "/usr/bin",
    "sysconfdir": "/etc",
    "systemd_system_unitdir": "/usr/lib/systemd/system",
    "IMAGE_NAME_SUFFIX": ".rootfs",
    "MACHINE": "board",
    "IMAGE_BASENAME": "core-image",
    "DISTRO_VERSION": "5.0",
}


def function(path: Path, name: str) -> str:
    """The body of a shell function of a recipe or class."""
    match = re.search(rf"^{re.escape(name)} ?\(\) \{{\n(.*?)^\}}$", path.read_text(), re.M | re.S)
    assert match is not None, f"{name} is not in {path.name}"
    return match[1]


def assignments(path: Path) -> dict[str, str]:
    """NAME = "value" lines, defaults included."""
    lines = re.findall(r'^([A-Za-z_:${}-]+) \??\+?= "([^"]*)"$', path.read_text(), re.M)
    return dict(lines)


def expand(text: str, values: dict[str, str]) -> str:
    """Replace ${NAME} until nothing is left to replace; an unknown name is an error."""
    for _ in range(5):
        text = re.sub(r"\$\{([A-Za-z_]+)\}", lambda match: values[match[1]], text)
    return text


def run_shell(
    body: str, values: dict[str, str], path: str = ""
) -> subprocess.CompletedProcess[str]:
    script = 'set -e\nbbfatal() { echo "$*" >&2; exit 1; }\n' + expand(body, values)
    return subprocess.run(
        ["sh", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{path}:{os.environ['PATH']}"},
        timeout=60,
    )


def test_the_recipe_installs_what_the_debian_package_holds(tmp_path: Path) -> None:
    destination = tmp_path / "image"
    values = {**STANDARD, "S": str(REPOSITORY), "D": str(destination)}
    done = run_shell(function(RECIPE, "do_install"), values)
    assert done.returncode == 0, done.stderr
    installed = {
        f"/{path.relative_to(destination)}": (path.read_bytes(), path.stat().st_mode & 0o111)
        for path in destination.rglob("*")
        if path.is_file()
    }
    root = tmp_path / "deb-root"
    subprocess.run(["dpkg-deb", "-x", build_deb(tmp_path / "deb"), root], check=True)
    packaged = {
        f"/{path.relative_to(root)}".replace("/usr/lib/python3/dist-packages", SITE): (
            path.read_bytes(),
            path.stat().st_mode & 0o111,
        )
        for path in root.rglob("*")
        if path.is_file() and "/usr/share/doc/" not in str(path)
    }
    assert set(installed) == set(packaged)
    assert installed == packaged


def test_the_recipe_names_what_exists() -> None:
    text = RECIPE.read_text()
    match = re.search(r'file://LICENSE;md5=([0-9a-f]{32})"', text)
    assert match is not None
    assert hashlib.md5((REPOSITORY / "LICENSE").read_bytes()).hexdigest() == match[1]
    units = {path.name for path in (REPOSITORY / "images/package/root").rglob("*.service")}
    assert set(assignments(RECIPE)["SYSTEMD_SERVICE:${PN}"].split()) == units
    name = assignments(RECIPE)["INITSCRIPT_NAME"]
    assert (REPOSITORY / "images/package/root/etc/init.d" / name).is_file()


def test_the_layer_finds_its_recipe_and_its_source() -> None:
    conf = (LAYER / "conf/layer.conf").read_text()
    match = re.search(r'BBFILES \+= "\$\{LAYERDIR\}/([^"]+)"', conf)
    assert match is not None
    assert RECIPE in set(LAYER.glob(match[1]))
    source = re.search(r"realpath\('\$\{LAYERDIR\}/([./]+)'\)", conf)
    assert source is not None
    assert (LAYER / source[1]).resolve() == REPOSITORY


@pytest.fixture
def values(tmp_path: Path) -> dict[str, str]:
    return {
        **STANDARD,
        **assignments(CLASS),
        "UPDATER_SLOT_A": "/dev/mmcblk0p2",
        "UPDATER_SLOT_B": "/dev/mmcblk0p3",
        "IMAGE_ROOTFS": str(tmp_path / "rootfs"),
        "IMGDEPLOYDIR": str(tmp_path),
        "IMAGE_NAME": "core-image-board",
    }


def test_the_class_writes_a_configuration_that_the_client_reads(
    tmp_path: Path, values: dict[str, str]
) -> None:
    (tmp_path / "key.pem").write_text("a key")
    values["UPDATER_VERIFY_KEY"] = str(tmp_path / "key.pem")
    done = run_shell(function(CLASS, "updater_configure"), values)
    assert done.returncode == 0, done.stderr
    settings = tmp_path / "rootfs/etc/updater"
    config = load_config(str(settings / "updater.toml"))
    assert config.device_type == "board"
    assert [(slot.device, slot.number) for slot in config.slots] == [
        ("/dev/mmcblk0p2", 2),
        ("/dev/mmcblk0p3", 3),
    ]
    assert config.artifact_keys == ("/etc/updater/artifact-key.pem",)
    assert (settings / "artifact-key.pem").read_text() == "a key"
    assert (settings / "artifact_info").read_text() == "artifact_name=core-image-5.0\n"


def test_the_class_refuses_an_image_without_slots(values: dict[str, str]) -> None:
    done = run_shell(function(CLASS, "updater_configure"), {**values, "UPDATER_SLOT_B": ""})
    assert done.returncode == 1
    assert "set UPDATER_SLOT_A and UPDATER_SLOT_B" in done.stderr


def test_the_class_makes_an_artifact(tmp_path: Path, values: dict[str, str]) -> None:
    (tmp_path / "core-image-board.rootfs.ext4").write_bytes(b"file system" * 1000)
    python = tmp_path / "bin/nativepython3"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = run_shell(function(CLASS, "IMAGE_CMD:updater"), values, str(python.parent))
    assert done.returncode == 0, done.stderr
    found = summarize(tmp_path / "core-image-board.rootfs.updater")
    assert (found["name"], found["device_types"]) == ("core-image-5.0", ["board"])
    assert found["files"]["core-image-board.rootfs.ext4"]["size"] == 11_000
