"""Logs of the kernel's dm-log-writes: a hand-built one, round trips, hostile ones."""

from __future__ import annotations

import random
import struct
import tempfile
from pathlib import Path

import pytest
from explore_reference import SECTORS, Op, S, write_journal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_explore_brute_force import PHASES, operations

from framework.disk import DiskError, JournalReader, Kind, PrefixCache, TornSector, VolatileCache
from framework.disk.dmlogwrites import (
    DISCARD,
    FLUSH,
    FUA,
    MARK,
    METADATA,
    LogWritesError,
    export_log,
    import_log,
    read_log,
)

MAGIC = 0x6A736677736872


def entry(sector: int, count: int, flags: int, data: bytes = b"", *, size: int = S) -> bytes:
    """An entry as the kernel lays it out; a mark's text stands in its own sector."""
    text = data if flags & MARK else b""
    head = struct.pack("<QQQQ", sector, count, flags, len(text)) + text
    return head.ljust(size, b"\0") + (b"" if flags & MARK else data)


def log_of(*entries: bytes, size: int = S, count: int | None = None) -> bytes:
    total = len(entries) if count is None else count
    return struct.pack("<QQQI", MAGIC, 1, total, size).ljust(size, b"\0") + b"".join(entries)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "before.img"
    path.write_bytes(random.Random(3).randbytes(64 * S))
    return path


def imported(tmp_path: Path, base: Path, log: bytes, **options):
    path = tmp_path / "a.log"
    path.write_bytes(log)
    result = import_log(path, base, tmp_path / "a.journal", **options)
    return result, JournalReader(tmp_path / "a.journal", verify_bases=True)


def test_a_log_as_the_kernel_writes_it(tmp_path, base):
    log = log_of(
        entry(2, 2, METADATA, b"c" * 2 * S),
        entry(0, 1, 0, b"a" * S),
        entry(0, 0, FLUSH),
        entry(4, 1, FUA, b"d" * S),
        entry(0, 0, MARK, b"updater-ArtifactCommit"),
        entry(1, 1, FLUSH | FUA, b"e" * S),  # a journal's commit block: flush, then the write
        entry(8, 4, DISCARD),
        entry(5, 1, 0, b"b" * S),
        entry(0, 0, MARK, b"dm-log-writes-end"),
    )
    result, reader = imported(tmp_path, base, log)
    assert (result.entries, result.operations, result.marks, result.problem) == (9, 8, 2, None)
    assert [Kind(k).name for k in reader.operations.kind] == [
        "WRITE", "WRITE", "FLUSH", "WRITE", "FLUSH", "WRITE", "DISCARD", "WRITE",
    ]  # fmt: skip
    assert [(m.source, m.text, m.after_operation) for m in reader.marks] == [
        ("dm-log-writes", "updater-ArtifactCommit", 4),
        ("dm-log-writes", "dm-log-writes-end", 8),
    ]
    expected = bytearray(base.read_bytes())
    expected[: 6 * S] = b"a" * S + b"e" * S + b"c" * 2 * S + b"d" * S + b"b" * S
    expected[8 * S : 12 * S] = bytes(4 * S)
    with reader.final() as disk:
        assert disk.read(0, 64 * S) == expected
    _, cycle = reader.power_cycle_at(8)
    assert [int(r) + 1 for r in cycle.open_rows()] == [7, 8]  # all else is flushed or FUA
    _, cycle = reader.power_cycle_at(4)
    assert len(cycle.open_rows()) == 0


def test_sectors_of_4096_bytes_count_in_their_own_size(tmp_path, base):
    log = log_of(entry(1, 2, 0, b"x" * 8192, size=4096), size=4096)
    _, reader = imported(tmp_path, base, log)
    with reader.final() as disk:
        assert disk.read(4096, 8192) == b"x" * 8192


