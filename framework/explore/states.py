"""What an exploration is made of: crash states, their classes, and what was covered.

A *crash state* is one decision of a cache model at one moment of a recording, hence one content
of every device; it is made real by `CrashState.disks`, lazily and bit for bit, from nothing but
the journal and the decision. A *class* is all crash states in which every region of the layout
has the same content as far as a boot can tell. Values only; `engine` finds them.

Moments are journal sequence numbers (the order of all records: arrivals, completions, marks), so
"was this acknowledged before power could fail in that state?" is one comparison with
`Mark.sequence`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import TracebackType

from framework.disk import Decision, JournalReader, LazyDisk
from framework.explore.layout import Role


class Disks(dict[str, LazyDisk]):
    """All devices of one crash state by name; a context manager that closes them."""

    def __enter__(self) -> Disks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for disk in self.values():
            disk.close()


@dataclasses.dataclass(frozen=True, slots=True)
class CrashState:
    """A power failure after `operation`, and what it did to the operations before it.

    Attributes:
        operation: operations 1..`operation` had arrived; the power cycle is the one in which
            `operation` was the last (`JournalReader.cycle_of`).
        decision: complete: the state is `JournalReader.apply(cycle, power_cycle, decision)`.
        model: the cache model's name, for people and for the bundle.
        seed: of a sampled state, the seed that chose it; 0 for an enumerated one. Not needed to
            rebuild the state.
    """

    operation: int
    decision: Decision
    model: str
    seed: int = 0

    def disks(self, journal: JournalReader) -> Disks:
        """Every device in this state. Close it, or use it as a context manager.

        Raises BaseImageError or JournalError if the recording's files are gone.
        """
        return Disks(journal.disks_of(self.decision, self.operation))

    def __str__(self) -> str:
        return f"after operation {self.operation}, model {self.model}: {self.decision.describe()}"


@dataclasses.dataclass(frozen=True, slots=True)
class RegionFact:
    """What a class says of one region.

    Attributes:
        region: its name in the layout.
        role: its role.
        image: of a slot, the known image that stands in it bit for bit; else None.
        content: identity of the content within this recording, 16 hexadecimal digits: two classes
            with the same `content` here have the same bytes in this region. Of a slot that holds
            an image or a mixture, identity of its probes' content only.
        loadable: of a slot, whether its magic is there (a slot with an image or a mixture that
            a bootloader would try); True for other regions.
        damaged: whether it has sectors that hold garbage or can't be read; of a slot, whether
            its probes have.
    """

    region: str
    role: Role
    image: str | None
    content: str
    loadable: bool = True
    damaged: bool = False

    @property
    def mixed(self) -> bool:
        """Whether this is a slot that holds none of the known images."""
        return self.role is Role.SLOT and self.image is None

    def __str__(self) -> str:
        if self.role is Role.SLOT:
            what = self.image or ("mixed" if self.loadable else "unloadable")
            return f"{self.region}: {what}"
        return f"{self.region}: {self.content[:8]}{' (damaged)' if self.damaged else ''}"


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time in which power can fail so that the class results.

    For every sequence number s with `first_sequence` <= s < `last_sequence` (in one power cycle;
    -1: before the first record) some state of the class is possible when power fails right after
    record s. Marks with a sequence of at most `first_sequence` had certainly been made; those below
    `last_sequence` had been made in the latest case: a promise made by such a mark has to hold in
    this class.

    Attributes:
        first_sequence, last_sequence: the stretch.
        first_operation, last_operation: the same in operations: how many had arrived.
        earliest: a state of the class that is possible right after `first_sequence`.
        latest: a state of the class that is possible right before `last_sequence`. Of both,
            `operation` is the earliest moment at which their content is possible: so a state is
            written with as few lost operations as can be.
    """

    first_sequence: int
    last_sequence: int
    first_operation: int
    last_operation: int
    earliest: CrashState
    latest: CrashState


