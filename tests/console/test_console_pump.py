"""The pump over real sockets: nothing lost, waits that end, evidence that stays."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.console import (
    ConsoleDeath,
    ConsoleError,
    ConsoleLost,
    ConsolePump,
    ConsoleTimeout,
    Line,
    Marker,
    PatternError,
    SocketTransport,
)
from framework.console import pump as pump_module

READY = r"READY version=(\S{1,32}) slot=([ab])\r?\n"
SOON_S = 10.0  # far more than needed: the assertions on time are separate


class Bench:
    """A pump and the machine's end of its line."""

    def __init__(self, log: Path, *, owned: bool = True) -> None:
        self.pump = ConsolePump("test", log_path=log, owned=owned)
        self.machine = self.plug()

    def plug(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.pump.attach(SocketTransport(ours))
        return theirs

    def says(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        end = self.pump.position + len(data)
        self.machine.sendall(data)
        deadline = time.monotonic() + SOON_S
        while self.pump.position < end:
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "console.log")
    yield bench
    bench.pump.close()
    bench.machine.close()


def later(seconds: float, action: object) -> threading.Timer:
    timer = threading.Timer(seconds, action)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_what_was_said_before_the_wait_is_found_from_its_position(bench: Bench) -> None:
    start = bench.pump.position
    bench.says("noise\r\nREADY version=v1 slot=a\r\n")
    match = bench.pump.wait_for(READY, 0, since=start)
    assert match.groups == ("v1", "a")
    assert bench.pump.slice(match.start, match.end).data.decode() == "READY version=v1 slot=a\r\n"


def test_a_wait_from_now_does_not_find_the_past(bench: Bench) -> None:
    bench.says("READY version=v1 slot=a\r\n")
    with pytest.raises(ConsoleTimeout):
        bench.pump.wait_for(READY, 0.05)


def test_a_timeout_names_the_pattern_the_tail_and_the_log(bench: Bench, tmp_path: Path) -> None:
    bench.says("only this\r\n")
    with pytest.raises(ConsoleTimeout) as caught:
        bench.pump.wait_for(Marker("READY line", READY), 0.05, since=0)
    message = str(caught.value)
    assert "READY line" in message
    assert "only this" in message
    assert str(tmp_path / "console.log") in message
    assert "\n" not in message


@settings(max_examples=60, deadline=None)
@given(
    before=st.binary(max_size=40),
    cuts=st.lists(st.integers(0, 120), max_size=12),
    after=st.binary(max_size=40),
)
def test_a_match_is_found_however_the_bytes_arrive(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, cuts: list[int], after: bytes
) -> None:
    text = before.replace(b"READY", b"") + b"READY version=v1 slot=b\r\n" + after
    pump = ConsolePump("pieces", deaths=())
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(pump.wait_for(READY, SOON_S, since=0)))
    ours, theirs = socket.socketpair()
    with theirs, pump:
        pump.attach(SocketTransport(ours))
        waiting.start()
        edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
        for start, end in itertools.pairwise(edges):
            theirs.sendall(text[start:end])
        waiting.join(SOON_S)
        assert len(found) == 1


@pytest.mark.parametrize("pattern", [r"a.*b", r"a+", r"\S+", r"(x{1,9})*y"])
def test_an_unbounded_pattern_is_refused_with_the_way_to_write_it(
    bench: Bench, pattern: str
) -> None:
    with pytest.raises(PatternError, match=r"no bound: write \{1,128\}"):
        bench.pump.wait_for(pattern, 1)


@pytest.mark.parametrize("pattern", ["(", "a?"])
def test_a_pattern_that_cannot_work_is_refused(bench: Bench, pattern: str) -> None:
    with pytest.raises(PatternError):
        bench.pump.wait_for(pattern, 1)


@pytest.mark.parametrize(
    "death",
    [
        "[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs",
        "[    1.0] Internal error: Oops: 0000000096000004 [#1] SMP",
        "[    1.0] BUG: unable to handle page fault for address: 0",
        "### ERROR ### Please RESET the board ###",
        "resetting ...",
        '"Synchronous Abort" handler, esr 0x96000010',
    ],
)
def test_a_death_string_ends_a_wait_at_once(bench: Bench, tmp_path: Path, death: str) -> None:
    start = bench.pump.position
    timer = later(0.05, lambda: bench.machine.sendall(f"x\r\n{death}\r\n".encode()))
    began = time.monotonic()
    with pytest.raises(ConsoleDeath) as caught:
        bench.pump.wait_for(READY, 30, since=start)
    assert time.monotonic() - began < 2
    assert str(tmp_path / "console.log") in str(caught.value)
    assert caught.value.tail
    timer.join()


