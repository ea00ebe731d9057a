"""Each check of the client's newer parts catches a bug that is planted for it.

The checks are the tests themselves, run with one safety step taken out; each must fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import test_updater_managed as managed
import test_updater_modules as modules
import test_updater_scripts as scripts
import test_updater_spool as spools
from updater_artifacts import DEVICE_TYPE
from updater_manager import Manager, managing
from updater_server import Authority
from updater_world import world_artifact

from updater.device import model, spool
from updater.device.client import Client
from updater.device.managed import STATUSES, ServerObserver
from updater.device.model import Decision, Outcome, Part, State, Update
from updater.device.store import SqliteStore

scripted = scripts.scripted
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def fleet(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[managed.Fleet]:
    artifact = world_artifact(tmp_path_factory.mktemp("artifact"))
    context = authority.server_context("127.0.0.1")
    with managing(context, Manager(artifact, DEVICE_TYPE)) as manager:
        yield managed.Fleet(tmp_path, manager, authority.ca_file)


def test_a_record_that_does_not_say_which_scripts_ran_is_caught(
    tmp_path: Path, scripted: Path, monkeypatch: Patch
) -> None:
    honest = SqliteStore.save

    def forgetful(self: SqliteStore, update: Update) -> None:
        honest(self, update._replace(part=Part.ACTION))

    monkeypatch.setattr(SqliteStore, "save", forgetful)
    check = scripts.test_a_cut_at_any_event_with_scripts_ends_with_whole_scripts
    with pytest.raises(AssertionError, match=r"without its migration|ArtifactFailure|Commit_Leave"):
        check(tmp_path, scripted, healthy=True)


def test_an_interrupted_module_that_is_not_rolled_back_is_caught(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    honest = model._decide_module

    def careless(update: Update, restarted: bool) -> Decision:
        decision = honest(update, restarted)
        return Decision.CLOSE_ROLLED_BACK if decision is Decision.REVERT else decision

    def no_rollback(self: Client) -> Any:
        return honest_roll_back(self) if self._current().is_image else scripts_event()

    def scripts_event() -> Any:
        from updater.device.states import Event

        return Event.NO_REBOOT

    honest_roll_back = Client.roll_back
    monkeypatch.setattr(model, "_decide_module", careless)
    monkeypatch.setattr(Client, "roll_back", no_rollback)
    check = modules.test_a_cut_at_any_event_of_a_module_update_leaves_the_old_or_the_new_files
    with pytest.raises(AssertionError):
        check(tmp_path, "single-file")


def test_an_error_that_is_ignored_and_forgotten_is_caught(
    tmp_path: Path, scripted: Path, monkeypatch: Patch
) -> None:
    honest = Client._provides_now

    def clean(self: Client, update: Update, *, committed: bool) -> dict[str, str] | None:
        return honest(self, update._replace(inconsistent=False), committed=committed)

    monkeypatch.setattr(Client, "_provides_now", clean)
    check = scripts.test_an_error_that_has_to_be_ignored_makes_the_name_inconsistent
    with pytest.raises(AssertionError):
        check(tmp_path, scripted, "ArtifactRollback_Enter")


def test_a_spool_that_is_trusted_unseen_is_caught(
    tmp_path: Path,
    authority: Authority,
    monkeypatch: Patch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(spool, "CHECKPOINT_BYTES", 256 * 1024)
    monkeypatch.setattr(spool, "HOLD_BYTES", 64 * 1024)
    honest = spool.Checkpoint

    class Whatever(str):
        __slots__ = ()

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = str.__hash__

    def trusting(*values: Any, **named: Any) -> spool.Checkpoint:
        made = honest(*values, **named)
        return made._replace(sha256=Whatever(made.sha256))

    monkeypatch.setattr(spool, "Checkpoint", trusting)
    check = spools.test_a_spool_that_is_not_what_was_downloaded_is_thrown_away
    with pytest.raises(AssertionError):
        check(authority, tmp_path, "flip", capfd)


def test_an_outcome_that_the_server_is_never_told_is_caught(
    fleet: managed.Fleet, monkeypatch: Patch
) -> None:
    honest = SqliteStore.finish

    def silent(self: SqliteStore, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
        honest(self, outcome._replace(again=True), provides)

    monkeypatch.setattr(SqliteStore, "finish", silent)
    with pytest.raises(AssertionError):
        managed.test_a_whole_deployment(fleet, fleet.manager)


def test_success_reported_before_the_restart_is_caught(
    fleet: managed.Fleet, monkeypatch: Patch
) -> None:
    monkeypatch.setitem(STATUSES, State.REBOOT, "success")
    check = managed.test_success_is_not_reported_before_the_new_system_was_committed
    with pytest.raises(AssertionError):
        check(fleet, fleet.manager)


def test_a_contact_that_is_required_but_not_made_is_caught(
    tmp_path: Path, fleet: managed.Fleet, authority: Authority, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(ServerObserver, "proving", lambda self, update: None)
    check = managed.test_where_contact_is_required_a_server_that_is_down_means_the_way_back
    with pytest.raises(AssertionError):
        check(tmp_path / "second", fleet.manager, authority)
