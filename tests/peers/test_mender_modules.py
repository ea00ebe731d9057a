"""Debian's own update modules, generators and scripts of mender-client 3.4, unchanged.

The artifacts are made by the generators of that package, with Debian's `mender-artifact`; what they
install is installed, and taken back, by the modules of that package, under our client. Its identity
and inventory scripts tell our client who the device is. The device is the simulated one of the
updater's tests: its disk and boot loader matter to no module.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from updater.device.config import ModulesConfig, ServerConfig
from updater.device.identity import identity, inventory

sys.path.insert(0, str(Path(__file__).parents[1] / "updater"))
from updater_artifacts import DEVICE_TYPE
from updater_judge import operate
from updater_world import World, world_artifact

# .ci/bootstrap unpacks the package there: installing it would start a service.
SHARE = Path(__file__).parents[2] / "build/peers/mender-client/usr/share"
MODULES = SHARE / "mender/modules/v3"
EXAMPLES = SHARE / "doc/mender-client/examples"

pytestmark = [
    pytest.mark.skipif(
        not MODULES.exists(), reason="Debian's mender-client is not unpacked (.ci/bootstrap tests)"
    ),
    pytest.mark.skipif(
        not shutil.which("mender-artifact"), reason="apt-get install mender-artifact"
    ),
]


@pytest.fixture(autouse=True)
def executable(tmp_path: Path) -> Path:
    """Their examples are documentation in Debian, and so are not executable there."""
    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder)
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


class Peer:
    """A device with their modules, and the file that they manage."""

    def __init__(self, directory: Path, examples: Path) -> None:
        self.directory = directory
        self.examples = examples
        self.target = directory / "opt"
        self.target.mkdir()
        (self.target / "app.conf").write_text("old")
        self.artifact = directory / "theirs.mender"

    def generate(self, kind: str, *arguments: object) -> None:
        """Make the artifact with their generator."""
        command = [self.examples / f"{kind}-artifact-gen", "-n", "v2", "-t", DEVICE_TYPE]
        command += ["-o", self.artifact, *arguments]
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def install(self, *, healthy: bool = True) -> str:
        """Install it; what our client says."""
        (self.directory / "world").mkdir()
        (self.directory / "health").mkdir()
        world_artifact(self.directory / "health")
        world = World(self.directory / "world", self.artifact)
        for name in ("well.d", "sick.d"):
            shutil.copytree(self.directory / "health" / name, self.directory / name)
        world.config = world.config._replace(modules=ModulesConfig((str(MODULES),)))
        world.always_sick = not healthy
        _, said = operate(world, "install", "v2.mender")
        assert world.client().ports.store.update() is None, said
        return said


@pytest.fixture
def peer(tmp_path: Path, executable: Path) -> Peer:
    return Peer(tmp_path, executable)


@pytest.mark.parametrize("healthy", [True, False])
def test_their_single_file_module_installs_and_takes_back(peer: Peer, healthy: bool) -> None:
    new = peer.directory / "new" / "app.conf"
    new.parent.mkdir()
    new.write_text("new")
    new.chmod(0o640)
    peer.generate("single-file", "-d", peer.target, new)
    said = peer.install(healthy=healthy)
    assert ("committed v2" in said) == healthy, said
    assert ("50-sick exited with 1" in said) != healthy
    assert (peer.target / "app.conf").read_text() == ("new" if healthy else "old")
    if healthy:
        assert (peer.target / "app.conf").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("healthy", [True, False])
def test_their_directory_module_installs_and_takes_back(peer: Peer, healthy: bool) -> None:
    tree = peer.directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "app.conf").write_text("new")
    peer.generate("directory", "-d", peer.target, tree)
    said = peer.install(healthy=healthy)
    assert ("committed v2" in said) == healthy, said
    assert (peer.target / "app.conf").read_text() == ("new" if healthy else "old")
    assert (peer.target / "sub").exists() == healthy


@pytest.mark.parametrize("code", [0, 3])
def test_their_script_module_runs_what_it_is_given(peer: Peer, code: int) -> None:
    """It knows no rollback: a script that fails leaves the name inconsistent, and says so."""
    script = peer.directory / "update.sh"
    script.write_text(f"#!/bin/sh\necho new > {peer.target}/app.conf\nexit {code}\n")
    command = ["mender-artifact", "write", "module-image", "-T", "script", "-n", "v2"]
    command += ["-t", DEVICE_TYPE, "-o", str(peer.artifact), "-f", str(script)]
    subprocess.run(command, check=True, capture_output=True)
    said = peer.install()
    assert ("committed v2" in said) == (code == 0), said
    assert ("v2_INCONSISTENT is recorded" in said) == (code != 0)
    assert ("update module script" in said) == (code != 0)


def test_their_identity_and_inventory_scripts_are_understood(executable: Path) -> None:
    config = ServerConfig(
        identity=str(executable / "mender-device-identity"), inventory=str(executable)
    )
    wanted = {f"mender-inventory-{name}" for name in ("hostinfo", "os", "network")}
    for path in executable.glob("mender-inventory-*"):
        if path.name not in wanted:
            # They want a boot loader, their own client, or a service on the internet.
            path.chmod(0o644)
    if any(path.read_text().strip() == "1" for path in Path("/sys/class/net").glob("*/type")):
        assert set(json.loads(identity(config))) == {"mac"}
    found = {each["name"]: each["value"] for each in inventory(config, {"known": "yes"})}
    assert found["known"] == "yes"
    assert found["kernel"] == Path("/proc/version").read_text().strip()
    assert found["hostname"] == os.uname().nodename
    assert "os" in found
