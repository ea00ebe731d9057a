r"""The console pump: drains a serial line for ever, off-thread, and lets tests look back.

Why a thread: a guest whose console nobody reads stops (about 1 MB of unread output blocks a
QEMU guest for good), and first boot output is lost when reading starts with the first `expect`.
So one thread reads from the moment a link is attached, stamps every line with both clocks
(monotonic for order, UTC for people), appends it to a log file that is flushed at every arrival
(it must survive the harness being killed), and wakes whoever waits.

The buffer is one sequence of bytes with absolute positions that spans power cycles: a position
taken before a stimulus is where to look from after it. The last `buffer_limit_bytes` are kept in
memory; older output is in the log file only.

Link states::

    (detached) --attach--> attached --end of file, not owned--> lost
        ^                    |  |
        '------detach--------'  '--lost(reason)--> lost --attach--> attached
                                             any --close--> closed (for good)

A *detached* pump keeps its waiters waiting: the owner is about to attach the next link, as the
QEMU driver does when a guest resets. A *lost* or *closed* one makes them all return at once with
`ConsoleLost`.

It doesn't interpret anything: no prompts, no logins, no terminal emulation.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self, TextIO

from framework.console.errors import ConsoleDeath, ConsoleError, ConsoleLost, ConsoleTimeout
from framework.console.patterns import DEFAULT_DEATHS, Marker, as_marker, as_markers
from framework.console.transports import Transport

__all__ = ["ConsoleMatch", "ConsolePump", "ConsoleSlice", "Death", "Line"]

_POLL_S = 0.25  # how long a partial line may stay unlogged, and a dead reader unnoticed
_WRITE_TIMEOUT_S = 10.0
_LINE_LIMIT_BYTES = 65536
_LINES_KEPT = 200_000
_TAIL_BYTES = 400
_JOIN_S = 5.0
_TERMINAL_CODES = re.compile(r"\x1b(?:\[[0-?]{0,16}[ -/]{0,4}[@-~]|[@-_])|[\x00\x07\x08]")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """One line of console traffic.

    `position` is the absolute offset of its first byte (for `TX`: where reception stood),
    `monotonic_ns` and `utc_ns` are when that byte arrived; `text` has neither line end nor
    terminal control codes; `generation` counts the links attached so far (boots, from 1).
    """

    direction: Literal["RX", "TX", "--"]
    position: int
    monotonic_ns: int
    utc_ns: int
    generation: int
    text: str


@dataclass(frozen=True)
class Death:
    """A death string seen: which marker, its text, and where it starts and ends."""

    marker: Marker
    text: str
    start: int
    end: int
    monotonic_ns: int


@dataclass(frozen=True)
class ConsoleMatch:
    """What `wait_for` found: which marker, where (absolute offsets), and its groups."""

    marker: Marker
    start: int
    end: int
    text: str
    groups: tuple[str, ...]

    def group(self, number: int) -> str:
        """Group `number` as in `re` (0 is the whole match; an unmatched group is "")."""
        return self.text if number == 0 else self.groups[number - 1]


@dataclass(frozen=True)
class ConsoleSlice:
    """A stretch of the console: bytes [`start`, `end`) and the lines that begin there.

    `missing` counts bytes at its beginning that memory no longer holds (see `log`).
    """

    start: int
    end: int
    data: bytes
    lines: tuple[Line, ...]
    missing: int
    log: Path | None

    @property
    def text(self) -> str:
        """The received text, without terminal codes, with a note if its beginning is gone."""
        note = f"[{self.missing} earlier bytes are only in {self.log}]\n" if self.missing else ""
        return note + clean_text(self.data)


def clean_text(data: bytes) -> str:
    """Decode console bytes for people: no terminal codes, newlines only, never an error."""
    text = data.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "")
    return _TERMINAL_CODES.sub("", text)


def format_line(line: Line, mark: str = "|") -> str:
    """One log line: UTC, monotonic seconds, direction, text."""
    utc = datetime.fromtimestamp(line.utc_ns / 1e9, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
    return f"{utc}Z {line.monotonic_ns / 1e9:15.6f} {line.direction}{mark} {line.text}\n"


def find_first(
    window: bytes, offset: int, markers: Sequence[Marker]
) -> tuple[Marker, re.Match[bytes]] | None:
    """The marker whose match in `window` (from `offset`) begins first; ties: the first listed."""
    found: tuple[Marker, re.Match[bytes]] | None = None
    for marker in markers:
        match = marker.compiled.search(window, offset)
        if match is not None and (found is None or match.start() < found[1].start()):
            found = (marker, match)
    return found


class ConsolePump:
    """Drains one console for ever; see the module text for states and promises.

    `name` is for messages; `log_path` gets every line with its times (None: no log);
    `deaths` are the markers that end any wait; `owned` says that someone attaches the next link
    after an end of file (else the end of a link is the loss of the console).
    """

    def __init__(
        self,
        name: str,
        *,
        log_path: Path | None = None,
        deaths: Sequence[str | bytes | Marker] = DEFAULT_DEATHS,
        owned: bool = False,
        buffer_limit_bytes: int = 16 << 20,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._deaths = tuple(as_marker(death) for death in deaths)
        self._death_overlap = max((death.width for death in self._deaths), default=1)
        self._owned = owned
        self._limit = buffer_limit_bytes
        self._changed = threading.Condition()
        self._write_lock = threading.Lock()
        self._buffer = bytearray()
        self._base = 0  # absolute position of _buffer[0]
        self._line = bytearray()
        self._line_start: tuple[int, int, int] | None = None  # position, monotonic, UTC
        self._line_shown = 0  # characters of the partial line that the log already has
        self._lines: deque[Line] = deque(maxlen=_LINES_KEPT)
        self._seen_deaths: list[Death] = []
        self._listeners: list[Callable[[Line], None]] = []
        self._transport: Transport | None = None
        self._reader: threading.Thread | None = None
        self._generation = 0
        self._generation_start = 0
        self._starts: list[int] = []
        self._last_rx_ns = time.monotonic_ns()
        self._gone: str | None = "nothing attached yet"
        self._closed = False
        self._file: TextIO | None = None
        if log_path is not None:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._file = log_path.open("a", encoding="utf-8", errors="replace")

    # -- the link ---------------------------------------------------------------------------

    def attach(self, transport: Transport) -> None:
        """Start draining `transport`; the previous link, if any, is detached first."""
        self.detach()
        with self._changed:
            if self._closed:
                transport.close()
                raise ConsoleLost("the pump is closed", log=self.log_path)
            self._transport = transport
            self._gone = None
            self._generation += 1
            self._generation_start = self._position()
            self._starts.append(self._generation_start)
            self._last_rx_ns = time.monotonic_ns()
            self._note(f"link {self._generation} attached")
            self._reader = threading.Thread(
                target=self._drain, args=(transport,), name=f"console-{self.name}", daemon=True
            )
            self._changed.notify_all()
        self._reader.start()

    def detach(self, *, drain_s: float = 0.0) -> None:
        """Let go of the link; waiters go on waiting for the next one.

        With `drain_s`, first wait that long for the other side's end of file, so that a dead
        machine's last words are in the buffer.
        """
        with self._changed:
            transport, reader = self._transport, self._reader
        if transport is None or reader is None:
            return
        if drain_s and reader is not threading.current_thread():
            reader.join(drain_s)
        with self._changed:
            if self._transport is transport:
                self._transport = None
                self._reader = None
            self._changed.notify_all()
        transport.close()
        if reader is not threading.current_thread():
            reader.join(_JOIN_S)

    def lost(self, reason: str, *, drain_s: float = 0.0) -> None:
        """The machine has no power or no line: detach, and end every wait with `ConsoleLost`."""
        self.detach(drain_s=drain_s)
        with self._changed:
            if self._gone is None:
                self._note(f"lost: {reason}")
            self._gone = reason
            self._changed.notify_all()

    def close(self) -> None:
        """Stop for good: thread ended, log closed, every wait ended. Idempotent."""
        self.lost("the pump was closed")
        with self._changed:
            self._closed = True
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- looking ----------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The absolute offset behind the last byte received."""
        with self._changed:
            return self._position()

    @property
    def generation(self) -> int:
        """How many links have been attached: for a driver of ours, how many boots."""
        with self._changed:
            return self._generation

    @property
    def generation_start(self) -> int:
        """The position at which the present (or last) link began."""
        with self._changed:
            return self._generation_start

    def links_since(self, position: int) -> int:
        """How many links began at or after a position."""
        with self._changed:
            return sum(1 for start in self._starts if start >= position)

    @property
    def gone(self) -> str | None:
        """Why the console is lost or closed; None while it is attached or between two links."""
        with self._changed:
            return self._gone

    @property
    def silent_s(self) -> float:
        """Seconds since the last byte was received."""
        with self._changed:
            return (time.monotonic_ns() - self._last_rx_ns) / 1e9

    def slice(self, start: int, end: int | None = None) -> ConsoleSlice:
        """Everything from `start` to `end` (default: now)."""
        with self._changed:
            stop = self._position() if end is None else min(end, self._position())
            begin = max(start, self._base)
            data = bytes(self._buffer[begin - self._base : max(begin, stop) - self._base])
            lines = tuple(line for line in self._lines if start <= line.position < stop)
            return ConsoleSlice(start, stop, data, lines, begin - start, self.log_path)

    def tail(self, length: int = _TAIL_BYTES) -> str:
        """The last `length` bytes, for messages."""
        with self._changed:
            return clean_text(bytes(self._buffer[-length:]))

    def deaths(self, since: int = 0) -> tuple[Death, ...]:
        """The death strings seen from position `since` on."""
        with self._changed:
            return tuple(death for death in self._seen_deaths if death.start >= since)

    def add_listener(self, listener: Callable[[Line], None]) -> Callable[[], None]:
        """Call `listener` for every complete line, in the pump's thread; returns its removal.

        It must not block: while it runs, nothing is drained. What it raises is logged.
        """
        with self._changed:
            self._listeners.append(listener)

        def remove() -> None:
            with self._changed, contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return remove

    # -- waiting ----------------------------------------------------------------------------

    def wait_for(
        self,
        pattern: str | bytes | Marker | Sequence[str | bytes | Marker],
        timeout_s: float,
        since: int | None = None,
        *,
        deaths: bool = True,
    ) -> ConsoleMatch:
        """Wait until `pattern` (or one of several) is in the output from position `since` on.

        `since` is an absolute position, normally `pump.position` taken *before* the stimulus;
        None means from now, which misses an answer that is already there. Raises
        `ConsoleTimeout`, `ConsoleDeath` (unless `deaths=False`) when a death string comes before
        the match, `ConsoleLost` when the line goes; a match that is in the buffer wins over a
        loss that came after it.
        """
        markers = as_markers(pattern)
        what = " or ".join(str(marker) for marker in markers)
        overlap = max(marker.width for marker in markers) - 1
        deadline = time.monotonic() + timeout_s
        with self._changed:
            start = self._position() if since is None else since
            scanned = start
            while True:
                scan_from = max(start, scanned - overlap, self._base)
                window = bytes(self._buffer[scan_from - self._base :])
                scanned = self._position()
                found = find_first(window, 0, markers)
                death = self._first_death(start) if deaths else None
                if found is not None:
                    marker, match = found
                    if death is None or scan_from + match.start() <= death.start:
                        return _as_match(marker, match, scan_from)
                if death is not None:
                    raise self._death_error(death, what)
                if self._gone is not None:
                    raise ConsoleLost(
                        f"{self._gone}, while waiting for {what}",
                        tail=self._tail(),
                        log=self.log_path,
                    )
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise ConsoleTimeout(what, timeout_s, tail=self._tail(), log=self.log_path)
                self._changed.wait(remaining)

    def read(
        self,
        since: int,
        timeout_s: float,
        limit_bytes: int | None = None,
        *,
        deaths_since: int | None = None,
        generation: int | None = None,
    ) -> tuple[bytes, int]:
        """The bytes from `since` on and the position behind them; `b""` on time-out.

        Ends at once with `ConsoleLost`, or with `ConsoleDeath` for a death string at or after
        `deaths_since` (None: don't look), but only after everything received before has been
        handed out. With `generation` the reader is bound to that boot: what later links received
        is not handed out, and their beginning is a loss; without it a restart is no death.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                begin = max(since, self._base)
                restarted = generation is not None and self._generation != generation
                end = self._generation_start if restarted else self._position()
                if end > begin:
                    stop = end if limit_bytes is None else min(end, begin + limit_bytes)
                    return bytes(self._buffer[begin - self._base : stop - self._base]), stop
                death = (
                    None
                    if deaths_since is None
                    else self._first_death(deaths_since, restarts=generation is not None)
                )
                if death is not None:
                    raise self._death_error(death, "")
                if restarted:
                    raise ConsoleLost("the machine restarted", tail=self._tail(), log=self.log_path)
                if self._gone is not None:
                    raise ConsoleLost(self._gone, tail=self._tail(), log=self.log_path)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return b"", since
                self._changed.wait(remaining)

    def wait_silence(self, quiet_s: float, timeout_s: float) -> bool:
        """Wait until nothing was received for `quiet_s`; False if it never was in `timeout_s`.

        A lost or closed console is silent at once: nothing can come from it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                now_ns = time.monotonic_ns()
                quiet_in_s = quiet_s - (now_ns - self._last_rx_ns) / 1e9
                if self._gone is not None or quiet_in_s <= 0:
                    return True
                remaining = deadline - now_ns / 1e9
                if remaining <= 0:
                    return False
                self._changed.wait(min(quiet_in_s, remaining))

    # -- writing ----------------------------------------------------------------------------

    def write(self, data: bytes) -> int:
        """Send `data`; returns its length. `ConsoleLost` if there is no line to send it on."""
        with self._changed:
            transport, gone = self._transport, self._gone
            if transport is None or gone is not None:
                reason = gone or "between two links"
                raise ConsoleLost(f"cannot send: {reason}", tail=self._tail(), log=self.log_path)
            self._flush_partial()
            self._log_tx(data)
        try:
            with self._write_lock:
                transport.write(data, _WRITE_TIMEOUT_S)
        except TimeoutError as error:
            raise ConsoleError(
                f"console: the machine does not take input ({error})",
                tail=self.tail(),
                log=self.log_path,
            ) from error
        except EOFError as error:
            raise ConsoleLost(
                f"cannot send: {error}", tail=self.tail(), log=self.log_path
            ) from error
        return len(data)

    def sendline(self, line: str) -> int:
        """Send `line` and a newline; returns the position to look for the answer from."""
        position = self.position
        self.write(line.encode() + b"\n")
        return position

    def note(self, text: str) -> None:
        """Put a remark of the harness into the log and the lines (direction `--`)."""
        with self._changed:
            self._note(text)

    # -- the pump's own thread ---------------------------------------------------------------

    def _drain(self, transport: Transport) -> None:
        while True:
            try:
                data = transport.read(_POLL_S)
            except EOFError as error:
                self._link_ended(transport, str(error))
                return
            except Exception as error:  # noqa: BLE001
                # Whatever a foreign driver raises, a reader must not die silently.
                _log.exception("console %s: reading failed", self.name)
                self._link_ended(transport, f"{type(error).__name__}: {error}")
                return
            if data:
                self._receive(data)
            with self._changed:
                if self._transport is not transport:
                    return
                if not data:
                    self._flush_partial()

    def _link_ended(self, transport: Transport, reason: str) -> None:
        complete: list[Line] = []
        with self._changed:
            if self._line_start is not None:  # nothing will ever complete it
                complete.append(self._finish_line())
                self._flush_log()
            if self._transport is transport:
                self._note(f"link ended: {reason}")
                if not self._owned:
                    self._gone = f"the line ended ({reason})"
            listeners = tuple(self._listeners)
            self._changed.notify_all()
        self._tell(complete, listeners)

    def _receive(self, data: bytes) -> None:
        monotonic_ns, utc_ns = time.monotonic_ns(), time.time_ns()
        with self._changed:
            start = self._position()
            self._buffer += data
            if len(self._buffer) > self._limit:
                drop = len(self._buffer) - self._limit
                del self._buffer[:drop]
                self._base += drop
            self._last_rx_ns = monotonic_ns
            self._look_for_deaths(start, monotonic_ns)
            complete = self._split_lines(data, start, monotonic_ns, utc_ns)
            self._flush_log()
            listeners = tuple(self._listeners)
            self._changed.notify_all()
        self._tell(complete, listeners)

    def _tell(self, complete: Sequence[Line], listeners: Sequence[Callable[[Line], None]]) -> None:
        for line in complete:
            for listener in listeners:
                try:
                    listener(line)
                except Exception:  # noqa: BLE001
                    # A listener's mistake must not stop the drain: that would stall the guest.
                    _log.exception("console %s: listener failed on %r", self.name, line.text)

    def _look_for_deaths(self, start: int, monotonic_ns: int) -> None:
        if not self._deaths:
            return
        window_from = max(start - self._death_overlap + 1, self._base, self._generation_start)
        window = bytes(self._buffer[window_from - self._base :])
        offset = 0
        last = self._seen_deaths[-1].start if self._seen_deaths else -1
        while (found := find_first(window, offset, self._deaths)) is not None:
            marker, match = found
            begin = window_from + match.start()
            text = clean_text(match.group())
            if begin > last:
                self._seen_deaths.append(
                    Death(marker, text, begin, window_from + match.end(), monotonic_ns)
                )
            elif begin == last:  # the same death, of which more has arrived
                self._seen_deaths[-1] = Death(
                    marker, text, begin, window_from + match.end(), monotonic_ns
                )
            offset = match.end()

    def _split_lines(self, data: bytes, start: int, monotonic_ns: int, utc_ns: int) -> list[Line]:
        complete: list[Line] = []
        offset = 0
        while offset < len(data):
            if self._line_start is None:
                self._line_start = (start + offset, monotonic_ns, utc_ns)
            newline = data.find(b"\n", offset)
            stop = len(data) if newline < 0 else newline + 1
            self._line += data[offset:stop]
            offset = stop
            if newline >= 0 or len(self._line) >= _LINE_LIMIT_BYTES:
                complete.append(self._finish_line())
        return complete

    def _finish_line(self) -> Line:
        assert self._line_start is not None
        position, monotonic_ns, utc_ns = self._line_start
        text = clean_text(bytes(self._line)).rstrip("\n")
        line = Line("RX", position, monotonic_ns, utc_ns, self._generation, text)
        self._lines.append(line)
        if self._line_shown:
            rest = Line("RX", position, monotonic_ns, utc_ns, 0, text[self._line_shown :])
            if rest.text:
                self._log_line(rest, "+")
        else:
            self._log_line(line)
        self._line.clear()
        self._line_start = None
        self._line_shown = 0
        return line

    def _flush_partial(self) -> None:
        """Log what a line has so far (a prompt has no line end), and only what is new of it."""
        if self._line_start is None:
            return
        position, monotonic_ns, utc_ns = self._line_start
        text = clean_text(bytes(self._line))
        if len(text) > self._line_shown:
            part = Line("RX", position, monotonic_ns, utc_ns, 0, text[self._line_shown :])
            self._log_line(part, "+" if self._line_shown else "|")
            self._line_shown = len(text)
            self._flush_log()

    def _log_tx(self, data: bytes) -> None:
        text = clean_text(data).rstrip("\n") if data.strip(b"\r\n\t ") else repr(data)
        self._add_line("TX", text)

    def _note(self, text: str) -> None:
        self._flush_partial()
        self._add_line("--", text)

    def _add_line(self, direction: Literal["TX", "--"], text: str) -> None:
        line = Line(
            direction,
            self._position(),
            time.monotonic_ns(),
            time.time_ns(),
            self._generation,
            text,
        )
        self._lines.append(line)
        self._log_line(line)
        self._flush_log()

    def _log_line(self, line: Line, mark: str = "|") -> None:
        if self._file is not None:
            try:
                self._file.write(format_line(line, mark))
            except OSError as error:
                self._give_up_log(error)

    def _flush_log(self) -> None:
        """Hand the log to the kernel: then it survives the end of this process."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up_log(error)

    def _give_up_log(self, error: OSError) -> None:
        """A full disk must stop neither the drain nor the test; say it once and go on."""
        _log.error("console %s: log %s: %s", self.name, self.log_path, error)
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    # -- under the lock ----------------------------------------------------------------------

    def _position(self) -> int:
        return self._base + len(self._buffer)

    def _tail(self) -> str:
        return clean_text(bytes(self._buffer[-_TAIL_BYTES:]))

    def _first_death(self, since: int, *, restarts: bool = True) -> Death | None:
        for death in self._seen_deaths:
            if death.start >= since and (restarts or not death.marker.restart):
                return death
        return None

    def _death_error(self, death: Death, what: str) -> ConsoleDeath:
        return ConsoleDeath(
            death.text,
            death.start,
            waiting_for=what,
            tail=self._tail(),
            log=self.log_path,
        )


def _as_match(marker: Marker, match: re.Match[bytes], offset: int) -> ConsoleMatch:
    groups = tuple(
        "" if group is None else group.decode("utf-8", errors="replace") for group in match.groups()
    )
    text = match.group().decode("utf-8", errors="replace")
    return ConsoleMatch(marker, offset + match.start(), offset + match.end(), text, groups)
