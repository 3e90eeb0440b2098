"""What the compiler refuses: each source differs from the good one in one place, and has exactly one complaint."""

from __future__ import annotations

import ast

import pytest

from pointcall_runbook import CompileError, compile_source

GOOD = '''"""A runbook."""
from pointcall_runbook import CircuitOpened, Decision, Level, Network, Notify, Recreate, Remember, channel, parameter
from pointcall_runbook import remembered, runbook, seconds

OPS = channel("ops")
MAX = parameter(3, lo=0, hi=10)
TRIES = remembered(0, hi=10)


def helper(n: int) -> int:
    return min(n, 5)


@runbook
def decide(e: CircuitOpened) -> Decision:
    x = helper(e.restarts) + MAX
    pass
    return [Notify(channel=OPS, level=Level.INFO, code=x), Remember(slot=TRIES.slot, value=min(TRIES + 1, 10))]
'''
ENTRY = "@runbook\ndef decide(e: CircuitOpened) -> Decision:\n"


def refused(source: str) -> list[str]:
    with pytest.raises(CompileError) as caught:
        compile_source(source)
    return [d.id for d in caught.value.diagnostics]


def test_the_good_one_is_good() -> None:
    assert compile_source(GOOD).info.capabilities == ("notify", "remember")


@pytest.mark.parametrize(
    ("statement", "id"),
    [
        ("while True: pass", "language.form"),
        ("import os", "language.form"),
        ("y = e.failures / 2", "language.form"),
        ("y = 1.5", "language.form"),
        ("y = 'text'", "language.form"),
        ("y = None", "language.form"),
        ("y = [n for n in (1, 2)]", "language.form"),
        ("y = (lambda: 1)()", "language.form"),
        ("y = f'{x}'", "language.form"),
        ("y = e.address.packed", "language.form"),
        ("y = x if (z := x) > 1 else 2", "language.form"),
        ("print(x)", "language.form"),
        ("global x", "language.syntax"),
        ("x: int", "language.form"),
        ("y = e.failures // e.restarts", "language.division"),
        ("y = e.failures % MAX", "language.division"),
        ("y = e.at + 1", "language.overflow"),
        ("y = e.at * 2", "language.overflow"),
        ("y = -9223372036854775809", "language.overflow"),
        ("y = 1 << e.restarts", "language.operand"),
        ("y = (x - 9) // 2", "language.operand"),
        ("y = x ** 2", "language.operand"),
        ("y = e.nothing", "language.unknown"),
        ("y = nothing", "language.unknown"),
        ("y = Level.NOTHING", "language.unknown"),
        ("y = open(x)", "language.unknown"),
        ("if x: y = 1", "language.type"),
        ("y = e.reopened + 1", "language.type"),
        ("y = e.service == 3", "language.type"),
        ("y = e.address < e.address", "language.type"),
        ("y = e", "language.type"),
        ("x = e.reopened", "language.type"),
        ("y = helper", "language.type"),
        ("for i in range(e.restarts): pass", "language.loop"),
        ("for i in range(65): pass", "language.loop"),
        ("for i in (1, 2): pass", "language.loop"),
        ("break", "language.syntax"),
        ("min = 3", "language.name"),
        ("seconds = 3", "language.name"),
        ("helper = 3", "language.name"),
        ("e = 3", "language.name"),
        ("MAX = 3", "language.name"),
        ("__class__ = 3", "language.name"),
        ("y = helper(1, 2)", "language.call"),
        ("y = helper(n=1)", "language.call"),
        ("y = seconds()", "language.call"),
        ("y = e.address in Network('10.0.0.1/8')", "language.constant"),
        ("y = channel('')", "language.constant"),
        ("return None", "language.form"),
        ("return x", "language.decision"),
        ("return [Recreate]", "language.decision"),
        ("return [Recreate(e.service)]", "language.call"),
        ("return [Recreate()]", "language.call"),
        ("return [Recreate(service=e.service, grace=e.at)]", "language.range"),
        ("return [Remember(slot=1, value=0)]", "language.range"),
        ("return [Remember(slot=TRIES.slot, value=11)]", "language.range"),
        ("return [" + "Recreate(service=e.service), " * 9 + "]", "language.decision"),
        ("y = " + "(" * 70 + "x" + " + 1)" * 70, "language.size"),
    ],
)
def test_one_wrong_statement_is_one_complaint(statement: str, id: str) -> None:
    found = refused(GOOD.replace("    pass\n", f"    {statement}\n"))
    assert id in found
    assert set(found) <= {id, "language.unreachable"}


@pytest.mark.parametrize(
    "source",
    [
        GOOD.replace("    return min(n, 5)\n", "    if n > 3:\n        return 3\n"),
        GOOD.replace("    return min(n, 5)\n", "    pass\n"),
        f"from pointcall_runbook import CircuitOpened, Decision, runbook\n{ENTRY}    x = 1\n",
        GOOD.replace("    return [Notify", "    if x > 3:\n        return [Notify"),
    ],
)
def test_every_path_returns(source: str) -> None:
    assert refused(source) == ["language.return"]


