"""Injected faults hit what they name, as often as they say, and stand in the journal."""

from __future__ import annotations

import errno
import shutil
import time

import pytest
from disk_nbd_client import FLUSH, WRITE, Client, NbdError
from test_disk_serving import qemu_io

from framework.disk import (
    DeviceSpec,
    Fault,
    Flag,
    Inject,
    JournalReader,
    Notify,
    Recorder,
    RecorderError,
    Trigger,
    VolatileCache,
    WriteThrough,
)

KIB4 = 4096


@pytest.mark.parametrize(("code", "nbd"), [(errno.EIO, 5), (errno.ENOSPC, 28)])
def test_write_errors_change_nothing_and_end_after_their_count(recorder, connect, base, code, nbd):
    client = connect()
    recorder.inject(Fault.error(code, device="vda", offset=KIB4, length=KIB4, count=2))
    client.write(0, b"a" * KIB4)
    for _ in range(2):
        with pytest.raises(NbdError) as error:
            client.write(KIB4, b"b" * KIB4)
        assert error.value.code == nbd
    with recorder.disk("vda") as disk:
        assert disk.read(KIB4, KIB4) == base.read_bytes()[KIB4 : 2 * KIB4]
    client.write(KIB4, b"c" * KIB4)
    recorder.cut(WriteThrough())
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    assert reader.operations.error.tolist() == [0, nbd, nbd, 0]
    assert reader.final().read(KIB4, KIB4) == b"c" * KIB4
    assert reader.state_at(3).read(KIB4, KIB4) == base.read_bytes()[KIB4 : 2 * KIB4]


def test_read_and_flush_errors(recorder, connect):
    client, other = connect(), connect("vdb")
    fault = recorder.inject(Fault.error(errno.EIO, on=("read", "flush"), device="vda"))
    for call in (lambda: client.read(0, 512), client.flush):
        with pytest.raises(NbdError) as error:
            call()
        assert error.value.code == 5
    other.flush()
    client.write(0, b"a" * 512)
    fault.disarm()
    client.flush()
    assert client.read(0, 512) == b"a" * 512


def test_a_failed_flush_covers_nothing(recorder, connect, base):
    client = connect()
    client.write(0, b"a" * 512)
    recorder.inject(Fault.error(errno.EIO, on=("flush",), count=1))
    with pytest.raises(NbdError):
        client.flush()
    recorder.cut(VolatileCache(keep=0.0))
    assert connect().read(0, 512) == base.read_bytes()[:512]


def test_a_fault_hits_the_operation_that_fired_its_trigger(recorder, connect):
    client = connect()
    armed = recorder.arm(Trigger.operation(3), Inject(Fault.error(errno.EIO, count=1)))
    client.write(0, b"1" * 512)
    client.write(512, b"2" * 512)
    with pytest.raises(NbdError):
        client.write(1024, b"3" * 512)
    client.write(1536, b"4" * 512)
    assert armed.fired.is_set()
    assert armed.operation == 3


def test_a_lying_flush_is_acknowledged_and_covers_nothing(recorder, connect, base):
    client = connect()
    client.write(0, b"a" * 512)
    client.flush()
    recorder.inject(Fault.lying_flush("vda", count=1))
    client.write(512, b"b" * 512)
    client.flush()
    recorder.cut(VolatileCache(keep=0.0))
    again = connect()
    assert again.read(0, 512) == b"a" * 512
    assert again.read(512, 512) == base.read_bytes()[512:1024]
    recorder.close()
    assert JournalReader(recorder.journal_path).operations.lying.tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_a_later_honest_flush_covers_what_a_lying_one_did_not(recorder, connect):
    client = connect()
    recorder.inject(Fault.lying_flush(count=1))
    client.write(0, b"a" * 512)
    client.flush()
    client.flush()
    recorder.cut(VolatileCache(keep=0.0))
    assert connect().read(0, 512) == b"a" * 512


def test_a_flipped_bit_is_what_is_stored(recorder, connect):
    client = connect()
    recorder.inject(Fault.bit_flip("vda", 4096 + 700, bit=3))
    client.write(0, b"\0" * 4096)  # not hit
    client.write(4096, b"\0" * 4096)
    client.write(8192, b"\0" * 4096)
    expected = bytearray(4096)
    expected[700] = 8
    assert client.read(4096, 4096) == expected
    client.write(4096, b"\0" * 4096)  # once only
    assert client.read(4096, 4096) == b"\0" * 4096
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    assert (reader.operations.flags & Flag.CORRUPTED).tolist() == [0, 4, 0, 0]
    assert reader.state_at(2).read(4096, 4096) == expected


