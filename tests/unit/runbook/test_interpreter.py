"""The interpreter: each instruction against Wasmtime, traps, fuel to the unit, and the shapes of control flow."""

from __future__ import annotations

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from pointcall_executor.wasm import Runner
from pointcall_runbook import Interpreter, Trap, verify_module
from pointcall_runbook.opcode import I32, OPCODES, TYPE_NAMES, Opcode
from tests.fuzz.runbook.values import integers

HEAD = '(import "rb1" "again" (func (param i64 i64)))'
EVENT = (1, 2, 3, 4)  # of Timer: at, tag, service, restarts


def module(body: str, locals_: str = "") -> bytes:
    where = f'(func (export "decide_Timer") (param i64 i64 i64 i64) {locals_} {body})'
    return bytes(wasmtime.wat2wasm(f"(module {HEAD} {where})"))


def both(wasm: bytes, args: tuple[int, ...] = EVENT) -> tuple[object, object]:
    """What the interpreter and Wasmtime make of it: the decision, or the kind of the trap."""
    out: list[object] = []
    for way in (Interpreter(wasm).run, Runner(wasm, verify_module(wasm)).decide):
        try:
            out.append(way("Timer", args))
        except Trap as trap:
            out.append(trap.kind)
    return out[0], out[1]


NUMERIC = [op for op in OPCODES.values() if op.pops and op.pushes]


def applied(op: Opcode) -> bytes:
    """The operation on the first event fields, its result handed to an action."""
    operands = ((f"(local.get {i})", f"(i32.wrap_i64 (local.get {i}))") for i in range(len(op.pops)))
    taken = " ".join(pair[type_ == I32] for pair, type_ in zip(operands, op.pops, strict=True))
    result = f"({op.name} {taken})"
    wide = f"(i64.extend_i32_s {result})" if op.pushes == (I32,) else result
    return module(f"(call 0 {wide} (i64.const 0))")


@pytest.mark.parametrize("op", NUMERIC, ids=lambda op: op.name)
def test_each_operation_computes_what_wasmtime_computes(op: Opcode) -> None:
    wasm = applied(op)
    interpreter, runner = Interpreter(wasm), Runner(wasm, verify_module(wasm))
    edges = (0, 1, -1, 2, 31, 32, 63, 64, 2**31, 2**31 - 1, -(2**31), 2**32, 2**63 - 1, -(2**63), 0x8080, 0xFF7F)
    for a in edges:
        for b in edges:
            ours: object
            theirs: object
            try:
                ours = interpreter.run("Timer", (a, b, 0, 0))
            except Trap as trap:
                ours = trap.kind
            try:
                theirs = runner.decide("Timer", (a, b, 0, 0))
            except Trap as trap:
                theirs = trap.kind
            assert ours == theirs, (op.name, a, b)


@settings(deadline=None)
@given(st.sampled_from(NUMERIC), integers(-(2**63), 2**63 - 1), integers(-(2**63), 2**63 - 1))
def test_each_operation_on_any_number(op: Opcode, a: int, b: int) -> None:
    ours, theirs = both(applied(op), (a, b, 0, 0))
    assert ours == theirs


