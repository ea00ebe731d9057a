"""A strict, streaming subset of tar: exactly what Artifact v3 needs and nothing else.

Facts: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar's base-256
numbers. The reader accepts regular files with plain relative names, ustar or pax headers; it
refuses links, devices, directories, absolute names, `..`, global headers and GNU long-name
records, because no artifact writer emits them and each has been an attack. It never reads more
than was declared, and keeps one header block in memory. The writer emits fixed metadata (mode,
owner and time are constants), so the same content gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from updater.artifact.errors import (
    ArtifactFormatError,
    ArtifactLimitError,
    ArtifactTruncatedError,
)

BLOCK = 512
END_OF_ARCHIVE = bytes(2 * BLOCK)
_ZERO_BLOCK = bytes(BLOCK)
_MAX_PAX_BYTES = 64 * 1024
_MAX_NAME_BYTES = 255
# Writers pad the archive to a record (usually 20 blocks); more zeros than this is not padding.
_MAX_PADDING_BYTES = 1024 * 1024
_MAX_SIZE = 1 << 50
_PAX_KEYS_WITHOUT_EFFECT = frozenset(
    {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}
)
_NUMBERS_WITHOUT_EFFECT = (
    ("mode", 100, 108),
    ("owner", 108, 116),
    ("group", 116, 124),
    ("time", 136, 148),
    ("device", 329, 337),
    ("device", 337, 345),
)


class Readable(Protocol):
    """A source of bytes that fills a buffer; 0 means the end."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill at least one byte of `buffer`, return how many; 0 only at the end."""
        ...


