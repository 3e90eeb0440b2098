"""The examination of a proposal: real compiler, real child process, and what hostile sources do to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from pointcall_executor.agent_api import check, examination, recorded
from pointcall_executor.agent_api.examination import Examination, examine
from pointcall_runbook import Interpreter, compile_source, verify_module
from pointcall_runbook import vocabulary as v
from pointcall_runbook.case import parse_cases
from tests.unit.report.sample_log import SampleLog

RECREATE = """\
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook, seconds


@runbook
def on_circuit_opened(e: CircuitOpened) -> Decision:
    if e.restarts < 3:
        return [Recreate(service=e.service, grace=seconds(2))]
    return []
"""
DIVIDES = """\
from pointcall_runbook import CircuitOpened, Decision, Recreate, runbook


@runbook
def on_circuit_opened(e: CircuitOpened) -> Decision:
    return [Recreate(service=e.service, grace=10 // e.restarts)]
"""


def outcomes(found: Examination) -> dict[str, str]:
    return {c.id: c.outcome for c in found.checks}


def test_a_good_proposal_passes_every_check_and_shows_what_it_changes() -> None:
    log = SampleLog()
    log.recover()
    log.recover(event=v.OomKilled(at=1, service=v.service("db"), kills=1, restarts=0))
    found = examine(RECREATE, "Give it time to stop.", recorded.cases(log))
    assert outcomes(found) == {
        "proposal.text": "pass",
        "proposal.compiles": "pass",
        "proposal.module": "pass",
        "proposal.simulation": "pass",
    }
    assert found.passed
    assert found.simulated == 1  # it does not handle the other event
    assert [c.model_dump() for c in found.capabilities] == [
        {"event": "CircuitOpened", "actions": ("recreate",), "fuel_bound": found.capabilities[0].fuel_bound}
    ]
    (row,) = found.differences
    assert not row.same
    assert row.recorded[0].endswith("grace=0)")
    assert row.proposed[0].endswith("grace=2000000000)")


def test_the_same_decision_is_not_a_difference() -> None:
    log = SampleLog()
    log.recover(actions=(v.Recreate(service=v.service("db"), grace=2_000_000_000),))
    (row,) = examine(RECREATE, "why", recorded.cases(log)).differences
    assert row.same
    assert row.recorded == row.proposed


def test_without_recorded_events_nothing_is_claimed() -> None:
    found = examine(RECREATE, "why", [])
    assert outcomes(found)["proposal.simulation"] == "not-checked"
    assert found.passed


@pytest.mark.parametrize("where", ["source", "rationale"])
def test_hidden_text_is_refused_before_anything_reads_it(where: str) -> None:
    texts = {"source": RECREATE, "rationale": "why"}
    texts[where] += "# \u202e hidden"
    found = examine(texts["source"], texts["rationale"], [])
    assert outcomes(found) == {
        "proposal.text": "fail",
        "proposal.compiles": "not-checked",
        "proposal.module": "not-checked",
        "proposal.simulation": "not-checked",
    }
    assert "U+202E (RIGHT-TO-LEFT OVERRIDE)" in found.checks[0].observed


NO_RUNBOOKS = {
    "import": "import os\n",
    "unended": "x = (",
    "endless loop": "def on(e):\n    while True: pass\n",
    "null": "\x00",
    "one word": "a" * 60_000,
    "deep brackets": "(" * 20_000,
    "deep minus": "-" * 60_000 + "1",
    "many lines": "x = 1\n" * 9_000,
}


@pytest.mark.parametrize("name", NO_RUNBOOKS)
def test_a_source_that_is_no_runbook_is_refused_and_never_an_exception(name: str) -> None:
    found = examine(NO_RUNBOOKS[name], "why", [])
    assert not found.passed
    assert "fail" in outcomes(found).values()


def test_what_the_compiler_says_reaches_the_author() -> None:
    found = examine(DIVIDES, "why", [])
    assert outcomes(found)["proposal.compiles"] == "fail"
    assert "the divisor can be zero" in found.checks[1].observed
    assert "\n  hint:" in found.checks[1].observed


def test_a_decision_that_traps_on_a_recorded_event_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler lets no trap through, so the fault is put in where the interpreter would report it."""
    log = SampleLog()
    made = log.recover()
    monkeypatch.setattr(check, "_decided", lambda *_: ([], "trap: unreachable"))
    found = check.examine({"source": RECREATE, "rationale": "why", "cases": recorded.cases(log), "names": []})
    assert found["checks"][-1]["id"] == "proposal.simulation"
    assert found["checks"][-1]["outcome"] == "fail"
    assert f"run {made.run}: trap: unreachable" in found["checks"][-1]["observed"]


def test_a_child_that_takes_too_long_is_a_failed_check() -> None:
    found = examine(RECREATE, "why", [], time_limit_s=0.001)
    assert outcomes(found) == {"proposal.examination": "fail"}
    assert not found.passed


@pytest.mark.parametrize(
    ("answer", "ended"), [(b"", ""), (b"{}", ""), (b'{"checks": []}', ""), (b"\xff", ""), (b"{}", "exit code 1")]
)
def test_an_answer_of_another_form_is_a_failed_check(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, ended: str
) -> None:
    monkeypatch.setattr(examination, "_answer", lambda *_: (answer, ended))
    assert outcomes(examine(RECREATE, "why", [])) == {"proposal.examination": "fail"}


def _in_child(program: str) -> subprocess.CompletedProcess[bytes]:
    code = f"from pointcall_executor.agent_api.check import limit_self\nimport sys\nlimit_self()\n{program}"
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False, timeout=30)


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("bytearray(1 << 30)", b"MemoryError"),
        ("f = [open('/dev/null') for _ in range(64)]", b"Too many open files"),
        ("import resource as r; sys.exit(f'most {r.getrlimit(r.RLIMIT_AS)[1]}')", b"most 536870912"),
    ],
)
def test_the_limits_hold(program: str, how: bytes) -> None:
    done = _in_child(program)
    assert done.returncode == 1
    assert how in done.stderr


