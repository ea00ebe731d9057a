"""The state machine's table: documented as it is, complete, bounded; deadlines that strike."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from updater_judge import operate, settle
from updater_world import World, world_artifact

from updater.device import command, states
from updater.device.client import Client, NoObserver
from updater.device.errors import DeadlineError, InterruptedBySignal, UpdaterError
from updater.device.model import State, Update
from updater.device.signals import deferred, limit
from updater.device.states import TABLE, Event


def test_the_documented_states_are_those_of_the_table() -> None:
    document = Path(states.__file__).with_name("STATES.md").read_text(encoding="utf-8")
    assert document == states.document(), "run python -m updater.device.states"


def test_every_state_has_a_row_an_action_and_a_deadline() -> None:
    assert set(TABLE) == set(State)
    for state, step in TABLE.items():
        assert 0 < step.deadline_s <= 25 * 3600
        if state not in (State.IDLE, State.SYNC):
            assert callable(getattr(Client, step.action))


def test_every_state_is_reached_and_every_path_ends() -> None:
    reached = {State.IDLE}
    while True:
        further = {
            after for state in reached for after in TABLE[state].after.values() if after is not None
        }
        restarts = {
            {State.REBOOT: State.VERIFY, State.ROLLBACK_REBOOT: State.VERIFY_ROLLBACK}[state]
            for state in reached
            if Event.RESTART in TABLE[state].after
        }
        if further | restarts <= reached:
            break
        reached |= further | restarts
    assert reached == set(State)
    for state in State:
        assert State.IDLE in _reachable(state), f"{state} never ends"


def _reachable(state: State) -> set[State]:
    found: set[State] = set()
    front = {state}
    while front:
        found |= front
        front = {
            after
            for one in front
            for after in TABLE[one].after.values()
            if after is not None and after not in found
        }
    return found


def test_after_the_download_no_error_skips_the_rollback() -> None:
    for state in (State.INSTALL, State.REBOOT, State.VERIFY, State.COMMIT):
        assert TABLE[state].after[Event.FAILED] is State.ROLLBACK


def test_a_limit_ends_what_takes_too_long_but_not_a_transaction() -> None:
    started = time.monotonic()
    message = r"Sync did not finish within 0\.1 s"
    with pytest.raises(DeadlineError, match=message), limit("Sync", 0.1):
        time.sleep(30)
    assert time.monotonic() - started < 10
    done = False
    with pytest.raises(DeadlineError), limit("Sync", 0.1), deferred():
        time.sleep(0.3)
        done = True
    assert done
    with limit("Sync", 30):
        pass
    time.sleep(0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_artifact(tmp_path_factory.mktemp("artifact"))


BEFORE_THE_RESTART = (State.DOWNLOAD, State.INSTALL, State.REBOOT)


@pytest.mark.parametrize("state", [*BEFORE_THE_RESTART, State.VERIFY, State.COMMIT])
def test_a_state_past_its_deadline_fails_and_says_so(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    """In whichever state: the old system runs, the cause names the state."""
    world = World(tmp_path, artifact)
    action = TABLE[state].action
    honest = getattr(Client, action)

    def hang(self: Client) -> Event:
        time.sleep(30)
        return honest(self)  # type: ignore[no-any-return]

    monkeypatch.setattr(Client, action, hang)
    monkeypatch.setitem(TABLE, state, TABLE[state]._replace(deadline_s=0.2))
    world.limit = limit
    _, said = operate(world, "install", "v2.mender")
    said += settle(world)
    assert f"error: {state} did not finish within 0.2 s" in said
    outcome = world.store.last_outcome()
    assert outcome is not None
    assert outcome.cause == f"{state} did not finish within 0.2 s"
    assert world.running_image() == "v1"


@pytest.mark.parametrize(
    "case",
    [
        (State.DOWNLOAD, "interrupted by SIGINT; nothing is lost, run the command again", "v1"),
        (State.REBOOT, "interrupted by SIGINT; slot b is still armed: the next restart", "v2"),
    ],
)
def test_who_interrupts_an_installation_is_told_what_the_next_restart_starts(
    tmp_path: Path,
    artifact: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[State, str, str],
) -> None:
    world = World(tmp_path, artifact)
    state, said, started = case

    class Impatient(NoObserver):
        def entering(self, update: Update, entered: State, hold: Callable[[], None]) -> None:
            if entered is state:
                raise InterruptedBySignal(signal.SIGINT, "SIGINT")

    client = world.client()
    client.ports = client.ports._replace(observer=Impatient())
    with pytest.raises(InterruptedBySignal) as interrupted:
        command.operate(client, "install", "v2.mender")
    assert command.last_word(interrupted.value) == 130
    assert said in capsys.readouterr().err
    world.restart()
    assert world.running_image() == started


def test_a_cause_survives_every_restart_up_to_the_record(tmp_path: Path, artifact: Path) -> None:
    world = World(tmp_path, artifact)
    world.healthy = False
    operate(world, "install", "v2.mender")
    world.restart()
    operate(world, "resume")
    cause = "health check 50-sick exited with 1: checked"
    recorded = world.store.update()
    assert recorded is not None
    assert recorded.cause == cause
    settle(world)
    assert any(cause in line for line in world.client().status())


def test_a_reboot_that_nobody_asked_for_is_not_counted_as_a_loop(
    tmp_path: Path, artifact: Path
) -> None:
    """Fifty updates in a row: the counter begins anew with each."""
    world = World(tmp_path, artifact)
    world.artifact = tmp_path / "absent"
    for _ in range(50):
        assert "error" in operate(world, "install", "v3.mender")[1]
    world.artifact = artifact
    _, said = operate(world, "install", "v2.mender")
    assert "committed v2" in said + settle(world)


def test_errors_are_one_line(tmp_path: Path, artifact: Path) -> None:
    world = World(tmp_path, artifact)
    with pytest.raises(UpdaterError) as caught:
        world.client().install("v3.mender")
    assert "\n" not in str(caught.value)
