"""A BPF blob: bytes <-> Blob. No I/O, no loading, no trust: the manifest pins the SHA-256 of the whole file.

One file holds all that decides what enters the kernel: the light skeleton's loader program, its data (maps, programs,
BTF, relocations) and the names that go with them. Spec: docs/spec/kernel-abi.md section 1.

    magic(16) | header length u32 | data length u32 | instructions length u32 | zero u32 | header | data | instructions

The header is canonical JSON; a file that parses has exactly one form.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pointcall_executor.kernel.errors import BlobError

MAGIC: Final = b"POINTCALL-BPF\0\0\1"
MAX_BLOB_BYTES: Final = 2 * 1024 * 1024  # 30x the largest of ours; a bigger one is not ours
MAX_HEADER_BYTES: Final = 64 * 1024
MAX_ENTRIES: Final = 64  # maps, programs, constants each
INSN_BYTES: Final = 8

_PREFIX: Final = struct.Struct("<16sIIII")
_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_SECTION: Final = re.compile(r"[a-z_]+(?:/[A-Za-z0-9_.]{1,120})?")


@dataclass(frozen=True, slots=True)
class Program:
    """A program's name and its ELF section, which says how it attaches (`cgroup/connect4`, `tp_btf/...`)."""

    name: str
    section: str


@dataclass(frozen=True, slots=True)
class Constant:
    """A `volatile const`: where it lies in the read-only data. Unsigned, little-endian."""

    name: str
    offset: int
    size: int

    @property
    def largest(self) -> int:
        return int(2 ** (8 * self.size) - 1)


