"""A module of another toolchain, without what its linker adds: unused memory, tables, globals, their exports, names.

This proves nothing and grants nothing. If the code uses what was dropped, the module verifier refuses the instruction.
The result is what gets signed. Bytes in, bytes out; no I/O. Examples: runbooks/examples.
"""

from __future__ import annotations

from typing import Final

from pointcall_runbook.binary import CUSTOM, EXPORT, HEADER, ModuleError, Reader, name, section, uleb, vector
from pointcall_runbook.meta import SECTION

_TABLE: Final = 4
_MEMORY: Final = 5
_GLOBAL: Final = 6
_DROPPED: Final = (_TABLE, _MEMORY, _GLOBAL)
MAX_INPUT_BYTES: Final = 1024 * 1024


def adopt(wasm: bytes) -> bytes:
    """The same functions in the profile's shape. Raises ModuleError where the bytes are not a module at all."""
    if len(wasm) > MAX_INPUT_BYTES or not wasm.startswith(HEADER):
        raise ModuleError("not a WebAssembly core module of version 1", id="module.header", got=wasm[:8].hex())
    reader, out = Reader(wasm, len(HEADER)), HEADER
    while not reader.done:
        number = reader.byte()
        body = reader.part()
        content = body.raw[body.at : body.end]
        if number == EXPORT:
            out += section(EXPORT, _functions_only(body))
        elif number not in _DROPPED and (number != CUSTOM or body.name() == SECTION):
            out += section(number, content)
    return out


def _functions_only(body: Reader) -> bytes:
    kept = []
    for _ in range(body.u32()):
        title, kind, index = body.name(), body.byte(), body.u32()
        if kind == 0:
            kept.append(name(title) + b"\0" + uleb(index))
    return vector(kept)
