"""Managed mode against a real TLS server that speaks the documented device API."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from updater_artifacts import DEVICE_TYPE
from updater_judge import judge
from updater_manager import Manager, managing
from updater_server import Authority
from updater_world import PowerCutError, World, world_artifact

from updater.device.api import DeviceApi
from updater.device.client import Client, LeaveToDaemon
from updater.device.config import DownloadConfig, ServerConfig
from updater.device.errors import ConfigError, UpdaterError
from updater.device.identity import DeviceKey, identity, inventory, open_key
from updater.device.managed import Daemon, DeploymentLog, ServerObserver
from updater.device.transport import FileOrHttpsTransport
from updater.device.windows import Window, minutes_until_open, parse_window


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_artifact(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def manager(authority: Authority, artifact: Path) -> Iterator[Manager]:
    context = authority.server_context("127.0.0.1")
    with managing(context, Manager(artifact, DEVICE_TYPE)) as manager:
        yield manager


class Fleet:
    """One device of the simulated world under the real daemon."""

    def __init__(
        self, directory: Path, manager: Manager, ca_file: Path, seed: int = 0, **server: object
    ) -> None:
        self.world = World(directory, manager.artifact, seed, "kept")
        self.manager = manager
        self.ca_file = str(ca_file)
        script = directory / "identity"
        script.write_text("#!/bin/sh\necho serial=4711\necho mac=a\necho mac=b\n")
        script.chmod(0o755)
        settings = ServerConfig(
            **{  # type: ignore[arg-type]
                "url": manager.url,
                "identity": str(script),
                "inventory": str(directory / "inventory"),
                "reboot_command": ("true",),
                "timeout_s": 5.0,
                "key_file": f"{directory}/key.pem",
                **server,
            }
        )
        self.world.config = self.world.config._replace(
            server=settings,
            ca_file=self.ca_file,
            download=DownloadConfig(timeout_s=5.0, retries=1, spool_min_s=0.0),
        )
        self.said = ""
        self.client: Client | None = None
        self._daemon: Daemon | None = None

    def start(self) -> None:
        """Start the daemon's process anew."""
        config = self.world.config
        api = DeviceApi(config.server, self.ca_file, open_key(config), identity(config.server))
        log = DeploymentLog(config.data_dir, self.world.clock)
        observer = ServerObserver(config, api, log, self.world.clock)

        def make_client() -> Client:
            client = self.world.client()
            transport = FileOrHttpsTransport(
                self.ca_file, config.download, self.world.clock, config.data_dir
            )
            client.ports = client.ports._replace(observer=observer, transport=transport)
            self.client = client
            return client

        self._log = log
        self._daemon = Daemon(config, api, observer, log, make_client)

    def cycle(self) -> float:
        """One cycle of the daemon; an infinite pause when the power went."""
        if self._daemon is None:
            self.start()
        assert self._daemon is not None
        console = io.StringIO()
        pause = float("inf")
        with contextlib.redirect_stderr(console):
            try:
                pause = self._daemon.cycle()
            except PowerCutError:
                self._log.end()
        self.said += console.getvalue()
        return pause

    def restart(self) -> None:
        self._log.end()
        self.world.restart()
        self._daemon = None

    def settle(self, cycles: int = 12) -> None:
        """Cycle, restarting whenever that is asked for, until the server has nothing more."""
        for _ in range(cycles):
            self.cycle()
            assert self.client is not None
            if self.world.power.off or self.client.reboot_needed:
                self.restart()
            elif self.manager.deployment is None and self.world.store.update() is None:
                return
        raise AssertionError(f"not settled: {self.said[-2000:]}")


@pytest.fixture
def fleet(tmp_path: Path, manager: Manager, authority: Authority) -> Fleet:
    return Fleet(tmp_path, manager, authority.ca_file)


def test_a_whole_deployment(fleet: Fleet, manager: Manager) -> None:
    fleet.settle()
    assert manager.identities[0] == {"serial": "4711", "mac": ["a", "b"]}
    assert manager.reported() == ["downloading", "installing", "rebooting", "installing", "success"]
    assert fleet.world.running_image() == "v2"
    assert fleet.world.client().artifact_name() == "v2"
    assert "committed v2 (slot b)" in fleet.said
    assert manager.logs == {}, "only failures need a log"
    assert list((fleet.world.directory / "deployments").iterdir()) == []
    fleet.cycle()
    assert manager.provides["artifact_name"] == "v2"
    assert manager.inventory["artifact_name"] == "v2"


