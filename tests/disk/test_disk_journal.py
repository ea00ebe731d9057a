"""The journal: torn tails, damage, a killed harness, wrong files."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from disk_nbd_client import WRITE, Client, GoneError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.disk import (
    BaseImageError,
    DeviceSpec,
    DiskError,
    JournalError,
    JournalReader,
    Recorder,
    RecorderError,
    TornSector,
    VolatileCache,
)
from framework.disk.journal import RECORD_SIZE, Kind, ScanEnd, parse_header, scan

S = 512


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A journal with everything in it; its path and its records."""
    folder = tmp_path_factory.mktemp("journal")
    image = folder / "base.img"
    image.write_bytes(random.Random(9).randbytes(64 * S))
    with Recorder([DeviceSpec("vda", image)], folder / "run") as rec:
        for cycle in range(3):
            endpoint = rec.endpoint("vda")
            with Client(endpoint.socket, "vda") as client:
                for i in range(6):
                    client.write((cycle + i) * S, bytes([cycle * 6 + i + 1]) * S * 2)
                    rec.mark("console", f"cycle {cycle} write {i}")
                client.flush()
                client.write(40 * S, b"o" * 8 * S)
            rec.cut((VolatileCache(), TornSector(kinds=("garbage",)))[cycle % 2], cycle)
    data = rec.journal_path.read_bytes()
    header, start = parse_header(rec.journal_path, data)
    assert header.devices[0].name == "vda"
    return rec.journal_path, list(scan(data, start, ScanEnd()))


def read_variant(path: Path, data: bytes, tmp_path: Path) -> JournalReader:
    other = tmp_path / "variant.journal"
    other.write_bytes(data)
    return JournalReader(other)


def test_the_journal_reads_back_whole(recording):
    path, records = recording
    reader = JournalReader(path, verify_bases=True)
    assert reader.torn_at is None
    assert reader.closed_cleanly
    assert len(reader.operations) == 24
    assert len(reader.cuts) == 3
    assert [m.text for m in reader.marks if m.source == "console"][:2] == [
        "cycle 0 write 0",
        "cycle 0 write 1",
    ]
    assert [r.sequence for r in records] == list(range(len(records)))


def test_a_tail_torn_at_any_byte_ends_the_reading_cleanly(recording, tmp_path):
    path, records = recording
    data = path.read_bytes()
    whole = JournalReader(path)
    ends = [r.position + r.payload_length for r in records]
    rng = random.Random(3)
    for size in [rng.randrange(ends[0], len(data)) for _ in range(150)]:
        reader = read_variant(path, data[:size], tmp_path)
        kept = [r for r, end in zip(records, ends, strict=True) if end <= size]
        arrivals = [r for r in kept if r.kind <= 4]
        assert len(reader.operations) == len(arrivals)
        last = kept[-1].position + kept[-1].payload_length
        if size == last:
            assert reader.torn_at is None
        else:
            assert reader.torn_at == last
            assert "torn" in (reader.torn_reason or "")
            assert reader.unread_bytes == size - last
        count = len(arrivals)
        # What arrived and has no completion was in flight when the harness died: lost under `kept`.
        done = {r.operation for r in kept if r.kind == Kind.COMPLETE}
        carried_out = max(done, default=0)
        with reader.state_at(count) as mine, whole.state_at(carried_out) as truth:
            assert mine.sha256() == truth.sha256()


def test_any_single_damaged_byte_is_noticed(recording, tmp_path):
    path, records = recording
    data = path.read_bytes()
    rng = random.Random(4)
    first = records[0].position - RECORD_SIZE
    for _ in range(200):
        at = rng.randrange(first, len(data))
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << rng.randrange(8)
        reader = read_variant(path, bytes(spoiled), tmp_path)
        assert reader.torn_at is not None
        assert reader.torn_at <= at
        assert not reader.closed_cleanly


@pytest.mark.parametrize("size", [1, 71, 72, 5000, 3 << 20])
def test_space_that_a_killed_recorder_had_prepared_is_a_clean_end(recording, tmp_path, size):
    path, records = recording
    data = path.read_bytes()
    reader = read_variant(path, data + bytes(size), tmp_path)
    assert reader.torn_at is None
    assert reader.unread_bytes == 0
    assert len(reader.operations) == 24
    torn = data[: records[-2].position - 10] + bytes(size)  # half a header, then such space
    reader = read_variant(path, torn, tmp_path)
    assert reader.torn_at == records[-2].position - RECORD_SIZE
    assert read_variant(path, data + bytes(size) + b"x", tmp_path).torn_at == len(data)


