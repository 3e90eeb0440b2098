"""Damaged modules: what the verifier accepts, Wasmtime accepts too, and it costs no more than was proven.

usage, for a long run: python -m tests.fuzz.runbook.mutants [--mutants 1000000] [--seed 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import wasmtime

from pointcall_executor.wasm import Runner, shared_engine
from pointcall_runbook import (
    Decided,
    Interpreter,
    ModuleError,
    ModuleInfo,
    Parameter,
    Slot,
    Trap,
    compile_source,
    verify_module,
)
from pointcall_runbook.binary import uleb
from pointcall_runbook.opcode import OPCODES
from pointcall_runbook.vocabulary import EVENTS, Kind, fields

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"
_CODES = sorted(OPCODES)
_NUMERIC = [op for op in OPCODES.values() if op.pops and op.pushes]
_SIBLINGS = {a.code: [b.code for b in _NUMERIC if (a.pops, a.pushes) == (b.pops, b.pushes)] for a in _NUMERIC}


def seeds() -> list[bytes]:
    """The modules of the library, and one with functions, blocks and results that the compiler never writes."""
    library = [compile_source(path.read_text(), path.name).wasm for path in sorted(LIBRARY.glob("*/runbook.py"))]
    return [*library, _BY_HAND]


_BY_HAND = bytes(
    wasmtime.wat2wasm(
        """(module (import "rb1" "again" (func (param i64 i64)))
        (func (param i64 i32) (result i64) (local i64)
          (if (result i64) (local.get 1)
            (then (local.tee 2 (i64.mul (local.get 0) (i64.const 3))))
            (else (block (result i64) (br 0 (i64.rotl (local.get 0) (i64.const 7)))))))
        (func (export "decide_Timer") (param i64 i64 i64 i64)
          (block (block (br_if 1 (i64.eqz (local.get 1))) (br_if 0 (i64.lt_s (local.get 2) (i64.const 5))) (return))
            (call 0 (call 1 (local.get 3) (i32.wrap_i64 (local.get 1))) (i64.const 1)))
          (call 0 (select (local.get 0) (i64.const 4) (i64.eqz (local.get 3)))
                  (i64.div_s (i64.const 9) (local.get 1)))))"""
    )
)


def mutant(raw: bytes, chance: Random) -> bytes:
    """One to four small changes; many aim at the form of the format, where a reader is most likely wrong."""
    end = raw.rfind(b"rb.meta") - 3 if chance.random() < 0.95 else len(raw)  # the metadata is text, and long
    out, rest = bytearray(raw[:end]), raw[end:]
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        _changes[chance.randrange(len(_changes))](out, chance)
    return bytes(out) + rest


def _flip(out: bytearray, chance: Random) -> None:
    out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)


def _set(out: bytearray, chance: Random) -> None:
    out[chance.randrange(len(out))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x7E, 0x40, 0x0B))


def _instruction(out: bytearray, chance: Random) -> None:
    out[chance.randrange(len(out))] = chance.choice(_CODES)


def _sibling(out: bytearray, chance: Random) -> None:
    """Another instruction of the same types, so that many mutants stay well typed."""
    for _ in range(20):
        at = chance.randrange(len(out))
        found = _SIBLINGS.get(out[at])
        if found is not None:
            out[at] = chance.choice(found)
            return


def _insert(out: bytearray, chance: Random) -> None:
    at = chance.randrange(len(out))
    out[at:at] = uleb(chance.choice((0, 1, 2, 127, 128, 2**31, 2**32 - 1)))


def _remove(out: bytearray, chance: Random) -> None:
    at = chance.randrange(len(out))
    if len(out) > 16:
        del out[at : at + chance.randint(1, 4)]


def _repeat(out: bytearray, chance: Random) -> None:
    at = chance.randrange(len(out))
    out[at:at] = out[at : at + chance.randint(1, 12)]


_changes = (_flip, _set, _set, _instruction, _instruction, *[_sibling] * 6, _insert, _remove, _repeat)


def examine(wasm: bytes, chance: Random) -> bool:
    """True where the verifier accepts; then the engine must agree, and no run may leave the proven bound."""
    try:
        info = verify_module(wasm)
    except ModuleError:
        return False
    runner, interpreter = Runner(wasm, info, engine=shared_engine()), Interpreter(wasm)
    for event in info.handlers:
        args = arguments(info, event, chance)
        ours, theirs = decided(interpreter, event, args), decided(runner, event, args)
        assert ours == theirs
        assert ours != "fuel"
        assert isinstance(ours, str) or ours.fuel <= info.handlers[event].fuel_bound
    return True


def decided(way: Interpreter | Runner, event: str, args: tuple[int, ...]) -> Decided | str:
    """The decision, or the kind of its trap."""
    try:
        return way.run(event, args) if isinstance(way, Interpreter) else way.decide(event, args)
    except Trap as trap:
        return trap.kind


def arguments(info: ModuleInfo, event: str, chance: Random) -> tuple[int, ...]:
    """Random arguments in range, ends and small numbers preferred."""
    own = [(f.lo, f.hi) for f in fields(EVENTS[event]) for _ in range(2 if f.kind is Kind.ADDRESS else 1)]
    rows: tuple[Parameter | Slot, ...] = (*info.parameters, *info.slots)
    ranges = [*own, *((row.lo, row.hi) for row in rows)]
    return tuple(
        chance.choice((lo, hi, min(lo + chance.randrange(9), hi), chance.randint(lo, hi))) for lo, hi in ranges
    )


def attack(originals: Sequence[bytes], count: int, seed: int) -> int:
    """Examine `count` mutants; how many of them the verifier accepted."""
    accepted = 0
    for number in range(count):
        chance = Random(f"{seed}/{number}")
        wasm = mutant(chance.choice(originals), chance)
        try:
            accepted += examine(wasm, chance)
        except BaseException:
            sys.stderr.write(f"seed {seed}, mutant {number}: {wasm.hex()}\n")
            raise
    return accepted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    accepted = attack(seeds(), args.mutants, args.seed)
    sys.stdout.write(f"{args.mutants} mutants, {accepted} accepted by the verifier and by Wasmtime; none cost more\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
