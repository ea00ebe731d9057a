"""QMP, QEMU's monitor protocol, for threads: commands with a time-out, events as they come.

`qemu.qmp` speaks the protocol (QEMU docs/interop/qmp-spec) on asyncio; here one event loop in
one daemon thread serves all machines of the process. The connection is a socket that was made
before QEMU started, so nothing is polled for and no event is missed: QEMU sends events as soon
as the handshake ended, and the machine runs only after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from qemu.qmp import EventListener, QMPClient, QMPError, Runstate

__all__ = ["QmpConnection", "QmpFailure"]

_GRACE_S = 2.0

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_loops: dict[int, asyncio.AbstractEventLoop] = {}
_loops_lock = threading.Lock()


class QmpFailure(Exception):  # noqa: N818 - QMPError is the library's
    """A QMP command or the connection failed; the message says which and why."""


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of this process; a forked child gets one of its own."""
    with _loops_lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="qmp", daemon=True).start()
        return loop


def _call(coroutine: Coroutine[Any, Any, _T], timeout_s: float, what: str) -> _T:
    async def bounded() -> _T:
        return await asyncio.wait_for(coroutine, timeout_s)

    future = asyncio.run_coroutine_threadsafe(bounded(), _loop())
    try:
        return future.result(timeout_s + _GRACE_S)
    except TimeoutError as error:
        future.cancel()
        raise QmpFailure(f"QMP: {what}: no answer within {timeout_s:g} s") from error
    except (QMPError, OSError, EOFError) as error:
        raise QmpFailure(f"QMP: {what}: {str(error).splitlines()[0]}") from error


class QmpConnection:
    """One machine's monitor on a connected socket.

    `on_event(name, data, sent_s)` is called in the loop's thread for every event, in order, and
    must not block; `sent_s` is QEMU's own time of the event (seconds, UTC). `close()` (or
    QEMU's end) ends it; `ended` is set once no event can follow.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        name: str,
        timeout_s: float,
        on_event: Callable[[str, Mapping[str, Any], float], None],
    ) -> None:
        self.ended = threading.Event()
        self._closing = asyncio.Event()
        self._on_event = on_event
        self._client: Any = _call(self._connect(connection, name), timeout_s, "handshake")
        self._watch = asyncio.run_coroutine_threadsafe(self._watch_end(), _loop())

    async def _connect(self, connection: socket.socket, name: str) -> Any:
        client = QMPClient(name)
        # A filter that takes the event and refuses it: synchronous with the reader, so every
        # event has been handled when the end of the connection is noticed; nothing queues up.
        client.register_listener(EventListener(event_filter=self._take))
        connection.setblocking(False)
        await client.connect(connection)
        return client

    def _take(self, message: Any) -> bool:
        try:
            stamp = message["timestamp"]
            sent_s = stamp["seconds"] + stamp["microseconds"] / 1e6
            self._on_event(str(message["event"]), message.get("data", {}), sent_s)
        except Exception:  # noqa: BLE001 - an observer must not break the monitor
            _log.exception("QMP event handler failed on %s", message)
        return False

    async def _watch_end(self) -> None:
        """Disconnect once, when QEMU ends or `close` asks: the library allows no second call."""
        asked = asyncio.create_task(self._closing.wait())
        try:
            while self._client.runstate == Runstate.RUNNING and not asked.done():
                changed = asyncio.create_task(self._client.runstate_changed())
                await asyncio.wait({asked, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            with contextlib.suppress(QMPError, OSError, EOFError):  # how it ends when QEMU does
                await self._client.disconnect()
        finally:
            asked.cancel()
            self.ended.set()

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, timeout_s: float = 5.0
    ) -> Any:
        """Run one command and return its result; `QmpFailure` on error or time-out."""
        return _call(self._client.execute(command, arguments), timeout_s, command)

    def close(self) -> None:
        """Disconnect; returns when no further event can come (at most seconds)."""
        _loop().call_soon_threadsafe(self._closing.set)
        if not self.ended.wait(_GRACE_S):
            _log.warning("QMP: the connection did not end within %g s", _GRACE_S)
