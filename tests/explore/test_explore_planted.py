"""The brute-force comparison is red for every error planted in a copy of the explorer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from explore_reference import Op
from test_explore_brute_force import check

from framework.disk import Emmc, LyingFlush, PrefixCache, SdCard, TornSector, VolatileCache
from framework.explore import DisagreementError, chains, ordered, product, stages, subsets, windows

W = "write"
OVERWRITE = [Op(W, 0, 0, 2, 0x11), Op(W, 0, 0, 2, 0x22), Op("flush", 0), Op(W, 0, 16, 2, 0x11)]
IN_FLIGHT = [Op(W, 0, 0, 2, 0x11, delay=1), Op("flush", 0, delay=1), Op(W, 0, 16, 1, 0x22)]
OVERTAKEN = [Op(W, 0, 0, 2, 0x11, delay=2), Op(W, 0, 16, 1, 0x22), Op(W, 0, 2, 1, 0x22)]
FUA = [Op(W, 0, 16, 1, 0x11), Op(W, 0, 0, 2, 0x22, fua=True), Op(W, 0, 2, 1, 0x22)]
INSTALL = [Op(W, 0, 11, 5, 0x11), Op(W, 0, 10, 1, 0x11), Op(W, 0, 0, 2, 0x22), Op("flush", 0)]


def exact(script, model, **options):
    """As the property test: everything equal."""
    found, mine, truth, classes, sampled, scattered = check(script, model, **options)
    assert not sampled
    if not scattered and not options:
        assert found.counts.states == len(truth)
        assert all(mine[facts].count == count for facts, (count, _) in classes.items())


def no_last_writer(monkeypatch):
    """Every event counts as if its sector still held the durable content."""

    def planted(sector, rank, standing):
        return rank > standing, np.full(len(sector), -1, dtype=np.int64)

    monkeypatch.setattr(chains, "_history", planted)


def flush_covers_in_flight(monkeypatch):
    """A flush covers what had arrived, not what had completed."""

    def planted(cycle, durable, flushes, change):
        if change.row >= 0:
            return np.array([change.row], dtype=np.int64)
        return np.flatnonzero((cycle.op < change.number) & ~durable & ~cycle.rot)

    monkeypatch.setattr(stages, "_newly_durable", planted)


def flushes_of_all_devices(monkeypatch):
    """A flush of one device covers the others."""
    honest = stages._Flushes.take

    def planted(self, change):
        moved = honest(self, change)
        self.threshold[:] = self.threshold.max()
        return moved

    monkeypatch.setattr(stages._Flushes, "take", planted)


def fua_is_nothing(monkeypatch):
    honest = stages._changes
    monkeypatch.setattr(
        stages, "_changes", lambda c, lies: [x for x in honest(c, lies) if x.row < 0]
    )


def arrival_for_application(monkeypatch):
    monkeypatch.setattr(stages, "_insertions", lambda numbers: ())


def no_suffix_tears(monkeypatch):
    honest = ordered._mixes

    def planted(course, units, model, *, reverse):
        return honest(course, units, model, reverse=False)

    monkeypatch.setattr(ordered, "_mixes", planted)


def damage_without_its_neighbours(monkeypatch):
    """A destroyed unit loses only its first block."""
    honest = chains.Destroyer.doom

    def planted(self, position, unit):
        doomed = honest(self, position, unit)
        return dataclasses.replace(doomed, layers=doomed.layers[:1])

    monkeypatch.setattr(chains.Destroyer, "doom", planted)


def every_image_fits(monkeypatch):
    monkeypatch.setattr(
        chains, "images_of", lambda index, region, distances, size: np.zeros(size, np.int64)
    )


def groups_that_do_not_meet(monkeypatch):
    """The product takes writes to one region for independent."""
    honest = product._groups

    def planted(atoms, count):
        return honest([dataclasses.replace(a, identity=False) for a in atoms], count)

    monkeypatch.setattr(product, "_groups", planted)


def first_writer_wins(monkeypatch):
    honest = subsets.evaluate

    def planted(combiner, bits):
        atoms = [dataclasses.replace(a, writers=a.writers[::-1]) for a in combiner.atoms]
        combiner.atoms = atoms
        return honest(combiner, bits)

    monkeypatch.setattr(subsets, "evaluate", planted)


def a_wider_window(monkeypatch):
    honest = windows._Window.__init__

    def planted(self, stage, durable_last, width):
        honest(self, stage, durable_last, width + 1)

    monkeypatch.setattr(windows._Window, "__init__", planted)


PLANTED = [
    (no_last_writer, OVERWRITE, PrefixCache(), {}),
    (flush_covers_in_flight, IN_FLIGHT, VolatileCache(), {}),
    (
        flushes_of_all_devices,
        [Op(W, 1, 0, 1, 0x11), Op("flush", 0), Op(W, 0, 0, 1, 0x22)],
        VolatileCache(),
        {},
    ),
    (fua_is_nothing, FUA, PrefixCache(), {}),
    (arrival_for_application, OVERTAKEN, PrefixCache(), {}),
    (no_suffix_tears, OVERWRITE, TornSector(kinds=("mix",)), {}),
    (damage_without_its_neighbours, OVERWRITE, Emmc(erase_unit=4096), {}),
    (every_image_fits, INSTALL, PrefixCache(), {}),
    (groups_that_do_not_meet, INSTALL + INSTALL, LyingFlush(), {"exhaustive_up_to": 0}),
    (first_writer_wins, OVERWRITE, VolatileCache(), {}),
    (a_wider_window, OVERWRITE + INSTALL, SdCard(window=2), {}),
]


@pytest.mark.parametrize(
    ("plant", "script", "model", "options"), PLANTED, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_planted_error_is_caught(monkeypatch, plant, script, model, options):
    exact(script, model, **options)  # honest, it is green
    plant(monkeypatch)
    with pytest.raises((AssertionError, DisagreementError, IndexError)):
        exact(script, model, **options)