def test_an_idle_recorder_prepares_space_and_gives_it_back(tmp_path, base):
    with Recorder([DeviceSpec("vda", base)], tmp_path / "run", prepare_bytes=4 << 20) as rec:
        before = rec.journal_path.stat().st_size
        with Client(rec.endpoint("vda").socket, "vda") as client:
            deadline = time.monotonic() + 10
            while rec.journal_path.stat().st_size < 4 << 20:
                assert time.monotonic() < deadline
            client.write(0, b"x" * (1 << 20))
            client.write(1 << 20, b"y" * 4096)
            assert client.read((1 << 20) - 512, 1024) == b"x" * 512 + b"y" * 512
            with JournalReader(rec.journal_path) as reader:  # as a killed one leaves it
                assert reader.torn_at is None
                assert len(reader.operations) == 2
    assert before < rec.journal_path.stat().st_size < before + (2 << 20)


def test_a_missing_middle_is_noticed(recording, tmp_path):
    path, records = recording
    data = path.read_bytes()
    gone = records[10]
    start = gone.position - RECORD_SIZE
    spoiled = data[:start] + data[gone.position + gone.payload_length :]
    reader = read_variant(path, spoiled, tmp_path)
    assert reader.torn_at == start
    assert "sequence" in (reader.torn_reason or "")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), head=st.integers(0, 5000))
def test_no_file_makes_the_reader_fail_otherwise_than_with_journal_error(
    recording, tmp_path_factory, data, head
):
    path, _ = recording
    whole = path.read_bytes()[:head]
    other = tmp_path_factory.mktemp("any") / "x.journal"
    other.write_bytes(whole + data)
    try:
        JournalReader(other)
    except JournalError as error:
        assert str(other) in str(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"not a journal at all" * 100, "no magic"),
        (b"BRWNJRNL" + struct.pack("<IIQ", 99, 2, 0) + b"{}", "version 99"),
        (b"BRWNJRNL" + struct.pack("<IIQ", 1, 2, 0) + b"{}", "damaged"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, data, words):
    path = tmp_path / "x.journal"
    path.write_bytes(data)
    with pytest.raises(JournalError, match=words):
        JournalReader(path)


def test_a_journal_of_version_1_is_still_read(recording, tmp_path):
    path, _ = recording
    data = bytearray(path.read_bytes())
    assert struct.unpack_from("<I", data, 8) == (2,)
    struct.pack_into("<I", data, 8, 1)
    reader = read_variant(path, bytes(data), tmp_path)
    assert len(reader.operations) == 24
    assert len(reader.cuts) == 3


def test_a_missing_journal_is_one_clear_line(tmp_path):
    with pytest.raises(JournalError, match="No such file"):
        JournalReader(tmp_path / "none")


def test_bases_are_checked(recording, tmp_path):
    path, _ = recording
    image = path.parent.parent / "base.img"
    moved = tmp_path / "moved.img"
    shutil.copy(image, moved)
    assert len(JournalReader(path, {"vda": moved}, verify_bases=True).operations) == 24
    moved.write_bytes(b"x" * 64 * S)
    JournalReader(path, {"vda": moved})
    with pytest.raises(BaseImageError, match="SHA-256"):
        JournalReader(path, {"vda": moved}, verify_bases=True)
    moved.write_bytes(b"x" * 63 * S)
    with pytest.raises(BaseImageError, match=r"32256 bytes, recorded with 32768"):
        JournalReader(path, {"vda": moved})
    with pytest.raises(BaseImageError, match="No such file"):
        JournalReader(path, {"vda": tmp_path / "none"})


def test_operations_beyond_the_journal_are_refused(recording):
    reader = JournalReader(recording[0])
    with pytest.raises(IndexError):
        reader.state_at(25)
    with pytest.raises(IndexError):
        reader.state_at(-1)
    with pytest.raises(JournalError, match="no device"):
        reader.state_at(1, device="vdz")


