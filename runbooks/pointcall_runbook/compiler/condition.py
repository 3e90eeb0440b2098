"""Conditions: comparisons, membership, and/or/not; and what is known of the names once a condition held or not.

Spec: docs/spec/language.md, section "Conditions".
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from pointcall_runbook.compiler import code as c
from pointcall_runbook.compiler.code import Code, step
from pointcall_runbook.compiler.context import Context, shown
from pointcall_runbook.compiler.diagnostic import Refusal
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import ADDRESS, BOOL, INT, Environment, Record, Value, Variable, joined, settled
from pointcall_runbook.opcode import I32
from pointcall_runbook.vocabulary import Address, Network

_COMPARE: Final[Mapping[type[ast.cmpop], tuple[str, str]]] = {
    ast.Eq: ("==", "eq"),
    ast.NotEq: ("!=", "ne"),
    ast.Lt: ("<", "lt_s"),
    ast.LtE: ("<=", "le_s"),
    ast.Gt: (">", "gt_s"),
    ast.GtE: (">=", "ge_s"),
}
_NEGATED: Final = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_MIRRORED: Final = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_EITHER: Final = Span(0, 1)


def boolean(code: Code, known: bool | None = None) -> Value:
    return settled(Value(BOOL, (code,), _EITHER if known is None else Span.only(int(known))))


def condition(node: ast.expr, environment: Environment, context: Context) -> Value:
    """The value of a condition. Numbers are not conditions."""
    value = context.evaluate(node, environment, context)
    if value.type != BOOL:
        hint = f"write a comparison: {shown(node)} > 0" if value.type == INT else "write a comparison: x == ..."
        raise Refusal(node, "language.type", "a condition is needed here", want="bool", got=str(value.type), hint=hint)
    return value


def negation(node: ast.UnaryOp, environment: Environment, context: Context) -> Value:
    value = condition(node.operand, environment, context)
    known = not value.span.lo if value.span.constant else None
    return boolean(value.code + step("i32.eqz"), known)


def connected(node: ast.BoolOp, environment: Environment, context: Context) -> Value:
    """`and`, `or`: later operands are read with what the earlier ones tell, and not at all where they decide."""
    is_and = isinstance(node.op, ast.And)
    out = condition(node.values[0], environment, context)
    known: Environment | None = environment
    for before, operand in zip(node.values, node.values[1:], strict=False):
        known = refined(before, known, is_and, context)
        if known is None:
            return out
        out = _connect(out, condition(operand, known, context), is_and)
    return out


def _connect(left: Value, right: Value, is_and: bool) -> Value:
    if left.span.constant:
        return right if bool(left.span.lo) is is_and else left
    if right.span.constant:
        return left if bool(right.span.lo) is is_and else right
    if is_and:
        return boolean(c.choose(left.code, right.code, c.truth(False), I32))
    return boolean(c.choose(left.code, c.truth(True), right.code, I32))


def comparison(node: ast.Compare, environment: Environment, context: Context) -> Value:
    """One or a chain of comparisons."""
    sides = [node.left, *node.comparators]
    out: Value | None = None
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        part = _compare_one(node, left, operator, right, environment, context)
        out = part if out is None else _connect(out, part, is_and=True)
    assert out is not None, "a comparison has an operator"
    return out


def _compare_one(
    node: ast.Compare, left: ast.expr, operator: ast.cmpop, right: ast.expr, environment: Environment, context: Context
) -> Value:
    if isinstance(operator, ast.In | ast.NotIn):
        found = _membership(left, right, environment, context)
        if isinstance(operator, ast.In):
            return found
        return boolean(found.code + step("i32.eqz"), not found.span.lo if found.span.constant else None)
    a, b = (context.evaluate(side, environment, context) for side in (left, right))
    return _compare_values(node, a, type(operator), b)


def _compare_values(node: ast.AST, a: Value, operator: type[ast.cmpop], b: Value) -> Value:
    sign, name = _COMPARE[operator]
    if a.type != b.type:
        raise Refusal(
            node,
            "language.type",
            "two types that cannot be compared",
            want=f"{a.type} {sign} {a.type}",
            got=f"{a.type} {sign} {b.type}",
            hint="members of an enum: e.operation == Operation.READ; a service: e.service == NO_SERVICE",
        )
    if a.type != INT and sign not in ("==", "!="):
        raise Refusal(node, "language.type", f"{a.type} has no order", want="== or !=", got=sign)
    if a.type == ADDRESS:
        equal = _same_address(a, b)
        return equal if sign == "==" else boolean(equal.code + step("i32.eqz"))
    width = "i32" if a.type == BOOL else "i64"
    return boolean(a.code + b.code + step(f"{width}.{name}"), _decided(a.span, sign, b.span))


def _decided(a: Span, sign: str, b: Span) -> bool | None:
    """Whether the spans alone decide a comparison."""
    if a.cut(sign, b) is None or b.cut(_MIRRORED[sign], a) is None:
        return False
    if a.cut(_NEGATED[sign], b) is None or b.cut(_MIRRORED[_NEGATED[sign]], a) is None:
        return True
    return None


def _same_address(a: Value, b: Value) -> Value:
    halves = [x + y + step("i64.eq") for x, y in zip(a.codes, b.codes, strict=True)]
    return boolean(halves[0] + halves[1] + step("i32.and"))


def _membership(left: ast.expr, right: ast.expr, environment: Environment, context: Context) -> Value:
    if isinstance(right, ast.Tuple):
        return _in_tuple(left, right, environment, context)
    network = network_of(right, environment)
    value = context.evaluate(left, environment, context)
    if network is None or value.type != ADDRESS:
        hint = 'e.address in Network("10.0.0.0/8")   or   e.port in (80, 443)'
        raise Refusal(right, "language.type", "membership needs a network or a tuple", got=shown(right), hint=hint)
    return _in_network(value, network)


def network_of(node: ast.expr, environment: Environment) -> Network | None:
    """A named or literal network; Refusal where the text is none."""
    if isinstance(node, ast.Name):
        bound = environment.get(node.id)
        return bound if isinstance(bound, Network) else None
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Network"):
        return None
    text = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
    if not isinstance(text, str) or len(text) > 64 or node.keywords:
        raise Refusal(node, "language.constant", "not a network", hint='Network("10.0.0.0/8")')
    try:
        return Network(text)
    except ValueError as error:
        raise Refusal(node, "language.constant", "not a network", got=str(error)[:80]) from None


def _in_network(address: Value, network: Network) -> Value:
    first, prefix = network.bits
    if prefix == 0:
        return boolean((), known=True)
    high, low = address.codes
    if prefix <= 64:
        return boolean(_prefix(high, first.hi, prefix))
    return boolean(_prefix(high, first.hi, 64) + _prefix(low, first.lo, prefix - 64) + step("i32.and"))


def _prefix(half: Code, first: int, bits: int) -> Code:
    """Do the upper `bits` of this half agree with `first`? A bool."""
    shift = 64 - bits
    shifted = half + c.constant(shift) + step("i64.shr_u") if shift else half
    return shifted + c.constant(signed(first >> shift)) + step("i64.eq")


def signed(half: int) -> int:
    """An unsigned 64-bit number as the i64 with the same bits."""
    return half - 2**64 if half >= 2**63 else half


def address_value(address: Address) -> Value:
    codes = (c.constant(signed(address.hi)), c.constant(signed(address.lo)))
    return Value(ADDRESS, codes, ADDRESS.everything)


def _in_tuple(left: ast.expr, right: ast.Tuple, environment: Environment, context: Context) -> Value:
    if not right.elts:
        raise Refusal(right, "language.form", "an empty tuple has no members")
    setup, value = _held(context.evaluate(left, environment, context), context)
    out: Value | None = None
    for item in right.elts:
        part = _compare_values(item, value, ast.Eq, context.evaluate(item, environment, context))
        out = part if out is None else _connect(out, part, is_and=False)
    assert out is not None
    return settled(replace(out, codes=(setup + out.code,)))


def _held(value: Value, context: Context) -> tuple[Code, Value]:
    """Code that keeps a value, and the kept one: repeated for each member, nested tuples would grow without limit."""
    if all(len(code) == 1 for code in value.codes):
        return (), value
    places = context.locals_for(value.type)
    puts = tuple(s for at in reversed(places) for s in c.put(at))
    return value.code + puts, replace(value, codes=tuple(c.get(at) for at in places))


def refined(node: ast.expr, known: Environment | None, truth: bool, context: Context) -> Environment | None:
    """What is known after the condition was `truth`; None where it cannot be."""
    if known is None:
        return None
    context.unit.spend(node)
    match node:
        case ast.UnaryOp(op=ast.Not()):
            return refined(node.operand, known, not truth, context)
        case ast.BoolOp():
            return _refined_connection(node, known, truth, context)
        case ast.Compare():
            return _refined_comparison(node, known, truth, context)
        case _:
            return _refined_name(node, Span.only(int(truth)), "==", _contradiction(node, known, truth, context))


def _contradiction(node: ast.expr, known: Environment, truth: bool, context: Context) -> Environment | None:
    """`known`, unless the condition is already decided the other way."""
    value = context.glance(node, known)
    if value is not None and value.span.constant and bool(value.span.lo) is not truth:
        return None
    return known


def _refined_connection(node: ast.BoolOp, known: Environment, truth: bool, context: Context) -> Environment | None:
    is_and = isinstance(node.op, ast.And)
    rest: Environment | None = known
    if is_and is truth:
        for operand in node.values:
            rest = refined(operand, rest, truth, context)
        return rest
    outcomes: list[Environment] = []
    for operand in node.values:  # the first operand that decides is this one
        decided = refined(operand, rest, truth, context)
        outcomes += [decided] if decided is not None else []
        rest = refined(operand, rest, not truth, context)
    return joined(outcomes)


def _refined_comparison(node: ast.Compare, known: Environment, truth: bool, context: Context) -> Environment | None:
    out = _contradiction(node, known, truth, context)
    sides = [node.left, *node.comparators]
    if out is None or (len(node.ops) > 1 and not truth):
        return out
    for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
        if isinstance(operator, ast.In | ast.NotIn):
            out = _refined_membership(left, right, isinstance(operator, ast.In) is truth, out, context)
        else:
            sign = _COMPARE[type(operator)][0]
            out = _refined_pair(left, sign if truth else _NEGATED[sign], right, out, context)
    return out


def _refined_pair(
    left: ast.expr, sign: str, right: ast.expr, known: Environment | None, context: Context
) -> Environment | None:
    for name, how, other in ((left, sign, right), (right, _MIRRORED[sign], left)):
        if known is None:
            return None
        value = context.glance(other, known)
        if value is not None and value.type != ADDRESS:
            known = _refined_name(name, value.span, how, known)
    return known


def _refined_membership(
    left: ast.expr, right: ast.expr, inside: bool, known: Environment | None, context: Context
) -> Environment | None:
    if not isinstance(right, ast.Tuple):
        return known
    if not inside:
        for item in right.elts:
            known = _refined_pair(left, "!=", item, known, context)
        return known
    outcomes = [_refined_pair(left, "==", item, known, context) for item in right.elts]
    return joined([o for o in outcomes if o is not None])


def _refined_name(node: ast.expr, other: Span, sign: str, known: Environment | None) -> Environment | None:
    """Cut the span of a name or field; anything else tells nothing."""
    key = key_of(node, known) if known is not None else None
    if known is None or key is None:
        return known
    variable = known.get(key)
    if not isinstance(variable, Variable) or variable.type == ADDRESS:
        return known
    cut = variable.span.cut(sign, other)
    return None if cut is None else {**known, key: replace(variable, span=cut)}


def key_of(node: ast.expr, environment: Environment) -> str | None:
    """The name under which a value is found in the environment."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        record = environment.get(node.value.id)
        return f"{record.root}.{node.attr}" if isinstance(record, Record) else None
    return None


def cases(patterns: Sequence[ast.expr], subject: ast.expr) -> ast.expr:
    """A case of `match` as the comparison it stands for."""
    place = patterns[0]
    if len(patterns) == 1:
        return ast.copy_location(ast.Compare(subject, [ast.Eq()], [place]), place)
    members = ast.copy_location(ast.Tuple(list(patterns), ast.Load()), place)
    return ast.copy_location(ast.Compare(subject, [ast.In()], [members]), place)
