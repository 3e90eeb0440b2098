"""WebAssembly's binary form: canonical LEB128, names, vectors and sections. Reading and writing; no meaning.

Spec: WebAssembly core 1.0, section 5. Stricter than it: a number has exactly one encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pointcall_runbook.errors import PointcallError

HEADER: Final = b"\0asm\x01\0\0\0"
CUSTOM, TYPE, IMPORT, FUNCTION, EXPORT, CODE = 0, 1, 2, 3, 7, 10


class ModuleError(PointcallError):
    """The bytes are not a module of the `rb1` profile."""

    id = "module.malformed"


class Reader:
    """Reads forwards within `[at, end)` of `raw`; every method raises ModuleError where the bytes do not fit."""

    __slots__ = ("at", "end", "raw")

    def __init__(self, raw: bytes, at: int = 0, end: int | None = None) -> None:
        self.raw, self.at, self.end = raw, at, len(raw) if end is None else end

    @property
    def done(self) -> bool:
        return self.at >= self.end

    def byte(self) -> int:
        if self.at >= self.end:
            raise ModuleError("the module ends too early", id="module.truncated", got=f"offset {self.at}")
        self.at += 1
        return self.raw[self.at - 1]

    def take(self, length: int) -> bytes:
        if length > self.end - self.at:
            raise ModuleError("the module ends too early", id="module.truncated", got=f"offset {self.at}")
        self.at += length
        return self.raw[self.at - length : self.at]

    def part(self) -> Reader:
        """A sub-reader over a length-prefixed part; this reader continues behind it."""
        length = self.u32()
        start = self.at
        self.take(length)
        return Reader(self.raw, start, self.at)

    def u32(self) -> int:
        start, value, shift = self.at, 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
            if shift >= 35:
                raise self._number(start)
        if value >= 2**32 or (byte == 0 and shift > 7):
            raise self._number(start)
        return value

    def signed(self, bits: int) -> int:
        start, value, shift = self.at, 0, 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
            if shift >= bits:
                raise self._number(start)
        value -= (byte & 0x40) << 1 << (shift - 7)
        if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) or self.raw[start : self.at] != sleb(value):
            raise self._number(start)
        return value

    def name(self) -> str:
        try:
            return self.take(self.u32()).decode("utf-8")
        except UnicodeDecodeError:
            raise ModuleError("a name is not UTF-8", id="module.name", got=f"offset {self.at}") from None

    def _number(self, start: int) -> ModuleError:
        return ModuleError(
            "a number is not in its shortest form or too large",
            id="module.number",
            want="canonical LEB128",
            got=f"{self.raw[start : self.at].hex()} at offset {start}",
            hint="re-encode the module, for example with wasm-opt",
        )


def uleb(number: int) -> bytes:
    """Unsigned LEB128 in its shortest form."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def sleb(number: int) -> bytes:
    """Signed LEB128 in its shortest form."""
    out = bytearray()
    while not -0x40 <= number < 0x40:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number & 0x7F))


def vector(items: Sequence[bytes]) -> bytes:
    """A count and its items."""
    return uleb(len(items)) + b"".join(items)


def sized(body: bytes) -> bytes:
    """A length and its bytes."""
    return uleb(len(body)) + body


def name(text: str) -> bytes:
    """A length-prefixed UTF-8 name."""
    return sized(text.encode())


def section(number: int, body: bytes) -> bytes:
    """A section with its number and length."""
    return bytes((number,)) + sized(body)
