"""The NBD server: real clients (QEMU's tools), and clients that misbehave."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from disk_nbd_client import READ, WRITE, Client, GoneError, NbdError

from framework.disk import BaseImageError, DeviceSpec, JournalReader, Recorder, RecorderError

MIB = 1 << 20
needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils is missing")


def qemu_io(uri: str, *commands: str, cache: str = "writeback") -> str:
    arguments = [x for c in commands for x in ("-c", c)]
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-t", cache, *arguments, uri],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


@needs_qemu
def test_qemu_img_sees_size_and_content(recorder, base, tmp_path):
    endpoint = recorder.endpoint("vda")
    info = subprocess.run(
        ["qemu-img", "info", endpoint.uri], capture_output=True, text=True, timeout=30, check=True
    )
    assert "8 MiB" in info.stdout
    out = tmp_path / "copy.img"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", endpoint.uri, out],
        timeout=30,
        check=True,
    )
    assert out.read_bytes() == base.read_bytes()


@needs_qemu
def test_qemu_io_writes_are_read_back_and_the_base_stays_untouched(recorder, base):
    before = base.read_bytes()
    out = qemu_io(
        recorder.endpoint("vda").uri,
        "write -P 7 0 1M",
        "write -P 8 1M 64k",
        "flush",
        "write -z 4k 8k",
        "discard 512k 4k",
        "read -P 7 0 4k",
        "read -P 0 4k 8k",
        "read -P 0 512k 4k",
        "read -P 8 1M 64k",
    )
    assert "failed" not in out
    assert base.read_bytes() == before
    with recorder.disk("vda") as disk:
        assert disk.read(MIB, 64 << 10) == bytes([8]) * (64 << 10)


@needs_qemu
def test_many_asynchronous_qemu_requests_all_arrive(recorder):
    writes = [f"aio_write -P {i % 255 + 1} {i * 16}k 16k" for i in range(200)]
    out = qemu_io(recorder.endpoint("vda").uri, *writes, "aio_flush", "flush")
    assert "failed" not in out
    with recorder.disk("vda") as disk:
        for i in range(200):
            assert disk.read(i * 16384, 16384) == bytes([i % 255 + 1]) * 16384
    assert recorder.operations >= 201


@needs_qemu
def test_qemu_img_compares_a_big_copy_in_both_directions(tmp_path, base):
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(24 * MIB))
    spec = DeviceSpec("vda", base, size_bytes=24 * MIB)
    with Recorder([spec], tmp_path / "big") as rec:
        uri = rec.endpoint("vda").uri
        subprocess.run(
            ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri],
            timeout=60,
            check=True,
        )
        subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", source, uri], check=True)


def test_both_ways_to_open_an_export_work(connect):
    assert connect().size == 8 * MIB
    old = connect(old_style=True)
    assert old.size == 8 * MIB
    old.write(512, b"x" * 512)
    assert connect().read(512, 512) == b"x" * 512


def test_flags_and_block_sizes_are_offered(connect):
    client = connect()
    assert client.flags == 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6
    assert client.block_sizes == (512, 4096, 32 * MIB)


def test_exports_are_listed_and_unknown_options_refused(recorder):
    endpoint = recorder.endpoint("vda")
    client = Client.__new__(Client)
    client.sock = socket.socket(socket.AF_UNIX)
    client.sock.settimeout(5)
    client.sock.connect(str(endpoint.socket))
    client._get(18)
    client.sock.sendall(struct.pack(">I", 3))
    names = [data[4:] for kind, data in client.option(3) if kind == 2]
    assert names == [b"vda", b"vdb"]
    assert client.option(5)[-1][0] == (1 << 31) | 1  # STARTTLS: unsupported
    assert client.option(8)[-1][0] == (1 << 31) | 1  # STRUCTURED_REPLY: unsupported
    assert client.option(7, b"\0")[-1][0] == (1 << 31) | 3  # malformed GO: invalid
    unknown = struct.pack(">I", 3) + b"vdz" + struct.pack(">H", 0)
    assert client.option(7, unknown)[-1][0] == (1 << 31) | 6
    assert client.option(2)[-1][0] == 1  # ABORT is acknowledged
    client.sock.close()


def test_wrong_ranges_get_clean_errors_and_the_connection_lives(connect, recorder):
    client = connect()
    for call, code in (
        (lambda: client.read(8 * MIB, 512), 22),
        (lambda: client.read(8 * MIB - 512, 1024), 22),
        (lambda: client.write(8 * MIB, b"x" * 512), 28),
        (lambda: client.read((1 << 64) - 512, 512), 22),
        (lambda: client.read(1, 512), 22),
        (lambda: client.write(512, b"x" * 100), 22),
        (lambda: client.read(0, 0), 22),
        (lambda: client.discard(8 * MIB - 512, 1024), 22),
        (lambda: client.wait(client.send(99)), 22),
        (lambda: client.wait(client.send(READ, 0, length=512, flags=0x80)), 22),
    ):
        with pytest.raises(NbdError) as error:
            call()
        assert error.value.code == code
    assert len(client.read(0, 512)) == 512
    assert recorder.operations == 0


def test_a_disconnect_in_the_middle_of_a_write_changes_nothing(connect, recorder, base):
    client = connect()
    _, message = client.packed(WRITE, 0, b"x" * 65536)
    client.sock.sendall(message[:30000])
    client.close()
    other = connect()
    assert other.read(0, 65536) == base.read_bytes()[:65536]
    assert recorder.operations == 0


def test_garbage_from_a_client_ends_its_connection_only(connect, recorder):
    bad, good = connect(), connect()
    bad.sock.sendall(b"\xff" * 28)
    with pytest.raises(GoneError):
        bad.next_reply()
    good.write(0, b"y" * 512)
    assert good.read(0, 512) == b"y" * 512


def test_an_oversized_write_ends_the_connection(connect):
    client = connect()
    client.send(WRITE, 0, length=33 * MIB)
    with pytest.raises(GoneError):
        client.next_reply()


def test_the_largest_request_works(tmp_path, base):
    with Recorder([DeviceSpec("vda", base, size_bytes=40 * MIB)], tmp_path / "large") as rec:
        endpoint = rec.endpoint("vda")
        with Client(endpoint.socket, "vda") as client:
            data = os.urandom(32 * MIB)
            client.write(MIB, data)
            assert client.read(MIB, 32 * MIB) == data


def test_two_machines_worth_of_clients_at_once(connect, recorder):
    errors = []

    def work(device: str, number: int) -> None:
        try:
            client = connect(device)
            for i in range(100):
                where = (number * 100 + i) * 4096
                client.write(where, bytes([number + 1]) * 4096)
                if i % 7 == 0:
                    client.flush()
        except (AssertionError, OSError, NbdError) as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(device, n)) for device in ("vda", "vdb") for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    assert recorder.operations == 4 * 115
    for device in ("vda", "vdb"):
        with recorder.disk(device) as disk:
            for number in (0, 1):
                part = disk.read(number * 409600, 409600)
                assert part == bytes([number + 1]) * 409600


def test_reads_at_any_alignment_and_export(recorder, connect, base, tmp_path):
    connect().write(4096, b"z" * 1024)
    expected = bytearray(base.read_bytes())
    expected[4096:5120] = b"z" * 1024
    with recorder.disk("vda") as disk:
        assert disk.read(4000, 2000) == expected[4000:6000]
        assert disk.read(0, 0) == b""
        disk.export(tmp_path / "out.img")
        assert (tmp_path / "out.img").read_bytes() == expected
        disk.export(tmp_path / "part.img", 4000, 2000)
        assert (tmp_path / "part.img").read_bytes() == expected[4000:6000]


def test_a_long_run_directory_gets_a_short_socket_path(tmp_path, base):
    directory = tmp_path / ("long" * 30)
    with Recorder([DeviceSpec("vda", base)], directory) as rec:
        endpoint = rec.endpoint("vda")
        assert len(str(endpoint.socket)) < 108
        with Client(endpoint.socket, "vda") as client:
            client.write(0, b"x" * 512)
        short = endpoint.socket.parent
    assert not short.exists()


def test_a_stale_socket_is_replaced_and_a_live_one_refused(tmp_path, base):
    directory = tmp_path / "run"
    directory.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(directory / "nbd.sock"))
    stale.close()
    with Recorder([DeviceSpec("vda", base)], directory) as rec:
        (directory / "disk.journal").rename(directory / "other.journal")
        with pytest.raises(RecorderError, match="in use"):
            Recorder([DeviceSpec("vda", base)], directory).start()
        assert rec.endpoint("vda").socket.is_socket()
    assert not (directory / "nbd.sock").exists()


def test_nothing_is_left_open_after_closing(tmp_path, base):
    def handles() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, threads = handles(), threading.active_count()
    for i in range(5):
        with Recorder([DeviceSpec("vda", base)], tmp_path / str(i)) as rec:
            endpoint = rec.endpoint("vda")
            client = Client(endpoint.socket, "vda")
            client.write(0, b"x" * 512)
            rec.cut()
            client.close()
    assert handles() == before
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_bytes(b"x" * 1000), "not a multiple of 512"),
        (lambda p: p.write_bytes(b""), "not a multiple"),
        (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    ],
)
def test_a_bad_base_is_one_clear_line_and_leaves_nothing(tmp_path, base, prepare, words):
    prepare(base)
    directory = tmp_path / "run"
    with pytest.raises(BaseImageError, match=words) as error:
        Recorder([DeviceSpec("vda", base)], directory).start()
    assert "vda" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (directory / "disk.journal").exists()


def test_a_base_larger_than_the_device_is_refused(tmp_path, base):
    with pytest.raises(BaseImageError, match="more than"):
        Recorder([DeviceSpec("vda", base, size_bytes=MIB)], tmp_path / "run").start()


def test_a_directory_with_a_journal_is_refused(tmp_path, base):
    with Recorder([DeviceSpec("vda", base)], tmp_path / "run"):
        pass
    with pytest.raises(RecorderError, match="exists already"):
        Recorder([DeviceSpec("vda", base)], tmp_path / "run").start()


def test_unknown_and_double_devices_are_refused(tmp_path, base, recorder):
    with pytest.raises(RecorderError, match="no device 'vdz'; there are vda, vdb"):
        recorder.disk("vdz")
    with pytest.raises(RecorderError, match="given twice"):
        Recorder([DeviceSpec("vda", base), DeviceSpec("vda", base)], tmp_path / "twice").start()


def test_a_full_disk_fails_the_write_and_the_run_and_never_hangs(tmp_path, base):
    rec = Recorder([DeviceSpec("vda", base)], tmp_path / "run").start()
    client = Client(rec.endpoint("vda").socket, "vda")
    client.write(0, b"x" * 4096)
    full = os.open("/dev/full", os.O_RDWR)
    keep = os.dup(rec._journal.fd)
    os.dup2(full, rec._journal.fd)  # from here the kernel says ENOSPC to the journal
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(NbdError) as error:
            client.write(4096, b"y" * 4096)
        assert error.value.code == 5
    with pytest.raises(NbdError):
        client.flush()
    with pytest.raises(RecorderError, match=r"disk\.journal.*No space left"):
        rec.check()
    with pytest.raises(RecorderError, match="No space left"):
        rec.mark("console", "too late")
    with pytest.raises(RecorderError, match="No space left"):
        rec.cut()
    with pytest.raises(RecorderError, match="No space left"):
        rec.close()
    assert time.monotonic() - started < 10
    os.close(full)
    os.close(keep)
    client.close()
    with JournalReader(rec.journal_path) as reader:  # what came before is whole
        assert len(reader.operations) == 1
        assert not reader.closed_cleanly


def test_arrival_order_is_the_order_in_the_journal(connect, recorder):
    client, other = connect("vda"), connect("vdb")
    for i in range(10):
        client.write(i * 4096, b"a" * 4096)
        recorder.mark("console", f"line {i}")
        other.flush()
    recorder.close()
    reader = JournalReader(recorder.journal_path)
    assert reader.operations.device.tolist() == [0, 1] * 10
    assert reader.operations.kind.tolist() == [1, 2] * 10
    lines = [m for m in reader.marks if m.source == "console"]
    assert [m.after_operation for m in lines] == list(range(1, 21, 2))
    times = reader.operations.arrived_ns
    assert (times[1:] >= times[:-1]).all()
    assert (reader.operations.completed > reader.operations.arrived).all()
