"""One source, three meanings that must be one: CPython, Wasmtime, the interpreter. And fuel never above the bound.

usage, for a long run: python -m tests.unit.runbook.test_differential [--pairs 100000] [--inputs 100] [--seed 1]
"""

from __future__ import annotations

import argparse
import sys
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_executor.wasm import Runner
from pointcall_runbook import CompileError, Interpreter
from pointcall_runbook.cpython import Plain, load
from tests.unit.runbook.programs import arguments, program

# What a generated program may be refused for: ranges that decide a condition, or that leave 64 bits; its size.
EXPECTED = {"language.unreachable", "language.overflow", "language.size", "language.range", "language.unassigned"}


def accepted(source: str) -> Plain | None:
    """The program, or None where it is refused for one of the expected reasons."""
    try:
        return load(source)
    except CompileError as refusal:
        if not {d.id for d in refusal.diagnostics} <= EXPECTED:
            raise AssertionError(f"{refusal}\n{source}") from refusal
        return None


def compare(plain: Plain, chance: Random, inputs: int) -> int:
    """Decide `inputs` times in all three ways; the highest fuel used."""
    compiled, most = plain.compiled, 0
    runner, interpreter = Runner(compiled.wasm, compiled.info), Interpreter(compiled.wasm)
    for _ in range(inputs):
        event = chance.choice(sorted(compiled.info.handlers))
        args = arguments(chance, compiled.info, event)
        decided = runner.decide(event, args)
        assert interpreter.run(event, args) == decided
        assert plain.decide(event, args) == decided.calls
        assert decided.fuel <= compiled.info.handlers[event].fuel_bound
        most = max(most, decided.fuel)
        for call in decided.calls:
            call.typed()
    return most


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_generated_programs_mean_the_same_everywhere(seed: int) -> None:
    chance = Random(seed)
    plain = accepted(program(chance))
    if plain is not None:
        compare(plain, chance, 10)


def test_most_generated_programs_are_accepted() -> None:
    """Otherwise the test above proves little."""
    assert sum(accepted(program(Random(seed))) is not None for seed in range(24)) >= 5


def test_the_bound_is_reached_where_no_condition_hides_a_path() -> None:
    source = (
        "from pointcall_runbook import Again, Decision, Timer, runbook\n"
        "@runbook\ndef due(e: Timer) -> Decision:\n"
        "    x = min(e.restarts, 9) * 3 + 1\n"
        "    return [Again(after=x), Again(after=x + 1, tag=e.tag)]\n"
    )
    plain = load(source)
    assert compare(plain, Random(1), 20) == plain.compiled.info.fuel_bound


def main() -> int:
    """The long run: prints what it did; any difference is an assertion with the program that shows it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--inputs", type=int, default=100, help="for each program")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pairs, programs, refused, number = 0, 0, 0, args.seed << 32
    while pairs < args.pairs:
        chance, number = Random(number), number + 1
        source = program(chance)
        plain = accepted(source)
        if plain is None:
            refused += 1
            continue
        try:
            compare(plain, chance, args.inputs)
        except BaseException:
            sys.stderr.write(f"seed {number - 1}:\n{source}\n")
            raise
        programs, pairs = programs + 1, pairs + args.inputs
    sys.stdout.write(f"{pairs} pairs of {programs} programs equal; {refused} programs refused by the compiler\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