def test_a_match_before_the_death_wins_and_one_after_it_loses(bench: Bench) -> None:
    bench.says("READY version=v1 slot=a\r\nKernel panic - not syncing: x\r\n")
    assert bench.pump.wait_for(READY, 0, since=0).group(1) == "v1"
    bench.says("READY version=v2 slot=b\r\n")
    with pytest.raises(ConsoleDeath):
        bench.pump.wait_for("version=v2", 0, since=0)
    assert bench.pump.wait_for("version=v2", 0, since=0, deaths=False).text == "version=v2"


def test_an_old_death_does_not_disturb_a_new_wait(bench: Bench) -> None:
    bench.says("Kernel panic - not syncing: x\r\n")
    start = bench.pump.position
    bench.says("READY version=v1 slot=a\r\n")
    assert bench.pump.wait_for(READY, 0, since=start).group(1) == "v1"
    assert [death.marker.name for death in bench.pump.deaths()] == ["kernel panic"]


def test_power_loss_ends_every_wait_at_once(bench: Bench) -> None:
    ended: list[float] = []

    def wait() -> None:
        with pytest.raises(ConsoleLost, match="cut on purpose"):
            bench.pump.wait_for(READY, 60, since=0)
        ended.append(time.monotonic())

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    cut = time.monotonic()
    bench.pump.lost("cut on purpose")
    for waiter in waiters:
        waiter.join(SOON_S)
    assert len(ended) == 3
    assert max(ended) - cut < 1
    with pytest.raises(ConsoleLost):
        bench.pump.read(bench.pump.position, 60)
    with pytest.raises(ConsoleLost):
        bench.pump.write(b"anyone?\n")


def test_last_words_are_heard_before_the_loss(bench: Bench) -> None:
    bench.machine.sendall(b"READY version=v1 slot=a\r\n")
    bench.machine.close()
    bench.pump.lost("power is off", drain_s=SOON_S)
    assert bench.pump.wait_for(READY, 0, since=0).group(2) == "a"
    assert bench.pump.read(0, 0)[0].startswith(b"READY")


def test_a_wait_outlives_a_change_of_links_when_someone_owns_them(bench: Bench) -> None:
    bench.says("first boot\r\n")
    start = bench.pump.position
    found: list[str] = []
    waiting = threading.Thread(
        target=lambda: found.append(bench.pump.wait_for(READY, SOON_S, since=start).group(1))
    )
    waiting.start()
    bench.machine.close()
    bench.machine = bench.plug()
    bench.says("READY version=v3 slot=a\r\n")
    waiting.join(SOON_S)
    assert found == ["v3"]
    assert bench.pump.links_since(start) == 1
    assert bench.pump.generation == 2


def test_the_end_of_an_unowned_line_is_a_loss(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "console.log", owned=False)
    with bench.pump:
        later(0.05, bench.machine.close)
        with pytest.raises(ConsoleLost, match="the line ended"):
            bench.pump.wait_for(READY, 30, since=0)


def test_a_reader_of_one_boot_does_not_read_the_next(bench: Bench) -> None:
    generation = bench.pump.generation
    bench.says("old")
    bench.machine = bench.plug()
    bench.says("new")
    data, end = bench.pump.read(0, 1, generation=generation)
    assert data == b"old"
    with pytest.raises(ConsoleLost, match="restarted"):
        bench.pump.read(end, 1, generation=generation)
    assert bench.pump.read(end, 1)[0] == b"new"


def test_a_megabyte_that_nobody_reads_is_drained(bench: Bench) -> None:
    payload = (b"x" * 99 + b"\n") * 10486
    sender = threading.Thread(target=bench.machine.sendall, args=(payload,))
    sender.start()
    sender.join(4 * SOON_S)
    assert not sender.is_alive(), "the machine stalled on its console"
    deadline = time.monotonic() + SOON_S
    while bench.pump.position < len(payload):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    lines = [line for line in bench.pump.slice(0).lines if line.direction == "RX"]
    assert len(lines) == 10486


