"""Hostile sources: a page of text never becomes much code or work. They are refused for size, or stay small."""

from __future__ import annotations

import itertools

import pytest

from pointcall_executor.wasm import Runner
from pointcall_runbook import CompileError, Interpreter, compile_source
from pointcall_runbook.cpython import load

HEAD = "from pointcall_runbook import Again, Decision, Timer, runbook\n\n\n"
HANDLER = "@runbook\ndef due(e: Timer) -> Decision:\n"
END = "    return [Again(after=1)]\n"
MEMBERS = ", ".join(map(str, range(40)))


def nested_tuples(depth: int) -> str:
    value = "e.tag"
    for _ in range(depth):
        value = f"(int({value} in ({MEMBERS})) + e.restarts % 40)"
    return f"{HEAD}{HANDLER}    return [Again(after={value})]\n"


def nested_chains(depth: int) -> str:
    value = "e.tag"
    for _ in range(depth):
        value = f"int(e.at < {value} + e.restarts < 7)"
    return f"{HEAD}{HANDLER}    return [Again(after={value})]\n"


def helpers_of_helpers(depth: int) -> str:
    out = "def h0(a: int) -> int:\n    if a > 3:\n        return 1\n    return 2\n\n\n"
    for i in range(1, depth):
        out += f"def h{i}(a: int) -> int:\n    if h{i - 1}(a) > 1 and h{i - 1}(a + 1) > 1:\n"
        out += "        return 1\n    return 2\n\n\n"
    return f"{HEAD}{out}{HANDLER}    return [Again(after=h{depth - 1}(e.tag))]\n"


def negations(depth: int) -> str:
    test = "e.tag > 3"
    for i in range(depth):
        test = f"not ({test} and e.restarts > {i})"
    return f"{HEAD}{HANDLER}    if {test}:\n        return []\n{END}"


def loops(depth: int) -> str:
    out, pad = "    x = 0\n", "    "
    for i in range(depth):
        out += f"{pad}for i{i} in range(64):\n"
        pad += "    "
    return f"{HEAD}{HANDLER}{out}{pad}x = min(x + e.tag % 9, 9)\n    return [Again(after=x)]\n"


def chosen(operator: str, count: int) -> str:
    sign = "!=" if operator == "and" else "=="
    test = f" {operator} ".join(f"e.tag {sign} {i}" for i in range(count))
    return f"{HEAD}{HANDLER}    if {test}:\n        return []\n{END}"


def test_membership_of_a_computed_value_computes_it_once() -> None:
    sizes = [compile_source(nested_tuples(depth)).info.size for depth in (2, 3, 4, 5)]
    growth = [b - a for a, b in itertools.pairwise(sizes)]
    assert max(growth) - min(growth) <= 4  # longer LEB128 numbers


@pytest.mark.parametrize("tag", [0, 7, 40, 2**32 - 1])
def test_membership_of_a_computed_value_means_the_same_everywhere(tag: int) -> None:
    plain = load(nested_tuples(3))
    wasm, info = plain.compiled.wasm, plain.compiled.info
    for restarts in (0, 38, 39, 40, 2**32 - 1):
        args = (1, tag, 0, restarts)
        decided = Interpreter(wasm).run("Timer", args)
        assert Runner(wasm, info).decide("Timer", args) == decided
        assert plain.decide("Timer", args) == decided.calls


@pytest.mark.parametrize(
    "source",
    [
        helpers_of_helpers(8),
        loops(3),
        loops(6),
        chosen("and", 2000),
        chosen("or", 2000),
        nested_chains(14),
    ],
)
def test_what_unrolls_to_too_much_is_refused_for_its_size(source: str) -> None:
    with pytest.raises(CompileError) as caught:
        compile_source(source)
    assert {d.id for d in caught.value.diagnostics} <= {"language.size", "language.unreachable"}
    assert "language.size" in {d.id for d in caught.value.diagnostics}


@pytest.mark.parametrize("source", [negations(12), nested_tuples(8), helpers_of_helpers(3), chosen("or", 60)])
def test_what_looks_hostile_and_stays_small_is_accepted(source: str) -> None:
    assert compile_source(source).info.size < 8 * 1024
