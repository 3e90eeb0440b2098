"""Integer operations: the code of each, the span of its result, and the proof that it cannot go wrong.

CPython and Wasm agree only where nothing overflows, no divisor is zero and rounding has one direction. What cannot be
proven is refused, and the message names values that would break it. Spec: docs/spec/language.md, "Arithmetic".
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pointcall_runbook.compiler import span
from pointcall_runbook.compiler.code import Code, constant, get, step, tee
from pointcall_runbook.compiler.context import Context, shown
from pointcall_runbook.compiler.diagnostic import Refusal
from pointcall_runbook.compiler.span import Span
from pointcall_runbook.compiler.value import INT, Value, settled
from pointcall_runbook.vocabulary import Kind

MAX_SHIFT: Final = 62

_OPERATIONS: Final[Mapping[type[ast.operator], tuple[str, Callable[[Span, Span], Span]]]] = {
    ast.Add: ("i64.add", span.add),
    ast.Sub: ("i64.sub", span.subtract),
    ast.Mult: ("i64.mul", span.multiply),
    ast.FloorDiv: ("i64.div_u", span.divide),
    ast.Mod: ("i64.rem_u", span.modulo),
    ast.LShift: ("i64.shl", span.shift_left),
    ast.RShift: ("i64.shr_s", span.shift_right),
    ast.BitAnd: ("i64.and", span.bits_and),
    ast.BitOr: ("i64.or", span.bits_or),
    ast.BitXor: ("i64.xor", span.bits_xor),
}
_SIGNED: Final = (ast.Add, ast.Sub, ast.Mult)


def whole(node: ast.expr, value: Value) -> Value:
    """The value, if it is an integer."""
    if value.type == INT:
        return value
    hint = f"write int({shown(node)})" if value.type.kind in (Kind.BOOL, Kind.ENUM) else ""
    raise Refusal(node, "language.type", "an integer is needed here", want="int", got=str(value.type), hint=hint)


def checked(node: ast.AST, code: Code, result: Span, operands: str) -> Value:
    """The result of an operation, if it fits into 64 bits whatever the operands are."""
    if not result.fits:
        raise Refusal(
            node,
            "language.overflow",
            "this can leave 64 bits",
            want=f"{span.LOWEST}..{span.HIGHEST}",
            got=f"{result} ({operands})",
            hint="bound an operand first: min(x, limit) or max(x, limit)",
        )
    return settled(Value(INT, (code,), result))


def binary(node: ast.BinOp | ast.AugAssign, left: Value, right: Value) -> Value:
    """`left <operator> right`; both are integers."""
    operator, (a, b) = type(node.op), (left.span, right.span)
    operands = f"left is {a}, right is {b}"
    if operator is ast.Pow:
        return _power(node, a, b)
    if operator not in _SIGNED:
        _check_signs(node, operator, a, b)
    name, spans = _OPERATIONS[operator]
    return checked(node, left.code + right.code + step(name), spans(a, b), operands)


def _power(node: ast.AST, base: Span, exponent: Span) -> Value:
    if not (base.constant and exponent.constant and base.fits and 0 <= exponent.lo <= 64):
        raise Refusal(node, "language.operand", "** takes two constants", want="0 <= exponent <= 64")
    return checked(node, (), Span.only(base.lo**exponent.lo), "")


def _check_signs(node: ast.AST, operator: type[ast.operator], a: Span, b: Span) -> None:
    if operator in (ast.FloorDiv, ast.Mod):
        if b.lo <= 0 <= b.hi:
            raise Refusal(
                node,
                "language.division",
                "the divisor can be zero",
                want="a divisor that is proven to be at least 1",
                got=f"right is {b}; 0 breaks it",
                hint="test it first: if x == 0: return []   or divide by max(x, 1)",
            )
        _not_negative(node, a, b)
    elif operator in (ast.LShift, ast.RShift):
        if not b.within(0, MAX_SHIFT):
            hint = f"bound it: min(x, {MAX_SHIFT})"
            want = f"a shift by 0..{MAX_SHIFT}"
            raise Refusal(
                node, "language.operand", "the shift can be too far", want=want, got=f"right is {b}", hint=hint
            )
        _not_negative(node, a if operator is ast.LShift else b, b)
    else:
        _not_negative(node, a, b)


def _not_negative(node: ast.AST, a: Span, b: Span) -> None:
    for side, operand in (("left", a), ("right", b)):
        if operand.lo < 0:
            raise Refusal(
                node,
                "language.operand",
                "an operand can be negative, where rounding would differ",
                want="both at least 0",
                got=f"{side} is {operand}; {operand.lo} breaks it",
                hint="bound it: max(x, 0)",
            )


def negative(node: ast.UnaryOp, value: Value) -> Value:
    code = constant(0) + value.code + step("i64.sub")
    return checked(node, code, span.negate(value.span), f"the operand is {value.span}")


def absolute(node: ast.Call, value: Value, context: Context) -> Value:
    """abs(x) = x if x >= 0 else 0 - x."""
    first, again = _twice(value, context)
    code = first + constant(0) + again + step("i64.sub") + again + constant(0) + step("i64.ge_s") + step("select")
    return checked(node, code, span.absolute(value.span), f"the operand is {value.span}")


def extreme(name: str, values: Sequence[Value], context: Context) -> Value:
    """min(...) or max(...) of two or more integers."""
    out = values[0]
    compare, spans = ("i64.lt_s", span.smaller) if name == "min" else ("i64.gt_s", span.larger)
    for value in values[1:]:
        left, left_again = _twice(out, context)
        right, right_again = _twice(value, context)
        code = left + right + left_again + right_again + step(compare) + step("select")
        out = settled(Value(INT, (code,), spans(out.span, value.span)))
    return out


def _twice(value: Value, context: Context) -> tuple[Code, Code]:
    """Code that gives the value, and code that gives it again without computing it again."""
    if len(value.code) == 1:
        return value.code, value.code
    kept = context.function.local()
    return value.code + tee(kept), get(kept)
