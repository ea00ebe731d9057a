"""A glimpse at a part of a disk shows what the whole disk shows there, in every crash state."""

from __future__ import annotations

import random

import pytest

from framework.disk import (
    MODELS,
    DeviceSpec,
    DiskError,
    JournalReader,
    Recorder,
    UnreadableSectorError,
    model_from,
)
from framework.disk.glimpse import Glimpses

S = 512
SIZE = 256 * S


@pytest.fixture
def journal(tmp_path):
    """Two power cycles of writes, zeroes, discards and flushes, the first one cut with a tear."""
    from disk_nbd_client import Client

    base = tmp_path / "base.img"
    rng = random.Random(3)
    base.write_bytes(rng.randbytes(SIZE - 16 * S))  # the device is larger than its base
    recorder = Recorder([DeviceSpec("vda", base, SIZE)], tmp_path / "run", prepare_bytes=0)
    with recorder:
        for cycle in range(2):
            endpoint = recorder.endpoint("vda")
            with Client(endpoint.socket, endpoint.export) as client:
                for _ in range(40):
                    first = rng.randrange(240)
                    count = rng.randrange(1, 12)
                    what = rng.random()
                    if what < 0.7:
                        client.write(first * S, rng.randbytes(count * S))
                    elif what < 0.8:
                        client.zero(first * S, count * S)
                    elif what < 0.9:
                        client.flush()
            if cycle == 0:
                recorder.cut(model_from("torn"), 5)
        path = recorder.journal_path
    return JournalReader(path)


def sectors(disk, begin, length):
    found = []
    for at in range(begin, begin + length, S):
        try:
            found.append(disk.read(at, S))
        except UnreadableSectorError:
            found.append(None)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_a_glimpse_equals_the_whole_disk_read_or_exported(journal, tmp_path, name):
    rng = random.Random(name)
    for begin, length in ((0, 8 * S), (100 * S, 40 * S), (230 * S, 26 * S)):
        glimpses = Glimpses(journal, {"vda": (begin, length)})
        for _ in range(10):
            operation = rng.randrange(len(journal.operations) + 1)
            _, cycle = journal.power_cycle_at(operation)
            decision = model_from(name).decide(cycle, rng.randrange(1000))
            (whole,) = journal.disks_of(decision, operation).values()
            (part,) = glimpses.disks(decision, operation).values()
            with whole, part:
                there = sectors(whole, begin, length)
                assert sectors(part, begin, length) == there
                assert part.unreadable(begin, length) == whole.unreadable(begin, length)
                for disk in (part, whole):
                    path = tmp_path / disk.name
                    disk.export(path, begin, length, zero_unreadable=True)
                    assert path.read_bytes() == b"".join(one or bytes(S) for one in there)
                    if None in there:
                        with pytest.raises(UnreadableSectorError):
                            disk.export(path, begin, length)
                        assert not path.exists(), "no half of an export is left"
                assert part.size_bytes == whole.size_bytes


def test_what_is_not_in_the_part_can_not_be_read(journal, tmp_path):
    (part,) = Glimpses(journal, {"vda": (8 * S, 8 * S)}).disks(journal.cuts[0].decision, 3).values()
    with part:
        assert part.read(9 * S + 7, 100) == part.read(9 * S, S)[7:107]
        part.export(tmp_path / "odd", 9 * S + 7, 2 * S)
        assert (tmp_path / "odd").read_bytes() == part.read(9 * S + 7, 2 * S)
        with pytest.raises(DiskError, match="partial view"):
            part.export(tmp_path / "beyond", 7 * S, 2 * S)
        for offset, length in ((0, S), (7 * S, 2 * S), (16 * S - 1, 2), (-S, S)):
            with pytest.raises(DiskError, match="partial view"):
                part.read(offset, length)
