"""Power cuts: every state that a model leaves can be explained, and replays bit for bit."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path

import pytest
from disk_nbd_client import DISC, FLUSH, FUA, TRIM, WRITE, ZEROES, Client, NbdError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import framework.disk.state as state_module
from framework.disk import (
    MODELS,
    DeviceSpec,
    DiskError,
    Emmc,
    JournalReader,
    LooseDiscard,
    LyingFlush,
    PrefixCache,
    Recorder,
    SdCard,
    TornPage,
    TornSector,
    Trigger,
    UnreadableSectorError,
    VolatileCache,
    WriteThrough,
    model_from,
)

S = 512
SECTORS = 24
DEVICES = ("vda", "vdb")


class Reference:
    """What can be on a device after a cut, by plain bookkeeping: written without the recorder.

    For every sector the contents that it may have: the durable one, and those of later writes.
    """

    def __init__(self, content: bytes) -> None:
        self.live = [content[i * S : (i + 1) * S] for i in range(SECTORS)]
        self.history = [[sector] for sector in self.live]  # [0] is durable
        self.since_power_on = [[sector] for sector in self.live]

    def write(self, first: int, data: bytes, *, durable: bool) -> None:
        for i in range(len(data) // S):
            sector = data[i * S : (i + 1) * S]
            self.live[first + i] = sector
            self.since_power_on[first + i].append(sector)
            if durable:
                self.history[first + i] = [sector]
            else:
                self.history[first + i].append(sector)

    def flush(self) -> None:
        self.history = [[sector] for sector in self.live]

    def explains(self, content: list[bytes | None], model) -> bool:
        if isinstance(model, WriteThrough):
            return content == self.live
        if isinstance(model, LyingFlush):
            pairs = zip(content, self.since_power_on, strict=True)
            return all(c in allowed for c, allowed in pairs)
        if isinstance(model, LooseDiscard):
            pairs = zip(content, self.since_power_on, strict=True)
            return all(c in allowed or (c is not None and len(set(c)) > 99) for c, allowed in pairs)
        odd = [
            i
            for i, (c, allowed) in enumerate(zip(content, self.history, strict=True))
            if c not in allowed
        ]
        if not isinstance(model, TornSector | Emmc):
            return not odd
        if isinstance(model, Emmc) and any(content[i] != bytes(S) for i in odd):
            return False
        unit = (model.erase_unit if isinstance(model, Emmc) else model.granularity) // S
        return not odd or (odd[0] // unit == odd[-1] // unit and self.at_stake())

    def at_stake(self) -> bool:
        return any(len(h) > 1 for h in self.history)

    def power_on(self, content: list[bytes | None]) -> None:
        self.live = list(content)
        self.history = [[c] for c in content]
        self.since_power_on = [[c] for c in content]


models = st.one_of(
    st.just(WriteThrough()),
    st.builds(PrefixCache),
    st.builds(VolatileCache, keep=st.sampled_from([0.0, 0.3, 0.7])),
    st.builds(
        TornSector,
        granularity=st.sampled_from([512, 4096]),
        kinds=st.sampled_from([("mix",), ("garbage",), ("unreadable",), ("mix", "garbage")]),
    ),
    st.builds(LyingFlush, flushes=st.sampled_from([None])),
    st.builds(TornPage, kinds=st.sampled_from([("garbage",), ("unreadable",)])),
    st.builds(SdCard, window=st.sampled_from([1, 3, 8])),
    st.builds(Emmc, erase_unit=st.sampled_from([1024, 4096]), reliable=st.booleans()),
    st.builds(LooseDiscard),
)
ranges = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 10)).map(
    lambda p: (p[0], min(p[1], SECTORS - p[0]))
)
device = st.sampled_from(DEVICES)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), device, ranges, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("fua"), device, ranges, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("flush"), device),
        st.tuples(st.just("discard"), device, ranges),
        st.tuples(st.just("zero"), device, ranges),
        st.tuples(st.just("cut"), models, st.integers(0, 1 << 32)),
    ),
    max_size=40,
)


def content_of(disk) -> list[bytes | None]:
    content: list[bytes | None] = []
    for i in range(SECTORS):
        try:
            content.append(disk.read(i * S, S))
        except UnreadableSectorError:
            content.append(None)
    return content


def play(recorder, script, references, check):
    """Run a script against the recorder and the references; returns each cut's contents."""
    clients: dict[str, Client] = {}

    def client(name: str) -> Client:
        if name not in clients:
            endpoint = recorder.endpoint(name)
            clients[name] = Client(endpoint.socket, name)
        return clients[name]

    cuts = []
    try:
        for step in script:
            if step[0] == "cut":
                recorder.cut(step[1], step[2])
                for old in clients.values():
                    old.close()
                clients.clear()
                contents = {}
                for name in DEVICES:
                    with recorder.disk(name) as disk:
                        contents[name] = content_of(disk)
                check(step[1], contents, references)
                for name in DEVICES:
                    references[name].power_on(contents[name])
                cuts.append(contents)
                continue
            name = step[1]
            reference = references[name]
            if step[0] == "flush":
                client(name).flush()
                reference.flush()
                continue
            first, count = step[2]
            if step[0] in ("write", "fua"):
                data = (step[3] * (count * S))[: count * S]
                client(name).write(first * S, data, fua=step[0] == "fua")
                reference.write(first, data, durable=step[0] == "fua")
            else:
                call = client(name).discard if step[0] == "discard" else client(name).zero
                call(first * S, count * S)
                reference.write(first, bytes(count * S), durable=False)
        for name in DEVICES:  # reads through the wire, sector by sector
            for i in range(SECTORS):
                try:
                    assert client(name).read(i * S, S) == references[name].live[i]
                except NbdError as error:
                    assert error.code == 5
                    assert references[name].live[i] is None
    finally:
        for old in clients.values():
            old.close()
    return cuts


