"""Strict DER: a reader that refuses every other encoding, and a writer for the emulated platform. No I/O, no crypto.

Why it exists: X.509 libraries refuse AMD's leaf certificates (serial number 0). Only the types those certificates use.
Spec: ITU-T X.690, chapter 10 and 11.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from pointcall_attest.errors import MalformedError

BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OID = 0x01, 0x02, 0x03, 0x04, 0x06
UTF8_STRING, PRINTABLE_STRING, IA5_STRING, UTC_TIME, GENERALIZED_TIME = 0x0C, 0x13, 0x16, 0x17, 0x18
SEQUENCE, SET = 0x30, 0x31
MAX_LENGTH: Final = 0xFFFF  # of what we write; a certificate is some 1.5 KiB
_LONG: Final = 0x80  # a first byte of a length from here on only says how many bytes follow
_LEAST: Final = (0, 0x80, 0x100, 0x10000)  # the least size that needs so many bytes; 16 MiB and more are refused


def explicit(number: int) -> int:
    """The tag of a context-specific constructed value."""
    return 0xA0 | number


def refused(why: str, *, want: str = "", got: str = "") -> MalformedError:
    """The error of everything that reads certificates."""
    return MalformedError(
        f"not a certificate of the form its vendor writes: {why}", id="cert.malformed", want=want, got=got
    )


class Reader:
    """Walks the values inside `raw[start:end]` in order. Nothing is copied before it is asked for."""

    __slots__ = ("at", "end", "raw")

    def __init__(self, raw: bytes, start: int = 0, end: int | None = None) -> None:
        self.raw, self.at, self.end = raw, start, len(raw) if end is None else end

    def peek(self) -> int | None:
        """The next tag, or None at the end."""
        return self.raw[self.at] if self.at < self.end else None

    def element(self, tag: int) -> tuple[int, int, int]:
        """Step over one value with this tag: (start of the whole, start of the content, end)."""
        raw, start, limit = self.raw, self.at, self.end
        if start >= limit or raw[start] != tag:
            raise refused("unexpected type", want=f"tag {tag:#04x}", got=f"{self.peek()} at byte {start}")
        body, size = start + 2, (raw[start + 1] if start + 1 < limit else _LONG)
        if size >= _LONG:
            body, size = self._length(start + 1)
        self.at = end = body + size
        if end > limit:
            raise refused("a value runs past its end", got=f"{size} bytes at byte {start}")
        return start, body, end

    def _length(self, at: int) -> tuple[int, int]:
        """(start of the content, its size) of a length of two to four bytes; only the shortest form."""
        head = self.raw[at : min(at + 4, self.end)]
        count = head[0] - 0x80 if head else 0
        size = int.from_bytes(head[1 : 1 + count], "big")
        if not 1 <= count <= 3 or len(head) <= count or size < _LEAST[count]:
            raise refused("a length is not in its shortest form", got=head.hex())
        return at + 1 + count, size

    def value(self, tag: int) -> bytes:
        """The content of the next value."""
        _, body, end = self.element(tag)
        return self.raw[body:end]

    def whole(self, tag: int) -> bytes:
        """The next value with its header."""
        start, _, end = self.element(tag)
        return self.raw[start:end]

    def inside(self, tag: int) -> Reader:
        """A reader of the content of the next value."""
        _, body, end = self.element(tag)
        return Reader(self.raw, body, end)

    def done(self) -> None:
        """MalformedError where something is left."""
        if self.at != self.end:
            raise refused("something follows the last value", got=f"{self.end - self.at} bytes")

    def integer(self) -> int:
        """A non-negative INTEGER in its shortest form."""
        content = self.value(INTEGER)
        if not content or content[0] >= 0x80 or (len(content) > 1 and content[0] == 0 and content[1] < 0x80):
            raise refused("not a non-negative integer in its shortest form", got=content[:8].hex())
        return int.from_bytes(content, "big")

    def boolean(self) -> bool:
        """TRUE. DER leaves out a FALSE that is the default."""
        content = self.value(BOOLEAN)
        if content != b"\xff":
            raise refused("not TRUE", got=content[:8].hex())
        return True

    def bits(self) -> bytes:
        """A BIT STRING of whole bytes."""
        content = self.value(BIT_STRING)
        if not content or content[0] != 0:
            raise refused("a bit string does not end at a byte")
        return content[1:]

    def time(self) -> datetime:
        """UTCTime up to 2049, GeneralizedTime from 2050 (RFC 5280, 4.1.2.5), with seconds and Z."""
        tag = self.peek()
        if tag not in (UTC_TIME, GENERALIZED_TIME):
            raise refused("not a time", got=str(tag))
        text = self.value(tag).decode("latin-1")
        digits = text[:-1]
        size = 12 if tag == UTC_TIME else 14
        if not (text.endswith("Z") and len(digits) == size and digits.isascii() and digits.isdigit()):
            raise refused("not a time in UTC", got=text[:20])
        if tag == UTC_TIME:
            digits = ("20" if digits < "50" else "19") + digits
        elif digits < "2050":
            raise refused("a time before 2050 that is not UTCTime", got=text)
        month, day, hour, minute, second = (int(digits[at : at + 2]) for at in (4, 6, 8, 10, 12))
        try:
            return datetime(int(digits[:4]), month, day, hour, minute, second, 0, UTC)
        except ValueError:
            raise refused("no such time", got=text) from None


def write(tag: int, *contents: bytes) -> bytes:
    """One value: tag, shortest length, the contents one after the other."""
    body = b"".join(contents)
    assert len(body) <= MAX_LENGTH
    if len(body) < 0x80:
        return bytes((tag, len(body))) + body
    if len(body) < 0x100:
        return bytes((tag, 0x81, len(body))) + body
    return bytes((tag, 0x82)) + len(body).to_bytes(2, "big") + body


def write_integer(value: int) -> bytes:
    assert value >= 0
    return write(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def write_bits(content: bytes) -> bytes:
    return write(BIT_STRING, b"\0", content)


def write_time(at: datetime) -> bytes:
    """UTCTime; the emulated platform never reaches 2050."""
    assert at.tzinfo is UTC
    assert 1950 <= at.year < 2050
    return write(UTC_TIME, at.strftime("%y%m%d%H%M%SZ").encode())


def write_oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    return write(OID, b"".join(map(_base128, (first * 40 + second, *rest))))


def _base128(value: int) -> bytes:
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))
