"""The fault proxy strikes at the byte it was told to, in the way it was told to."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from framework.network import FaultProxy, NetworkFault, ProxyError

SENT = bytes(i * 7 % 251 for i in range(300_000))


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    """A real TCP server that sends SENT to everybody and then closes."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.sendall(SENT)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()
    stopped.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@contextlib.contextmanager
def echo_server(greeting: bytes = b"") -> Iterator[tuple[str, int]]:
    """A real TCP server that greets and then sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(greeting)
            while chunk := connection.recv(1000):
                connection.sendall(chunk)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def receive(port: int, timeout_s: float = 5.0) -> tuple[bytes, str]:
    """All that a client gets, and how the stream ended."""
    got = bytearray()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
            while chunk := client.recv(65536):
                got += chunk
    except TimeoutError:
        return bytes(got), "silence"
    except ConnectionRefusedError:
        return bytes(got), "refused"
    except ConnectionResetError:
        return bytes(got), "reset"
    return bytes(got), "end"


def test_without_faults_everything_arrives(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        assert receive(proxy.port) == (SENT, "end")
        assert proxy.bytes_forwarded["down"] == len(SENT)


@pytest.mark.parametrize("at_byte", [0, 1, 65535, 65536, 65537, 299_999])
def test_a_clean_close_leaves_exactly_the_bytes_before_it(
    server: tuple[str, int], at_byte: int
) -> None:
    with FaultProxy(server) as proxy:
        fired = proxy.arm(NetworkFault("fin", at_byte))
        assert receive(proxy.port) == (SENT[:at_byte], "end")
        assert fired.is_set()
        assert receive(proxy.port) == (SENT, "end")


def test_bytes_are_counted_over_connections(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("fin", len(SENT) + 10))
        assert receive(proxy.port) == (SENT, "end")
        assert receive(proxy.port) == (SENT[:10], "end")


def test_a_fault_past_the_end_does_not_happen(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        fired = proxy.arm(NetworkFault("fin", len(SENT)))
        assert receive(proxy.port) == (SENT, "end")
        assert not fired.is_set()


def test_a_reset_is_seen_as_a_reset(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("reset", 1000))
        got, end = receive(proxy.port)
        assert end == "reset"
        assert SENT.startswith(got)


def test_a_stall_keeps_the_connection_and_sends_nothing(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("stall", 5000))
        assert receive(proxy.port, timeout_s=0.5) == (SENT[:5000], "silence")
        proxy.restore()
        assert receive(proxy.port) == (SENT, "end")


def test_a_stall_that_ends_loses_no_byte(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("stall", 5000, lasts_s=0.3))
        assert receive(proxy.port) == (SENT, "end")


def test_a_refusing_server_recovers_when_told(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("refuse", 100))
        assert receive(proxy.port)[1] == "reset"
        assert receive(proxy.port) == (b"", "refused")
        proxy.restore()
        assert receive(proxy.port) == (SENT, "end")


def test_exactly_one_byte_is_corrupted(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("corrupt", 70_000))
        got, end = receive(proxy.port)
    assert end == "end"
    assert [i for i, (a, b) in enumerate(zip(got, SENT, strict=True)) if a != b] == [70_000]


def test_a_fault_may_strike_several_times(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("fin", 100, times=3))
        assert [len(receive(proxy.port)[0]) for _ in range(4)] == [100, 100, 100, len(SENT)]


def test_a_port_in_use_is_one_clear_line(server: tuple[str, int]) -> None:
    with pytest.raises(ProxyError, match=rf"cannot listen on 127.0.0.1:{server[1]}.*port"):
        FaultProxy(server, listen_port=server[1]).start()


def test_closing_leaves_no_thread_behind(server: tuple[str, int]) -> None:
    proxy = FaultProxy(server).start()
    proxy.arm(NetworkFault("stall", 10))
    receive(proxy.port, timeout_s=0.2)
    proxy.close()
    assert not [t for t in threading.enumerate() if t.name == "fault-proxy"]


def test_exactly_one_byte_comes_twice(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("duplicate", 70_000))
        got, end = receive(proxy.port)
    assert end == "end"
    assert got == SENT[:70_001] + SENT[70_000:]


def test_a_corruption_that_repeats_strikes_at_every_nth_byte(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("corrupt", 1000, times=3))
        got, _ = receive(proxy.port)
    assert [i for i, (a, b) in enumerate(zip(got, SENT, strict=True)) if a != b] == [
        1000,
        2001,
        3002,
    ]


def test_two_faults_do_not_shift_each_other(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("corrupt", 100))
        proxy.arm(NetworkFault("watch", 150))
        proxy.arm(NetworkFault("fin", 200))
        got, _ = receive(proxy.port)
    assert len(got) == 200


def test_bytes_towards_the_server_are_counted_too() -> None:
    with echo_server() as address, FaultProxy(address) as proxy:
        fired = proxy.arm(NetworkFault("fin", 7, "up"))
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
            client.sendall(b"0123456789")
            got = b""
            while chunk := client.recv(100):
                got += chunk
        assert fired.is_set()
        assert b"0123456".startswith(got)
        assert proxy.bytes_forwarded["up"] == 7


def test_in_a_black_hole_a_new_connection_gets_no_answer(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("black-hole", 5000))
        assert receive(proxy.port, timeout_s=0.5) == (SENT[:5000], "silence")
        with pytest.raises(TimeoutError):
            socket.create_connection(("127.0.0.1", proxy.port), timeout=0.5)
        proxy.restore()
        assert receive(proxy.port) == (SENT, "end")


def test_a_black_hole_that_ends_lets_a_waiting_connection_through(
    server: tuple[str, int],
) -> None:
    with FaultProxy(server) as proxy:
        fired = proxy.arm(NetworkFault("black-hole", 0, lasts_s=0.5))
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=5):
            assert fired.wait(5)
        # The kernel tries again after a second, unasked.
        assert receive(proxy.port, timeout_s=10) == (SENT, "end")


def test_a_refusing_server_keeps_its_port(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        port = proxy.port
        for _ in range(3):
            proxy.strike(NetworkFault("refuse", 0))
            deadline = time.monotonic() + 5
            while receive(port)[1] != "refused":
                assert time.monotonic() < deadline, "it does not refuse"
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", port))
            proxy.restore()
            assert proxy.port == port
            assert receive(port) == (SENT, "end")


def test_a_refusal_may_strike_at_once_and_end_by_itself(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.strike(NetworkFault("refuse", 0, lasts_s=0.4))
        ends = set()
        while "end" not in ends:
            ends.add(receive(proxy.port)[1])
        # The strike comes from another thread: a connection may be there before it.
        assert {"refused", "end"} <= ends


def test_a_slow_network_loses_nothing(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.strike(NetworkFault("slow", 0, bytes_per_s=1_500_000))
        began = time.monotonic()
        assert receive(proxy.port) == (SENT, "end")
        # 300,000 bytes at 1.5 MB/s take at least 0.2 s, on the fastest machine too.
        assert time.monotonic() - began > 0.15


def test_what_waits_within_a_slow_network_strikes_at_its_byte(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        proxy.strike(NetworkFault("slow", 0, bytes_per_s=1_000_000))
        proxy.arm(NetworkFault("fin", 50_001))
        assert receive(proxy.port) == (SENT[:50_001], "end")


def test_another_server_answers_as_often_as_was_said(server: tuple[str, int]) -> None:
    with echo_server(greeting=b"other") as other, FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("divert", 100, upstream=other, connections=2))
        assert receive(proxy.port)[1] == "reset"
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
                assert client.recv(100) == b"other"
        assert receive(proxy.port) == (SENT, "end")


def test_whoever_watches_a_byte_is_told_and_nothing_happens(server: tuple[str, int]) -> None:
    told: list[int] = []
    with FaultProxy(server) as proxy:
        proxy.arm(NetworkFault("watch", 1234), lambda: told.append(proxy.bytes_forwarded["down"]))
        assert receive(proxy.port) == (SENT, "end")
    assert told == [1234]


def test_a_disarmed_fault_does_not_happen(server: tuple[str, int]) -> None:
    with FaultProxy(server) as proxy:
        fired = proxy.arm(NetworkFault("fin", 10))
        proxy.disarm(fired)
        assert receive(proxy.port) == (SENT, "end")
        assert not fired.is_set()


def test_closing_a_black_hole_leaves_no_thread_behind(server: tuple[str, int]) -> None:
    proxy = FaultProxy(server).start()
    proxy.strike(NetworkFault("black-hole", 0))
    proxy.close()
    assert not [t for t in threading.enumerate() if t.name == "fault-proxy"]
