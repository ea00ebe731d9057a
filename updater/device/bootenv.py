"""The boot variables' meaning, whichever boot loader keeps them.

Names and semantics are Mender's: `mender_boot_part` is the decimal partition number of the slot
to start, `upgrade_available=1` marks a trial that the boot loader counts with `bootcount` and
leaves by itself. Every change is one transaction, and is read back: a tool that says "done" is
not evidence (libubootenv's `fw_setenv -s` ignores lines it does not like and exits with 0).

A write that fails, or reads back as something else, is done again a few times: for want of one
write a slot whose installation failed would stay armed, and be started.
"""

from __future__ import annotations

from updater.device.config import BootEnvConfig, Slot
from updater.device.console import say
from updater.device.errors import BootEnvError
from updater.device.model import Boot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from updater.device.ports import BootEnvironment

WRITES = 3
"""How often a transaction is tried before it has failed."""

_KEYS = ("mender_boot_part", "mender_boot_part_hex", "upgrade_available", "bootcount")


def open_environment(config: BootEnvConfig) -> BootEnvironment:
    """Return the implementation that the configuration names."""
    if config.kind == "uboot":
        from updater.device.bootenv_uboot import UBootEnvironment  # noqa: PLC0415

        return UBootEnvironment(config.fw_env_config)
    from updater.device.bootenv_grub import GrubEnvironment  # noqa: PLC0415

    first, second = config.copies
    return GrubEnvironment(first, second)


def read_boot(environment: BootEnvironment, slots: tuple[Slot, Slot]) -> Boot:
    """Return which slot the environment starts. Raises BootEnvError when it is unreadable."""
    values = environment.read()
    part = values.get("mender_boot_part", "")
    slot = next((slot.name for slot in slots if str(slot.number) == part), None)
    return Boot(slot, values.get("upgrade_available") == "1")


def check_canary(environment: BootEnvironment) -> None:
    """Refuse an environment that the boot loader did not write to, where that is to be checked.

    The contract of Mender's U-Boot integration: the image is built with
    `mender_check_saveenv_canary=1`, and at its first start the boot loader saves
    `mender_saveenv_canary=1`. Where it did not, boot loader and client do not share an
    environment, and a switch would have no effect, or no way back.
    """
    values = environment.read()
    if values.get("mender_check_saveenv_canary") != "1":
        return
    if values.get("mender_saveenv_canary") != "1":
        raise BootEnvError(
            "the boot environment holds mender_check_saveenv_canary=1 but the boot loader has not"
            " saved mender_saveenv_canary=1: it uses another environment or cannot save this one;"
            " nothing was changed (if that check is a leftover of an older boot loader:"
            " fw_setenv mender_check_saveenv_canary)"
        )


def start_trial(environment: BootEnvironment, slot: Slot) -> None:
    """Let the next boot try `slot`, once."""
    check_canary(environment)
    _transact(environment, slot, trial=True)


def settle(environment: BootEnvironment, slot: Slot) -> None:
    """Make `slot` the one that is started, for good."""
    _transact(environment, slot, trial=False)


def _transact(environment: BootEnvironment, slot: Slot, *, trial: bool) -> None:
    wanted = dict(
        zip(
            _KEYS,
            (str(slot.number), f"{slot.number:x}", "1" if trial else "0", "0"),
            strict=True,
        )
    )
    for attempt in range(1, WRITES + 1):
        try:
            environment.write(wanted)
            _check_kept(environment.read(), wanted)
        except BootEnvError as error:
            if attempt == WRITES:
                raise
            say(f"warning: {error}; trying again")
        else:
            return


def _check_kept(kept: dict[str, str], wanted: dict[str, str]) -> None:
    for key, value in wanted.items():
        if kept.get(key) != value:
            raise BootEnvError(
                f"the boot environment was written but {key} reads back as"
                f" {kept.get(key)!r} instead of {value!r}"
            )
