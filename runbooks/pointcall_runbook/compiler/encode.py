"""Functions to the bytes of a module. The same functions give the same bytes on every machine. No toolchain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pointcall_runbook.binary import (
    CODE,
    CUSTOM,
    EXPORT,
    FUNCTION,
    HEADER,
    IMPORT,
    TYPE,
    name,
    section,
    sized,
    sleb,
    uleb,
    vector,
)
from pointcall_runbook.compiler.code import Function, Label, Local, Step
from pointcall_runbook.meta import SECTION, Meta
from pointcall_runbook.opcode import BLOCK, BR, BR_IF, CALL, END, I32, I64, IF
from pointcall_runbook.vocabulary import ACTIONS, arity

_NAMESPACE: Final = "rb1"
_EXPORT: Final = "decide_"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The module, and for each instruction its offset and source line, in order."""

    wasm: bytes
    lines: tuple[tuple[int, int], ...]


def encode(functions: Sequence[Function], capabilities: Sequence[str], meta: Meta) -> Encoded:
    """`functions` and `capabilities` are in the order of the module; `meta` goes into `rb.meta`."""
    types = [_type(arity(ACTIONS[a])) for a in capabilities] + [_type(len(f.parameters)) for f in functions]
    unique = sorted(set(types))
    imports = [
        name(_NAMESPACE) + name(a) + b"\0" + uleb(unique.index(t)) for a, t in zip(capabilities, types, strict=False)
    ]
    own = [uleb(unique.index(t)) for t in types[len(capabilities) :]]
    exports = [name(_EXPORT + f.event) + b"\0" + uleb(len(capabilities) + i) for i, f in enumerate(functions)]
    head = HEADER + section(TYPE, vector(unique))
    head += section(IMPORT, vector(imports)) if imports else b""
    head += section(FUNCTION, vector(own)) + section(EXPORT, vector(exports))
    code, lines = _code(functions, capabilities, len(head))
    return Encoded(head + code + section(CUSTOM, name(SECTION) + meta.encode()), lines)


def _type(count: int) -> bytes:
    return b"\x60" + vector([bytes((I64,))] * count) + vector([])


def _code(
    functions: Sequence[Function], capabilities: Sequence[str], start: int
) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    bodies = [_body(f, capabilities) for f in functions]
    content = vector([sized(b"".join((locals_, *(raw for raw, _ in steps)))) for locals_, steps in bodies])
    whole = section(CODE, content)
    at = start + len(whole) - len(content) + len(uleb(len(bodies)))
    lines = []
    for locals_, steps in bodies:
        length = len(locals_) + sum(len(raw) for raw, _ in steps)
        at += len(uleb(length)) + len(locals_)
        for raw, line in steps:
            lines.append((at, line))
            at += len(raw)
    return whole, tuple(lines)


def _body(function: Function, capabilities: Sequence[str]) -> tuple[bytes, list[tuple[bytes, int]]]:
    """The declaration of locals, and each instruction with its source line."""
    used = {id(s.operand) for s in function.code if isinstance(s.operand, Local)}
    kept = [local for local in function.locals if id(local) in used]
    ordered = sorted(kept, key=lambda local: local.type == I32)  # stable: i64 first
    numbers = {id(local): i for i, local in enumerate([*function.parameters, *ordered])}
    groups = [(sum(1 for x in ordered if x.type == t), t) for t in (I64, I32)]
    declared = vector([uleb(count) + bytes((t,)) for count, t in groups if count])
    open_: list[Label | None] = []
    steps = [(_step(s, numbers, capabilities, open_), s.line) for s in function.code]
    return declared, [*steps, (bytes((END,)), 0)]


def _step(step: Step, numbers: dict[int, int], capabilities: Sequence[str], open_: list[Label | None]) -> bytes:
    code, operand = step.op.code, step.operand
    raw = bytes((code,))
    if code in (BLOCK, IF):
        open_.append(operand if isinstance(operand, Label) else None)
        return raw + bytes((step.result,))
    if code == END:
        open_.pop()
    if code in (BR, BR_IF):
        depth = next(i for i, label in enumerate(reversed(open_)) if label is operand)
        return raw + uleb(depth)
    if code == CALL:
        return raw + uleb(capabilities.index(str(operand)))
    if isinstance(operand, Local):
        return raw + uleb(numbers[id(operand)])
    return raw + sleb(operand) if isinstance(operand, int) else raw
