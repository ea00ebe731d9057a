"""The vocabulary of faults: what goes wrong, and when."""

from framework.faults.vocabulary import (
    AtState,
    BitFlip,
    BootEnvWrite,
    ConsoleSays,
    Downloaded,
    Fault,
    FaultError,
    NetworkDrop,
    PowerCut,
    SlotWrite,
    Trigger,
    boot_env_write,
    console,
    downloaded,
    slot_write,
    state,
)

__all__ = [
    "AtState",
    "BitFlip",
    "BootEnvWrite",
    "ConsoleSays",
    "Downloaded",
    "Fault",
    "FaultError",
    "NetworkDrop",
    "PowerCut",
    "SlotWrite",
    "Trigger",
    "boot_env_write",
    "console",
    "downloaded",
    "slot_write",
    "state",
]
