"""The pages about runbooks are true: their sources compile, their cases pass, their figures and ids are the code's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pointcall_runbook import CompileError, Interpreter, compile_source, module, sections
from pointcall_runbook.body import MAX_NESTING
from pointcall_runbook.case import parse_cases
from pointcall_runbook.compiler import context, text
from pointcall_runbook.compiler.arithmetic import MAX_SHIFT
from pointcall_runbook.coverage import Coverage, summary
from pointcall_runbook.opcode import FUEL_PER_ENTRY, OPCODES
from pointcall_runbook.sdk import NAMES

ROOT = Path(__file__).resolve().parents[3]
HOWTO, LANGUAGE, ABI, CASES = (
    (ROOT / "docs" / page).read_text()
    for page in ("how-to/write-a-runbook.md", "spec/language.md", "spec/rb1.md", "spec/cases.md")
)
ROOM = ROOT / "runbooks" / "pointcall_runbook"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def ids(paths: list[Path], prefix: str) -> set[str]:
    return {found for path in paths for found in re.findall(rf'"({prefix}\.[a-z]+)"', path.read_text())}


@pytest.mark.parametrize("page", [HOWTO, LANGUAGE])
def test_every_source_on_a_page_compiles(page: str) -> None:
    for source in blocks(page, "python"):
        compile_source(source)


def test_the_how_to_shows_what_the_tools_print() -> None:
    (source,), (cases,) = blocks(HOWTO, "python"), blocks(HOWTO, "json")
    compiled = compile_source(source)
    reached, interpreter = Coverage(compiled), Interpreter(compiled.wasm)
    for case in parse_cases(cases.encode(), compiled.info):
        trace: list[tuple[int, bool]] = []
        assert interpreter.run(case.event, case.args, trace=trace).calls == case.calls, case.name
        reached.add(trace)
    counts = summary(reached)
    assert f"lines {counts['lines_reached']}/{counts['lines']}, " in HOWTO
    assert f"branches {counts['branches_reached']}/{counts['branches']}\n" in HOWTO
    assert f"{compiled.info.size} bytes, by {compiled.info.compiler}\n" in HOWTO
    assert f"module {compiled.info.sha256[:4]}...\n" in HOWTO
    assert f"at most {compiled.info.fuel_bound} fuel" in HOWTO
    assert f"\n{compiled.info.fuel_bound} fuel is the proven worst case" in HOWTO


def test_the_case_on_the_page_is_one() -> None:
    (case,) = blocks(CASES, "json")
    source = (ROOT / "runbooks/library/refusing-dependency/runbook.py").read_text()
    compiled = compile_source(source)
    (parsed,) = parse_cases(case.encode(), compiled.info)
    assert Interpreter(compiled.wasm).run(parsed.event, parsed.args).calls == parsed.calls
    assert set(re.findall(r"^\| `(\w+)` \|", CASES, re.MULTILINE)) == set(json.loads(case))


def test_the_error_on_the_page_is_the_compilers() -> None:
    source = (
        "from pointcall_runbook import SyscallUnusual, Decision, Notify, Level, channel, runbook\n\n"
        'OPS = channel("ops")\n\n\n@runbook\ndef f(e: SyscallUnusual) -> Decision:\n    if e.errors == 0:\n'
        "        return []\n    x = e.errors * 100 // e.calls\n"
        "    return [Notify(channel=OPS, level=Level.INFO, code=min(x, 5))]\n"
    )
    with pytest.raises(CompileError) as caught:
        compile_source(source, "runbook.py")
    assert f"```\n{caught.value}\n```" in LANGUAGE


def test_every_id_of_the_compiler_is_on_its_page() -> None:
    used = ids(list((ROOM / "compiler").glob("*.py")), "language") - {"language.refused"}
    shown = set(re.findall(r"`(language\.[a-z]+)`", LANGUAGE))
    assert shown <= used
    assert used - shown <= {"language.annotation", "language.signature", "language.top", "language.unknown"}


def test_every_id_of_the_verifier_is_on_its_page() -> None:
    used = ids(list(ROOM.glob("*.py")), "module")
    shown = set(re.findall(r"`(module\.[a-z]+)`", ABI))
    assert shown <= used
    assert used - shown <= {
        "module.malformed",
        "module.header",
        "module.truncated",
        "module.name",
        "module.import",
        "module.export",
    }


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (ABI, f"at most {sections.MAX_MODULE_BYTES // 1024} KiB"),
        (ABI, f"at most {sections.MAX_TYPES}; i32"),
        (ABI, f"at most {sections.MAX_FUNCTIONS}; each is reached"),
        (ABI, f"at most {sections.MAX_LOCALS} in a function"),
        (ABI, f"at most {MAX_NESTING} blocks deep"),
        (ABI, f"at most {module.MAX_FUEL:,} fuel"),
        (ABI, f"at most {module.MAX_STACK_SLOTS} values"),
        (LANGUAGE, f"at most {text.MAX_SOURCE_BYTES // 1024} KiB and {text.MAX_LINES:,} lines"),
        (LANGUAGE, f"at most {text.MAX_DEPTH} levels deep"),
        (LANGUAGE, f"at most {context.MAX_ITERATIONS} rounds"),
        (LANGUAGE, f"at most {context.MAX_HELPER_DEPTH} deep"),
        (LANGUAGE, f"a limit of {context.MAX_WORK:,} nodes"),
        (LANGUAGE, f"by 0..{MAX_SHIFT};"),
    ],
)
def test_a_limit_on_a_page_is_the_codes(page: str, words: str) -> None:
    assert words in page


def test_the_fuel_table_is_the_codes() -> None:
    free = re.search(r"^\| 0 \| `([^`]+)` \|", ABI, re.MULTILINE)
    assert free is not None
    assert set(free[1].split()) == {op.name for op in OPCODES.values() if op.fuel == 0}
    assert {op.fuel for op in OPCODES.values()} == {0, 1}
    assert FUEL_PER_ENTRY == 1


def test_imports_on_the_pages_exist() -> None:
    for page in (HOWTO, LANGUAGE):
        for name in re.findall(r"`([a-z]+)\((?:[^`]*)\)`", page):
            assert name in NAMES or name in {"min", "max", "abs", "int", "range"} or not name.islower()
