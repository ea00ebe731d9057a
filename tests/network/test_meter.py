"""How many bytes went through over time: bounded, and never without the last byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from framework.network.meter import FIRST_INTERVAL_NS, MOST_SAMPLES, Meter, Sample

MS = 1_000_000


def test_samples_are_an_interval_apart_and_the_last_one_stands() -> None:
    meter = Meter()
    for at in range(0, 100, 5):
        meter.note(at * MS, 0, at)
    times = [sample.time_ns for sample in meter.samples]
    assert times[0] == 0
    assert times[-1] == 95 * MS
    assert all(b - a >= FIRST_INTERVAL_NS for a, b in zip(times, times[2:], strict=False))
    assert len(times) <= 10


@given(st.lists(st.integers(0, 500), min_size=1, max_size=300))
def test_whatever_comes_the_sums_grow_and_the_last_is_right(pauses_ms: list[int]) -> None:
    meter = Meter()
    now = total = 0
    for pause in pauses_ms:
        now += pause * MS
        total += 10
        meter.note(now, total // 2, total)
    assert meter.samples[-1] == Sample(now, total // 2, total)
    sums = [sample.down_bytes for sample in meter.samples]
    assert sums == sorted(sums)


def test_a_long_run_has_a_bounded_number_of_samples_over_all_of_it() -> None:
    meter = Meter()
    for at in range(10 * MOST_SAMPLES):
        meter.note(at * FIRST_INTERVAL_NS, 0, at)
        assert len(meter.samples) <= MOST_SAMPLES + 1
    first, last = meter.samples[0], meter.samples[-1]
    assert (first.down_bytes, last.down_bytes) == (0, 10 * MOST_SAMPLES - 1)
    assert len(meter.samples) > MOST_SAMPLES // 4