def test_the_order_of_the_kernels_own_example_comes_out(tmp_path):
    """Wa,Wb,Wc,Cc,Ca,FLUSH,FUAd,Cb,CFLUSH,CFUAd: logged are c and a, the flush, d, and b last."""
    from framework.disk.journal import (
        BaseIdentity,
        DeviceHeader,
        Flag,
        JournalHeader,
        JournalWriter,
    )

    base = tmp_path / "base.img"
    base.write_bytes(bytes(16 * S))
    identity = BaseIdentity(base, 16 * S, "")
    header = JournalHeader((DeviceHeader("vda", 16 * S, identity),), "1970-01-01T00:00", 0)
    writer = JournalWriter(tmp_path / "disk.journal", header)

    def write(number: int, letter: bytes, flags: int = 0) -> None:
        writer.append(Kind.WRITE, device=0, operation=number, offset=number * S, length=S,
                      payload=letter * S, flags=flags)  # fmt: skip

    for number, letter in enumerate((b"a", b"b", b"c"), 1):
        write(number, letter)
    for number in (3, 1):
        writer.append(Kind.COMPLETE, operation=number)
    writer.append(Kind.FLUSH, device=0, operation=4)
    write(5, b"d", Flag.FUA)
    for number in (2, 4, 5):
        writer.append(Kind.COMPLETE, operation=number)
    writer.append(Kind.CLOSE)
    writer.close()
    reader = JournalReader(tmp_path / "disk.journal")
    export_log(reader, "vda", tmp_path / "out.log")
    order = [(e.offset // S, e.flags) for e in read_log(tmp_path / "out.log")]
    assert order == [(3, 0), (1, 0), (0, FLUSH), (5, FUA), (2, 0), (0, MARK)]


scripts = st.lists(operations(delays=(0, 0, 1, 2, 3), fua=(False, False, True)), max_size=8)


@settings(max_examples=40, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(script=scripts)
def test_what_is_exported_imports_to_the_same_disk(script):
    """But for FUA writes over unflushed ones, which the kernel's order turns round: not made."""
    touched: set[int] = set()
    for op in script:
        sectors = {op.device * 100 + op.first + i for i in range(op.count)}
        if op.kind != "flush" and touched & sectors:
            return  # the log's order is another where completions overlap
        touched |= sectors if op.kind != "flush" else set()
    with tempfile.TemporaryDirectory(prefix="brownout-test-") as name:
        folder = Path(name)
        path, _ = write_journal(folder, script)
        reader = JournalReader(path)
        for device in reader.devices:
            log, journal = folder / f"{device}.log", folder / f"{device}.journal"
            count = export_log(reader, device, log)
            assert count == len(list(read_log(log)))
            import_log(log, reader.base_paths[device], journal, device=device)
            with JournalReader(journal).final() as mine, reader.final(device) as truth:
                assert mine.read(0, SECTORS * S) == truth.read(0, SECTORS * S)


@settings(max_examples=40, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@given(
    script=st.lists(operations(delays=(0, 1, None)), max_size=7),
    model=st.sampled_from([PrefixCache(), VolatileCache(), TornSector(kinds=("mix", "garbage"))]),
    seed=st.integers(0, 99),
)
def test_an_exported_crash_state_is_that_state(script, model, seed):
    with tempfile.TemporaryDirectory(prefix="brownout-test-") as name:
        folder = Path(name)
        path, written = write_journal(folder, script)
        reader = JournalReader(path)
        until = len(written)
        _, cycle = reader.power_cycle_at(until)
        decision = model.decide(cycle, seed)
        truth = reader.states_at(until, model, seed)
        for device in reader.devices:
            log, journal = folder / f"{device}.log", folder / f"{device}.journal"
            export_log(reader, device, log, until=until, decision=decision)
            import_log(log, reader.base_paths[device], journal, device=device)
            with JournalReader(journal).final() as mine, truth[device] as disk:
                assert mine.read(0, SECTORS * S) == disk.read(0, SECTORS * S)


GOOD = log_of(entry(2, 2, 0, b"c" * 2 * S), entry(0, 0, FLUSH), entry(0, 0, MARK, b"text"))


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b"", "too few"),
        (b"\0" * 4096, "no superblock"),
        (struct.pack("<QQQI", MAGIC, 2, 0, 512).ljust(S, b"\0"), "version 2"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 100).ljust(S, b"\0"), "sector size 100"),
        (log_of(count=5), "entry 1 of 5 is torn"),
        (log_of(entry(0, 1 << 60, 0)), "sectors at sector"),
        (log_of(entry(0, 1 << 20, 0)), "bytes of data"),
        (log_of(entry(0, 1, 64, b"x" * S)), "unknown flags 0x40"),
        (log_of(entry(63, 2, 0, b"x" * 2 * S)), "beyond the device's end"),
        (log_of(entry(1 << 50, 4, DISCARD)), "beyond the device's end"),
        (log_of(struct.pack("<QQQQ", 0, 0, MARK, 4096).ljust(S, b"\0")), "a mark of 4096 bytes"),
    ],
)
def test_a_bad_log_is_one_clear_line_and_leaves_no_journal(tmp_path, base, log, words):
    with pytest.raises(LogWritesError, match=words) as error:
        imported(tmp_path, base, log)
    assert "\n" not in str(error.value)
    assert "a.log" in str(error.value)
    assert not (tmp_path / "a.journal").exists()


def test_what_stands_before_the_damage_can_be_had(tmp_path, base):
    result, reader = imported(
        tmp_path, base, log_of(entry(0, 1, 0, b"a" * S), count=2), strict=False
    )
    assert result.operations == 1
    assert "entry 2 of 2 is torn" in (result.problem or "")
    with reader.final() as disk:
        assert disk.read(0, S) == b"a" * S


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_log_fails_otherwise_than_with_a_disk_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    spoiled = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        spoiled[data.draw(st.integers(0, len(spoiled) - 1))] = data.draw(st.integers(0, 255))
    spoiled = spoiled[: data.draw(st.integers(0, len(spoiled)))]
    base = folder / "base.img"
    base.write_bytes(bytes(64 * S))
    (folder / "x.log").write_bytes(bytes(spoiled))
    try:
        import_log(folder / "x.log", base, folder / "x.journal")
    except DiskError:
        assert not (folder / "x.journal").exists()


def test_a_missing_log_or_base_is_one_clear_line(tmp_path, base):
    with pytest.raises(LogWritesError, match="No such file"):
        import_log(tmp_path / "none", base, tmp_path / "x.journal")
    (tmp_path / "a.log").write_bytes(GOOD)
    with pytest.raises(DiskError, match="No such file"):
        import_log(tmp_path / "a.log", tmp_path / "none", tmp_path / "x.journal")


def test_an_operation_that_was_in_flight_is_not_in_the_log(tmp_path):
    path, _ = write_journal(
        tmp_path, [Op("write", 0, 1, 1, 7, delay=None), Op("write", 0, 2, 1, 8)]
    )
    export_log(JournalReader(path), "vda", tmp_path / "out.log")
    assert [e.offset // S for e in read_log(tmp_path / "out.log") if not e.flags] == [2]
