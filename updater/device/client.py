"""The client: install, prove, commit, roll back, and find one's feet after any power cut.

`states.TABLE` is the state machine as data, and drives the client; `STATES.md` shows it. A state
is persisted before anything in it runs, so that a boot always finds how far the last one came;
`model.decide` says what to do then. A root file system image goes into the passive slot; any
other payload goes to an update module (`modules.py`). Everything that touches the outside comes
in through `Ports`. Nothing here is imported before it is needed: at a boot with nothing to do, no
cryptography, TLS or decompression is loaded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from updater.device import bootenv
from updater.device.config import Config, Slot
from updater.device.console import say
from updater.device.errors import (
    BootEnvError,
    LoopError,
    NothingInProgressError,
    SlotError,
    StoreError,
    TransportError,
    UpdaterError,
)
from updater.device.model import (
    MAX_STEPS,
    Boot,
    Decision,
    Outcome,
    Part,
    Result,
    State,
    Update,
    decide,
    fallback_cause,
    provides_after,
)
from updater.device.signals import deferred
from updater.device.states import TABLE, Event

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.artifact import ArtifactReader
    from updater.device.ports import (
        BootEnvironment,
        Clock,
        Health,
        Machine,
        Modules,
        Observer,
        Reboot,
        Scripts,
        StateStore,
        Transport,
    )
    from updater.device.slot_writer import Payload


class NoObserver:
    """Nobody watches: an installation by hand."""

    manages = False

    def proves(self, update: Update) -> bool:
        """Say yes."""
        return True

    def entering(self, update: Update, state: State, hold: Callable[[], None]) -> None:
        """Return at once."""

    def proving(self, update: Update) -> None:
        """Return at once."""

    def finished(self, update: Update, outcome: Outcome) -> None:
        """Return at once."""


class LeaveToDaemon(NoObserver):
    """At boot, where a deployment may only be committed after contact with the server."""

    def proves(self, update: Update) -> bool:
        """Leave deployments to the daemon, which runs later and knows the server."""
        return not update.deployment


def no_limit(what: str, seconds: float) -> AbstractContextManager[None]:
    """Set no limit: time that nobody measures does not run out."""
    return nullcontext()


class Ports(NamedTuple):
    """Everything outside the client, injected once."""

    machine: Machine
    bootenv: BootEnvironment
    store: StateStore
    clock: Clock
    transport: Transport
    reboot: Reboot
    health: Health
    scripts: Scripts
    modules: Modules | None = None
    observer: Observer = NoObserver()
    limit: Limit = no_limit


if TYPE_CHECKING:
    from collections.abc import Callable

    Limit = Callable[[str, float], AbstractContextManager[None]]

# These go on even when the store does not take their name: leaving a bad system matters more.
_UNSTOPPABLE = (
    State.ROLLBACK,
    State.ROLLBACK_REBOOT,
    State.VERIFY_ROLLBACK,
    State.FAILURE,
    State.CLEANUP,
)
# How often a deployment's download is begun or resumed before the deployment has failed.
MAX_ATTEMPTS = 20
LOST_RECORD = "the record of an update is lost"
STILL_ARMED = "is still armed: the next restart starts it, and leaves it again"
# The state store's journal, and the log; images and scripts have checks of their own.
_MIN_FREE_BYTES = 1024 * 1024
# By hand, the restart belongs to whoever installs; so do its scripts.
_MANAGED_SCRIPTS = ("ArtifactReboot", "ArtifactRollbackReboot")


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
        self._needs_reboot = "Automatic"
        self._try_again = False
        self._unsaved = False

    # The operations: what the command line offers.

    def install(self, location: str, deployment: str = "") -> None:
        """Fetch `location` and install it; `deployment` is the server's id, if one asked."""
        self._settle_leftovers()
        running = self.ports.machine.running_slot(self.config.slots)
        target = self._other(running)
        self._check_room()
        self._check_passive(running, target)
        self.location = location
        self._update = Update(
            artifact_name=location.rstrip("/").rpartition("/")[2].partition("?")[0] or location,
            previous_name=self.artifact_name(),
            source=running.name,
            target=target.name,
            state=State.DOWNLOAD,
            boot_id="",
            deployment=deployment,
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
            if not self.reboot_needed and self.ports.scripts.left_over():
                self._tell_lost_record()
            return
        decision = self._decide()
        if decision is Decision.PROVE and not self.ports.observer.proves(self._update):
            say(f"{self._update.artifact_name} is proved and committed by the daemon")
            return
        if decision is Decision.HELD and not self.ports.observer.manages:
            say(f"{self._update.artifact_name} is held before its installation, by the daemon")
            return
        self._follow(decision)

    def commit(self) -> None:
        """Prove and commit the running system; NothingInProgressError when there is no trial."""
        self._update = self._update_in_progress("commit")
        decision = self._decide()
        if decision is Decision.AWAIT_REBOOT:
            raise UpdaterError(
                f"{self._update.artifact_name} waits in slot {self._update.target}:"
                " reboot into it before committing"
            )
        if decision is Decision.HELD:
            raise NothingInProgressError(
                f"nothing to commit: {self._update.artifact_name} is held before its installation"
            )
        self._follow(decision)
        if self._result is not Result.COMMITTED:
            raise NothingInProgressError("nothing to commit: the update is not running")

    def rollback(self) -> None:
        """Give up the update in progress; NothingInProgressError when there is none."""
        self._update = self._update_in_progress("roll back")
        decision = self._decide()
        if decision in (Decision.AWAIT_REBOOT, Decision.PROVE, Decision.HELD):
            self._note_cause("rollback was asked for")
            self._result = Result.ROLLED_BACK
            self._run(State.ROLLBACK)
            return
        self._follow(decision)
        ended = decision is Decision.CLEAN_UP and self._result is Result.COMMITTED
        if ended or decision is Decision.FINISH_COMMIT:
            raise NothingInProgressError("nothing to roll back: the update was committed")

    def artifact_name(self) -> str:
        """Return the name of the artifact that runs."""
        update = self.ports.store.update()
        if update is not None:
            running = self.ports.machine.running_slot(self.config.slots)
            if update.is_image and running.name == update.target:
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

    def _run(self, first: State, part: Part = Part.ENTER) -> None:
        """Follow TABLE from `first`; raise the first error when the end is reached."""
        state: State | None = first
        while state is not None and state is not State.IDLE:
            if self._current().steps > MAX_STEPS and state is not State.CLEANUP:
                self._break_loop()
                return
            event = self._perform(state, part)
            part = Part.ENTER
            state = TABLE[state].after[event]
        if state is State.IDLE:
            say(f"state {State.IDLE}")
        if self._errors:
            first_error = self._errors[0]
            also = "; then: ".join(str(error) for error in self._errors[1:])
            raise UpdaterError(f"{first_error}; then: {also}" if also else str(first_error))

    def _perform(self, state: State, part: Part) -> Event:
        """Do one state, from `part` on, and say how it ended."""
        step = TABLE[state]
        try:
            self._enter(state, Part.LEAVE if part is Part.LEAVE else Part.ENTER, step.enter)
            # Outside the limit: how long a person or a maintenance window holds an update is
            # bounded by the observer.
            self.ports.observer.entering(self._current(), state, self._hold)
            self._let_go(step.enter)
            with self.ports.limit(str(state), step.deadline_s):
                event = Event.DONE
                if part is Part.ENTER:
                    self._run_scripts(step.enter, Part.ENTER)
                    event = getattr(self, step.action)()
                if event not in (Event.RESTART, Event.GONE):
                    self._run_scripts(step.leave, Part.LEAVE)
        except UpdaterError as error:
            self._fail(error)
            self._try_again = state is State.DOWNLOAD and isinstance(error, TransportError)
            self._run_scripts(step.error, Part.ERROR)
            if state is State.COMMIT and self._result is Result.COMMITTED:
                # It is too late to go back: what failed is what came after the commit.
                self._update = self._current()._replace(inconsistent=True)
                return Event.DONE
            return Event.FAILED
        return event

    def _fail(self, error: UpdaterError) -> None:
        self._errors.append(error)
        self._note_cause(str(error))

    def _enter(self, state: State, part: Part, scripts: str) -> None:
        """Persist that `state` begins, then say so and let the observer know."""
        update = self._current()
        self._update = update._replace(
            state=state,
            part=part if self._has_scripts(scripts, part) else Part.ACTION,
            boot_id=self.ports.machine.boot_id(),
            steps=update.steps + 1,
            result=self._result if state is State.CLEANUP else update.result,
            reboot=self._needs_reboot if state is State.REBOOT else update.reboot,
        )
        self._save(fatal=state not in _UNSTOPPABLE)
        say(f"state {state}")

    def _hold(self) -> None:
        """Put on record that the installation waits, with everything it needs on the disk."""
        if self._current().state is not State.INSTALL or self._current().part is Part.WAIT:
            return
        # What a module made of its download is not known to be durable.
        self.ports.machine.sync_all()
        self._update = self._current()._replace(part=Part.WAIT)
        self._save(fatal=True)

    def _let_go(self, scripts: str) -> None:
        """Put on record that a wait has ended, before anything begins."""
        if self._current().part is Part.WAIT:
            part = Part.ENTER if self._has_scripts(scripts, Part.ENTER) else Part.ACTION
            self._update = self._current()._replace(part=part)
            self._save(fatal=True)

    def _save(self, *, fatal: bool) -> None:
        self._unsaved = True
        try:
            self.ports.store.save(self._current())
            self._unsaved = False
        except StoreError as error:
            if fatal:
                raise
            self._errors.append(error)

    def _has_scripts(self, state: str, part: Part) -> bool:
        if not state or (state in _MANAGED_SCRIPTS and not self._current().deployment):
            return False
        return self.ports.scripts.has(state, part)

    def _run_scripts(self, state: str, part: Part) -> None:
        """Run the scripts of `state`, if there are any; what is running is persisted first."""
        if not self._has_scripts(state, part):
            if self._current().part is not Part.ACTION:
                self._update = self._current()._replace(part=Part.ACTION)
            return
        update = self._current()
        ignores = part is Part.ERROR or TABLE[update.state].ignores
        if update.part is not part:
            self._update = update._replace(part=part)
            self._save(fatal=not ignores)
        failure = self.ports.scripts.run(state, part, ignore_errors=ignores)
        if failure:
            self._update = self._current()._replace(inconsistent=True)
            self._fail(UpdaterError(failure))
        self._update = self._current()._replace(part=Part.ACTION)
        if part is Part.ENTER:
            # A cut from here on did not strike in the scripts.
            self._save(fatal=not ignores)

    def download(self) -> Event:
        """Stream the artifact to where it goes, durable and read back."""
        from updater.artifact import (  # noqa: PLC0415
            ArtifactError,
            ArtifactReader,
            Limits,
            check_compatible,
        )
        from updater.artifact.signature import load_public_key  # noqa: PLC0415

        try:
            keys = [load_public_key(path) for path in self.config.artifact_keys]
            with self.ports.transport.open(self.location) as stream:
                limits = Limits(window=self.config.download.window_mib << 20)
                reader = ArtifactReader(stream, keys, limits)
                check_compatible(reader, self.config.device_type, self.provides())
                self.ports.scripts.take(reader.scripts)
                self._update = self._current()._replace(
                    artifact_name=reader.artifact_name,
                    provides=reader.provides,
                    clears=reader.type_info.clears,
                    kind=reader.payload_type or "",
                )
                if not self._current().is_image:
                    # "No" until ArtifactReboot is entered: then it holds what the module wants.
                    self._update = self._current()._replace(
                        target=self._current().source, reboot="No"
                    )
                self.ports.store.save(self._update)
                if self._current().is_image:
                    self.fill_slot(reader.unchecked_payload)
                else:
                    self._fill_module(reader)
        except ArtifactError as error:
            raise UpdaterError(str(error)) from error
        return Event.DONE

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
        if self.config.grow_ext4:
            from updater.device.grow import grow_ext4  # noqa: PLC0415

            grow_ext4(target.device)

    def _fill_module(self, reader: ArtifactReader) -> None:
        """Give the payload to its update module; without a payload there is nothing to do."""
        if reader.payload_type is None:
            for file in reader.files():
                file.skip()
        else:
            self._modules().prepare(reader, self.provides())
            self._modules().download(reader.files())
        if not reader.complete:
            raise UpdaterError(f"{reader.artifact_name}: the artifact was not read to its end")

    def activate(self) -> Event:
        """Arm the new slot for one trial boot: one transaction, read back."""
        update = self._current()
        if update.is_image:
            if self._has_scripts("ArtifactInstall", Part.LEAVE):
                # Before the slot can be started: it must not be kept without what they do.
                self._update = update._replace(part=Part.LEAVE)
                self._save(fatal=True)
            with deferred():
                bootenv.start_trial(self.ports.bootenv, self._slot(update.target))
            return Event.DONE
        if not update.kind:
            return Event.NO_REBOOT
        modules = self._modules()
        self._update = update._replace(reverts=modules.reverts())
        self.ports.store.save(self._update)
        modules.call(State.INSTALL)
        needs = modules.needs_reboot()
        self._needs_reboot = needs
        return Event.NO_REBOOT if needs == "No" else Event.DONE

    def await_reboot(self) -> Event:
        """Restart, or say that everything is in place for whoever restarts."""
        update = self._current()
        if update.reboot == "Yes":
            self._modules().call(State.REBOOT)
            return Event.DONE
        where = f" into slot {update.target}" if update.is_image else ""
        say(f"installed {update.artifact_name}{where}; reboot to start it")
        if update.deployment:
            self._request_reboot()
        return Event.RESTART

    def verify(self) -> Event:
        """Let the new system prove itself."""
        self.ports.health.run()
        if not self._current().is_image:
            self._call_module(State.VERIFY)
        self.ports.observer.proving(self._current())
        return Event.DONE

    def commit_environment(self) -> Event:
        """Make the proven system the one that is started, for good."""
        update = self._current()
        if update.is_image:
            with deferred():
                bootenv.settle(self.ports.bootenv, self._slot(update.target))
        else:
            if update.reboot == "No":
                self.ports.health.run()
                self.ports.observer.proving(update)
            self._call_module(State.COMMIT)
        self._result = Result.COMMITTED
        if not update.is_image or self._has_scripts("ArtifactCommit", Part.LEAVE):
            # From here on a cut leads forward only.
            self._update = self._current()._replace(result=Result.COMMITTED)
            self._save(fatal=False)
        return Event.DONE

    def roll_back(self) -> Event:
        """Point the boot environment at the old system, or let the module undo its work."""
        update = self._current()
        if not update.is_image:
            return self._roll_back_module()
        running = self.ports.machine.running_slot(self.config.slots).name
        try:
            with deferred():
                bootenv.settle(self.ports.bootenv, self._slot(update.source))
        except BootEnvError as error:
            if running != update.target and self._boot().slot == update.target:
                # Nothing more can be done before a restart; then nobody may be taken by surprise.
                raise BootEnvError(f"{error}; slot {update.target} {STILL_ARMED}") from error
            raise
        if running != update.target:
            return Event.NO_REBOOT
        return Event.DONE

    def _roll_back_module(self) -> Event:
        update = self._current()
        if not update.reverts:
            say(f"update module {update.kind} cannot roll back")
            self._update = update._replace(inconsistent=True)
            return Event.GONE
        try:
            self._call_module(State.ROLLBACK)
        except UpdaterError as error:
            self._fail(error)
            self._update = self._current()._replace(inconsistent=True)
            return Event.GONE
        return Event.NO_REBOOT if update.reboot == "No" else Event.DONE

    def reboot_back(self) -> Event:
        """Ask for the restart that leads back to the old system."""
        update = self._current()
        if update.reboot == "Yes" and not update.is_image:
            self._modules().call(State.ROLLBACK_REBOOT)
            return Event.DONE
        to = f" (slot {update.source})" if update.is_image else ""
        say(f"rolling back to {update.previous_name}{to}, reboot needed: {update.cause}")
        self._request_reboot()
        return Event.RESTART

    def verify_rollback(self) -> Event:
        """Check that the old system runs again."""
        update = self._current()
        if update.is_image:
            return Event.DONE
        try:
            self._modules().call(State.VERIFY_ROLLBACK)
        except UpdaterError as error:
            say(f"the rollback is not done yet: {error}")
            return Event.GONE
        return Event.DONE

    def report_failure(self) -> Event:
        """Let the module do what it has to do after a failure; the scripts run around it."""
        if not self._current().is_image:
            self._call_module(State.FAILURE)
        return Event.DONE

    def clean_up(self) -> Event:
        """Record the outcome and forget the update, in one transaction."""
        update = self._current()
        if self._unsaved:
            # What failed is known here only so far; the scripts are still there to be run again.
            self._save(fatal=True)
        committed = self._result is Result.COMMITTED
        slot = update.target if committed else update.source
        cause = update.cause if not committed or update.inconsistent else ""
        outcome = Outcome(
            self._result,
            update.artifact_name,
            slot,
            cause,
            self.ports.clock.utc_seconds(),
            update.deployment,
            again=self._is_tried_again(update),
        )
        if self.ports.modules is not None and not update.is_image and update.kind:
            try:
                self.ports.modules.call(State.CLEANUP)
            except UpdaterError as error:
                say(f"also: {error}")
        # Before the record goes: after a cut, nobody would come back for them.
        self.ports.scripts.drop()
        if self.ports.modules is not None:
            self.ports.modules.drop()
        self.ports.store.finish(outcome, self._provides_now(update, committed=committed))
        self._say_outcome(update, slot, cause)
        self.ports.observer.finished(update, outcome)
        return Event.DONE

    def _is_tried_again(self, update: Update) -> bool:
        """Whether the deployment is not over: its download was interrupted, and may go on."""
        if not update.deployment or not self._try_again:
            return False
        attempts = self.ports.store.attempts(update.deployment) + 1
        say(f"download attempt {attempts} of {MAX_ATTEMPTS} for deployment {update.deployment}")
        return attempts < MAX_ATTEMPTS

    def _provides_now(self, update: Update, *, committed: bool) -> dict[str, str] | None:
        """Return what the device provides from now on; None when that did not change."""
        if update.inconsistent:
            broken = {"artifact_name": f"{update.artifact_name}_INCONSISTENT"}
            if "artifact_group" in update.provides:
                broken["artifact_group"] = update.provides["artifact_group"]
            return {**self.provides(), **broken}
        if committed:
            return provides_after(self.provides(), update.provides, update.clears)
        return None

    def _say_outcome(self, update: Update, slot: str, cause: str) -> None:
        if self._result is Result.COMMITTED:
            say(f"committed {update.artifact_name} (slot {slot})")
        elif self._result is Result.ROLLED_BACK:
            say(f"rolled back to {update.previous_name} (slot {slot}): {cause}")
        elif self._result is Result.INTERRUPTED:
            say(
                f"{update.artifact_name} was not installed, {update.previous_name}"
                f" (slot {slot}) stays: {cause}"
            )
        if update.inconsistent:
            say(f"{update.artifact_name}_INCONSISTENT is recorded: errors had to be ignored")

    # Finding one's feet.

    def _decide(self) -> Decision:
        running = self.ports.machine.running_slot(self.config.slots).name
        update = self._current()
        boot = self._boot() if update.is_image else Boot(running, trial=False)
        decision = decide(update, running, boot, self.ports.machine.boot_id())
        if (
            decision is Decision.PROVE
            and update.is_image
            and boot != Boot(update.target, trial=True)
        ):
            say(
                f"slot {running} runs although the boot environment names"
                f" {f'slot {boot.slot}' if boot.slot else 'no slot'}; it is settled after the"
                " health checks"
            )
        return decision

    def _follow(self, decision: Decision) -> None:
        update = self._current()
        if decision is Decision.AWAIT_REBOOT:
            where = f" in slot {update.target}" if update.is_image else ""
            say(f"{update.artifact_name} waits{where}; reboot to start it")
            if update.deployment and self.ports.observer.manages:
                # Once more from its beginning: what held it before the restart may hold it still.
                self._run(State.REBOOT)
        elif decision is Decision.HELD:
            # Once more from its beginning, and that is no step forward.
            self._update = update._replace(steps=update.steps - 1)
            self._run(State.INSTALL)
        elif decision is Decision.PROVE:
            self._run(State.VERIFY)
        elif decision is Decision.FINISH_COMMIT:
            self._result = Result.COMMITTED
            scripts = update.state is State.COMMIT and self._has_scripts(
                "ArtifactCommit", Part.LEAVE
            )
            self._run(*((State.COMMIT, Part.LEAVE) if scripts else (State.CLEANUP,)))
        elif decision is Decision.CLEAN_UP:
            self._result = update.result or Result.FAILED
            self._run(State.CLEANUP)
        elif decision is Decision.ROLL_BACK:
            self._note_cause(fallback_cause(update))
            self._run(State.ROLLBACK)
        elif decision is Decision.REVERT:
            self._note_cause(fallback_cause(update))
            self._result = (
                Result.INTERRUPTED if update.state is State.INSTALL else Result.ROLLED_BACK
            )
            self._run(State.ROLLBACK)
        elif decision is Decision.REBOOT_AGAIN:
            if update.state is State.ROLLBACK and update.part:
                self._run(State.ROLLBACK)
                return
            to = f" to return to slot {update.source}" if update.is_image else ""
            say(f"reboot needed{to}: {update.cause}")
            self._request_reboot()
        elif decision is Decision.VERIFY_ROLLBACK:
            self._result = Result.ROLLED_BACK
            self._run(State.VERIFY_ROLLBACK)
        elif decision is Decision.STRANDED:
            self._note_cause(fallback_cause(update))
            self._errors.append(
                UpdaterError(
                    f"slot {update.target} runs again although slot {update.source} was to be"
                    f" started; slot {update.source} may be damaged"
                )
            )
            self._run(State.FAILURE)
        elif decision is Decision.BREAK_LOOP:
            self._break_loop()
        else:
            self._close(decision)

    def _break_loop(self) -> None:
        """End an update that goes round and round, without scripts or modules, on a safe system."""
        update = self._current()
        error = LoopError(
            f"{update.artifact_name} entered {update.steps} states without an end, the last was"
            f" {update.where}; stopped" + (f" (first: {update.cause})" if update.cause else "")
        )
        self._errors.append(error)
        self._update = update._replace(cause=str(error))
        running = self.ports.machine.running_slot(self.config.slots).name
        committed = update.result is Result.COMMITTED
        self._update = self._current()._replace(inconsistent=not update.is_image)
        if update.is_image and not committed:
            with deferred():
                bootenv.settle(self.ports.bootenv, self._slot(update.source))
            if running == update.target and update.state not in (
                State.ROLLBACK_REBOOT,
                State.FAILURE,
            ):
                self._request_reboot()
        self._result = Result.COMMITTED if committed else Result.FAILED
        self._run(State.CLEANUP)

    def _close(self, decision: Decision) -> None:
        """Record an update that left us on the old system."""
        update = self._current()
        source = self._slot(update.source)
        if update.is_image and self._boot() != Boot(source.name, trial=False):
            with deferred():
                bootenv.settle(self.ports.bootenv, source)
        if decision is Decision.CLOSE_INTERRUPTED:
            self._result = Result.INTERRUPTED
            self._note_cause(f"interrupted in {update.where}")
            self._try_again = update.state is State.DOWNLOAD
            # A download changed nothing; from ArtifactInstall on, scripts may have.
            self._run(State.CLEANUP if update.state is State.DOWNLOAD else State.ROLLBACK)
            return
        self._result = Result.ROLLED_BACK
        self._note_cause(fallback_cause(update))
        if update.state is State.REBOOT:
            self._run_scripts(TABLE[State.REBOOT].error, Part.ERROR)
        self._run(
            {
                State.ROLLBACK_REBOOT: State.VERIFY_ROLLBACK,
                State.VERIFY_ROLLBACK: State.VERIFY_ROLLBACK,
                State.FAILURE: State.FAILURE,
                State.CLEANUP: State.CLEANUP,
            }.get(update.state, State.ROLLBACK)
        )

    def _settle_leftovers(self) -> None:
        """Close an update that an earlier process left behind, or refuse a second one."""
        self._update = self.ports.store.update()
        if self._update is None:
            return
        decision = self._decide()
        if decision in (Decision.CLEAN_UP, Decision.BREAK_LOOP):
            self._follow(decision)
            self._result = Result.FAILED
            return
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

    def _tell_lost_record(self) -> None:
        """Where only its scripts are left of an update, they may not have been run: say so."""
        if self.ports.store.last_outcome() is not None:
            return  # an update has ended since the store was made: they could not be removed
        running = self.ports.machine.running_slot(self.config.slots)
        name = self.artifact_name()
        cause = f"{LOST_RECORD}: its state scripts may not have been run"
        say(f"error: {cause}; {name}_INCONSISTENT is recorded")
        broken = {**self.provides(), "artifact_name": f"{name}_INCONSISTENT"}
        now = self.ports.clock.utc_seconds()
        self.ports.store.finish(Outcome(Result.FAILED, name, running.name, cause, now), broken)
        self.ports.scripts.drop()

    def _check_room(self) -> None:
        """Refuse when not even the record of an update would fit the data partition."""
        try:
            free = self.ports.machine.free_bytes(self.config.data_dir)
        except OSError as error:
            raise StoreError(f"{self.config.data_dir}: {error.strerror}") from error
        if free < _MIN_FREE_BYTES:
            raise StoreError(
                f"{self.config.data_dir}: {free} bytes are free, an update needs at least"
                f" {_MIN_FREE_BYTES}; remove something"
            )

    def _check_passive(self, running: Slot, target: Slot) -> None:
        """Refuse a target that is in use; make sure that the boot environment agrees."""
        user = self.ports.machine.user_of(target)
        if user is not None:
            raise SlotError(f"slot {target.name} ({target.device}) is {user}; unmount it first")
        boot = self._boot()
        if boot.slot is not None:
            bootenv.check_canary(self.ports.bootenv)
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

    def waiting_slot(self) -> str:
        """The slot that is on trial at the next start and does not run; empty if there is none."""
        try:
            with deferred():
                boot = bootenv.read_boot(self.ports.bootenv, self.config.slots)
                running = self.ports.machine.running_slot(self.config.slots)
        except UpdaterError:
            return ""  # what can't be read is told by whoever needs it
        return boot.slot or "" if boot.trial and boot.slot != running.name else ""

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

    def _call_module(self, state: State) -> None:
        if self._current().kind:
            self._modules().call(state)

    def _modules(self) -> Modules:
        if self.ports.modules is None:
            raise UpdaterError(
                f"{self._current().artifact_name} needs update module"
                f" {self._current().kind or '(none)'}, and there are none here"
            )
        return self.ports.modules

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
