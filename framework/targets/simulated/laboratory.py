"""What simulated devices share: signed artifacts, the key, SQLite's VFS. One a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from framework.targets.simulated.bootloader import Copies, UbootCopies
from framework.targets.simulated.database import DataVfs
from framework.targets.simulated.device import (
    ENVIRONMENT,
    SimulatedDevice,
    Surroundings,
    factory_content,
    make_image,
)
from framework.targets.simulated.drive import Disk, Drive, Plan
from framework.targets.simulated.grub import GrubCopies, shipped_script
from framework.targets.simulated.packages import KIND, make_package
from updater.artifact import write_artifact, write_module_artifact
from updater.artifact.signature import load_private_key
from updater.device.client import Client, Ports
from updater.device.config import Config

SCRIPTS = (
    "ArtifactInstall_Enter_00",
    "ArtifactInstall_Leave_00",
    "ArtifactReboot_Enter_00",
    "ArtifactCommit_Enter_00",
    "ArtifactCommit_Leave_00",
    "ArtifactRollback_Enter_00",
    "ArtifactFailure_Enter_00",
)
"""The state scripts of an artifact that has some; nobody runs the one that is for a deployment."""
BOOTLOADERS = ("uboot", "grub")
IMAGES = ("v1", "v2", "v3")
"""What a device is made with, what it is updated to, and one more, which is well."""
STRAY = "stray"
"""A package that is offered to a device without update modules."""


class Laboratory:
    """Makes devices.

    Where bugs are planted: `client` makes another client, `quirks` are U-Boot's and, under GRUB,
    init's, `grub` is GRUB's boot script instead of the shipped one, and `grub_client` makes the
    client's part of GRUB's environment from the shipped module.
    """

    def __init__(
        self,
        *,
        client: Callable[[Config, Ports], Client] = Client,
        quirks: frozenset[str] = frozenset(),
        grub: str = "",
        grub_client: Callable[[ModuleType], type] = lambda module: module.GrubEnvironment,
    ) -> None:
        self._client = client
        self._quirks = quirks
        self._grub = grub or shipped_script()
        self._grub_client = grub_client
        self._vfs = DataVfs()
        self._temporary = TemporaryDirectory(prefix="brownout-simulate-")
        self._folder = Path(self._temporary.name)
        self._key = self._folder / "key.pem"
        self._public = str(self._folder / "public.pem")
        self._make_key()
        self._info: dict[str, str] = {}
        for name in IMAGES:
            path = self._folder / f"{name}.info"
            path.write_text(f"artifact_name={name}\n")
            self._info[name] = str(path)
        self._artifacts: dict[tuple[str, str, str], bytes] = {}
        self._used: dict[tuple[str, str], bytes] = {}

    def close(self) -> None:
        """Remove the temporary folder, and the VFS from SQLite."""
        self._temporary.cleanup()
        self._vfs.unregister()

    def device(
        self,
        behaviour: str,
        scripts: str = "",
        *,
        drive: Disk,
        module: str = "",
        bootloader: str = "uboot",
        early: Callable[[], bool] | None = None,
        network: Callable[[str, bytes], tuple[bytes, bool]] = lambda _, content: (content, False),
    ) -> SimulatedDevice:
        """Make a device, for which v2 is an update that is `behaviour`, with `scripts`.

        `drive` is one that `drive()` made, or another with its content. With `module`, updates are
        packages for an update module that behaves like that ("reboot=No reverts=Yes fails=").
        """
        if module:
            artifacts = {
                "v2": self.package("v2", behaviour, scripts, module),
                "v3": self.package("v3", "well", "", "reboot=No reverts=Yes fails="),
            }
        else:
            artifacts = {
                "v2": self.artifact("v2", behaviour, scripts),
                "v3": self.artifact("v3", "well"),
                STRAY: self.package(STRAY, "well", "", "reboot=No reverts=Yes fails="),
            }
        device = SimulatedDevice(
            Surroundings(artifacts, (self._public,), self._info, network),
            vfs=self._vfs,
            drive=drive,
            early=early,
            client=self._client,
            copies=self._copies(drive, bootloader),
        )
        device.modular = bool(module)
        return device

    def drive(
        self, plan: Plan, *, fresh: bool = False, bootloader: str = "uboot", slot: str = "a"
    ) -> Drive:
        """Make a device's drive, v1 in `slot`; a `fresh` one has no state store yet."""
        if fresh:
            return Drive(factory_content("v1", bootloader=bootloader, slot=slot), plan)
        if (bootloader, slot) not in self._used:
            self._used[bootloader, slot] = self._provision(bootloader, slot)
        return Drive(self._used[bootloader, slot], plan)

    def _copies(self, drive: Disk, bootloader: str) -> Copies:
        if bootloader == "grub":
            return GrubCopies(drive, self._grub, self._grub_client, self._quirks)
        return UbootCopies(drive, ENVIRONMENT, self._quirks)

    def _provision(self, bootloader: str, slot: str) -> bytes:
        """Return the drive of a device whose client has run before."""
        drive = Drive(factory_content("v1", bootloader=bootloader, slot=slot))
        device = SimulatedDevice(
            Surroundings({}, (), self._info),
            vfs=self._vfs,
            drive=drive,
            copies=self._copies(drive, bootloader),
        )
        device.start()
        device.provision()
        return drive.read(0, drive.size_bytes)

    def artifact(self, name: str, behaviour: str, scripts: str = "") -> bytes:
        """Return the signed artifact of an image.

        `scripts`: "" for none, "ok" for state scripts that are well, or the name of the one that
        fails or asks for a later try: "fail ArtifactCommit_Enter_00".
        """
        if (name, behaviour, scripts) not in self._artifacts:
            image = self._folder / "rootfs.img"
            image.write_bytes(make_image(name, behaviour))
            made = self._folder / f"{name}.mender"
            write_artifact(
                made,
                image,
                name=name,
                device_types=["simulated"],
                key=load_private_key(self._key),
                compression="none",
                scripts=self._write_scripts(scripts),
            )
            self._artifacts[name, behaviour, scripts] = made.read_bytes()
        return self._artifacts[name, behaviour, scripts]

    def package(self, name: str, behaviour: str, scripts: str, module: str) -> bytes:
        """Return the signed artifact of a package; `module` is what its module is like."""
        key = (name, f"{behaviour} {module}", scripts)
        if key not in self._artifacts:
            content = self._folder / "package.bin"
            content.write_bytes(make_package(name, behaviour))
            made = self._folder / f"{name}.mender"
            write_module_artifact(
                made,
                [content],
                payload_type=KIND,
                name=name,
                device_types=["simulated"],
                meta_data=dict(word.split("=") for word in module.split()),
                key=load_private_key(self._key),
                compression="none",
                scripts=self._write_scripts(scripts),
            )
            self._artifacts[key] = made.read_bytes()
        return self._artifacts[key]

    def _write_scripts(self, scripts: str) -> list[Path]:
        what, _, which = scripts.partition(" ")
        folder = self._folder / "scripts"
        folder.mkdir(exist_ok=True)
        paths = [folder / name for name in SCRIPTS] if scripts else []
        for path in paths:
            path.write_text(what if path.name == which else "ok")
        return paths

    def _make_key(self) -> None:
        # Always the same one, so that artifacts are the same bytes everywhere. It signs nothing
        # but these.
        key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self._key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        Path(self._public).write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )


@contextmanager
def laboratory(**options: Any) -> Iterator[Laboratory]:
    """A laboratory that is closed at the end; `options` are Laboratory's."""
    made = Laboratory(**options)
    try:
        yield made
    finally:
        made.close()