@pytest.mark.parametrize(
    ("old", "new", "id"),
    [
        ("n: int) -> int", "n: int = 3) -> int", "language.signature"),
        ("n: int) -> int", "*n: int) -> int", "language.signature"),
        ("n: int) -> int", "n: print) -> int", "language.annotation"),
        ("n: int) -> int", "n: int) -> print", "language.annotation"),
        ("n: int) -> int", "n: int)", "language.annotation"),
        ("def helper", "@runbook\ndef helper", "language.handler"),
        ("@runbook\n", "@runbook\n@runbook\n", "language.handler"),
        ("@runbook\n", "@channel\n", "language.handler"),
        ("OPS = channel", "OPS = OPS2 = channel", "language.form"),
        ("OPS = channel", "Recreate = channel", "language.name"),
        ("OPS = channel", "print = channel", "language.name"),
        ("OPS = channel", "__getattr__ = channel", "language.name"),
        ("def helper", "def Notify", "language.name"),
        ("def helper(n", "def helper(len", "language.name"),
        ("def helper(n", "def helper(MAX", "language.name"),
        ("@runbook\n", "e = 5\n\n\n@runbook\n", "language.name"),
        ("lo=0, hi=10", "lo=5, hi=10", "language.range"),
        ("remembered(0,", "remembered(9,", "language.range"),
        ("return min(n, 5)", "return helper(n)", "language.recursion"),
        ("CircuitOpened, Decision", "CircuitOpened, Decision, exit", "language.import"),
        ("import CircuitOpened,", "import CircuitOpened as C,", "language.import"),
        ("OPS = channel", "if True:\n    pass\nOPS = channel", "language.top"),
        ("TRIES = rem", "LATE = MAX + 1\nTRIES = rem", "language.constant"),
        ("OPS = channel", "LATE = 10 ** 10 ** 10\nOPS = channel", "language.operand"),
        ('"""A runbook."""', "# coding: utf-7", "language.text"),
        ('"""A runbook."""', '"""A \u202erunbook."""', "language.text"),
        ('"""A runbook."""', '"""A runbook."""\r', "language.text"),
        ("x = helper", "\u0445 = helper", "language.text"),
        ("x = helper(", "x = helper((", "language.syntax"),
        ("    pass", "    return []", "language.unreachable"),
        ("    pass", "    if e.port > 70000:\n        return []", "language.unreachable"),
    ],
)
def test_one_wrong_place_in_the_file_is_refused(old: str, new: str, id: str) -> None:
    assert old in GOOD
    assert id in refused(GOOD.replace(old, new, 1))


def test_a_diagnostic_points_at_the_place_and_says_what_breaks() -> None:
    source = GOOD.replace("    pass\n", "    y = 1 + e.failures // e.restarts\n")
    with pytest.raises(CompileError) as caught:
        compile_source(source, "runbook.py")
    (found,) = caught.value.diagnostics
    line = source.split("\n")[found.line - 1]
    assert line[found.column - 1 : found.end_column - 1] == "e.failures // e.restarts"
    assert "0 breaks it" in found.got
    assert "^" * len("e.failures // e.restarts") in str(caught.value)
    assert found.as_dict()["hint"]


def test_all_mistakes_are_reported_at_once_without_echoes() -> None:
    body = "    y = e.nothing\n    z = y + 1\n    w = e.at + 1\n    return []\n"
    assert refused(GOOD[: GOOD.index("    x =")] + body) == ["language.unknown", "language.overflow"]


def test_nothing_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    source = GOOD.replace('OPS = channel("ops")', 'OPS = print("ran")')
    assert refused(source)
    assert capsys.readouterr().out == ""


def test_bytes_are_the_same_every_time() -> None:
    assert compile_source(GOOD).wasm == compile_source(GOOD).wasm
    assert ast.parse(GOOD)


def test_exploding_helpers_and_loops_are_stopped() -> None:
    chain = "".join(f"def h{i + 1}(a: int) -> int:\n    return min(h{i}(a), h{i}(a) + 1)\n\n\n" for i in range(7))
    nested = (
        "    for i in range(64):\n        for j in range(64):\n            for k in range(64):\n                x = j\n"
    )
    deep = "    y = not (" + " and (e.port > 1 or (e.port > 2".join([""] * 12) + "e.reopened" + "))" * 11 + ")\n"
    base = "def h0(a: int) -> int:\n    return min(a, 7)\n\n\n"
    for source in (
        GOOD.replace("def helper", base + chain + "def helper").replace("helper(e.restarts)", "h7(e.restarts)"),
        GOOD.replace("    pass\n", nested),
        GOOD.replace("    pass\n", deep),
    ):
        assert refused(source)
