"""The compiler: restricted Python to a module of the `rb1` profile. It never executes a source.

Interval analysis proves that nothing overflows, no divisor is zero and every argument of an action is in range, so an
accepted source computes under CPython what its module computes. What cannot be proven is refused, with the values
that would break it. Spec: docs/spec/language.md. Stages: text, grammar, source, statement/expression, encode.
"""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from typing import Final

from pointcall_runbook.binary import ModuleError
from pointcall_runbook.compiler import grammar, source, text
from pointcall_runbook.compiler.code import Function
from pointcall_runbook.compiler.context import Context, Returning, Scope, Unit
from pointcall_runbook.compiler.diagnostic import CompileError, Diagnostic, Diagnostics, Refusal
from pointcall_runbook.compiler.encode import Encoded, encode
from pointcall_runbook.compiler.expression import evaluate
from pointcall_runbook.compiler.inline import inline, inline_decision
from pointcall_runbook.compiler.statement import statements
from pointcall_runbook.compiler.value import Binding, Record, Variable, field_span, field_type
from pointcall_runbook.meta import Meta
from pointcall_runbook.module import ModuleInfo, verify_module
from pointcall_runbook.opcode import CALL
from pointcall_runbook.vocabulary import EVENTS, digest, fields

__all__ = ["COMPILER", "CompileError", "Compiled", "Diagnostic", "compile_source"]

COMPILER: Final = "pointcall-0.1.0"
_TOO_LARGE: Final = ("module.fuel", "module.size", "module.locals", "module.nesting", "module.meta", "module.depth")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A module and what is known of it. `lines` gives each instruction's offset its source line."""

    wasm: bytes
    info: ModuleInfo
    lines: tuple[tuple[int, int], ...]


def compile_source(source: str, filename: str = "<runbook>") -> Compiled:
    """Compile one file. Raises CompileError with everything that is wrong, and nothing else."""
    diagnostics = Diagnostics(source.split("\n"))
    try:
        compiled = _compile(source, filename, diagnostics)
    except Refusal as refusal:
        diagnostics.add(refusal)
        compiled = None
    except RecursionError:
        diagnostics.add(Refusal(ast.Pass(), "language.size", "nested too deeply"))
        compiled = None
    if compiled is None or diagnostics.any():
        raise CompileError(diagnostics.sorted(), filename, source.split("\n"))
    return compiled


def _compile(code: str, filename: str, diagnostics: Diagnostics) -> Compiled | None:
    tree = text.parse(code, filename)
    for refusal in grammar.check(tree):
        diagnostics.add(refusal)
    if diagnostics.any():
        return None
    unit = Unit(diagnostics)
    source.read(tree, _context(unit, Function("")))
    if diagnostics.any():
        return None
    functions = [_handler(event, node, unit) for event, node in sorted(unit.handlers.items())]
    if not diagnostics.any():
        _check_all_live(tree, unit)
    return None if diagnostics.any() else _finished(functions, unit, code)


def _context(unit: Unit, function: Function) -> Context:
    return Context(unit, function, Scope(Returning(None)), evaluate, inline, inline_decision)


def _handler(event: str, node: ast.FunctionDef, unit: Unit) -> Function:
    """One handler: its i64 parameters are the event, the manifest's parameters and the remembered slots."""
    function, root = Function(event), node.args.args[0].arg
    known: dict[str, Binding] = {root: Record(EVENTS[event], root)}
    for field in fields(EVENTS[event]):
        places = tuple(function.parameter() for _ in range(field.kind.slots))
        known[f"{root}.{field.name}"] = Variable(field_type(field), places, field_span(field))
    known |= _settings(unit, function)
    function.code, after = statements(node.body, known, _context(unit, function))
    if after is not None and not unit.diagnostics.any():
        hint = "return [] at the end"
        unit.diagnostics.add(Refusal(node, "language.return", "a path ends without return", hint=hint))
    return function


def _settings(unit: Unit, function: Function) -> dict[str, Binding]:
    """Names at module level; parameters and slots get the locals of this function."""
    out = dict(unit.bindings)
    for name in [p.name for p in unit.parameters] + [unit.slots[number].name for number in sorted(unit.slots)]:
        bound = out[name]
        assert isinstance(bound, Variable)
        out[name] = Variable(bound.type, (function.parameter(),), bound.span, bound.slot)
    return out


def _check_all_live(tree: ast.Module, unit: Unit) -> None:
    """Every statement of the file was read for some run: nothing unchecked hides in a branch that is never taken."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        if node.name in unit.helpers and node.name not in unit.called:
            unit.diagnostics.add(Refusal(node, "language.unreachable", f"{node.name} is never called"))
            continue
        for inner in ast.walk(node):
            _check_live(inner, unit)
    if sorted(unit.slots) != list(range(len(unit.slots))):
        got = ", ".join(map(str, sorted(unit.slots)))
        unit.diagnostics.add(Refusal(tree, "language.range", "slots are numbered from 0 without a gap", got=got))


def _check_live(node: ast.AST, unit: Unit) -> None:
    """The first statement of a block that no run reaches tells for the rest of the block."""
    for name in ("body", "orelse"):
        block = getattr(node, name, None)
        dead = [s for s in block if id(s) not in unit.live] if isinstance(block, list) else []
        if dead:
            hint = "a condition never holds or always does: remove this, or check the ranges above it"
            unit.diagnostics.add(Refusal(dead[0], "language.unreachable", "this can never run", hint=hint))


def _finished(functions: list[Function], unit: Unit, code: str) -> Compiled:
    used = sorted({str(s.operand) for f in functions for s in f.code if s.op.code == CALL})
    meta = Meta(
        tuple(f.event for f in functions),
        tuple(used),
        tuple(unit.parameters),
        tuple(unit.slots[number] for number in sorted(unit.slots)),
        tuple(sorted(unit.services)),
        tuple(sorted(unit.channels)),
        hashlib.sha256(code.encode()).hexdigest(),
        COMPILER,
        digest(),
    )
    encoded = encode(functions, used, meta)
    return Compiled(encoded.wasm, _verified(encoded, unit), encoded.lines)


def _verified(encoded: Encoded, unit: Unit) -> ModuleInfo:
    """What the verifier says. Only a limit can fail here; anything else is a bug of the compiler."""
    try:
        return verify_module(encoded.wasm)
    except ModuleError as error:
        if error.id not in _TOO_LARGE:
            raise AssertionError(f"the compiler made a module that does not verify: {error}") from error
        place = next(iter(unit.handlers.values()))
        message = f"the runbook is too large: {error.message}"
        raise Refusal(place, "language.size", message, want=error.want, got=error.got) from None