def test_the_table_has_every_integer_operation_under_its_name() -> None:
    assert {op.name for op in NUMERIC if op.name.startswith("i64.")} >= {"i64.rotr", "i64.popcnt", "i64.extend32_s"}
    assert all(op.name.split(".")[0] in TYPE_NAMES.values() for op in NUMERIC)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "(call 0 (i64.const 1) (i64.const 2))",
        "(if (i64.eqz (local.get 0)) (then (return)) (else nop)) (call 0 (i64.const 1) (local.get 1))",
        "(if (i64.eqz (local.get 3)) (then (call 0 (i64.const 1) (i64.const 2))))",
        "(call 0 (if (result i64) (i64.eqz (local.get 0)) (then (i64.const 5)) (else (i64.const 6))) (i64.const 1))",
        "(block (br 0) (call 0 (i64.const 1) (i64.const 1)))",
        "(block (block (br_if 1 (i32.const 1)) unreachable)) (call 0 (i64.const 1) (i64.const 1))",
        "(block (br_if 0 (i64.eqz (local.get 0))) (call 0 (i64.const 9) (i64.const 9)))",
        "(call 0 (block (result i64) (drop (br_if 0 (i64.const 3) (i32.const 0))) (i64.const 4)) (i64.const 1))",
        "(call 0 (block (result i64) (i64.const 1) (i64.const 2) (br 0 (i64.const 3)) drop drop) (i64.const 1))",
        "(call 0 (block (result i64) (br 0 (i64.const 3))) (i64.const 1)) (br 0)",
        "(call 0 (select (i64.const 1) (i64.const 2) (i32.const 0)) (local.tee 0 (i64.const 7)))",
        "(local.set 2 (i64.const -1)) (call 0 (local.get 2) (local.get 4))",
        "(block (if (i32.const 1) (then (br 1)) (else (br 0)))) (drop (i32.const 5))",
        "(return) (call 0 (i64.const 1) (i64.const 1))",
        "(br_if 0 (i32.const 1)) unreachable",
        "nop nop (unreachable) (drop (i64.add))",
        "(drop (i64.div_s (i64.const 1) (i64.const 0)))",
        "(drop (i64.div_u (i64.const 1) (i64.const 0)))",
        "(drop (i64.rem_s (i64.const 1) (i64.const 0)))",
        "(drop (i32.rem_u (i32.const 1) (i32.const 0)))",
        "(drop (i64.div_s (i64.const -9223372036854775808) (i64.const -1)))",
        "(drop (i32.div_s (i32.const -2147483648) (i32.const -1)))",
        "(drop (i64.rem_s (i64.const -9223372036854775808) (i64.const -1)))",
        "(call 0 (i64.const 1) (i64.const 2)) unreachable",
    ],
)
def test_control_flow_and_fuel_are_those_of_wasmtime(body: str) -> None:
    ours, theirs = both(module(body, "(local i64)"))
    assert ours == theirs


def test_a_function_of_its_own_costs_its_entry_and_keeps_its_locals() -> None:
    inner = "(func (param i64 i32) (result i64) (local i64) (local.set 2 (local.get 0)) (return (local.get 2)))"
    body = "(call 0 (call 2 (i64.const 41) (i32.const 1)) (local.get 4))"
    wasm = bytes(
        wasmtime.wat2wasm(
            f'(module {HEAD} (func (export "decide_Timer") (param i64 i64 i64 i64) (local i64) {body}) {inner})'
        )
    )
    ours, theirs = both(wasm)
    assert ours == theirs
    assert Interpreter(wasm).run("Timer", EVENT).calls[0].args == (41, 0)


def test_without_fuel_nothing_starts() -> None:
    with pytest.raises(Trap) as caught:
        Interpreter(module("")).run("Timer", EVENT, fuel_limit=0)
    assert (caught.value.kind, caught.value.id) == ("fuel", "runbook.trap")


def test_the_wrong_event_or_number_of_arguments_is_no_run() -> None:
    interpreter = Interpreter(module(""))
    with pytest.raises(ValueError, match="does not handle"):
        interpreter.run("OomKilled", EVENT)
    with pytest.raises(ValueError, match="takes 4 arguments"):
        interpreter.run("Timer", EVENT[:3])


def test_the_trace_has_every_step() -> None:
    trace: list[tuple[int, bool]] = []
    interpreter = Interpreter(module("(if (i64.eqz (local.get 0)) (then (drop (i64.const 1))))"))
    interpreter.run("Timer", EVENT, trace=trace)
    wasm_offsets = [offset for offset, _ in trace]
    assert len(trace) == 5  # get, eqz, if, its end, the end of the function
    assert wasm_offsets == sorted(wasm_offsets)
