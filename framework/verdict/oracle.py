"""The static oracle: what a bootloader that keeps the boot contract does with a given disk.

The contract is Mender's (variables `mender_boot_part`, `upgrade_available`, `bootcount`,
`bootlimit`): a slot on trial gets `bootlimit` attempts, then the other one is booted and the trial
is over. A slot that can't be loaded ends a trial at once; outside a trial, also right after one
whose attempts are used up, the other slot is tried and the environment left alone. With no valid
copy of the environment, the first slot that loads is booted. A pure function over values: real
bootloaders are checked against it by booting.
"""

from __future__ import annotations

from attrs import frozen

from framework.verdict.events import BootEnvironment, SlotContent, SlotState


@frozen
class Decision:
    """What the next power-on boots.

    Attributes:
        slot: the slot whose kernel is started; None: no slot can be loaded.
        on_trial: whether the bootloader will fall back by itself if that start fails.
        rolled_back: whether the bootloader leaves a trial for the other slot.
    """

    slot: str | None
    on_trial: bool = False
    rolled_back: bool = False


def loadable(state: SlotState) -> bool:
    """Whether a bootloader can load a kernel from a slot in this state."""
    return state.content is not SlotContent.UNLOADABLE


def other(slot: str) -> str:
    """The other slot of the two."""
    return {"a": "b", "b": "a"}[slot]


def _first(one: str, two: str, slots: dict[str, SlotState]) -> str | None:
    return next((slot for slot in (one, two) if loadable(slots[slot])), None)


def next_boot(environment: BootEnvironment, slots: dict[str, SlotState]) -> Decision:
    """The slot that the next power-on boots, by the boot contract."""
    if environment.valid_copies == 0 or environment.boot_slot is None:
        return Decision(_first("a", "b", slots))
    chosen = environment.boot_slot
    spare = other(chosen)
    if environment.upgrade_available:
        if environment.bootcount < environment.bootlimit and loadable(slots[chosen]):
            return Decision(chosen, on_trial=True)
        return Decision(_first(spare, chosen, slots), rolled_back=True)
    return Decision(_first(chosen, spare, slots))
