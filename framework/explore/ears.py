"""What lines of a console mean for the timeline: which line promises what.

One place for the run that is recorded and for the recoveries that are cut again. The lines are the
updater's and the images', given as `ConsoleSigns` and `BootSigns`; nothing here knows their text.
"""

from __future__ import annotations

import re

from attrs import frozen

from framework.explore.timeline import Promise
from framework.targets.uut import BootSigns, ConsoleSigns
from framework.verdict import BootSeen, CommitReached, Committed


@frozen
class Ears:
    """Reads promises from console lines.

    Attributes:
        boot: lines of a start.
        console: lines of the updater.
        commit_state: the state in which a system proved itself.
        artifact: the update that may reach it.
    """

    boot: BootSigns
    console: ConsoleSigns
    commit_state: str
    artifact: str

    @property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """All lines that mean something."""
        return (self.console.state, self.console.committed, self.boot.ready)

    def event_of(self, match: re.Match[str]) -> Promise | None:
        """The promise of a line that one of `patterns` found; None if it promises nothing."""
        if match.re is self.boot.ready:
            return BootSeen(True, match["version"], match["slot"])
        if match.re is self.console.committed:
            return Committed(match["name"], match["slot"])
        if match.re is self.console.state and match["name"] == self.commit_state:
            return CommitReached(self.artifact)
        return None

    def event_in(self, line: str) -> Promise | None:
        """The promise in a line (without its end); None if there is none."""
        for pattern in self.patterns:
            match = pattern.search(line + "\n")
            if match is not None and (event := self.event_of(match)) is not None:
                return event
        return None
