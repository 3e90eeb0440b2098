"""The verbs of a runbook's author: explain, inspect, new, test, simulate. As a shell would call them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pointcall_executor import cli
from pointcall_runbook import compile_source, sdk
from pointcall_runbook.vocabulary import ACTIONS, EVENTS, fields
from tests.unit.signing.world import statement

LIBRARY = Path(__file__).resolve().parents[3] / "runbooks" / "library"
BLOBS = Path(cli.__file__).resolve().parents[1] / "blobs"


class Shell:
    """Runs a verb: exit code, output, errors."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, verb: str, *words: str | Path) -> tuple[int, str, str]:
        code = cli.main([verb, *map(str, words)])
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, verb: str, *words: str | Path) -> dict[str, Any]:
        code, out, _ = self(verb, "--json", *words)
        body: dict[str, Any] = json.loads(out)
        return body | {"code": code}


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


NAMES = [
    *EVENTS,
    *ACTIONS,
    *(cls.__name__ for cls in ACTIONS.values()),
    *sdk.NAMES,
    "events",
    "actions",
    "enums",
    "sdk",
]


@pytest.mark.parametrize("word", NAMES)
def test_every_word_of_the_vocabulary_is_explained(shell: Shell, word: str) -> None:
    (table,) = shell.json("explain", word)["explained"]
    assert table["text"]
    code, out, _ = shell("explain", word)
    assert (code, table["name"] in out) == (0, True)


@pytest.mark.parametrize("cls", [*EVENTS.values(), *ACTIONS.values()], ids=lambda cls: cls.__name__)
def test_a_schema_has_the_ranges_of_the_vocabulary(shell: Shell, cls: type) -> None:
    (table,) = shell.json("explain", cls.__name__)["explained"]
    assert [row["name"] for row in table["rows"]] == [f.name for f in fields(cls)]
    for row, field in zip(table["rows"], fields(cls), strict=True):
        assert row.get("lo", str(field.lo)) == str(field.lo)
        assert row.get("hi", str(field.hi)) == str(field.hi)
        assert row.get("members") == ([m.name for m in field.enum] if field.enum else None)


def test_a_field_carries_the_note_beside_it_and_no_other(shell: Shell) -> None:
    rows = {row["name"]: row for row in shell.json("explain", "CircuitOpened")["explained"][0]["rows"]}
    assert rows["opens"]["text"] == "fact: openings of this circuit in the last hour, this one included"
    assert "text" not in rows["address"]
    (only,) = shell.json("explain", "CircuitOpened.opens")["explained"][0]["rows"]
    assert only == rows["opens"]


@pytest.mark.parametrize("word", ["Circuit", "CircuitOpened.open", "Level.LOUD", "", "rb1.recreate", "[bold]"])
def test_a_word_that_means_nothing_is_a_usage_error(shell: Shell, word: str) -> None:
    code, _, err = shell("explain", word)
    assert (code, "[explain.unknown]" in err) == (2, True)


def test_a_near_miss_is_suggested(shell: Shell) -> None:
    assert "CircuitOpened" in shell("explain", "CircuitOpend")[2]


def test_inspect_shows_a_source_and_its_module_alike(shell: Shell, tmp_path: Path) -> None:
    source = LIBRARY / "crash-loop" / "runbook.py"
    module = tmp_path / "module.wasm"
    module.write_bytes(compile_source(source.read_text()).wasm)
    from_source, from_module = shell.json("inspect", source), shell.json("inspect", module)
    assert from_source == from_module == shell.json("inspect", source.parent)
    assert from_source["kind"] == "module"
    assert [h["event"] for h in from_source["handlers"]] == ["ActionDone", "ProcessExited", "Timer"]
    _, out, _ = shell("inspect", source)
    assert "on ProcessExited: may call again, escalate, recreate, remember" in out
    assert "parameter MAX_EXITS = 6, 1..1000" in out


def test_inspect_lists_instructions_beside_source_lines(shell: Shell) -> None:
    _, out, _ = shell("inspect", LIBRARY / "disk-error", "--listing")
    assert "| if e.errors == 0:" in out
    assert "local.get" in out


def test_inspect_refuses_a_source_outside_the_language(shell: Shell, tmp_path: Path) -> None:
    source = tmp_path / "runbook.py"
    source.write_text("import os\n")
    code, _, err = shell("inspect", source)
    assert (code, "runbook.py:1:1:" in err, "[language.form]" in err) == (1, True, True)
    body = shell.json("inspect", source)
    assert (body["code"], body["ok"], body["diagnostics"][0]["line"]) == (1, False, 1)


def test_inspect_refuses_bytes_that_are_no_module(shell: Shell, tmp_path: Path) -> None:
    module = tmp_path / "module.wasm"
    module.write_bytes(b"\0asm\x01\0\0\0")
    body = shell.json("inspect", module)
    assert (body["code"], body["error"]["id"]) == (1, "module.export")
    assert shell("inspect", tmp_path / "none.wasm")[0] == 5


