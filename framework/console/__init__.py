"""The console: a pump that drains for ever, and what waits on it.

`ConsolePump` (pump.py) reads a serial line in its own thread, whoever looks or not: an unread
console stalls a QEMU guest. `ConsolePumpDriver` (driver.py) puts the same pump over any labgrid
console. Patterns are bounded (patterns.py), failures name their evidence (errors.py).
"""

from framework.console.errors import ConsoleDeath, ConsoleError, ConsoleLost, ConsoleTimeout
from framework.console.patterns import DEFAULT_DEATHS, Marker, PatternError
from framework.console.pump import ConsoleMatch, ConsolePump, ConsoleSlice, Death, Line
from framework.console.transports import (
    ConsoleDriverTransport,
    SerialTransport,
    SocketTransport,
    Transport,
)

__all__ = [
    "DEFAULT_DEATHS",
    "ConsoleDeath",
    "ConsoleDriverTransport",
    "ConsoleError",
    "ConsoleLost",
    "ConsoleMatch",
    "ConsolePump",
    "ConsoleSlice",
    "ConsoleTimeout",
    "Death",
    "Line",
    "Marker",
    "PatternError",
    "SerialTransport",
    "SocketTransport",
    "Transport",
]
