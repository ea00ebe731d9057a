"""Finds every crash state of a recording under a cache model, and groups them into classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from framework.disk import CacheModel, JournalReader
from framework.explore.layout import Layout
from framework.explore.states import Exploration

Progress = Callable[[str, int, int], None]
"""Called now and then with what is being done (a model and an epoch, for people), the states
visited so far and the classes found so far. May raise (KeyboardInterrupt): nothing is left open."""


def explore(
    journal: JournalReader,
    layout: Layout,
    models: CacheModel | Sequence[CacheModel],
    *,
    exhaustive_up_to: int = 12,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Exploration:
    """Explore a recording under one model or several (one index, classes merged over models).

    Args:
        journal: the recording; every power cycle in it is explored.
        layout: what a boot can depend on. Its devices must be the recording's.
        models: cache models; what space each one has is said in its class's docstring.
        exhaustive_up_to: every subset of an epoch with at most so many writes at stake. Beyond,
            reachable classes are still found exhaustively where the regions' contents allow it
            (row `classes`), else `samples` random subsets are drawn.
        samples: how many states to draw of an epoch that is too large, and of every class at most
            two are kept as control samples.
        seed: of the samples and of the garbage in torn sectors.
        progress: see `Progress`.

    Raises:
        LayoutMistakeError: a region lies on a device that the recording doesn't have, or beyond it.
        JournalError, BaseImageError: the recording's files can't be read.
    """
    raise NotImplementedError  # the interface stands first; see states
