"""The fault proxy strikes at the byte it was told to, in the way it was told to."""

import socket
import threading
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
