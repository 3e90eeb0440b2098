"""Modules made by hand for tests: the parts of a module as bytes, from a body."""

from __future__ import annotations

from random import Random

from pointcall_runbook.binary import (
    CODE,
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
from pointcall_runbook.opcode import BY_NAME, I32, I64, OPCODES

RECREATE = ("recreate", 2)
TIMER_ARITY = 4  # at, tag, service, restarts


def function_type(params: list[int], results: list[int]) -> bytes:
    return b"\x60" + vector([bytes((p,)) for p in params]) + vector([bytes((r,)) for r in results])


def code(*names: str | int) -> bytes:
    """Instructions by name; a number behind a name is its immediate."""
    out, last = b"", ""
    for item in names:
        if isinstance(item, str):
            out, last = out + bytes((BY_NAME[item].code,)), item
        else:
            out += sleb(item) if last.endswith("const") else bytes((item,)) if last in ("block", "if") else uleb(item)
    return out


def module(
    body: bytes,
    *,
    export: str = "decide_Timer",
    imports: tuple[tuple[str, int], ...] = (RECREATE,),
    locals_: bytes = b"\0",
    helpers: tuple[bytes, ...] = (),
    extra: bytes = b"",
) -> bytes:
    """One handler of `Timer` behind the imports; `helpers` are bodies of type () -> () behind it."""
    types = [function_type([I64] * n, []) for _, n in imports] + [function_type([I64] * TIMER_ARITY, [])]
    types.append(function_type([], []))
    entry = len(imports)
    out = HEADER + section(TYPE, vector(types))
    if imports:
        out += section(IMPORT, vector([name("rb1") + name(n) + b"\0" + uleb(i) for i, (n, _) in enumerate(imports)]))
    out += section(FUNCTION, vector([uleb(entry)] + [uleb(entry + 1)] * len(helpers)))
    out += section(EXPORT, vector([name(export) + b"\0" + uleb(entry)]))
    bodies = [locals_ + body, *(b"\0" + h for h in helpers)]
    return out + section(CODE, vector([sized(b) for b in bodies])) + extra


def random_body(chance: Random, *, divide: bool) -> bytes:
    """Well-typed code over the four arguments and two locals; it calls `recreate` once or twice."""
    arithmetic = [op for op in OPCODES.values() if op.pops == (I64, I64) and op.pushes == (I64,)]
    arithmetic = [op for op in arithmetic if divide or not op.name.endswith(("div_s", "div_u", "rem_s", "rem_u"))]
    compares = [op for op in OPCODES.values() if op.pops == (I64, I64) and op.pushes == (I32,)]
    unary = [op for op in OPCODES.values() if op.pops == (I64,) and op.pushes == (I64,)]
    narrow = [op for op in OPCODES.values() if op.pops == (I32, I32) and (divide or "_" not in op.name[4:])]

    def value(depth: int) -> bytes:
        if depth == 0 or chance.random() < 0.2:
            constant = chance.choice((0, 1, -1, 63, 2**31, 2**63 - 1, -(2**63), chance.getrandbits(62)))
            return chance.choice((code("local.get", chance.randrange(6)), code("i64.const", constant)))
        a, b, test = value(depth - 1), value(depth - 1), condition(depth - 1)
        forms = (
            a + b + bytes((chance.choice(arithmetic).code,)),
            a + bytes((chance.choice(unary).code,)),
            test + code("if", I64) + a + code("else") + b + code("end"),
            a + b + test + code("select"),
            code("block", I64) + a + test + code("br_if", 0) + code("drop") + b + code("end"),
            a + code("i32.wrap_i64") + test + bytes((chance.choice(narrow).code,)) + code("i64.extend_i32_s"),
            a + code("local.tee", 4 + chance.randrange(2)),
        )
        return chance.choice(forms)

    def condition(depth: int) -> bytes:
        return value(depth) + value(depth) + bytes((chance.choice(compares).code,))

    early = condition(2) + code("if", 0x40, "return", "end")
    again = condition(2) + code("br_if", 0) + value(2) + value(2) + code("call", 0)
    return value(4) + value(3) + code("call", 0) + early + again + code("end")
