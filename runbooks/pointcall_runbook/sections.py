"""A module's bytes, taken apart: types, imports, functions, exports, bodies, metadata. Shape only, no meaning.

What the parts may say is checked by module.py and body.py. Spec: docs/spec/rb1.md, section "Module shape".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from pointcall_runbook.binary import CODE, CUSTOM, EXPORT, FUNCTION, HEADER, IMPORT, TYPE, ModuleError, Reader
from pointcall_runbook.meta import SECTION
from pointcall_runbook.opcode import EMPTY, I32, I64, OPCODES, Opcode

MAX_MODULE_BYTES: Final = 32 * 1024
MAX_FUNCTIONS: Final = 32
MAX_TYPES: Final = 64
MAX_LOCALS: Final = 512  # with parameters: a few bytes could otherwise ask for billions
_VALUE_TYPES: Final = (I32, I64)


@dataclass(frozen=True, slots=True)
class FunctionType:
    """Parameters and results; at most one result."""

    params: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `value` is its immediate or 0, `offset` where it lies in the module."""

    op: Opcode
    value: int
    offset: int


@dataclass(frozen=True, slots=True)
class Body:
    """The declared locals (without parameters) and the instructions of one function."""

    locals: tuple[int, ...]
    code: tuple[Instruction, ...]


@dataclass(slots=True)
class Sections:
    """All parts of a module. `imports` are (module, name, type); functions count behind them."""

    types: list[FunctionType] = field(default_factory=list)
    imports: list[tuple[str, str, FunctionType]] = field(default_factory=list)
    functions: list[FunctionType] = field(default_factory=list)
    exports: list[tuple[str, int]] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)
    meta: bytes | None = None

    def function_type(self, index: int) -> FunctionType | None:
        """The type of a function by its index over imports and functions."""
        if index < len(self.imports):
            return self.imports[index][2]
        index -= len(self.imports)
        return self.functions[index] if index < len(self.functions) else None


def take_apart(wasm: bytes) -> Sections:
    """Bytes to parts. Raises ModuleError for anything outside the profile's shape."""
    if len(wasm) > MAX_MODULE_BYTES:
        raise ModuleError(
            "the module is too large", id="module.size", want=f"at most {MAX_MODULE_BYTES}", got=str(len(wasm))
        )
    reader = Reader(wasm)
    if reader.take(min(len(HEADER), len(wasm))) != HEADER:
        raise ModuleError("not a WebAssembly core module of version 1", id="module.header", got=wasm[:8].hex())
    out, last = Sections(), CUSTOM
    while not reader.done:
        number, body = reader.byte(), reader.part()
        last = _section(out, number, body, last)
        if not body.done:
            raise ModuleError("a section is longer than its content", id="module.section", got=f"section {number}")
    if len(out.functions) != len(out.bodies):
        raise ModuleError("functions and bodies differ in number", id="module.section")
    return out


def _section(out: Sections, number: int, body: Reader, last: int) -> int:
    """Read one section into `out`; the highest section number so far."""
    if number == CUSTOM:
        _custom(out, body)
        return last
    if number not in _READERS:
        raise ModuleError(
            "the module has a section outside the profile",
            id="module.section",
            want="type, import, function, export, code, rb.meta",
            got=f"section {number}",
            hint="memory, table, global, start, element and data sections are refused, used or not",
        )
    if number <= last:
        raise ModuleError("sections are out of order", id="module.section", got=f"section {number}")
    for _ in range(body.u32()):
        _READERS[number](out, body)
    return number


def _custom(out: Sections, body: Reader) -> None:
    title = body.name()
    if title != SECTION or out.meta is not None:
        raise ModuleError(
            "the module has another custom section", id="module.section", want=f"one {SECTION}", got=title[:40]
        )
    out.meta = body.take(body.end - body.at)


