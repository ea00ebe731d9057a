"""Managed mode: ask a server for work, do it, and tell it truthfully how that went.

One cycle is Idle → Sync → (an update) → Idle; between two cycles the process sleeps in one piece.
How an update ended is recorded by the store in the same transaction that ends it, and stays there
until the server has taken note: a restart or a dead network in between loses nothing. A server
that cannot be reached delays, and by default never decides: with `require_contact` the new system
must reach it within its budget or is left again.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

from updater.device import console, files, lock, process
from updater.device.api import AbortedError, Deployment, DeviceApi
from updater.device.config import Config
from updater.device.console import say
from updater.device.errors import BusyError, ServerError, StoreError, UpdaterError
from updater.device.identity import inventory
from updater.device.model import Outcome, Result, State, Update
from updater.device.states import TABLE
from updater.device.transport import backoff
from updater.device.windows import minutes_until_open, parse_window

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from updater.device.client import Client
    from updater.device.ports import Clock, StateStore

STATUSES = {
    State.DOWNLOAD: "downloading",
    State.INSTALL: "installing",
    State.REBOOT: "rebooting",
    State.COMMIT: "installing",
}
GATES = {
    State.INSTALL: "pause_before_installing",
    State.REBOOT: "pause_before_rebooting",
    State.COMMIT: "pause_before_committing",
}
# A pause that nobody ends is not for ever; a trial that is not committed would be lost anyway.
MAX_PAUSE_S = 7 * 86400.0
PAUSE_POLL_S = 300.0
_MAX_LOG_BYTES = 512 * 1024


def control_path(data_dir: str) -> str:
    """Return where the update control map of the deployment in progress is kept."""
    return f"{data_dir}/update-control"


class DeploymentLog:
    """The lines of one deployment, in a file that survives restarts; bounded, oldest first."""

    def __init__(self, directory: str, clock: Clock) -> None:
        self._directory = f"{directory}/deployments"
        self._clock = clock
        self._handle = -1

    def _path(self, deployment: str) -> str:
        safe = "".join(char if char.isalnum() or char in "-_" else "_" for char in deployment)
        return f"{self._directory}/{safe[:100]}.log"

    def begin(self, deployment: str) -> None:
        """Append what is said from now on."""
        if self._handle >= 0:
            return
        try:
            os.makedirs(self._directory, 0o700, exist_ok=True)  # noqa: PTH103
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._handle = os.open(self._path(deployment), flags, 0o600)
        except OSError as error:
            say(f"warning: {self._directory}: {error.strerror}; this deployment has no log")
            return
        console.listeners.append(self._write)

    def _write(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock.utc_seconds()))
        level = "error" if "error" in line else "warning" if "warning" in line else "info"
        message = {"timestamp": stamp, "level": level, "message": line}
        try:
            if os.fstat(self._handle).st_size < _MAX_LOG_BYTES:
                os.write(self._handle, json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def sync(self) -> None:
        """Make the lines so far durable."""
        if self._handle >= 0:
            try:
                os.fsync(self._handle)
            except OSError:
                return

    def end(self) -> None:
        """Stop listening."""
        if self._handle >= 0:
            console.listeners.remove(self._write)
            self.sync()
            os.close(self._handle)
            self._handle = -1

    def messages(self, deployment: str) -> list[dict[str, str]]:
        """Return the lines; a torn last one is left out."""
        found = []
        try:
            with open(self._path(deployment), "rb") as file:  # noqa: PTH123
                for line in file:
                    try:
                        found.append(json.loads(line))
                    except ValueError:
                        continue
        except OSError:
            return []
        return found

    def drop(self, deployment: str) -> None:
        """Remove the file: the server has it, or does not want it."""
        try:
            os.unlink(self._path(deployment))  # noqa: PTH108
        except OSError:
            return


class ServerObserver:
    """Reports each state, holds an update where the server or the clock says so."""

    def __init__(self, config: Config, api: DeviceApi, log: DeploymentLog, clock: Clock) -> None:
        self._config = config.server
        self._api = api
        self._log = log
        self._clock = clock
        self._windows = [parse_window(text) for text in config.server.windows]
        self._path = control_path(config.data_dir)
        self._control_of = ""
        self._control: dict[str, Any] = {}

    manages = True

    def remember(self, deployment: str, control: dict[str, Any]) -> None:
        """Keep the update control map through restarts; an empty one is not kept."""
        self._control_of, self._control = deployment, control
        try:
            if control:
                value = {"deployment": deployment, "states": control}
                files.write_durably(self._path, json.dumps(value).encode())
            elif os.path.exists(self._path):  # noqa: PTH110
                os.unlink(self._path)  # noqa: PTH108
        except OSError as error:
            raise StoreError(f"{self._path}: {error.strerror}") from error

    def _recall(self, deployment: str) -> None:
        """Get back the map of a deployment that an earlier process began."""
        if self._control_of == deployment:
            return
        self._control_of, self._control = deployment, {}
        try:
            with open(self._path, "rb") as file:  # noqa: PTH123
                value = json.loads(file.read())
            if value["deployment"] == deployment:
                self._control = dict(value["states"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self._path}: the update control map is lost: {error}") from error

    def proves(self, update: Update) -> bool:
        """Whether the new system may be proved here and now."""
        return True

    def entering(self, update: Update, state: State, hold: Callable[[], None]) -> None:
        """Report, then wait as long as the server or the maintenance window wants."""
        if not update.deployment:
            return
        self._log.begin(update.deployment)
        self._log.sync()
        if state in GATES:
            self._gate(update, state, hold)
        if state in STATUSES:
            self._report(update, STATUSES[state])

    def _report(self, update: Update, status: str) -> None:
        try:
            self._api.report(update.deployment, status)
        except ServerError as error:
            say(f"warning: status {status} not delivered: {error}")

    def _gate(self, update: Update, state: State, hold: Callable[[], None]) -> None:
        """Return when the update may go on; UpdaterError when it must not."""
        self._recall(update.deployment)
        if self._control:
            self._refresh(update)
        give_up = self._clock.monotonic() + MAX_PAUSE_S
        said = ""
        while reason := self._pause_reason(update, state):
            if self._clock.monotonic() >= give_up:
                raise UpdaterError(f"{state}: paused for {MAX_PAUSE_S / 86400:g} days: {reason[0]}")
            if reason[0] != said:
                hold()
                said = reason[0]
                say(f"{state} waits: {said}")
                self._report(update, GATES[state])
            self._clock.wait(reason[1])
            if self._control:
                self._refresh(update)

    def _pause_reason(self, update: Update, state: State) -> tuple[str, float] | None:
        entry = self._control.get(f"{state}_Enter")
        action = entry.get("action", "continue") if isinstance(entry, dict) else "continue"
        if action == "fail":
            raise UpdaterError(f"the server's update control lets {state} fail")
        if action == "pause":
            return ("the server's update control says pause", PAUSE_POLL_S)
        if action != "force_continue" and state is not State.COMMIT and self._windows:
            now = time.localtime(self._clock.utc_seconds())
            minutes = minutes_until_open(self._windows, now.tm_wday, now.tm_hour * 60 + now.tm_min)
            if minutes:
                return ("outside the maintenance window", minutes * 60.0 - now.tm_sec)
        return None

    def _refresh(self, update: Update) -> None:
        try:
            self.remember(update.deployment, self._api.control_map(update.deployment))
        except ServerError as error:
            say(f"warning: update control: {error}; the last one holds")

    def proving(self, update: Update) -> None:
        """If that is configured, reach the server within the budget or do not commit."""
        if not update.deployment or not self._config.require_contact:
            return
        give_up = self._clock.monotonic() + self._config.contact_budget_s
        failures = 0
        while True:
            try:
                self._api.report(update.deployment, "rebooting")
            except ServerError as error:
                failures += 1
                pause = backoff(failures, 1.0, 30.0)
                if self._clock.monotonic() + pause > give_up:
                    raise ServerError(
                        f"no contact with the server within {self._config.contact_budget_s:g} s"
                        f" of the restart: {error}"
                    ) from error
                self._clock.wait(pause)
            else:
                return

    def finished(self, update: Update, outcome: Outcome) -> None:
        """Close the log and forget the map; what to tell the server is in the store."""
        self._log.end()
        try:
            self.remember("", {})
        except StoreError as error:
            say(f"warning: {error}")


class Daemon:
    """Polls for as long as it runs."""

    def __init__(
        self,
        config: Config,
        api: DeviceApi,
        observer: ServerObserver,
        log: DeploymentLog,
        make_client: Callable[[], Client],
    ) -> None:
        self._config = config
        self._api = api
        self._observer = observer
        self._log = log
        self._make_client = make_client
        self._inventory_due = 0.0
        self._failures = 0

    def run(self, *, once: bool = False) -> None:
        """Cycle; with `once`, a single time."""
        while True:
            pause = self.cycle()
            if once:
                return
            say(f"asking again in {pause:.0f} s")
            self._clock().wait(pause)

    def _clock(self) -> Clock:
        return self._client.ports.clock

    def cycle(self) -> float:
        """Do what there is to do; return how long to sleep."""
        self._client = self._make_client()
        server = self._config.server
        try:
            handle = lock.take(self._config.data_dir, "daemon")
        except BusyError as error:
            say(f"{error}; trying again later")
            return server.retry_s
        try:
            self._continue()
            if self._client.reboot_needed:
                return self._reboot()
            # A client is good for one operation.
            self._client = self._make_client()
            asked_to_wait = self._sync()
            if self._client.reboot_needed:
                return self._reboot()
        finally:
            os.close(handle)
        if asked_to_wait is None:
            self._failures = 0
            return server.poll_s * (1.0 + _spread())
        self._failures += 1
        # Three quick ones, then ever rarer, never more often than the server wants.
        steps = max(0, self._failures - 3)
        pause = min(server.retry_s * 2.0 ** min(steps, 20), server.poll_s)
        return max(pause * (1.0 + _spread()), asked_to_wait)

    def _continue(self) -> None:
        """Go on with an update that a restart or an error left."""
        update = self._client.ports.store.update()
        if update is None:
            return
        if update.deployment:
            self._log.begin(update.deployment)
        self._try(self._client.resume)

    def _sync(self) -> float | None:
        """Idle → Sync → an update, if there is one; return how long to wait after a failure."""
        scripts = self._client.ports.scripts
        scripts.run("Idle", "Leave", ignore_errors=True)
        say(f"state {State.SYNC}")
        failed: float | None = None
        deployment = None
        try:
            with self._client.ports.limit(str(State.SYNC), TABLE[State.SYNC].deadline_s):
                scripts.run("Sync", "Enter", ignore_errors=False)
                self.deliver()
                self._send_inventory()
                deployment = self._api.next_deployment(self._provides())
                scripts.run("Sync", "Leave", ignore_errors=False)
        except UpdaterError as error:
            say(f"error: {error}")
            failed = error.retry_after_s if isinstance(error, ServerError) else 0.0
            deployment = None
            scripts.run("Sync", "Error", ignore_errors=True)
        if deployment is not None:
            self._install(deployment)
            failed = self._deliver_now()
        if self._client.ports.store.update() is None:
            say(f"state {State.IDLE}")
            scripts.run("Idle", "Enter", ignore_errors=True)
        return failed

    def _provides(self) -> dict[str, str]:
        return {**self._client.provides(), "device_type": self._config.device_type}

    def _send_inventory(self) -> None:
        now = self._clock().monotonic()
        if now < self._inventory_due:
            return
        known = {
            **self._client.provides(),
            "artifact_name": self._client.artifact_name(),
            "device_type": self._config.device_type,
            "updater_client": "brownout",
        }
        self._api.send_inventory(inventory(self._config.server, known))
        self._inventory_due = now + self._config.server.inventory_s

    def _install(self, deployment: Deployment) -> None:
        if deployment.artifact_name == self._client.artifact_name():
            say(f"{deployment.artifact_name} is installed already")
            try:
                self._api.report(deployment.id, "already-installed")
            except UpdaterError as error:
                say(f"error: {error}")
            return
        self._log.begin(deployment.id)
        self._observer.remember(deployment.id, deployment.control)
        transport = self._client.ports.transport
        transport.identity = f"deployment {deployment.id}"
        transport.refresh = lambda: self._new_link(deployment)
        try:
            self._try(lambda: self._client.install(deployment.uri, deployment.id))
        finally:
            transport.identity = ""
            transport.refresh = None
            self._log.end()

    def _new_link(self, before: Deployment) -> str:
        """Ask for the same deployment again: its link is new."""
        now = self._api.next_deployment(self._provides())
        if now is None or now.id != before.id:
            raise AbortedError("the server has withdrawn the deployment")
        return now.uri

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except UpdaterError as error:
            say(f"error: {error}")

    def _deliver_now(self) -> float | None:
        try:
            self.deliver()
        except ServerError as error:
            say(f"error: {error}")
            return error.retry_after_s
        return None

    def deliver(self) -> None:
        """Tell the server how deployments ended that it does not know of; ServerError if not."""
        store: StateStore = self._client.ports.store
        for outcome in store.unreported():
            good = outcome.result is Result.COMMITTED and not outcome.cause
            try:
                if not good:
                    messages = self._log.messages(outcome.deployment)
                    cause = {"level": "error", "message": f"{outcome.result}: {outcome.cause}"}
                    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(outcome.finished_at))
                    self._api.send_log(
                        outcome.deployment, [*messages, {"timestamp": stamp, **cause}]
                    )
                self._api.report(
                    outcome.deployment, "success" if good else "failure", outcome.cause
                )
            except AbortedError as error:
                say(f"{outcome.deployment}: {error}")
            except ServerError as error:
                if error.status not in (400, 404, 413, 422):
                    raise
                # The server will never want it: then it must not stand in the way of the next.
                say(f"error: {outcome.deployment}: {error}; not tried again")
            store.mark_reported(outcome)
            self._log.drop(outcome.deployment)

    def _reboot(self) -> float:
        command = list(self._config.server.reboot_command)
        say(f"restarting: {' '.join(command)}")
        os.sync()
        try:
            result = process.run(command, timeout_s=60.0)
        except OSError as error:
            say(f"error: {command[0]}: {error.strerror}")
        else:
            if result.status != 0:
                say(f"error: {command[0]} {result.failure()}")
        # Normally the device is gone before this ends; if not, the next cycle asks again.
        return self._config.server.retry_s


def _spread() -> float:
    import random  # noqa: PLC0415

    return random.uniform(-0.1, 0.1)  # noqa: S311 - spreads a fleet, no secret