def test_the_answer_cannot_grow_without_end() -> None:
    code = "import sys\nsys.stdout.buffer.write(b'x' * (3 << 20)); sys.stdout.flush()"
    with os.fdopen(os.memfd_create("answer"), "r+b") as answer:
        done = subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                f"from pointcall_executor.agent_api.check import limit_self\nlimit_self()\n{code}",
            ],
            stdout=answer,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode != 0
        assert os.fstat(answer.fileno()).st_size <= check.OUTPUT_BYTES


def test_calls_are_readable_and_unknown_ones_stay_numbers() -> None:
    call = v.Call.of(v.OpenCircuit(address=v.Address.parse("10.0.0.1"), port=80, hold=5))
    assert check.readable(call, {}) == "open_circuit(address=10.0.0.1, port=80, hold=5)"
    named = v.Call.of(v.Notify(channel=v.channel("ops"), level=v.Level.ERROR, code=7))
    assert check.readable(named, {v.channel("ops").number: "ops"}) == "notify(channel=ops, level=error, code=7)"
    assert check.readable(v.Call("format_disk\u202e", (1, 2)), {}) == "format_disk\\u{202e}(1, 2)"
    assert check.readable(v.Call("recreate", (-1, 0)), {}) == "recreate(-1, 0)"


def test_the_examination_is_the_same_twice() -> None:
    log = SampleLog()
    for _ in range(3):
        log.recover()
    request: dict[str, Any] = {"source": RECREATE, "rationale": "why", "cases": recorded.cases(log), "names": []}
    assert json.dumps(check.examine(request)) == json.dumps(check.examine(request))


def test_simulated_events_become_cases_of_the_runbook() -> None:
    """What a reviewer gets is what `pointcall test` runs: the cases parse, and the module decides them so."""
    log = SampleLog()
    made = log.recover()
    found = examine(RECREATE, "why", recorded.cases(log), ["db"])
    wasm = compile_source(RECREATE).wasm
    raw = json.dumps([d.case for d in found.differences]).encode()
    (case,) = parse_cases(raw, verify_module(wasm))
    assert case.name == f"run {made.run}"
    assert Interpreter(wasm).run(case.event, case.args).calls == case.calls
    assert found.differences[0].proposed == ("recreate(service=db, grace=2000000000)",)


def test_an_event_about_a_service_without_a_name_is_no_case() -> None:
    log = SampleLog()
    log.recover()
    assert [d.case for d in examine(RECREATE, "why", recorded.cases(log)).differences] == [None]


def test_every_kind_of_field_is_written_as_a_case_writes_it() -> None:
    names = {v.service("db").number: "db", v.channel("ops").number: "ops"}
    values = [v.service("db"), v.NO_SERVICE, v.channel("ops"), v.Level.ERROR, v.Address.parse("10.0.0.1"), True, 7]
    assert [check._written(value, names) for value in values] == ["db", "", "ops", "ERROR", "10.0.0.1", True, 7]