def check_explained(model, contents, references):
    torn_devices = 0
    for name in DEVICES:
        reference = references[name]
        assert reference.explains(contents[name], model), f"{name} under {model}"
        pairs = zip(contents[name], reference.history, strict=True)
        torn_devices += any(c not in allowed for c, allowed in pairs)
    if isinstance(model, TornSector):
        assert torn_devices <= 1  # one write is torn, of all devices


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(script=steps)
def test_every_state_is_explainable_and_replays_bit_for_bit(script):
    with tempfile.TemporaryDirectory(prefix="brownout-test-") as folder:
        image = Path(folder) / "base.img"
        image.write_bytes(random.Random(5).randbytes(SECTORS * S))
        references = {name: Reference(image.read_bytes()) for name in DEVICES}
        specs = [DeviceSpec(name, image) for name in DEVICES]
        with Recorder(specs, Path(folder) / "run") as recorder:
            cuts = play(recorder, script, references, check_explained)
        reader = JournalReader(recorder.journal_path, verify_bases=True)
        assert reader.torn_at is None
        assert reader.closed_cleanly
        for index, contents in enumerate(cuts):
            cut = reader.cuts[index]
            for name in DEVICES:
                with reader.after_cut(index, name) as disk:
                    assert content_of(disk) == contents[name]
                model = model_from(cut.model, cut.parameters)
                if index == len(cuts) - 1 or cut.operation < reader.cuts[index + 1].operation:
                    last_of_cycle = reader.cycle_of(cut.operation) == index
                    if last_of_cycle:  # deciding anew from model and seed gives the same
                        with reader.state_at(cut.operation, model, cut.seed, name) as disk:
                            assert content_of(disk) == contents[name]
        for name in DEVICES:
            with reader.final(name) as disk:
                assert content_of(disk) == references[name].live


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(script=steps.filter(lambda s: all(x[0] != "cut" for x in s)))
def test_the_state_at_any_operation_is_the_prefix_of_what_was_sent(script):
    with tempfile.TemporaryDirectory(prefix="brownout-test-") as folder:
        image = Path(folder) / "base.img"
        image.write_bytes(random.Random(6).randbytes(SECTORS * S))
        references = {name: Reference(image.read_bytes()) for name in DEVICES}
        specs = [DeviceSpec(name, image) for name in DEVICES]
        with Recorder(specs, Path(folder) / "run") as recorder:
            play(recorder, script, references, check_explained)
        reader = JournalReader(recorder.journal_path)
        replay = {name: Reference(image.read_bytes()) for name in DEVICES}
        for number in range(len(script) + 1):
            if number:
                step = script[number - 1]
                if step[0] != "flush":
                    first, count = step[2]
                    data = bytes(count * S)
                    if step[0] in ("write", "fua"):
                        data = (step[3] * (count * S))[: count * S]
                    replay[step[1]].write(first, data, durable=False)
            for name in DEVICES:
                with reader.state_at(number, device=name) as disk:
                    assert content_of(disk) == replay[name].live


def prepared(recorder, connect) -> None:
    """Two durable writes, then six open ones: of one sector each, then one of sixteen."""
    client = connect()
    client.write(0, b"D" * S)
    client.write(S, b"D" * S)
    client.flush()
    for i in range(5):
        client.write((10 + i) * S, bytes([0x61 + i]) * S)
    client.write(64 * S, b"T" * 16 * S)


