"""What cases reach, and the search for what they do not reach."""

from __future__ import annotations

from pointcall_runbook import Interpreter, compile_source
from pointcall_runbook.coverage import Coverage, search, summary

SOURCE = """from pointcall_runbook import CircuitOpened, Decision, Recreate, parameter, runbook
MAX = parameter(3, lo=0, hi=10)
@runbook
def opened(e: CircuitOpened) -> Decision:
    if e.port == 5432 and e.restarts < MAX:
        return [Recreate(service=e.service)]
    return []
"""
COMPILED = compile_source(SOURCE)


def test_nothing_is_reached_at_first() -> None:
    coverage = Coverage(COMPILED)
    assert coverage.lines == (set(), {5, 6, 7})
    assert len(coverage.missing) == coverage.total == 4


def test_one_run_reaches_its_own_lines_and_branches() -> None:
    coverage, trace = Coverage(COMPILED), list[tuple[int, bool]]()
    Interpreter(COMPILED.wasm).run("CircuitOpened", (0,) * 9 + (3,), trace=trace)
    assert coverage.add(trace)
    assert not coverage.add(trace)
    assert coverage.lines == ({5, 7}, {6})
    assert summary(coverage) == {"lines": 3, "lines_reached": 2, "branches": 4, "branches_reached": 2}


def test_the_search_reaches_the_rest_and_repeats_itself() -> None:
    first, second = Coverage(COMPILED), Coverage(COMPILED)
    found = search(first, seed=1)
    assert first.missing == []
    assert found == search(second, seed=1)
    assert any(f.args[3] == 5432 for f in found)
