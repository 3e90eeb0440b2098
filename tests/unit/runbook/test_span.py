"""Interval analysis is sound: no value ever leaves the span that was proven for it, also at the ends of 64 bits."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.wasm import Runner
from pointcall_runbook import CompileError, Interpreter
from pointcall_runbook.compiler import span
from pointcall_runbook.compiler.span import HIGHEST, LOWEST, Span
from pointcall_runbook.cpython import Plain, load
from tests.fuzz.runbook.values import integers

Operation = Callable[[int, int], int]
TWO: dict[str, tuple[Operation, Callable[[Span, Span], Span], int, int]] = {
    # name: on integers, on spans, lowest operands that the compiler lets through
    "+": (operator.add, span.add, LOWEST, LOWEST),
    "-": (operator.sub, span.subtract, LOWEST, LOWEST),
    "*": (operator.mul, span.multiply, LOWEST, LOWEST),
    "//": (operator.floordiv, span.divide, 0, 1),
    "%": (operator.mod, span.modulo, 0, 1),
    "&": (operator.and_, span.bits_and, 0, 0),
    "|": (operator.or_, span.bits_or, 0, 0),
    "^": (operator.xor, span.bits_xor, 0, 0),
    "min": (min, span.smaller, LOWEST, LOWEST),
    "max": (max, span.larger, LOWEST, LOWEST),
}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def ranges(lo: int = LOWEST, hi: int = HIGHEST) -> st.SearchStrategy[tuple[Span, int]]:
    """A span, narrow or wide, and a value in it."""
    ends = st.one_of(st.integers(max(lo, -40), 40), integers(lo, hi))
    pair = st.tuples(ends, ends).map(lambda p: Span(min(p), max(p)))
    return pair.flatmap(lambda s: st.tuples(st.just(s), integers(s.lo, s.hi)))


@pytest.mark.parametrize("name", TWO)
@given(st.data())
def test_a_result_is_in_its_span(name: str, data: st.DataObject) -> None:
    compute, spans, lowest_a, lowest_b = TWO[name]
    (a, x), (b, y) = data.draw(ranges(lowest_a)), data.draw(ranges(lowest_b))
    result = spans(a, b)
    assert result.lo <= compute(x, y) <= result.hi
    assert not (a.constant and b.constant) or result.constant


@given(ranges(0), st.integers(0, 62), st.integers(0, 62))
def test_a_shift_is_in_its_span(a: tuple[Span, int], n: int, m: int) -> None:
    far = Span(min(n, m), max(n, m))
    for by in (n, m):
        left, right = span.shift_left(a[0], far), span.shift_right(a[0], far)
        assert left.lo <= a[1] << by <= left.hi
        assert right.lo <= a[1] >> by <= right.hi


@given(ranges())
def test_one_operand(a: tuple[Span, int]) -> None:
    held, x = a
    assert span.negate(held).lo <= -x <= span.negate(held).hi
    assert span.absolute(held).lo <= abs(x) <= span.absolute(held).hi


@given(st.sampled_from(sorted(COMPARISONS)), ranges(), ranges())
def test_a_cut_keeps_every_value_that_can_be(sign: str, a: tuple[Span, int], b: tuple[Span, int]) -> None:
    (held, x), (other, y) = a, b
    cut = held.cut(sign, other)
    if COMPARISONS[sign](x, y):
        assert cut is not None
        assert cut.lo <= x <= cut.hi
    if cut is not None:
        assert cut.within(held.lo, held.hi)


@given(st.sampled_from(sorted(COMPARISONS)), st.frozensets(st.integers(0, 5), min_size=1), st.integers(0, 5))
def test_a_cut_of_members_is_exact(sign: str, members: frozenset[int], y: int) -> None:
    cut = Span.of(members).cut(sign, Span.only(y))
    left = {m for m in members if COMPARISONS[sign](m, y)}
    assert (set(cut.members or ()) if cut else set()) == left


SOURCE = """from pointcall_runbook import Again, Decision, Notify, Level, Timer, channel, parameter, runbook

A = parameter({a.lo}, lo={a.lo}, hi={a.hi})
B = parameter({b.lo}, lo={b.lo}, hi={b.hi})
OPS = channel("ops")


@runbook
def due(e: Timer) -> Decision:
    x = {expression}
    return [
        Notify(channel=OPS, level=Level.INFO, code=(x if x >= 0 else -1 - x) & 4294967295),
        Notify(channel=OPS, level=Level.INFO, code=(x if x >= 0 else -1 - x) >> 31),
        Again(after=int(x < B), tag=int(x == A)),
    ]
"""
EXPRESSIONS = (
    *(f"A {sign} B" for sign in ("+", "-", "*", "//", "%", "&", "|", "^", "<<", ">>")),
    *("min(A, B)", "max(A, B, 7)", "abs(A)", "-B", "abs(A - B)", "A if A > B else B", "(A + B) // 2", "A * 3 - B"),
    *(
        "A // B if B > 0 and A >= 0 else A",
        "A - B if A > 0 and B > 0 else 1",
        "A + 1 if A < B else A - 1 if A > B else 0",
    ),
)
PROVEN = {"language.overflow", "language.operand", "language.division", "language.unreachable", "language.range"}


def proven(source: str) -> Plain | None:
    """The program, or None where it is refused because a value could break it."""
    try:
        return load(source)
    except CompileError as refusal:
        if not {d.id for d in refusal.diagnostics} <= PROVEN:
            raise AssertionError(source) from refusal
        return None


def test_the_ends_of_64_bits_are_within_reach() -> None:
    """Otherwise the test below proves little."""
    wide, narrow = Span(LOWEST, HIGHEST), Span(1, 9)
    for expression, a, b in (("A % B", Span(0, HIGHEST), narrow), ("min(A, B)", wide, wide), ("A + B", narrow, narrow)):
        assert proven(SOURCE.format(a=a, b=b, expression=expression)) is not None
    assert proven(SOURCE.format(a=wide, b=narrow, expression="A + B")) is None


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(EXPRESSIONS), ranges(), ranges(), st.data())
def test_what_is_accepted_agrees_up_to_the_ends_of_64_bits(
    expression: str, first: tuple[Span, int], second: tuple[Span, int], data: st.DataObject
) -> None:
    (a, x), (b, y) = first, second
    plain = proven(SOURCE.format(a=a, b=b, expression=expression))
    if plain is None:
        return
    runner, interpreter = Runner(plain.compiled.wasm, plain.compiled.info), Interpreter(plain.compiled.wasm)
    for p, q in ((x, y), (a.lo, b.lo), (a.lo, b.hi), (a.hi, b.lo), (a.hi, b.hi)):
        args = (1, 2, 3, 4, p, q)
        decided = runner.decide("Timer", args)
        assert interpreter.run("Timer", args) == decided
        assert plain.decide("Timer", args) == decided.calls
