"""A device in managed mode: its daemon works off deployments, and a scenario only watches.

The first start is that of a stock device; then it is enrolled: a configuration with a server and
a key go to the data partition, where the images look for one at every start. From then on each
start runs the daemon, which proves a new system itself (`require_contact`), restarts the device,
and tells the server. A step ends when the daemon has nothing more to do and goes to sleep.
"""

from __future__ import annotations

import time

from attrs import define, evolve

from framework.console import ConsoleLost, ConsoleTimeout, Marker
from framework.scenario.device import COMMAND_TIMEOUT_S, INSTALL_TIMEOUT_S, Device, Update
from framework.scenario.management import Enrolment, ManagementServer
from framework.targets.errors import InfrastructureError
from framework.targets.strategy import BootOutcome
from framework.verdict import BootSeen, InstallEnded, ServerTold

CONFIG = "/data/etc/updater.toml"
KEY = "/data/updater/device-key.pem"
STOCK_CONFIG = "/etc/updater/updater.toml"
ONE_CYCLE = "updater daemon --once"
# Longer than any scenario: after its cycle the daemon is silent.
POLL_S = 86400
SETTLED = Marker("the daemon's sleep", r"updater: asking again in \d{4,6} s")
RESTARTING = Marker("a restart by the daemon", r"updater: restarting: [^\n]{0,200}\n")
# A start, its daemon's way to the server, and a download.
SETTLE_TIMEOUT_S = 300.0
MOST_RESTARTS = 6


@define
class ManagedDevice(Device):
    """A device with a management server; see the module text and `Device`.

    Attributes:
        server: what manages it.
    """

    server: ManagementServer | None = None
    enrolment: Enrolment | None = None
    deployment: str = ""
    _came_up: BootSeen | None = None

    def boot(self) -> BootSeen:
        """As `Device.boot`; then the device is enrolled."""
        self.goes_online("a management server")
        boot = super().boot()
        if boot.ready and self.enrolment is None:
            with self._step("enrolling", "server"):
                self._enrol()
        return boot

    def update(self, update: Update) -> InstallEnded:
        """Deploy, and let the device do everything else by itself."""
        ended = self.install(update)
        if self._came_up is not None and self._came_up.ready:
            try:
                self.read_status()
            except ConsoleLost:
                # The cut came with the very line that says that the daemon sleeps.
                self.power_went()
            else:
                self.look("after the update")
        return ended

    def restore(self) -> BootSeen:
        """As `Device.restore`, the daemon's work included; and hear what the server was told."""
        boot = super().restore()
        self._hear()
        return boot

    def _install(self, update: Update, timeout_s: float = INSTALL_TIMEOUT_S) -> InstallEnded:
        assert self.server is not None
        assert self.enrolment is not None
        self._came_up = None
        self.deployment = self.server.deploy(update.path, update.name, self.enrolment.device_id)
        since = self.machine.pump.position
        try:
            result = self.strategy.run(ONE_CYCLE, timeout_s)
        except ConsoleTimeout:
            self.did.append(f"the deployment of {update.name} had not ended after {timeout_s:g} s")
            return InstallEnded(update.name, None, timed_out=True)
        except ConsoleLost:
            # By the cut, or by the restart that the daemon asked for.
            self._came_up = self._seen(self.strategy.await_boot(since, adopt=False))
            if self._came_up is None:
                self.did.append(f"deployment of {update.name} cut short")
            else:
                self._hear()
            return InstallEnded(update.name, None)
        causes = [match["cause"].strip() for match in self.uut.signs.error.finditer(result.text)]
        self._hear()
        self._came_up = self.running
        cause = causes[-1] if causes else ""
        self.did.append(f"{update.name} not deployed: {cause}")
        return InstallEnded(update.name, 1 if causes else None, cause)

    def _seen(self, outcome: BootOutcome) -> BootSeen | None:
        """As `Device._seen`; an enrolled device is seen only once its daemon went to sleep."""
        if outcome.ready and self.enrolment is not None:
            # Nobody could look between the daemon's work and its restart.
            self.look("at the start")
        position = outcome.end
        boot = super()._seen(outcome)
        restarts = 0
        while boot is not None and boot.ready and self.enrolment is not None:
            pump = self.machine.pump
            try:
                match = pump.wait_for(
                    [SETTLED, RESTARTING], SETTLE_TIMEOUT_S, position, deaths=False
                )
            except ConsoleLost:
                self.power_went()
                return None
            except ConsoleTimeout as error:
                self.strategy.require_host(
                    time.monotonic() - SETTLE_TIMEOUT_S, SETTLE_TIMEOUT_S / 2
                )
                return evolve(boot, ready=False, evidence=f"the daemon does not settle: {error}")
            if match.marker is SETTLED:
                return boot
            restarts += 1
            if restarts > MOST_RESTARTS:
                return evolve(boot, ready=False, evidence=f"{restarts} restarts by the daemon")
            outcome = self.strategy.await_boot(match.end, adopt=False)
            if outcome.ready:
                self.look("at the start")
            position = outcome.end
            boot = super()._seen(outcome)
        return boot

    def _enrol(self) -> None:
        """Put a configuration with a server, and the key that it knows, on the data partition."""
        assert self.server is not None
        self.enrolment = enrolment = self.server.enrol()
        section = (
            f'[server]\\nurl = "{self.server.url}"\\npoll_s = {POLL_S}\\nretry_s = 1\\n'
            f'require_contact = true\\nreboot_command = ["reboot", "-f"]\\n'
        )
        pem = enrolment.key_pem.strip().replace("\n", "\\n")
        commands = (
            "mkdir -p /data/etc /data/updater",
            f"printf '%b\\n' '{pem}' > {KEY} && chmod 600 {KEY}",
            f"(cat {STOCK_CONFIG}; printf '{section}') > {CONFIG}",
            f"mount -o bind {CONFIG} {STOCK_CONFIG} && sync",
        )
        for command in commands:
            result = self.strategy.run(command, COMMAND_TIMEOUT_S)
            if result.code != 0:
                raise InfrastructureError(f"the device can't be enrolled: {result.text}")

    def _hear(self) -> None:
        """Ask the server what the device told it about the deployment."""
        if self.server is None or not self.deployment:
            return
        status, cause = self.server.told(self.deployment)
        self._event(ServerTold(self._on_trial() or "", status, cause))
        self.note("server", f"was told: {status} {cause}".strip())