def test_prefixes_of_every_length(recorder, connect, base):
    original = base.read_bytes()
    prepared(recorder, connect)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    for keep in range(7):
        with reader.state_at(9, PrefixCache(keep=keep)) as disk:
            assert disk.read(0, 2 * S) == b"D" * 2 * S
            for i in range(5):
                new = disk.read((10 + i) * S, S) == bytes([0x61 + i]) * S
                assert new == (i < keep)
            assert (disk.read(64 * S, 16 * S) == b"T" * 16 * S) == (keep > 5)
            assert disk.read(80 * S, S) == original[80 * S : 81 * S]


def test_seeds_reach_every_prefix_and_many_subsets(recorder, connect):
    prepared(recorder, connect)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    _, cycle = reader.power_cycle_at(9)
    prefixes = {PrefixCache().decide(cycle, seed).dropped for seed in range(200)}
    subsets = {VolatileCache().decide(cycle, seed).dropped for seed in range(2000)}
    assert len(prefixes) == 7
    assert len(subsets) == 64
    assert VolatileCache(1.0).decide(cycle, 1).dropped == ()
    assert len(VolatileCache(0.0).decide(cycle, 1).dropped) == 6
    assert len(LyingFlush(keep=0.0).decide(cycle, 1).dropped) == 8
    assert len(LyingFlush(flushes=0, keep=0.0).decide(cycle, 1).dropped) == 6
    assert len(LyingFlush(flushes=1, keep=0.0).decide(cycle, 1).dropped) == 8


def test_tears_come_in_all_shapes_and_kinds(recorder, connect, base):
    original = base.read_bytes()[64 * S : 80 * S]
    prepared(recorder, connect)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    shapes, kinds = set(), set()
    for seed in range(400):
        with reader.state_at(9, TornSector(newest=True), seed) as disk:
            shape = ""
            for i in range(16):
                try:
                    data = disk.read((64 + i) * S, S)
                except UnreadableSectorError:
                    shape += "U"
                    continue
                if data == b"T" * S:
                    shape += "n"
                elif data == original[i * S : (i + 1) * S]:
                    shape += "o"
                else:
                    shape += "G"
            assert shape.count("U") + shape.count("G") <= 1
            shapes.add(shape)
            kinds |= set(shape)
            for i in range(5):  # what came before the torn one is whole
                assert disk.read((10 + i) * S, S) == bytes([0x61 + i]) * S
    assert kinds == set("noUG")
    assert {"n" * 8 + "o" * 8, "o" * 8 + "n" * 8} & shapes
    assert len(shapes) > 100


def test_a_4096_byte_unit_is_torn_as_one_and_takes_its_neighbours(recorder, connect, base):
    client = connect()
    client.write(9 * S, b"x" * S)  # one sector of the unit of sectors 8 to 15
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    garbled = TornSector(granularity=4096, kinds=("garbage",))
    with reader.state_at(1, garbled, 3) as disk:
        original = base.read_bytes()
        assert disk.read(0, 8 * S) == original[: 8 * S]
        assert disk.read(16 * S, 8 * S) == original[16 * S : 24 * S]
        assert all(disk.read(i * S, S) != original[i * S : (i + 1) * S] for i in range(8, 16))
    unreadable = TornSector(granularity=4096, kinds=("unreadable",))
    with reader.state_at(1, unreadable, 3) as disk:
        assert disk.unreadable() == [(4096, 4096)]
        assert disk.unreadable(0, 4096) == []


def test_an_unreadable_sector_is_eio_until_it_is_rewritten(recorder, connect, tmp_path):
    client = connect()
    client.write(0, b"x" * S)
    recorder.cut(TornSector(kinds=("unreadable",)), seed=1)
    client = connect()
    with pytest.raises(NbdError) as error:
        client.read(0, 4096)
    assert error.value.code == 5
    with recorder.disk("vda") as disk:
        with pytest.raises(UnreadableSectorError, match="offset 0"):
            disk.export(tmp_path / "out.img")
        assert not (tmp_path / "out.img").exists()
        disk.export(tmp_path / "out.img", zero_unreadable=True)
        assert (tmp_path / "out.img").read_bytes()[:S] == bytes(S)
    recorder.cut(WriteThrough())  # it lasts over a further cut
    client = connect()
    with pytest.raises(NbdError):
        client.read(0, S)
    client.write(0, b"y" * S)
    assert client.read(0, S) == b"y" * S