HARNESS = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from framework.disk import DeviceSpec, Recorder
    rec = Recorder([DeviceSpec("vda", Path(sys.argv[1]))], Path(sys.argv[2])).start()
    print(rec.endpoint("vda").socket, flush=True)
    n = 0
    while True:
        rec.mark("console", f"tick {n}")
        n += 1
        time.sleep(0.001)
    """
)


def start_harness(tmp_path: Path, base: Path) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HARNESS, str(base), str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
    )
    ready, _, _ = select.select([process.stdout], [], [], 30)
    assert ready
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_harness_leaves_a_readable_journal(tmp_path, base, seed):
    rng = random.Random(seed)
    process, path = start_harness(tmp_path, base)
    acknowledged = []
    try:
        client = Client(path, "vda")
        stop_after = rng.randrange(50, 400)
        contents = {}
        for i in range(1000):
            if i == stop_after:
                process.send_signal(signal.SIGKILL)
            where = rng.randrange(1000) * 4096
            data = bytes([rng.randrange(256)]) * 4096
            cookie = client.send(WRITE, where, data)
            contents[i] = (where, data)
            client.wait(cookie)
            acknowledged.append(i)
    except (GoneError, OSError):
        pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    reader = JournalReader(tmp_path / "killed" / "disk.journal")
    assert not reader.closed_cleanly
    # Everything that was acknowledged had arrived in the journal, and is whole there.
    assert len(reader.operations) >= len(acknowledged) >= 50
    expected = bytearray(base.read_bytes())
    for i in (reader.operations.completed >= 0).nonzero()[0].tolist():
        where, data = contents[i]
        expected[where : where + 4096] = data
    with reader.final() as disk:
        assert disk.read(0, len(expected)) == expected
    assert (reader.operations.completed[: len(acknowledged) - 1] > 0).all()
    # The next recorder starts clean in the same place, with another journal.
    (tmp_path / "killed" / "disk.journal").rename(tmp_path / "kept.journal")
    with Recorder([DeviceSpec("vda", base)], tmp_path / "killed"):
        pass


def test_short_socket_directories_of_killed_recorders_are_swept(tmp_path, base, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f"brownout-{dead.pid}-abc"
    mine = tmp_path / f"brownout-{os.getpid()}-abc"
    other = tmp_path / "brownout-data-abc"
    for folder in (left, mine, other):
        folder.mkdir()
    with Recorder([DeviceSpec("vda", base)], tmp_path / ("l" * 100)):
        assert not left.exists()
        assert mine.exists()
        assert other.exists()


LIMITED = textwrap.dedent(
    """
    import resource, signal, sys
    from pathlib import Path
    from framework.disk import DeviceSpec, Recorder, RecorderError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.path.insert(0, sys.argv[3])
    from disk_nbd_client import Client, NbdError
    rec = Recorder([DeviceSpec("vda", Path(sys.argv[1]))], Path(sys.argv[2])).start()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    client = Client(rec.endpoint("vda").socket, "vda")
    done = 0
    try:
        for i in range(100):
            client.write(i * 4096, bytes([i + 1]) * 4096)
            done += 1
    except NbdError as error:
        print(done, error.code)
    try:
        rec.close()
    except RecorderError as error:
        print(error)
    """
)


def test_a_write_that_only_fits_in_part_is_cut_off(tmp_path, base):
    """The kernel takes half a record, then refuses: the journal ends at the last whole one."""
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, base, tmp_path / "full", Path(__file__).parent],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    first, second = out.stdout.splitlines()
    done, code = map(int, first.split())
    assert code == 5
    assert "disk.journal: can't write" in second
    assert "free some space" in second
    reader = JournalReader(tmp_path / "full" / "disk.journal")
    assert reader.torn_at is None
    assert len(reader.operations) == done
    with reader.final() as disk:
        assert disk.read((done - 1) * 4096, 4096) == bytes([done]) * 4096


def test_a_recorder_that_was_not_started_or_is_closed_says_so(tmp_path, base):
    rec = Recorder([DeviceSpec("vda", base)], tmp_path / "run")
    with pytest.raises(RecorderError, match="start"):
        rec.mark("console", "early")
    with pytest.raises(RecorderError, match="start"):
        rec.cut()
    rec.start()
    with pytest.raises(RecorderError, match="started already"):
        rec.start()
    disk = rec.disk("vda")
    rec.close()
    rec.close()
    with pytest.raises(RecorderError):
        rec.cut()
    assert len(disk.read(0, 4096)) == 4096  # a state outlives its recorder
    disk.close()
    with pytest.raises(DiskError, match="closed"):
        disk.read(0, 4096)
