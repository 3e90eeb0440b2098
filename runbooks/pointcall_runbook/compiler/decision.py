"""The returned list: actions and their arguments, proven to be in range. Spec: docs/spec/language.md, "Actions"."""

from __future__ import annotations

import ast

from pointcall_runbook.compiler.code import NOTHING, Code, choose, constant, step
from pointcall_runbook.compiler.condition import condition, refined
from pointcall_runbook.compiler.context import Context
from pointcall_runbook.compiler.diagnostic import Refusal
from pointcall_runbook.compiler.value import Environment, Type, Value, field_type, widened
from pointcall_runbook.sdk import NAMES
from pointcall_runbook.vocabulary import MAX_ACTIONS, Action, Field, Kind, Remember, capability, fields


def decide(node: ast.expr | None, place: ast.AST, environment: Environment, context: Context) -> Code:
    """Code that makes the calls of a returned list and leaves the handler."""
    match node:
        case ast.List():
            return _list(node, environment, context) + step("return")
        case ast.IfExp():
            return _either(node, environment, context)
        case ast.Call(func=ast.Name(id=name)) if name in context.unit.helpers:
            return context.inline_decision(node, environment, context)
        case _:
            hint = "return [] or return [Recreate(service=e.service)]"
            raise Refusal(node or place, "language.decision", "a handler returns a list of actions", hint=hint)


def _either(node: ast.IfExp, environment: Environment, context: Context) -> Code:
    test = condition(node.test, environment, context)
    sides = []
    for truth, side in ((True, node.body), (False, node.orelse)):
        known = refined(node.test, environment, truth, context)
        sides.append(None if known is None else decide(side, side, known, context))
    then, otherwise = sides
    if then is None or otherwise is None:
        return then or otherwise or NOTHING
    return choose(test.code, then, otherwise) + step("unreachable")


def _list(node: ast.List, environment: Environment, context: Context) -> Code:
    if len(node.elts) > MAX_ACTIONS:
        got = str(len(node.elts))
        raise Refusal(node, "language.decision", "too many actions", want=f"at most {MAX_ACTIONS}", got=got)
    return tuple(s for item in node.elts for s in _action(item, environment, context))


def _action(node: ast.expr, environment: Environment, context: Context) -> Code:
    action = _named(node, context)
    assert isinstance(node, ast.Call)
    declared = fields(action)
    given = _keywords(node, action, {f.name for f in declared})
    code = NOTHING
    for field in declared:
        code += _argument(node, action, field, given.get(field.name), environment, context)
    if action is Remember:
        _check_slot(node, given, environment, context)
    return code + step("call", capability(action))


def _named(node: ast.expr, context: Context) -> type[Action]:
    name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
    known = NAMES.get(name)
    if not (isinstance(known, type) and issubclass(known, Action)) or name not in context.unit.imported:
        hint = "`pointcall explain actions` lists them; import those you use"
        raise Refusal(node, "language.decision", "an action is needed here", got=name, hint=hint)
    return known


def _keywords(node: ast.Call, action: type[Action], known: set[str]) -> dict[str, ast.expr]:
    wanted = ", ".join(f.name for f in fields(action))
    if node.args:
        raise Refusal(node.args[0], "language.call", "arguments of an action are named", want=wanted)
    given: dict[str, ast.expr] = {}
    for keyword in node.keywords:
        assert keyword.arg is not None, "checked by the grammar"
        if keyword.arg not in known or keyword.arg in given:
            raise Refusal(keyword, "language.call", f"{action.__name__} has no {keyword.arg!r} left", want=wanted)
        given[keyword.arg] = keyword.value
    return given


def _argument(
    call: ast.Call,
    action: type[Action],
    field: Field,
    node: ast.expr | None,
    environment: Environment,
    context: Context,
) -> Code:
    what = f"{action.__name__}.{field.name}"
    if node is None:
        if field.default is None:
            raise Refusal(call, "language.call", f"{what} is missing", want=str(field_type(field)))
        return constant(field.default)
    value = context.evaluate(node, environment, context)
    _check(node, what, field_type(field), field, value)
    return widened(value)


def _check(node: ast.expr, what: str, wanted: Type, field: Field, value: Value) -> None:
    if value.type != wanted:
        hint = f"{wanted}.<member>" if wanted.enum else ""
        raise Refusal(
            node, "language.type", f"{what} has another type", want=str(wanted), got=str(value.type), hint=hint
        )
    if wanted.kind is Kind.INT and not value.span.within(field.lo, field.hi):
        worst = value.span.lo if value.span.lo < field.lo else value.span.hi
        raise Refusal(
            node,
            "language.range",
            f"{what} can be out of range",
            want=f"{field.lo}..{field.hi} {field.unit}".strip(),
            got=f"{value.span}; {worst} breaks it",
            hint=f"bound it: min(x, {field.hi})" if worst > field.hi else f"bound it: max(x, {field.lo})",
        )


def _check_slot(node: ast.Call, given: dict[str, ast.expr], environment: Environment, context: Context) -> None:
    """`Remember` names a declared slot, and keeps it in its declared range."""
    slot, value = (context.evaluate(given[name], environment, context) for name in ("slot", "value"))
    declared = context.unit.slots.get(slot.span.lo) if slot.span.constant else None
    if declared is None:
        hint = "NAME = remembered(0, hi=10)   then   Remember(slot=NAME.slot, value=...)"
        raise Refusal(given["slot"], "language.range", "not the slot of a remembered name", hint=hint)
    if not value.span.within(declared.lo, declared.hi):
        raise Refusal(
            given["value"],
            "language.range",
            f"{declared.name} can leave its range",
            want=f"{declared.lo}..{declared.hi}",
            got=str(value.span),
            hint=f"bound it: min(x, {declared.hi})",
        )