def test_fua_is_durable_on_completion_and_flushes_are_per_device(recorder, connect, base):
    original = base.read_bytes()
    a, b = connect("vda"), connect("vdb")
    a.write(0, b"a" * S)
    a.write(S, b"f" * S, fua=True)
    b.write(0, b"b" * S)
    b.flush()
    recorder.cut(VolatileCache(0.0))
    a, b = connect("vda"), connect("vdb")
    assert a.read(0, 2 * S) == original[:S] + b"f" * S
    assert b.read(0, S) == b"b" * S


def pipelined_write_and_flush(recorder, connect) -> None:
    """The client sends a flush while its write is in flight, as a queue-depth-2 guest may."""
    client = connect()
    w, write = client.packed(WRITE, 0, b"w" * 4096)
    f, flush = client.packed(FLUSH)
    client.sock.sendall(write + flush)
    client.wait(w)
    client.wait(f)


def test_a_flush_sent_while_a_write_is_in_flight_does_not_cover_it(recorder, connect, base):
    pipelined_write_and_flush(recorder, connect)
    recorder.cut(VolatileCache(0.0))
    assert connect().read(0, 4096) == base.read_bytes()[:4096]


def test_planted_bug_a_log_at_completion_hides_that(recorder, connect, monkeypatch):
    """What blklogwrites does wrong; were our coverage so, the test above would be red."""

    def by_completion(operations, devices, *, ignore_last=0):
        threshold = state_module.np.zeros(devices, dtype=state_module.np.int64)
        flushes = operations.kind == state_module.Kind.FLUSH
        for index in range(devices):
            done = operations.completed[flushes & (operations.device == index)]
            threshold[index] = done.max(initial=0)
        return threshold

    monkeypatch.setattr(state_module, "coverage", by_completion)
    pipelined_write_and_flush(recorder, connect)
    recorder.cut(VolatileCache(0.0))
    assert connect().read(0, 4096) == b"w" * 4096  # hidden: looks durable, and is not


@pytest.mark.parametrize(
    "spoil",
    [
        lambda decision, cycle: (),  # keeps all, whatever was decided
        lambda decision, cycle: tuple(range(1, len(cycle.operations) + 1)),  # drops durable ones
    ],
    ids=["keeps-all", "drops-durable"],
)
def test_planted_bug_a_model_that_decides_wrongly_is_caught_by_the_reference(
    tmp_path, monkeypatch, spoil
):
    image = tmp_path / "base.img"
    image.write_bytes(random.Random(5).randbytes(SECTORS * S))
    honest = PrefixCache.decide

    def planted(self, cycle, seed):
        return dataclasses.replace(
            honest(self, cycle, seed), dropped=spoil(honest(self, cycle, seed), cycle)
        )

    monkeypatch.setattr(PrefixCache, "decide", planted)
    references = {name: Reference(image.read_bytes()) for name in DEVICES}

    def exact(model, contents, references):
        """An empty prefix leaves exactly the durable content."""
        for name in DEVICES:
            assert contents[name] == [h[0] for h in references[name].history]

    script = [
        ("write", "vda", (0, 2), b"one"),
        ("flush", "vda"),
        ("write", "vda", (4, 2), b"two"),
        ("cut", PrefixCache(keep=0), 0),
    ]
    specs = [DeviceSpec(n, image) for n in DEVICES]
    with Recorder(specs, tmp_path / "run") as recorder, pytest.raises(AssertionError):
        play(recorder, script, references, exact)


def test_many_power_cycles_live_in_one_journal(recorder, connect):
    contents = []
    for cycle in range(12):
        client = connect()
        for i in range(6):
            client.write((cycle + i) * S, bytes([cycle * 6 + i + 1]) * S)
            if i == 2:
                client.flush()
        model = list(MODELS.values())[cycle % len(MODELS)]()
        record = recorder.cut(model, seed=cycle)
        assert record.index == cycle
        assert recorder.power_cycle == cycle + 1
        with recorder.disk("vda") as disk:
            contents.append(content_of(disk))
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    assert [c.operation for c in reader.cuts] == [7 * (i + 1) for i in range(12)]
    for cycle in reversed(range(12)):
        with reader.after_cut(cycle) as disk:
            assert content_of(disk) == contents[cycle]
    assert reader.operations.cycle.tolist() == [c for c in range(12) for _ in range(7)]


def test_a_cut_without_a_freeze_carries_out_what_had_arrived(recorder, connect):
    client = connect()
    for i in range(50):
        client.send(WRITE, i * S, bytes([i + 1]) * S)
    client.send(DISC)
    client.sock.settimeout(5)
    for _ in range(50):
        client.next_reply()
    record = recorder.cut()
    assert record.operation == 50
    with recorder.disk("vda") as disk:
        assert [disk.read(i * S, 1)[0] for i in range(50)] == list(range(1, 51))


