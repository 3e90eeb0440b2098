"""The runner: settings, traps, ownership. What it decides is compared in tests/unit/runbook."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import wasmtime

from pointcall_executor.wasm import Runner, Trapped, engine_digest, engine_settings, make_engine
from pointcall_runbook import Interpreter, verify_module
from pointcall_runbook.vocabulary import Call
from tests.unit.runbook.modules import code, module

ARGS = (1, 2, 3, 4)
RECREATE = code("local.get", 2, "local.get", 0, "call", 0)
DIVIDE = RECREATE + code("i64.const", 1, "local.get", 1, "i64.div_s", "drop", "end")


def runner(body: bytes, *, engine: wasmtime.Engine | None = None) -> Runner:
    wasm = module(body)
    return Runner(wasm, verify_module(wasm), engine=engine)


def test_a_decision_and_its_fuel() -> None:
    decided = runner(RECREATE + code("end")).decide("Timer", ARGS)
    assert decided.calls == (Call("recreate", (3, 1)),)
    assert decided.fuel == 4


@pytest.mark.parametrize(
    ("body", "args", "kind"),
    [
        (DIVIDE, (1, 0, 3, 4), "division by zero"),
        (RECREATE + code("unreachable", "end"), ARGS, "unreachable"),
        (
            RECREATE + code("local.get", 0, "local.get", 1, "i64.div_s", "drop", "end"),
            (-(2**63), -1, 3, 4),
            "overflow",
        ),
    ],
)
def test_a_trap_leaves_nothing_of_the_decision(body: bytes, args: tuple[int, ...], kind: str) -> None:
    one = runner(body)
    with pytest.raises(Trapped) as caught:
        one.decide("Timer", args)
    assert caught.value.kind == kind
    assert caught.value.id == "runbook.trap"
    if kind == "division by zero":
        assert one.decide("Timer", ARGS).calls == (Call("recreate", (3, 1)),)


def test_a_decision_is_a_copy() -> None:
    one = runner(RECREATE + code("end"))
    first = one.decide("Timer", ARGS)
    one.decide("Timer", (9, 9, 9, 9))
    assert first.calls == (Call("recreate", (3, 1)),)


@pytest.mark.parametrize("args", [(1,), (1, 2, 3, 2**63), (1, 2, 3, -(2**63) - 1), (1, 2, 3, 4, 5)])
def test_arguments_that_do_not_fit_are_refused(args: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="argument"):
        runner(RECREATE + code("end")).decide("Timer", args)


def test_the_verified_module_is_the_one_that_runs() -> None:
    info = verify_module(module(RECREATE + code("end")))
    with pytest.raises(ValueError, match="another one"):
        Runner(module(DIVIDE), info)


def test_no_signal_handlers() -> None:
    """Wasmtime's default installs them for SIGSEGV and others; ours must leave the process as it was."""

    def caught() -> str:
        return next(x for x in Path("/proc/self/status").read_text().split("\n") if x.startswith("SigCgt"))

    before = caught()
    runner(DIVIDE, engine=make_engine()).decide("Timer", ARGS)
    assert caught() == before


@pytest.mark.parametrize(
    "text",
    [
        "(module (memory 1) (func (export \"f\") (drop (v128.const i64x2 0 0))))",
        "(module (func (export \"f\") (result i32 i32) i32.const 1 i32.const 2))",
        "(module (memory 1 1 shared))",
        "(module (func $f (return_call $f)))",
        "(module (memory i64 1))",
        "(module (func (param externref)))",
    ],
)  # fmt: skip
def test_the_engine_has_no_proposals(text: str) -> None:
    with pytest.raises(wasmtime.WasmtimeError):
        wasmtime.Module(make_engine(), wasmtime.wat2wasm(text))


def test_settings_have_one_digest() -> None:
    assert engine_settings()["strategy"] == "cranelift"
    assert engine_digest() == engine_digest()
    assert engine_digest() != engine_digest(no_jit=True)


def test_without_a_jit_the_decisions_are_the_same() -> None:
    body = RECREATE + DIVIDE
    wasm = module(body)
    pulley = runner(body, engine=make_engine(no_jit=True))
    for tag in range(1, 20):
        assert pulley.decide("Timer", (1, tag, 3, 4)) == Interpreter(wasm).run("Timer", (1, tag, 3, 4))
    with pytest.raises(Trapped):
        pulley.decide("Timer", (1, 0, 3, 4))


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


def test_runs_and_traps_leave_no_memory_behind() -> None:
    one = runner(DIVIDE)

    def work() -> None:
        for number in range(6000):
            if number % 3:
                one.decide("Timer", ARGS)
                continue
            with pytest.raises(Trapped):
                one.decide("Timer", (1, 0, 3, 4))

    def grown_kib() -> int:
        before = resident_kib()
        work()
        gc.collect()
        return resident_kib() - before

    work()
    gc.collect()
    assert min(grown_kib() for _ in range(3)) < 256  # a leak grows each time; other threads of this process may, once
