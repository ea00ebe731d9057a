"""Layouts and what an exploration says: adapters, moments, power cycles, limits, progress."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from explore_reference import SECTORS, Op, S, layout, write_journal

from framework.disk import (
    DeviceSpec,
    JournalReader,
    PrefixCache,
    Recorder,
    VolatileCache,
    WriteThrough,
    build_copy,
)
from framework.explore import (
    GrubStore,
    KnownImage,
    Layout,
    LayoutMistakeError,
    MenderVariables,
    Range,
    RaucGrubVariables,
    RaucUbootVariables,
    Region,
    Role,
    UbootStore,
    explore,
    gpt_region,
)
from framework.explore.layout import EnvironmentReading
from framework.verdict import SlotContent, SlotState, next_boot

SLOTS = {n: SlotState(SlotContent.IMAGE, n) for n in "ab"}


def reading(**variables: str) -> EnvironmentReading:
    return EnvironmentReading((True, True), 0, variables)


@pytest.mark.parametrize(
    ("vocabulary", "variables", "slot"),
    [
        (MenderVariables({"2": "a", "3": "b"}), {"mender_boot_part": "3"}, "b"),
        (MenderVariables({"2": "a", "3": "b"}), {"mender_boot_part": "9"}, "a"),
        (
            MenderVariables({"2": "a", "3": "b"}),
            {"mender_boot_part": "3", "upgrade_available": "1", "bootcount": "1"},
            "a",
        ),
        (RaucUbootVariables({"A": "a", "B": "b"}), {"BOOT_ORDER": "B A"}, "b"),
        (
            RaucUbootVariables({"A": "a", "B": "b"}),
            {"BOOT_ORDER": "B A", "BOOT_B_LEFT": "0", "BOOT_A_LEFT": "3"},
            "a",
        ),
        (
            RaucUbootVariables({"A": "a", "B": "b"}),
            {"BOOT_ORDER": "B A", "BOOT_B_LEFT": "0", "BOOT_A_LEFT": "0"},
            "b",
        ),
        (RaucUbootVariables({"A": "a", "B": "b"}), {"BOOT_ORDER": "junk"}, "a"),
        (
            RaucGrubVariables({"A": "a", "B": "b"}),
            {"ORDER": "B A", "B_OK": "1", "B_TRY": "1", "A_OK": "1", "A_TRY": "0"},
            "a",
        ),
        (RaucGrubVariables({"A": "a", "B": "b"}), {"ORDER": "B A", "B_OK": "1"}, "b"),
    ],
)
def test_what_the_variables_mean_decides_the_slot(vocabulary, variables, slot):
    assert next_boot(vocabulary.reduce(reading(**variables)), SLOTS).slot == slot


def test_a_vocabulary_without_a_valid_copy_leaves_it_to_the_oracle():
    for vocabulary in (
        MenderVariables({"2": "a"}),
        RaucUbootVariables({"A": "a", "B": "b"}),
        RaucGrubVariables({"A": "a"}),
    ):
        found = vocabulary.reduce(EnvironmentReading((False, False), None, {}))
        assert found.valid_copies == 0


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([("x", Range("vda", 0, S)), ("y", Range("vda", 0, S))], "overlap"),
        ([("x", Range("vda", 0, S)), ("x", Range("vda", 4 * S, S))], "two regions are called x"),
        ([("x", Range("vda", 5, S))], "not whole sectors"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(ranges, words):
    with pytest.raises(LayoutMistakeError, match=words):
        Layout(
            tuple(Region(n, Role.DATA, (r,)) for n, r in ranges),
            UbootStore((Range("vdb", 0, S),)),
            MenderVariables({}),
        )


@pytest.mark.parametrize(
    ("where", "words"),
    [(Range("vdz", 0, S), "no device 'vdz'"), (Range("vda", 23 * S, 2 * S), "it ends at")],
)
def test_a_layout_that_does_not_fit_the_recording_is_refused(tmp_path, where, words):
    path, _ = write_journal(tmp_path, [Op("write", 0, 1, 1, 7)])
    bad = Layout((Region("x", Role.DATA, (where,)),), layout().store, layout().vocabulary)
    with pytest.raises(LayoutMistakeError, match=words):
        explore(JournalReader(path), bad, WriteThrough())


MIB = 1 << 20
COPY = 1024


@pytest.fixture
def device(tmp_path: Path):
    """A recorder over an A/B disk with a redundant environment, and the content of two images."""
    rng = random.Random(2)
    old, new = rng.randbytes(16 * S), rng.randbytes(16 * S)
    environment = build_copy({"mender_boot_part": "2"}, COPY, flags=1) * 2
    path = tmp_path / "disk.img"
    path.write_bytes((bytes(64 * S) + environment + old + old).ljust(4 * MIB, b"\0"))
    images = (KnownImage("old", _sha(old), 16 * S), KnownImage("new", _sha(new), 16 * S))
    where = Layout(
        (
            gpt_region("vda", 4 * MIB),
            Region("slot a", Role.SLOT, (Range("vda", 68 * S, 16 * S),), images, magic=None),
            Region("slot b", Role.SLOT, (Range("vda", 84 * S, 16 * S),), images, magic=None),
        ),
        UbootStore((Range("vda", 64 * S, COPY), Range("vda", 66 * S, COPY))),
        MenderVariables({"2": "a", "3": "b"}),
    )
    with Recorder([DeviceSpec("vda", path)], tmp_path / "run") as recorder:
        yield recorder, where, new


def _sha(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def install(recorder, new: bytes, *, sync: bool) -> int:
    """An update over NBD; returns the sequence of the mark that promises the switch."""
    import socket
    import struct

    endpoint = recorder.endpoint("vda")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(endpoint.socket))

        def read(size: int) -> bytes:
            data = b""
            while len(data) < size:
                data += client.recv(size - len(data))
            return data

        read(18)
        client.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 3) + b"vda")
        read(10)

        def ask(kind: int, offset: int = 0, data: bytes = b"") -> None:
            client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, kind, 1, offset, len(data)) + data)
            read(16)

        for at in range(0, len(new), 4 * S):
            ask(1, 84 * S + at, new[at : at + 4 * S])
        if sync:
            ask(3)
        ask(1, 64 * S, build_copy({"mender_boot_part": "3"}, COPY, flags=2))
        ask(3)
        promised = recorder.mark("updater", "switched")
        ask(1, 66 * S, build_copy({"mender_boot_part": "3"}, COPY, flags=3))
        ask(3)
    return promised


def slots_that_would_start(reader, where, found):
    """For every class: the slot that the oracle starts, the fact about it, and the class."""
    result = []
    for one in found.classes:
        with one.representative.disks(reader) as disks:
            boot = where.boot(disks)
        chosen = next_boot(boot, SLOTS).slot
        result.append((chosen, one.fact(f"slot {chosen}"), one))
    return result


def test_an_update_that_syncs_first_never_starts_a_mixed_slot(device):
    recorder, where, new = device
    promised = install(recorder, new, sync=True)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    found = explore(reader, where, [PrefixCache(), VolatileCache()])
    seen = slots_that_would_start(reader, where, found)
    assert all(fact.image in ("old", "new") for _, fact, _ in seen)
    assert {fact.image for _, fact, _ in seen} == {"old", "new"}
    assert any(one.fact("slot b").mixed for _, _, one in seen)
    # Once the switch was promised, no class that starts the old system is possible any more.
    for slot, _, one in seen:
        latest = max(span.last_sequence for span in one.spans)
        assert slot == "b" or latest <= promised
    assert any(slot == "b" and one.spans[0].first_sequence < promised for slot, _, one in seen)


def test_planted_bug_an_update_that_does_not_sync_first_starts_a_mixed_slot(device):
    recorder, where, new = device
    install(recorder, new, sync=False)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    in_order = explore(reader, where, PrefixCache())
    assert all(fact.image for _, fact, _ in slots_that_would_start(reader, where, in_order))
    reordered = explore(reader, where, VolatileCache())
    broken = [one for _, f, one in slots_that_would_start(reader, where, reordered) if f.mixed]
    assert broken
    assert sum(one.count for one in broken) == 2**4 - 2  # but for all and none of the image


def test_every_power_cycle_is_explored_from_the_state_it_began_with(device):
    recorder, where, new = device
    install(recorder, new, sync=True)
    recorder.cut(PrefixCache(keep=0), 1)
    install(recorder, new, sync=True)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    found = explore(reader, where, PrefixCache())
    assert {row.cycle for row in found.coverage} == {0, 1}
    spans = [span for one in found.classes for span in one.spans]
    cut = reader.cuts[0].sequence
    assert any(span.first_sequence >= cut for span in spans)
    assert not any(span.first_sequence < cut < span.last_sequence for span in spans)
    last = max(found.classes, key=lambda one: one.last_operation)
    assert last.fact("slot b").image == "new"


def test_classes_beyond_the_limit_are_counted_and_not_kept(tmp_path):
    script = [Op("write", 0, 16 + i % 7, 1, 1 + i) for i in range(12)]
    path, _ = write_journal(tmp_path, script)
    reader = JournalReader(path)
    everything = explore(reader, layout(), PrefixCache())
    some = explore(reader, layout(), PrefixCache(), max_classes=5)
    assert len(everything.classes) == everything.counts.classes == 13
    assert len(some.classes) == 5
    assert some.counts.states == everything.counts.states == 13
    assert some.counts.unkept + 5 == some.counts.classes == 13
    assert everything.counts.unkept == 0


def test_writes_outside_of_every_region_are_counted(tmp_path):
    path, _ = write_journal(tmp_path, [Op("write", 0, 22, 2, 1), Op("write", 1, 20, 3, 1)])
    found = explore(JournalReader(path), layout(), PrefixCache())
    assert (found.outside.operations, found.outside.sectors) == (2, 4)


def test_progress_may_stop_the_search(tmp_path):
    path, _ = write_journal(tmp_path, [Op("write", 0, i, 1, 1) for i in range(SECTORS)])
    calls = []

    def stop(what: str, states: int, classes: int) -> None:
        calls.append((what, states, classes))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explore(JournalReader(path), layout(), PrefixCache(), progress=stop)
    assert len(calls) == 1


def test_a_single_grubenv_is_a_store_too(tmp_path):
    store = GrubStore((Range("vda", 0, 8 * S),), ("/grub/grubenv",))
    assert [r.name for r in store.regions()] == ["grubenv"]
    path, _ = write_journal(tmp_path, [])
    where = Layout((), store, RaucGrubVariables({"A": "a", "B": "b"}))
    found = explore(JournalReader(path), where, WriteThrough())
    with found.classes[0].representative.disks(JournalReader(path)) as disks:
        assert where.boot(disks).valid_copies == 0  # there is no file system on it
