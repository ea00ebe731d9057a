"""Which recoveries there are: classes of crash states grouped by all that a recovery depends on.

Twenty thousand classes cannot each be booted, and need not be: most differ in bytes that nobody
reads again. What a device does after power-on, and what it writes in doing so, follows from what it
*finds*: the partition tables and boot files, what its bootloader reads in the environment, what
stands in the slots, and what its data partition is to the system that mounts it (what has to be
mended or replayed, and the files after that; `framework.explore.views`). That is a *recovery key*.
One class of each key is booted and cut again; what holds for its recovery holds for all of them.

That is a claim, so it is tested in every run: of some keys a second class is booted, too, a control
sample, and its recovery has to leave the same *trace*: the same promises in the same order, the
same steps of the boot environment, the same slots written, the same files in the end; but for times
and random identifiers. Another trace says that the key is too coarse, which is an error of ours.
Not compared are the blocks themselves: where a file system puts a file, and when it writes what
nobody waits for, differs between two boots of one and the same state.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Hashable, Iterable
from typing import Final

from attrs import evolve, frozen

from framework.disk import Decision, JournalReader, Kind
from framework.disk.glimpse import Glimpses
from framework.explore.bulk import BulkOracle
from framework.explore.judges.context import Context
from framework.explore.judges.data import DataJudge
from framework.explore.layout import EnvironmentReading, Region, Role
from framework.explore.states import CrashClass, CrashState, Disks
from framework.explore.timeline import read_timeline

Variables = tuple[tuple[str, str], ...]


@frozen
class RecoveryKey:
    """All that a recovery depends on.

    Attributes:
        fixed: the contents of partition tables and boot files.
        copies: which copies of the environment are valid, the one that counts, and what is wrong
            with the others.
        variables: of the environment.
        slots: of each slot the image in it, whether it can be loaded, whether its head is damaged.
        needed: what has to be done to the data partition before it is mounted.
        view: what is on it then.
    """

    fixed: tuple[str, ...]
    copies: tuple[tuple[bool, ...], int | None, tuple[str, ...]]
    variables: Variables
    slots: tuple[tuple[str | None, bool, bool], ...]
    needed: str
    view: str

    def parts(self) -> tuple[Hashable, Hashable, Hashable]:
        """What the bootloader finds, what the repair finds, and what the system finds then.

        A start goes through these one after the other, and each looks at its own alone; so a
        recovery is a combination of parts, of which there are far fewer than combinations.
        """
        return (
            ("bootloader", self.fixed, self.copies, self.variables, self.slots),
            ("repair", self.needed),
            ("system", self.variables, self.slots, self.view),
        )

    def describe(self) -> str:
        """One line for people."""
        valid, current, _ = self.copies
        copies = "".join("v" if one else "-" for one in valid)
        slots = ", ".join(image or ("mixed" if load else "empty") for image, load, _ in self.slots)
        values = " ".join(f"{name}={value}" for name, value in self.variables)
        data = f"{self.needed}, {self.view}"
        return f"environment {copies} ({current}) {values}; slots {slots}; data {data}"


@frozen
class Recoveries:
    """The classes of an exploration by recovery key.

    Attributes:
        groups: the classes of each key, the keys so ordered that a beginning shows the most parts.
        unknown: classes whose data partition was not looked at: they have no key.
    """

    groups: tuple[tuple[RecoveryKey, tuple[CrashClass, ...]], ...]
    unknown: int

    def parts(self, numbers: Iterable[int]) -> tuple[int, int]:
        """How many distinct parts the keys of these numbers show, and how many there are."""
        shown = {part for n in numbers for part in self.groups[n][0].parts()}
        return len(shown), len({part for key, _ in self.groups for part in key.parts()})

    def controls(self, booted: int, share: float, seed: int) -> list[tuple[int, CrashClass]]:
        """Second classes of the first `booted` keys, as many as are that share of them.

        With each the number of its key.
        """
        able = [n for n, (_, classes) in enumerate(self.groups[:booted]) if len(classes) > 1]
        rng = random.Random(seed)  # noqa: S311 - no secret
        chosen = rng.sample(able, min(len(able), -int(-booted * share // 1)))
        return [(n, rng.choice(self.groups[n][1][1:])) for n in sorted(chosen)]


def recoveries(classes: Iterable[CrashClass], oracle: BulkOracle, data: DataJudge) -> Recoveries:
    """Group classes by recovery key; the data judge must have looked at views."""
    groups: dict[RecoveryKey, list[CrashClass]] = {}
    unknown = 0
    has_data = any(r.role is Role.DATA for r in oracle.context.layout.all_regions())
    for crash_class in classes:
        content = data.checked.get(data.key(crash_class))
        if has_data and content is None:
            unknown += 1
            continue
        reading = oracle.reading(crash_class)
        facts = crash_class.facts
        key = RecoveryKey(
            fixed=tuple(f.content for f in facts if f.role in (Role.TABLE, Role.BOOT)),
            copies=(reading.valid, reading.current, reading.problems),
            variables=_variables(reading),
            slots=tuple((f.image, f.loadable, f.damaged) for f in facts if f.role is Role.SLOT),
            needed="" if content is None else content.needed,
            view="" if content is None else content.view,
        )
        groups.setdefault(key, []).append(crash_class)
    return Recoveries(tuple((k, tuple(groups[k])) for k in _most_telling_first(groups)), unknown)


def _variables(reading: EnvironmentReading) -> Variables:
    return tuple(sorted(reading.variables.items()))


def _most_telling_first(groups: dict[RecoveryKey, list[CrashClass]]) -> list[RecoveryKey]:
    """Always the key that shows the most parts that none before did; of equals the commonest.

    When each part was shown once, the others follow: what they are combinations of is known.
    """
    common = sorted(groups, key=lambda key: (-len(groups[key]), key.describe()))
    chosen: list[RecoveryKey] = []
    told: set[Hashable] = set()
    while common:
        best = max(common, key=lambda key: len(set(key.parts()) - told))
        if told.issuperset(best.parts()):
            break
        told.update(best.parts())
        common.remove(best)
        chosen.append(best)
    return chosen + common


@frozen
class Trace:
    """What a recovery did, without what differs between two boots of one state.

    Attributes:
        promises: in order.
        environments: the environment's variables, whenever others count.
        slots: the regions of the slots that were written.
        data: the data partition's view in the end.
    """

    promises: tuple[str, ...]
    environments: tuple[Variables, ...]
    slots: tuple[str, ...]
    data: str

    def differs(self, other: Trace) -> str:
        """How another one differs; empty if it doesn't."""
        for name in ("promises", "environments", "slots", "data"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"{name} {mine} and {its}"
        return ""


NOTHING: Final = Trace((), (), (), "")


def trace_of(context: Context, journal: JournalReader, until: int) -> Trace:
    """What a recovery did up to operation `until` of its journal. `context`: the recording's."""
    layout = context.layout
    glimpses = Glimpses(journal, layout.hulls(Role.ENVIRONMENT))
    told: list[Variables] = []
    slots: set[str] = set()
    for number in range(until + 1):
        roles = {region.name: region.role for region in _touched(context, journal, number)}
        slots |= {name for name, role in roles.items() if role is Role.SLOT}
        if number and Role.ENVIRONMENT not in roles.values():
            continue
        with Disks(glimpses.disks(Decision(), number)) as disks:
            variables = _variables(layout.environment(disks))
        if not told or told[-1] != variables:
            told.append(variables)
    inner = evolve(context, journal=journal)
    view = DataJudge(inner, views=True).look(CrashState(until, Decision(), "kept")).view
    promises = [s.event for s in read_timeline(journal.marks).steps if s.after_operation <= until]
    return Trace(tuple(map(str, promises)), tuple(told), tuple(sorted(slots)), view)


def _touched(context: Context, journal: JournalReader, number: int) -> list[Region]:
    """The regions that an operation writes to; operation 0 is the power-on."""
    operations = journal.operations
    row = number - 1
    if not number or operations.kind[row] == Kind.FLUSH:
        return []
    device = journal.devices[int(operations.device[row])]
    begin = int(operations.offset[row])
    end = begin + int(operations.length[row])
    return [
        region
        for region in context.layout.all_regions()
        for part in region.ranges
        if part.device == device and part.offset < end and begin < part.end
    ]


class Ends:
    """Where recoveries ended, so that an update is tried again once from each; for threads."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._seen)

    def is_new(self, end: Hashable) -> bool:
        """Whether nothing ended there before; from now on something has."""
        with self._lock:
            before = len(self._seen)
            self._seen.add(end)
            return len(self._seen) > before
