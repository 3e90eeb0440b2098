"""Every runbook of the library: it compiles, it verifies, its cases pass in all implementations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointcall_executor.wasm import Runner
from pointcall_runbook import Interpreter, compile_source, verify_module
from pointcall_runbook.case import Case, parse_cases
from pointcall_runbook.coverage import Coverage
from pointcall_runbook.cpython import Plain, load
from pointcall_runbook.vocabulary import ActionKind
from tests.fuzz.runbook.values import arguments

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"
FOLDERS = sorted(path.parent for path in LIBRARY.glob("*/runbook.py"))
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def source(folder: Path) -> str:
    return (folder / "runbook.py").read_text()


def cases(folder: Path, plain: Plain) -> list[Case]:
    files = sorted((folder / "cases").glob("*.json"))
    return [case for path in files for case in parse_cases(path.read_bytes(), plain.compiled.info)]


def test_the_library_is_there() -> None:
    assert len(FOLDERS) >= 10


@each
def test_it_verifies_and_costs_little(folder: Path) -> None:
    compiled = compile_source(source(folder))
    assert verify_module(compiled.wasm) == compiled.info
    assert compiled.wasm == compile_source(source(folder)).wasm
    assert compiled.info.fuel_bound < 200


@each
def test_its_cases_pass_in_all_three_implementations(folder: Path) -> None:
    plain = load(source(folder))
    wasm, info = plain.compiled.wasm, plain.compiled.info
    runner, interpreter = Runner(wasm, info), Interpreter(wasm)
    found = cases(folder, plain)
    for case in found:
        decided = interpreter.run(case.event, case.args)
        assert decided.calls == case.calls, case.name
        assert runner.decide(case.event, case.args) == decided, case.name
        assert plain.decide(case.event, case.args) == case.calls, case.name
    assert {case.event for case in found} == set(info.handlers)
    assert len({case.name for case in found}) == len(found)


@each
def test_its_cases_reach_every_line_and_nine_branches_of_ten(folder: Path) -> None:
    plain = load(source(folder))
    interpreter, reached = Interpreter(plain.compiled.wasm), Coverage(plain.compiled)
    for case in cases(folder, plain):
        trace: list[tuple[int, bool]] = []
        interpreter.run(case.event, case.args, trace=trace)
        reached.add(trace)
    assert reached.lines[1] == set()
    assert len(reached.missing) * 10 <= reached.total, reached.missing


@each
def test_any_event_gives_one_decision_that_the_vocabulary_has(folder: Path) -> None:
    plain = load(source(folder))
    wasm, info = plain.compiled.wasm, plain.compiled.info
    runner, interpreter = Runner(wasm, info), Interpreter(wasm)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(sorted(info.handlers)).flatmap(lambda e: st.tuples(st.just(e), arguments(info, e))))
    def check(event_and_args: tuple[str, tuple[int, ...]]) -> None:
        event, args = event_and_args
        decided = runner.decide(event, args)
        assert interpreter.run(event, args) == decided
        assert plain.decide(event, args) == decided.calls
        assert decided.fuel <= info.handlers[event].fuel_bound
        for call in decided.calls:
            call.typed()

    check()


@each
def test_its_readme_says_what_it_may_do_and_what_its_codes_mean(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    info = compile_source(source(folder)).info
    assert readme.startswith(f"# {folder.name}\n")
    assert not [p.name for p in info.parameters if p.name not in readme]
    assert not [name for name in (*info.services, *info.channels) if name not in readme]
    assert not [action for action in info.capabilities if action not in readme]


@each
def test_cases_are_plain_data(folder: Path) -> None:
    for path in (folder / "cases").glob("*.json"):
        assert re.fullmatch(r"[a-z0-9-]+", path.stem)
        assert isinstance(json.loads(path.read_text()), list | dict)


def test_together_they_use_most_of_the_vocabulary() -> None:
    used = {action for folder in FOLDERS for action in compile_source(source(folder)).info.capabilities}
    assert len(used) >= len(ActionKind) - 3
