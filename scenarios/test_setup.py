"""What an operator does once on a device: set it up, and collect what explains a failure."""

import hashlib
import io
import json
import shlex
import tarfile
import tomllib
from typing import Any

import allure
import pytest
import zstandard

from framework.disk.ext4check import check_ext4
from framework.scenario.device import Device, Update

pytestmark = [
    allure.feature("Operator"),
    allure.story("Setup and support"),
    pytest.mark.lg_feature("linux"),
]

STOCK = "/etc/updater/updater.toml"
MADE = "/data/made.toml"
BUNDLE = "/bundle"


def setup_command(stock: dict[str, Any], slots: list[str]) -> str:
    """The command that asks for what the image was built with."""
    words = ["updater", "--config", MADE, "setup", "--device-type", stock["device_type"]]
    for slot in slots:
        words += ["--slot", slot]
    words += ["--data-dir", stock["data_dir"], "--ca-file", stock["tls"]["ca_file"]]
    for key in stock["trust"]["artifact_keys"]:
        words += ["--artifact-key", key]
    if stock["bootenv"]["kind"] == "uboot":
        words += ["--fw-env-config", stock["bootenv"].get("fw_env_config", "/etc/fw_env.config")]
    for copy in stock["bootenv"].get("copies", []):
        words += ["--grub-env", copy]
    return shlex.join(words)


def test_a_device_that_was_set_up_by_command_updates(device: Device, update: Update) -> None:
    """A device is set up by `updater setup`, refused first, and updates with what that wrote."""
    stock = tomllib.loads(device.command(f"cat {STOCK}").text)
    slots = [stock["slots"][name]["device"] for name in "ab"]
    refused = device.command(setup_command(stock, [slots[0], slots[0]]))
    assert (refused.code, len(refused.lines)) == (1, 1), refused.text
    assert "both slots are the same device" in refused.text
    made = device.command(setup_command(stock, slots))
    assert made.code == 0, made.text
    again = device.command(setup_command(stock, slots))
    assert (again.code, again.text) == (0, f"updater: {MADE}: is as it should be")
    # In the stock one's place, as long as this system runs.
    assert device.command(f"mount -o bind {MADE} {STOCK}").code == 0
    device.update(update)
    device.retry(update)


@pytest.mark.update("unhealthy")
def test_a_support_bundle_says_why_an_update_was_left(device: Device, update: Update) -> None:
    """An unhealthy update is left; the device's support bundle says why, and what is in it."""
    device.update(update)
    made = device.command(f"updater support-bundle --slot-hashes -o /data{BUNDLE}; sync", 120.0)
    assert "updater: wrote" in made.text, made.text
    files = unpack(device)
    sections = json.loads(files["manifest.json"])["sections"]
    failed = {name: each["reason"] for name, each in sections.items() if each["status"] == "failed"}
    # The tiny image really has none; the section says so, and has everything else.
    assert failed in ({}, {"versions": "there is no os-release"})
    status = json.loads(files["status.json"])
    assert "50-sick" in json.dumps(status), status
    extent = device.manifest.slots["a"]
    with device.machine.recorder.disk(extent.device) as disk:
        digest = hashlib.sha256()
        for at in range(0, extent.length, 1 << 20):
            digest.update(disk.read(extent.offset + at, min(1 << 20, extent.length - at)))
    assert digest.hexdigest() in files["slots.json"].decode(), "the slot that runs, by its hash"


def unpack(device: Device) -> dict[str, bytes]:
    """Take the bundle from the device's disk, and its files from the bundle."""
    data = device.manifest.data
    with device.machine.recorder.disk(data.device) as disk:
        content = check_ext4(disk, data.offset, data.length, read=[BUNDLE]).files[BUNDLE]
    assert content is not None
    tar = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in members.items() if file is not None}
