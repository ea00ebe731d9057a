"""The packet relay: what happens to a frame is decided by its number alone, and TCP survives it."""

from __future__ import annotations

import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from framework.network.packets import WAYS, PacketFaults, PacketRelay, RelayError, fates
from images import build_target
from images.console import command_line

sys.path.insert(0, str(Path(__file__).parents[1] / "images"))
from machine import Machine

SHARES = st.floats(0, 1)


@given(
    st.builds(PacketFaults, SHARES, SHARES, SHARES, jitter_s=st.just(0.1)),
    st.integers(),
    st.sampled_from(WAYS),
    st.integers(0, 1 << 40),
)
def test_a_frames_fate_is_that_of_its_number(
    faults: PacketFaults, seed: int, way: Any, number: int
) -> None:
    once = fates(faults, seed, way, number)
    assert once == fates(faults, seed, way, number)
    assert len(once) <= 2
    assert all(0 <= late <= 0.15 + 1e-9 for late in once)
    # More loss loses more, never other frames: what is lost at 1 % is lost at 5 %.
    if not once:
        assert not fates(evolve(faults, loss=1.0), seed, way, number)
        assert not fates(evolve(faults, duplication=0.0), seed, way, number)


def test_the_shares_are_those_that_were_asked_for() -> None:
    faults = PacketFaults(loss=0.05, duplication=0.1, reordering=0.2)
    for way in WAYS:
        seen = [fates(faults, 7, way, number) for number in range(20_000)]
        arrived = [one for one in seen if one]
        assert 0.045 < sum(not one for one in seen) / len(seen) < 0.055
        assert 0.09 < sum(len(one) == 2 for one in arrived) / len(arrived) < 0.11
        assert 0.19 < sum(one[0] > 0 for one in arrived) / len(arrived) < 0.21
    assert [fates(faults, 7, "a-b", n) for n in range(99)] != [
        fates(faults, 8, "a-b", n) for n in range(99)
    ]


@pytest.mark.parametrize("wrong", [{"loss": 1.1}, {"duplication": -0.1}, {"held_s": 0}])
def test_a_share_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PacketFaults(**wrong)


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (PacketFaults(), "frames arrive as they were sent"),
        (PacketFaults(loss=0.01, delay_s=0.1), "frames 1 % lost, 0.1 s late"),
        (PacketFaults(reordering=0.5), "frames 50 % held back for 0.05 s"),
        (PacketFaults(jitter_s=0.2), "frames 0 to 0.2 s late"),
        (PacketFaults(cut=True, loss=1), "no frame arrives"),
    ],
)  # fmt: skip
def test_faults_read_like_a_sentence(faults: PacketFaults, says: str) -> None:
    assert str(faults) == says


# -- over real sockets ---------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a Unix address has room for 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="relay-") as made:
        yield Path(made)