def _value_types(body: Reader, most: int) -> tuple[int, ...]:
    count = body.u32()
    if count > most:
        raise ModuleError("too many values in a type", id="module.type", want=f"at most {most}", got=str(count))
    types = tuple(body.take(count))
    if any(t not in _VALUE_TYPES for t in types):
        raise ModuleError("a value is neither i32 nor i64", id="module.type", want="i32, i64", got=types[:8].__repr__())
    return types


def _type(out: Sections, body: Reader) -> None:
    if body.byte() != 0x60 or len(out.types) >= MAX_TYPES:
        raise ModuleError("not a function type, or too many types", id="module.type", want=f"at most {MAX_TYPES}")
    out.types.append(FunctionType(_value_types(body, MAX_LOCALS), _value_types(body, 1)))


def _indexed_type(out: Sections, body: Reader) -> FunctionType:
    index = body.u32()
    if index >= len(out.types):
        raise ModuleError("a type index is out of range", id="module.type", got=str(index))
    return out.types[index]


def _import(out: Sections, body: Reader) -> None:
    module, title = body.name(), body.name()
    if body.byte() != 0:
        raise ModuleError("only functions can be imported", id="module.import", got=f"{module}.{title}"[:80])
    out.imports.append((module, title, _indexed_type(out, body)))


def _function(out: Sections, body: Reader) -> None:
    if len(out.functions) >= MAX_FUNCTIONS:
        raise ModuleError("too many functions", id="module.function", want=f"at most {MAX_FUNCTIONS}")
    out.functions.append(_indexed_type(out, body))


def _export(out: Sections, body: Reader) -> None:
    title = body.name()
    if body.byte() != 0:
        raise ModuleError("only functions can be exported", id="module.export", got=title[:80])
    out.exports.append((title, body.u32()))


def _code(out: Sections, body: Reader) -> None:
    if len(out.bodies) >= len(out.functions):
        raise ModuleError("functions and bodies differ in number", id="module.section")
    part = body.part()
    params = len(out.functions[len(out.bodies)].params)
    out.bodies.append(Body(_locals(part, MAX_LOCALS - params), _instructions(part)))


_READERS: Final[Mapping[int, Callable[[Sections, Reader], None]]] = {
    TYPE: _type,
    IMPORT: _import,
    FUNCTION: _function,
    EXPORT: _export,
    CODE: _code,
}


def _locals(body: Reader, most: int) -> tuple[int, ...]:
    out: list[int] = []
    for _ in range(body.u32()):
        count, type_ = body.u32(), body.byte()
        if not 0 < count <= most - len(out):
            raise ModuleError("too many locals, or an empty group", id="module.locals", want=f"at most {MAX_LOCALS}")
        if type_ not in _VALUE_TYPES:
            raise ModuleError("a local is neither i32 nor i64", id="module.locals", got=f"0x{type_:02x}")
        out += [type_] * count
    return tuple(out)


def _instructions(body: Reader) -> tuple[Instruction, ...]:
    out = []
    while not body.done:
        offset = body.at
        op = OPCODES.get(body.byte())
        if op is None:
            raise ModuleError(
                "an instruction is outside the profile",
                id="module.opcode",
                want="integers, locals, blocks, calls",
                got=f"0x{body.raw[offset]:02x} at offset {offset}",
                hint="no floats, memory, tables, globals, loops or indirect calls",
            )
        out.append(Instruction(op, _immediate(op, body), offset))
    return tuple(out)


def _immediate(op: Opcode, body: Reader) -> int:
    match op.immediate:
        case "":
            return 0
        case "index":
            return body.u32()
        case "i32":
            return body.signed(32)
        case "i64":
            return body.signed(64)
        case "block":
            return _block_type(body)


def _block_type(body: Reader) -> int:
    code = body.byte()
    if code not in (EMPTY, *_VALUE_TYPES):
        raise ModuleError("a block has a type outside the profile", id="module.type", got=f"0x{code:02x}")
    return code
