"""The client: install, prove, commit, roll back, and find one's feet after any power cut.

    Idle → Download → ArtifactInstall → ArtifactReboot ⇢ (restart)
         ⇢ ArtifactVerifyReboot → ArtifactCommit → Cleanup → Idle
    errors: Download → Cleanup; ArtifactInstall, ArtifactVerifyReboot, ArtifactCommit
            → ArtifactRollback (⇢ restart when the new system runs) → ArtifactFailure → Cleanup

`TABLE` is that diagram as data and drives the client. A state is persisted before its action
runs, so that a boot always finds how far the last one came; `model.decide` says what to do then.
Everything that touches the outside comes in through `Ports`. Nothing here is imported before it
is needed: at a boot with nothing to do, no cryptography, TLS or decompression is loaded.
"""

from __future__ import annotations

from typing import NamedTuple

from updater.device import bootenv
from updater.device.config import Config, Slot
from updater.device.console import say
from updater.device.errors import (
    BootEnvError,
    NothingInProgressError,
    SlotError,
    StoreError,
    UpdaterError,
)
from updater.device.model import (
    Boot,
    Decision,
    Outcome,
    Result,
    State,
    Update,
    decide,
    fallback_cause,
    provides_after,
)
from updater.device.signals import deferred

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.ports import (
        BootEnvironment,
        Clock,
        Health,
        Machine,
        Reboot,
        StateStore,
        Transport,
    )
    from updater.device.slot_writer import Payload


class Ports(NamedTuple):
    """Everything outside the client, injected once."""

    machine: Machine
    bootenv: BootEnvironment
    store: StateStore
    clock: Clock
    transport: Transport
    reboot: Reboot
    health: Health


class Step(NamedTuple):
    """One row of the state machine; None ends the run there."""

    action: str
    on_success: State | None
    on_error: State | None


TABLE: dict[State, Step] = {
    State.DOWNLOAD: Step("download", State.INSTALL, State.CLEANUP),
    State.INSTALL: Step("activate", State.REBOOT, State.ROLLBACK),
    State.REBOOT: Step("await_reboot", None, State.ROLLBACK),
    State.VERIFY: Step("verify", State.COMMIT, State.ROLLBACK),
    State.COMMIT: Step("commit_environment", State.CLEANUP, State.ROLLBACK),
    State.ROLLBACK: Step("roll_back", State.FAILURE, None),
    State.FAILURE: Step("report_failure", State.CLEANUP, State.CLEANUP),
    State.CLEANUP: Step("clean_up", State.IDLE, None),
}

# These go on even when the store does not take their name: leaving a bad system matters more.
_UNSTOPPABLE = (State.ROLLBACK, State.FAILURE, State.CLEANUP)


