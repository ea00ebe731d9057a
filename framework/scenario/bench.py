"""One session's rig: the machine behind labgrid, its images, and the server it updates from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from framework.scenario.device import Device, Machine, Shell, Update
from framework.scenario.manifest import ManifestError, TargetManifest
from framework.targets.protocols import PowerCutProtocol
from framework.targets.uut import BrownoutUpdater, UpdaterUnderTest, UutError
from images import ImageError, TargetImages, build_target
from updater.server import ArtifactFileServer, ServerError

SERVER_NAME = "updates.brownout.test"
ARTIFACT_FOLDER = "artifacts"


class BenchError(Exception):
    """The rig can't be used; the message is one line that says what to do."""


@define
class Bench:
    """What a session's scenarios share.

    Attributes:
        target: the labgrid target.
        machine: its driver.
        images: the target's images, built.
        server: the TLS server, with the artifacts.
        uut: the updater under test.
        key: the private key that signs artifacts.
    """

    target: Any
    machine: Machine
    images: TargetImages
    server: ArtifactFileServer
    uut: UpdaterUnderTest
    artifacts: Path
    key: Path
    shell_link: int = 0

    def shell(self) -> Shell:
        """A shell on the device, of its present start: a login made before a reset is stale."""
        driver: Any = self.target.get_driver("CommandProtocol", activate=False)
        link = self.machine.pump.generation
        if self.shell_link != link:
            self.target.deactivate(driver)
            self.shell_link = link
        self.target.activate(driver)
        shell: Shell = driver
        return shell

    def manifest(self, base: str) -> TargetManifest:
        """What is known of the target's images when slot a holds `base`."""
        return TargetManifest.parse(self.images.manifest, self.images.directory, base)

    def device(
        self,
        base: str,
        say: Callable[[str], None],
        step: Callable[[str], AbstractContextManager[Any]],
    ) -> Device:
        """A device, switched off, with a pristine disk whose slot a holds `base`."""
        manifest = self.manifest(base)
        if self.machine.get():
            self.machine.off()
        self.machine.fresh(manifest.disks)
        return Device(
            machine=self.machine,
            shell=self.shell,
            uut=self.uut,
            manifest=manifest,
            base=manifest.images[base],
            say=say,
            step=step,
        )

    def update(self, variant: str, port: int) -> Update:
        """An update to `variant`, downloaded through `port` of this host."""
        facts = self.manifest("v1").images[variant]
        path = self.artifacts / f"{variant}-{facts.sha256[:12]}.mender"
        if not path.exists():
            self.uut.build_artifact(
                self.images.rootfs(variant), facts.name, self.images.target, self.key, path
            )
        url = f"https://{SERVER_NAME}:{port}/artifacts/{path.name}"
        return Update(facts.name, facts, path, url)

    def close(self) -> None:
        """Switch the machine off and stop the server."""
        self.server.close()
        if self.machine.get():
            self.machine.off()


def open_bench(request: pytest.FixtureRequest, variants: Sequence[str]) -> Bench:
    """Build the images, activate the machine, start the server.

    Raises:
        BenchError: any of it can't be done.
    """
    target_name = Path(request.config.getoption("lg_env")).stem
    try:
        images = build_target(target_name, variants, relock_if_gone=True)
        target = request.getfixturevalue("target")
        machine: Any = target.get_driver(PowerCutProtocol)
        keys = images.directory.parent / "keys"
        artifacts = images.directory / ARTIFACT_FOLDER
        artifacts.mkdir(exist_ok=True)
        server = ArtifactFileServer(artifacts, keys / "server.pem", keys / "server.key").start()
    except (ImageError, ManifestError, ServerError, UutError, OSError) as error:
        raise BenchError(str(error)) from error
    bench = Bench(
        target, machine, images, server, BrownoutUpdater(), artifacts, keys / "artifact.key"
    )
    with contextlib.ExitStack() as stack:
        stack.callback(server.close)
        bench.manifest("v1")
        stack.pop_all()
    return bench
