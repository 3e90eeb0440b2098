"""The kernel's own type information: type ids by name. Just enough to load a probe onto a hook; no layouts.

Spec: Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from pointcall_executor.kernel.errors import KernelError

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_TYPE: Final = struct.Struct("<III")


class Kind(enum.IntEnum):
    """BTF_KIND_*, those we ask for."""

    STRUCT = 4
    TYPEDEF = 8
    FUNC = 12


# Bytes after the 12 of every type: fixed, and for each of its `vlen` members.
_FIXED: Final[Mapping[int, int]] = {1: 4, 3: 12, 14: 4, 17: 4}
_MEMBER: Final[Mapping[int, int]] = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


def find(raw: bytes, wanted: Collection[tuple[Kind, str]]) -> dict[tuple[Kind, str], int]:
    """Type ids of the wanted names; what is absent is left out. KernelError where `raw` is not BTF."""
    try:
        return _find(raw, wanted)
    except struct.error:
        raise _malformed("whole types", "a cut file") from None


def _find(raw: bytes, wanted: Collection[tuple[Kind, str]]) -> dict[tuple[Kind, str], int]:
    magic, _version, _flags, header, type_at, type_len, name_at, name_len = _HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise _malformed(hex(MAGIC), hex(magic))
    names = raw[header + name_at : header + name_at + name_len]
    offsets = {(names.find(b"\0" + name.encode() + b"\0") + 1, kind): (kind, name) for kind, name in wanted}
    found: dict[tuple[Kind, str], int] = {}
    at, end, number = header + type_at, header + type_at + type_len, 0
    while at < end:
        number += 1
        name_off, info, _size = _TYPE.unpack_from(raw, at)
        kind = info >> 24 & 0x1F
        at += 12 + _FIXED.get(kind, 0) + _MEMBER.get(kind, 0) * (info & 0xFFFF)
        if name_off and (name_off, kind) in offsets:
            found[offsets[name_off, Kind(kind)]] = number
    return found


def _malformed(want: str, got: str) -> KernelError:
    return KernelError("this is not BTF", id="kernel.btf.malformed", want=want, got=got)
