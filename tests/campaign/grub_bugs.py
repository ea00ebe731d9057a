"""Bugs planted in GRUB's boot script and in the client's way to its environment.

Not here, because one cut does not show them: a client that writes copy 1 only (init makes copy 2
the same), and a script that leaves the lock closed while it writes (a torn block has lost its
first line, or has all that counts in one sector).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

from framework.targets.simulated.grub import shipped_script
from framework.targets.simulated.laboratory import Laboratory


@dataclasses.dataclass(frozen=True)
class GrubBug:
    """One bug: what is changed in the script (text, and what stands for it), client or init.

    `cuts`: how many power cuts it takes to show it.
    """

    invariants: frozenset[int]
    script: tuple[tuple[str, str], ...] = ()
    client: Callable[[ModuleType], type] = lambda module: module.GrubEnvironment
    quirks: frozenset[str] = frozenset()
    cuts: int = 1

    def laboratory(self) -> Laboratory:
        """Devices with this bug. AssertionError if the script has not the text to be changed."""
        text = shipped_script()
        for old, new in self.script:
            assert text.count(old) == 1, f"{text.count(old)} times in the script: {old}"
            text = text.replace(old, new)
        return Laboratory(grub=text, grub_client=self.client, quirks=self.quirks)


def both_at_once(module: ModuleType) -> type:
    """Opens both locks before it writes either copy."""

    class Both(module.GrubEnvironment):  # type: ignore[name-defined, misc]
        def write(self, values: Any) -> None:
            for copy in self._copies:
                module._overwrite(module._lock_of(copy), module.format_block({"editing": "1"}))
            for copy in self._copies:
                module._overwrite(copy, module.format_block({**(self._before or {}), **values}))
            for copy in self._copies:
                module._overwrite(module._lock_of(copy), module.format_block({"editing": "0"}))

        def read(self) -> Any:
            self._before = super().read()
            return dict(self._before)

        _before: Any = None

    return Both


def leaves_the_lock_open(module: ModuleType) -> type:
    """Never closes a lock."""

    class Open(module.GrubEnvironment):  # type: ignore[name-defined, misc]
        def _write_copy(self, copy: str, values: Any) -> None:
            module._overwrite(module._lock_of(copy), module.format_block({"editing": "1"}))
            module._overwrite(copy, module.format_block(values))

    return Open


def keeps_the_order(module: ModuleType) -> type:
    """Leaves the variables where they are, so that what is set may be in two sectors."""

    class InOrder(module.GrubEnvironment):  # type: ignore[name-defined, misc]
        def _write_copy(self, copy: str, values: Any) -> None:
            before = module.parse_block(module._read_file(copy))
            order = {**dict.fromkeys(before, ""), **values}
            super()._write_copy(copy, {key: values[key] for key in order if key in values})

    return InOrder


GRUB_BUGS = {
    "client-both-at-once": GrubBug(frozenset({1, 3, 4, 7, 8}), client=both_at_once),
    "client-lock-stays-open": GrubBug(frozenset({1, 3, 4, 6, 7, 8}), client=leaves_the_lock_open),
    "client-keeps-the-order": GrubBug(frozenset({1, 2, 3, 4, 7, 8}), client=keeps_the_order),
    "init-does-not-flush": GrubBug(
        frozenset({1, 3, 4, 7, 8}), quirks=frozenset({"init-does-not-flush"})
    ),
    "script-both-copies-in-one-start": GrubBug(
        frozenset({1, 3, 4, 7, 8}),
        script=(('bo_write "$bo_copy1"\n', 'bo_write "$bo_copy1"\n bo_write "$bo_copy2"\n'),),
    ),
    "script-counts-nothing": GrubBug(
        frozenset({1, 8}),
        script=(("bo_record $mender_boot_part 1 1", "bo_record $mender_boot_part 1 0"),),
    ),
    "script-ignores-the-lock": GrubBug(
        frozenset({1, 2, 3, 4, 6, 7, 8}),
        script=(('if [ "$editing" = 0 ]; then', 'if [ -n "$editing" ]; then'),),
    ),
    "script-writes-without-a-spare": GrubBug(
        frozenset({1, 3, 4, 7, 8}),
        script=(('if [ "$bo_spare" = 1 ]; then', 'if [ -n "$bo_spare" ]; then'),),
        cuts=2,
    ),
    "script-one-copy": GrubBug(
        frozenset({1, 3, 4, 7, 8}), script=(("set bo_copy2=@COPY_2@", "set bo_copy2=@COPY_1@"),)
    ),
}
