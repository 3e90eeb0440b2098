"""A binary format as one table of rows: reader and writer walk the same rows, and a gap fails the import.

No meaning, no policy: rows give offset, size and name. A row without a name is reserved and must be zero.
All integers are little-endian. Used by snp.py, tdx.py, hcl.py and tdreport.py.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from pointcall_attest.errors import MalformedError

_INTEGERS: Final[Mapping[int, str]] = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Field(NamedTuple):
    """One row. `integer` reads a little-endian number; otherwise the bytes themselves."""

    offset: int
    size: int
    name: str
    integer: bool = False


class Layout:
    """Rows of one format. `what` names it in errors; `length_id` and `reserved_id` are the ids of its two errors."""

    def __init__(self, what: str, size: int, rows: Sequence[Field], *, length_id: str, reserved_id: str) -> None:
        self.what, self.size, self.rows = what, size, tuple(rows)
        self._length_id, self._reserved_id = length_id, reserved_id
        end = 0
        for row in self.rows:
            assert row.offset == end, f"{what}: gap or overlap at {row.offset:#x} ({row.name or 'reserved'})"
            end += row.size
        assert end == size, f"{what}: rows end at {end:#x}, not {size:#x}"
        self._struct = struct.Struct("<" + "".join(_code(row) for row in self.rows))
        assert self._struct.size == size
        self._reserved = tuple((i, bytes(row.size)) for i, row in enumerate(self.rows) if not row.name)
        self._named = tuple(i for i, row in enumerate(self.rows) if row.name)
        self.names = tuple(self.rows[i].name for i in self._named)

    def read(self, raw: bytes) -> tuple[Any, ...]:
        """The named values in row order. Exact length; every reserved byte zero; MalformedError otherwise."""
        if len(raw) != self.size:
            raise MalformedError(
                f"{self.what} has a wrong length",
                id=self._length_id,
                want=f"{self.size} bytes",
                got=f"{len(raw)} bytes",
            )
        values = self._struct.unpack(raw)
        for index, zeros in self._reserved:
            if values[index] != zeros:
                raise self._not_zero(self.rows[index], values[index])
        return tuple(values[i] for i in self._named)

    def write(self, values: Mapping[str, int | bytes]) -> bytes:
        """Bytes of the format; names that are missing are written as zero. Unknown names are our mistake."""
        assert set(values) <= set(self.names), set(values) - set(self.names)
        return self._struct.pack(*(values.get(row.name, _zero(row)) for row in self.rows))

    def _not_zero(self, row: Field, got: bytes) -> MalformedError:
        first = next(i for i, byte in enumerate(got) if byte)
        return MalformedError(
            f"a reserved byte of the {self.what} is set",
            id=self._reserved_id,
            want=f"zero at {row.offset + first:#05x}",
            got=f"{got[first]:#04x}",
        )


def _code(row: Field) -> str:
    return _INTEGERS[row.size] if row.integer else f"{row.size}s"


def _zero(row: Field) -> int | bytes:
    return 0 if row.integer else bytes(row.size)