def test_rot_lasts_over_a_cut_until_the_sector_is_rewritten(recorder, connect, base):
    client = connect()
    client.write(0, b"\0" * 1024)
    client.flush()
    recorder.inject(Fault.bit_rot("vda", 600, bit=7))
    recorder.inject(Fault.bit_rot("vda", 5000, bit=0))
    rotten = bytearray(1024)
    rotten[600] = 0x80
    original = base.read_bytes()[4608:5120]
    spoiled = bytearray(original)
    spoiled[5000 - 4608] ^= 1
    assert client.read(0, 1024) == rotten
    assert client.read(4608, 512) == spoiled
    recorder.cut(VolatileCache(0.0))
    client = connect()
    assert client.read(0, 1024) == rotten
    client.write(512, b"\0" * 512)
    assert client.read(0, 1024) == b"\0" * 1024
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    assert reader.after_cut(0).read(0, 1024) == rotten
    assert reader.final().read(0, 1024) == b"\0" * 1024
    assert reader.final().read(4608, 512) == spoiled
    assert reader.state_at(0).read(4608, 512) == original


def test_latency_delays_and_lets_others_overtake(recorder, connect):
    client = connect()
    recorder.inject(Fault.latency(0.4, count=1))
    started = time.monotonic()
    slow = client.send(WRITE, 0, b"s" * 512)
    fast = client.send(WRITE, 512, b"f" * 512)
    assert client.next_reply() == fast
    assert time.monotonic() - started < 0.3
    assert client.next_reply() == slow
    assert time.monotonic() - started >= 0.4


def test_latency_on_reads_too(recorder, connect):
    client = connect()
    fault = recorder.inject(Fault.latency(0.2, on=("read",)))
    started = time.monotonic()
    client.read(0, 512)
    assert time.monotonic() - started >= 0.2
    fault.disarm()
    started = time.monotonic()
    client.read(0, 512)
    assert time.monotonic() - started < 0.15


def test_a_flush_does_not_cover_a_write_that_was_still_in_flight(recorder, connect, base):
    client = connect()
    recorder.inject(Fault.latency(0.3, on=("write",), count=1))
    slow = client.send(WRITE, 0, b"s" * 512)
    client.wait(client.send(FLUSH))
    client.wait(slow)  # completed, but after the flush had arrived
    recorder.cut(VolatileCache(keep=0.0))
    assert connect().read(0, 512) == base.read_bytes()[:512]


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is missing")
def test_qemu_reports_the_injected_errors(recorder):
    recorder.inject(Fault.error(errno.ENOSPC, count=1))
    recorder.inject(Fault.error(errno.EIO, on=("read",), offset=65536, length=512))
    out = qemu_io(recorder.endpoint("vda").uri, "write 0 4k", "write 4k 4k", "read 64k 4k")
    assert "write failed: No space left on device" in out
    assert "wrote 4096/4096 bytes at offset 4096" in out
    assert "read failed: Input/output error" in out


def test_whoever_is_notified_hears_of_exactly_the_operation_which_is_carried_out(recorder, connect):
    client = connect()
    told = []
    where = Trigger.touches((("vda", KIB4, 512), ("vdb", 0, 512)), 2, "the second one")
    armed = recorder.arm(where, Notify(lambda: told.append(recorder.operations)))
    client.write(0, b"a" * KIB4)  # beside it
    client.write(KIB4, b"b" * KIB4)
    assert told == []
    connect("vdb").write(0, b"c" * 512)
    assert told == [2], "operations recorded before the one that fired"
    assert (armed.operation, armed.at.device) == (3, "vdb")
    client.write(KIB4, b"d" * KIB4)
    assert told == [2], "once"
    assert client.read(KIB4, 512) == b"d" * 512


def test_a_later_trigger_counts_from_the_one_that_it_follows(recorder, connect):
    client = connect()
    told = []
    first = Trigger.block_range("vda", KIB4, 512)
    recorder.arm(Trigger.later(first, 3), Notify(lambda: told.append(recorder.operations + 1)))
    for offset in (0, 0, KIB4, 0, KIB4, 0, 0):
        client.write(offset, b"x" * 512)
    assert told == [6]


def test_a_disarmed_notification_tells_nobody(recorder, connect):
    told = []
    armed = recorder.arm(Trigger.operation(1), Notify(lambda: told.append(1)))
    armed.disarm()
    connect().write(0, b"a" * 512)
    assert told == []


def test_a_notified_caller_that_fails_is_told_by_the_recorder(tmp_path, base):
    def fail() -> None:
        raise ValueError("no use")

    recorder = Recorder([DeviceSpec("vda", base)], tmp_path / "failing").start()
    recorder.arm(Trigger.operation(1), Notify(fail))
    client = Client(recorder.endpoint("vda").socket, "vda")
    client.write(0, b"a" * 512)
    client.close()
    with pytest.raises(RecorderError, match="ValueError: no use"):
        recorder.close()
