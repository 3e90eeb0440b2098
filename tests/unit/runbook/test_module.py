"""The verifier: one good module, and each wrong one refused for its own reason. Wasmtime is asked as well."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from pointcall_executor.wasm import Runner
from pointcall_runbook import Decided, Interpreter, ModuleError, Trap, compile_source, verify_module
from pointcall_runbook.binary import CODE, HEADER, Reader, name, section, sleb, uleb
from pointcall_runbook.meta import Meta, Parameter
from pointcall_runbook.opcode import I64
from pointcall_runbook.vocabulary import digest
from tests.unit.runbook.modules import code, module, random_body

TWO = code("i64.const", 1, "i64.const", 2)
GOOD = TWO + code("call", 0, "end")


def refused(wasm: bytes) -> str:
    with pytest.raises(ModuleError) as caught:
        verify_module(wasm)
    return caught.value.id


def test_the_good_one() -> None:
    info = verify_module(module(GOOD))
    assert info.capabilities == ("recreate",)
    assert info.handlers["Timer"].fuel_bound == info.fuel_bound == 4
    assert info.parameters == info.slots == ()


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (code("call", 0, "end"), "module.stack"),
        (TWO + code("end"), "module.stack"),
        (TWO + code("i64.add", "drop", "end", "nop"), "module.nesting"),
        (TWO + code("i32.add", "drop", "end"), "module.stack"),
        (code("i32.const", 1, "if", I64, "i64.const", 1, "end", "drop", "end"), "module.stack"),
        (code("br", 7, "end"), "module.nesting"),
        (code("else", "end"), "module.nesting"),
        (code("block", 0x40), "module.nesting"),
        (code("call", 9, "end"), "module.function"),
        (code("i64.const", 1) * 4 + code("call", 1, "end"), "module.recursion"),
        (code("local.get", 99, "drop", "end"), "module.locals"),
        (b"\x03\x40\x0b\x0b", "module.opcode"),
        (b"\x43\0\0\0\0\x1a\x0b", "module.opcode"),
        (b"\x20\x80\x00\x1a\x0b", "module.number"),
        (b"\x42\xff\x7f\x1a\x0b", "module.number"),
        (b"\x41\xff\xff\xff\xff\x10\x1a\x0b", "module.number"),
        (b"\x02\x7d\x0b\x0b", "module.type"),
        (code("block", 0x40) * 70 + code("end") * 71, "module.nesting"),
        ((code("i64.const", 1) + code("drop")) * 12000 + code("end"), "module.size"),
    ],
)
def test_a_wrong_body(body: bytes, id: str) -> None:
    assert refused(module(body)) == id


@pytest.mark.parametrize(
    ("wasm", "id"),
    [
        (b"", "module.header"),
        (b"\0asm\x0d\0\x01\0", "module.header"),
        (HEADER, "module.export"),
        (module(GOOD)[:-1], "module.truncated"),
        (module(GOOD, export="decide_Nothing"), "module.export"),
        (module(GOOD, export="decide_OomKilled_"), "module.export"),
        (module(GOOD, export="decide_CircuitOpened"), "module.export"),
        (module(GOOD, imports=(("recreate", 3),)), "module.import"),
        (module(GOOD, imports=(("shell", 2),)), "module.import"),
        (module(GOOD, imports=(("recreate", 2), ("recreate", 2))), "module.import"),
        (module(GOOD, locals_=b"\x01\xff\xff\xff\xff\x0f\x7e"), "module.locals"),
        (module(GOOD, locals_=b"\x01\x00\x7e"), "module.locals"),
        (module(GOOD, locals_=b"\x01\x01\x7d"), "module.locals"),
        (module(GOOD, helpers=(code("end"),)), "module.function"),
        (module(GOOD, extra=section(0, name("producers"))), "module.section"),
        (module(GOOD, extra=section(CODE, uleb(0))), "module.section"),
        (module(GOOD, extra=section(5, b"\x01\0\x01")), "module.section"),
        (module(GOOD, extra=section(0, name("rb.meta") + b"[]")), "module.meta"),
        (module(GOOD, extra=section(0, name("rb.meta") + b"[" * 5000)), "module.meta"),
        (module(GOOD, extra=section(0, b"\x02\xff\xfe")), "module.name"),
    ],
)
def test_a_wrong_shape(wasm: bytes, id: str) -> None:
    assert refused(wasm) == id


def with_meta(meta: Meta) -> bytes:
    return module(GOOD, extra=section(0, name("rb.meta") + meta.encode()))


def test_metadata_must_agree() -> None:
    good = Meta(("Timer",), ("recreate",))
    assert verify_module(with_meta(good)).source_sha256 is None
    assert refused(with_meta(Meta(("DiskError",), ("recreate",)))) == "module.meta"
    assert refused(with_meta(Meta(("Timer",), ()))) == "module.meta"
    assert refused(with_meta(Meta(("Timer",), ("recreate",), vocabulary="0" * 64))) == "module.meta"
    assert refused(with_meta(Meta(("Timer",), ("recreate",), (Parameter("N", 3, 1, 2),)))) == "module.meta"
    assert refused(with_meta(Meta(("Timer",), ("recreate",), (Parameter("N", 0, 9, 2),)))) == "module.export"
    assert len(digest()) == 64


def test_a_worst_case_above_the_limit_is_refused() -> None:
    step = (code("i64.const", 1) * 2 + code("i64.add", "drop")) * 1200
    calls = code("call", 2) * 7
    assert refused(module(TWO + code("call", 0) + calls + code("end"), helpers=(step + code("end"),))) == "module.fuel"


def test_numbers_have_one_form() -> None:
    for number in (0, 1, -1, 63, 64, -64, -65, 2**31, 2**63 - 1, -(2**63)):
        assert Reader(sleb(number)).signed(64) == number
        if number >= 0:
            assert Reader(uleb(number % 2**32)).u32() == number % 2**32


def decided(decide: Callable[[str, tuple[int, ...]], Decided], args: tuple[int, ...]) -> Decided | str:
    """The decision, or the kind of trap."""
    try:
        return decide("Timer", args)
    except Trap as trap:
        return trap.kind


@pytest.mark.parametrize("divide", [False, True])
def test_random_modules_run_the_same_in_both_engines(divide: bool) -> None:
    chance, outcomes = Random(7), set()
    edges = (0, 1, 2, -1, 2**31, 2**63 - 1, -(2**63))
    for _ in range(60):
        wasm = module(random_body(chance, divide=divide), locals_=b"\x01\x02\x7e")
        runner, interpreter = Runner(wasm, verify_module(wasm)), Interpreter(wasm)
        for _ in range(20):
            args = tuple(chance.choice((*edges, chance.getrandbits(64) - 2**63)) for _ in range(4))
            expected, got = decided(interpreter.run, args), decided(runner.decide, args)
            assert got == expected
            outcomes.add(expected if isinstance(expected, str) else "returned")
            assert isinstance(expected, str) or expected.fuel <= interpreter.info.fuel_bound
    assert outcomes >= ({"returned", "division by zero"} if divide else {"returned"})


def test_the_interpreter_refuses_what_does_not_fit() -> None:
    interpreter = Interpreter(module(GOOD))
    with pytest.raises(ValueError, match="does not handle"):
        interpreter.run("OomKilled", (0, 0, 0, 0))
    with pytest.raises(ValueError, match="4 arguments"):
        interpreter.run("Timer", (0,))
    with pytest.raises(Trap, match="fuel"):
        interpreter.run("Timer", (0, 0, 0, 0), fuel_limit=0)


def test_compiled_modules_verify_and_carry_their_source() -> None:
    source = "from pointcall_runbook import Decision, Timer, runbook\n"
    source += "@runbook\ndef due(e: Timer) -> Decision:\n    return []\n"
    compiled = compile_source(source)
    assert verify_module(compiled.wasm) == compiled.info
    assert compiled.info.source_sha256 is not None
    assert compiled.info.fuel_bound == 1
