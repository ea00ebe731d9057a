"""What is known of each board of a farm, as reports show it."""

from __future__ import annotations

from attrs import frozen


@frozen
class BoardStatistics:
    """What was seen of one place, over all runs.

    Attributes:
        place: its name.
        attempts, failures, infrastructure: scenarios on it, and how many ended so.
        cycles: how often power was switched on.
        boots: how many boots got ready.
        boot_median_s, boot_p95_s: seconds of those; None without any.
        unready: how many did not.
        last: when it was used last, UTC.
    """

    place: str
    attempts: int
    failures: int
    infrastructure: int
    cycles: int
    boots: int
    boot_median_s: float | None
    boot_p95_s: float | None
    unready: int
    last: str

    @property
    def infrastructure_rate(self) -> float:
        """The share of attempts that said nothing of the product."""
        return self.infrastructure / self.attempts if self.attempts else 0.0
