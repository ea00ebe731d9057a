"""The support bundle holds what explains a failure, in spite of the failure, and no secret."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from images.deb import PACKAGE_DIR
from updater.cli import main
from updater.device import support_bundle
from updater.device.bootenv_grub import format_block
from updater.device.errors import UpdaterError
from updater.device.model import Outcome, Result, State, Update
from updater.device.redact import redact, redact_json
from updater.device.store import SqliteStore, database_path
from updater.device.support_bundle import Sources, write_bundle

TOKEN = "tenant-7f3a9c2e5b"
PASSWORD = "hunter2-correct-horse"
URL_SECRET = "c2lnbmF0dXJl-9911"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJkZXZpY2UifQ.c2lnbmVkLWJ5LXNlcnZlcg"
PRIVATE_KEY = (
    ec.generate_private_key(ec.SECP256R1())
    .private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    .decode()
)
LINK = f"https://user:{PASSWORD}@store.example.com/v2.mender?X-Signature={URL_SECRET}&a=1"


class Device:
    """A device's files below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.data.mkdir()
        self.config = root / "updater.toml"
        self.output = root / "bundle.tar.zst"
        (root / "boot1").mkdir()
        (root / "boot2").mkdir()
        variables = {"mender_boot_part": "2", "upgrade_available": "0"}
        for copy in ("boot1", "boot2"):
            (root / copy / "env").write_bytes(format_block(variables))
            (root / copy / "lock").write_bytes(format_block({"editing": "0"}))
        for slot in ("a", "b"):
            (root / f"slot-{slot}").write_bytes(slot.encode() * 300_000)
        (root / "artifact_info").write_text("artifact_name=v1\n")
        (root / "kmsg").write_text("6,1,0,-;Linux version 6.1\n3,2,9,-;mmc0: error -110\n")
        proc = root / "proc"
        (proc / "sys/kernel/random").mkdir(parents=True)
        (proc / "sys/kernel/random/boot_id").write_text("11111111-2222\n")
        for name, text in (
            ("uptime", "12.3 4.5\n"),
            ("cmdline", "root=/dev/vda2 quiet\n"),
            ("mounts", "/dev/vda2 / ext4 ro 0 0\n"),
            ("partitions", "254 0 100 vda\n"),
        ):
            (proc / name).write_text(text)
        (root / "log.txt").write_text("updater: state Download\n")
        self.write_config()
        self.sources = Sources(
            proc=str(proc), kmsg=str(root / "kmsg"), journal=("no-such-journalctl",),
            logs=(str(root / "log.txt"),),
        )  # fmt: skip

    def write_config(self, more: str = "") -> None:
        root = self.root
        self.config.write_text(
            f'device_type = "board"\ndata_dir = "{self.data}"\n'
            f'artifact_info = "{root}/artifact_info"\n'
            f'[slots]\na = {{device = "{root}/slot-a", number = 2}}\n'
            f'b = {{device = "{root}/slot-b", number = 3}}\n'
            f'[bootenv]\nkind = "grub"\ncopies = ["{root}/boot1/env", "{root}/boot2/env"]\n{more}'
        )

    def store(self) -> SqliteStore:
        return SqliteStore(database_path(str(self.data)))

    def bundle(self, *, slot_hashes: bool = False) -> dict[str, bytes]:
        write_bundle(
            str(self.output), str(self.config), slot_hashes=slot_hashes, sources=self.sources
        )
        return unpack(self.output)


def unpack(path: Path) -> dict[str, bytes]:
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]


