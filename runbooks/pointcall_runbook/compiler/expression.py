"""Expressions to values: one function a form. Every result has a proven span. Spec: docs/spec/language.md."""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from pointcall_runbook.compiler import code as c
from pointcall_runbook.compiler import span
from pointcall_runbook.compiler.arithmetic import absolute, binary, checked, extreme, negative, whole
from pointcall_runbook.compiler.code import step
from pointcall_runbook.compiler.condition import (
    address_value,
    comparison,
    condition,
    connected,
    negation,
    refined,
)
from pointcall_runbook.compiler.context import Context, shown
from pointcall_runbook.compiler.diagnostic import Poisoned, Refusal
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import (
    BOOL,
    CHANNEL,
    INT,
    SERVICE,
    Environment,
    Poison,
    Record,
    Type,
    Value,
    Variable,
    settled,
)
from pointcall_runbook.opcode import EMPTY
from pointcall_runbook.sdk import DURATIONS, NAMES
from pointcall_runbook.vocabulary import Action, Address, Event, Kind, Network, channel, fields, service

_NAMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}\Z")  # the names of services and channels


def evaluate(node: ast.expr, environment: Environment, context: Context) -> Value:
    """The value of an expression. Raises Refusal where it is outside the language or cannot be proven safe."""
    context.unit.spend(node)
    form = _FORMS.get(type(node))
    if form is None:
        hint = "actions belong into the returned list" if isinstance(node, ast.List) else ""
        raise Refusal(node, "language.form", "this is not a value", got=shown(node), hint=hint)
    return form(node, environment, context)


def _constant(node: ast.Constant, environment: Environment, context: Context) -> Value:
    if isinstance(node.value, bool):
        return settled(Value(BOOL, ((),), Span.only(int(node.value))))
    if not isinstance(node.value, int):
        raise Refusal(node, "language.type", "text is not a value here", got=shown(node))
    return checked(node, (), Span.only(node.value), "")


def _name(node: ast.Name, environment: Environment, context: Context) -> Value:
    bound = environment.get(node.id)
    match bound:
        case Variable():
            return bound.value
        case Value():
            return bound
        case Poison():
            raise Poisoned
        case Network() | Record():
            hint = "a field: e.failures" if isinstance(bound, Record) else f"e.address in {node.id}"
            raise Refusal(node, "language.type", f"{node.id} is not a value by itself", hint=hint)
        case None:
            raise _unknown(node, context)


def _unknown(node: ast.Name, context: Context) -> Refusal:
    if node.id in context.scope.names:
        hint = "assign it before the if, or on every path"
        return Refusal(node, "language.unassigned", f"{node.id} may have no value here", hint=hint)
    if node.id in context.unit.imported or node.id in context.unit.helpers:
        return Refusal(node, "language.type", f"{node.id} is not a value by itself")
    hint = f"from pointcall_runbook import {node.id}" if node.id in NAMES else ""
    return Refusal(node, "language.unknown", f"nothing here is called {node.id!r}", hint=hint)


def _attribute(node: ast.Attribute, environment: Environment, context: Context) -> Value:
    assert isinstance(node.value, ast.Name), "checked by the grammar"
    owner = node.value.id
    bound = environment.get(owner)
    if isinstance(bound, Record):
        return _field(node, bound, environment)
    if isinstance(bound, Variable) and bound.slot is not None and node.attr == "slot":
        return settled(Value(INT, ((),), Span.only(bound.slot)))
    if bound is Poison.POISON:
        raise Poisoned
    members = NAMES.get(owner) if owner in context.unit.imported else None
    if isinstance(members, type) and issubclass(members, enum.IntEnum):
        return _member(node, members)
    if owner in NAMES and owner not in context.unit.imported:
        raise _unknown(node.value, context)
    raise Refusal(node, "language.unknown", f"{owner} has no {node.attr!r}", hint="fields belong to the event")


def _field(node: ast.Attribute, record: Record, environment: Environment) -> Value:
    bound = environment.get(f"{record.root}.{node.attr}")
    if isinstance(bound, Variable):
        return bound.value
    names = ", ".join(f.name for f in fields(record.event))
    event = record.event.__name__
    raise Refusal(node, "language.unknown", f"{event} has no field {node.attr!r}", want=names)


def _member(node: ast.Attribute, members: type[enum.IntEnum]) -> Value:
    if node.attr not in members.__members__:
        want = ", ".join(members.__members__)
        raise Refusal(node, "language.unknown", f"{members.__name__} has no member {node.attr!r}", want=want)
    number = int(members[node.attr])
    return settled(Value(Type(Kind.ENUM, members), ((),), Span.of(frozenset({number}))))


def _binary(node: ast.BinOp, environment: Environment, context: Context) -> Value:
    left, right = (whole(side, context.evaluate(side, environment, context)) for side in (node.left, node.right))
    return binary(node, left, right)


def _unary(node: ast.UnaryOp, environment: Environment, context: Context) -> Value:
    if isinstance(node.op, ast.Not):
        return negation(node, environment, context)
    if isinstance(node.operand, ast.Constant) and type(node.operand.value) is int:
        return checked(node, (), Span.only(-node.operand.value), "")
    return negative(node, whole(node.operand, context.evaluate(node.operand, environment, context)))


def _either(node: ast.IfExp, environment: Environment, context: Context) -> Value:
    """`a if test else b`; a side that cannot be reached is not read."""
    test = condition(node.test, environment, context)
    sides = []
    for truth, side in ((True, node.body), (False, node.orelse)):
        known = refined(node.test, environment, truth, context)
        sides.append(None if known is None else context.evaluate(side, known, context))
    then, otherwise = sides
    if then is None or otherwise is None:
        only = then or otherwise
        assert only is not None, "one side of a condition can be reached"
        return only
    if then.type != otherwise.type:
        got = f"{then.type} and {otherwise.type}"
        raise Refusal(node, "language.type", "the two sides have different types", got=got)
    return choice(test, then, otherwise, context)


