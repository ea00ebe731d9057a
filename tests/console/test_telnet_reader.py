"""pySerial's RFC 2217 reader, whose connection breaks while it answers a negotiation."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import serial.rfc2217

from framework.console.transports import end_reader_quietly
from framework.targets.rig import load_rig

IAC, DO, WILL, SB, SE = 255, 253, 251, 250, 240
RIG = """
targets:
  main:
    resources:
      NetworkSerialPort: {{host: 127.0.0.1, port: {port}}}
    drivers:
      SerialDriver: {{}}
      ConsolePumpDriver: {{}}
imports: [framework.console.driver]
"""


class Server:
    """Accepts options until it is told to break in the middle of one."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.connection: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self.connection, _ = self.listener.accept()
        held = b""
        while data := self.connection.recv(4096):
            held += data
            while len(held) >= 3 and held[0] == IAC:
                if held[1] == SB:
                    end = held.find(bytes((IAC, SE)))
                    if end < 0:
                        break
                    # The server's answer to a setting has its number plus 100.
                    answer = bytearray(held[: end + 2])
                    answer[3] += 100
                    self.connection.sendall(bytes(answer))
                    held = held[end + 2 :]
                    continue
                self.connection.sendall(bytes((IAC, WILL if held[1] == DO else DO, held[2])))
                held = held[3:]

    def close(self) -> None:
        self.listener.close()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def raised(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    caught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)
    return caught


def break_it(port: serial.rfc2217.Serial, server: Server) -> None:
    """The connection breaks just when the reader has to answer."""

    def broken(data: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    port._internal_raw_write = broken
    assert server.connection is not None
    server.connection.sendall(bytes((IAC, DO, 99)))  # an option that must be refused
    deadline = time.monotonic() + 10
    while port._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not port._thread.is_alive()


def test_without_us_it_ends_with_an_unhandled_error(raised: list[Any]) -> None:
    server = Server()
    port = serial.rfc2217.Serial(f"rfc2217://127.0.0.1:{server.port}?timeout=5")
    break_it(port, server)
    assert [each.exc_type for each in raised] == [BrokenPipeError]
    server.close()


def test_it_ends_as_at_an_end_of_file(raised: list[Any]) -> None:
    server = Server()
    port = serial.rfc2217.Serial()
    end_reader_quietly(port)
    port.port = f"rfc2217://127.0.0.1:{server.port}?timeout=5"
    port.open()
    break_it(port, server)
    assert port._read_buffer.get(timeout=5) is None
    assert not raised
    port.close()
    server.close()


def test_a_pump_over_labgrids_driver_says_that_the_line_is_lost(
    raised: list[Any], tmp_path: Path
) -> None:
    server = Server()
    path = tmp_path / "rig.yaml"
    path.write_text(RIG.format(port=server.port))
    target = load_rig(path).get_target()
    console = target.get_driver("ConsolePumpDriver")
    break_it(console.port.serial, server)
    deadline = time.monotonic() + 10
    while console.pump.gone is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert console.pump.gone is not None
    assert not raised
    server.close()
    target.deactivate_all_drivers()