def test_an_update_by_the_first_version_of_the_protocol(fleet: Fleet, manager: Manager) -> None:
    manager.has_v2 = False
    fleet.settle()
    assert manager.reported()[-1] == "success"
    assert ("GET", "/api/devices/v1/deployments/device/deployments/next") in manager.requests


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_every_kind_of_key_signs_the_raw_body(
    tmp_path: Path, manager: Manager, authority: Authority, kind: str
) -> None:
    fleet = Fleet(tmp_path, manager, authority.ca_file, key_type=kind)
    manager.deployment = None
    fleet.cycle()
    assert len(manager.identities) == 1
    key = tmp_path / "key.pem"
    before = key.read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600
    fleet.restart()
    fleet.cycle()
    assert key.read_bytes() == before, "one key for the device's whole life"


def test_a_device_that_is_not_accepted_asks_three_times_soon_and_then_ever_more_rarely(
    fleet: Fleet, manager: Manager
) -> None:
    manager.accepted = False
    pauses = [fleet.cycle() for _ in range(10)]
    assert all(54 <= pause <= 66 for pause in pauses[:3])
    for number, pause in enumerate(pauses[3:], 1):
        wanted = min(60 * 2**number, 1800)
        assert 0.9 * wanted <= pause <= 1.1 * wanted
    assert "the server has not accepted this device" in fleet.said
    manager.accepted = True
    manager.deployment = None
    assert 1620 <= fleet.cycle() <= 1980


def test_a_token_that_has_run_out_is_renewed_in_the_same_cycle(
    fleet: Fleet, manager: Manager
) -> None:
    manager.deployment = None
    fleet.cycle()
    manager.token = "token-2"
    assert fleet.cycle() > 1000
    assert len(manager.identities) == 2
    assert "error" not in fleet.said


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait(fleet: Fleet, manager: Manager, status: int) -> None:
    manager.answers = [("deployments/next", status, b"", {"Retry-After": "4000"})]
    assert fleet.cycle() == 4000.0


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"{}",
        b'{"id": 3}',
        b'{"id":"x","artifact":{"artifact_name":"v","source":{"uri":7}}}',
        b"x" * (1 << 20) + b"x",
    ],
)
def test_an_answer_that_makes_no_sense_is_one_line_and_another_try(
    fleet: Fleet, manager: Manager, body: bytes
) -> None:
    manager.answers = [("deployments/next", 200, body, {})]
    assert 54 <= fleet.cycle() <= 66
    assert fleet.said.count("error: ") == 1
    fleet.settle()
    assert fleet.world.running_image() == "v2"


def test_a_failure_is_reported_with_its_cause_and_its_log(fleet: Fleet, manager: Manager) -> None:
    fleet.world.healthy = False
    fleet.settle()
    assert fleet.world.running_image() == "v1"
    cause = "health check 50-sick exited with 1: checked"
    assert manager.statuses[-1] == ("d-1", "failure", cause)
    messages = manager.logs["d-1"]
    text = "\n".join(message["message"] for message in messages)
    for line in ("state Download", "state ArtifactVerifyReboot", "state ArtifactRollback", cause):
        assert line in text
    assert all(set(message) == {"timestamp", "level", "message"} for message in messages)
    assert list((fleet.world.directory / "deployments").iterdir()) == []


def test_success_is_not_reported_before_the_new_system_was_committed(
    fleet: Fleet, manager: Manager
) -> None:
    fleet.cycle()
    assert manager.reported() == ["downloading", "installing", "rebooting"]
    fleet.restart()
    assert manager.reported()[-1] == "rebooting"
    fleet.settle()
    assert manager.reported()[-1] == "success"


# A server that is down


def test_a_server_that_is_down_after_the_restart_does_not_cost_a_good_system(
    fleet: Fleet, manager: Manager
) -> None:
    fleet.cycle()
    fleet.restart()
    manager.down = True
    fleet.cycle()
    assert "committed v2" in fleet.said
    assert fleet.world.environment.values["upgrade_available"] == "0"
    assert "success" not in manager.reported()
    fleet.restart()
    manager.down = False
    fleet.cycle()
    assert manager.reported()[-1] == "success", "reported late, but reported"