def test_inspect_shows_what_a_blob_attaches_to(shell: Shell) -> None:
    blob = BLOBS / "breaker.blob"
    if not blob.is_file():
        pytest.skip("the BPF blobs are not built: make bpf")
    body = shell.json("inspect", blob)
    assert any(p["attaches"].startswith("cgroup/connect4") for p in body["programs"])
    assert "attaches to cgroup/connect4" in shell("inspect", blob)[1]


def test_inspect_shows_what_a_manifest_grants(shell: Shell, tmp_path: Path) -> None:
    plain, bundle = tmp_path / "manifest.json", tmp_path / "manifest.sigstore.json"
    plain.write_bytes(statement())
    payload = base64.b64encode(statement()).decode()
    envelope = {"payload": payload, "payloadType": "application/vnd.in-toto+json", "signatures": []}
    bundle.write_text(
        json.dumps({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": envelope})
    )
    body = shell.json("inspect", plain)
    assert (body["kind"], body["verified"], body["signed"]) == ("manifest", False, False)
    assert body["runbooks"][0]["grants"]["actions"] == ["recreate"]
    out = shell("inspect", bundle)[1]
    assert "signed, not verified here" in out
    assert "    may recreate\n    services: db\n" in out


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"dsseEnvelope": 1}', "[" * 100_000])
def test_inspect_refuses_what_is_no_manifest(shell: Shell, tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    assert shell("inspect", path)[0] in (1, 4)


def test_a_new_runbook_passes_its_tests_and_simulates(shell: Shell, tmp_path: Path) -> None:
    assert shell("new", "my-first", "--in", tmp_path)[0] == 0
    folder = tmp_path / "my-first"
    assert {p.name for p in folder.iterdir()} == {"README.md", "cases", "runbook.py"}
    body = shell.json("test", folder)
    assert (body["code"], body["failed"], body["missing"]) == (0, [], [])
    events = tmp_path / "events.jsonl"
    rows = [{"event": "CircuitOpened", "fields": {"service": "api"}}, {"event": "Timer"}]
    events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = shell("simulate", folder, "--events", events, "--json")
    first, second = map(json.loads, out.splitlines())
    assert code == 0
    assert first["calls"] == [{"action": "recreate", "args": {"service": "api", "grace": 1_000_000_000}}]
    assert (second["calls"], second["skipped"]) == ([], "not handled")


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "../x", "-x"])
def test_a_bad_name_makes_no_folder(shell: Shell, tmp_path: Path, name: str) -> None:
    assert shell("new", "--in", tmp_path, "--", name)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_stays_as_it_is(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert shell("new", "mine", "--in", tmp_path)[0] == 2
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_case_that_fails_says_what_was_wanted(shell: Shell, tmp_path: Path) -> None:
    shell("new", "one", "--in", tmp_path)
    cases = tmp_path / "one" / "cases" / "cases.json"
    cases.write_text(
        json.dumps([{"name": "wrong", "event": "CircuitOpened", "fields": {"service": "api"}, "calls": []}])
    )
    code, out, _ = shell("test", tmp_path / "one")
    assert (code, "FAIL wrong" in out, "recreate" in out) == (1, True, True)
    body = shell.json("test", tmp_path / "one")
    assert body["missing"]
    assert body["found"], "the search reaches what the one case leaves out"


@pytest.mark.parametrize(
    "case",
    [
        "",
        "{}",
        "[1]",
        '{"name": "x", "event": "Timer", "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"servce": "api"}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"port": 65536}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"port": true}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"port": 1.5}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"address": "10.0.0.0/8"}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"address": 7}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "fields": {"service": 7}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "parameters": {"MAX": 1}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "parameters": {"MAX_RESTARTS": 101}, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "remembered": 3, "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "calls": [{"action": "reboot"}]}',
        '{"name": "x", "event": "CircuitOpened", "calls": [{"action": "recreate", "args": {"grace": -1}}]}',
        '{"name": "x", "event": "CircuitOpened", "calls": [{"action": ["recreate"]}]}',
        '{"name": "x", "event": ["CircuitOpened"], "calls": []}',
        '{"name": "x", "event": "CircuitOpened", "calls": {}}',
        '{"name": "x", "event": "CircuitOpened", "calls": [], "call": []}',
        "[" * 100_000,
    ],
)
def test_a_malformed_case_is_refused_by_name(shell: Shell, tmp_path: Path, case: str) -> None:
    shell("new", "one", "--in", tmp_path)
    (tmp_path / "one" / "cases" / "cases.json").write_text(case)
    body = shell.json("test", tmp_path / "one")
    assert (body["code"], body["error"]["id"]) == (4, "case.malformed")


def test_the_whole_library_passes_at_once(shell: Shell) -> None:
    folders = sorted(path.parent for path in LIBRARY.glob("*/runbook.py"))
    code, out, _ = shell("test", "--no-search", *folders)
    assert code == 0, out
    assert out.count(" cases pass") == len(folders)