def test_arms_and_faults_end_with_the_power(recorder, connect):
    armed = recorder.arm(Trigger.operation(1))
    recorder.cut()
    connect().write(0, b"x" * S)
    assert not armed.fired.is_set()


def test_models_come_from_names_and_bad_ones_are_refused():
    for name in MODELS:
        model = model_from(name)
        assert model_from(name, model.parameters()) == model
    for bad in (
        lambda: model_from("magic"),
        lambda: model_from("prefix", {"kept": 1}),
        lambda: VolatileCache(keep=1.5),
        lambda: TornSector(granularity=100),
        lambda: TornSector(kinds=("worse",)),
        lambda: SdCard(window=0),
        lambda: Emmc(erase_unit=1000),
        lambda: Emmc(erased=7),
    ):
        with pytest.raises(DiskError):
            bad()


def test_unflushed_discards_and_zeroes_are_at_stake_too(recorder, connect, base):
    client = connect()
    client.wait(client.send(TRIM, 0, length=4096))
    client.wait(client.send(ZEROES, 4096, length=4096))
    client.wait(client.send(ZEROES, 8192, length=4096, flags=FUA))
    assert client.read(0, 12288) == bytes(12288)
    recorder.cut(VolatileCache(0.0))
    assert connect().read(0, 12288) == base.read_bytes()[:8192] + bytes(4096)


def test_a_card_loses_of_its_newest_operations_only(recorder, connect, base):
    original = base.read_bytes()
    client = connect()
    for i in range(8):
        client.write(i * S, bytes([0x61 + i]) * S)
    recorder.cut(SdCard(window=3, keep=0.0))
    written = b"".join(bytes([0x61 + i]) * S for i in range(5))
    assert connect().read(0, 8 * S) == written + original[5 * S : 8 * S]


def test_an_interrupted_write_can_wipe_an_erase_unit_and_a_reliable_one_cannot(
    recorder, connect, base
):
    client = connect()
    client.write(9 * S, b"x" * S)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    contents = set()
    for seed in range(40):
        with reader.state_at(1, Emmc(erase_unit=4096), seed) as disk:
            contents.add(disk.read(8 * S, 8 * S))
        with reader.state_at(1, Emmc(erase_unit=4096, reliable=True), seed) as disk:
            assert disk.read(8 * S, 8 * S) != bytes(4096)
            assert disk.read(16 * S, S) == base.read_bytes()[16 * S : 17 * S]
    old = base.read_bytes()[8 * S : 16 * S]
    assert contents == {old, old[:S] + b"x" * S + old[2 * S :], bytes(4096)}
    with reader.state_at(1, Emmc(erase_unit=4096, erased=255), 1) as disk:
        assert disk.read(8 * S, S) in (old[:S], b"\xff" * S)


def test_a_discarded_range_reads_as_before_as_zeros_or_as_anything(recorder, connect, base):
    original = base.read_bytes()
    client = connect()
    client.wait(client.send(TRIM, 0, length=64 * S))
    client.flush()  # durable, and yet not determined
    client.write(2 * S, b"w" * S)
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    seen = set()
    for seed in range(30):
        with reader.state_at(3, LooseDiscard(), seed) as disk:
            assert disk.read(2 * S, S) == b"w" * S  # what was rewritten is safe
            rest = disk.read(0, 2 * S) + disk.read(3 * S, 61 * S)
            if rest == bytes(63 * S):
                seen.add("zeros")
            elif rest == original[: 2 * S] + original[3 * S : 64 * S]:
                seen.add("old")
            else:
                assert rest[16 * S :][: 8 * S] == rest[24 * S :][: 8 * S]  # a pattern
                seen.add("garbage")
    assert seen == {"old", "zeros", "garbage"}


def test_an_erased_unit_costs_the_journal_no_bytes(recorder, connect):
    connect().write(0, b"x" * S)
    before = recorder.journal_path.stat().st_size
    for seed in range(20):
        record = recorder.cut(Emmc(erase_unit=1 << 20), seed)
        if record.decision.garbage:
            break
        connect().write(0, b"x" * S)
    else:
        pytest.fail("no seed wiped the unit")
    with recorder.disk("vda") as disk:
        assert disk.read(0, 1 << 20) == bytes(1 << 20)
    recorder.close()
    assert recorder.journal_path.stat().st_size - before < 1 << 20
    with JournalReader(recorder.journal_path).after_cut(record.index) as disk:
        assert disk.read(0, 1 << 20) == bytes(1 << 20)