def test_memory_is_bounded_and_a_slice_says_what_is_missing(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    log = tmp_path / "console.log"
    with ConsolePump("small", log_path=log, buffer_limit_bytes=1000) as pump, theirs:
        pump.attach(SocketTransport(ours))
        theirs.sendall(b"first line\n" + b"y" * 5000 + b"\nlast line\n")
        pump.wait_for("last line\n", SOON_S, since=0)
        piece = pump.slice(0)
        assert len(piece.data) == 1000
        assert piece.missing == pump.position - 1000
        assert str(log) in piece.text
    assert "first line" in log.read_text()


def test_the_log_has_both_directions_with_both_clocks(bench: Bench, tmp_path: Path) -> None:
    bench.says("=> ")
    bench.pump.write(b"printenv\n")
    bench.says("printenv\r\nbootdelay=2\r\n=> ")
    bench.pump.close()
    lines = (tmp_path / "console.log").read_text().splitlines()
    shape = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z +\d+\.\d{6} (RX|TX|--)[|+] (.*)")
    matches = [shape.fullmatch(line) for line in lines]
    assert all(matches)
    told = [(match[1], match[2]) for match in matches if match]
    assert ("TX", "printenv") in told
    assert ("RX", "bootdelay=2") in told
    assert [text for way, text in told if way == "RX"].count("=> ") == 2  # each prompt once
    monotonic = [float(line.split()[1]) for line in lines if " TX| " in line]
    assert abs(monotonic[0] - time.monotonic()) < 60


def test_lines_carry_times_and_positions_for_a_timeline(bench: Bench) -> None:
    start = bench.pump.position
    bench.says("\x1b[1mone\x1b[0m\r\ntwo\r\n")
    lines = [line for line in bench.pump.slice(start).lines if line.direction == "RX"]
    assert [line.text for line in lines] == ["one", "two"]
    assert lines[0].monotonic_ns <= lines[1].monotonic_ns
    assert abs(lines[0].utc_ns - time.time_ns()) < 60e9


def test_listeners_get_each_complete_line_once_and_cannot_stop_the_pump(bench: Bench) -> None:
    heard: list[Line] = []

    def broken(line: Line) -> None:
        raise RuntimeError("listener's own mistake")

    bench.pump.add_listener(broken)
    remove = bench.pump.add_listener(heard.append)
    for piece in ("upd", "ater: state Down", "load\r\nupdater: st", "ate Idle\r\nrest"):
        bench.says(piece)
    assert [line.text for line in heard] == ["updater: state Download", "updater: state Idle"]
    remove()
    bench.says("\r\nmore\r\n")
    assert len(heard) == 2


def test_a_machine_that_takes_no_input_does_not_block_the_test(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "_WRITE_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(ConsoleError, match="does not take input"):
        bench.pump.write(b"z" * (8 << 20))
    assert time.monotonic() - began < 5


def test_silence_is_waited_for_with_a_bound(bench: Bench) -> None:
    stop = threading.Event()

    def chatter() -> None:
        while not stop.wait(0.02):
            bench.machine.sendall(b".")

    talker = threading.Thread(target=chatter)
    talker.start()
    assert not bench.pump.wait_silence(0.5, 0.8)
    stop.set()
    talker.join()
    assert bench.pump.wait_silence(0.2, SOON_S)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_stops_neither_drain_nor_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(Path("/dev/full"))
    with bench.pump:
        bench.says("READY version=v1 slot=a\r\n")
        bench.says("more\r\n")
        assert bench.pump.wait_for(READY, 0, since=0).group(1) == "v1"
    bench.machine.close()
    assert sum("No space left" in record.getMessage() for record in caplog.records) == 1


def test_close_leaves_no_thread_and_can_be_repeated(tmp_path: Path) -> None:
    before = threading.active_count()
    bench = Bench(tmp_path / "console.log")
    bench.pump.close()
    bench.pump.close()
    bench.machine.close()
    assert threading.active_count() == before
    with pytest.raises(ConsoleLost):
        bench.plug()
