"""GHCB certificate table: what a host hands out beside an SNP report. bytes <-> entries. No I/O, no trust.

Spec: GHCB 2.03, section 4.1.8.1; AMD 56860 for the GUIDs. The host is not trusted: every offset is checked.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from typing import Final

from pointcall_attest.errors import MalformedError

ENTRIES: Final[Mapping[str, uuid.UUID]] = {
    "VCEK": uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"),
    "VLEK": uuid.UUID("a8074bc2-a25a-483e-aae6-39c045a0b8a1"),
    "ASK": uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"),
    "ARK": uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"),
    "CRL": uuid.UUID("92f81bc3-5811-4d3d-97ff-d19f88dc67ea"),
}
MAX_TABLE_BYTES: Final = 64 * 1024  # the driver hands out 16 KiB
MAX_ENTRIES: Final = 32
_ENTRY: Final = struct.Struct("<16sII")  # GUID in RFC 4122 byte order, offset, length
_END: Final = bytes(_ENTRY.size)


def parse(raw: bytes) -> dict[uuid.UUID, bytes]:
    """The blob of every entry; MalformedError `snp.cert_table.malformed` for anything that is not a whole table."""
    if len(raw) > MAX_TABLE_BYTES:
        raise _refused("too long", f"<= {MAX_TABLE_BYTES} bytes", len(raw))
    rows = _rows(raw)
    first_blob = (len(rows) + 1) * _ENTRY.size
    found: dict[uuid.UUID, bytes] = {}
    for guid, offset, size in rows:
        if guid in found:
            raise _refused("an entry occurs twice", "each GUID once", guid)
        if size == 0 or offset < first_blob or offset + size > len(raw):
            raise _refused("an entry points outside", f"{first_blob} to {len(raw)}", f"{size} bytes at {offset}")
        found[guid] = raw[offset : offset + size]
    return found


def _rows(raw: bytes) -> list[tuple[uuid.UUID, int, int]]:
    """The header up to its zero entry."""
    rows: list[tuple[uuid.UUID, int, int]] = []
    for at in range(0, len(raw) - _ENTRY.size + 1, _ENTRY.size):
        if raw[at : at + _ENTRY.size] == _END:
            return rows
        if len(rows) == MAX_ENTRIES:
            raise _refused("too many entries", f"<= {MAX_ENTRIES}", len(rows) + 1)
        guid, offset, size = _ENTRY.unpack_from(raw, at)
        rows.append((uuid.UUID(bytes=guid), offset, size))
    raise _refused("no zero entry ends the header", "24 zero bytes", f"{len(rows)} entries")


def encode(blobs: Mapping[uuid.UUID, bytes]) -> bytes:
    """A table with these entries, blobs one after the other."""
    at, header, body = (len(blobs) + 1) * _ENTRY.size, b"", b""
    for guid, blob in blobs.items():
        header += _ENTRY.pack(guid.bytes, at + len(body), len(blob))
        body += blob
    return header + _END + body


def _refused(why: str, want: object, got: object) -> MalformedError:
    return MalformedError(f"certificate table: {why}", id="snp.cert_table.malformed", want=str(want), got=str(got))