class Memory:
    """Bytes as a `Readable`."""

    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill as much of `buffer` as there is; 0 at the end."""
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count


class Counted:
    """A `Readable` that reports how many bytes each read gave."""

    def __init__(self, source: Readable, report: Callable[[int], None] | None) -> None:
        self._source = source
        self._report = report

    def readinto(self, buffer: memoryview, /) -> int:
        """Read from the source, and report."""
        count = self._source.readinto(buffer)
        if self._report is not None:
            self._report(count)
        return count


class Member(NamedTuple):
    """One regular file of an archive."""

    name: str
    size: int


def fill(source: Readable, buffer: memoryview) -> int:
    """Read until `buffer` is full or the source ends; return the bytes read."""
    got = 0
    while got < len(buffer):
        count = source.readinto(buffer[got:])
        if count == 0:
            break
        got += count
    return got


class TarReader:
    """Walks an archive once, member after member.

    `where` names the archive in messages. After `next()` returned a member, read its content
    through `readinto` (it is a `Readable` bounded to that member); `next()` refuses to go on
    while content is left, so nothing is skipped unseen.
    """

    def __init__(self, source: Readable, where: str) -> None:
        self._source = source
        self._where = where
        self._left = 0
        self._padding = 0
        self._block = memoryview(bytearray(BLOCK))

    def next(self) -> Member | None:
        """Return the next member, or None at the end-of-archive mark."""
        assert self._left == 0, "the member before was not read to its end"
        self._skip_padding()
        pax: dict[str, str] = {}
        while True:
            if not self._read_header():
                if pax:
                    raise ArtifactFormatError(f"{self._where}: a pax header without its file")
                return None
            kind = self._block[156:157].tobytes()
            if kind == b"x":
                if pax:
                    raise ArtifactFormatError(f"{self._where}: two pax headers in a row")
                pax = self._read_pax()
                continue
            member = self._member(kind, pax)
            self._left = member.size
            self._padding = -member.size % BLOCK
            return member

    def readinto(self, buffer: memoryview, /) -> int:
        """Read content of the present member; 0 at the member's end."""
        if self._left == 0:
            return 0
        count = self._source.readinto(buffer[: min(len(buffer), self._left)])
        if count == 0:
            raise ArtifactTruncatedError(f"{self._where}: ends {self._left} bytes too early")
        self._left -= count
        return count

    def read_all(self, member: Member, limit: int) -> bytes:
        """Return the present member's whole content, refusing more than `limit` bytes."""
        if member.size > limit:
            raise ArtifactLimitError(
                f"{self._where}: {member.name} is {member.size} bytes, at most {limit} are allowed"
            )
        content = bytearray(member.size)
        got = fill(self, memoryview(content))
        assert got == member.size
        return bytes(content)

    def finish(self) -> None:
        """Read to the end of the source; only zero padding may follow the end mark."""
        chunk = memoryview(bytearray(BLOCK * 20))
        seen = 0
        while count := self._source.readinto(chunk):
            if chunk[:count].tobytes().strip(b"\0"):
                raise ArtifactFormatError(f"{self._where}: data after the end of the archive")
            seen += count
            if seen > _MAX_PADDING_BYTES:
                raise ArtifactLimitError(f"{self._where}: more than 1 MiB of padding at the end")

    def _skip_padding(self) -> None:
        if self._padding == 0:
            return
        padding = self._block[: self._padding]
        if fill(self._source, padding) != len(padding):
            raise ArtifactTruncatedError(f"{self._where}: ends inside a member's padding")
        self._padding = 0

    def _read_header(self) -> bool:
        """Load the next header block; False at the end-of-archive mark (two zero blocks)."""
        got = fill(self._source, self._block)
        if got != BLOCK:
            raise ArtifactTruncatedError(f"{self._where}: ends without its end-of-archive mark")
        if self._block == _ZERO_BLOCK:
            if fill(self._source, self._block) != BLOCK:
                raise ArtifactTruncatedError(f"{self._where}: ends inside its end-of-archive mark")
            if self._block != _ZERO_BLOCK:
                raise ArtifactFormatError(f"{self._where}: data after a zero block")
            return False
        expected = _number(self._block[148:156].tobytes(), self._where, "checksum")
        actual = sum(self._block) - sum(self._block[148:156]) + 8 * 0x20
        if expected != actual:
            raise ArtifactFormatError(f"{self._where}: a tar header's checksum is wrong")
        if self._block[257:262].tobytes() != b"ustar":
            raise ArtifactFormatError(f"{self._where}: not a ustar or pax archive")
        for what, start, end in _NUMBERS_WITHOUT_EFFECT:
            field = self._block[start:end].tobytes()
            # Other readers stop at a malformed one, and would see another archive than this one.
            if field.strip(b"\0 ") and field[0] != 0xFF:
                _number(field, self._where, what)
        return True

    def _read_pax(self) -> dict[str, str]:
        size = _number(self._block[124:136].tobytes(), self._where, "size")
        if size > _MAX_PAX_BYTES:
            raise ArtifactLimitError(f"{self._where}: a pax header of {size} bytes")
        content = bytearray(size)
        padding = bytearray(-size % BLOCK)
        for part in (content, padding):
            if fill(self._source, memoryview(part)) != len(part):
                raise ArtifactTruncatedError(f"{self._where}: ends inside a pax header")
        records = _pax_records(bytes(content), self._where)
        for key in records:
            if key not in _PAX_KEYS_WITHOUT_EFFECT and key not in {"path", "size"}:
                raise ArtifactFormatError(f"{self._where}: unsupported pax record {key!r}")
        return records

    def _member(self, kind: bytes, pax: dict[str, str]) -> Member:
        name = pax.get("path")
        if name is None:
            # A NUL-terminated prefix is joined only in ustar proper (version "00").
            name = _text(self._block[0:100].tobytes(), self._where)
            prefix = _text(self._block[345:500].tobytes(), self._where)
            if prefix and self._block[257:265].tobytes() == b"ustar\x0000":
                name = f"{prefix}/{name}"
        if kind not in (b"0", b"\0"):
            raise ArtifactFormatError(
                f"{self._where}: {name!r} is not a regular file (tar type {kind!r})"
            )
        check_name(name, self._where)
        if "size" in pax:
            if not (pax["size"].isascii() and pax["size"].isdigit()) or len(pax["size"]) > 16:
                raise ArtifactFormatError(f"{self._where}: {name!r} has a malformed pax size")
            size = int(pax["size"])
        else:
            size = _number(self._block[124:136].tobytes(), self._where, "size")
        if size > _MAX_SIZE:
            raise ArtifactLimitError(f"{self._where}: {name!r} declares {size} bytes")
        return Member(name, size)


