"""Fetch an artifact: from a local file, or over HTTPS with ranged resume.

HTTPS only, TLS 1.2 or newer, certificate and host name checked against the pinned CA. A broken
connection is resumed at the byte that was reached: 206, an exact Content-Range and an unchanged
total are required (RFC 9110 §14), and If-Range guards against a changed file. Every wait has a
time-out, consecutive failures are counted, a server that trickles is left, and the whole download
has a deadline. Pauses grow with full jitter, and are as long as `Retry-After` asks. A slow download
goes through the spool (`spool.py`), so that the next process or boot resumes it too. A link that
has expired is replaced by `refresh`. Redirects are not followed, and a web page where an artifact
should be is named for what it is. http.client and ssl are imported when a URL is opened: a boot
needs neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from updater.device.config import DownloadConfig
from updater.device.console import say
from updater.device.errors import DeadlineError, TransportError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import http.client
    import ssl
    from collections.abc import Callable

    from updater.device.ports import Clock, Download
    from updater.device.spool import Spool

_READ_BYTES = 64 * 1024
_AT_ONCE_S = 0.02
"""How long records are collected before they are handed on."""


class FileOrHttpsTransport:
    """Opens paths and https URLs."""

    def __init__(
        self,
        ca_file: str | None,
        bounds: DownloadConfig,
        clock: Clock,
        spool_dir: str = "",
        before_tls: Callable[[], None] | None = None,
    ) -> None:
        self._ca_file = ca_file
        self._bounds = bounds
        self._clock = clock
        self._spool_dir = spool_dir
        self._before_tls = before_tls
        self.identity = ""
        """What the next location stands for, if not for itself (a deployment's id)."""
        self.refresh: Callable[[], str] | None = None
        """Returns a new location for the same artifact when a link has expired."""

    @contextmanager
    def open(self, location: str) -> Iterator[Download]:
        """Open `location` for reading from its start."""
        if "://" not in location:
            try:
                file = open(location, "rb", buffering=0)  # noqa: PTH123, SIM115
            except OSError as error:
                raise TransportError(f"{location}: {error.strerror}") from error
            with file:
                yield _File(file.readinto, location)
            return
        if self._before_tls is not None:
            self._before_tls()
        spool = None
        if self._spool_dir:
            from updater.device.spool import Spool  # noqa: PLC0415

            spool = Spool(self._spool_dir)
        download = _HttpsDownload(location, self._ca_file, self._bounds, self._clock, spool)
        download.identity = self.identity or location.partition("?")[0]
        download.refresh = self.refresh
        try:
            yield download
        except BaseException as error:
            download.close()
            # What the network or a signal ended goes on later; what was found wrong does not.
            resumable = isinstance(error, TransportError | DeadlineError)
            if spool is not None:
                spool.close() if resumable or not isinstance(error, Exception) else spool.discard()
            raise
        download.close()
        if spool is not None:
            spool.discard()


class _File:
    """A local file."""

    def __init__(self, read: Reader, location: str) -> None:
        self._read = read
        self._location = location

    def readinto(self, buffer: memoryview, /) -> int:
        try:
            return self._read(buffer) or 0
        except OSError as error:
            raise TransportError(f"{self._location}: read failed: {error.strerror}") from error


if TYPE_CHECKING:
    Reader = Callable[[memoryview], int | None]


class _BrokenError(Exception):
    """This attempt failed in a way that another one may not."""

    def __init__(self, text: str, retry_after_s: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class _RefreshedError(Exception):
    """The location is a new one: try at once."""


class _HttpsDownload:
    """One download over as many connections as it takes."""

    def __init__(
        self,
        url: str,
        ca_file: str | None,
        bounds: DownloadConfig,
        clock: Clock,
        spool: Spool | None,
    ) -> None:
        self._bounds = bounds
        self._clock = clock
        self._spool = spool
        self._aim(url)
        self._context = tls_context(ca_file)
        self._deadline = clock.monotonic() + bounds.deadline_s
        self._connection: http.client.HTTPSConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._total: int | None = None
        self._validator = ""
        self._received = 0
        self._failures = 0
        self._refreshed = 0
        self._window = (0.0, 0)
        self._begun = False
        self._replay_at: int | None = None
        self._held: bytearray | None = None
        self._spooling = False
        self._late: OSError | None = None
        self._sample = (clock.monotonic(), 0)
        self.identity = url
        self.refresh: Callable[[], str] | None = None

    def _aim(self, url: str) -> None:
        from urllib.parse import urlsplit  # noqa: PLC0415

        parts = urlsplit(url)
        if parts.scheme != "https":
            raise TransportError(f"{url}: only https is allowed")
        try:
            port = parts.port or 443
        except ValueError as error:
            raise TransportError(f"{url}: malformed port") from error
        if not parts.hostname or parts.username is not None or not url.isascii() or " " in url:
            raise TransportError(f"{url}: malformed URL")
        self._url = url
        self._host, self._port = parts.hostname, port
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def close(self) -> None:
        """Drop the connection."""
        connection, self._connection, self._response = self._connection, None, None
        self._late = None
        if connection is not None:
            connection.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Return the next bytes, through as many reconnects as the bounds allow."""
        import http.client  # noqa: PLC0415
        import ssl  # noqa: PLC0415

        if not self._begun:
            self._begun = True
            self._find_checkpoint()
        while self._received != self._total or self._replay_at is not None:
            try:
                if self._replay_at is not None and self._total is not None:
                    return self._replay(buffer)
                if self._response is None:
                    self._connect()
                    continue
                return self._receive(buffer)
            except ssl.SSLCertVerificationError as error:
                raise TransportError(
                    f"{self._url}: the server's certificate is not trusted: {error.verify_message}"
                ) from error
            except _RefreshedError:
                self.close()
            except (OSError, http.client.HTTPException, _BrokenError) as error:
                self.close()
                self._back_off(error)
        return 0

    # The spool.

    def _find_checkpoint(self) -> None:
        """Begin where an earlier process or boot had come to, if that is known."""
        found = self._spool.find(self.identity) if self._spool is not None else None
        if found is not None:
            self._received = found.size
            self._validator = found.validator
            self._expected_total = found.total
            self._replay_at = 0
            self._spooling = True
            if found.size == found.total:
                # Everything is there; the last byte is asked for to see that it is still the same.
                self._received -= 1
                self._spooling = False
        elif self._spool is not None:
            self._held = bytearray()

    def _replay(self, buffer: memoryview) -> int:
        """Hand out again what is on the disk; the server has confirmed that it is still valid."""
        assert self._spool is not None
        assert self._replay_at is not None
        limit = min(_READ_BYTES, self._received - self._replay_at)
        count = self._spool.read(self._replay_at, buffer[:limit])
        if count == 0:
            raise TransportError(f"{self._url}: what was downloaded before cannot be read")
        self._replay_at += count
        if self._replay_at == self._received:
            self._replay_at = None
            # The time that the replay took says nothing about the server.
            self._window = (self._clock.monotonic(), self._received)
        return count

    def _start_again(self) -> None:
        """Forget the checkpoint: the server has something else."""
        say(f"{self._url}: the file changed since the download was interrupted; starting again")
        assert self._spool is not None
        self._spool.discard()
        self._received = 0
        self._validator = ""
        self._replay_at = None
        self._spooling = False
        self._held = bytearray()

    def _keep(self, data: memoryview) -> None:
        """Spool what arrived, once it is clear that the download is slow."""
        if self._spool is None:
            return
        if self._spooling:
            self._spool.append(data)
            return
        if self._held is None:
            return
        self._held += data
        from updater.device import spool  # noqa: PLC0415

        if len(self._held) < spool.HOLD_BYTES:
            if len(self._held) <= spool.HOLD_BYTES // 2:
                self._sample = (self._clock.monotonic(), len(self._held))
            return
        assert self._total is not None
        held, self._held = bytes(self._held), None
        since, at = self._sample
        elapsed = self._clock.monotonic() - since
        free = self._spool.free_bytes()
        if spool.worth_it(self._total, len(held) - at, elapsed, free, self._bounds.spool_min_s):
            self._spooling = True
            self._spool.begin(self.identity, self._total, self._validator, held)

    # The network.

    def _receive(self, buffer: memoryview) -> int:
        assert self._response is not None
        assert self._total is not None
        limit = min(len(buffer), self._total - self._received, _READ_BYTES)
        count = self._read_into(self._response, buffer[:limit])
        if not count:
            raise _BrokenError("the server closed the connection")
        self._received += count
        self._failures = self._refreshed = 0
        self._keep(buffer[:count])
        self._check_pace()
        return count

    def _read_into(self, response: http.client.HTTPResponse, buffer: memoryview) -> int:
        """Read straight into `buffer`, as much of it as comes at once; 0 at the response's end.

        One receive brings one TLS record, at most 16 KiB, and on a small processor all that is done
        with it costs more than itself; so do `read1`'s new objects. A slow server isn't waited for.
        """
        if self._late is not None:
            raise self._late
        if response.chunked or response.length is None:
            data = response.read1(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        buffer = buffer[: response.length]
        got = 0
        until = time.monotonic() + _AT_ONCE_S
        try:
            while got < len(buffer) and (count := response.fp.readinto1(buffer[got:])):
                got += count
                if time.monotonic() >= until:
                    break
        except OSError as error:
            if not got:
                raise
            self._late = error  # what came before it is good
        response.length -= got
        return got

    def _check_pace(self) -> None:
        """Leave a server that only trickles: each stall period must bring some bytes."""
        now = self._clock.monotonic()
        since, at = self._window
        if now - since < self._bounds.stall_s:
            return
        self._window = (now, self._received)
        if since and self._received - at < self._bounds.stall_bytes:
            # The bytes that did come are kept; the next request goes on behind them.
            self.close()
            self._back_off(
                _BrokenError(
                    f"only {self._received - at} bytes in {now - since:.0f} s: the download stalls"
                ),
                keep_count=True,
            )

    def _connect(self) -> None:
        import http.client  # noqa: PLC0415

        self._connection = http.client.HTTPSConnection(
            self._host, self._port, timeout=self._bounds.timeout_s, context=self._context
        )
        headers = {"Accept-Encoding": "identity", "User-Agent": "brownout-updater"}
        if self._received:
            headers["Range"] = f"bytes={self._received}-"
            if self._validator:
                headers["If-Range"] = self._validator
        self._connection.request("GET", self._target, headers=headers)
        response = self._connection.getresponse()
        from_checkpoint = self._replay_at is not None and self._total is None
        if from_checkpoint and response.status in (200, 416):
            self._start_again()
            if response.status == 416:
                raise _BrokenError("the server has another file now")
        if from_checkpoint and self._received:
            self._total = self._expected_total
            try:
                self._check_resumed(response)
            except BaseException:
                self._total = None
                raise
        elif self._received:
            self._check_resumed(response)
        else:
            self._check_first(response)
        self._response = response
        self._window = (self._clock.monotonic(), self._received)

    def _check_first(self, response: http.client.HTTPResponse) -> None:
        self._check_status(response, 200)
        if (response.getheader("Content-Type") or "").lower().startswith("text/html"):
            raise TransportError(
                f"{self._url}: a web page came instead of an artifact; is there a captive portal"
                " or a proxy in between?"
            )
        length = response.getheader("Content-Length") or ""
        if not (length.isascii() and length.isdigit() and len(length) <= 15) or response.getheader(
            "Transfer-Encoding"
        ):
            raise TransportError(f"{self._url}: the server does not say how long the file is")
        total = int(length)
        if self._total is not None and total != self._total:
            raise TransportError(f"{self._url}: the file changed during the download")
        self._total = total
        validator = response.getheader("ETag") or ""
        self._validator = "" if validator.startswith("W/") else validator

    def _check_resumed(self, response: http.client.HTTPResponse) -> None:
        if response.status == 200:
            raise TransportError(
                f"{self._url}: cannot resume at byte {self._received}: the file changed or the"
                " server does not support ranges"
            )
        self._check_status(response, 206)
        assert self._total is not None
        expected = f"bytes {self._received}-{self._total - 1}/{self._total}"
        actual = response.getheader("Content-Range")
        if actual != expected:
            raise TransportError(
                f"{self._url}: cannot resume: Content-Range is {actual!r}, expected {expected!r}"
            )

    def _check_status(self, response: http.client.HTTPResponse, expected: int) -> None:
        status = response.status
        if status == expected:
            return
        if status in (408, 425, 429) or status >= 500:
            if status == 511:
                raise TransportError(f"{self._url}: a captive portal wants a login (511)")
            raise _BrokenError(f"the server answered {status}", retry_after(response))
        if status in (401, 403, 404, 410) and self.refresh is not None:
            self._refreshed += 1
            if self._refreshed <= _MAX_REFRESHES:
                self._aim(self.refresh())
                say(f"the link has expired ({status}), a new one was fetched")
                raise _RefreshedError
        raise TransportError(
            f"{self._url}: the server answered {status} instead of {expected}"
            + (" (redirects are not followed; a captive portal?)" if 300 <= status < 400 else "")
        )

    def _back_off(self, error: Exception, *, keep_count: bool = False) -> None:
        """Wait before the next attempt, or give up."""
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self._failures += 1
        if keep_count:
            self._stalls += 1
            self._failures = max(self._failures, self._stalls)
        where = f"at byte {self._received}" + (f" of {self._total}" if self._total else "")
        if self._failures > self._bounds.retries:
            raise TransportError(
                f"{self._url}: gave up {where} after {self._failures} attempts: {cause}"
            ) from error
        delay = backoff(self._failures, self._bounds.backoff_s, self._bounds.backoff_ceiling_s)
        if isinstance(error, _BrokenError):
            delay = max(delay, error.retry_after_s)
        if self._clock.monotonic() + delay > self._deadline:
            raise TransportError(f"{self._url}: deadline passed {where}: {cause}") from error
        say(
            f"download interrupted {where} ({cause}); "
            f"attempt {self._failures} of {self._bounds.retries} to resume"
        )
        self._clock.wait(delay)

    _stalls = 0
    _expected_total = 0


# In a row, without a byte in between.
_MAX_REFRESHES = 5


def backoff(failures: int, first_s: float, ceiling_s: float) -> float:
    """Return a pause: full jitter under a doubling bound, but never next to nothing."""
    import random  # noqa: PLC0415

    bound = min(ceiling_s, first_s * 2.0 ** (min(failures, 30) - 1))
    return max(bound / 10, random.uniform(0.0, bound))  # noqa: S311 - spreads a fleet, no secret


def retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds that the server asks to wait; 0 when it does not say."""
    text = (response.getheader("Retry-After") or "").strip()
    if text.isascii() and text.isdigit() and len(text) < 8:
        return float(text)
    if text:
        import time  # noqa: PLC0415
        from email.utils import parsedate_to_datetime  # noqa: PLC0415

        try:
            at: float = parsedate_to_datetime(text).timestamp()
        except (ValueError, TypeError):
            return 0.0
        return max(0.0, at - time.time())
    return 0.0


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that checks certificate and host name against the pinned CA."""
    import ssl  # noqa: PLC0415

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise TransportError(f"{ca_file}: not a usable CA certificate: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
