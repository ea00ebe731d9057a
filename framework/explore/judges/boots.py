"""The judges that boot: the real bootloader up to its decision, and the whole device until ready.

Both run a class's member on the machine of its rig (`framework.explore.serve`) and compare what
the console says with the static oracle's expectation. Where the oracle was certain and the boot
did otherwise, somebody is wrong about the device: a `Disagreement`, which fails the exploration.

A bootloader's decision is known when it begins to load a slot. That a slot with a known image can
be loaded does not change from state to state: so it is awaited once for each image in each slot,
and wherever a slot holds anything else. It needs no network and no kernel, and says nothing of
what happens later.
"""

from __future__ import annotations

import re
from dataclasses import replace

from attrs import frozen

from framework.explore.judges.context import Context
from framework.explore.judges.static import Expectation, StaticOracle
from framework.explore.serve import Heard, StateMachine, Workplace
from framework.explore.states import CrashClass, CrashState
from framework.targets.machine import Machine
from framework.targets.uut import BootSigns
from framework.verdict import BootSeen

DECISION_TIMEOUT_S = 20.0
BOOT_TIMEOUT_S = 90.0
MAX_STARTS = 4


@frozen
class Booted:
    """What a boot of one state came to.

    Attributes:
        crash_class, state: what was booted: the representative or a control sample.
        seen: what the console showed, as an event for the invariants; None for a decision only.
        disagreement: how it differs from a certain expectation; empty if it doesn't.
        did: what it did, in a few words.
        seconds: how long it took.
        writes: how many operations it wrote.
        data_lost: the system came up without its data partition.
    """

    crash_class: CrashClass
    state: CrashState
    seen: BootSeen | None
    disagreement: str
    did: str
    seconds: float
    writes: int
    data_lost: bool = False


class BootloaderJudge:
    """The real bootloader's decision."""

    name = "uboot"

    def __init__(
        self, context: Context, oracle: StaticOracle, machine: Machine, signs: BootSigns
    ) -> None:
        self._context = context
        self.oracle = oracle
        self._machine = replace(machine, network=None)
        self._signs = signs
        self._loaded: set[tuple[str | None, str | None]] = set()
        """Slots and images that the bootloader was seen to load."""

    def boot(self, crash_class: CrashClass, state: CrashState, place: Workplace) -> Booted:
        """Have the bootloader decide on a state. Raises InfrastructureError if QEMU fails."""
        signs = self._signs
        wanted = self.oracle.expect(crash_class)
        slot = wanted.decision.slot
        image = None if slot is None else crash_class.fact(self._context.slots[slot]).image
        known = (slot, image) in self._loaded

        def decided(match: re.Match[str]) -> bool:
            return match.re is not signs.trying or (known and match["slot"] == slot)

        with (
            state.disks(self._context.journal) as disks,
            StateMachine(self._machine, disks, place) as machine,
        ):
            heard = machine.run(
                [signs.trying, signs.booting, signs.nothing],
                DECISION_TIMEOUT_S,
                stop_on=decided,
                max_starts=1,
            )
        did, disagreement = _compare_decision(heard, wanted, signs)
        if not disagreement and image is not None and heard.matches[-1].re is signs.booting:
            self._loaded.add((slot, image))
        return Booted(crash_class, state, None, disagreement, did, heard.seconds, heard.operations)


def _compare_decision(heard: Heard, wanted: Expectation, signs: BootSigns) -> tuple[str, str]:
    if heard.ended != "matched":
        did = f"{heard.ended} without a decision; last words: {heard.tail[-120:]!r}"
        return did, did
    return _decided(heard.matches[-1], wanted, signs)


def _decided(match: re.Match[str], wanted: Expectation, signs: BootSigns) -> tuple[str, str]:
    """What the bootloader does, and how that differs from a certain expectation."""
    decision = wanted.decision
    if match.re is signs.nothing:
        slot, on_trial, did = None, False, "finds no slot to boot"
    else:
        slot, on_trial = match["slot"], match["trial"] == "1"
        did = f"boots slot {slot}{' on trial' if on_trial else ''}"
    if not wanted.certain or (slot, on_trial) == (decision.slot, decision.on_trial):
        return did, ""
    trial = " on trial" if decision.on_trial else ""
    return did, f"the oracle expects slot {decision.slot}{trial}, the bootloader {did}"


class ColdBootJudge:
    """The whole device, from power-on to its ready line."""

    name = "coldboot"

    def __init__(
        self, context: Context, oracle: StaticOracle, machine: Machine, signs: BootSigns
    ) -> None:
        self.context = context
        self.oracle = oracle
        self.machine = machine
        self._signs = signs

    def boot(self, crash_class: CrashClass, state: CrashState, place: Workplace) -> Booted:
        """Boot a state until it is ready. Raises InfrastructureError if QEMU fails.

        What does not get ready is tried once more: on a busy host a guest's watchdog can bite.
        """
        heard = self._boot_once(state, place)
        if heard.ended != "matched":
            heard = self._boot_once(state, place)
        return self.read(crash_class, state, heard)

    def _boot_once(self, state: CrashState, place: Workplace) -> Heard:
        with (
            state.disks(self.context.journal) as disks,
            StateMachine(self.machine, disks, place) as machine,
        ):
            signs = self._signs
            return machine.run(
                [signs.booting, signs.nothing, signs.ready, signs.data_lost],
                BOOT_TIMEOUT_S,
                stop_on=lambda match: match.re is signs.ready,
                max_starts=MAX_STARTS,
            )

    def read(self, crash_class: CrashClass, state: CrashState, heard: Heard) -> Booted:
        """What a start came to.

        It disagrees with the oracle where the bootloader decides otherwise, or nothing gets ready
        that should. What a system does after that is the updater's business, for the invariants.
        """
        signs = self._signs
        wanted = self.oracle.expect(crash_class)
        lost = any(match.re is signs.data_lost for match in heard.matches)
        decisions = [m for m in heard.matches if m.re in (signs.booting, signs.nothing)]
        disagreement = _decided(decisions[0], wanted, signs)[1] if decisions else ""
        if heard.ended != "matched":
            did = f"{heard.ended} after {heard.starts} starts: {heard.tail[-200:]!r}"
            seen = BootSeen(False, None, None, None, heard.seconds, heard.starts, did)
        else:
            ready = heard.matches[-1]
            version, slot = ready["version"], ready["slot"]
            seen = BootSeen(True, version, slot, None, heard.seconds, heard.starts)
            did = f"runs {version} in slot {slot}"
        if lost:
            did += ", data partition not mounted"
        return Booted(
            crash_class, state, seen, disagreement, did, heard.seconds, heard.operations, lost
        )