@dataclass(frozen=True, slots=True)
class Blob:
    """What `parse` made of a blob file. `initial` is the read-only data with the defaults of all constants."""

    name: str
    maps: tuple[str, ...]
    programs: tuple[Program, ...]
    initial: bytes
    constants: tuple[Constant, ...]
    data: bytes
    insns: bytes

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """The blob in `raw`, which must be exactly one. Raises BlobError, never anything else."""
        if len(raw) > MAX_BLOB_BYTES:
            raise _malformed("the file is too large", f"at most {MAX_BLOB_BYTES} bytes", str(len(raw)))
        header, data, insns = _split(raw)
        fields = _Header(_json(header))
        blob = cls(
            name=fields.name(),
            maps=fields.maps(),
            programs=fields.programs(),
            initial=fields.initial(),
            constants=fields.constants(),
            data=data,
            insns=insns,
        )
        blob._check()
        if blob._header() != header:
            raise _malformed("the header is not in its canonical form", "sorted keys, no spaces", "another form")
        return blob

    def encode(self) -> bytes:
        """The one file form of this blob."""
        header = self._header()
        prefix = _PREFIX.pack(MAGIC, len(header), len(self.data), len(self.insns), 0)
        return prefix + header + self.data + self.insns

    @property
    def sha256(self) -> str:
        """Hex digest of the file: what a manifest's subject states."""
        return hashlib.sha256(self.encode()).hexdigest()

    @property
    def defaults(self) -> dict[str, int]:
        """Every constant with the value that it has unless the loader is told otherwise."""
        return {c.name: int.from_bytes(self.initial[c.offset : c.offset + c.size], "little") for c in self.constants}

    def with_constants(self, values: Mapping[str, int]) -> bytes:
        """The read-only data with these constants set. BlobError where a name is unknown or a value does not fit."""
        known = {c.name: c for c in self.constants}
        image = bytearray(self.initial)
        for name, value in values.items():
            constant = known.get(name)
            if constant is None:
                raise BlobError(
                    f"{self.name} has no constant {name!r}", id="kernel.blob.constant", want=", ".join(known), got=name
                )
            if not 0 <= value <= constant.largest:
                raise BlobError(
                    f"constant {name} does not fit",
                    id="kernel.blob.constant",
                    want=f"0..{constant.largest}",
                    got=str(value),
                )
            image[constant.offset : constant.offset + constant.size] = value.to_bytes(constant.size, "little")
        return bytes(image)

    def _header(self) -> bytes:
        value = {
            "constants": {
                "fields": [[c.name, c.offset, c.size] for c in self.constants],
                "initial": self.initial.hex(),
            },
            "maps": list(self.maps),
            "name": self.name,
            "programs": [[p.name, p.section] for p in self.programs],
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    def _check(self) -> None:
        if not self.insns or len(self.insns) % INSN_BYTES:
            raise _malformed("the loader program is cut", f"whole instructions of {INSN_BYTES}", str(len(self.insns)))
        if not self.programs:
            raise _malformed("the blob has no program", "at least one", "none")
        _unique("map", self.maps)
        _unique("program", tuple(p.name[:15] for p in self.programs))  # the kernel keeps 15 characters
        _unique("constant", tuple(c.name for c in self.constants))
        if bool(self.initial) != ("rodata" in self.maps):
            raise _malformed("constants and the map `rodata` go together", "both or none", "one of them")


class _Header:
    """The parsed JSON of a header, field by field; each access checks the type and says what was wrong."""

    def __init__(self, value: Any) -> None:
        self._value = _keys("header", value, {"constants", "maps", "name", "programs"})
        self._constants = _keys("constants", self._value["constants"], {"fields", "initial"})

    def name(self) -> str:
        return _name(self._value["name"])

    def maps(self) -> tuple[str, ...]:
        return tuple(_name(entry) for entry in _list("maps", self._value["maps"]))

    def programs(self) -> tuple[Program, ...]:
        rows = [_row("programs", row, (str, str)) for row in _list("programs", self._value["programs"])]
        for _, section in rows:
            if not _SECTION.fullmatch(section):
                raise _malformed("a program's section has another form", "type or type/target", ascii(section)[:80])
        return tuple(Program(_name(name), section) for name, section in rows)

    def initial(self) -> bytes:
        text = self._constants["initial"]
        if not isinstance(text, str) or not re.fullmatch(r"(?:[0-9a-f]{2})*", text):
            raise _malformed("the initial constants are not hex", "lower-case hex", ascii(text)[:80])
        return bytes.fromhex(text)

    def constants(self) -> tuple[Constant, ...]:
        rows = [_row("constants", row, (str, int, int)) for row in _list("constants", self._constants["fields"])]
        size_all = len(self.initial())
        for name, offset, size in rows:
            if size not in (1, 2, 4, 8) or offset < 0 or offset % size or offset + size > size_all:
                raise _malformed("a constant lies outside its data", f"aligned, within {size_all} bytes", ascii(name))
        return tuple(Constant(_name(name), offset, size) for name, offset, size in rows)


def _malformed(message: str, want: str, got: str) -> BlobError:
    return BlobError(message, want=want, got=got, hint="make the blobs again: make -C bpf")


def _split(raw: bytes) -> tuple[bytes, bytes, bytes]:
    if len(raw) < _PREFIX.size:
        raise _malformed("the file is too short", f"at least {_PREFIX.size} bytes", str(len(raw)))
    magic, *lengths, zero = _PREFIX.unpack_from(raw)
    header, data, insns = lengths
    if magic != MAGIC or zero:
        raise _malformed("this is not a blob", MAGIC.hex(), magic.hex())
    if header > MAX_HEADER_BYTES or _PREFIX.size + header + data + insns != len(raw):
        raise _malformed("the lengths do not add up", str(len(raw)), str(_PREFIX.size + header + data + insns))
    at = _PREFIX.size
    return raw[at : at + header], raw[at + header : at + header + data], raw[at + header + data :]


def _json(header: bytes) -> Any:
    try:
        return json.loads(header.decode("ascii"), parse_float=_no_float, parse_constant=_no_float)
    except (ValueError, RecursionError) as error:
        raise _malformed("the header is not JSON", "canonical JSON", type(error).__name__) from None


def _no_float(text: str) -> int:
    raise ValueError(text)


def _keys(what: str, value: Any, wanted: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != wanted:
        raise _malformed(f"{what} has other keys", ", ".join(sorted(wanted)), ascii(value)[:80])
    return value


def _list(what: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise _malformed(f"{what} is not a short list", f"at most {MAX_ENTRIES} entries", ascii(value)[:80])
    return value


def _row(what: str, value: Any, types: tuple[type, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list) or tuple(map(type, value)) != types:
        raise _malformed(
            f"{what} has an entry of another form", ", ".join(t.__name__ for t in types), ascii(value)[:80]
        )
    return tuple(value)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _malformed("a name has another form", _NAME.pattern, ascii(value)[:80])
    return value


def _unique(what: str, names: tuple[str, ...]) -> None:
    if len(set(names)) != len(names):
        raise _malformed(f"a {what} occurs twice", "each once", ", ".join(names)[:200])
