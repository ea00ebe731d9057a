"""Performs a composition on a rig, and judges it: one run of a campaign, without pytest.

Device, faults, witnesses and judge are the scenarios' own (`framework.scenario`). What is added is
what a scenario's author does by hand: to give power back where it went, to wait for a device that
died, to repeat an installation that was cut short, and to try the update again in the end, with all
faults gone. After an installation that failed, the next step goes on with what there is.

A run notes in which state of the client each fault struck (by the console, which lags the disk by
some operations), and where its time went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from attrs import define, evolve, field, frozen

from framework.campaign.bundle import BundleError
from framework.campaign.collect import Collector
from framework.campaign.composition import Composition, Step, is_sick
from framework.campaign.space import Cell, fault_name, since, trigger_name
from framework.campaign.steps import steps_of
from framework.campaign.symptoms import symptoms_of_run
from framework.console import ConsoleLost, Line
from framework.network import FaultProxy
from framework.scenario.arming import ArmedFault, Faults
from framework.scenario.bench import Bench
from framework.scenario.device import Device, Update
from framework.scenario.record import record
from framework.scenario.stage import staged_device, staged_faults
from framework.targets.errors import InfrastructureError
from framework.targets.uut import UpdaterUnderTest
from framework.verdict import BootSeen, Verdict

MOST_RECOVERIES: Final = 12
"""How often power may go while a device is brought back, before the run is wrong."""


@frozen
class Performed:
    """How a run came out.

    Attributes:
        verdict: such as `PASS`, `VIOLATION(2)`, `INFRASTRUCTURE` or `BROKEN`.
        violated: the invariants that did not hold.
        evidence: of those, or of the error.
        strikes: where each fault struck.
        unfired: the faults that never did.
        steps: what was seen, comparable between runs.
        symptoms: what the device is like in the end, as a support bundle would show it.
        seconds: wall time of the whole.
        boots: how many starts; `boots_s` what they took.
        work_s: what the client's commands took, the last try included.
        bundle: where the bundle is; empty for none.
    """

    verdict: str
    violated: tuple[int, ...] = ()
    evidence: str = ""
    strikes: tuple[Cell, ...] = ()
    unfired: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    symptoms: dict[str, str] = field(factory=dict)
    seconds: float = 0.0
    boots: int = 0
    boots_s: float = 0.0
    work_s: float = 0.0
    bundle: str = ""


@frozen
class Place:
    """Where runs are performed.

    Attributes:
        bench: the rig, opened.
        rig: its file.
        features: what it can do.
    """

    bench: Bench
    rig: Path
    features: frozenset[str]


@define
class Whereabouts:
    """Follows the console: in which state the client is, or what of which start is under way.

    Attributes:
        uut: the updater, whose signs it knows.
        now: where the device is, as `Cell.state` has it.
        last: the client's last state, which says what a start is for; empty when it was done.
    """

    uut: UpdaterUnderTest
    now: str = "Idle"
    last: str = ""

    def heard(self, line: Line) -> None:
        """Take a line. On the console's thread."""
        if line.direction != "RX":
            return
        text = line.text
        if match := self.uut.signs.state.search(text):
            self.now = match["name"]
            self.last = "" if self.now == "Idle" else self.now
        elif "U-Boot 20" in text or "GNU GRUB" in text or "BROWNOUT: " in text:
            self.now = since("bootloader", self.last)
        elif "BROWNOUT INIT" in text:
            self.now = since("start", self.last)
        elif self.uut.boot_signs.ready.search(f"{text}\n"):
            self.now = "Idle"


def perform(
    place: Place,
    composition: Composition,
    *,
    title: str,
    repeat: str,
    bundles: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    always: bool = False,
) -> Performed:
    """Do one run; a bundle is left in `bundles` if it is no pass, or `always`.

    Args:
        place: the rig.
        composition: what to do.
        title: how the run is called.
        repeat: the command that does it again, for the bundle.
        bundles: where a bundle goes; None: nowhere.
        say: called with each step.
        always: leave a bundle of a run that passed, too.

    Raises:
        BundleError: the bundle can't be written.
    """
    began = time.monotonic()
    with FaultProxy((place.bench.server.host, place.bench.server.port)) as proxy:
        run = _Run(place, composition, proxy, say)
        failure: BaseException | None = None
        try:
            run.perform()
        except KeyboardInterrupt:
            raise
        except Exception as error:  # noqa: BLE001 - kept as the run's outcome
            failure = error
        performed = run.outcome(failure)
        wanted = performed.verdict not in ("PASS", "INFRASTRUCTURE") or always
        if bundles is not None and wanted and run.device is not None:
            path = run.leave_bundle(bundles, title, repeat, failure)
            performed = evolve(performed, bundle=str(path))
    return evolve(performed, seconds=time.monotonic() - began)


