"""Things that are made at their first use: a boot with nothing to do makes none of them."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


def later(make: Callable[[], T]) -> T:
    """Return what looks like `make()`, which is called when an attribute is first asked for."""
    return _Later(make)  # type: ignore[return-value]


class _Later:
    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make
        self._made: object = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = self._make()
        return getattr(self._made, name)
