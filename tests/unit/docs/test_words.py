"""Words in documents are tested like code: ids, links, commands, exit codes, glossary."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pointcall_attest.errors import RefusedError
from pointcall_attest.findings import UnverifiedError
from pointcall_attest.verdict import Check, Verdict
from pointcall_executor.cli import VERBS
from pointcall_executor.cli.output import Exit
from pointcall_executor.core import guard

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(
    p
    for room in ("runbooks/pointcall_runbook", "attest", "keys", "executor")
    for p in (ROOT / room).rglob("*.py")
    if "generated" not in p.parts
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
ID = re.compile(r"[a-z][a-z0-9]*(?:\.[a-z0-9][a-z0-9_-]*)+")


def headings() -> set[str]:
    return set(re.findall(r"^### (\S+)$", (ROOT / "docs/checks.md").read_text(), re.MULTILINE))


def ids_of(tree: ast.Module) -> Iterator[str]:
    """Ids as they are written: `id="..."` in a call, `id = "..."` or `id: str = "..."` in a class."""
    for node in ast.walk(tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            values = [k.value for k in node.keywords if k.arg == "id"]
        elif isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "id" for t in line.targets):
                    values.append(line.value)
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id == "id":
                    values.append(line.value)
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and ID.fullmatch(value.value):
                yield value.value


def test_every_id_in_the_code_is_explained() -> None:
    used = {name: path for path in SOURCES for name in ids_of(ast.parse(path.read_text()))}
    missing = {name: str(path.relative_to(ROOT)) for name, path in used.items() if name not in headings()}
    assert missing == {}


def test_every_explained_id_is_in_the_code() -> None:
    text = "\n".join(p.read_text() for p in SOURCES)

    def made(name: str) -> bool:
        """Written whole, or put together from a room and a word."""
        room, _, word = name.rpartition(".")
        return name in text or (f'f"{room}.{{' in text and f'"{word}"' in text)

    assert [name for name in sorted(headings()) if not made(name)] == []


# Names of rooms: what an error would be called that does not say which one it is.
ROOMS = {
    "api.error", "api.serve", "arm.error", "attest.error", "attest.malformed", "attest.refused", "attest.unverified",
    "attest.verify", "channel.error", "journal.error", "kernel.error", "keys.error", "mirror.error", "pack.error",
    "pointcall.error", "privilege.error", "rollback.error", "service.error", "witness.refused",
}  # fmt: skip
ITS_OWN = {"RefusedError", "UnverifiedError", "WitnessRefusal"}  # their constructors find the id in what they are given


def test_every_error_says_which_one_it_is() -> None:
    """The id of a class is never what somebody reads: each place that raises one has an id of its own."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    classes = {
        node.name: set(ids_of(ast.Module([node], []))) & ROOMS
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    rooms = {name for name, found in classes.items() if found}
    assert set().union(*classes.values()) == ROOMS
    nameless = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.func.id}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in rooms - ITS_OWN
        if not any(keyword.arg in ("id", None) for keyword in node.keywords)
    ]
    assert nameless == []


def test_errors_that_carry_checks_are_called_after_the_first_that_failed() -> None:
    failed = Check("tee.measurement", "fail", "a", "b")
    passed = Check("tee.report_data", "pass")
    assert RefusedError(Verdict((passed, failed))).id == "tee.measurement"
    assert UnverifiedError((passed, failed)).id == "tee.measurement"


def test_every_rule_of_the_guard_is_in_its_table_in_the_spec() -> None:
    text = (ROOT / "docs/spec/guard.md").read_text()
    rules = set(re.findall(r"`(guard\.[a-z-]+)`", text))
    source = Path(guard.__file__).read_text() + (ROOT / "executor/pointcall_executor/core/step.py").read_text()
    assert rules == set(re.findall(r'Refusal\(\s*"(guard\.[a-z-]+)"', source))
    assert len(re.findall(r"^\| \d+ \|", text, re.MULTILINE)) == len(guard.FORBIDDEN + guard.TOO_MUCH)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_verb_has_a_module_and_every_module_a_verb() -> None:
    folder = ROOT / "executor/pointcall_executor/cli"
    modules = {p.stem.replace("_", "-") for p in folder.glob("*.py") if "\ndef configure(" in p.read_text()}
    assert modules == set(VERBS)


def test_the_spec_lists_every_verb() -> None:
    text = (ROOT / "docs/spec/cli.md").read_text()
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", text, re.MULTILINE)).items() >= VERBS.items()


def test_the_exit_codes_of_the_spec_are_those_of_the_code() -> None:
    text = (ROOT / "docs/spec/cli.md").read_text()
    assert set(map(int, re.findall(r"^\| (\d+) \|", text, re.MULTILINE))) == set(map(int, Exit))


def test_the_readme_shows_the_two_commands_and_the_demos_real_output() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    shown = text.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    for step in ("build", "sign", "attest", "refuse", "arm", "fail", "decide", "recover", "verify", "replay", "report"):
        assert re.search(rf"^✓ {step} ", shown, re.MULTILINE), step
