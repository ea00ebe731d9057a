"""A line by which a shell on the device gets its orders while its console is busy.

The device connects to this machine and feeds what it receives to a shell; orders are sent when a
trigger fires. It works on every device that reaches this machine, needs nothing on it but `nc`, and
is gone after a restart.
"""

from __future__ import annotations

import contextlib
import socket
import threading

ACCEPT_TIMEOUT_S = 30.0


class OrderLineError(Exception):
    """The device did not come to fetch its orders, or is gone; the message says which."""


class OrderLine:
    """Listens for one device; a context manager.

    Args:
        host: the address to listen on.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((host, 0), backlog=1)
        self._listener.settimeout(ACCEPT_TIMEOUT_S)
        self.port = int(self._listener.getsockname()[1])
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()

    def shell_command(self, host_seen_by_device: str) -> str:
        """What the device runs, in the background, to come and fetch its orders."""
        receive = f"nc {host_seen_by_device} {self.port}"
        return f"({receive} | sh) </dev/null >/dev/null 2>&1 &"

    def wait_for_device(self) -> None:
        """Wait until the device has connected.

        Raises:
            OrderLineError: it has not, within its time.
        """
        try:
            self._connection, _ = self._listener.accept()
        except OSError as error:
            raise OrderLineError(
                f"the device did not connect to port {self.port} within {ACCEPT_TIMEOUT_S:g} s"
            ) from error
        self._connection.settimeout(ACCEPT_TIMEOUT_S)

    def send(self, order: str) -> None:
        """Have the device's shell run `order`; returns at once.

        Raises:
            OrderLineError: the device is not connected (any more).
        """
        with self._lock:
            if self._connection is None:
                raise OrderLineError("the device has not connected for its orders")
            try:
                self._connection.sendall(order.encode() + b"\n")
            except OSError as error:
                raise OrderLineError(f"the device is gone: {error.strerror}") from error

    def close(self) -> None:
        """End the line; the device's shell ends with it."""
        with self._lock:
            connection, self._connection = self._connection, None
        for one in (connection, self._listener):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.close()

    def __enter__(self) -> OrderLine:
        """Listen."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close on exit, whatever happened."""
        self.close()
