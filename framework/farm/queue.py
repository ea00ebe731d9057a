"""What runs next, and where: pure decisions over plain values.

The longest come first, by what they took before; what was never run comes before everything, since
it may be long. What ended INFRASTRUCTURE is tried again, on a place where it has not been yet if
any is at hand, and a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from attrs import define, field

__all__ = ["Queue", "longest_first"]


def longest_first(scenarios: Sequence[str], seconds: Mapping[str, float]) -> list[int]:
    """The order in which to run scenarios, as their indices; unknown ones first, as they stand."""
    return sorted(
        range(len(scenarios)),
        key=lambda index: (scenarios[index] in seconds, -seconds.get(scenarios[index], 0.0)),
    )


@define
class Queue:
    """The scenarios that are still to be run, by their indices, in order.

    Attributes:
        pending: what nobody is running.
        retries: how often one that ended INFRASTRUCTURE is tried again.
        tried: the places where each one ended INFRASTRUCTURE.
    """

    pending: list[int]
    retries: int = 2
    tried: dict[int, list[str]] = field(factory=dict)

    def take(self, place: str, others: Collection[str]) -> int | None:
        """What `place` should run now; None: nothing, though perhaps later.

        One that has failed there is left to `others`, the run's places at this moment, if there is
        one where it has not.
        """
        for index in self.pending:
            tried = self.tried.get(index, ())
            if place not in tried or all(other in tried for other in others):
                self.pending.remove(index)
                return index
        return None

    def infrastructure(self, index: int, place: str) -> bool:
        """It ended INFRASTRUCTURE there; whether it is tried again (it is first in line then)."""
        tried = self.tried.setdefault(index, [])
        tried.append(place)
        if len(tried) > self.retries:
            return False
        self.pending.insert(0, index)
        return True
