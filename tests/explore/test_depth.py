"""Disks that begin with a crash state: served, recorded and cut again, bit for bit."""

from __future__ import annotations

import random

import pytest
import tiny_ab
from disk_nbd_client import Client, NbdError

from framework.disk import (
    MODELS,
    DeviceSpec,
    JournalReader,
    PrefixCache,
    Recorder,
    StartState,
    TornSector,
    model_from,
)

S = 512


@pytest.fixture
def journal(tmp_path):
    return JournalReader(tiny_ab.run(tmp_path))


def serve(journal, disks, directory):
    specs = [DeviceSpec(name, disk.base_path, disk.size_bytes, "-") for name, disk in disks.items()]
    begin = StartState.of(disks)
    return Recorder(specs, directory, prepare_bytes=0, begin=begin), begin


def read_all(disk) -> bytes:
    return disk.read(0, disk.size_bytes)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_machine_reads_the_crash_state_that_it_begins_with(tmp_path, journal, name):
    rng = random.Random(name)
    for round_ in range(4):
        operation = rng.randrange(1, len(journal.operations))
        with journal.state_at(operation, model_from(name), seed=round_) as disk:
            if disk.unreadable():
                continue
            recorder, _ = serve(journal, {"vda": disk}, tmp_path / f"{name}-{round_}")
            with recorder:
                endpoint = recorder.endpoint("vda")
                with Client(endpoint.socket, endpoint.export) as client:
                    assert client.read(0, disk.size_bytes) == read_all(disk)


def test_what_a_tear_made_unreadable_is_an_error_until_it_is_written(tmp_path, journal):
    model = TornSector(kinds=("unreadable",), newest=True)
    rows = [n for n in range(1, len(journal.operations)) if _open(journal, n)]
    with journal.state_at(rows[-1], model, seed=1) as disk:
        hole, length = disk.unreadable()[0]
        recorder, begin = serve(journal, {"vda": disk}, tmp_path / "hole")
        with recorder:
            endpoint = recorder.endpoint("vda")
            with Client(endpoint.socket, endpoint.export) as client:
                with pytest.raises(NbdError, match="EIO"):
                    client.read(hole, length)
                client.write(hole, b"x" * length)
                assert client.read(hole, length) == b"x" * length
                client.flush()  # what arrives later finds the completion in the journal
            reader = JournalReader(recorder.journal_path, begin=begin)
            with reader.state_at(0) as before, reader.final() as after:
                assert before.unreadable() == disk.unreadable()
                assert after.read(hole, length) == b"x" * length


def _open(journal, operation) -> int:
    return len(journal.power_cycle_at(operation)[1].open_rows())


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_during_the_recovery_from_a_cut_is_explained_by_both_journals(
    tmp_path, journal, seed
):
    """The second journal's states equal a plain overlay of its writes on the first state."""
    rng = random.Random(seed)
    operation = rng.randrange(1, len(journal.operations))
    with journal.state_at(operation, PrefixCache(), seed=seed) as disk:
        content = bytearray(read_all(disk))
        recorder, begin = serve(journal, {"vda": disk}, tmp_path / "recovery")
        states = [bytes(content)]
        with recorder:
            endpoint = recorder.endpoint("vda")
            with Client(endpoint.socket, endpoint.export) as client:
                for _ in range(20):
                    at = rng.randrange(len(content) // S - 8) * S
                    data = rng.randbytes(rng.randrange(1, 8) * S)
                    client.write(at, data)
                    content[at : at + len(data)] = data
                    states.append(bytes(content))
                client.flush()  # what arrives later finds the last completion in the journal
            reader = JournalReader(recorder.journal_path, begin=begin)
            for number, wanted in enumerate(states):
                with reader.state_at(number) as found:
                    assert read_all(found) == wanted
            # A torn cut in the recovery has garbage of its own over the first state's.
            with reader.state_at(20, TornSector(kinds=("garbage",), newest=True), seed) as torn:
                differing = [
                    i
                    for i in range(len(content) // S)
                    if torn.read(i * S, S) != states[-1][i * S : i * S + S]
                ]
            assert 0 < len(differing) <= 8