def sections(files: dict[str, bytes]) -> dict[str, Any]:
    manifest = json.loads(files["manifest.json"])
    assert (manifest["format"], manifest["version"]) == ("updater-support-bundle", 1)
    found: dict[str, Any] = manifest["sections"]
    listed = {name for section in found.values() for name in section["files"]}
    assert listed == set(files) - {"manifest.json"}
    return found


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_it_holds_what_explains_the_last_failure(device: Device) -> None:
    with_update = Update("v3", "v1", "a", "b", State.INSTALL, "boot-9", cause="mmc0 died")
    store = device.store()
    store.finish(Outcome(Result.FAILED, "v2", "a", "disk full", 1_700_000_000), {"k": "v"})
    store.save(with_update)
    store.close()
    files = device.bundle(slot_hashes=True)
    found = sections(files)
    failed = {name for name, section in found.items() if section["status"] != "ok"}
    # Only a device can say which slot it runs from.
    assert failed == {"status"}
    assert found["status"]["reason"].startswith("running slot:")
    status = json.loads(files["status.json"])
    assert status["boot_id"] == "11111111-2222"
    assert status["last_outcome"]["cause"] == "disk full"
    assert status["update_in_progress"]["state"] == "ArtifactInstall"
    assert status["update_in_progress"]["cause"] == "mmc0 died"
    state = json.loads(files["store/state.json"])
    assert state["provides"] == [{"key": "k", "value": "v"}]
    slots = json.loads(files["slots.json"])
    assert slots["b"]["sha256"] == (hashlib.sha256(b"b" * 300_000).hexdigest())
    assert slots["a"]["size"] == 300_000
    assert json.loads(files["bootenv/variables.json"])["mender_boot_part"] == "2"
    assert files["bootenv/raw-0"] == (device.root / "boot1/env").read_bytes()
    assert b"mmc0: error -110" in files["kernel.log"]
    assert files["log/log.txt"] == b"updater: state Download\n"
    assert json.loads(files["versions.json"])["kernel"].startswith("Linux")
    names = [file["name"] for file in json.loads(files["store/files.json"])]
    assert "state.db" in names


def test_slots_are_hashed_only_when_asked_for(device: Device) -> None:
    slots = json.loads(device.bundle()["slots.json"])
    assert "sha256" not in slots["a"]
    assert slots["a"]["ext4"] is False


def plant_secrets(device: Device) -> None:
    """A secret of every kind in every place where one may end up."""
    everything = (
        f"tenant_token={TOKEN} Authorization: Bearer {JWT} password: {PASSWORD}\n"
        f"GET {LINK}\n{PRIVATE_KEY}\nplain {TOKEN} again, {JWT}\n"
    )
    device.config.write_text(
        device.config.read_text()
        + f'# password = "{PASSWORD}"\n[server]\nurl = "{LINK}"\ntenant_token = "{TOKEN}"\n'
    )
    (device.root / "artifact_info").write_text(f"artifact_name=v1\nwifi_psk={PASSWORD}\n")
    (device.root / "kmsg").write_text(everything)
    (device.root / "log.txt").write_text(everything)
    for name in ("cmdline", "mounts", "partitions"):
        (Path(device.sources.proc) / name).write_text(everything.replace("\n", " "))
    variables = {"wifi_password": PASSWORD, "note": f"{TOKEN} {JWT}", "url": LINK}
    for copy in ("boot1", "boot2"):
        (device.root / copy / "env").write_bytes(format_block(variables))
    store = device.store()
    store.finish(Outcome(Result.FAILED, "v2", "a", everything, 1), {"api_key": TOKEN, "x": JWT})
    store.close()
    deployments = device.data / "deployments"
    deployments.mkdir()
    (deployments / "0001.log").write_text(everything)
    (device.data / "device-key.pem").write_text(PRIVATE_KEY)
    (device.data / "token").write_text(JWT)


def leaks(files: dict[str, bytes]) -> list[str]:
    """Every secret that can be found in any file, plain, in base64 or as part of a key."""
    key_line = PRIVATE_KEY.splitlines()[1]
    secrets = [TOKEN, PASSWORD, URL_SECRET, JWT, JWT.split(".")[1], key_line]
    forms = {secret.encode() for secret in secrets}
    forms |= {base64.b64encode(secret.encode()).rstrip(b"=") for secret in secrets}
    return [f"{form!r} in {name}" for name, content in files.items() for form in forms
            if form in content]  # fmt: skip


