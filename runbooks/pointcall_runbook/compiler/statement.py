"""Statements to code, with what is known after each. Control that cannot come is not read; it is reported at the end.

A statement gives `(code, environment)`; the environment is None where control does not go on behind it.
Spec: docs/spec/language.md, section "Statements".
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from pointcall_runbook.compiler import code as c
from pointcall_runbook.compiler.arithmetic import binary, whole
from pointcall_runbook.compiler.code import Code, step
from pointcall_runbook.compiler.condition import cases, condition, refined
from pointcall_runbook.compiler.context import MAX_ITERATIONS, Context, Loop
from pointcall_runbook.compiler.decision import decide
from pointcall_runbook.compiler.diagnostic import Poisoned, Refusal
from pointcall_runbook.compiler.names import check_new
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import (
    INT,
    Environment,
    Poison,
    Value,
    Variable,
    joined,
    settled,
)

Outcome = tuple[Code, Environment | None]
_IMPOSSIBLE: Final = step("unreachable")


def statements(body: Sequence[ast.stmt], environment: Environment | None, context: Context) -> Outcome:
    """A block, statement by statement. A refused statement is noted, and the next one is read all the same.

    Statements behind a return, break or continue are not read: what no run can reach is reported at the end.
    """
    code = c.NOTHING
    for node in body:
        if environment is None:
            break
        context.unit.live.add(id(node))
        piece, environment = _read(node, environment, context)
        code += c.at_line(piece, node.lineno)
    return code, environment


def _read(node: ast.stmt, environment: Environment, context: Context) -> Outcome:
    try:
        context.unit.spend(node)
        form = _FORMS.get(type(node))
        if form is None:
            raise Refusal(node, "language.form", f"{type(node).__name__} cannot stand inside a function")
        return form(node, environment, context)
    except Refusal as refusal:
        context.unit.diagnostics.add(refusal)
    except Poisoned:
        pass
    return c.NOTHING, _poisoned(node, environment)


def _poisoned(node: ast.stmt, environment: Environment) -> Environment | None:
    """After a refused statement: nothing is known of the names that it would have assigned."""
    if isinstance(node, ast.Return | ast.Break | ast.Continue):
        return None
    stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {**environment, **dict.fromkeys(stored, Poison.POISON)}


def _nothing(node: ast.stmt, environment: Environment, context: Context) -> Outcome:
    return c.NOTHING, environment


def _assign(node: ast.Assign | ast.AnnAssign, environment: Environment, context: Context) -> Outcome:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    assert isinstance(target, ast.Name), "checked by the grammar"
    if node.value is None:
        raise Refusal(node, "language.form", "a declaration without a value", hint=f"{target.id} = ...")
    value = context.evaluate(node.value, environment, context)
    if isinstance(node, ast.AnnAssign):
        _check_annotation(node.annotation, value)
    return store(target, value, environment, context)


def _check_annotation(node: ast.expr, value: Value) -> None:
    named = node.id if isinstance(node, ast.Name) else ""
    if named.lower() != str(value.type).lower():
        raise Refusal(node, "language.type", "the value has another type", want=named or "a name", got=str(value.type))


def _augmented(node: ast.AugAssign, environment: Environment, context: Context) -> Outcome:
    assert isinstance(node.target, ast.Name), "checked by the grammar"
    current = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
    left = whole(node.target, context.evaluate(current, environment, context))
    right = whole(node.value, context.evaluate(node.value, environment, context))
    return store(node.target, binary(node, left, right), environment, context)


def store(target: ast.Name, value: Value, environment: Environment, context: Context) -> Outcome:
    """Keep a value under a name of this function; a name keeps its type."""
    name, own = target.id, context.scope.names
    if name not in own:
        check_new(target, name, context.unit.names | {k for k in environment if "." not in k}, local=True)
        own[name] = (value.type, context.locals_for(value.type))
    type_, places = own[name]
    if type_ != value.type:
        raise Refusal(target, "language.type", f"{name} changes its type", want=str(type_), got=str(value.type))
    puts = tuple(s for at in reversed(places) for s in c.put(at))
    return value.code + puts, {**environment, name: Variable(type_, places, value.span)}


def _if(node: ast.If, environment: Environment, context: Context) -> Outcome:
    test = condition(node.test, environment, context)
    known, unknown = (refined(node.test, environment, truth, context) for truth in (True, False))
    return _branches(test, known, unknown, node.body, node.orelse, context)


def _branches(
    test: Value,
    known: Environment | None,
    unknown: Environment | None,
    body: Sequence[ast.stmt],
    orelse: Sequence[ast.stmt],
    context: Context,
) -> Outcome:
    """Both sides of a condition. A side that cannot be reached gives no code."""
    if known is None or unknown is None:
        return statements(body if unknown is None else orelse, known or unknown, context)
    then, after_then = statements(body, known, context)
    otherwise, after_otherwise = statements(orelse, unknown, context)
    after = joined([e for e in (after_then, after_otherwise) if e is not None])
    code = c.choose(test.code, then, otherwise) if then or otherwise else c.NOTHING
    return code + (_IMPOSSIBLE if after is None else c.NOTHING), after


def _match(node: ast.Match, environment: Environment, context: Context) -> Outcome:
    """Like if, elif, else; a `case _` behind all members can never run."""
    if not isinstance(node.subject, ast.Name | ast.Attribute):
        raise Refusal(node.subject, "language.form", "match takes a name or a field", hint="assign it first")
    return _cases(node, list(node.cases), environment, context)


def _cases(node: ast.Match, rest: list[ast.match_case], environment: Environment, context: Context) -> Outcome:
    if not rest:
        return c.NOTHING, environment
    case, *others = rest
    if isinstance(case.pattern, ast.MatchAs):
        if others:
            raise Refusal(others[0].pattern, "language.unreachable", "`case _` takes everything before this case")
        return statements(case.body, environment, context)
    test_node = cases(_patterns(case.pattern), node.subject)
    test = condition(test_node, environment, context)
    known, unknown = (refined(test_node, environment, truth, context) for truth in (True, False))
    if known is None:
        return _cases(node, others, environment, context)
    then, after_then = statements(case.body, known, context)
    if unknown is None:
        return then, after_then
    otherwise, after_otherwise = _cases(node, others, unknown, context)
    after = joined([e for e in (after_then, after_otherwise) if e is not None])
    code = c.choose(test.code, then, otherwise) if then or otherwise else c.NOTHING
    return code + (_IMPOSSIBLE if after is None else c.NOTHING), after


def _patterns(pattern: ast.pattern) -> list[ast.expr]:
    if isinstance(pattern, ast.MatchOr):
        return [value for inner in pattern.patterns for value in _patterns(inner)]
    if isinstance(pattern, ast.MatchValue):
        return [pattern.value]
    raise Refusal(pattern, "language.form", "`case _` stands alone and last")


def _for(node: ast.For, environment: Environment, context: Context) -> Outcome:
    """`for i in range(...)`, unrolled. Where the stop is not constant, each round first asks whether it is reached."""
    assert isinstance(node.target, ast.Name), "checked by the grammar"
    start, stop, limit = _range(node.iter, environment, context)
    setup, ask = _kept(limit, context)
    name = node.target.id
    if name in context.scope.names or name in environment:
        raise Refusal(node.target, "language.name", f"{name!r} is already used in this function")
    check_new(node.target, name, context.unit.names, local=True)
    loop = Loop()
    context.scope.loops.append(loop)
    code, after = _rounds(node, range(start, stop), ask, loop, environment, context)
    context.scope.loops.pop()
    ends = [*loop.broken, *([after] if after is not None else [])]
    left = joined(ends)
    code = setup + (c.block(loop.after, code) if loop.broken else code)
    if left is None:
        return code + _IMPOSSIBLE, None
    return code, {k: v for k, v in left.items() if k != name}


def _kept(limit: Value | None, context: Context) -> tuple[Code, Value | None]:
    """The stop of a loop in a local: range() looks at it once, even if the loop changes the name it came from."""
    if limit is None:
        return c.NOTHING, None
    (place,) = context.locals_for(INT)
    return limit.code + c.put(place), replace(limit, codes=(c.get(place),))


def _rounds(
    node: ast.For, rounds: range, ask: Value | None, loop: Loop, environment: Environment, context: Context
) -> Outcome:
    assert isinstance(node.target, ast.Name)
    code, known = c.NOTHING, environment
    for number in rounds:
        if ask is not None and ask.span.lo <= number:
            loop.broken.append(known)
            code += ask.code + c.constant(number) + step("i64.le_s") + step("br_if", loop.after)
        loop.next, loop.continued = c.Label(), []
        index = settled(Value(INT, ((),), Span.only(number)))
        inner, after = statements(node.body, {**known, node.target.id: index}, context)
        code += c.block(loop.next, inner) if loop.continued else inner
        ends = joined([*loop.continued, *([after] if after is not None else [])])
        if ends is None:
            return code, None
        known = ends
    return code, known


def _range(node: ast.expr, environment: Environment, context: Context) -> tuple[int, int, Value | None]:
    """First number, the number behind the last, and the value to ask in each round if that is not constant."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range"):
        raise Refusal(node, "language.loop", "a loop counts", hint="for i in range(3):")
    if node.keywords or not 1 <= len(node.args) <= 2:
        raise Refusal(node, "language.loop", "range takes one or two numbers", hint="range(stop) or range(start, stop)")
    values = [whole(a, context.evaluate(a, environment, context)) for a in node.args]
    start = values[0].span if len(values) == 2 else Span.only(0)
    stop = values[-1]
    if not start.constant or stop.span.hi - start.lo > MAX_ITERATIONS:
        got = f"range from {start} to {stop.span}"
        hint = "bound it: range(min(n, 8))"
        want = f"a constant start and at most {MAX_ITERATIONS} rounds"
        raise Refusal(node, "language.loop", "the loop has no small limit", want=want, got=got, hint=hint)
    return start.lo, stop.span.hi, None if stop.span.constant else stop


