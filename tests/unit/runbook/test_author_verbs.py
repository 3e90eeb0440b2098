"""`pointcall new`, `test` and `simulate`, as an author uses them one after the other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import pytest

from pointcall_executor.cli import new, simulate
from pointcall_executor.cli import test as test_verb
from pointcall_executor.cli.output import EnvironmentRefusal, UsageRefusal
from pointcall_runbook.case import CaseError


def call(verb: ModuleType, *words: str) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    verb.configure(parser)
    return int(verb.run(parser.parse_args(words)))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    assert call(new, "my-book", "--in", str(tmp_path)) == 0
    return tmp_path / "my-book"


def test_a_new_runbook_passes_its_cases(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(test_verb, "--json", "--require-branches", str(book)) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["cases"] == 3
    assert body["missing"] == body["failed"] == []


def test_a_name_is_taken_once(book: Path) -> None:
    with pytest.raises(UsageRefusal):
        call(new, "my-book", "--in", str(book.parent))
    with pytest.raises(UsageRefusal):
        call(new, "../other", "--in", str(book.parent))


def test_a_wrong_decision_fails_and_shows_both(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (book / "runbook.py").read_text()
    (book / "runbook.py").write_text(source.replace("seconds(1)", "seconds(2)"))
    assert call(test_verb, str(book)) == 1
    out = capsys.readouterr().out
    assert "FAIL a refusing service is recreated" in out
    assert "2000000000" in out


def test_missing_branches_are_found_by_search(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (book / "cases" / "cases.json").write_text("[]")
    capsys.readouterr()
    assert call(test_verb, "--json", "--require-branches", str(book)) == 1
    body = json.loads(capsys.readouterr().out)
    assert len(body["missing"]) == 4
    assert body["found"]


def test_a_source_outside_the_language_gives_diagnostics(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (book / "runbook.py").write_bytes(b"import os\n\xff\n")
    capsys.readouterr()
    assert call(test_verb, "--json", str(book)) == 1
    assert json.loads(capsys.readouterr().out)["diagnostics"][0]["id"] == "language.text"
    assert call(simulate, str(book), "--events", str(book / "README.md")) == 1
    assert "language.text" in capsys.readouterr().err


def test_simulate_shows_what_would_be_done(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = book / "events.jsonl"
    events.write_text('{"event":"CircuitOpened","fields":{"service":"api"}}\n\n{"event":"Timer"}\n')
    capsys.readouterr()
    assert call(simulate, "--json", str(book), "--events", str(events)) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["calls"] == [{"action": "recreate", "args": {"service": "api", "grace": 1_000_000_000}}]
    assert second["skipped"]
    assert first["why"] == [10, 12]
    assert call(simulate, "--why", str(book), "--events", str(events)) == 0
    assert "by lines 10, 12" in capsys.readouterr().out
    events.write_text("nonsense\n")
    with pytest.raises(CaseError):
        call(simulate, str(book), "--events", str(events))


def test_a_folder_without_a_runbook_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentRefusal, match="no runbook"):
        call(test_verb, str(tmp_path))