@dataclasses.dataclass(frozen=True, slots=True)
class CrashClass:
    """All explored crash states that look alike to a boot.

    Attributes:
        key: 16 hexadecimal digits; the same facts give the same key in every exploration of the
            same recording with the same layout, whatever the model.
        facts: one a region, in the order of `Layout.all_regions`.
        count: distinct disk contents that were counted in it, exact; of sampled rows those seen.
            0 means that it is reachable and its members were not counted one by one (products).
        representative: a state of the class: what goes to the dearer judges. It is the `latest` of
            the last span.
        samples: further states of it, chosen at random; control samples. May be empty.
        exhaustive: every state that put it here comes from an exhaustive row of the coverage.
        spans: when power can fail so that it results, in order, disjoint.
        models: names of the models under which it was reached.
        sha256: empty until `confirm`: over the sectors of the representative's regions (of slots,
            their probes) that the recording ever touches; hexadecimal.
    """

    key: str
    facts: tuple[RegionFact, ...]
    count: int
    representative: CrashState
    samples: tuple[CrashState, ...]
    exhaustive: bool
    spans: tuple[Span, ...]
    models: tuple[str, ...]
    sha256: str = ""

    @property
    def first_operation(self) -> int:
        """Earliest operation after which power can fail so that it results."""
        return self.spans[0].first_operation

    @property
    def last_operation(self) -> int:
        """Latest operation after which power can fail so that it results."""
        return max(span.last_operation for span in self.spans)

    def fact(self, region: str) -> RegionFact:
        """What it says of a region; raises KeyError."""
        for fact in self.facts:
            if fact.region == region:
                return fact
        raise KeyError(f"no region {region!r}; there are {[f.region for f in self.facts]}")

    @property
    def slots(self) -> Mapping[str, RegionFact]:
        """The facts of the slots by region name."""
        return {f.region: f for f in self.facts if f.role is Role.SLOT}

    def __str__(self) -> str:
        return f"class {self.key[:8]}: " + ", ".join(map(str, self.facts))


@dataclasses.dataclass(frozen=True, slots=True)
class Coverage:
    """One row of the coverage table: what was done with one epoch under one model.

    Attributes:
        model: the model's name.
        cycle: the power cycle.
        first_operation, last_operation: the cut points that the row stands for.
        how: `exhaustive` (every state of the model's space), `classes` (every reachable class, by
            the product of regions; states counted, not visited one by one), `sampled`, or
            `not modelled`.
        open_operations: the most operations that were at stake at one moment.
        points: (moment, decision) pairs enumerated; of `classes` the size of the space.
        states: distinct disk contents among them: exact for `exhaustive` and `classes` (a Python
            int, may be astronomic), those seen for `sampled`.
        classes: distinct classes found in the row.
        note: what is worth knowing, for people.
    """

    model: str
    cycle: int
    first_operation: int
    last_operation: int
    how: str
    open_operations: int
    points: int
    states: int
    classes: int
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """Totals of an exploration.

    Attributes:
        points: (moment, decision) pairs that were visited one by one.
        states: distinct disk contents among those, over all rows.
        product_states: further states of rows that are exhaustive by the product of regions,
            summed over the rows (neighbouring rows may share states).
        classes: distinct classes.
        index_seconds: reading, hashing and indexing the recording.
        seconds: the enumeration after that.
        unkept: classes among these that were only counted, for their number.
    """

    points: int
    states: int
    product_states: int
    classes: int
    index_seconds: float
    seconds: float
    unkept: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Outside:
    """Writes that fell outside of every region of the layout: seen, counted, not classed."""

    operations: int
    sectors: int


@dataclasses.dataclass(frozen=True, slots=True)
class Exploration:
    """Everything that `engine.explore` found."""

    classes: tuple[CrashClass, ...]
    coverage: tuple[Coverage, ...]
    counts: Counts
    outside: Outside
