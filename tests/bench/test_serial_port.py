"""The bench's serial port: outlives power, loses what nobody reads, vanishes and comes back."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.targets.bench.serial_port import Line, VirtualSerialPort
from framework.targets.errors import RigError

Make = Callable[..., VirtualSerialPort]


@pytest.fixture
def port() -> Iterator[Make]:
    made: list[VirtualSerialPort] = []

    def make(
        received: Callable[[bytes], None] = lambda data: None, **line: int
    ) -> VirtualSerialPort:
        path = Path(f"/dev/shm/brownout-test-port-{os.getpid()}-{len(made)}")
        made.append(VirtualSerialPort(path, Line(**{"baud": 0, **line}), received))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert not each.path.exists()
        assert not each.path.is_symlink()


def open_port(port: VirtualSerialPort) -> int:
    return os.open(port.path, os.O_RDWR | os.O_NOCTTY)


def read(fd: int, length: int, timeout_s: float = 20.0) -> bytes:
    data = b""
    deadline = time.monotonic() + timeout_s
    while len(data) < length and time.monotonic() < deadline:
        if select.select([fd], [], [], 0.1)[0]:
            data += os.read(fd, length - len(data))
    return data


def test_bytes_go_both_ways_unchanged(port: Make) -> None:
    heard: list[bytes] = []
    made = port(heard.append)
    fd = open_port(made)
    every = bytes(range(256))
    made.send(every)
    assert read(fd, 256) == every
    os.write(fd, every)
    deadline = time.monotonic() + 20
    while sum(map(len, heard)) < 256 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b"".join(heard) == every
    os.close(fd)


def test_it_outlives_whoever_opens_it(port: Make) -> None:
    made = port()
    for _ in range(3):
        fd = open_port(made)
        made.send(b"again")
        assert read(fd, 5) == b"again"
        os.close(fd)


def test_what_nobody_reads_is_lost_and_blocks_no_board(port: Make) -> None:
    made = port()
    began = time.monotonic()
    made.send(bytes(1 << 20))
    assert made.unread_bytes > 1 << 19
    # It is waited for once; a board that talks on is never stopped for good.
    assert time.monotonic() - began < 60


def test_an_adapter_that_vanishes_hangs_up_and_comes_back(port: Make) -> None:
    made = port()
    fd = open_port(made)
    number = made.path.readlink()
    made.pull_out()
    assert not made.path.exists()
    with pytest.raises(OSError):
        while os.read(fd, 100):
            pass
        raise OSError  # an end of file is a hang-up, too
    made.send(b"into the void")
    assert made.unread_bytes == len(b"into the void")
    other = os.openpty()  # so that the number is taken
    made.plug_in()
    assert made.path.readlink() != number
    os.close(fd)
    fd = open_port(made)
    made.send(b"back")
    assert read(fd, 4) == b"back"
    for each in (*other, fd):
        os.close(each)


def test_garbage_comes_with_power_from_the_seed(port: Make) -> None:
    seen = []
    for _ in range(2):
        made = port(garbage_bytes=40, seed=7)
        fd = open_port(made)
        made.power_rises()
        seen.append(read(fd, 40))
        os.close(fd)
    assert len(seen[0]) == 40
    assert seen[0] == seen[1]


def test_bytes_get_lost_and_flipped_at_their_rates(port: Make) -> None:
    sent = b"U" * 20_000
    lossy = port(lost_per_million=100_000)
    assert 1500 < len(sent) - len(lossy._worn(sent)) < 2500
    noisy = port(flipped_per_million=100_000)
    worn = noisy._worn(sent)
    assert len(worn) == len(sent)
    assert 1500 < sum(byte != ord("U") for byte in worn) < 2500
    assert all((byte ^ ord("U")).bit_count() <= 1 for byte in worn)


def test_the_baud_rate_paces_what_the_board_says(port: Make) -> None:
    made = port(baud=9600)
    fd = open_port(made)
    began = time.monotonic()
    made.send(bytes(480))
    assert time.monotonic() - began > 0.45
    os.close(fd)


def test_a_rate_out_of_range_is_refused() -> None:
    with pytest.raises(RigError, match="out of range"):
        Line(lost_per_million=2_000_000)
