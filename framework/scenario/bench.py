"""One session's rig: the machine behind labgrid, its images, and the server it updates from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve

from framework.scenario.board import BoardDevice
from framework.scenario.device import Device, Machine, Strategy, Update
from framework.scenario.managed import ManagedDevice
from framework.scenario.management import SERVER_NAME, ManagementServer
from framework.scenario.manifest import ManifestError, TargetManifest
from framework.targets.errors import RigError
from framework.targets.rig import load_rig
from framework.targets.switched import SwitchedBoardDriver
from framework.targets.uut import (
    ArtifactServer,
    BrownoutUpdater,
    UpdaterUnderTest,
    UutError,
    serve_artifacts,
)
from images import ImageError, Places, TargetImages, build_target, recipe_names
from images.keys import ensure_keys

ARTIFACT_FOLDER = "artifacts"


class BenchError(Exception):
    """The rig can't be used; the message is one line that says what to do."""


@define
class Bench:
    """What a session's scenarios share.

    Attributes:
        machine: its driver.
        strategy: starts it and runs commands on it.
        images: the target's images, built.
        server: the TLS server, with the artifacts.
        uut: the updater under test.
        key: the private key that signs artifacts.
        rig: the rig's name.
    """

    machine: Machine
    strategy: Strategy
    images: TargetImages
    server: ArtifactServer
    uut: UpdaterUnderTest
    artifacts: Path
    key: Path
    rig: str
    _management: ManagementServer | None = None

    def make_deterministic(self) -> None:
        """Have the machine's time be its own from now on; it must be off.

        Raises:
            RigError: its time is the world's: it is no emulated machine.
        """
        machine: Any = self.machine
        if not hasattr(machine, "deterministic"):
            raise RigError(f"{self.rig}: can't be deterministic: its machine is not emulated")
        machine.deterministic = True

    def manifest(self, base: str) -> TargetManifest:
        """What is known of the target's images when slot a holds `base`."""
        return TargetManifest.parse(self.images.manifest, self.images.directory, base)

    def device(
        self,
        base: str,
        say: Callable[[str], None],
        step: Callable[[str], AbstractContextManager[Any]],
        *,
        managed: bool = False,
    ) -> Device:
        """A device, switched off, with a pristine disk whose slot a holds `base`.

        One that is `managed` gets its updates from the session's management server.
        """
        manifest = self.manifest(base)
        self.strategy.transition("off")
        self.machine.fresh(manifest.disks, manifest.firmware.get("seed"))
        common: dict[str, Any] = {
            "machine": self.machine,
            "strategy": self.strategy,
            "uut": self.uut,
            "manifest": manifest,
            "base": manifest.images[base],
            "say": say,
            "step": step,
        }
        read_data = getattr(self.machine, "read_data", None)
        if read_data is not None:
            common["data_reader"] = read_data
        if isinstance(self.machine, SwitchedBoardDriver):
            if managed:
                raise RigError("a board behind a power head has no managed scenarios yet")
            common["manifest"] = evolve(manifest, target=self.rig)
            return BoardDevice(**common, disks=self.machine.disks)
        if managed:
            return ManagedDevice(**common, server=self.management())
        return Device(**common)

    def management(self) -> ManagementServer:
        """The session's management server, started when it is first asked for."""
        if self._management is None:
            folder = Path(tempfile.mkdtemp(prefix="brownout-server-"))
            self._management = ManagementServer(folder, self.key.parent)
        return self._management

    def update(self, variant: str, port: int) -> Update:
        """An update to `variant`, downloaded through `port` of this host."""
        facts = self.manifest("v1").images[variant]
        path = self.artifacts / f"{variant}-{facts.sha256[:12]}.mender"
        if not path.exists():
            self.uut.build_artifact(
                self.images.rootfs(variant), facts.name, self.images.target, self.key, path
            )
        url = f"https://{SERVER_NAME}:{port}/artifacts/{path.name}"
        keys = self.key.parent
        return Update(facts.name, facts, path, url, (keys / "ca.pem", keys / "ca.key"))

    def close(self) -> None:
        """Switch the machine off and stop the server."""
        self.server.close()
        if self._management is not None:
            self._management.close()
        self.strategy.transition("off")


def _stock_of(machine: Any, target_name: str, variants: Sequence[str]) -> TargetImages:
    """The images of a machine that makes its own."""
    build = Places().build
    ensure_keys(build / "keys")
    folder = build / target_name
    return TargetImages(target_name, folder, machine.make_stock(folder, variants))


def open_bench(request: pytest.FixtureRequest, variants: Sequence[str]) -> Bench:
    """Build the images, activate the machine of pytest's `--lg-env`, start the server.

    Raises:
        BenchError: any of it can't be done.
    """
    rig = Path(request.config.getoption("lg_env"))
    return _open(rig.stem, lambda: request.getfixturevalue("target"), variants)


def open_bench_on(rig: Path, variants: Sequence[str]) -> Bench:
    """As `open_bench`, without pytest: the rig file names the machine.

    Raises:
        BenchError: any of it can't be done.
        RigError: the rig file makes no sense.
    """

    def find() -> Any:
        target = load_rig(rig).get_target("main")
        if target is None:
            raise BenchError(f"{rig}: has no target 'main'")
        return target

    return _open(rig.stem, find, variants)


def _open(target_name: str, find_target: Callable[[], Any], variants: Sequence[str]) -> Bench:
    try:
        built = target_name in recipe_names()
        if built:
            images = build_target(target_name, variants, relock_if_gone=True)
        strategy: Any = find_target().get_strategy()
        strategy.transition("off")
        machine: Any = strategy.power
        if isinstance(machine, SwitchedBoardDriver):
            images = build_target(machine.recipe, variants, relock_if_gone=True)
        elif not built:
            images = _stock_of(machine, target_name, variants)
        keys = images.directory.parent / "keys"
        artifacts = images.directory / ARTIFACT_FOLDER
        artifacts.mkdir(exist_ok=True)
        server = serve_artifacts(artifacts, keys / "server.pem", keys / "server.key")
    except (ImageError, ManifestError, RigError, UutError, OSError) as error:
        raise BenchError(str(error)) from error
    bench = Bench(
        machine=machine,
        strategy=strategy,
        images=images,
        server=server,
        uut=BrownoutUpdater(),
        artifacts=artifacts,
        key=keys / "artifact.key",
        rig=target_name,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        bench.manifest("v1")
        stack.pop_all()
    return bench
