"""What all cache models share: their base class and the helpers that several need.

Only `random.Random.random` and `getrandbits` are used, whose sequences Python keeps stable for a
seed, so a decision replays from its seed as well as from its record.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import random
from typing import Any, ClassVar

from framework.disk.errors import DiskError
from framework.disk.state import Decision, PowerCycle


class CacheModel(abc.ABC):
    """What a device's volatile cache does when power fails."""

    name: ClassVar[str]

    @abc.abstractmethod
    def decide(self, cycle: PowerCycle, seed: int) -> Decision:
        """Decide what survives; the same arguments give the same decision."""

    def parameters(self) -> dict[str, Any]:
        """The model's parameters as plain values, for the journal and for people."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v}" for k, v in self.parameters().items())
        return f"{self.name}({inner})" if inner else self.name


def numbers(cycle: PowerCycle, rows: list[int]) -> tuple[int, ...]:
    """The operation numbers of rows, in order."""
    first = cycle.operations.first
    return tuple(sorted(first + row for row in rows))


def probability(model: str, field: str, value: float) -> None:
    """Raise DiskError unless `value` is a probability."""
    if not 0.0 <= value <= 1.0:
        raise DiskError(f"{model}: {field}={value} is not a probability (0 to 1)")


def generator(seed: int) -> random.Random:
    """The source of a model's choices."""
    return random.Random(seed)  # noqa: S311 - has to be reproducible, nothing secret here


def subset(cycle: PowerCycle, rows: list[int], seed: int, keep: float) -> Decision:
    """Each of the rows survives with probability `keep`."""
    rng = generator(seed)
    lost = [row for row in rows if rng.random() >= keep]
    return Decision(dropped=numbers(cycle, lost), open_operations=len(rows))


def rewritten_durably(
    cycle: PowerCycle, open_rows: list[int], row: int, unit: tuple[int, int]
) -> bool:
    """Whether a durable operation that took effect after `row` touches the range."""
    operations = cycle.operations
    if operations.completed[row] < 0:
        return False  # it was in flight: nothing took effect after it
    offset, length = unit
    touching = (
        cycle.changing()
        & (operations.device == operations.device[row])
        & (operations.offset < offset + length)
        & (operations.offset + operations.length > offset)
        & (operations.completed > operations.completed[row])
    )
    touching[open_rows] = False
    return bool(touching.any())


def units_of(offset: int, length: int, granularity: int) -> list[tuple[int, int]]:
    """The parts of a range that lie in different aligned units, as (start, end) in bytes."""
    units = []
    at = offset
    while at < offset + length:
        end = min(at - at % granularity + granularity, offset + length)
        units.append((at, end))
        at = end
    return units


def garbage_bytes(seed: int, device: int, offset: int, length: int) -> bytes:
    """Bytes that nobody wrote: the same for the same arguments on every machine (SHAKE-128)."""
    text = f"garbage {seed} {device} {offset} {length}".encode()
    return hashlib.shake_128(text).digest(length)