def choice(test: Value, then: Value, otherwise: Value, context: Context) -> Value:
    """One of two values of the same type."""
    joint = then.span.joined(otherwise.span)
    if len(then.codes) == 1:
        kept = c.wasm_type(then.type == BOOL)
        return settled(Value(then.type, (c.choose(test.code, then.code, otherwise.code, kept),), joint))
    places = context.locals_for(then.type)
    stores = [_stored(value, places) for value in (then, otherwise)]
    code = c.choose(test.code, stores[0], stores[1], EMPTY) + c.get(places[0])
    return Value(then.type, (code, *(c.get(at) for at in places[1:])), joint)


def _stored(value: Value, places: tuple[c.Local, ...]) -> c.Code:
    return value.code + tuple(s for at in reversed(places) for s in c.put(at))


def _call(node: ast.Call, environment: Environment, context: Context) -> Value:
    if isinstance(node.func, ast.Attribute):
        return _address(node, context)
    assert isinstance(node.func, ast.Name), "checked by the grammar"
    name = node.func.id
    if name in context.unit.helpers:
        return context.inline(node, environment, context)
    if name in _PYTHON:
        return _PYTHON[name](node, environment, context)
    if name in NAMES and name not in context.unit.imported:
        raise _unknown(node.func, context)
    if name in DURATIONS:
        return _duration(node, DURATIONS[name], environment, context)
    if name in ("service", "channel"):
        return _target(node, name, context)
    raise _not_callable(node, name)


def _not_callable(node: ast.Call, name: str) -> Refusal:
    known = NAMES.get(name)
    if isinstance(known, type) and issubclass(known, Action):
        return Refusal(node, "language.form", "an action belongs into the returned list", hint=f"return [{name}(...)]")
    if isinstance(known, type) and issubclass(known, Event):
        return Refusal(node, "language.form", "an event cannot be made here", hint="write tests for that")
    hint = "helpers, min, max, abs, int, seconds, service, channel"
    return Refusal(node, "language.unknown", f"{name!r} cannot be called here", want=hint)


def _arguments(node: ast.Call, least: int, most: int, environment: Environment, context: Context) -> list[Value]:
    if node.keywords or not least <= len(node.args) <= most:
        many = str(least) if least == most else f"{least}..{most}"
        raise Refusal(
            node, "language.call", "another number of arguments is needed", want=many, got=str(len(node.args))
        )
    return [context.evaluate(a, environment, context) for a in node.args]


def _extreme(node: ast.Call, environment: Environment, context: Context) -> Value:
    assert isinstance(node.func, ast.Name)
    values = _arguments(node, 2, 8, environment, context)
    return extreme(node.func.id, [whole(a, v) for a, v in zip(node.args, values, strict=True)], context)


def _absolute(node: ast.Call, environment: Environment, context: Context) -> Value:
    (value,) = _arguments(node, 1, 1, environment, context)
    return absolute(node, whole(node.args[0], value), context)


def _integer(node: ast.Call, environment: Environment, context: Context) -> Value:
    """int(x) of an enum, a bool or an integer."""
    (value,) = _arguments(node, 1, 1, environment, context)
    if value.type == BOOL:
        return settled(replace(value, type=INT, codes=(value.code + step("i64.extend_i32_u"),)))
    if value.type.kind not in (Kind.ENUM, Kind.INT):
        raise Refusal(node, "language.type", "this is not a number", got=str(value.type))
    return replace(value, type=INT, span=Span(value.span.lo, value.span.hi))


def _duration(node: ast.Call, unit_ns: int, environment: Environment, context: Context) -> Value:
    (value,) = _arguments(node, 1, 1, environment, context)
    count = whole(node.args[0], value)
    result = span.multiply(count.span, Span.only(unit_ns))
    return checked(node, count.code + c.constant(unit_ns) + step("i64.mul"), result, f"the count is {count.span}")


def text_argument(node: ast.Call) -> str:
    """The one literal text of service(), channel(), Address.parse()."""
    only = node.args[0] if len(node.args) == 1 and not node.keywords else None
    if not isinstance(only, ast.Constant) or not isinstance(only.value, str):
        raise Refusal(node, "language.constant", "one literal text is needed", hint=f'{shown(node.func)}("...")')
    return only.value


def _target(node: ast.Call, kind: str, context: Context) -> Value:
    name = text_argument(node)
    if not _NAMED.match(name):
        raise Refusal(node, "language.constant", f"not the name of a {kind}", want=_NAMED.pattern, got=name[:80])
    if kind == "service":
        context.unit.services.add(name)
        return settled(Value(SERVICE, ((),), Span.only(service(name).number)))
    context.unit.channels.add(name)
    return settled(Value(CHANNEL, ((),), Span.only(channel(name).number)))


def _address(node: ast.Call, context: Context) -> Value:
    text = text_argument(node)
    if "Address" not in context.unit.imported:
        raise _unknown(ast.copy_location(ast.Name("Address"), node), context)
    try:
        return address_value(Address.parse(text))
    except ValueError:
        raise Refusal(node, "language.constant", "not an address", got=text[:60], hint='"10.0.0.1" or "::1"') from None


_PYTHON: Final = {"min": _extreme, "max": _extreme, "abs": _absolute, "int": _integer}
_FORMS: Final[Mapping[type[ast.expr], Callable[..., Value]]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.BoolOp: connected,
    ast.Compare: comparison,
    ast.IfExp: _either,
    ast.Call: _call,
}