def end_of(relay: PacketRelay, end: str) -> socket.socket:
    """A program of this host in a guest's place."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    relay.path(end, "own").unlink(missing_ok=True)
    made.bind(str(relay.path(end, "own")))
    made.connect(str(relay.path(end, "relay")))
    made.settimeout(10)
    return made


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def passed(folder: Path, faults: PacketFaults, count: int, seed: int) -> list[int]:
    """The numbers of the frames that arrive, in their order, when `count` are sent."""
    arriving = sum(len(fates(faults, seed, "a-b", number)) for number in range(count))
    with PacketRelay(folder, seed) as relay, end_of(relay, "a") as a, end_of(relay, "b") as b:
        relay.set(faults)
        for number in range(count):
            a.send(number.to_bytes(4, "big"))
            wait_for(lambda wanted=number + 1: relay.counts["a-b"]["in"] == wanted)
        got = [int.from_bytes(b.recv(100), "big") for _ in range(arriving)]
        b.settimeout(0.2)
        with pytest.raises(TimeoutError):
            b.recv(100)
        return got


@pytest.mark.parametrize("seed", [3, 4])
def test_the_same_frames_arrive_whenever_it_is_done_again(folder: Path, seed: int) -> None:
    faults = PacketFaults(loss=0.3, duplication=0.2)
    count = 200  # more than the kernel's queue for an end that does not read yet, often ten
    wanted = [n for n in range(count) for _ in fates(faults, seed, "a-b", n)]
    assert passed(folder, faults, count, seed) == wanted
    assert passed(folder, faults, count, seed) == wanted


def test_frames_that_are_held_back_are_overtaken(folder: Path) -> None:
    faults = PacketFaults(reordering=0.4, held_s=0.5)
    held = {n for n in range(6) if fates(faults, 5, "a-b", n)[0] > 0}
    assert held not in (set(), set(range(6)))
    got = passed(folder, faults, 6, 5)
    assert sorted(got) == list(range(6))
    assert got[: 6 - len(held)] == [n for n in range(6) if n not in held]


def test_a_cut_lets_nothing_through_and_can_be_mended(folder: Path) -> None:
    said: list[str] = []
    with (
        PacketRelay(folder, on_event=said.append) as relay,
        end_of(relay, "a") as a,
        end_of(relay, "b") as b,
    ):
        relay.set(PacketFaults(delay_s=0.3))
        a.send(b"under way")
        wait_for(lambda: relay.counts["a-b"]["late"] == 1)
        relay.set(PacketFaults(cut=True))
        a.send(b"lost")
        wait_for(lambda: relay.counts["a-b"]["lost"] == 1)
        b.settimeout(0.6)
        with pytest.raises(TimeoutError):
            b.recv(100)
        relay.set(PacketFaults())
        wait_for(lambda: len(said) == 3)
        a.send(b"again")
        b.settimeout(10)
        assert b.recv(100) == b"again"
        b.send(b"back")
        assert a.recv(100) == b"back"
    assert said[1:] == ["no frame arrives", "frames arrive as they were sent"]


def test_an_end_that_is_not_there_loses_frames_and_nothing_else(folder: Path) -> None:
    with PacketRelay(folder) as relay, end_of(relay, "a") as a:
        a.send(b"nobody")
        wait_for(lambda: relay.counts["a-b"]["refused"] == 1)
        with end_of(relay, "b") as b:
            a.send(b"somebody")
            assert b.recv(100) == b"somebody"


def test_a_queue_that_is_full_loses_what_comes_beyond(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framework.network.packets.MOST_HELD", 3)
    with PacketRelay(folder) as relay, end_of(relay, "a") as a:
        relay.set(PacketFaults(delay_s=30))
        for number in range(5):
            a.send(bytes([number]))
            wait_for(lambda wanted=number + 1: relay.counts["a-b"]["in"] == wanted)
        assert relay.totals()["full"] == 2


def test_a_folder_that_will_not_do_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(RelayError, match="no socket can be made"), PacketRelay(folder / "none"):
        pass
    long = folder / ("x" * 120)
    long.mkdir()
    with pytest.raises(RelayError, match="too long for a Unix socket"), PacketRelay(long):
        pass
    assert list(long.iterdir()) == []


# -- between two guests --------------------------------------------------------------------------

ADDRESSES = {"a": "10.9.0.1", "b": "10.9.0.2"}
SIZE_KIB = 2048
SERVE = (
    "import socket\n"
    "listener=socket.create_server(('0.0.0.0',80))\n"
    "while True:\n"
    " link=listener.accept()[0]\n"
    " file=open('/tmp/sent','rb')\n"
    " link.sendfile(file)\n"
    " link.close()\n"
)


class Guest(Machine):
    """A target's machine whose only network is the relay."""

    def __init__(self, images: Any, relay: PacketRelay, end: str, folder: Path) -> None:
        self._log_path = folder / f"{end}.log"
        self._end = end
        self._command = [
            *command_line(images, images.disk(), relay.netdev(end).replace(",id=net0", "")),
            *shlex.split("-snapshot -serial stdio"),
            *("-global", f"virtio-net-pci.mac=52:54:00:09:00:0{ord(end) - 96}"),
        ]

    def join(self) -> None:
        self.run(f"ip addr flush dev eth0; ip addr add {ADDRESSES[self._end]}/24 dev eth0")
        self.run("ip link set eth0 up")


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.night
def test_a_transfer_between_two_guests_survives_what_the_relay_does_to_it(
    folder: Path, tmp_path: Path
) -> None:
    """Two Linux guests and their TCP; the relay loses, doubles, delays and reorders frames."""
    images = build_target("qemu-arm64", ["v1"], relock_if_gone=True)
    with (
        PacketRelay(folder, seed=11) as relay,
        Guest(images, relay, "a", tmp_path) as a,
        Guest(images, relay, "b", tmp_path) as b,
    ):
        for guest in (a, b):
            guest.boot()
            guest.join()
        a.run(f"dd if=/dev/urandom of=/tmp/sent bs=1024 count={SIZE_KIB} 2>/dev/null")
        wanted = a.run("sha256sum < /tmp/sent").split()[0]
        a.run(f"python3.11 -S -c {shlex.quote(f'exec({SERVE!r})')} >/dev/null 2>&1 & sleep 1")
        fetch = f"nc {ADDRESSES['a']} 80 < /dev/null | sha256sum"
        times = {}
        for faults in (
            PacketFaults(),
            PacketFaults(loss=0.01),
            PacketFaults(loss=0.05, duplication=0.05, reordering=0.1, delay_s=0.005),
        ):
            relay.set(faults)
            before = dict(relay.totals())
            began = time.monotonic()
            assert b.run(fetch).split()[0] == wanted, f"{faults}: something else arrived"
            times[str(faults)] = time.monotonic() - began
            happened = {k: v - before.get(k, 0) for k, v in relay.totals().items()}
            print(f"{faults}: {times[str(faults)]:.1f} s, {happened}")
            assert happened["in"] > SIZE_KIB // 2, "it went another way"
            assert (happened.get("lost", 0) > 0) == (faults.loss > 0)
            assert (happened.get("doubled", 0) > 0) == (faults.duplication > 0)
        relay.set(PacketFaults(cut=True))
        told = b.run(f"timeout 5 nc {ADDRESSES['a']} 80 < /dev/null | wc -c")
        assert told.splitlines()[0] == "0", "something came through a cable that is cut"
        relay.set(PacketFaults())
        assert b.run(fetch).split()[0] == wanted