@pytest.mark.parametrize("broken", ["nothing", "store", "configuration"])
def test_no_secret_leaves_the_device(device: Device, broken: str) -> None:
    plant_secrets(device)
    if broken == "store":
        path = Path(database_path(str(device.data)))
        path.write_bytes(b"garbage" + path.read_bytes())
    if broken == "configuration":
        device.config.write_text(device.config.read_text() + "this is no TOML\n")
    files = device.bundle()
    assert leaks(files) == []
    # And what is no secret is still there.
    assert b"store.example.com/v2.mender" in files["kernel.log"]
    assert b"GET https://" in files["deployments/0001.log"] if broken == "nothing" else True
    assert b'device_type = "board"' in files["config/updater.toml"]
    assert b"artifact_name=v1" in files.get("config/artifact_info", b"artifact_name=v1")
    for name in ("status.json", "manifest.json", "store/files.json"):
        json.loads(files[name])


@pytest.mark.parametrize("net", ["redact", "redact_json", "secret_values"])
def test_the_search_for_leaks_finds_what_a_missing_net_lets_through(
    device: Device, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bugs: each net that takes secrets out is removed once."""
    without = {
        "redact": lambda content, *_, **__: content,
        "redact_json": lambda value, *_: value,
        "secret_values": lambda _: set(),
    }
    monkeypatch.setattr(support_bundle, net, without[net])
    plant_secrets(device)
    assert leaks(device.bundle()) != []


def test_raw_copies_keep_their_length(device: Device) -> None:
    plant_secrets(device)
    raw = device.bundle()["bootenv/raw-0"]
    original = (device.root / "boot1/env").read_bytes()
    assert len(raw) == len(original)
    assert raw.index(b"wifi_password=XXXX") == original.index(b"wifi_password=")


def test_a_broken_store_is_taken_along_as_it_is(device: Device) -> None:
    path = Path(database_path(str(device.data)))
    path.write_bytes(b"not a database" * 100)
    files = device.bundle()
    assert sections(files)["store"]["status"] == "failed"
    assert "not a database" in sections(files)["store"]["reason"]
    assert files["store/unreadable.db"] == b"not a database" * 100
    assert path.read_bytes() == b"not a database" * 100
    assert sections(files)["slots"]["status"] == "ok"


def test_a_store_of_a_newer_client_is_read_all_the_same(device: Device) -> None:
    connection = sqlite3.connect(database_path(str(device.data)))
    connection.execute("CREATE TABLE future (what TEXT)")
    connection.execute("INSERT INTO future VALUES ('seen')")
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    state = json.loads(device.bundle()["store/state.json"])
    assert state["schema_version"] == 99
    assert state["future"] == [{"what": "seen"}]


def test_what_is_broken_says_so_inside_and_the_rest_is_there(device: Device) -> None:
    for copy in ("boot1", "boot2"):
        (device.root / copy / "env").write_bytes(b"torn" * 100)
    (device.root / "slot-b").unlink()
    (device.root / "kmsg").unlink()
    (device.root / "artifact_info").unlink()
    files = device.bundle(slot_hashes=True)
    found = sections(files)
    for name, reason in (
        ("bootenv", "not a GRUB environment block"),
        ("slots", "slot b"),
        ("kernel", "kmsg"),
        ("config", "artifact_info: No such file"),
    ):
        assert found[name]["status"] == "failed"
        assert reason in found[name]["reason"]
    assert files["bootenv/raw-0"] == b"torn" * 100
    slots = json.loads(files["slots.json"])
    assert "sha256" in slots["a"]
    assert slots["b"]["error"] == "No such file or directory"
    assert found["store"]["status"] == "skipped"


def test_without_a_usable_configuration_there_is_a_bundle_all_the_same(device: Device) -> None:
    store = device.store()
    store.finish(Outcome(Result.FAILED, "v2", "a", "why", 1), None)
    store.close()
    device.write_config("[misspelt]\nkey = 1\n")
    files = device.bundle(slot_hashes=True)
    found = sections(files)
    assert found["config"]["status"] == "failed"
    assert "unknown key 'misspelt'" in found["config"]["reason"]
    assert found["slots"]["status"] == found["bootenv"]["status"] == "ok"
    device.config.write_text(f'data_dir = "{device.data}"\n')
    files = device.bundle()
    found = sections(files)
    assert found["slots"]["status"] == found["bootenv"]["status"] == "skipped"
    assert json.loads(files["status.json"])["last_outcome"]["cause"] == "why"
    device.config.unlink()
    assert sections(device.bundle())["config"]["status"] == "failed"


def test_long_logs_keep_their_end(device: Device) -> None:
    (device.root / "log.txt").write_bytes(b"old\n" * 500_000 + b"the end\n")
    (device.root / "kmsg").write_bytes(b"old\n" * 500_000 + b"the end\n")
    files = device.bundle()
    for name in ("log/log.txt", "kernel.log"):
        assert len(files[name]) == 512 * 1024
        assert files[name].endswith(b"the end\n")


def test_a_bundle_that_cannot_be_written_leaves_nothing(device: Device) -> None:
    with pytest.raises(UpdaterError, match="cannot be written: No such file or directory"):
        write_bundle(str(device.root / "no" / "x"), str(device.config), sources=device.sources)
    device.output.mkdir()
    with pytest.raises(UpdaterError, match="cannot be written"):
        write_bundle(str(device.output), str(device.config), sources=device.sources)
    assert not list(device.root.glob("*.part"))


def test_the_command_line_writes_one(
    device: Device, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", str(device.config), "support-bundle"]
    assert main([*arguments, "-o", str(device.output)]) == 0
    assert f"updater: wrote {device.output}" in capfd.readouterr().err
    assert device.output.stat().st_mode & 0o777 == 0o600
    assert "versions.json" in unpack(device.output)
    monkeypatch.chdir(device.root)
    assert main(arguments) == 0
    (made,) = Path().glob("support-*.tar.zst")
    assert "versions.json" in unpack(made)
    assert main([*arguments, "-o", str(device.root / "no" / "where")]) == 1


def test_it_asks_the_journal_for_everything_that_the_services_say() -> None:
    """A service that gives no name of its own would go by that of the program or script."""
    services = sorted((PACKAGE_DIR / "root/usr/lib/systemd/system").glob("*.service"))
    assert len(services) == 2
    for service in services:
        (name,) = re.findall(r"^SyslogIdentifier=(\S+)$", service.read_text(), re.MULTILINE)
        assert f"--identifier={name}" in Sources().journal, service.name


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (b"tenant_token = \"abc\"\nnext = 1\n", b"tenant_token = [redacted]\nnext = 1\n"),
        (b"PASSWORD=a b c\nx=1", b"PASSWORD=[redacted]\nx=1"),
        (b"see https://u:p@h/x?sig=1 there", b"see https://[redacted]@h/x?[redacted] there"),
        (b"authorization: bearer abc", b"authorization: [redacted]"),
        (b"key_file = \"/data/key.pem\"", b"key_file = \"/data/key.pem\""),
        (b"artifact_keys = [\"/etc/k.pem\"]", b"artifact_keys = [\"/etc/k.pem\"]"),
        (b"root=/dev/vda2 quiet", b"root=/dev/vda2 quiet"),
        (b"-----BEGIN EC PRIVATE KEY-----\nMII cut off", b"[redacted]"),
    ],
)  # fmt: skip
def test_secrets_and_only_secrets_are_taken_out(text: bytes, clean: bytes) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean
    assert len(redact(text, keep_length=True)) == len(text)


def test_json_stays_json() -> None:
    value = {"cause": 'server said "token=abc", then', "api_key": "x", "n": [1, None, {"psk": 3}]}
    clean = redact_json(value)
    assert clean["api_key"] == "[redacted]"
    assert clean["n"] == [1, None, {"psk": "[redacted]"}]
    assert "abc" not in clean["cause"]
    assert json.loads(json.dumps(clean)) == clean