def test_where_contact_is_required_a_server_that_is_down_means_the_way_back(
    tmp_path: Path, manager: Manager, authority: Authority
) -> None:
    fleet = Fleet(tmp_path, manager, authority.ca_file, require_contact=True)
    fleet.cycle()
    fleet.restart()
    manager.down = True
    before = fleet.world.clock.now
    fleet.cycle()
    assert 200 < fleet.world.clock.now - before <= 300, "the whole budget was used, no more"
    fleet.restart()
    manager.down = False
    fleet.settle()
    assert fleet.world.running_image() == "v1"
    assert manager.statuses[-1][1] == "failure"
    assert "no contact with the server within 300 s of the restart" in manager.statuses[-1][2]


def test_where_contact_is_required_and_there_is_contact_it_is_committed(
    tmp_path: Path, manager: Manager, authority: Authority
) -> None:
    fleet = Fleet(tmp_path, manager, authority.ca_file, require_contact=True)
    fleet.settle()
    assert fleet.world.running_image() == "v2"
    assert manager.reported()[-1] == "success"


def test_where_contact_is_required_the_boot_leaves_the_commit_to_the_daemon(
    fleet: Fleet, capfd: pytest.CaptureFixture[str]
) -> None:
    fleet.cycle()
    fleet.restart()
    client = fleet.world.client()
    client.ports = client.ports._replace(observer=LeaveToDaemon())
    client.resume()
    assert "is proved and committed by the daemon" in capfd.readouterr().err
    assert fleet.world.store.update() is not None
    fleet.settle()
    assert fleet.world.running_image() == "v2"


# Downloads


