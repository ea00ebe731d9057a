"""Running a server: backup and restore, the command line, settings that are wrong."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from updater_server_world import World, make_artifact, world

import updater.server
from updater.server.backup import back_up, restore
from updater.server.certificates import Authority
from updater.server.cli import main
from updater.server.errors import ServerError
from updater.server.settings import load_settings


def silent(_: str) -> None:
    """Nothing is said."""


def test_a_backup_of_a_running_server_is_restored_whole(tmp_path: Path, artifact_v2: Path) -> None:
    with world(tmp_path / "server") as there:
        device = there.accepted()
        there.upload(artifact_v2)
        deployment = there.deploy("v2")
        device.update(deployment)
        back_up(there.core.settings, tmp_path / "fleet.tar", silent)
        there.upload(make_artifact(tmp_path, "later", 5000))
        key = device.key
    restore(tmp_path / "fleet.tar", tmp_path / "restored", silent)
    settings = load_settings(tmp_path / "restored", port=0)
    from updater.server.app import create_app
    from updater.server.core import open_core
    from updater.server.run import ServerThread

    core = open_core(settings)
    with ServerThread(create_app(core, background=False), settings) as running:
        again = World.__new__(World)
        again.url, again.port = f"https://localhost:{running.port}", running.port
        again.context, again._clients = there.context, []
        # The device's key, and so its trust, is in the backup; the authority too.
        from updater_server_world import TestDevice

        assert TestDevice(again, {"mac": "d1"}, key).authenticate().status_code == 200
        again.close()
    (listed,) = core.store.folder.glob("*.mender")
    assert listed.read_bytes() == artifact_v2.read_bytes()
    core.database.close()


@pytest.mark.parametrize("name", ["../outside", "/outside", "artifacts/../../outside"])
def test_a_backup_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(ServerError, match="no plain file below"):
        restore(tmp_path / "evil.tar", tmp_path / "deep" / "new", silent)
    assert not list(tmp_path.rglob("outside"))


def test_a_backup_with_a_link_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("server.db")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ServerError, match="no plain file below"):
        restore(tmp_path / "evil.tar", tmp_path / "new", silent)


def test_a_restore_overwrites_nothing_and_a_bad_backup_leaves_nothing(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").touch()
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    with pytest.raises(ServerError, match="is not empty"):
        restore(tmp_path / "bad.tar", full, silent)
    with pytest.raises(ServerError, match="cannot be restored"):
        restore(tmp_path / "bad.tar", tmp_path / "new", silent)
    assert not (tmp_path / "new").exists()


def test_init_prints_how_to_connect_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "server"
    assert main(["init", str(folder), "--name", "updates.example.com"]) == 0
    said = capsys.readouterr().out
    authority = Authority.load(folder / "ca.pem", folder / "ca.key")
    assert authority.fingerprint() in said
    assert "https://updates.example.com:8443" in said
    assert (folder / "secret.key").stat().st_mode & 0o077 == 0
    assert main(["init", str(folder)]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: Extra inputs"),
        ("port = 'x'", "port: Input should be a valid integer"),
        ("port = [", "not valid TOML"),
        ("client_certificates = 'required'", "needs client_ca"),
        ("public_url = 'http://plain.example'", "public_url"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "secret.key").write_bytes(b"s" * 32)
    (tmp_path / "secret.key").chmod(0o600)
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(ServerError, match=message):
        load_settings(tmp_path)


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.key").write_bytes(b"s" * 32)
    (tmp_path / "secret.key").chmod(0o644)
    (tmp_path / "server.toml").write_text("port = 1")
    with pytest.raises(ServerError, match="others may read the secret"):
        load_settings(tmp_path)


def test_an_old_schema_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "server"
    main(["init", str(folder)])
    (folder / "server.db").unlink()
    for leftover in folder.glob("server.db-*"):
        leftover.unlink()
    assert main(["run", str(folder), "--port", "0"]) == 1
    assert "updater server migrate" in capsys.readouterr().err
    assert main(["migrate", str(folder)]) == 0


def test_the_command_line_manages_a_fleet(
    tmp_path: Path, artifact_v2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with world(tmp_path / "server") as there:
        device = there.device()
        device.authenticate()
        token = tmp_path / "token"
        token.write_text(there.admin.headers["Authorization"].removeprefix("Bearer "))
        fleet = ["fleet", "--url", there.url, "--ca", str(there.folder / "ca.pem")]
        fleet += ["--token-file", str(token)]
        assert main([*fleet, "accept", there.device_id("d1")]) == 0
        assert main([*fleet, "upload", str(artifact_v2)]) == 0
        assert main([*fleet, "deploy", "v2", "--all", "--phase", "1", "--phase", "50%"]) == 0
        deployment = capsys.readouterr().out.split()[-1]
        device.authenticate()
        device.update(deployment)
        assert there.deployment(deployment)["status"] == "finished"
        assert main([*fleet, "devices", "--where", "status=accepted"]) == 0
        assert there.device_id("d1") in capsys.readouterr().out
        assert main([*fleet, "deploy", "nothing", "--all"]) == 1
        assert capsys.readouterr().err == "error: no artifact is named 'nothing'\n"


def test_a_simulated_fleet_updates_and_fails_as_planned(
    tmp_path: Path, artifact_v2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with world(tmp_path / "server") as there:
        simulate = ["simulate", "--url", there.url, "--ca", str(there.folder / "ca.pem")]
        simulate += ["--devices", "20", "--device-type", "test-board", "--pause", "0"]
        simulate += ["--rounds", "2", "--connections", "8", "--fail", "50"]
        assert main(simulate) == 0
        assert "0 of 20 devices are accepted" in capsys.readouterr().out
        for found in there.admin.get("/devices").json()["devices"]:
            there.admin.post(f"/devices/{found['id']}/accept")
        there.upload(artifact_v2)
        deployment = there.deploy("v2")
        assert main(simulate) == 0
        counts = there.deployment(deployment)["counts"]
        assert counts.keys() == {"success", "failure"}
        assert sum(counts.values()) == 20
        assert "errors: 0" in capsys.readouterr().out


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = Path(updater.server.__file__).parent / "updater-server.service"
    checked = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert "updater-server.service" not in checked.stderr, checked.stderr
