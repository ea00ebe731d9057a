"""Fetch an artifact: from a local file, or over HTTPS with ranged resume.

HTTPS only, TLS 1.2 or newer, certificate and host name checked against the pinned CA. A broken
connection is resumed at the byte that was reached: 206, an exact Content-Range and an unchanged
total are required (RFC 9110 §14), and If-Range guards against a changed file. Every wait has a
time-out, consecutive failures are counted, and the whole download has a deadline. Redirects are
not followed. http.client and ssl are imported when a URL is opened: a boot needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from updater.device.config import DownloadConfig
from updater.device.console import say
from updater.device.errors import TransportError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import http.client
    import ssl

    from updater.device.ports import Clock, Download

# One read returns at most a TLS record (16 KiB); a larger buffer would lose what had arrived
# when the connection breaks.
_READ_BYTES = 64 * 1024


class FileOrHttpsTransport:
    """Opens paths and https URLs."""

    def __init__(self, ca_file: str | None, bounds: DownloadConfig, clock: Clock) -> None:
        self._ca_file = ca_file
        self._bounds = bounds
        self._clock = clock

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
        download = _HttpsDownload(location, self._ca_file, self._bounds, self._clock)
        try:
            yield download
        finally:
            download.close()


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
    from collections.abc import Callable

    Reader = Callable[[memoryview], int | None]


class _BrokenError(Exception):
    """This attempt failed in a way that another one may not."""


class _HttpsDownload:
    """One download over as many connections as it takes."""

    def __init__(self, url: str, ca_file: str | None, bounds: DownloadConfig, clock: Clock) -> None:
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
        self._bounds = bounds
        self._clock = clock
        self._context = _tls_context(ca_file)
        self._deadline = clock.monotonic() + bounds.deadline_s
        self._connection: http.client.HTTPSConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._total: int | None = None
        self._validator = ""
        self._received = 0
        self._failures = 0

    def close(self) -> None:
        """Drop the connection."""
        connection, self._connection, self._response = self._connection, None, None
        if connection is not None:
            connection.close()

    def readinto(self, buffer: memoryview, /) -> int:
        """Return the next bytes, through as many reconnects as the bounds allow."""
        import http.client  # noqa: PLC0415
        import ssl  # noqa: PLC0415

        while self._received != self._total:
            try:
                if self._response is None:
                    self._connect()
                return self._receive(buffer)
            except ssl.SSLCertVerificationError as error:
                raise TransportError(
                    f"{self._url}: the server's certificate is not trusted: {error.verify_message}"
                ) from error
            except (OSError, http.client.HTTPException, _BrokenError) as error:
                self.close()
                self._back_off(error)
        return 0

    def _receive(self, buffer: memoryview) -> int:
        assert self._response is not None
        assert self._total is not None
        limit = min(len(buffer), self._total - self._received, _READ_BYTES)
        data = self._response.read1(limit)
        if not data:
            raise _BrokenError("the server closed the connection")
        buffer[: len(data)] = data
        self._received += len(data)
        self._failures = 0
        return len(data)

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
        if self._received:
            self._check_resumed(response)
        else:
            self._check_first(response)
        self._response = response

    def _check_first(self, response: http.client.HTTPResponse) -> None:
        self._check_status(response, 200)
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
            raise _BrokenError(f"the server answered {status}")
        raise TransportError(
            f"{self._url}: the server answered {status} instead of {expected}"
            + (" (redirects are not followed)" if 300 <= status < 400 else "")
        )

    def _back_off(self, error: Exception) -> None:
        """Wait before the next attempt, or give up."""
        cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
        self._failures += 1
        where = f"at byte {self._received}" + (f" of {self._total}" if self._total else "")
        if self._failures > self._bounds.retries:
            raise TransportError(
                f"{self._url}: gave up {where} after {self._failures} attempts: {cause}"
            ) from error
        delay = min(
            self._bounds.backoff_ceiling_s, self._bounds.backoff_s * 2 ** (self._failures - 1)
        )
        import random  # noqa: PLC0415

        delay *= random.uniform(0.5, 1.0)  # noqa: S311 - spreads a fleet, no secret
        if self._clock.monotonic() + delay > self._deadline:
            raise TransportError(f"{self._url}: deadline passed {where}: {cause}") from error
        say(
            f"download interrupted {where} ({cause}); "
            f"attempt {self._failures} of {self._bounds.retries} to resume"
        )
        self._clock.wait(delay)


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    import ssl  # noqa: PLC0415

    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise TransportError(f"{ca_file}: not a usable CA certificate: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
