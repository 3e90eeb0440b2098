"""The child process that looks at one proposal: `python -I -m pointcall_executor.agent_api.check`.

Reads one JSON object from standard input, writes one to standard output, and ends. It limits itself before it reads a
byte, since the compiler and the interpreter are the only code of ours that work on a stranger's program for long.
It never executes the source: the compiler reads it, the verifier proves the module, the interpreter decides.
Spec: docs/spec/proposal.md. The parent is examination.py.
"""

from __future__ import annotations

import enum
import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pointcall_attest.printable import shown
from pointcall_executor.agent_api import text
from pointcall_runbook import vocabulary

CPU_SECONDS: Final = 5  # the largest runbook of the library takes 0.02
MEMORY_BYTES: Final = 512 * 1024 * 1024
OUTPUT_BYTES: Final = 2 * 1024 * 1024  # 200 simulated events of 8 calls each, twice
MAX_LINES: Final = 60  # of the compiler's answer: ten diagnostics with their places and hints
MAX_SHOWN: Final = 400  # characters of one line

Row = dict[str, Any]


def limit_self() -> None:
    """No more CPU, memory, files or processes than an examination needs, and only the CPU time that nobody else wants.
    Hard limits: they cannot be raised again."""
    os.nice(19)
    for what, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, OUTPUT_BYTES),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def examine(request: Mapping[str, Any]) -> dict[str, Any]:
    """The whole examination as data: checks, capabilities, and what the proposal decides on recorded events.

    A later step is made only when the one before it passed; a step that was not made is listed as not checked.
    """
    hidden = text.findings(request["source"]) + text.findings(request["rationale"])
    checks = [_check("proposal.text", not hidden, "no hidden or reordering code points", _lines(hidden))]
    wasm = None if hidden else _compiled(request["source"], checks)
    info = None if wasm is None else _verified(wasm, checks)
    if wasm is None or info is None:
        done = {c["id"] for c in checks}
        checks += [
            _skipped(i) for i in ("proposal.compiles", "proposal.module", "proposal.simulation") if i not in done
        ]
        return {"checks": checks, "module_sha256": "", "capabilities": [], "simulated": 0, "differences": []}
    recorded = (case for case in request["cases"] if case["event"] in info.handlers)
    rows = [_simulated(wasm, info, case, request["names"]) for case in recorded]
    checks.append(_simulation_check(rows))
    return {
        "checks": checks,
        "module_sha256": info.sha256,
        "capabilities": [
            {"event": h.event, "actions": list(h.capabilities), "fuel_bound": h.fuel_bound}
            for h in info.handlers.values()
        ],
        "simulated": len(rows),
        "differences": [{k: v for k, v in row.items() if k != "fault"} for row in rows],
    }


def _compiled(source: str, checks: list[Row]) -> bytes | None:
    from pointcall_runbook import compile_source
    from pointcall_runbook.errors import PointcallError

    want = "the compiler accepts the source"
    try:
        wasm = compile_source(source, "runbook.py").wasm
    except PointcallError as refusal:
        checks.append(_check("proposal.compiles", False, want, _paragraph(str(refusal))))
        return None
    checks.append(_check("proposal.compiles", True, want, f"{len(wasm)} bytes"))
    return bytes(wasm)


def _paragraph(message: str) -> str:
    """The compiler's answer with its line breaks, which are ours; each line is made safe by itself."""
    return "\n".join(shown(line, MAX_SHOWN) for line in message.split("\n")[:MAX_LINES])


def _verified(wasm: bytes, checks: list[Row]) -> Any:
    from pointcall_runbook import verify_module
    from pointcall_runbook.errors import PointcallError

    want = "the verifier proves the module without trusting the compiler"
    try:
        info = verify_module(wasm)
    except PointcallError as refusal:
        checks.append(_check("proposal.module", False, want, shown(str(refusal), MAX_SHOWN)))
        return None
    checks.append(
        _check("proposal.module", True, want, f"at most {info.fuel_bound} fuel, {len(info.handlers)} handlers")
    )
    return info


