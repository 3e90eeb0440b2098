"""A module as text beside its source, and a decision as the lines it ran. For people; nothing reads it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pointcall_runbook import opcode as o
from pointcall_runbook.sections import Body, Instruction, Sections, take_apart


def listing(wasm: bytes, *, lines: Sequence[tuple[int, int]] = (), source: str = "") -> str:
    """A listing in the manner of WAT; with `lines` and `source` of a `Compiled`, source lines stand above their code.

    The module must have been verified.
    """
    module, by_offset, text = take_apart(wasm), dict(lines), source.split("\n")
    out = []
    for title, index in module.exports:
        body = module.bodies[index - len(module.imports)]
        out += [f"{title}:", *_body(body, module, by_offset, text), ""]
    return "\n".join(out)


def lines_of(lines: Sequence[tuple[int, int]], trace: Sequence[tuple[int, bool]]) -> tuple[int, ...]:
    """The source lines that a run went through, in order: `lines` of a `Compiled`, `trace` of `Interpreter.run`."""
    by_offset, out = dict(lines), [0]
    for offset, _ in trace:
        line = by_offset.get(offset, 0)
        if line and line != out[-1]:
            out.append(line)
    return tuple(out[1:])


def _body(body: Body, module: Sections, by_offset: Mapping[int, int], text: Sequence[str]) -> list[str]:
    out, depth, shown = [], 1, 0
    for at in body.code:
        line = by_offset.get(at.offset, 0)
        if line and line != shown and line <= len(text):
            out.append(f"{line:5} | {text[line - 1].strip()}")
            shown = line
        depth -= at.op.code in (o.END, o.ELSE)
        out.append("        " + "  " * max(depth, 0) + _text(at, module))
        depth += at.op.code in (o.BLOCK, o.IF, o.ELSE)
    return out


def _text(at: Instruction, module: Sections) -> str:
    match at.op.code:
        case o.BLOCK | o.IF:
            return at.op.name + ("" if at.value == o.EMPTY else f" (result {o.TYPE_NAMES[at.value]})")
        case o.CALL if at.value < len(module.imports):
            return f"call rb1.{module.imports[at.value][1]}"
        case _:
            return at.op.name if at.op.immediate == "" else f"{at.op.name} {at.value}"
