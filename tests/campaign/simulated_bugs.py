"""Bugs planted in the client, in what it stands on, or in the boot loader, for a search to find.

Not here, because one drive hides them: a slot or an environment that is not synced. The store's
next transaction flushes the drive, and with it what was written to the slot. The explorer and the
live targets catch those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from framework.targets.simulated.laboratory import Laboratory
from updater.device import bootenv
from updater.device.client import Client, Ports
from updater.device.config import Config
from updater.device.model import Outcome, Part, Result
from updater.device.slot_writer import SlotWriter
from updater.device.states import Event


class Bug(NamedTuple):
    """A bug, the invariants that it may break (the search must name one), and how it is planted."""

    invariants: frozenset[int]
    client: Any = Client
    quirks: frozenset[str] = frozenset()

    def laboratory(self) -> Laboratory:
        return Laboratory(client=self.client, quirks=self.quirks)


def _with(**ports: Any) -> Any:
    """A client some of whose ports are wrapped: each value makes a new port of the old one."""

    def make(config: Config, given: Ports) -> Client:
        changed = {name: wrap(getattr(given, name)) for name, wrap in ports.items()}
        return Client(config, given._replace(**changed))

    return make


class _Forwarding:
    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _StoreWithoutSync(_Forwarding):
    """The store's connection is told synchronous=OFF, whatever the store says."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        files = real._files

        class Files:
            exists = staticmethod(files.exists)
            set_aside = staticmethod(files.set_aside)
            mend = staticmethod(files.mend)

            @staticmethod
            def connect(path: str) -> Any:
                return _Unsynced(files.connect(path))

        real._files = Files()


class _Unsynced(_Forwarding):
    in_transaction = property(lambda self: self._real.in_transaction)

    def execute(self, sql: str, *values: Any) -> Any:
        return self._real.execute(sql.replace("synchronous=EXTRA", "synchronous=OFF"), *values)


class SwitchesFirst(Client):
    """Arms the new slot before anything is in it."""

    def download(self) -> Event:
        update = self._current()
        bootenv.start_trial(self.ports.bootenv, self._slot(update.target))
        return super().download()


class NeverReadsBack(Client):
    def fill_slot(self, payload: Any) -> None:
        read_back = SlotWriter.read_back
        SlotWriter.read_back = lambda self, payload: None  # type: ignore[method-assign]
        try:
            super().fill_slot(payload)
        finally:
            SlotWriter.read_back = read_back  # type: ignore[method-assign]


class CommitsUnchecked(Client):
    def verify(self) -> Event:
        return Event.DONE


class CommitsAtInstall(Client):
    """Makes the new slot the one for good at once: no trial."""

    def activate(self) -> Event:
        bootenv.settle(self.ports.bootenv, self._slot(self._current().target))
        return Event.DONE


class ForgetsToPointBack(Client):
    """Rolls back in the store only."""

    def roll_back(self) -> Event:
        return Event.DONE


class LosesTheCause(Client):
    def _note_cause(self, cause: str) -> None:
        return

    def clean_up(self) -> Event:
        self._update = self._current()._replace(cause="")
        return super().clean_up()


class SaysCommittedFirst(Client):
    """Acknowledges before the boot environment says so."""

    def commit_environment(self) -> Event:
        self._result = Result.COMMITTED
        self._say_outcome(self._current(), self._current().target, "")
        return super().commit_environment()


class RestartsForEver(Client):
    """A trial that isn't proved asks for a restart, and doesn't write down that it did."""

    def resume(self) -> None:
        if self.ports.store.update() is not None:
            self._request_reboot()
            return
        super().resume()


class RecordsTheWrongResult(Client):
    def clean_up(self) -> Event:
        finish = self.ports.store.finish

        class Lying(_Forwarding):
            def finish(self, outcome: Outcome, provides: Mapping[str, str] | None) -> None:
                finish(outcome._replace(result=Result.ROLLED_BACK, cause=""), provides)

        self.ports = self.ports._replace(store=Lying(self.ports.store))
        return super().clean_up()


