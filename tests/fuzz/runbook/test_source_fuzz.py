"""Mutated sources: only CompileError comes out, and whatever is still accepted means the same everywhere.

usage, for a long run: python -m tests.fuzz.runbook.test_source_fuzz [--sources 20000] [--seed 1]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_runbook import CompileError, Interpreter, compile_source
from pointcall_runbook.cpython import Plain, load
from tests.unit.runbook.programs import arguments, program

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"
SOURCES = [path.read_text() for path in sorted(LIBRARY.glob("*/runbook.py"))]
WORDS = (
    *("0", "1", "-1", "2**63", "True", "None", "''", "e", "e.at", "e.service", "Level.ERROR", "MAX", "seconds", "min"),
    *("(", ")", "[", "]", ",", ":", "=", "==", "<", "in", "not in", "and", "or", "not", "+", "//", "%", "<<", "**"),
    *("if", "else", "for", "return", "match", "case _", "def f(a: int) -> int:", "break", "lambda", "@runbook", "."),
    *("\n", "\n    ", "\n        ", "# coding: utf-7\n", "\u202e", "\x00", "\r", "\ud800", "import os", "\u0435"),
)  # fmt: skip


def mutated(chance: Random, source: str) -> str:
    pieces = re.findall(r"\n *| +|\w+|[^\w\s]+|.", source)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(pieces))
        match chance.randrange(5):
            case 0:
                del pieces[at]
            case 1:
                pieces[at] = chance.choice(WORDS)
            case 2:
                pieces.insert(at, f" {chance.choice(WORDS)} ")
            case 3:
                other = chance.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case _:
                pieces[at] = chance.choice(pieces)
    return "".join(pieces)


def compare(plain: Plain, chance: Random) -> None:
    interpreter = Interpreter(plain.compiled.wasm)
    for event in plain.compiled.info.handlers:
        args = arguments(chance, plain.compiled.info, event)
        assert interpreter.run(event, args).calls == plain.decide(event, args)


def tried(chance: Random) -> str:
    """Mutate one source and compile it; the id of the first complaint, or "accepted"."""
    source = mutated(chance, chance.choice(SOURCES) if chance.random() < 0.8 else program(chance))
    try:
        plain = load(source)
    except CompileError as refusal:
        return refusal.id
    compare(plain, chance)
    return "accepted"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_mutated_sources(seed: int) -> None:
    tried(Random(seed))


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_refused_and_nothing_else(text: str) -> None:
    try:
        compile_source(text)
    except CompileError:
        return
    raise AssertionError("a text without a handler was accepted")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sources", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    seen: Counter[str] = Counter()
    for number in range(args.sources):
        seed = (args.seed << 32) + number
        try:
            seen[tried(Random(seed))] += 1
        except BaseException:
            sys.stderr.write(f"seed {seed}\n")
            raise
    sys.stdout.write("".join(f"{count:7} {name}\n" for name, count in seen.most_common()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