@define
class _Run:
    place: Place
    composition: Composition
    proxy: FaultProxy
    say: Callable[[str], None]
    device: Device | None = None
    collector: Collector | None = None
    symptoms: dict[str, str] = field(factory=dict)
    faults: Faults | None = None
    whereabouts: Whereabouts | None = None
    strikes: list[tuple[ArmedFault, str]] = field(factory=list)
    unfired: tuple[str, ...] = ()
    verdict: Verdict | None = None
    work_s: float = 0.0
    _updates: dict[str, Update] = field(factory=dict)
    _forget: Callable[[], None] = lambda: None

    def perform(self) -> None:
        bench, composition = self.place.bench, self.composition
        with staged_device(
            bench, self.proxy, composition.base, say=self.say, prepare=self._prepare
        ) as device:
            first = next(step.image for step in composition.steps if step.image)
            with staged_faults(
                device,
                self._update(first),
                self.proxy,
                composition.seed,
                self.place.features,
                self.place.rig.name,
            ) as self.faults:
                try:
                    up = self._journey(device, self.faults)
                    # What somebody would find who comes to the device now.
                    self.symptoms = symptoms_of_run(device.events)
                    if up:
                        with self._timed():
                            device.retry(self._update(healthy_image(self.composition)))
                finally:
                    self._note_strikes()
                    self.verdict = device.verdict()
                    self._forget()

    def outcome(self, failure: BaseException | None) -> Performed:
        """What came of it."""
        events = self.device.events if self.device is not None else []
        starts = [event for event in events if isinstance(event, BootSeen)]
        verdict = self.verdict
        violated = () if verdict is None else verdict.violated
        if isinstance(failure, InfrastructureError):
            said, evidence = "INFRASTRUCTURE", str(failure)
        elif failure is not None and not violated:
            said, evidence = "BROKEN", f"{type(failure).__name__}: {failure}"
        else:
            assert verdict is not None
            said = str(verdict)
            evidence = "; ".join(f.evidence for f in verdict.findings if f.held is False)
            if failure is not None:
                evidence += f"; then {type(failure).__name__}: {failure}"
        return Performed(
            verdict=said,
            violated=() if said == "INFRASTRUCTURE" else violated,
            evidence=evidence,
            strikes=tuple(
                Cell(state, fault_name(armed.fault), trigger_name(armed.fault.trigger))
                for armed, state in self.strikes
            ),
            unfired=self.unfired,
            steps=steps_of(events),
            symptoms=self.symptoms,
            boots=len(starts),
            boots_s=self._booted_s(),
            work_s=self.work_s,
        )

    def leave_bundle(
        self, folder: Path, title: str, repeat: str, failure: BaseException | None
    ) -> Path:
        """Write the run's bundle."""
        if self.device is None or self.collector is None or self.verdict is None:
            raise BundleError(f"{title}: the run ended before there was anything to bundle")
        result = record(
            scenario=title,
            title=str(self.composition),
            device=self.device,
            faults=self.faults,
            proxy=self.proxy,
            verdict=self.verdict,
            # A violation counts, whatever went wrong after it.
            failure=None if self.verdict.violated else failure,
        )
        facts = {**result.facts, "repeat": repeat}
        result = evolve(result, seed=self.composition.seed, facts=facts)
        self.collector.directory = folder
        return self.collector.write(result, self.faults, self.composition.to_values())

    # -- the journey -------------------------------------------------------------------------

    def _prepare(self, device: Device) -> None:
        self.device = device
        self.collector = Collector(
            Path(), self.place.rig, self.composition.seed, device, hash_at_once=False
        )
        self.whereabouts = Whereabouts(device.uut)
        self._forget = device.machine.pump.add_listener(self.whereabouts.heard)

    def _journey(self, device: Device, faults: Faults) -> bool:
        """Do all steps; whether the device is up in the end."""
        for number, step in enumerate(self.composition.steps):
            if step.image:
                # What a fault means by "the image" is the one that is installed next.
                faults.update = self._update(step.image)
            for fault in self.composition.at(number):
                armed = faults.arm(fault)
                armed.when_struck(lambda armed=armed: self._struck(armed))  # type: ignore[misc]
            if not (self._do(device, step) and self._recover(device)):
                return False
            if self._goes_in_vain(number) and not (
                self._do(device, step) and self._recover(device)
            ):
                return False
        return True

    def _do(self, device: Device, step: Step) -> bool:
        """Do a step; False: there is no way to go on."""
        try:
            if step.action == "install":
                with self._timed():
                    ended = device.install(self._update(step.image))
                return not ended.timed_out
            if step.action == "restart":
                boot = device.reboot()
                if boot is None:
                    return True
                if boot.ready:
                    device.read_status()
                    device.look("after the restart")
                return boot.ready
            command = device.uut.commit() if step.action == "commit" else device.uut.rollback()
            with self._timed():
                device.operate(command)
            if device.machine.get():
                device.look(f"after the {step.action}")
        except ConsoleLost:
            device.power_went()
        return True

    def _recover(self, device: Device) -> bool:
        """Bring a device back that has no power or died; whether it is ready."""
        for _ in range(MOST_RECOVERIES):
            try:
                if self._died(device):
                    boot = device.await_restart()
                elif not device.machine.get():
                    boot = device.restore()
                else:
                    return True
            except ConsoleLost:
                device.power_went()
                continue
            if not boot.ready:
                return False
        raise InfrastructureError(
            f"power went {MOST_RECOVERIES} times while the device was brought back"
        )

    def _died(self, device: Device) -> bool:
        """Whether the last step was cut short by the system's death, not by a power cut."""
        last = device.did[-1] if device.did else ""
        return (
            last.endswith("cut short")
            and device.restart_expected()
            and device.machine.power_loss is None
        )

    def _goes_in_vain(self, number: int) -> bool:
        """Whether an installation failed that later steps with faults depend on."""
        step = self.composition.steps[number]
        later = any(placed.step > number for placed in self.composition.faults)
        if step.action != "install" or not later:
            return False
        assert self.device is not None
        environment = self.device.last_look.environment
        running = self.device.running
        return not environment.upgrade_available and (
            running is None or running.version != self._update(step.image).name
        )

    def _update(self, image: str) -> Update:
        if image not in self._updates:
            self._updates[image] = self.place.bench.update(image, self.proxy.port)
        return self._updates[image]

    # -- witnesses ---------------------------------------------------------------------------

    def _struck(self, armed: ArmedFault) -> None:
        if self.whereabouts is not None and all(seen is not armed for seen, _ in self.strikes):
            self.strikes.append((armed, self.whereabouts.now))

    def _note_strikes(self) -> None:
        """What struck last may not have been told; what never struck is named."""
        assert self.faults is not None
        for armed in self.faults.armed:
            if armed.fired():
                self._struck(armed)
        self.unfired = tuple(str(fault) for fault in self.faults.unfired())

    def _booted_s(self) -> float:
        events = [] if self.device is None else self.device.events
        return sum(event.elapsed_s for event in events if isinstance(event, BootSeen))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began, booted = time.monotonic(), self._booted_s()
        try:
            yield
        finally:
            self.work_s += time.monotonic() - began - (self._booted_s() - booted)


def healthy_image(composition: Composition) -> str:
    """What must get there in the end: the last healthy image of the journey, or v2."""
    healthy = [s.image for s in composition.steps if s.image and not is_sick(s.image)]
    if healthy:
        return healthy[-1]
    _, plus, plant = composition.base.partition("+")
    return f"v2{plus}{plant}"


def needs(composition: Composition) -> tuple[str, ...]:
    """The images that a bench must have for a composition."""
    return tuple(dict.fromkeys((*composition.images, healthy_image(composition))))