class NeverRunsLeave(Client):
    """Skips the scripts behind a state."""

    def _run_scripts(self, state: str, part: Any) -> None:
        if part is not Part.LEAVE:
            super()._run_scripts(state, part)


class HidesIgnoredErrors(Client):
    """Records what it ends with as if no script had failed."""

    def _provides_now(self, update: Any, *, committed: bool) -> Any:
        return super()._provides_now(update._replace(inconsistent=False), committed=committed)


class _StoreNotMended(_Forwarding):
    """A store that is given up where a block of it can't be read, as it once was."""

    def __init__(self, real: Any) -> None:
        super().__init__(real)
        real._mend = lambda error: False


class PointsBackOnce(Client):
    """Tries a rollback's write to the environment once, as it once did."""

    def roll_back(self) -> Event:
        before, bootenv.WRITES = bootenv.WRITES, 1  # type: ignore[misc]
        try:
            bootenv.settle(self.ports.bootenv, self._slot(self._current().source))
        finally:
            bootenv.WRITES = before  # type: ignore[misc]
        return super().roll_back()


class ForgetsTheModule(Client):
    """Rolls back without the update module's help."""

    def _roll_back_module(self) -> Event:
        return Event.NO_REBOOT


class CommitsPackagesUnchecked(Client):
    """Runs no health check where nothing restarts."""

    def commit_environment(self) -> Event:
        healthy = _Forwarding(self.ports.health)
        healthy.run = lambda: None  # type: ignore[attr-defined]
        self.ports = self.ports._replace(health=healthy)  # type: ignore[arg-type]
        return super().commit_environment()


class _BeyondTheSlot(_Forwarding):
    """A partition table that is off by 16 KiB: the end of slot b lies in the data partition."""

    def open_slot(self, slot: Any) -> Any:
        opened = self._real.open_slot(slot)
        opened._offset += 16 << 10
        return opened


BUGS = {
    "switch-before-image": Bug(frozenset({2, 4, 6, 7, 8, 1}), SwitchesFirst),
    "no-read-back": Bug(frozenset({2}), NeverReadsBack),
    "no-health-check": Bug(frozenset({4}), CommitsUnchecked),
    "no-trial": Bug(frozenset({1, 4}), CommitsAtInstall),
    "rollback-forgets-environment": Bug(frozenset({1, 4, 6, 7, 8}), ForgetsToPointBack),
    "cause-lost": Bug(frozenset({7}), LosesTheCause),
    "restarts-for-ever": Bug(frozenset({1, 6, 8}), RestartsForEver),
    "wrong-result-recorded": Bug(frozenset({7}), RecordsTheWrongResult),
    "scripts-skipped": Bug(frozenset({4, 6}), NeverRunsLeave),
    "writes-beyond-its-slot": Bug(frozenset({5}), _with(machine=_BeyondTheSlot)),
    "store-never-synced": Bug(frozenset({6, 7}), _with(store=_StoreWithoutSync)),
    "bootcount-off-by-one": Bug(frozenset({8}), quirks=frozenset({"bootcount-off-by-one"})),
    "attempts-not-counted": Bug(frozenset({1, 8}), quirks=frozenset({"does-not-count"})),
    "never-falls-back": Bug(frozenset({1, 8}), quirks=frozenset({"never-falls-back"})),
    "flags-do-not-count": Bug(frozenset({1, 3, 4, 8}), quirks=frozenset({"flags-do-not-count"})),
}

NARROW = {
    "ignored-errors-hidden": Bug(frozenset({7}), HidesIgnoredErrors),
    "acknowledges-too-early": Bug(frozenset({3}), SaysCommittedFirst),
    "rollback-keeps-trial": Bug(frozenset({4, 6, 7}), quirks=frozenset({"rollback-keeps-trial"})),
    "unreadable-store-given-up": Bug(frozenset({6, 7}), _with(store=_StoreNotMended)),
    "points-back-once": Bug(frozenset({7}), PointsBackOnce),
    "module-not-rolled-back": Bug(frozenset({7}), ForgetsTheModule),
    "package-not-checked": Bug(frozenset({4}), CommitsPackagesUnchecked),
}
"""Bugs that one random lifetime in a thousand shows: every fault of one kind shows them sooner."""