def test_a_download_that_gave_up_is_no_failure_and_goes_on_in_the_next_cycle(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.device.spool.HOLD_BYTES", 64 * 1024)
    manager.stop_after = 600_000
    manager.answers = [("GET /artifact$", 503, b"", {})] * 0
    for _ in range(2):
        fleet.cycle()
    assert manager.deployment == "d-1"
    assert "failure" not in manager.reported()
    manager.stop_after = None
    fleet.settle()
    assert fleet.world.running_image() == "v2"
    assert manager.ranges[0] is None
    assert None not in manager.ranges[1:], "nothing was fetched twice"


def test_a_power_cut_in_a_download_is_no_failure_either(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.device.spool.HOLD_BYTES", 64 * 1024)
    monkeypatch.setattr("updater.device.spool.CHECKPOINT_BYTES", 256 * 1024)
    fleet.world.power.trip_on = "write b 1048576"
    fleet.cycle()
    assert fleet.world.power.off
    fleet.world.power.trip_on = ""
    fleet.restart()
    fleet.settle()
    assert "failure" not in manager.reported()
    assert manager.reported()[-1] == "success"
    assert len(manager.ranges) == 2
    assert int((manager.ranges[1] or "")[6:-1]) >= 1 << 20


def test_a_download_that_never_works_is_a_failure_in_the_end(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.device.client.MAX_ATTEMPTS", 3)
    manager.artifact = Path("/nonexistent")
    for attempt in range(3):
        assert manager.deployment == "d-1", attempt
        fleet.cycle()
    assert manager.statuses[-1][1] == "failure"
    assert "gave up at byte 0" in manager.statuses[-1][2]


def test_an_expired_link_is_renewed_through_the_server(fleet: Fleet, manager: Manager) -> None:
    """It runs out in the middle of the download: the first connection ends early."""
    manager.expires_after = 500_000
    fleet.settle()
    assert fleet.world.running_image() == "v2"
    assert manager.link == 2
    assert "the link has expired (403), a new one was fetched" in fleet.said
    assert manager.ranges == [None, "bytes=500000-"]
    asked = [path for _, path in manager.requests if path.endswith("/next")]
    assert len(asked) == 3, "the poll, the new link, and the poll after the restart"


# Control


def test_a_pause_holds_the_update_until_the_server_lets_it_go(
    fleet: Fleet, manager: Manager
) -> None:
    """Before the install, before the restart, and, after it, before the commit."""
    keys = ["ArtifactInstall_Enter", "ArtifactReboot_Enter", "ArtifactCommit_Enter"]
    manager.control = {"id": "c", "states": {key: {"action": "pause"} for key in keys}}
    clock = fleet.world.clock
    honest = clock.wait

    def wait(seconds: float) -> None:
        honest(seconds)
        # Whoever is asked lets one state go after the other.
        if manager.control is not None and manager.control["states"]:
            manager.control["states"].pop(next(iter(manager.control["states"])))

    clock.wait = wait  # type: ignore[method-assign]
    fleet.cycle()
    assert manager.reported() == [
        "downloading",
        "pause_before_installing",
        "installing",
        "pause_before_rebooting",
        "rebooting",
    ]
    fleet.restart()
    fleet.settle()
    assert manager.reported()[5:] == ["pause_before_committing", "installing", "success"]
    assert clock.waits == [300.0] * 3
    assert not (fleet.world.directory / "update-control").exists()


def test_a_pause_holds_through_a_restart_although_the_server_is_down(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.device.managed.MAX_PAUSE_S", 3600.0)
    manager.control = {"states": {"ArtifactCommit_Enter": {"action": "pause"}}}
    fleet.cycle()
    fleet.restart()
    manager.down = True
    assert (fleet.world.directory / "update-control").exists(), "init leaves it to the daemon"
    before = fleet.world.clock.now
    fleet.cycle()
    assert fleet.world.clock.now - before >= 3600
    assert "ArtifactCommit: paused for" in fleet.said, "and not for ever"
    manager.down = False
    manager.control = None
    fleet.restart()
    fleet.settle()
    assert fleet.world.running_image() == "v1"


def test_a_pause_before_the_restart_holds_when_the_daemon_starts_anew(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.control = {"states": {"ArtifactReboot_Enter": {"action": "pause"}}}
    honest = fleet.world.clock.wait

    def killed(seconds: float) -> None:
        raise PowerCutError

    fleet.world.clock.wait = killed  # type: ignore[method-assign]
    fleet.cycle()
    assert fleet.world.store.update() is not None
    # The process ended, not the device; a new one must not restart it either.
    fleet._daemon = None
    fleet.cycle()
    assert "restarting:" not in fleet.said
    manager.control = {"states": {}}
    fleet.world.clock.wait = honest  # type: ignore[method-assign]
    fleet._daemon = None
    fleet.settle()
    assert fleet.world.running_image() == "v2"


def cut_in_the_pause_before_the_install(fleet: Fleet, manager: Manager) -> None:
    """The power goes while an update waits for its installation; the device starts again."""
    manager.control = {"states": {"ArtifactInstall_Enter": {"action": "pause"}}}
    honest = fleet.world.clock.wait

    def cut(seconds: float) -> None:
        raise PowerCutError

    fleet.world.clock.wait = cut  # type: ignore[method-assign]
    fleet.cycle()
    fleet.world.clock.wait = honest  # type: ignore[method-assign]
    fleet.restart()


def test_a_pause_before_the_install_holds_through_a_restart_and_then_goes_on(
    fleet: Fleet, manager: Manager
) -> None:
    cut_in_the_pause_before_the_install(fleet, manager)
    # Init runs first, and knows no server.
    fleet.world.client().resume()
    assert fleet.world.store.update() is not None
    clock = fleet.world.clock
    honest, before = clock.wait, len(clock.waits)

    def wait(seconds: float) -> None:
        honest(seconds)
        manager.control = {"states": {}}

    clock.wait = wait  # type: ignore[method-assign]
    fleet.settle()
    assert clock.waits[before:] == [300.0], "it waited on"
    assert fleet.world.running_image() == "v2"
    assert manager.reported()[-1] == "success"
    assert manager.reported().count("downloading") == 1, "and nothing was fetched twice"


def test_any_number_of_restarts_in_a_pause_is_no_loop(fleet: Fleet, manager: Manager) -> None:
    for _ in range(40):
        cut_in_the_pause_before_the_install(fleet, manager)
    manager.control = {"states": {}}
    fleet.settle()
    assert fleet.world.running_image() == "v2"


def test_an_update_that_is_held_can_be_given_up_by_hand(fleet: Fleet, manager: Manager) -> None:
    cut_in_the_pause_before_the_install(fleet, manager)
    with pytest.raises(UpdaterError, match="not finished"):
        fleet.world.client().install(str(fleet.world.artifact))
    with pytest.raises(UpdaterError, match="nothing to commit"):
        fleet.world.client().commit()
    fleet.world.client().rollback()
    fleet.settle()
    assert fleet.world.running_image() == "v1"
    assert manager.reported()[-1] == "failure"


def test_a_cut_after_a_pause_is_an_interrupted_install_again(
    fleet: Fleet, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a pause leaves on record must not outlive it: then the install has begun."""

    def cut(self: Client) -> None:
        raise PowerCutError

    manager.control = {"states": {"ArtifactInstall_Enter": {"action": "pause"}}}
    honest = fleet.world.clock.wait

    def wait(seconds: float) -> None:
        honest(seconds)
        manager.control = {"states": {}}
        monkeypatch.setattr(Client, "activate", cut)

    fleet.world.clock.wait = wait  # type: ignore[method-assign]
    fleet.cycle()
    monkeypatch.undo()
    fleet.restart()
    fleet.settle()
    assert fleet.world.running_image() == "v1"
    assert manager.reported()[-1] == "failure"


def test_the_control_map_can_let_a_state_fail(fleet: Fleet, manager: Manager) -> None:
    manager.control = {"states": {"ArtifactInstall_Enter": {"action": "fail"}}}
    fleet.settle()
    assert fleet.world.running_image() == "v1"
    assert "update control lets ArtifactInstall fail" in manager.statuses[-1][2]


def test_an_aborted_deployment_stops_where_it_is(fleet: Fleet, manager: Manager) -> None:
    for status in ("downloading", "installing", "rebooting"):
        manager.aborted_at = status
        manager.deployment = f"d-{status}"
        fleet.settle()
        assert fleet.world.running_image() == "v1"
        assert fleet.world.environment.values["mender_boot_part"] == "2"
        assert manager.statuses[-1][1:] == ("failure", "the server has aborted the deployment")
    manager.aborted_at = ""
    manager.deployment = "d-9"
    fleet.settle()
    assert fleet.world.running_image() == "v2"


def test_what_is_installed_already_is_said_so(fleet: Fleet, manager: Manager) -> None:
    manager.name = "v1"
    fleet.cycle()
    assert manager.reported() == ["already-installed"]
    assert fleet.world.store.last_outcome() is None


def test_an_update_waits_for_its_maintenance_window(
    tmp_path: Path, manager: Manager, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        # It is Tuesday, 22:13:20.
        fleet = Fleet(tmp_path, manager, authority.ca_file, windows=("02:00-04:00",))
        before = fleet.world.clock.now
        fleet.cycle()
        assert fleet.world.clock.now - before == pytest.approx(3 * 3600 + 46 * 60 + 40, abs=30)
        assert "pause_before_installing" in manager.reported()
        assert "ArtifactInstall waits: outside the maintenance window" in fleet.said
        fleet.restart()
        fleet.settle()
        assert fleet.world.running_image() == "v2"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_windows() -> None:
    night = [parse_window("22:00-04:30")]
    assert night == [Window((0, 1, 2, 3, 4, 5, 6), 22 * 60, 28 * 60 + 30)]
    assert minutes_until_open(night, 1, 23 * 60) == 0
    assert minutes_until_open(night, 1, 4 * 60 + 29) == 0
    assert minutes_until_open(night, 1, 4 * 60 + 30) == 17 * 60 + 30
    weekend = [parse_window("Sat,Sun 00:00-24:00")]
    assert minutes_until_open(weekend, 6, 23 * 60 + 59) == 0
    assert minutes_until_open(weekend, 0, 0) == 5 * 24 * 60
    late = [parse_window("Sun 23:00-01:00")]
    assert minutes_until_open(late, 0, 30) == 0
    assert minutes_until_open([], 3, 3) == 0
    for wrong in ("22-04", "25:00-03:00", "Xyz 01:00-02:00", "01:00-02:60", ""):
        with pytest.raises(ValueError, match="'"):
            parse_window(wrong)


# Truthfulness under power cuts


@pytest.mark.parametrize("healthy", [True, False])
def test_after_a_cut_at_any_event_the_server_knows_what_happened(
    tmp_path: Path, manager: Manager, authority: Authority, healthy: bool
) -> None:
    """What the device runs, what it recorded, and what the server was told are one thing."""
    cuts = 0
    for cut_at in range(1, 60):
        manager.deployment, manager.statuses = "d-1", []
        fleet = Fleet(tmp_path / str(cut_at), manager, authority.ca_file, cut_at)
        fleet.world.healthy = healthy
        fleet.world.power.cut_at = cut_at
        fleet.cycle()
        fleet.restart()
        if fleet.world.power.events < cut_at:
            # The update waits for the restart: the counting goes on over the new system's start.
            fleet.world.power.cut_at = cut_at
            fleet.cycle()
            reached = fleet.world.power.off
            fleet.restart()
        else:
            reached = True
        fleet.settle()
        judge(fleet.world, fleet.said)
        final = [entry for entry in manager.statuses if entry[1] in ("success", "failure")]
        image = fleet.world.running_image()
        assert final[-1][1] == ("success" if image == "v2" else "failure"), fleet.said
        assert image == "v2" or final[-1][2], "a failure without a cause"
        assert healthy or image == "v1"
        cuts += reached
        if not reached:
            break
    assert cuts >= 15


# Identity and inventory


def test_inventory_comes_from_every_script_that_works(
    fleet: Fleet, manager: Manager, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = fleet.world.directory / "inventory"
    directory.mkdir()
    for name, body in {
        "mender-inventory-a": "echo kernel=6.1; echo ip=1; echo ip=2",
        "mender-inventory-b": "echo broken >&2; exit 1",
        "other": "echo no=1",
    }.items():
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    found = inventory(fleet.world.config.server, {"device_type": "x"})
    assert found == [
        {"name": "kernel", "value": "6.1"},
        {"name": "ip", "value": ["1", "2"]},
        {"name": "device_type", "value": "x"},
    ]
    assert "mender-inventory-b exited with 1: broken" in capfd.readouterr().err
    manager.deployment = None
    manager.answers = [("PUT .*attributes", 405, b"", {})]
    fleet.cycle()
    assert ("PATCH", "/api/devices/v1/inventory/device/attributes") in manager.requests
    assert manager.inventory["ip"] == ["1", "2"]
    count = len(manager.requests)
    fleet.cycle()
    assert len(manager.requests) == count + 1, "inventory is not due yet"


def test_an_identity_script_that_fails_is_an_error_not_another_identity(tmp_path: Path) -> None:
    script = tmp_path / "identity"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ConfigError, match="exited with 3: the device has no name"):
        identity(ServerConfig(identity=str(script)))
    script.unlink()
    assert set(json.loads(identity(ServerConfig(identity=str(script))))) == {"mac"}


def test_a_key_file_that_is_none_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("garbage")
    with pytest.raises(UpdaterError, match=r"key\.pem: not a private key"):
        DeviceKey(str(tmp_path / "key.pem"), "ed25519")
    assert (tmp_path / "key.pem").read_text() == "garbage"


# The process


@pytest.fixture
def daemon(tmp_path: Path, manager: Manager, authority: Authority) -> Iterator[list[str]]:
    from test_updater_modules import GRUB_ENV

    for name in "ab":
        (tmp_path / f"{name}.img").write_bytes(bytes(4096))
    (tmp_path / "artifact_info").write_text("artifact_name=v1\n")
    for number in "12":
        (tmp_path / number).mkdir()
        for name in ("env", "lock"):
            (tmp_path / number / name).write_bytes(GRUB_ENV[name])
    (tmp_path / "running").write_text("a")
    (tmp_path / "boot").write_text("1")
    (tmp_path / "updater.toml").write_text(
        f"""device_type = "{DEVICE_TYPE}"
data_dir = "{tmp_path}/data"
artifact_info = "{tmp_path}/artifact_info"
[slots]
a = {{device = "{tmp_path}/a.img", number = 2}}
b = {{device = "{tmp_path}/b.img", number = 3}}
[bootenv]
kind = "grub"
copies = ["{tmp_path}/1/env", "{tmp_path}/2/env"]
[tls]
ca_file = "{authority.ca_file}"
[server]
url = "{manager.url}"
poll_s = 600
"""
    )
    program = Path(__file__).with_name("updater_device.py")
    yield [sys.executable, str(program), str(tmp_path), "0", "daemon"]


def test_the_daemon_sleeps_in_one_piece_between_polls_and_ends_on_a_signal(
    daemon: list[str], manager: Manager
) -> None:
    manager.deployment = None
    with subprocess.Popen(daemon, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line == "updater: state Idle\n":
                break

        def switches() -> int:
            text = Path(f"/proc/{process.pid}/status").read_text()
            return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

        time.sleep(0.5)
        before = switches()
        time.sleep(2.0)
        assert switches() == before, "it woke up between two polls"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted by SIGTERM" in err


def test_one_cycle_and_a_configuration_without_a_server(
    daemon: list[str], manager: Manager, tmp_path: Path
) -> None:
    manager.deployment = None
    done = subprocess.run([*daemon, "--once"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "device-key.pem").stat().st_mode & 0o777 == 0o600
    config = tmp_path / "updater.toml"
    config.write_text(config.read_text().partition("[server]")[0])
    done = subprocess.run([*daemon, "--once"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no [server] with a url" in done.stderr