class Client:
    """One operation of the client, from start to where it has to stop."""

    def __init__(self, config: Config, ports: Ports) -> None:
        self.config = config
        self.ports = ports
        self.location = ""
        self.reboot_needed = False
        self._update: Update | None = None
        self._result = Result.FAILED
        self._errors: list[UpdaterError] = []

    # The operations: what the command line offers.

    def install(self, location: str) -> None:
        """Fetch `location` into the passive slot and arm it for the next boot."""
        self._settle_leftovers()
        running = self.ports.machine.running_slot(self.config.slots)
        target = self._other(running)
        self._check_passive(running, target)
        self.location = location
        self._update = Update(
            artifact_name=location.rstrip("/").rpartition("/")[2].partition("?")[0] or location,
            previous_name=self.artifact_name(),
            source=running.name,
            target=target.name,
            state=State.DOWNLOAD,
            boot_id="",
        )
        self._run(State.DOWNLOAD)

    def resume(self) -> None:
        """Go on where the last boot or process stopped; with nothing to do, do it fast."""
        try:
            self._update = self.ports.store.update()
        except StoreError as error:
            # What runs may be an unproven system whose record is lost: then it must be left.
            self._leave_unrecorded_trial()
            raise error
        if self._update is None:
            self._leave_unrecorded_trial()
            return
        self._follow(self._decide())

    def commit(self) -> None:
        """Prove and commit the running system; NothingInProgressError when there is no trial."""
        self._update = self._update_in_progress("commit")
        decision = self._decide()
        if decision is Decision.AWAIT_REBOOT:
            raise UpdaterError(
                f"{self._update.artifact_name} waits in slot {self._update.target}:"
                " reboot into it before committing"
            )
        self._follow(decision)
        if decision in (Decision.CLOSE_INTERRUPTED, Decision.CLOSE_ROLLED_BACK):
            raise NothingInProgressError("nothing to commit: the update is not running")

    def rollback(self) -> None:
        """Give up the update in progress; NothingInProgressError when there is none."""
        self._update = self._update_in_progress("roll back")
        decision = self._decide()
        if decision in (Decision.AWAIT_REBOOT, Decision.PROVE):
            self._note_cause("rollback was asked for")
            self._result = Result.ROLLED_BACK
            self._run(State.ROLLBACK)
            return
        self._follow(decision)
        if decision is Decision.FINISH_COMMIT:
            raise NothingInProgressError("nothing to roll back: the update was committed")

    def artifact_name(self) -> str:
        """Return the name of the artifact that runs."""
        update = self.ports.store.update()
        if update is not None:
            running = self.ports.machine.running_slot(self.config.slots)
            if running.name == update.target:
                return update.artifact_name
        return self.provides().get("artifact_name", "unknown")

    def provides(self) -> dict[str, str]:
        """Return what the committed system provides."""
        return self.ports.store.provides() or self._shipped_provides()

    def status(self) -> list[str]:
        """Return lines for a person: state, running system, last outcome and its cause."""
        import time  # noqa: PLC0415

        update = self.ports.store.update()
        running = self.ports.machine.running_slot(self.config.slots)
        lines = [f"running: {self.artifact_name()} (slot {running.name})"]
        if update is None:
            lines.insert(0, f"state: {State.IDLE}")
        else:
            lines.insert(0, f"state: {update.state} ({update.artifact_name}, slot {update.target})")
            if update.cause:
                lines.append(f"cause: {update.cause}")
        outcome = self.ports.store.last_outcome()
        if outcome is not None:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(outcome.finished_at))
            line = f"last update: {outcome.artifact_name} {outcome.result} at {when}"
            lines.append(f"{line}: {outcome.cause}" if outcome.cause else line)
        return lines

    # The state machine.

    def _run(self, first: State) -> None:
        """Follow TABLE from `first`; raise the first error when the end is reached."""
        state: State | None = first
        while state is not None and state is not State.IDLE:
            step = TABLE[state]
            try:
                self._enter(state)
                go_on = getattr(self, step.action)()
            except UpdaterError as error:
                self._errors.append(error)
                self._note_cause(str(error))
                state = step.on_error
            else:
                state = step.on_success if go_on else None
        if state is State.IDLE:
            say(f"state {State.IDLE}")
        if self._errors:
            first_error = self._errors[0]
            also = "; then: ".join(str(error) for error in self._errors[1:])
            raise UpdaterError(f"{first_error}; then: {also}" if also else str(first_error))

    def _enter(self, state: State) -> None:
        """Persist that `state` begins, then say so."""
        update = self._current()
        self._update = update._replace(state=state, boot_id=self.ports.machine.boot_id())
        try:
            self.ports.store.save(self._update)
        except StoreError as error:
            if state not in _UNSTOPPABLE:
                raise
            self._errors.append(error)
        say(f"state {state}")

    def download(self) -> bool:
        """Stream the artifact into the passive slot, durable and read back."""
        from updater.artifact import ArtifactError, ArtifactReader, check_compatible  # noqa: PLC0415
        from updater.artifact.signature import load_public_key  # noqa: PLC0415

        try:
            keys = [load_public_key(path) for path in self.config.artifact_keys]
            with self.ports.transport.open(self.location) as stream:
                reader = ArtifactReader(stream, keys)
                check_compatible(reader, self.config.device_type, self.provides())
                if reader.scripts:
                    raise UpdaterError(
                        f"{reader.artifact_name} has state scripts, which this client cannot run"
                    )
                self._update = self._current()._replace(
                    artifact_name=reader.artifact_name,
                    provides=reader.provides,
                    clears=reader.type_info.clears,
                )
                self.ports.store.save(self._update)
                self.fill_slot(reader.payload)
        except ArtifactError as error:
            raise UpdaterError(str(error)) from error
        return True

    def fill_slot(self, payload: Payload) -> None:
        """Write, sync, read back: only then may `activate` follow."""
        from updater.device.slot_writer import SlotWriter  # noqa: PLC0415

        target = self._slot(self._current().target)
        device = self.ports.machine.open_slot(target)
        try:
            writer = SlotWriter(device, target)
            writer.write(payload)
            writer.sync()
            writer.read_back(payload)
        except BaseException:
            try:
                device.close()
            except SlotError as error:
                say(f"also: {error}")
            raise
        device.close()

    def activate(self) -> bool:
        """Arm the new slot for one trial boot: one transaction, read back."""
        with deferred():
            bootenv.start_trial(self.ports.bootenv, self._slot(self._current().target))
        return True

    def await_reboot(self) -> bool:
        """Say that everything is in place."""
        update = self._current()
        say(f"installed {update.artifact_name} into slot {update.target}; reboot to start it")
        return False

    def verify(self) -> bool:
        """Let the new system prove itself."""
        self.ports.health.run()
        return True

    def commit_environment(self) -> bool:
        """Make the proven system the one that is started, for good."""
        with deferred():
            bootenv.settle(self.ports.bootenv, self._slot(self._current().target))
        self._result = Result.COMMITTED
        return True

    def roll_back(self) -> bool:
        """Point the boot environment at the old system; ask for a restart if it does not run."""
        update = self._current()
        with deferred():
            bootenv.settle(self.ports.bootenv, self._slot(update.source))
        if self.ports.machine.running_slot(self.config.slots).name != update.target:
            return True
        say(
            f"rolling back to {update.previous_name} (slot {update.source}),"
            f" reboot needed: {update.cause}"
        )
        self._request_reboot()
        return False

    def report_failure(self) -> bool:
        """Keep the cause for the outcome; artifacts' failure scripts belong here."""
        return True

    def clean_up(self) -> bool:
        """Record the outcome and forget the update, in one transaction."""
        update = self._current()
        committed = self._result is Result.COMMITTED
        slot = update.target if committed else update.source
        cause = "" if committed else update.cause
        provides = None
        if committed:
            provides = provides_after(self.provides(), update.provides, update.clears)
        self.ports.store.finish(
            Outcome(
                self._result, update.artifact_name, slot, cause, self.ports.clock.utc_seconds()
            ),
            provides,
        )
        if committed:
            say(f"committed {update.artifact_name} (slot {slot})")
        elif self._result is Result.ROLLED_BACK:
            say(f"rolled back to {update.previous_name} (slot {slot}): {cause}")
        elif self._result is Result.INTERRUPTED:
            say(
                f"{update.artifact_name} was not installed, {update.previous_name}"
                f" (slot {slot}) stays: {cause}"
            )
        return True

    # Finding one's feet.

    def _decide(self) -> Decision:
        running = self.ports.machine.running_slot(self.config.slots).name
        update = self._current()
        boot = self._boot()
        decision = decide(update, running, boot, self.ports.machine.boot_id())
        if decision is Decision.PROVE and boot != Boot(update.target, trial=True):
            say(
                f"slot {running} runs although the boot environment names"
                f" {f'slot {boot.slot}' if boot.slot else 'no slot'}; it is settled after the"
                " health checks"
            )
        return decision

    def _follow(self, decision: Decision) -> None:
        update = self._current()
        if decision is Decision.AWAIT_REBOOT:
            say(f"{update.artifact_name} waits in slot {update.target}; reboot to start it")
        elif decision is Decision.PROVE:
            self._run(State.VERIFY)
        elif decision is Decision.FINISH_COMMIT:
            self._result = Result.COMMITTED
            self._run(State.CLEANUP)
        elif decision is Decision.ROLL_BACK:
            self._note_cause(fallback_cause(update))
            self._run(State.ROLLBACK)
        elif decision is Decision.REBOOT_AGAIN:
            say(f"reboot needed to return to slot {update.source}: {update.cause}")
            self._request_reboot()
        elif decision is Decision.STRANDED:
            self._note_cause(fallback_cause(update))
            self._errors.append(
                UpdaterError(
                    f"slot {update.target} runs again although slot {update.source} was to be"
                    f" started; slot {update.source} may be damaged"
                )
            )
            self._run(State.FAILURE)
        else:
            self._close(decision)

    def _close(self, decision: Decision) -> None:
        """Record an update that left us on the old system."""
        update = self._current()
        source = self._slot(update.source)
        if self._boot() != Boot(source.name, trial=False):
            with deferred():
                bootenv.settle(self.ports.bootenv, source)
        if decision is Decision.CLOSE_INTERRUPTED:
            self._result = Result.INTERRUPTED
            self._note_cause(f"interrupted in {update.state}")
            self._run(State.CLEANUP)
        else:
            self._result = Result.ROLLED_BACK
            self._note_cause(fallback_cause(update))
            self._run(State.FAILURE)

    def _settle_leftovers(self) -> None:
        """Close an update that an earlier process left behind, or refuse a second one."""
        self._update = self.ports.store.update()
        if self._update is None:
            return
        decision = self._decide()
        if decision not in (Decision.CLOSE_INTERRUPTED, Decision.CLOSE_ROLLED_BACK):
            raise UpdaterError(
                f"the update to {self._update.artifact_name} is not finished ({decision});"
                " reboot, `updater commit` or `updater rollback` first"
            )
        self._close(decision)
        self._result = Result.FAILED

    def _leave_unrecorded_trial(self) -> None:
        """Never stay on a trial that nobody remembers: it would be an unproven system."""
        boot = self._boot()
        if not boot.trial:
            return
        running = self.ports.machine.running_slot(self.config.slots)
        if boot.slot != running.name:
            with deferred():
                bootenv.settle(self.ports.bootenv, running)
            return
        other = self._other(running)
        with deferred():
            bootenv.settle(self.ports.bootenv, other)
        say(
            f"error: slot {running.name} is on trial but the record of its update is lost;"
            f" returning to slot {other.name}, reboot needed"
        )
        self._request_reboot()

    def _check_passive(self, running: Slot, target: Slot) -> None:
        """Refuse a target that is in use; make sure that the boot environment agrees."""
        user = self.ports.machine.user_of(target)
        if user is not None:
            raise SlotError(f"slot {target.name} ({target.device}) is {user}; unmount it first")
        boot = self._boot()
        if boot.trial:
            raise UpdaterError(
                f"slot {boot.slot} is on trial without a record; run `updater resume` first"
            )
        if boot.slot != running.name:
            say(
                f"the boot environment names {f'slot {boot.slot}' if boot.slot else 'no slot'} but"
                f" slot {running.name} runs; settling it on slot {running.name}"
            )
            with deferred():
                bootenv.settle(self.ports.bootenv, running)

    def _boot(self) -> Boot:
        try:
            return bootenv.read_boot(self.ports.bootenv, self.config.slots)
        except BootEnvError as error:
            say(f"warning: {error}")
            return Boot(None, trial=False)

    def _update_in_progress(self, verb: str) -> Update:
        update = self.ports.store.update()
        if update is None:
            raise NothingInProgressError(f"nothing to {verb}: no update is in progress")
        return update

    def _current(self) -> Update:
        assert self._update is not None
        return self._update

    def _note_cause(self, cause: str) -> None:
        """Keep the first cause; what follows from it is not the news."""
        update = self._current()
        if not update.cause:
            self._update = update._replace(cause=cause)

    def _request_reboot(self) -> None:
        self.reboot_needed = True
        self.ports.reboot.request()

    def _slot(self, name: str) -> Slot:
        for slot in self.config.slots:
            if slot.name == name:
                return slot
        raise SlotError(f"the store names slot {name!r}, which {self.config.path} does not have")

    def _other(self, slot: Slot) -> Slot:
        first, second = self.config.slots
        return second if slot == first else first

    def _shipped_provides(self) -> dict[str, str]:
        """Read the key=value lines that the root file system was built with."""
        path = self.config.artifact_info
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123 - boot path
                text = file.read(64 * 1024)
        except (OSError, UnicodeDecodeError) as error:
            say(f"warning: {path}: {error}")
            return {}
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, equals, value in pairs if equals}
