"""The file as a whole: imports, constants, parameters, slots, helpers and handlers. Importing it has no effect.

CPython executes the top level of an accepted file on import. All that stands there is: imports from the SDK, constants
made of literals and pure SDK calls, and functions without defaults. Spec: docs/spec/language.md, section "Files".
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Final

from pointcall_runbook.compiler.code import Local
from pointcall_runbook.compiler.condition import network_of
from pointcall_runbook.compiler.context import Context, Unit
from pointcall_runbook.compiler.diagnostic import Poisoned, Refusal
from pointcall_runbook.compiler.inline import annotated
from pointcall_runbook.compiler.names import check_new, imported
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import INT, SERVICE, Binding, Poison, Value, Variable, settled
from pointcall_runbook.meta import MAX_PARAMETERS, MAX_SLOTS, Parameter, Slot
from pointcall_runbook.opcode import I64
from pointcall_runbook.sdk import NAMES
from pointcall_runbook.vocabulary import EVENTS, U63

_DECORATOR: Final = "runbook"


def read(tree: ast.Module, context: Context) -> None:
    """Fill `context.unit` from the top level. Everything wrong becomes a diagnostic."""
    seen_other = False
    for position, node in enumerate(tree.body):
        try:
            if isinstance(node, ast.ImportFrom):
                _import(node, seen_other, context.unit)
                continue
            if position == 0 and isinstance(node, ast.Expr):
                continue
            seen_other = True
            _top(node, context)
        except Refusal as refusal:
            context.unit.diagnostics.add(refusal)
    _check_imported(tree, context.unit)
    for function in (*context.unit.helpers.values(), *context.unit.handlers.values()):
        _check_arguments(function, context.unit)
    if not context.unit.handlers and not context.unit.diagnostics.any():
        hint = "@runbook above def decide(e: CircuitOpened) -> Decision:"
        context.unit.diagnostics.add(Refusal(tree, "language.handler", "no function is a handler", hint=hint))


def _import(node: ast.ImportFrom, late: bool, unit: Unit) -> None:
    if late:
        raise Refusal(node, "language.import", "imports come first")
    for name in imported(node):
        if name in unit.imported:
            raise Refusal(node, "language.import", f"{name} is imported twice")
        unit.imported.add(name)
        if name == "NO_SERVICE":
            none = settled(Value(SERVICE, ((),), Span.only(0)))
            unit.bindings = {**unit.bindings, name: none}


def _top(node: ast.stmt, context: Context) -> None:
    match node:
        case ast.Assign(targets=[ast.Name() as target]):
            _bind(target, node.value, context)
        case ast.FunctionDef():
            _function(node, context.unit, context)
        case _:
            what = type(node).__name__
            hint = "constants and functions only"
            raise Refusal(node, "language.top", f"{what} cannot stand at the top level", hint=hint)


def _bind(target: ast.Name, node: ast.expr, context: Context) -> None:
    unit = context.unit
    check_new(target, target.id, unit.names)
    bound: Binding = Poison.POISON
    try:
        bound = _constant(target.id, node, context)
    except Poisoned:
        pass
    finally:
        unit.bindings = {**unit.bindings, target.id: bound}


def _constant(name: str, node: ast.expr, context: Context) -> Binding:
    called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    if called == "parameter":
        assert isinstance(node, ast.Call)
        return _parameter(name, node, context)
    if called == "remembered":
        assert isinstance(node, ast.Call)
        return _remembered(name, node, context)
    network = network_of(node, {})
    if network is not None:
        return network
    constants = {k: v for k, v in context.unit.bindings.items() if not isinstance(v, Variable)}
    _check_fixed(node, context.unit)
    return context.evaluate(node, constants, context)


def _check_fixed(node: ast.expr, unit: Unit) -> None:
    """A constant is computed once, on import: it cannot follow a parameter that the manifest sets later."""
    for part in ast.walk(node):
        if not isinstance(part, ast.Name):
            continue
        if isinstance(unit.bindings.get(part.id), Variable):
            hint = f"write it where {part.id} is used"
            raise Refusal(part, "language.constant", f"{part.id} is not a constant", hint=hint)
        if part.id in unit.helpers:
            raise Refusal(part, "language.constant", "a helper cannot be called at the top level")


def _numbers(node: ast.Call, first: str, names: Sequence[str], context: Context) -> dict[str, int]:
    """The constant arguments of parameter() and remembered()."""
    wanted = f"{first}, " + ", ".join(f"{n}=" for n in names)
    given = {k.arg: k.value for k in node.keywords}
    if len(node.args) != 1 or len(given) != len(node.keywords) or not given.keys() <= set(names) or "hi" not in given:
        raise Refusal(node, "language.call", "other arguments are needed", want=wanted)
    pairs = {first: node.args[0], **{n: given[n] for n in names if n in given}}
    for value in pairs.values():
        _check_fixed(value, context.unit)
    return {n: _number(value, context) for n, value in pairs.items()}


def _number(node: ast.expr, context: Context) -> int:
    value = context.evaluate(node, context.unit.bindings, context)
    if value.type != INT or not value.span.constant:
        raise Refusal(node, "language.constant", "a constant integer is needed here")
    return value.span.lo


def _parameter(name: str, node: ast.Call, context: Context) -> Variable:
    got = _numbers(node, "default", ("lo", "hi"), context)
    lo, hi, default = got.get("lo", 0), got["hi"], got["default"]
    _check_ordered(node, lo, default, hi)
    if len(context.unit.parameters) >= MAX_PARAMETERS:
        raise Refusal(node, "language.size", "too many parameters", want=f"at most {MAX_PARAMETERS}")
    context.unit.parameters.append(Parameter(name, lo, hi, default))
    return Variable(INT, (Local(I64),), Span(lo, hi))


def _remembered(name: str, node: ast.Call, context: Context) -> Variable:
    got = _numbers(node, "slot", ("lo", "hi", "initial"), context)
    slot, lo, hi, initial = got["slot"], got.get("lo", 0), got["hi"], got.get("initial", 0)
    _check_ordered(node, lo, initial, hi)
    if not 0 <= slot < MAX_SLOTS or slot in context.unit.slots:
        raise Refusal(node, "language.range", "not a free slot", want=f"0..{MAX_SLOTS - 1}, each once", got=str(slot))
    if lo < 0 or hi > U63:
        raise Refusal(node, "language.range", "a slot holds no such number", want=f"0..{U63}", got=f"{lo}..{hi}")
    context.unit.slots[slot] = Slot(name, lo, hi, initial)
    return Variable(INT, (Local(I64),), Span(lo, hi), slot)


def _check_ordered(node: ast.AST, lo: int, value: int, hi: int) -> None:
    if not lo <= value <= hi:
        raise Refusal(node, "language.range", "the value is outside its own range", want=f"{lo}..{hi}", got=str(value))


def _function(node: ast.FunctionDef, unit: Unit, context: Context) -> None:
    check_new(node, node.name, unit.names)
    _check_signature(node)
    names = [a.arg for a in node.args.args]
    if len(set(names)) != len(names):
        raise Refusal(node, "language.name", "two arguments have one name")
    if not node.decorator_list:
        annotated(node.returns, node, context)
        unit.helpers[node.name] = node
        return
    _handler(node, unit, context)


def _check_arguments(node: ast.FunctionDef, unit: Unit) -> None:
    """Arguments against all names of the file, also those that come later."""
    for argument in node.args.args:
        try:
            check_new(argument, argument.arg, unit.names, local=True)
        except Refusal as refusal:
            unit.diagnostics.add(refusal)


def _check_signature(node: ast.FunctionDef) -> None:
    a = node.args
    if a.posonlyargs or a.kwonlyargs or a.vararg or a.kwarg or a.defaults or a.kw_defaults:
        raise Refusal(
            node, "language.signature", "arguments are plain: no defaults, no *, no /", hint="def name(x: int)"
        )
    if node.type_comment is not None:
        raise Refusal(node, "language.signature", "types are annotations, not comments")


def _handler(node: ast.FunctionDef, unit: Unit, context: Context) -> None:
    only = node.decorator_list[0]
    if len(node.decorator_list) != 1 or not isinstance(only, ast.Name) or only.id != _DECORATOR:
        raise Refusal(only, "language.handler", "a function has one decorator or none", want="@runbook")
    event = annotated(node.args.args[0].annotation, node, context) if len(node.args.args) == 1 else None
    if not isinstance(event, str) or event not in EVENTS:
        hint = "def decide(e: CircuitOpened) -> Decision:"
        raise Refusal(node, "language.handler", "a handler takes one event", hint=hint)
    if annotated(node.returns, node, context) != "Decision":
        raise Refusal(node, "language.handler", "a handler returns a decision", want="-> Decision")
    if event in unit.handlers:
        raise Refusal(node, "language.handler", f"two handlers for {event}", want="one for each event")
    unit.handlers[event] = node


def _check_imported(tree: ast.Module, unit: Unit) -> None:
    """Every SDK name in the file is imported, also where no run can come."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in NAMES and node.id not in unit.imported:
            hint = f"from pointcall_runbook import {node.id}"
            unit.diagnostics.add(Refusal(node, "language.unknown", f"{node.id} is not imported", hint=hint))
