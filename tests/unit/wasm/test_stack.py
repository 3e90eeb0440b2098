"""The engine's stack: what the verifier accepts can never overflow it, and what could is refused (`module.depth`)."""

from __future__ import annotations

from random import Random

import pytest
import wasmtime

from pointcall_executor.wasm import Runner, make_engine
from pointcall_runbook import Interpreter, ModuleError, verify_module
from pointcall_runbook.module import MAX_STACK_SLOTS

HEAD = '(import "rb1" "again" (func (param i64 i64)))'
ARGS = (1, 2, 3, 4)


def chain(levels: int, width: int) -> bytes:
    """A handler and `levels` functions that hand `width` values on."""
    types, given = " i64" * width, " ".join(f"(local.get {i})" for i in range(width))
    last = f"(call 0 (local.get 0) (local.get {width - 1}))"
    calls = [f"(call {k + 3} {given})" if k < levels - 1 else last for k in range(levels)]
    functions = "".join(f"(func (param{types}) {call})" for call in calls)
    first = "(local.get 1)" * width
    entry = f'(func (export "decide_Timer") (param i64 i64 i64 i64) (call 2 {first}))'
    return bytes(wasmtime.wat2wasm(f"(module {HEAD} {entry} {functions})"))


def crowd(seed: int, locals_: int, operands: int) -> bytes:
    """One function that computes many different values, in random order, and needs all of them behind a call."""
    chance = Random(seed)
    body = ""
    for n in range(chance.randint(locals_, 2 * locals_)):
        source, target = chance.randrange(4), 4 + (n if n < locals_ else chance.randrange(locals_))
        body += f"(local.set {target} (i64.add (local.get {source}) (i64.const {n})))"
    body += "".join(f"(i64.mul (local.get {chance.randrange(4 + locals_)}) (i64.const 3))" for _ in range(operands))
    body += "(call 0 (local.get 0) (local.get 1))" + "local.set 0 local.get 0 i64.xor " * (operands - 1)
    body += "".join(f"(i64.xor (local.get {4 + i}))" for i in range(locals_)) + "(call 0 (i64.const 1))"
    where = f'(func (export "decide_Timer") (param i64 i64 i64 i64) (local{" i64" * locals_}) {body})'
    return bytes(wasmtime.wat2wasm(f"(module {HEAD} {where})"))


def runs_alike(wasm: bytes) -> None:
    info = verify_module(wasm)
    wanted = Interpreter(wasm).run("Timer", ARGS)
    for engine in (None, make_engine(no_jit=True)):
        assert Runner(wasm, info, engine=engine).decide("Timer", ARGS) == wanted


@pytest.mark.parametrize(("levels", "width"), [(1, 500), (2, 250), (5, 98), (10, 50), (30, 16)])
def test_a_chain_just_within_the_limit_runs(levels: int, width: int) -> None:
    runs_alike(chain(levels, width))


@pytest.mark.parametrize(("locals_", "operands"), [(500, 400), (500, 2), (2, 1000), (100, 850)])
def test_many_values_at_once_just_within_the_limit_run(locals_: int, operands: int) -> None:
    for seed in range(3):
        runs_alike(crowd(seed, locals_, operands))


@pytest.mark.parametrize(
    "wasm", [chain(3, 500), chain(10, 500), chain(28, 400), crowd(1, 500, 600), crowd(1, 10, 1020)]
)
def test_more_than_the_limit_is_refused(wasm: bytes) -> None:
    with pytest.raises(ModuleError) as caught:
        verify_module(wasm)
    assert caught.value.id == "module.depth"
    assert caught.value.want == f"at most {MAX_STACK_SLOTS}"