def _simulated(wasm: bytes, info: Any, case: Mapping[str, Any], named: Iterable[str]) -> dict[str, Any]:
    """One recorded event through the proposal, beside what was decided then.

    The event's own values come from the receipt; parameters take their defaults and slots their initial values,
    because the proposal has not been configured by anyone yet.
    """
    names = {vocabulary.service(n).number: n for n in (*named, *info.services)}
    names |= {vocabulary.channel(n).number: n for n in info.channels}
    event = vocabulary.EVENTS[case["event"]]
    own = tuple(int(v) for v in case["values"][: vocabulary.arity(event)])
    values = (*own, *(p.default for p in info.parameters), *(s.initial for s in info.slots))
    calls, fault = _decided(wasm, case["event"], values)
    then = [vocabulary.Call(c["action"], tuple(map(int, c["args"]))) for c in case["calls"]]
    return {
        "run": case["run"],
        "event": case["event"],
        "fields": case["fields"],
        "recorded_runbook": case["runbook"],
        "recorded": [readable(c, names) for c in then],
        "proposed": [readable(c, names) for c in calls],
        "same": not fault and then == calls,
        "case": None if fault else _case(case["run"], vocabulary.from_slots(event, own), calls, names),
        "fault": fault,
    }


def _case(run: str, event: vocabulary.Event, calls: list[vocabulary.Call], names: Mapping[int, str]) -> Row | None:
    """The event and its decision as a case of the runbook, or None where a service or channel has no known name."""
    from pointcall_runbook import case

    fields = {f.name: _written(getattr(event, f.name), names) for f in vocabulary.fields(type(event))}
    decided = [case.readable(call, names) for call in calls]
    unnamed = [
        v for v in (*fields.values(), *(v for c in decided for v in c["args"].values())) if str(v).startswith("#")
    ]
    if unnamed:
        return None
    return {"name": f"run {run}", "event": type(event).__name__, "fields": fields, "calls": decided}


def _written(value: object, names: Mapping[int, str]) -> Any:
    """A field as a case writes it."""
    match value:
        case vocabulary.Service(number=0):
            return ""
        case vocabulary.Service(number=number) | vocabulary.Channel(number=number):
            return names.get(number, f"#{number}")
        case enum.Enum():
            return value.name
        case vocabulary.Address():
            return str(value)
        case _:
            return value


def _decided(wasm: bytes, event: str, values: tuple[int, ...]) -> tuple[list[vocabulary.Call], str]:
    from pointcall_runbook import Interpreter, Trap

    try:
        calls = list(Interpreter(wasm).run(event, values).calls)
        for call in calls:
            call.typed()
    except Trap as trap:
        return [], f"trap: {trap.kind}"
    except ValueError as fault:
        return [], str(fault)
    return calls, ""


def readable(call: vocabulary.Call, names: Mapping[int, str]) -> str:
    """`recreate(service=db, grace=2000000000)`. A number that nobody named stays a number."""
    try:
        action = call.typed()
    except ValueError:
        return f"{shown(call.action)}({', '.join(map(str, call.args))})"
    return f"{call.action}({', '.join(_arguments(action, names))})"


def _arguments(value: vocabulary.Event | vocabulary.Action, names: Mapping[int, str]) -> Iterable[str]:
    return (f"{f.name}={_value(getattr(value, f.name), names)}" for f in vocabulary.fields(type(value)))


def _value(value: object, names: Mapping[int, str]) -> str:
    if isinstance(value, vocabulary.Service | vocabulary.Channel):
        return names.get(value.number, f"#{value.number}")
    return str(getattr(value, "name", value)).lower()


def _simulation_check(rows: list[dict[str, Any]]) -> Row:
    want = "every recorded event is decided without a trap, with arguments in range"
    if not rows:
        return _skipped("proposal.simulation", "no recorded event that this proposal handles")
    faults = [f"run {r['run']}: {r['fault']}" for r in rows if r["fault"]]
    return _check("proposal.simulation", not faults, want, "; ".join(faults[:5]) or f"{len(rows)} events")


def _check(id: str, passed: bool, expected: str, observed: str) -> Row:
    return {"id": id, "outcome": "pass" if passed else "fail", "expected": expected, "observed": observed}


def _skipped(id: str, why: str = "a check before it failed") -> Row:
    return {"id": id, "outcome": "not-checked", "expected": "", "observed": why}


def _lines(found: Iterable[text.Finding]) -> str:
    return "; ".join(map(str, found)) or "none"


def main() -> int:
    limit_self()
    json.dump(examine(json.load(sys.stdin.buffer)), sys.stdout, ensure_ascii=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