def check_name(name: str, where: str) -> None:
    """Refuse a member name that could leave its directory or confuse a terminal."""
    if not name or len(name.encode("utf-8", "surrogateescape")) > _MAX_NAME_BYTES:
        raise ArtifactFormatError(f"{where}: a member name is empty or longer than 255 bytes")
    if not name.isprintable():
        raise ArtifactFormatError(f"{where}: member name {name!r} has unprintable characters")
    parts = name.split("/")
    if "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ArtifactFormatError(f"{where}: member name {name!r} is not a plain relative path")


def header(name: str, size: int) -> bytes:
    """Return the header of a regular file, with constant metadata.

    One ustar block; a name of more than 100 bytes has a pax header before it, and a size of 8 GiB
    or more is a base-256 number, so that a block written ahead always has room for it.
    """
    check_name(name, "writing")
    raw = name.encode()
    if len(raw) <= 100:
        return _block(raw, size, b"0")
    record = b" path=" + raw + b"\n"
    length = len(record) + 3
    assert 100 <= length <= 999
    record = b"%d" % length + record
    return (
        _block(b"PaxHeaders.0/path", len(record), b"x")
        + record
        + padding(len(record))
        + _block(raw[:100], size, b"0")
    )


def _block(name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(BLOCK)
    block[0 : len(name)] = name
    block[100:108] = b"0000600\0"
    block[108:116] = b"0000000\0"
    block[116:124] = b"0000000\0"
    if size < 1 << 33:
        block[124:136] = b"%011o\0" % size
    else:
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[136:148] = b"00000000000\0"
    block[148:156] = b"        "
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[329:337] = b"0000000\0"
    block[337:345] = b"0000000\0"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padding(size: int) -> bytes:
    """Return the zeros that follow `size` bytes of content."""
    return bytes(-size % BLOCK)


def member(name: str, content: bytes) -> bytes:
    """Return a whole small member: header, content, padding."""
    return header(name, len(content)) + content + padding(len(content))


def _number(field: bytes, where: str, what: str) -> int:
    """Return a header field's number: octal, or base-256 behind 0x80, as GNU tar writes it.

    Readers differ in what else they take for a number (a NUL in front, other first bytes), and
    what they disagree on is refused here, so that all see the same archive.
    """
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise ArtifactFormatError(f"{where}: a tar header's {what} is not octal")
    return int(digits, 8)


def _text(field: bytes, where: str) -> str:
    raw = field.split(b"\0", 1)[0]
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ArtifactFormatError(f"{where}: a member name is not UTF-8: {raw!r}") from error


def _pax_records(content: bytes, where: str) -> dict[str, str]:
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 8)
        length_text = content[position:space] if space > 0 else b""
        if not length_text.isdigit():
            raise ArtifactFormatError(f"{where}: a malformed pax record")
        end = position + int(length_text)
        record = content[space + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if end > len(content) or not record.endswith(b"\n") or not equals or not key:
            raise ArtifactFormatError(f"{where}: a malformed pax record")
        try:
            name, text = key.decode(), value.decode()
        except UnicodeDecodeError as error:
            raise ArtifactFormatError(f"{where}: a pax record is not UTF-8") from error
        if name in records:
            raise ArtifactFormatError(f"{where}: pax record {name!r} occurs twice")
        records[name] = text
        position = end
    return records
