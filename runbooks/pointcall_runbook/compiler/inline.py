"""Helper functions: each call is replaced by the body. So ranges are proven for the very arguments of that call."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Final

from pointcall_runbook.compiler import code as c
from pointcall_runbook.compiler.code import Code
from pointcall_runbook.compiler.context import MAX_HELPER_DEPTH, Context, Returning, Scope, shown
from pointcall_runbook.compiler.diagnostic import Poisoned, Refusal
from pointcall_runbook.compiler.statement import statements
from pointcall_runbook.compiler.value import (
    ADDRESS,
    BOOL,
    CHANNEL,
    INT,
    SERVICE,
    Binding,
    Environment,
    Record,
    Type,
    Value,
    Variable,
    settled,
)
from pointcall_runbook.sdk import ENUMS
from pointcall_runbook.vocabulary import EVENTS, Kind

_TYPES: Final[Mapping[str, Type]] = {
    "int": INT,
    "bool": BOOL,
    "Address": ADDRESS,
    "Service": SERVICE,
    "Channel": CHANNEL,
    **{cls.__name__: Type(Kind.ENUM, cls) for cls in ENUMS},
}


def annotated(node: ast.expr | None, place: ast.AST, context: Context) -> Type | str:
    """The type that an annotation names; an event or `Decision` by its name."""
    name = node.id if isinstance(node, ast.Name) else ""
    builtin = name in ("int", "bool")
    if name in _TYPES and (builtin or name in context.unit.imported):
        return _TYPES[name]
    if name in context.unit.imported and (name in EVENTS or name == "Decision"):
        return name
    want = "int, bool, Address, Service, Channel, an enum, an event; Decision for a list of actions"
    raise Refusal(
        node or place, "language.annotation", "a type is needed here", want=want, got=shown(node) if node else ""
    )


def inline(node: ast.Call, environment: Environment, context: Context) -> Value:
    """The value of a helper call."""
    function, scope, setup, inner = _entered(node, environment, context)
    result = annotated(function.returns, function, context)
    if not isinstance(result, Type):
        raise Refusal(node, "language.type", f"{function.name} returns a decision, not a value", hint="return it")
    body = [s for s in function.body if not isinstance(s, ast.Expr)]
    if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
        context.unit.live |= {id(s) for s in function.body}
        value = context.evaluate(body[0].value, inner, context.within(scope))
        if value.type != result:
            got = str(value.type)
            raise Refusal(body[0], "language.type", "another type is returned", want=str(result), got=got)
        return settled(Value(value.type, (setup + value.codes[0], *value.codes[1:]), value.span))
    return _inlined_block(node, function, scope, setup, inner, result, context)


def _inlined_block(
    node: ast.Call,
    function: ast.FunctionDef,
    scope: Scope,
    setup: Code,
    inner: Environment,
    result: Type,
    context: Context,
) -> Value:
    returning = scope.returning
    returning.result, returning.locals = result, context.locals_for(result)
    code, after = statements(function.body, inner, context.within(scope))
    if after is not None:
        raise Refusal(function, "language.return", "a path ends without return", hint="return a value at the end")
    if returning.span is None:
        raise Poisoned  # every return was refused, and said so
    code = setup + c.block(returning.label, code)
    gets = [c.get(at) for at in returning.locals]
    return settled(Value(result, (code + gets[0], *gets[1:]), returning.span))


def inline_decision(node: ast.Call, environment: Environment, context: Context) -> Code:
    """`return helper(...)` where the helper returns a decision: its returns leave the handler."""
    function, scope, setup, inner = _entered(node, environment, context)
    if annotated(function.returns, function, context) != "Decision":
        raise Refusal(node, "language.decision", f"{function.name} does not return a decision", want="-> Decision")
    code, after = statements(function.body, inner, context.within(scope))
    if after is not None:
        raise Refusal(function, "language.return", "a path ends without return", hint="return [] at the end")
    return setup + code


def _entered(
    node: ast.Call, environment: Environment, context: Context
) -> tuple[ast.FunctionDef, Scope, Code, Environment]:
    """The helper, a fresh scope, code that stores the arguments, and what the helper knows."""
    assert isinstance(node.func, ast.Name)
    function = context.unit.helpers[node.func.id]
    depth = context.scope.depth + 1
    if depth > MAX_HELPER_DEPTH:
        hint = "a helper cannot call itself"
        raise Refusal(
            node, "language.recursion", "helpers call helpers too deeply", want=f"{MAX_HELPER_DEPTH}", hint=hint
        )
    context.unit.called.add(function.name)
    declared = function.args.args
    if node.keywords or len(node.args) != len(declared):
        want = ", ".join(a.arg for a in declared)
        raise Refusal(node, "language.call", "a helper takes its arguments by position", want=want)
    inner = {k: v for k, v in environment.items() if k in context.unit.bindings or "." in k}
    scope, setup = Scope(Returning(None), depth), c.NOTHING
    for argument, given in zip(declared, node.args, strict=True):
        code, inner[argument.arg] = _argument(argument, given, environment, scope, context)
        setup += code
    return function, scope, setup, inner


def _argument(
    argument: ast.arg, node: ast.expr, environment: Environment, scope: Scope, context: Context
) -> tuple[Code, Binding]:
    wanted = annotated(argument.annotation, argument, context)
    if isinstance(wanted, str):
        return c.NOTHING, _event(node, wanted, environment)
    value = context.evaluate(node, environment, context)
    if value.type != wanted:
        got = str(value.type)
        raise Refusal(node, "language.type", f"{argument.arg} has another type", want=str(wanted), got=got)
    places = context.locals_for(wanted)
    scope.names[argument.arg] = (wanted, places)
    puts = tuple(s for at in reversed(places) for s in c.put(at))
    return value.code + puts, Variable(wanted, places, value.span)


def _event(node: ast.expr, wanted: str, environment: Environment) -> Record:
    bound = environment.get(node.id) if isinstance(node, ast.Name) else None
    if not isinstance(bound, Record) or bound.event.__name__ != wanted:
        raise Refusal(node, "language.type", "the event of the handler is needed here", want=wanted)
    return bound