def _break(node: ast.Break, environment: Environment, context: Context) -> Outcome:
    loop = _innermost(node, context)
    loop.broken.append(environment)
    return step("br", loop.after), None


def _continue(node: ast.Continue, environment: Environment, context: Context) -> Outcome:
    loop = _innermost(node, context)
    loop.continued.append(environment)
    return step("br", loop.next), None


def _innermost(node: ast.stmt, context: Context) -> Loop:
    if not context.scope.loops:
        raise Refusal(node, "language.form", "there is no loop here")
    return context.scope.loops[-1]


def _return(node: ast.Return, environment: Environment, context: Context) -> Outcome:
    returning = context.scope.returning
    if returning.result is None:
        return decide(node.value, node, environment, context), None
    if node.value is None:
        raise Refusal(node, "language.type", "a helper returns a value", want=str(returning.result))
    value = context.evaluate(node.value, environment, context)
    if value.type != returning.result:
        raise Refusal(
            node, "language.type", "another type is returned", want=str(returning.result), got=str(value.type)
        )
    returning.span = value.span if returning.span is None else returning.span.joined(value.span)
    puts = tuple(s for at in reversed(returning.locals) for s in c.put(at))
    return value.code + puts + step("br", returning.label), None


_FORMS: Final[Mapping[type[ast.stmt], Callable[..., Outcome]]] = {
    ast.Expr: _nothing,
    ast.Pass: _nothing,
    ast.Assign: _assign,
    ast.AnnAssign: _assign,
    ast.AugAssign: _augmented,
    ast.If: _if,
    ast.Match: _match,
    ast.For: _for,
    ast.Break: _break,
    ast.Continue: _continue,
    ast.Return: _return,
}
