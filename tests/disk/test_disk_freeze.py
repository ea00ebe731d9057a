"""Triggers and freezes are exact: operation N is not applied, N - 1 are, nothing is answered."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
import threading

import pytest
from disk_nbd_client import FLUSH, READ, WRITE, Client, GoneError

from framework.disk import (
    DeviceSpec,
    Fault,
    Freeze,
    Inject,
    JournalReader,
    Recorder,
    RecorderError,
    ReorderedCache,
    TornSector,
    Trigger,
    WriteThrough,
)

KIB4 = 4096


def pattern(i: int) -> bytes:
    return bytes([i % 255 + 1]) * KIB4


def applied(recorder, count: int, device: str = "vda") -> list[bool]:
    with recorder.disk(device) as disk:
        return [disk.read(i * KIB4, KIB4) == pattern(i) for i in range(count)]


@pytest.mark.parametrize("number", random.Random(20).sample(range(1, 200), 20))
def test_a_freeze_at_operation_n_leaves_exactly_n_minus_1_applied(recorder, connect, number):
    armed = recorder.arm(Trigger.operation(number))
    client = connect()
    messages = [client.packed(WRITE, i * KIB4, pattern(i))[1] for i in range(200)]
    sender = threading.Thread(target=lambda: _send(client, b"".join(messages)))
    sender.start()
    assert armed.fired.wait(10)
    assert armed.operation == number
    assert armed.at.offset == (number - 1) * KIB4
    recorder.cut(WriteThrough())
    sender.join(10)
    assert applied(recorder, 200) == [i < number - 1 for i in range(200)]
    assert recorder.operations == number - 1


def _send(client, data):
    with contextlib.suppress(OSError):  # the cut drops it
        client.sock.sendall(data)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is missing")
@pytest.mark.parametrize("number", [1, 7, 50, 120])
def test_a_freeze_is_exact_under_qemus_concurrent_requests(recorder, number):
    armed = recorder.arm(Trigger.operation(number))
    commands = [x for i in range(150) for x in ("-c", f"aio_write -P {i % 255 + 1} {i * 4}k 4k")]
    qemu = subprocess.Popen(
        ["qemu-io", "-f", "raw", "-t", "writeback", *commands, recorder.endpoint("vda").uri],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert armed.fired.wait(20)
    finally:
        qemu.kill()
        qemu.wait()
    recorder.cut()
    assert sum(applied(recorder, 150)) == number - 1


def test_nothing_is_answered_after_a_freeze_on_any_device(recorder, connect):
    client, other = connect("vda"), connect("vdb")
    assert other.read(0, 512)
    armed = recorder.arm(Trigger.operation(1), Freeze())
    client.send(WRITE, 0, pattern(0))
    assert armed.fired.wait(5)
    for quiet, command in ((other, READ), (other, WRITE), (client, READ), (client, FLUSH)):
        quiet.sock.settimeout(0.2)
        data = pattern(1) if command == WRITE else b""
        quiet.send(command, 0, data, length=None if data else 512)
        with pytest.raises(TimeoutError):
            quiet.next_reply()
    assert recorder.frozen is armed
    with pytest.raises(GoneError):  # a new client is turned away
        connect()
    recorder.cut()
    assert recorder.frozen is None
    for quiet in (client, other):
        quiet.sock.settimeout(5)
        with pytest.raises(GoneError):
            quiet.next_reply()
    assert connect().read(0, 512) == connect("vdb").read(0, 512)
    assert recorder.operations == 0


def test_operations_in_flight_elsewhere_are_completed_before_the_freeze_is_reported(
    recorder, connect
):
    recorder.inject(Fault.latency(0.3, device="vdb"))
    slow, fast = connect("vdb"), connect("vda")
    armed = recorder.arm(Trigger.operation(2))
    cookie = slow.send(WRITE, 0, pattern(0))
    while recorder.operations < 1:
        pass
    fast.send(WRITE, 0, pattern(1))
    assert armed.fired.wait(5)
    slow.wait(cookie)
    recorder.cut()
    assert applied(recorder, 1, "vdb") == [True]
    assert applied(recorder, 1, "vda") == [False]


def test_the_callback_runs_on_its_own_thread_and_may_cut(recorder, connect):
    seen = []
    done = threading.Event()

    def on_freeze(armed):
        seen.append((threading.current_thread().name, armed.operation))
        recorder.cut()
        done.set()

    recorder.on_freeze(on_freeze)
    recorder.arm(Trigger.operation(2))
    client = connect()
    client.write(0, pattern(0))
    client.send(WRITE, KIB4, pattern(1))
    assert done.wait(10)
    assert seen == [("on-freeze", 2)]
    connect().write(KIB4, pattern(1))  # served again, and the arm is cleared
    assert recorder.operations == 2


def test_a_failing_callback_fails_the_run(tmp_path, base):
    rec = Recorder([DeviceSpec("vda", base)], tmp_path / "cb").start()
    rec.on_freeze(lambda armed: 1 / 0)
    with Client(rec.endpoint("vda").socket, "vda") as client:
        armed = rec.arm(Trigger.operation(1))
        client.send(FLUSH)
        assert armed.fired.wait(5)
    with pytest.raises(RecorderError, match="on_freeze callback failed: ZeroDivisionError"):
        rec.close()


def drive(client) -> None:
    """20 writes with a flush after each fifth: 24 operations; a frozen server stops reading."""
    client.sock.settimeout(1)
    with contextlib.suppress(TimeoutError):
        for i in range(20):
            client.send(WRITE, i * KIB4, pattern(i))
            if i % 5 == 4:
                client.send(FLUSH)


@pytest.mark.parametrize(
    ("trigger", "operation"),
    [
        (Trigger.operation(3), 3),
        (Trigger.nth_flush(1), 6),
        (Trigger.nth_flush(2, "vda"), 12),
        (Trigger.block_range("vda", 4 * KIB4, 1), 5),
        (Trigger.block_range("vda", 4 * KIB4 + 512, 512), 5),
        (Trigger.block_range("vda", 0, 3 * KIB4, skip=2), 3),
        (Trigger.bytes_written(3 * KIB4), 3),
        (Trigger.bytes_written(3 * KIB4 + 1), 4),
        (Trigger.bytes_written(KIB4 + 1, "vda", 6 * KIB4), 9),
        (Trigger.bytes_written(KIB4, "vda", 6 * KIB4 + 512, 64 * KIB4), 9),
        (Trigger.percent_written(50, "vda", 0, 10 * KIB4), 5),
        (Trigger.percent_written(100, "vda", 0, 10 * KIB4), 11),
        (Trigger.content("sevens", re.compile(b"\x07\x07")), 8),
        (Trigger.content("an eleven", re.compile(b"\x0b"), "vda"), 13),
        (Trigger.any_of(Trigger.nth_flush(3), Trigger.block_range("vda", 7 * KIB4, 1)), 9),
    ],
    ids=str,
)
def test_triggers_fire_at_the_very_operation(recorder, connect, trigger, operation):
    armed = recorder.arm(trigger)
    drive(connect())
    assert armed.fired.wait(5)
    assert armed.operation == operation
    assert recorder.operations == operation - 1


@pytest.mark.parametrize(
    "trigger",
    [
        Trigger.nth_flush(1, "vdb"),
        Trigger.block_range("vda", 100 * KIB4, 512),
        Trigger.block_range("vdb", 0, 1 << 20),
        Trigger.bytes_written(20 * KIB4 + 1),
        Trigger.operation(26),
        Trigger.content("what nobody writes", re.compile(b"\x01\x02")),
        Trigger.content("a one elsewhere", re.compile(b"\x01"), "vdb"),
    ],
    ids=str,
)
def test_triggers_that_are_not_met_do_not_fire(recorder, connect, trigger):
    armed = recorder.arm(trigger)
    client = connect()
    drive(client)
    client.flush()
    assert not armed.fired.is_set()


def test_counts_start_at_arming_or_at_power_on(recorder, connect):
    client = connect()
    for i in range(4):
        client.write(i * KIB4, pattern(i))
    with pytest.raises(RecorderError, match="happened already"):
        recorder.arm(Trigger.operation(3), since="power-on")
    late = recorder.arm(Trigger.operation(6), since="power-on")
    soon = recorder.arm(Trigger.operation(3))
    client.write(0, pattern(0))
    soon.disarm()
    client.send(WRITE, 0, pattern(0))
    assert late.fired.wait(5)
    assert late.operation == 6
    assert not soon.fired.is_set()


def test_the_freeze_stands_in_the_journal(recorder, connect):
    armed = recorder.arm(Trigger.nth_flush(1, "vdb"))
    connect().write(0, pattern(0))
    connect("vdb").send(FLUSH)
    assert armed.fired.wait(5)
    recorder.cut()
    recorder.close()
    (frozen,) = JournalReader(recorder.journal_path).freezes
    assert (frozen.operation, frozen.device, frozen.trigger) == (2, "vdb", "flush 1 of vdb")
    assert frozen.kind.name == "FLUSH"


def test_a_freeze_by_request(recorder, connect):
    client = connect()
    client.write(0, pattern(0))
    armed = recorder.freeze()
    assert armed.fired.wait(5)
    client.sock.settimeout(0.2)
    client.send(WRITE, KIB4, pattern(1))
    with pytest.raises(TimeoutError):
        client.next_reply()
    recorder.cut()
    assert applied(recorder, 2) == [True, False]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trigger.operation(0),
        lambda: Trigger.nth_flush(-1),
        lambda: Trigger.block_range("vda", 0, 0),
        lambda: Trigger.percent_written(0, "vda", 0, 512),
        Trigger.any_of,
        lambda: Fault.error(2),
        lambda: Fault.error(5, on=("reads",)),
        lambda: Fault.latency(-1),
        lambda: Fault.bit_flip("vda", 0, 8),
    ],
)
def test_senseless_triggers_and_faults_are_refused(make):
    with pytest.raises(RecorderError):
        make()


def test_unknown_devices_in_triggers_and_faults_are_refused(recorder):
    with pytest.raises(RecorderError, match="no device 'vdz'"):
        recorder.arm(Trigger.nth_flush(1, "vdz"))
    with pytest.raises(RecorderError, match="no device 'vdz'"):
        recorder.arm(Trigger.operation(1), Inject(Fault.bit_rot("vdz", 0)))
    with pytest.raises(RecorderError, match="beyond the end"):
        recorder.inject(Fault.bit_flip("vda", 1 << 40))


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_freeze_inside_a_write_lets_the_model_tear_that_very_write(recorder, connect, seed, fua):
    client = connect()
    client.write(0, pattern(1) * 2)
    armed = recorder.arm(Trigger.operation(1), Freeze(inside=True))
    client.send(WRITE, 0, pattern(7) * 2, flags=1 if fua else 0)
    assert armed.fired.wait(10)
    record = recorder.cut(TornSector(newest=True, kinds=("mix",)), seed)
    assert record.operation == armed.operation == 2
    with recorder.disk("vda") as disk, JournalReader(recorder.journal_path) as reader:
        content = disk.read(0, 2 * KIB4)
        with reader.after_cut(0) as replayed:
            assert replayed.read(0, 2 * KIB4) == content
    sectors = {content[i : i + 512][:1] for i in range(0, len(content), 512)}
    assert sectors <= {pattern(1)[:1], pattern(7)[:1]}
    assert record.decision.partial


def test_a_write_in_flight_is_lost_when_nothing_is_cached(recorder, connect):
    client = connect()
    client.write(0, pattern(1))
    armed = recorder.arm(Trigger.operation(1), Freeze(inside=True))
    client.send(WRITE, 0, pattern(7))
    assert armed.fired.wait(10)
    recorder.cut(WriteThrough())
    with recorder.disk("vda") as disk:
        assert disk.read(0, KIB4) == pattern(1)


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (0.2, 1), (0.5, 2), (0.6, 3), (1, 4)])
def test_a_reordering_cache_keeps_only_the_newest(recorder, connect, keep, kept):
    client = connect()
    for i in range(4):
        client.write(i * KIB4, pattern(i))
    recorder.cut(ReorderedCache(keep=keep))
    assert applied(recorder, 4) == [i >= 4 - kept for i in range(4)]


@pytest.mark.parametrize("kind", ["garbage", "unreadable"])
def test_a_write_in_flight_destroys_what_was_durable_before(recorder, connect, kind):
    client = connect()
    client.write(0, pattern(1))
    client.flush()
    armed = recorder.arm(Trigger.operation(1), Freeze(inside=True))
    client.send(WRITE, 0, pattern(7))
    assert armed.fired.wait(10)
    decision = recorder.cut(TornSector(newest=True, kinds=(kind,)), 5).decision
    assert bool(decision.garbage) == (kind == "garbage")
    assert bool(decision.unreadable) == (kind == "unreadable")
