"""What one decision costs: a fresh instance in the runner, beside other ways to run the same logic in the same run.

usage: python -m tests.bench.sandbox [--n N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import wasmtime

from pointcall_executor.wasm import Runner, make_engine
from pointcall_runbook import Interpreter, compile_source, verify_module
from pointcall_runbook.vocabulary import NO_SERVICE, Address, CircuitOpened, Recreate, service, slots
from tests.bench.figures import figure, percentile

SOURCE = '''"""Recreate a service whose clients are refused, a few times."""
from pointcall_runbook import NO_SERVICE, CircuitOpened, Decision, Recreate, runbook, seconds

@runbook
def decide(e: CircuitOpened) -> Decision:
    if e.service == NO_SERVICE or e.restarts >= 3:
        return []
    return [Recreate(service=e.service, grace=seconds(1))]
'''
EVENT = CircuitOpened(10, Address.parse("127.0.0.1"), 80, 5, False, 1, service("api"), 0)


def plain(event: CircuitOpened) -> list[Recreate]:
    if event.service == NO_SERVICE or event.restarts >= 3:
        return []
    return [Recreate(service=event.service, grace=1_000_000_000)]


def high_level(wasm: bytes) -> Callable[[], Any]:
    """The documented way: the package's own classes, a fresh store and instance for each decision."""
    engine = make_engine()
    module, linker = wasmtime.Module(engine, wasm), wasmtime.Linker(engine)
    kind = wasmtime.FuncType([wasmtime.ValType.i64()] * 2, [])
    linker.define_func("rb1", "recreate", kind, lambda *_: None)
    args = slots(EVENT)

    def decide() -> None:
        store = wasmtime.Store(engine)
        store.set_fuel(1000)
        export = linker.instantiate(store, module).exports(store)["decide_CircuitOpened"]
        assert isinstance(export, wasmtime.Func)
        export(store, *args)

    return decide


CEL = "e.service == 0 || e.restarts >= 3 ? [] : [{'recreate': [e.service, 1000000000]}]"
REGO = """package runbook
decide := [] if { input.service == 0 }
else := [] if { input.restarts >= 3 }
else := [{"recreate": [input.service, 1000000000]}]
"""


def cel() -> Callable[[], Any] | None:
    """The same decision as a CEL expression; None where cel-python is not installed."""
    try:
        import celpy
    except ImportError:
        return None
    environment = celpy.Environment()
    program = environment.program(environment.compile(CEL))

    def decide() -> Any:
        facts = {"service": EVENT.service.number, "restarts": EVENT.restarts}
        return program.evaluate({"e": celpy.json_to_cel(facts)})

    assert len(decide()) == 1
    return decide


def rego() -> Callable[[], Any] | None:
    """The same decision as a Rego policy; None where regopy is not installed."""
    try:
        import regopy
    except ImportError:
        return None
    interpreter = regopy.Interpreter()
    interpreter.add_module("runbook", REGO)

    def decide() -> Any:
        interpreter.set_input({"service": EVENT.service.number, "restarts": EVENT.restarts})
        return interpreter.query("data.runbook.decide")

    assert "1000000000" in str(decide())
    return decide


def timed(function: Callable[[], Any], n: int) -> list[float]:
    """Microseconds of each of `n` calls."""
    out = []
    for _ in range(n):
        begin = time.perf_counter_ns()
        function()
        out.append((time.perf_counter_ns() - begin) / 1e3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    n = parser.parse_args().n
    compiled = compile_source(SOURCE)
    runner, interpreter = Runner(compiled.wasm, compiled.info), Interpreter(compiled.wasm)
    args = slots(EVENT)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "runner": (lambda: runner.decide("CircuitOpened", args), n),
        "plain Python function": (lambda: plain(EVENT), n),
        "replay interpreter": (lambda: interpreter.run("CircuitOpened", args), n // 10),
        "high-level wasmtime API": (high_level(compiled.wasm), n // 20),
    }
    for name, peer in (("cel-python", cel()), ("regopy", rego())):
        if peer is not None:
            ways[name] = (peer, n // 100)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):  # interleaved, so that a busy machine shifts all of them
        for name, (function, count) in ways.items():
            took[name] += timed(function, count // 5)
    base = percentile(took["high-level wasmtime API"], 0.5)
    for share, label in ((0.5, "p50"), (0.99, "p99")):
        value = percentile(took["runner"], share)
        ratio = value / percentile(took["high-level wasmtime API"], share)
        figure("sandbox", f"decision_us_{label}", value, "us", n, baseline="high-level wasmtime API", ratio=ratio)
    for name in list(ways)[1:]:
        value = percentile(took[name], 0.5)
        metric = "decision_us_p50"
        figure(
            "sandbox", metric, value, "us", len(took[name]), baseline="high-level API", ratio=value / base, peer=name
        )
    build = timed(lambda: verify_module(compile_source(SOURCE).wasm), 50)
    figure("sandbox", "compile_verify_ms_p50", percentile(build, 0.5) / 1e3, "ms", 50)


if __name__ == "__main__":
    main()
