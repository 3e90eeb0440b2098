"""The instructions of the `rb1` profile: one row each, with types, immediate and fuel. Spec: docs/spec/rb1.md.

Everything that is not in `OPCODES` is refused: floats, memory, tables, globals, loops, indirect calls, SIMD.
Fuel is what Wasmtime charges: 1 for an instruction, 0 for those that only give structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

I32: Final = 0x7F
I64: Final = 0x7E
EMPTY: Final = 0x40  # block type without a result
TYPE_NAMES: Final = {I32: "i32", I64: "i64"}

UNREACHABLE, NOP, BLOCK, IF, ELSE, END = 0x00, 0x01, 0x02, 0x04, 0x05, 0x0B
BR, BR_IF, RETURN, CALL, DROP, SELECT = 0x0C, 0x0D, 0x0F, 0x10, 0x1A, 0x1B
LOCAL_GET, LOCAL_SET, LOCAL_TEE, I32_CONST, I64_CONST = 0x20, 0x21, 0x22, 0x41, 0x42

FUEL_PER_ENTRY: Final = 1  # entering a function

Immediate = Literal["", "block", "index", "i32", "i64"]


@dataclass(frozen=True, slots=True)
class Opcode:
    """One instruction. `pops` and `pushes` are empty for those whose types depend on their place."""

    code: int
    name: str
    immediate: Immediate = ""
    pops: tuple[int, ...] = ()
    pushes: tuple[int, ...] = ()
    fuel: int = 1


_STRUCTURE: Final = (
    Opcode(UNREACHABLE, "unreachable", fuel=0),
    Opcode(NOP, "nop", fuel=0),
    Opcode(BLOCK, "block", "block", fuel=0),
    Opcode(IF, "if", "block", (I32,)),
    Opcode(ELSE, "else", fuel=0),
    Opcode(END, "end", fuel=0),
    Opcode(BR, "br", "index"),
    Opcode(BR_IF, "br_if", "index", (I32,)),
    Opcode(RETURN, "return", fuel=0),
    Opcode(CALL, "call", "index"),
    Opcode(DROP, "drop", fuel=0),
    Opcode(SELECT, "select"),
    Opcode(LOCAL_GET, "local.get", "index"),
    Opcode(LOCAL_SET, "local.set", "index"),
    Opcode(LOCAL_TEE, "local.tee", "index"),
    Opcode(I32_CONST, "i32.const", "i32", (), (I32,)),
    Opcode(I64_CONST, "i64.const", "i64", (), (I64,)),
)
_COMPARE: Final = ("eq", "ne", "lt_s", "lt_u", "gt_s", "gt_u", "le_s", "le_u", "ge_s", "ge_u")
_COUNT: Final = ("clz", "ctz", "popcnt")
_ARITHMETIC: Final = (
    *("add", "sub", "mul", "div_s", "div_u", "rem_s", "rem_u"),
    *("and", "or", "xor", "shl", "shr_s", "shr_u", "rotl", "rotr"),
)
_CONVERT: Final = (
    Opcode(0xA7, "i32.wrap_i64", "", (I64,), (I32,)),
    Opcode(0xAC, "i64.extend_i32_s", "", (I32,), (I64,)),
    Opcode(0xAD, "i64.extend_i32_u", "", (I32,), (I64,)),
    Opcode(0xC0, "i32.extend8_s", "", (I32,), (I32,)),
    Opcode(0xC1, "i32.extend16_s", "", (I32,), (I32,)),
    Opcode(0xC2, "i64.extend8_s", "", (I64,), (I64,)),
    Opcode(0xC3, "i64.extend16_s", "", (I64,), (I64,)),
    Opcode(0xC4, "i64.extend32_s", "", (I64,), (I64,)),
)


def _numeric(type_: int, test: int, count: int) -> Iterator[Opcode]:
    """The integer instructions of one width: `test` is the code of eqz, `count` that of clz."""
    prefix = TYPE_NAMES[type_]
    yield Opcode(test, f"{prefix}.eqz", "", (type_,), (I32,))
    for code, name in enumerate(_COMPARE, test + 1):
        yield Opcode(code, f"{prefix}.{name}", "", (type_, type_), (I32,))
    for code, name in enumerate(_COUNT, count):
        yield Opcode(code, f"{prefix}.{name}", "", (type_,), (type_,))
    for code, name in enumerate(_ARITHMETIC, count + len(_COUNT)):
        yield Opcode(code, f"{prefix}.{name}", "", (type_, type_), (type_,))


_ALL: Final = (*_STRUCTURE, *_numeric(I32, 0x45, 0x67), *_numeric(I64, 0x50, 0x79), *_CONVERT)
OPCODES: Final[Mapping[int, Opcode]] = {op.code: op for op in _ALL}
BY_NAME: Final[Mapping[str, Opcode]] = {op.name: op for op in _ALL}
