"""The verbs `log`, `verify` and `replay` as scripts call them: JSON lines and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pointcall_attest.log.proof import Proof
from pointcall_executor.cli import main
from tests.unit.log import world


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    node = world.Node.boot(folder)
    for number in range(3):
        node.run(number)
    node.checkpoint()
    node.journal.close()
    (folder / "trust" / "emulated").mkdir(parents=True)
    (folder / "trust" / "policy.json").write_bytes(world.policy_bytes())
    (folder / "trust" / "trusted_root.json").write_bytes(b"{}")
    (folder / "trust" / "emulated" / "root.der").write_bytes(world.platform().root_der)
    return folder


@pytest.fixture
def call(state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_STATE_HOME", "/nonexistent")

    def go(*words: object, at: Path | None = state) -> tuple[int, list[dict[str, Any]], str]:
        code = main([*map(str, words), "--json", *(["--state-dir", str(at)] if at else [])])
        out = capsys.readouterr()
        return code, [json.loads(line) for line in out.out.splitlines() if line.startswith("{")], out.out

    return go


def first_run(call: Any) -> str:
    return str(call("log", "list")[1][0]["run"])


def test_list_prints_one_run_a_line(call: Any) -> None:
    code, rows, _ = call("log", "list")
    assert code == 0
    assert [r["runbook"] for r in rows] == ["web"] * 3
    assert all({"run", "index", "leaf_hash", "actions"} <= r.keys() for r in rows)
    assert len(call("log", "list", "--kind", "all")[1]) == 10
    assert [r["index"] for r in call("log", "list", "--kind", "intent", "--start", "2", "--limit", "1")[1]] == [4]
    assert call("log", "list", "--kind", "nonsense")[0] == 2


def test_show_and_prove(call: Any, tmp_path: Path) -> None:
    run = first_run(call)
    _, (row,), _ = call("log", "show", run)
    assert row["body"]["run"]["id"] == run
    assert call("log", "show", "0")[1][0]["kind"] == "epoch-open"
    assert call("log", "show", "99")[0] == 1
    assert call("log", "prove", run, "--out", tmp_path / "p")[0] == 0
    assert Proof.parse((tmp_path / "p").read_bytes()).index == row["index"]


def test_stream_and_check_of_a_copy(call: Any, tmp_path: Path) -> None:
    for form, count in (("otel", 10), ("ocsf", 3)):
        code, rows, text = call("log", "stream", "--format", form)
        assert (code, len(rows)) == (0, count)
        copy = tmp_path / form
        copy.write_text(text)
        assert call("log", "stream", "--format", form, "--check", copy)[0] == 0
        copy.write_text("\n".join(text.splitlines()[1:]))
        code, (found,), _ = call("log", "stream", "--format", form, "--check", copy)
        assert (code, len(found["wrong"])) == (1, 1)


def test_other_forms_of_an_entry(call: Any) -> None:
    run = first_run(call)
    assert json.loads(call("log", "show", run, "--raw")[2])["payloadType"] == "application/vnd.in-toto+json"
    assert json.loads(call("log", "show", run, "--bundle")[2])["dsseEnvelope"]
    assert call("log", "show", run, "--key")[2].startswith("-----BEGIN PUBLIC KEY-----")


def test_tiles(call: Any, tmp_path: Path) -> None:
    code, (row,), _ = call("log", "tiles", "--out", tmp_path / "t")
    assert (code, row["size"]) == (0, 10)
    assert call("verify", tmp_path / "t")[0] == 0


def test_check(call: Any) -> None:
    code, (verdict,), _ = call("log", "check")
    assert (code, verdict["verdict"], verdict["entries"]) == (0, "accept", 10)


def test_export_and_verify_with_each_kind_of_trust(call: Any, state: Path, tmp_path: Path) -> None:
    run, pack = first_run(call), tmp_path / "pack"
    assert call("log", "export", "--run", run, "--out", pack)[0] == 0
    assert call("verify", pack, "--allow-emulated")[0] == 0
    code, (verdict,), _ = call("verify", pack)
    assert (code, verdict["verdict"], verdict["tier"]) == (3, "accept", "emulated")
    assert call("verify", run, "--allow-emulated")[0] == 0
    assert call("verify", pack, "--trust", state / "trust", "--allow-emulated", at=None)[0] == 0
    code, (verdict,), _ = call("verify", pack, "--allow-emulated", at=None)
    assert (code, verdict["not_checked"][0]) == (0, "trust.source")
    assert call("verify", pack, at=None)[0] == 5
    assert call("verify", pack, "--allow-emulated", "--at", "2030-01-01T00:00:00Z")[0] == 1
    assert call("verify", pack, "--at", "yesterday")[0] == 2


def test_a_receipt_in_a_file_is_verified_as_it_is(call: Any, tmp_path: Path) -> None:
    run, pack, file = first_run(call), tmp_path / "pack", tmp_path / "receipt.json"
    call("log", "export", "--run", run, "--out", pack)
    index = call("log", "show", run)[1][0]["index"]
    raw = (pack / "entries" / f"{index}.json").read_bytes()
    file.write_bytes(raw)
    assert call("verify", file, "--allow-emulated")[0] == 0
    for at in range(0, len(raw), 97):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert call("verify", file, "--allow-emulated")[0] in (1, 4), at


def test_replay(call: Any) -> None:
    code, rows, _ = call("replay", "--all")
    assert code == 0
    assert rows[-1] == {"runs": 3, "identical": 3, "different": 0}
    assert call("replay", first_run(call))[1][0]["identical"] is True
    assert call("replay")[0] == 2
    assert call("replay", "01ARZ3NDEKTSV4RRFFQ69G5FAV")[0] == 1


def test_without_a_journal(call: Any, tmp_path: Path) -> None:
    run = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    for words in (["log", "list"], ["replay", "--all"], ["verify", run]):
        assert call(*words, at=tmp_path)[0] == 5


def test_the_tables_for_people(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["log", "list"], ["log", "check"], ["replay", "--all"]):
        assert main([*words, "--state-dir", str(state)]) == 0
    shown = capsys.readouterr().out
    assert "CircuitOpened" in shown
    assert "3 decisions made again, 0 different" in shown
